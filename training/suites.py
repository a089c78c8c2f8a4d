"""Asks suites of the policy that is loaded, as the evaluation's models are loaded one after the other."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from steersman.config.manifest import EvaluateStage
from steersman.rpc.conversation import to_message
from steersman.suites.asked import SuiteResult, ask
from steersman.suites.asking import Decoding, Reply, converse
from steersman.suites.checks import Spoken
from steersman.suites.schema import read_suite
from steersman.v1 import common_pb2, policy_pb2
from training.context import StageContext
from training.online.pool import PolicyPool


def ask_suites(spec: EvaluateStage, context: StageContext, policy: PolicyPool, name: str) -> list[SuiteResult]:
    """Every suite of the stage, answered by what the policy service has loaded, with the evaluation's generation."""
    generation = spec.generation
    decoding = Decoding.parse(f"{generation.temperature:g}" if generation.temperature else "greedy")

    def speak(
        messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]], _: Decoding, most: int, seed: int
    ) -> Spoken:
        sampling = common_pb2.SamplingParams(
            max_new_tokens=most, temperature=generation.temperature, top_p=generation.top_p, top_k=generation.top_k,
            seed=seed,
        )  # fmt: skip

        def reply(said: list[dict[str, Any]]) -> Reply:
            start = time.monotonic()
            answer = policy.chat(
                policy_pb2.PolicyServiceChatRequest(
                    messages=[to_message(message) for message in said], sampling=sampling, whole=True,
                    stop=generation.stop, tools_json=json.dumps(list(tools)) if tools else "",
                )
            )  # fmt: skip
            calls = [call for part in answer for call in part.tool_calls]
            return Reply(
                text="".join(part.delta for part in answer).strip(),
                tool_calls=tuple({"function": {"name": call.name, "arguments": call.arguments}} for call in calls),
                tokens=max((part.completion_tokens for part in answer), default=0),
                seconds=time.monotonic() - start,
            )

        return converse(reply, messages)

    found = []
    for suite in map(read_suite, map(Path, spec.suites)):
        context.reporter.activity(f"{name}: suite {suite.name}")
        found.append(
            ask(suite, name, speak, decoding, samples=spec.samples_per_prompt, max_tokens=generation.max_new_tokens,
                seed=context.seed)
        )  # fmt: skip
    return found
