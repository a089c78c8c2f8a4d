"""What an answer leaves behind: its rows in the database and its line in the audit trail."""

from __future__ import annotations

from typing import Any

from services.gateway.answer import Answer
from services.gateway.config import Keeping
from services.gateway.recorder import audit_row
from services.gateway.store import storable, storable_json
from steersman.errors import SteersmanError
from steersman.rpc.finish import finish_name


def outcome_of(answer: Answer, error: BaseException | None) -> str:
    """How an answer ended: its finish reason, or the class of the error."""
    if answer.complete:
        return finish_name(answer.choices[0].finish_reason)
    if isinstance(error, SteersmanError):
        return type(error).__name__
    return "cancelled"


def answer_line(answer: Answer, outcome: str) -> dict[str, Any]:
    """The line of the audit trail: what was read, and what was asked for in vain, as somebody does who probes."""
    question = answer.question
    records: list[dict[str, Any]] = [source.as_json() for source in answer.sources]
    records += [
        storable_json({"asked": lookup.tool, **lookup.arguments, "outcome": lookup.outcome})
        for lookup in answer.lookups
        if lookup.outcome in ("not_found", "refused")
    ]
    return audit_row(
        question.caller,
        question.request_id,
        "answer",
        outcome,
        answer.id,
        records,
        weights_version=str(answer.weights_version or ""),
        prompt_tokens=answer.prompt_tokens,
        completion_tokens=answer.completion_tokens,
        milliseconds=round(answer.seconds * 1000),
        # An answer in one piece has no first token.
        first_token_milliseconds=0 if question.request.whole else round(answer.first_token_seconds * 1000),
    )


def answer_rows(answer: Answer, deployment: str, keeping: Keeping) -> list[dict[str, Any]]:
    """Rows of `steersman.store.models.Answer`; choice 1 of an answer has the id `ID.1`.

    What was looked up is no part of the prompt: it stands by reference in `lookups`.
    """
    question, evidence = answer.question, answer.evidence(deployment)
    said = list(question.request.messages)[: -1 if question.request.continue_last else None]
    prompt = [{"role": m.role, "content": storable(m.content)} for m in said]
    if text := question.request.prompt or answer.prompt_text:
        prompt = [{"role": "user", "content": storable(text)}]
    lookups = [
        lookup.as_json() | ({"text_read": lookup.text} if keeping.lookup_texts else {}) for lookup in evidence.lookups
    ]
    rows = []
    for index, choice in enumerate(answer.choices):
        calls = [{"id": c.id, "name": c.name, "arguments": c.arguments} for c in evidence.tool_calls[index]]
        rows.append(
            {
                "id": f"{answer.id}.{index}" if index else answer.id,
                "conversation_id": question.conversation_id or None,
                "customer": question.caller.tenant,
                "end_customer": question.caller.pseudonym,
                "deployment": evidence.variant,
                "model": answer.model,
                "adapter": storable(evidence.adapter)[:200],
                "weights_version": str(answer.weights_version or ""),
                "prompt": prompt,
                "answer": storable(question.beginning + choice.text),
                "lookups": storable_json(lookups),
                "tool_calls": storable_json(calls),
                "sampling": evidence.sampling,
                "token_ids": evidence.token_ids[index] or None,
                "logprobs": evidence.logprobs[index] or None,
                "consent": keeping.consent_of(question.caller.tenant, question.consent),
            }
        )
    return rows
