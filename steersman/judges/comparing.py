"""LLM judges of an evaluation: who wins between two models, and whether the judge agrees with people."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

from steersman.judges.options import LlmJudge
from steersman.report.schema import JudgedPair, JudgeResult
from steersman.rewards.judge import Compared, Judge, PairJudge
from steersman.rewards.registry import Failed


class Rivals(NamedTuple):
    """Answers of two models to one prompt."""

    prompt_id: str
    conversation: Sequence[Mapping[str, Any]]
    one: str
    other: str
    answer_of_one: str
    answer_of_other: str


class JudgeOfPairs:
    """Asks the endpoint, and counts what that took."""

    def __init__(self, spec: LlmJudge) -> None:
        """Raises ConfigError where the key's environment variable is not set."""
        self.spec = spec
        self._judge = Judge(
            spec.url, spec.model, api_key_env=spec.api_key_env, calls=spec.calls, cache=spec.cache,
            timeout_seconds=spec.timeout_seconds,
        )  # fmt: skip
        self._pairs = PairJudge(self._judge, spec.rubric)

    def result(self, rivals: Sequence[Rivals]) -> JudgeResult:
        """Every comparison in both orders; those without a verdict are left out and counted."""
        found = self.compare([(one.conversation, one.answer_of_one, one.answer_of_other) for one in rivals])
        pairs = tuple(
            JudgedPair(prompt_id=one.prompt_id, one=one.one, other=one.other, score=verdict.score)
            for one, verdict in zip(rivals, found, strict=True)
            if isinstance(verdict, Compared)
        )
        tokens = self._judge.tokens
        return JudgeResult(
            model=self.spec.model,
            pairs=pairs,
            missing=len(rivals) - len(pairs),
            reason=next((verdict.reason for verdict in found if isinstance(verdict, Failed)), None),
            calls=self._judge.calls,
            failures=self._judge.failures,
            tokens=tokens,
            cost=None if self.spec.price is None else tokens * self.spec.price / 1e6,
            swapped=sum(isinstance(verdict, Compared) and verdict.swapped for verdict in found),
        )

    def compare(self, items: Sequence[tuple[Sequence[Mapping[str, Any]], str, str]]) -> list[Compared | Failed]:
        """(conversation, one answer, the other) -> the verdict, in order."""

        def one(item: tuple[Sequence[Mapping[str, Any]], str, str]) -> Compared | Failed:
            conversation, first, second = item
            # The same text is a tie that nobody need be asked about.
            return Compared(0.5, swapped=False) if first == second else self._pairs.compare(conversation, first, second)

        with ThreadPoolExecutor(self.spec.concurrency, thread_name_prefix="judge") as threads:
            return list(threads.map(one, items))
