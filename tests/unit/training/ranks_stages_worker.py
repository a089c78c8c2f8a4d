"""One rank of test_ranks: `torchrun ... ranks_stages_worker.py RUN_DIR STAGE...` runs stages one after the other."""

from __future__ import annotations

import sys
from pathlib import Path

from training.stage import run_stage

if __name__ == "__main__":
    for stage in sys.argv[2:]:
        run_stage(Path(sys.argv[1]), stage, [])
