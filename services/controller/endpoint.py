"""What serves the bot while a release goes on: one interface, implemented for KServe and for two Deployments.

An endpoint is built from what was observed, answers questions about it, and says which actions would change it. It
decides nothing; `release.py` does.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from services.controller.actions import Action
from services.controller.status import ReleaseStatus


@dataclass(frozen=True)
class Variant:
    """Where to find what one variant of the bot did."""

    deployment: str
    """What its answers are stored under."""
    series: str
    """Label matchers of its metrics in PromQL, without the namespace."""
    family: str = "steersman_gateway_answer"
    """How the names of its metrics begin."""


class Endpoint(Protocol):
    @property
    def title(self) -> str:
        """For messages, for example `InferenceService chat`."""
        ...

    @property
    def model(self) -> str | None:
        """The model that serves; None: unknown."""
        ...

    @property
    def canaries(self) -> tuple[str, ...]:
        """Names of the candidates that get traffic now."""
        ...

    def share(self, candidate: str) -> int | None:
        """Percent of the traffic that a candidate is given; None: it is not there."""
        ...

    def is_ready(self, candidate: str, percent: int) -> bool:
        """The candidate answers its share."""
        ...

    def serves(self, status: ReleaseStatus) -> bool:
        """The released model is the champion, and nothing of the canary is left."""
        ...

    def give(self, status: ReleaseStatus, percent: int) -> tuple[Action, ...]:
        """Starts the candidate, or changes its share."""
        ...

    def promote(self, status: ReleaseStatus) -> tuple[Action, ...]:
        """The next step from canary to champion; asked for again until `serves`."""
        ...

    def publish(self, model: str) -> tuple[Action, ...]:
        """Makes a model the champion without a canary; asked for again until `serves`."""
        ...

    def take_back(self, candidate: str) -> tuple[Action, ...]:
        """Ends the candidate; nothing where it is not there."""
        ...

    def variants(self, candidate: str) -> tuple[Variant, Variant]:
        """Champion and candidate."""
        ...
