"""torchrun whose exit code is that of the rank that failed: `python -m training.ranks TORCHRUN-ARGUMENTS`.

torchrun itself exits with 1 whatever happened, so a Job could not tell wrong input from a lost connection.
"""

from __future__ import annotations

import sys

from torch.distributed import run
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError


def main() -> None:
    try:
        run.main(sys.argv[1:])
    except ChildFailedError as error:
        _, failure = error.get_first_failure()
        # A signal is negative here; a container says 128 + signal.
        raise SystemExit(failure.exitcode if failure.exitcode > 0 else 128 - failure.exitcode) from None


if __name__ == "__main__":
    main()
