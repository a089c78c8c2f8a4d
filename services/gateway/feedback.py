"""Judgements of earlier answers: acknowledged means stored."""

from __future__ import annotations

import asyncio
from typing import Annotated, Literal

from fastapi import APIRouter, Request
from fastapi.responses import Response
from pydantic import Field, model_validator

from services.gateway.auth.authenticator import Authenticator
from services.gateway.auth.callers import ANONYMOUS, Caller
from services.gateway.auth.origin import Attempts, current_visit
from services.gateway.auth.tokens import FeedbackTokens
from services.gateway.bodies import json_response, read_body
from services.gateway.config import GatewayConfig
from services.gateway.documentation import POST_ERRORS, json_body
from services.gateway.metrics import Metrics
from services.gateway.openai.schema import Wire
from services.gateway.recorder import Record, Recorder, audit_row
from steersman.errors import NotFoundError
from steersman.store.engine import Store
from steersman.store.feedback import Event, Judge, submit
from steersman.store.models import Answer as StoredAnswer
from steersman.store.secret import pseudonym

_Text = Annotated[str, Field(min_length=1, max_length=100_000, pattern=r"^[^\x00]*$")]


BY_TOKEN = "feedback-token"


class FeedbackBody(Wire):
    """One judgement: exactly one of `thumbs`, `edited_answer` and `outcome`."""

    event_id: Annotated[str, Field(min_length=1, max_length=128, pattern=r"^[^\x00]*$")]
    """Chosen by the caller: sending the same event again changes nothing."""
    answer_id: Annotated[str, Field(min_length=1, max_length=64, pattern=r"^[^\x00]*$")]
    """`id` of the answer; `ID.1` is its second choice."""
    thumbs: Literal["up", "down"] | None = None
    edited_answer: _Text | None = None
    """What the answer should have been."""
    outcome: Annotated[str, Field(min_length=1, max_length=200, pattern=r"^[^\x00]*$")] | None = None
    """What happened later in a business system, for example ticket_reopened."""
    reason: Annotated[str, Field(max_length=100_000, pattern=r"^[^\x00]*$")] = ""
    judge: Annotated[str, Field(max_length=200)] = ""
    """Who says it, where an application with a key passes on what several people say: any name that stays the same. A
    judge's later verdict on an answer takes the place of his earlier one."""
    feedback_token: Annotated[str, Field(max_length=200)] | None = None
    """Came with the answer; stands in for an API key."""

    @model_validator(mode="after")
    def _one_judgement(self) -> FeedbackBody:
        given = [value for value in (self.thumbs, self.edited_answer, self.outcome) if value is not None]
        if len(given) != 1:
            raise ValueError("give exactly one of thumbs, edited_answer and outcome")
        return self

    @property
    def event(self) -> Event:
        if self.thumbs is not None:
            return Event(self.event_id, self.answer_id, "thumbs", self.thumbs, self.reason)
        if self.edited_answer is not None:
            return Event(self.event_id, self.answer_id, "edit", self.edited_answer, self.reason)
        return Event(self.event_id, self.answer_id, "outcome", self.outcome or "", self.reason)


class FeedbackDesk:
    """Takes feedback, over REST and gRPC."""

    def __init__(
        self,
        store: Store,
        recorder: Recorder,
        tokens: FeedbackTokens,
        metrics: Metrics,
        config: GatewayConfig,
        secret: bytes,
    ) -> None:
        """`secret`: what pseudonyms are made with."""
        self._secret = secret
        self._browsers = Attempts(config.limits.feedback_per_minute, "judgements")
        self._store = store
        self._recorder = recorder
        self._tokens = tokens
        self._metrics = metrics

    async def caller_by_token(self, token: str, answer_id: str) -> Caller:
        """Who may judge this answer because the answer's token was shown.

        Raises:
            UnauthenticatedError: the token is not for this answer, or the answer does not exist.
        """
        self._limit()
        tenant = await asyncio.to_thread(self._tenant, answer_id)
        self._tokens.verify(token, answer_id.partition(".")[0], tenant)
        return Caller(BY_TOKEN, tenant, frozenset({"feedback"}))

    async def take(self, caller: Caller, request_id: str, event: Event, judge: str = "") -> bool:
        """Stores an event; False when it was stored before.

        Args:
            judge: Who says it, as an application with a key calls him; kept as a pseudonym.

        Raises:
            NotFoundError: there is no such answer, or it is another tenant's.
            ConflictError: the event id was used for another judgement.
            RateLimitedError: too much came from this address, or about this answer.
        """
        caller.require("feedback")
        if caller.key_id == ANONYMOUS:
            self._limit()
        event.check()
        created = await asyncio.to_thread(self._submit, caller, event, self._judge(caller, judge))
        if created:
            counted = event.value if event.kind == "thumbs" else ""
            self._metrics.feedback.labels(event.kind, counted).inc()
        await self._recorder.put(Record(audit_row(caller, request_id, "feedback", event.kind, event.answer_id)))
        return created

    def _limit(self) -> None:
        """Counts a judgement by whoever has no key. Raises RateLimitedError beyond what an address may."""
        address = current_visit().address
        self._browsers.check(address)
        self._browsers.count(address)

    def _judge(self, caller: Caller, said: str) -> Judge:
        """Who judges: a person who logged in, whoever an application names, or somebody at a browser."""
        address = current_visit().address
        origin = pseudonym(self._secret, "address", address) if address else ""
        if caller.key_id in (BY_TOKEN, ANONYMOUS):
            return Judge("browser", origin=origin)
        if caller.by_session:
            return Judge("staff", caller.key_id, origin)
        who = f":{pseudonym(self._secret, 'judge', caller.tenant, said)}" if said else ""
        if not said and caller.pseudonym:
            who = f":{caller.pseudonym}"
        return Judge("application", f"{caller.key_id}{who}", origin)

    def _submit(self, caller: Caller, event: Event, judge: Judge) -> bool:
        with self._store.transaction() as session:
            return submit(session, caller.tenant, event, judge)

    def _tenant(self, answer_id: str) -> str:
        with self._store.reading() as session:
            answer = session.get(StoredAnswer, answer_id)
        if answer is None:
            raise NotFoundError(f"answer {answer_id!r} does not exist")
        return answer.customer


def feedback_router(desk: FeedbackDesk, auth: Authenticator) -> APIRouter:
    router = APIRouter(prefix="/v1", tags=["Feedback"])

    @router.post(
        "/feedback",
        summary="Judge an answer",
        openapi_extra=json_body(FeedbackBody),
        responses={
            200: {
                "description": "Stored. `created` is false when this event was stored before.",
                "content": {"application/json": {"schema": {"type": "object"}}},
            },
            **POST_ERRORS,
        },
    )
    async def give_feedback(request: Request) -> Response:
        body = await read_body(request, FeedbackBody)
        if body.feedback_token is not None:
            caller = await desk.caller_by_token(body.feedback_token, body.answer_id)
        else:
            caller = await auth.caller(request.headers)
        created = await desk.take(caller, request.state.request_id, body.event, body.judge)
        return json_response({"created": created})

    return router
