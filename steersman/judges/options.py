"""Options of judges in the manifest: language models that compare answers, and the licence that all judges need."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from steersman.documents import FrozenModel, NonNegativeFloat, Positive, PositiveFloat

_Share = Annotated[float, Field(ge=0, le=1)]


class Licence(FrozenModel):
    """What a reward model or an LLM judge must show before it rewards or gates: agreement with people on comparisons
    that it was not trained on (`data.preferences.heldout`, else `validation`)."""

    accuracy: _Share = 0.5
    """Least lower end of the interval of how often it prefers what people preferred; ties count half."""
    kappa: Annotated[float, Field(ge=-1, le=1)] | None = None
    """Least lower end of the interval of Cohen's kappa with people; None: not asked."""
    of_people: _Share = 0.8
    """Least lower end of the accuracy as a share of how often one person agrees with the majority, where the rows say
    so (`softLabel`)."""
    rows: Annotated[int, Field(ge=2)] = 100
    """Comparisons that an LLM judge is asked, two calls each."""
    without: Literal["warn", "refuse"] = "warn"
    """What happens without the licence."""


class LlmJudge(FrozenModel):
    """A language model behind an OpenAI-compatible endpoint that compares two answers, in both orders."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z][A-Za-z0-9_-]{0,62}$")]
    """Under which gates and report know it; not `reward`."""
    url: str
    """Ends with the API's version (https://host/v1)."""
    model: str
    """Its name there."""
    rubric: Annotated[str, Field(min_length=1)]
    """What makes an answer better."""
    api_key_env: str | None = None
    """Environment variable with the key; None: none."""
    prompts: Positive = 50
    """The first prompts; each pair of models is compared on each of them with two calls."""
    calls: Positive = 10_000
    """Most requests; what is left then has no verdict."""
    cache: str | None = None
    """SQLite file with answers of earlier runs, relative to the manifest."""
    timeout_seconds: PositiveFloat = 60.0
    """For one request."""
    concurrency: Annotated[int, Field(ge=1, le=64)] = 4
    """Requests at a time."""
    price: NonNegativeFloat | None = None
    """Of a million tokens, in any currency; None: costs are not computed."""

    @model_validator(mode="after")
    def _check(self) -> LlmJudge:
        if self.name == "reward":
            raise ValueError("name reward stands for the reward model; give the judge another one")
        if not self.url.startswith(("http://", "https://")):
            raise ValueError(f"url {self.url!r} must begin with http:// or https://, and end with the API's version")
        return self
