"""Whether an engine can serve an architecture: `python -m services.policy.check FOLDER [transformers|vllm]`.

One line of JSON: `outcome` (agrees, plain, refused), `difference` in nats, `reason`, `limit`, `computed` (false: it is
not known). `prepare` and `steersman validate` ask before anything is spent; see `engines/choice.py` and
`engines/vllm_choice.py`.
"""

from __future__ import annotations

import json
import math
import sys
from dataclasses import asdict
from pathlib import Path

from transformers import AutoConfig

from services.policy.engines.choice import engine_verdict
from services.policy.engines.transformers_engine import with_decoder
from steersman.nn.load import quiet_libraries
from steersman.nn.parity import ParityVerdict


def main() -> None:
    quiet_libraries()
    folder, engine = Path(sys.argv[1]), (sys.argv[2:] or ["transformers"])[0]
    verdict = (
        _of_vllm(folder) if engine == "vllm" else engine_verdict(AutoConfig.from_pretrained(folder), with_decoder)[1]
    )
    found = asdict(verdict)
    if not math.isfinite(verdict.difference):
        found["difference"] = None
    print(json.dumps(found))


def _of_vllm(folder: Path) -> ParityVerdict:
    from services.policy.engines.vllm_engine import VllmEngine

    return VllmEngine(folder).verdict()


if __name__ == "__main__":
    main()
