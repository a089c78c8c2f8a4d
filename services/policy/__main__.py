"""`python -m services.policy --config FILE [--set a.b=c]`"""

from __future__ import annotations

import asyncio

from services.policy.config import PolicyConfig
from steersman.rpc.app import service_main
from steersman.rpc.metrics import GENERATION_RUNNING, GENERATION_WAITING, WEIGHTS_VERSION
from steersman.rpc.server import Server, Service


async def serve(config: PolicyConfig) -> None:
    """Loads the engine while health says NOT_SERVING, then serves until a signal comes."""
    from services.policy.build import build_engine, load_chat_format, model_folder
    from services.policy.servicer import PolicyServicer
    from services.policy.weights import WeightsServicer
    from steersman.v1 import policy_pb2_grpc, weights_pb2_grpc

    engine = build_engine(config)
    chat = await asyncio.to_thread(load_chat_format, config)

    GENERATION_RUNNING.set_function(lambda: engine.info().running)
    GENERATION_WAITING.set_function(lambda: engine.info().waiting)
    WEIGHTS_VERSION.set_function(lambda: engine.info().weights_version)

    async def close() -> None:
        await asyncio.to_thread(engine.close)
        if embedding is not None:
            await embedding.close()

    def load() -> None:
        engine.start()
        if embedding is not None:
            embedding.load()

    data = (
        policy_pb2_grpc.add_PolicyServiceServicer_to_server,
        PolicyServicer(engine, chat),
        "steersman.v1.PolicyService",
    )
    control = (
        weights_pb2_grpc.add_WeightsServiceServicer_to_server,
        WeightsServicer(engine, config),
        "steersman.v1.WeightsService",
    )
    listeners: list[tuple[int, list[Service]]] = [(config.port, [data])]
    embedding = None
    if config.embeddings is not None:
        from services.embedding.servicer import EmbeddingServicer
        from steersman.v1 import embedding_pb2_grpc

        embedding = EmbeddingServicer(lambda: model_folder(config), config.embeddings, config.device)
        add = embedding_pb2_grpc.add_EmbeddingServiceServicer_to_server
        listeners[0][1].append((add, embedding, "steersman.v1.EmbeddingService"))
    if config.weights_port is not None:
        listeners.append((config.weights_port, [control]))
    server = Server(config, listeners, on_drain=close)
    await server.run(load=lambda: asyncio.to_thread(load))


if __name__ == "__main__":
    service_main("policy", PolicyConfig, serve)
