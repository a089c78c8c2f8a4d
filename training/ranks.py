"""torchrun whose exit code is that of the rank that failed: `python -m training.ranks TORCHRUN-ARGUMENTS`.

torchrun itself exits with 1 whatever happened, so a Job could not tell wrong input from a lost connection.

`--one-machine` in place of a rendezvous: the ranks meet through a file that only this user reads. torchrun's
`--standalone` listens on all addresses, and its store unpickles what it is sent.
"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

from torch.distributed import HashStore, run
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.elastic.rendezvous import RendezvousHandler, RendezvousInfo, RendezvousParameters
from torch.distributed.elastic.rendezvous.api import RendezvousStoreInfo, rendezvous_handler_registry

import steersman  # noqa: F401 - torch asks for the user's name and home
from training import RANKS_FILE


class OneMachine(RendezvousHandler):
    """The agent is the only one, so there is nobody to meet and no address to listen on."""

    use_agent_store = False

    def __init__(self, run_id: str) -> None:
        self._run_id = run_id

    def get_backend(self) -> str:
        return "one-machine"

    def next_rendezvous(self) -> RendezvousInfo:
        nowhere = RendezvousStoreInfo("localhost", 0)  # for the ranks' environment; `parallel.meet` does not ask there
        return RendezvousInfo(HashStore(), 0, 1, nowhere)

    def is_closed(self) -> bool:
        return False

    def set_closed(self) -> None: ...

    def num_nodes_waiting(self) -> int:
        return 0

    def get_run_id(self) -> str:
        return self._run_id

    def shutdown(self) -> bool:
        return True


def _one_machine(parameters: RendezvousParameters) -> RendezvousHandler:
    return OneMachine(parameters.run_id)


def main() -> None:
    arguments = sys.argv[1:]
    with tempfile.TemporaryDirectory(prefix="ranks-") as folder:  # mode 0700
        if not any(argument.startswith(("--log-dir", "--log_dir")) for argument in arguments):
            arguments.insert(0, f"--log-dir={folder}/logs")  # torch's own folder would stay behind
        if "--one-machine" in arguments:
            rendezvous_handler_registry.register("one-machine", _one_machine)
            arguments[arguments.index("--one-machine")] = "--rdzv-backend=one-machine"
            os.environ[RANKS_FILE] = str(Path(folder) / "meeting")
            for library in ("GLOO", "NCCL"):
                os.environ.setdefault(f"{library}_SOCKET_IFNAME", "lo")
        try:
            run.main(arguments)
        except SignalException as error:
            # The ranks were told and have left; without this it is a trace and 1.
            raise SystemExit(128 + error.sigval) from None
        except ChildFailedError as error:
            _, failure = error.get_first_failure()
            # A signal is negative here; a container says 128 + signal.
            raise SystemExit(failure.exitcode if failure.exitcode > 0 else 128 - failure.exitcode) from None


if __name__ == "__main__":
    main()
