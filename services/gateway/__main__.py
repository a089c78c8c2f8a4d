"""`python -m services.gateway --config FILE [--set a.b=c]`"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from services.gateway.config import GatewayConfig, load_config
from steersman import loading
from steersman.config.base import dump_yaml
from steersman.ending import end_within
from steersman.errors import SteersmanError


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m services.gateway", description="The inference endpoint.")
    parser.add_argument("--config", type=Path, help="YAML file; without it everything has its default")
    parser.add_argument("--set", action="append", default=[], metavar="a.b=c", help="override one value")
    parser.add_argument("--print-config", action="store_true", help="print the resolved configuration and stop")
    options = parser.parse_args(arguments)
    try:
        config = load_config(options.config, options.set)
        if options.print_config:
            print(dump_yaml(config), end="")
            return 0
        return _run(config)
    except SteersmanError as error:
        print(f"gateway: {error}", file=sys.stderr)
        return error.exit_code


def _run(config: GatewayConfig) -> int:
    loading.begin()
    # Imported late: `--help` and configuration errors need none of it.
    import uvloop

    from services.gateway.logs import configure_logging
    from services.gateway.server import Gateway

    async def serve() -> int:
        gateway = Gateway(config)
        gateway.hear_signals()  # from before it listens
        await gateway.start()
        loading.done()
        try:
            await gateway.run_until_signal()
            code = 0
        except SteersmanError as error:
            print(f"gateway: {error}", file=sys.stderr)
            code = error.exit_code
        end_within(2.0, code)  # what was acknowledged is stored
        return code

    configure_logging()
    # The thread that writes to the database hands the interpreter back sooner than after the usual 5 ms.
    sys.setswitchinterval(0.001)
    return uvloop.run(serve())


if __name__ == "__main__":
    sys.exit(main())
