"""Why a sample ended, by its number in the contract and by its name."""

from __future__ import annotations

from steersman.v1 import common_pb2

_NAMES: dict[int, str] = {
    common_pb2.FINISH_REASON_STOP: "stop",
    common_pb2.FINISH_REASON_LENGTH: "length",
    common_pb2.FINISH_REASON_CANCELLED: "cancelled",
    common_pb2.FINISH_REASON_TOOL_CALLS: "tool_calls",
}
_REASONS: dict[str, common_pb2.FinishReason] = {
    "stop": common_pb2.FINISH_REASON_STOP,
    "eos_token": common_pb2.FINISH_REASON_STOP,
    "stop_sequence": common_pb2.FINISH_REASON_STOP,
    "length": common_pb2.FINISH_REASON_LENGTH,
    "cancelled": common_pb2.FINISH_REASON_CANCELLED,
    "tool_calls": common_pb2.FINISH_REASON_TOOL_CALLS,
}


def finish_name(reason: int) -> str:
    """`stop`, `length`, `cancelled` or `tool_calls`; `stop` for what this version does not know."""
    return _NAMES.get(reason, "stop")


def openai_finish_name(reason: int) -> str | None:
    """As OpenAI's API has it: nothing is cancelled there, and what has not ended has no reason."""
    return finish_name(reason).replace("cancelled", "stop") if reason else None


def finish_reason(name: str) -> common_pb2.FinishReason:
    """Of a name in our contract or in an engine's; what is not known here was a stop of some kind."""
    return _REASONS.get(name, common_pb2.FINISH_REASON_STOP)
