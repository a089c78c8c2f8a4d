"""`python -m steersman.rpc.probe HOST:PORT...`: asks grpc.health.v1 whether servers are SERVING; exit 1 when not.

The kubelet's own gRPC probe speaks neither TLS nor mTLS; this one does, with the server's own certificate.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from steersman.config.tls import ClientTls
from steersman.rpc.tls import channel_credentials

CALL_SECONDS = 4.0


def serving(target: str, tls: Path | None, *, live: bool) -> bool:
    """Whether a server says SERVING, or, for liveness, whether it says anything.

    Args:
        target: host:port.
        tls: folder with ca.crt, tls.crt and tls.key; None: plain text.
        live: NOT_SERVING is good enough: the process answers.
    """
    if tls is None:
        channel = grpc.insecure_channel(target)
    else:
        channel = grpc.secure_channel(target, channel_credentials(ClientTls.in_folder(tls)))
    with channel:
        try:
            answer = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=CALL_SECONDS)
        except grpc.RpcError:
            return False
    return live or answer.status == health_pb2.HealthCheckResponse.SERVING


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m steersman.rpc.probe", description=__doc__.partition("\n")[0])
    parser.add_argument("targets", nargs="+", metavar="HOST:PORT")
    parser.add_argument("--tls", type=Path, help="folder with ca.crt, tls.crt and tls.key")
    parser.add_argument("--live", action="store_true", help="any answer will do")
    parser.add_argument("--wait", type=float, default=0.0, help="seconds to wait for all of them")
    arguments = parser.parse_args()
    deadline = time.monotonic() + arguments.wait
    for target in arguments.targets:
        while not serving(target, arguments.tls, live=arguments.live):
            if time.monotonic() >= deadline:
                print(f"{target}: not serving", file=sys.stderr)
                return 1
            time.sleep(1.0)
        print(f"{target}: serving")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
