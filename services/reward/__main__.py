"""`python -m services.reward --config FILE [--set a.b=c]`"""

from __future__ import annotations

import asyncio

from services.reward.config import RewardConfig
from steersman.rpc.app import service_main
from steersman.rpc.server import Server


async def serve(config: RewardConfig) -> None:
    """Loads the scorers while health says NOT_SERVING, then serves until a signal comes."""
    from services.reward.engine import RewardEngine
    from services.reward.servicer import RewardServicer
    from steersman.v1 import reward_pb2_grpc

    engine = RewardEngine(config)
    servicer = RewardServicer(engine, config)
    service = (reward_pb2_grpc.add_RewardServiceServicer_to_server, servicer, "steersman.v1.RewardService")
    server = Server(config, [(config.port, [service])], on_drain=servicer.batcher.close)
    await server.run(load=lambda: asyncio.to_thread(engine.load))


if __name__ == "__main__":
    service_main("reward", RewardConfig, serve)
