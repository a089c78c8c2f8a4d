"""Who is calling, and for which customer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from steersman.errors import PermissionDeniedError

Scope = Literal["chat", "feedback", "act", "label", "operate", "admin"]
"""chat: ask questions; feedback: judge answers; act: confirmed writes in business systems; label: the labelling pages;
operate: the operator's page and metrics; admin: manage keys, load and unload models."""

ALL_SCOPES: frozenset[str] = frozenset(get_args(Scope))
ANONYMOUS = "anonymous"
LIMITS = ("requests_per_minute", "tokens_per_minute", "tokens_per_day", "tokens_per_month", "concurrent")
"""What a key may be limited by: fields of a caller, and columns of a key."""


@dataclass(frozen=True, slots=True)
class Customer:
    """The end customer on whose behalf an application asks. Made only from a verified token or signed header."""

    id: str
    """Key of the customer in the business systems."""
    issuer: str
    """Who vouches for it."""
    pseudonym: str = ""
    """What stands for him beside texts; see `steersman.store.secret.pseudonym`."""


@dataclass(frozen=True, slots=True)
class Caller:
    """The application that calls."""

    key_id: str
    tenant: str
    scopes: frozenset[str]
    name: str = ANONYMOUS
    """Whose key it is; the name of a labeler."""
    customer: Customer | None = None
    by_session: bool = False
    """A person who logged in at a page, not an application."""
    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    tokens_per_day: int | None = None
    tokens_per_month: int | None = None
    """Of a calendar month, in UTC as the day."""
    concurrent: int | None = None

    def require(self, scope: Scope) -> None:
        """Raises PermissionDeniedError without the scope."""
        if scope not in self.scopes:
            raise PermissionDeniedError(f"This key lacks the scope '{scope}'; use a key that has it")

    @property
    def limited(self) -> bool:
        """What the key uses is counted before it is used."""
        return any(getattr(self, name) for name in LIMITS)

    @property
    def customer_id(self) -> str:
        return self.customer.id if self.customer else ""

    @property
    def pseudonym(self) -> str:
        return self.customer.pseudonym if self.customer else ""
