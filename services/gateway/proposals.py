"""Actions that an assistant may propose; nothing happens until the user confirms."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

ActionName = Literal["hand_over", "request_return"]
PROPOSALS: dict[ActionName, str] = {
    "hand_over": "I can hand this conversation over to a colleague. Please confirm, and I open a ticket for you.",
    "request_return": "I can ask for the return of order {order}. Please confirm, and I open a ticket for it.",
}
DONE: dict[ActionName, str] = {
    "hand_over": "I have handed this conversation over to a colleague: ticket {ticket}.",
    "request_return": "I have asked for the return of order {order}: ticket {ticket}.",
}


@dataclass(frozen=True, slots=True)
class Proposal:
    """An action that waits for its confirmation."""

    id: str
    action: ActionName
    arguments: dict[str, Any]

    @property
    def text(self) -> str:
        return PROPOSALS[self.action].format(**self.arguments)

    def as_json(self) -> dict[str, Any]:
        return {"id": self.id, "action": self.action, "arguments": self.arguments, "text": self.text}
