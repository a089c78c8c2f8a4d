"""Whether the transformers engine can serve an architecture: `python -m services.policy.check FOLDER`.

One line of JSON: `outcome` (agrees, plain, refused), `difference` in nats, `reason`, `limit`, `decoder`. `prepare` and
`steersman validate` ask before anything is spent; see `engines/choice.py`.
"""

from __future__ import annotations

import json
import math
import sys
from dataclasses import asdict

from transformers import AutoConfig

from services.policy.engines.choice import engine_verdict
from services.policy.engines.transformers_engine import with_decoder
from steersman.nn.load import quiet_libraries


def main() -> None:
    quiet_libraries()
    decoder, verdict = engine_verdict(AutoConfig.from_pretrained(sys.argv[1]), with_decoder)
    found = asdict(verdict) | {"decoder": decoder}
    if not math.isfinite(verdict.difference):
        found["difference"] = None
    print(json.dumps(found))


if __name__ == "__main__":
    main()
