"""The gateway's native gRPC interface: translates, nothing else."""

from __future__ import annotations

import json
import secrets
from collections.abc import AsyncIterator, Mapping
from typing import Any

from services.gateway.actions import confirm
from services.gateway.answer import Question
from services.gateway.answering import Assistant
from services.gateway.auth.authenticator import Authenticator
from services.gateway.bodies import consent_of, request_id_of
from services.gateway.errors import BadRequestError
from services.gateway.feedback import FeedbackDesk
from services.gateway.proposals import Proposal
from services.gateway.refusals import Refusals, noted
from steersman.store.feedback import Event
from steersman.v1 import chat_pb2, chat_pb2_grpc
from steersman.v1.policy_pb2 import PolicyServiceChatRequest

SERVICE_NAME = "steersman.v1.ChatService"
_ROLES = {"system", "user", "assistant", "tool"}


class ChatServicer(chat_pb2_grpc.ChatServiceServicer):
    def __init__(self, assistant: Assistant, auth: Authenticator, feedback: FeedbackDesk, refusals: Refusals) -> None:
        self._assistant = assistant
        self._auth = auth
        self._feedback = feedback
        self._refusals = refusals

    async def Chat(self, request: chat_pb2.ChatRequest, context: Any) -> AsyncIterator[chat_pb2.ChatResponse]:
        with noted(self._refusals, context, f"{SERVICE_NAME}/Chat") as headers:
            async for response in self._chat(request, headers):
                yield response

    async def _chat(
        self, request: chat_pb2.ChatRequest, headers: Mapping[str, str]
    ) -> AsyncIterator[chat_pb2.ChatResponse]:
        caller = await self._auth.caller(headers)
        if not request.messages:
            raise BadRequestError("messages: send at least one message", param="messages")
        for index, message in enumerate(request.messages):
            if message.role not in _ROLES:
                raise BadRequestError(f"messages.{index}.role is {message.role!r}; use one of {sorted(_ROLES)}")
        fingerprint = request.SerializeToString(deterministic=True)
        sampling = request.sampling
        if not sampling.HasField("seed"):
            sampling.seed = secrets.randbits(64)
        if sampling.HasField("temperature") and not 0 <= sampling.temperature <= 2:
            raise BadRequestError("sampling.temperature must be between 0 and 2", param="sampling.temperature")
        if sampling.HasField("top_p") and not 0 < sampling.top_p <= 1:
            raise BadRequestError("sampling.top_p must be above 0 and at most 1", param="sampling.top_p")
        question = Question(
            caller,
            request_id_of(headers),
            PolicyServiceChatRequest(messages=request.messages, sampling=sampling, stop=request.stop, n=1),
            model=request.model,
            id_prefix="chat-",
            conversation_id=request.conversation_id,
            idempotency_key=headers.get("idempotency-key", ""),
            fingerprint=fingerprint,
            consent=consent_of(headers, request.consent if request.HasField("consent") else None),
            variant=headers.get("x-steersman-variant", ""),
        )
        answer = await self._assistant.answer(question)
        try:
            async for part in answer:
                response = chat_pb2.ChatResponse(answer_id=answer.id, delta=part.delta)
                if part.finish_reason:
                    response.finish_reason = part.finish_reason
                    response.prompt_tokens = answer.prompt_tokens
                    response.completion_tokens = answer.completion_tokens
                    response.weights_version = answer.weights_version or 0
                    response.feedback_token = answer.feedback_token
                    response.proposed_actions.extend(_proposed(proposal) for proposal in answer.proposals)
                    for source in answer.sources:
                        response.sources.add(system=source.system, record=source.record)
                yield response
        finally:
            await answer.close()

    async def ConfirmAction(
        self, request: chat_pb2.ConfirmActionRequest, context: Any
    ) -> chat_pb2.ConfirmActionResponse:
        with noted(self._refusals, context, f"{SERVICE_NAME}/ConfirmAction") as headers:
            caller = await self._auth.caller(headers)
            desk, recorder = self._assistant.grounding.desk, self._assistant.recorder
            return chat_pb2.ConfirmActionResponse(
                **await confirm(desk, recorder, caller, request.id, request_id_of(headers))
            )

    async def SubmitFeedback(
        self, request: chat_pb2.SubmitFeedbackRequest, context: Any
    ) -> chat_pb2.SubmitFeedbackResponse:
        with noted(self._refusals, context, f"{SERVICE_NAME}/SubmitFeedback") as headers:
            return await self._submit(request, headers)

    async def _submit(
        self, request: chat_pb2.SubmitFeedbackRequest, headers: Mapping[str, str]
    ) -> chat_pb2.SubmitFeedbackResponse:
        if request.feedback_token:
            caller = await self._feedback.caller_by_token(request.feedback_token, request.answer_id)
        else:
            caller = await self._auth.caller(headers)
        kind = request.WhichOneof("judgement")
        if kind is None:
            raise BadRequestError("judgement: set thumbs_up, edited_answer or outcome", param="judgement")
        if kind == "thumbs_up":
            event = Event(request.event_id, request.answer_id, "thumbs", "up" if request.thumbs_up else "down")
        elif kind == "edited_answer":
            event = Event(request.event_id, request.answer_id, "edit", request.edited_answer)
        else:
            event = Event(request.event_id, request.answer_id, "outcome", request.outcome)
        event = Event(event.event_id, event.answer_id, event.kind, event.value, request.reason)
        created = await self._feedback.take(caller, request_id_of(headers), event, request.judge)
        return chat_pb2.SubmitFeedbackResponse(created=created)


def _proposed(proposal: Proposal) -> chat_pb2.ProposedAction:
    return chat_pb2.ProposedAction(
        id=proposal.id,
        action=proposal.action,
        arguments_json=json.dumps(proposal.arguments),
        text=proposal.text,
    )
