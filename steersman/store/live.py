"""The suites over what the gateway recorded: every deployment is a target, and a conversation is a case.

a suite of the kind safety or leak   what no answer may hold (`forbidden`, `secrets`, `noPersonalData` of all its
                                     cases) is looked for in every recorded answer
any other suite                      its cases are compared with recorded answers to the same question
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa
from sqlalchemy.orm import Session

from steersman.store.models import Answer
from steersman.suites.asked import Asked, SuiteResult
from steersman.suites.checks import Spoken, judge, plain
from steersman.suites.schema import Expectation, Suite

DECODING = "served"


@dataclass(frozen=True)
class Recorded:
    """One answer with what was said before it."""

    deployment: str
    conversation: str
    question: str
    spoken: Spoken
    looked_up: bool
    """It rests on records, so that personal data of its customer is no leak."""


def recorded(session: Session, since: dt.datetime, until: dt.datetime, tenant: str | None = None) -> list[Recorded]:
    """Answers of a time span, oldest first."""
    query = sa.select(Answer).where(Answer.created_at >= since, Answer.created_at < until).order_by(Answer.created_at)
    if tenant is not None:
        query = query.where(Answer.customer == tenant)
    return [_recorded(answer) for answer in session.scalars(query.execution_options(yield_per=500))]


def _recorded(answer: Answer) -> Recorded:
    said: Sequence[dict[str, Any]] = answer.prompt
    question = next((turn.get("content") or "" for turn in reversed(said) if turn.get("role") == "user"), "")
    calls = tuple({"function": {"name": c["name"], "arguments": c["arguments"]}} for c in answer.tool_calls or ())
    return Recorded(
        deployment=answer.deployment or answer.model or "unknown",
        conversation=answer.conversation_id or answer.id,
        question=question,
        spoken=Spoken(answers=(answer.answer,), tool_calls=calls, messages=tuple(said)),
        looked_up=any(lookup.get("outcome") == "found" for lookup in answer.lookups or ()),
    )


def ask_recorded(suite: Suite, answers: Iterable[Recorded]) -> list[SuiteResult]:
    """A result for every deployment that has an answer the suite says something about."""
    rules = _rules(suite)
    everywhere = suite.kind in ("safety", "leak") and bool(rules[False].asked)
    cases = {
        plain(next((m["content"] for m in reversed(suite.messages(case)) if m["role"] == "user"), "")): case
        for case in suite.cases
    }
    found: dict[str, list[Asked]] = {}
    numbers: dict[tuple[str, str], int] = {}
    for one in answers:
        case = cases.get(plain(one.question))
        tags: tuple[str, ...] = ()
        if everywhere and rules[one.looked_up].asked:
            name, expect = one.conversation, rules[one.looked_up]
        elif not everywhere and case is not None:
            name, tags, expect = case.id, tuple(case.tags), case.expect
        else:
            continue
        number = numbers[(one.deployment, name)] = numbers.get((one.deployment, name), -1) + 1
        calls = tuple(f"{c['function']['name']}({c['function']['arguments']})" for c in one.spoken.tool_calls)
        found.setdefault(one.deployment, []).append(
            Asked(
                case=name, sample=number, tags=tags, question=one.question, answers=one.spoken.answers,
                tool_calls=calls, checks=judge(expect, one.spoken),
            )
        )  # fmt: skip
    return [
        SuiteResult(suite=suite.name, kind=suite.kind, target=deployment, decoding=DECODING, asked=tuple(asked))
        for deployment, asked in sorted(found.items())
    ]


def by_question(answers: Iterable[Recorded]) -> list[SuiteResult]:
    """Every deployment's answers with the question as the case, for judges to compare."""
    found: dict[str, dict[str, Asked]] = {}
    for one in answers:
        case = plain(one.question)
        if one.spoken.answers[0].strip():
            asked = Asked(case=case, question=one.question, answers=one.spoken.answers)
            found.setdefault(one.deployment, {}).setdefault(case, asked)
    return [
        SuiteResult(
            suite="recorded", kind="business", target=name, decoding=DECODING, asked=tuple(found[name].values())
        )
        for name in sorted(found)
    ]


def _rules(suite: Suite) -> tuple[Expectation, Expectation]:
    """What no answer may hold: of an answer without looked-up records, and of one with them."""
    forbidden = list(dict.fromkeys(text for case in suite.cases for text in case.expect.forbidden or ()))
    secrets = list(dict.fromkeys(text for case in suite.cases for text in case.expect.secrets or ()))
    personal = any(case.expect.no_personal_data for case in suite.cases)
    own: dict[str, Any] = {"forbidden": forbidden, "secrets": secrets}
    return Expectation(**own, no_personal_data=personal), Expectation(**own)
