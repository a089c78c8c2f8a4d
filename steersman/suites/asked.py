"""Asks a suite and keeps what came out: every answer with its verdicts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from steersman.errors import (
    DataError,
    PermissionDeniedError,
    SteersmanError,
    UnauthenticatedError,
    UnavailableError,
)
from steersman.suites.asking import Decoding
from steersman.suites.checks import Spoken, judge
from steersman.suites.schema import Case, Suite

Converse = Callable[[Sequence[Mapping[str, Any]], Sequence[Mapping[str, Any]], Decoding, int, int], Spoken]
"""(messages, tools, decoding, token limit, seed) -> what the bot said."""
_STOPS = (UnauthenticatedError, PermissionDeniedError)
"""Errors that the next question would meet, too."""
PATIENCE = 25
"""Questions without an answer, from the first on, after which no further one is asked."""


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Asked(_Frozen):
    """One sample of one case."""

    case: str
    sample: int = 0
    tags: tuple[str, ...] = ()
    question: str
    """The last user message, for people to read."""
    answers: tuple[str, ...] = ()
    tool_calls: tuple[str, ...] = ()
    """Names and arguments."""
    checks: dict[str, str | None] = {}
    """Why each check fails; null: it passes."""
    error: str | None = None
    """Why there is no answer; then nothing is judged, and the case counts as failed."""
    tokens: int = 0
    seconds: float = 0.0

    @property
    def passed(self) -> bool:
        return self.error is None and all(reason is None for reason in self.checks.values())


class SuiteResult(_Frozen):
    """One suite, asked of one model with one decoding."""

    suite: str
    kind: Literal["business", "safety", "leak"]
    target: str
    """The model, run or endpoint, as the report calls it."""
    decoding: str
    """`greedy`, `served`, or a temperature."""
    asked: tuple[Asked, ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _check(self) -> SuiteResult:
        places = [(one.case, one.sample) for one in self.asked]
        if len(set(places)) != len(places):
            raise ValueError("asked holds a sample of a case twice; every sample has its own number")
        return self

    @property
    def scores(self) -> dict[str, float]:
        """Share of passed samples by case."""
        return self.scores_of()

    def scores_of(self, tag: str | None = None, check: str | None = None) -> dict[str, float]:
        """Share of passed samples by case, of the cases with a tag or a check; without answer it is not passed."""
        found: dict[str, list[bool]] = {}
        for one in self.asked:
            if tag is not None and tag not in one.tags:
                continue
            if check is None:
                found.setdefault(one.case, []).append(one.passed)
            elif check in one.checks:
                found.setdefault(one.case, []).append(one.checks[check] is None)
        return {case: sum(passed) / len(passed) for case, passed in found.items()}

    @property
    def tags(self) -> list[str]:
        return list(dict.fromkeys(tag for one in self.asked for tag in one.tags))

    @property
    def checks(self) -> list[str]:
        return list(dict.fromkeys(name for one in self.asked for name in one.checks))


def ask(
    suite: Suite,
    target: str,
    converse: Converse,
    decoding: Decoding,
    *,
    samples: int = 1,
    max_tokens: int = 256,
    seed: int = 17,
    concurrency: int = 4,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> SuiteResult:
    """All cases, each `samples` times with seeds of its own; a greedy answer is the same every time and drawn once.

    Raises:
        UnauthenticatedError, PermissionDeniedError: of the endpoint; any other error is noted at the case.
        UnavailableError: none of the first questions had an answer.
    """
    count = 1 if decoding.is_greedy else samples
    work = [(case, sample) for case in suite.cases for sample in range(count)]

    def one(item: tuple[Case, int]) -> Asked:
        case, sample = item
        messages = suite.messages(case)
        question = next((m["content"] for m in reversed(messages) if m["role"] == "user"), "")
        about: dict[str, Any] = {"case": case.id, "sample": sample, "tags": tuple(case.tags), "question": question}
        try:
            spoken = converse(messages, case.tools, decoding, max_tokens, seed + sample)
        except _STOPS:
            raise
        except SteersmanError as error:
            return Asked(**about, error=str(error))
        calls = tuple(f"{c['function']['name']}({c['function']['arguments']})" for c in spoken.tool_calls)
        return Asked(
            **about, answers=spoken.answers, tool_calls=calls, checks=judge(case.expect, spoken),
            tokens=spoken.tokens, seconds=round(spoken.seconds, 4),
        )  # fmt: skip

    done: list[Asked] = []
    with ThreadPoolExecutor(concurrency, thread_name_prefix="suite") as threads:
        try:
            for part in (work[:PATIENCE], work[PATIENCE:]):
                for result in threads.map(one, part):
                    done.append(result)
                    progress(len(done), len(work))
                if len(done) == PATIENCE and all(one.error is not None for one in done):
                    raise UnavailableError(f"the first {PATIENCE} questions had no answer: {done[0].error}")
        except BaseException:
            threads.shutdown(wait=False, cancel_futures=True)
            raise
    return SuiteResult(suite=suite.name, kind=suite.kind, target=target, decoding=decoding.name, asked=tuple(done))


class SuiteReport(_Frozen):
    """What `steersman eval` writes: `suites.json`."""

    date: str
    """UTC, ISO 8601."""
    settings: dict[str, Any]
    """How it was asked."""
    results: tuple[SuiteResult, ...] = Field(min_length=1)


def read_results(path: Path) -> SuiteReport:
    """Raises DataError with the file and the first wrong field."""
    try:
        return SuiteReport.model_validate_json(path.read_text(encoding="utf-8"))
    except OSError:
        raise DataError(f"{path}: no such file; give the suites.json of an earlier steersman eval") from None
    except (UnicodeDecodeError, ValidationError) as error:
        problem = error.errors()[0] if isinstance(error, ValidationError) else {"loc": (), "msg": str(error)}
        field = ".".join(map(str, problem["loc"])) or "the document"
        raise DataError(f"{path}: {field}: {problem['msg']}; write it again with steersman eval") from None
