"""Options of the ticket systems that may send their tickets here."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from services.gateway.systems.base import Name
from steersman.config.base import FrozenModel


class _Inbox(FrozenModel):
    name: Name
    """The webhook's path is `/hooks/NAME`."""
    url: Annotated[str, Field(pattern=r"^https?://[^/?#\s]+$")]
    """Where tickets are read and answered, for example https://desk.example.com; what a webhook says is no address."""
    token_env: str
    """Environment variable with the token that may read and write tickets there."""
    secret_env: str
    """Environment variable with the secret that webhooks are signed with, at least 16 characters."""
    tenant: Annotated[str, Field(min_length=1, max_length=200)] = "default"
    """Whose answers these are: quotas, retention and consent follow it."""
    reply: Literal["note", "public"] = "note"
    """`note`: an internal note that a person reads, changes and sends; `public`: the customer gets it. An answer that
    proposes an action, or in which something without a record was held back or marked, is a note in any case."""
    model: Annotated[str, Field(max_length=200)] = ""
    """Who answers; empty: the gateway's model."""
    instructions: Annotated[str, Field(max_length=20_000)] = ""
    """The system message of these answers; empty: `defaults.systemPrompt`."""
    customer_field: Annotated[str, Field(pattern=r"^[A-Za-z0-9_]+(\.[A-Za-z0-9_]+){0,7}$")] | None = None
    """Where in the webhook's JSON the customer's key of the business systems stands, for example
    `ticket.customer.erp_number`: records are then read for this customer. Name only a field that the ticket system
    fills after it knows who writes; whoever can write mail can forge its sender. None: no customer's records are
    read."""
    turns: Annotated[int, Field(ge=1, le=200)] = 20
    """So many of the ticket's latest messages are read."""
    most_replies: Annotated[int, Field(ge=1, le=1000)] = 20
    """After so many answers in one ticket nothing more is written into it: two machines that answer each other end."""
    seconds: Annotated[float, Field(gt=0, le=60)] = 10.0
    """Longest wait for the ticket system."""
    attempts: Annotated[int, Field(ge=1, le=20)] = 8
    """A ticket that cannot be answered or written to is tried so often, with pauses that double."""
    retry_seconds: Annotated[float, Field(gt=0, le=600)] = 15.0
    """The first of these pauses."""


class ZammadInbox(_Inbox):
    """Webhooks of Zammad, signed with its HMAC-SHA1 token (`X-Hub-Signature`), with its usual content."""

    type: Literal["zammad"]


class ZendeskInbox(_Inbox):
    """Webhooks of Zendesk that are subscribed to `ticket.created` and `ticket.comment_added`, signed with their secret
    (`X-Zendesk-Webhook-Signature`)."""

    type: Literal["zendesk"]
    user: str
    """E-mail address of the agent that the token belongs to."""
    max_age_seconds: Annotated[float, Field(gt=0, le=3600)] = 300.0
    """A signature is good for this long."""


AnyInbox = Annotated[ZammadInbox | ZendeskInbox, Field(discriminator="type")]
"""Options of one of them, told apart by `type`."""
