"""The door for webhooks of ticket systems."""

from __future__ import annotations

from typing import Any

import orjson
from fastapi import APIRouter, Request
from fastapi.responses import Response

from services.gateway.bodies import check_structure, json_response, plain_headers
from services.gateway.documentation import error_responses
from services.gateway.errors import BadRequestError
from services.gateway.inbox.worker import Inboxes
from services.gateway.store import storable
from steersman.errors import NotFoundError

_LONGEST_CUSTOMER = 200


def inbox_router(inboxes: Inboxes) -> APIRouter:
    router = APIRouter(tags=["Tickets"])

    @router.post(
        "/hooks/{name}",
        summary="Take a webhook of a ticket system",
        description="Signed by the system, as `inboxes` of the configuration says. The answer to the customer's "
        "message is written into the ticket afterwards; the same webhook may come again.",
        openapi_extra={
            "requestBody": {"required": True, "content": {"application/json": {"schema": {"type": "object"}}}}
        },
        responses={
            200: {
                "description": "Nothing to answer: it is about something else than a customer's message.",
                "content": {"application/json": {"schema": {"type": "object"}}},
            },
            202: {
                "description": "The ticket will be looked at; that is on disk.",
                "content": {"application/json": {"schema": {"type": "object"}}},
            },
            **error_responses(400, 401, 404, 408, 413, 415, 500, 503),
        },
    )
    async def take_webhook(request: Request, name: str) -> Response:
        inbox = inboxes.systems.get(name)
        if inbox is None:
            raise NotFoundError("There is no such ticket system here; `inboxes` of the configuration names them")
        body = await request.body()
        inbox.verify(plain_headers(request), body)
        check_structure(body)
        try:
            content = orjson.loads(body)
        except orjson.JSONDecodeError:
            raise BadRequestError("The body must be JSON") from None
        ticket = inbox.ticket_of(content)
        if ticket is None:
            inboxes.count(name, "ignored")
            return json_response({"taken": False})
        await inboxes.take(name, ticket, _customer(content, inbox.config.customer_field))
        return json_response({"taken": True, "ticket": ticket}, 202)

    return router


def _customer(content: Any, field: str | None) -> str:
    """The customer's key in a webhook; empty where there is none.

    Raises BadRequestError for one that is no key.
    """
    found = content
    for part in field.split(".") if field else ():
        found = found.get(part) if isinstance(found, dict) else None
    if field is None or found is None or found == "":
        return ""
    key = str(found) if isinstance(found, int) and not isinstance(found, bool) else found
    if not isinstance(key, str) or len(key) > _LONGEST_CUSTOMER or not key.isprintable() or storable(key) != key:
        raise BadRequestError(
            f"{field} must be a text or number of at most {_LONGEST_CUSTOMER} characters", param=field
        )
    return key
