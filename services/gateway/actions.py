"""Confirming what the bot proposed."""

from __future__ import annotations

from fastapi import APIRouter, Request
from fastapi.responses import Response

from services.gateway.auth.authenticator import Authenticator
from services.gateway.auth.callers import Caller
from services.gateway.bodies import json_response
from services.gateway.documentation import error_responses
from services.gateway.proposals import DONE
from services.gateway.recorder import Record, Recorder, audit_row
from services.gateway.tools.desk import Desk
from steersman.errors import NotFoundError


async def confirm(
    desk: Desk | None, recorder: Recorder, caller: Caller, action_id: str, request_id: str
) -> dict[str, str]:
    """Carries out a proposed action and records it: id, action, ticket and what to tell the customer.

    Raises:
        PermissionDeniedError: without the scope `act`.
        NotFoundError: no such proposal, or actions are switched off.
    """
    caller.require("act")
    if desk is None:
        raise NotFoundError("There is no such proposed action; actions are switched off")
    proposal, ticket = await desk.confirm(caller, action_id)
    records = [{"system": "desk", "record": ticket}]
    await recorder.put(Record(audit_row(caller, request_id, "act", proposal.action, records=records)))
    text = DONE[proposal.action].format(ticket=ticket, **proposal.arguments)
    return {"id": proposal.id, "action": proposal.action, "ticket": ticket, "text": text}


def actions_router(desk: Desk | None, auth: Authenticator, recorder: Recorder) -> APIRouter:
    router = APIRouter(prefix="/v1", tags=["Actions"])

    @router.post(
        "/actions/{action_id}/confirm",
        summary="Carry out a proposed action, once",
        description="The id is the idempotency key: confirming again gives the same ticket.",
        responses={
            200: {"description": "Done.", "content": {"application/json": {"schema": {"type": "object"}}}},
            **error_responses(400, 401, 403, 404, 408, 409, 413, 429, 500, 503),
        },
    )
    async def confirm_action(request: Request, action_id: str) -> Response:
        caller = await auth.caller(request.headers)
        done = await confirm(desk, recorder, caller, action_id, request.state.request_id)
        return json_response(done)

    return router
