"""The options of a release."""

from __future__ import annotations

from functools import cached_property
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, model_validator

from steersman.data.agreement import Thresholds
from steersman.data.aspects import Decide, Rule
from steersman.data.pairs import DisagreementRule, TieRule
from steersman.data.pii import PiiOptions

Lookups = Literal["leave-out", "include"]
Kind = Literal["preference", "feedback", "demonstration", "aspects", "return"]


class ReleaseOptions(BaseModel):
    """What a release is made of, and by which rules."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9._-]*$")
    """Name of the data set; versions count up under it."""
    kind: Kind = "preference"
    """Type of the rows."""
    sources: tuple[str, ...] = Field(min_length=1)
    """project:NAME, feedback (live feedback), or files of canonical rows."""
    ties: TieRule = "drop"
    """Answers that are equally good: drop the pair, or keep it with soft label 0.5."""
    disagreement: DisagreementRule = "majority"
    """Labelers of different minds: the majority's choice, the same with its share as soft label, or drop the pair."""
    min_judgements: int = Field(default=1, ge=1)
    """Judgements that an item needs."""
    aspects: dict[str, FiniteFloat] = {}
    """Weights of rated aspects, less than 0 where less is better; unset: all 1, but length and complexity 0."""
    decide: Decide = "sum"
    """As of a reward model: the weighted sum of the aspects decides; that sum only where every limit is reached, and
    what is lacking to all of them otherwise; or the first limit that is missed, then the next."""
    limits: dict[str, FiniteFloat] = {}
    """For `threshold` and `lexicographic`, the most important first: the least rating of an aspect in the unit of its
    ratings, of one with a weight below 0 the largest."""
    min_margin: float = Field(default=0.0, ge=0)
    """Leave out pairs with a smaller margin."""
    consent: Literal["not-refused", "given"] = "not-refused"
    """Whether rows without a word on consent may be used."""
    lookups: Lookups = "leave-out"
    """Live answers that rest on records of business systems, or quote an answer that does: leave them out, or take them
    with the records before them, as the model saw them, where the gateway keeps those (`keeping.lookupTexts`)."""
    browser_edits: bool = False
    """Edits by whoever holds an answer's feedback token become preferred answers, too; they may come from anybody."""
    customers: tuple[str, ...] | None = None
    """Only these tenants' rows (and rows of no tenant); unset takes all."""
    exclude_customers: tuple[str, ...] = ()
    """Tenants left out."""
    licences: tuple[str, ...] | None = None
    """Only rows under these licences; unset takes all."""
    pii: PiiOptions = PiiOptions()
    """Personal data to scrub."""
    splits: dict[str, float] = Field(default={"train": 0.95, "test": 0.05})
    """Shares; a prompt lies on one side only."""
    split_by: str | None = None
    """Metadata key that stays on one side, instead of the first question."""
    seed: int = 0
    """Seed of the splits."""
    name_labelers: bool = False
    """Whether the data card names the labelers."""
    thresholds: Thresholds | None = None
    """Overrides the thresholds of the projects."""

    @model_validator(mode="after")
    def _check(self) -> ReleaseOptions:
        if (self.decide == "sum") != (not self.limits):
            raise ValueError(f"decide {self.decide} {'has no limits; remove them' if self.limits else 'needs limits'}")
        return self

    @cached_property
    def rule(self) -> Rule:
        """What the ratings of an answer are worth."""
        return Rule(self.aspects, self.decide, self.limits)
