"""Servicer of the reward service: translates messages and batches callers together."""

from __future__ import annotations

import asyncio
import json

import grpc
import numpy as np

from services.reward.config import RewardConfig
from services.reward.engine import Item, RewardEngine
from steersman.errors import InvalidArgumentError
from steersman.rpc.batcher import TokenBudgetBatcher
from steersman.rpc.conversation import from_message, from_tools_json
from steersman.rpc.metrics import SCORE_FAILURES, SCORED_ITEMS
from steersman.rpc.wire import unpack_rows
from steersman.v1 import reward_pb2 as pb
from steersman.v1 import reward_pb2_grpc


class RewardServicer(reward_pb2_grpc.RewardServiceServicer):
    def __init__(self, engine: RewardEngine, config: RewardConfig) -> None:
        self._engine = engine
        self.batcher = TokenBudgetBatcher(
            engine.score, lambda item: item.tokens, config.batch_tokens, merge=config.merge_requests
        )

    async def Score(self, request: pb.ScoreRequest, context: grpc.aio.ServicerContext) -> pb.ScoreResponse:
        # Beside the loop: checksums and JSON of the largest request take longer than others may wait.
        items = await asyncio.to_thread(_items, request)
        scores = await self.batcher.submit(items)
        SCORED_ITEMS.inc(len(scores))
        SCORE_FAILURES.inc(sum(not score.HasField("reward") for score in scores))
        return pb.ScoreResponse(scores=scores)

    async def GetRewardInfo(
        self, request: pb.GetRewardInfoRequest, context: grpc.aio.ServicerContext
    ) -> pb.GetRewardInfoResponse:
        return pb.GetRewardInfoResponse(scorers=[scorer.info for scorer in self._engine.scorers])


def _items(request: pb.ScoreRequest) -> list[Item]:
    progress = (request.progress.step, request.progress.steps)
    if min(progress) < 0:
        raise InvalidArgumentError(f"progress is {progress[0]} of {progress[1]} steps; neither may be below 0")
    return [
        _item(f"items[{index}]", item, request.tokenizer_fingerprint, progress)
        for index, item in enumerate(request.items)
    ]


def _item(name: str, item: pb.ScoreItem, fingerprint: str, progress: tuple[int, int] = (0, 0)) -> Item:
    rows = unpack_rows(item.token_ids, np.int32, f"{name}.token_ids") if item.HasField("token_ids") else []
    if len(rows) > 1:
        raise InvalidArgumentError(f"{name}.token_ids has {len(rows)} rows; an item is one row")
    if not rows and not item.messages:
        raise InvalidArgumentError(f"{name} has neither token_ids nor messages; send at least one of them")
    if item.answer_length > (len(rows[0]) if rows else 0):
        raise InvalidArgumentError(f"{name}.answer_length is {item.answer_length}, more than its token_ids")
    if item.messages and item.messages[-1].role != "assistant":
        raise InvalidArgumentError(f"{name}.messages must end with the assistant's answer")
    try:
        facts = json.loads(item.facts_json) if item.facts_json else {}
    except ValueError as error:
        raise InvalidArgumentError(f"{name}.facts_json is not JSON ({error})") from None
    if not isinstance(facts, dict):
        raise InvalidArgumentError(f"{name}.facts_json must be a JSON object")
    return Item(
        messages=[from_message(message) for message in item.messages],
        tools=from_tools_json(item.tools_json),
        token_ids=rows[0].tolist() if rows else [],
        fingerprint=fingerprint,
        facts=facts,
        answer_length=item.answer_length,
        progress=progress,
    )
