"""`python -m services.controller --config FILE [--set a.b=c]`"""

from __future__ import annotations

from services.controller.config import ControllerConfig
from steersman.rpc.app import service_main

if __name__ == "__main__":
    from services.controller.operator import serve

    service_main("controller", ControllerConfig, serve)  # type: ignore[type-var]
