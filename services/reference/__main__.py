"""`python -m services.reference --config FILE [--set a.b=c]`"""

from __future__ import annotations

import asyncio

from services.reference.config import ReferenceConfig
from steersman.rpc.app import service_main
from steersman.rpc.server import Server


async def serve(config: ReferenceConfig) -> None:
    """Loads the model while health says NOT_SERVING, then serves until a signal comes."""
    from services.reference.engine import ReferenceEngine
    from services.reference.servicer import ReferenceServicer
    from steersman.v1 import reference_pb2_grpc

    engine = ReferenceEngine(config)
    servicer = ReferenceServicer(engine, config)
    service = (
        reference_pb2_grpc.add_ReferenceServiceServicer_to_server,
        servicer,
        "steersman.v1.ReferenceService",
    )
    server = Server(config, [(config.port, [service])], on_drain=servicer.batcher.close)
    await server.run(load=lambda: asyncio.to_thread(engine.load))


if __name__ == "__main__":
    service_main("reference", ReferenceConfig, serve)
