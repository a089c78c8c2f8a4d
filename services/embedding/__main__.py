"""`python -m services.embedding --config FILE [--set a.b=c]`"""

from __future__ import annotations

import asyncio
import logging

from services.embedding.config import EmbeddingConfig
from steersman.rpc.app import service_main
from steersman.rpc.server import Server

SERVICE_NAME = "steersman.v1.EmbeddingService"
log = logging.getLogger("steersman.embedding")


async def serve(config: EmbeddingConfig) -> None:
    """Loads the model while health says NOT_SERVING, then serves until a signal comes."""
    from services.embedding.servicer import EmbeddingServicer
    from steersman.nn.prepare import resolve_model
    from steersman.v1 import embedding_pb2_grpc

    servicer = EmbeddingServicer(
        lambda: resolve_model(config.model, config.cache_dir, note=log.info), config, config.device
    )
    service = (embedding_pb2_grpc.add_EmbeddingServiceServicer_to_server, servicer, SERVICE_NAME)
    server = Server(config, [(config.port, [service])], on_drain=servicer.close)
    await server.run(load=lambda: asyncio.to_thread(servicer.load))


if __name__ == "__main__":
    service_main("embedding", EmbeddingConfig, serve)
