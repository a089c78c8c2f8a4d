"""Implicit language Q-learning."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field
from pydantic.alias_generators import to_camel

from steersman.config.base import NonNegativeFloat, PositiveFloat, Probability
from steersman.config.kinds.registry import Place, stage
from steersman.config.kinds.supervised import Optimizer, SupervisedStage


@stage("ilql")
class IlqlStage(SupervisedStage):
    """Implicit language Q-learning (Snell et al. 2022; trlX): from what conversations were worth, offline.

    The policy samples from log pi + beta (Q - V), which engine transformers does.
    """

    title = "Implicit language Q-learning."
    runner = "training.offline.ilql:run_ilql"
    trains_policy = shared_by_ranks = True

    learn_from: Annotated[
        list[Literal["returns", "preferences", "feedback", "aspects"]], Field(min_length=1, max_length=4)
    ] = ["returns"]
    """Files of `data`; comparisons, thumbs and ratings count as returns from -1 to 1."""
    aspects: dict[str, float] = {}
    """Weights of rated aspects, below 0 where less is better; none given: all 1, but length and complexity 0."""
    beta: NonNegativeFloat = 4.0
    """Weight of Q - V when tokens are drawn; 0: the language model alone."""
    gamma: Probability = 1.0
    """Discount of a token."""
    lam: Annotated[float, Field(ge=0, le=1)] = 1.0
    """1: Q learns the return itself, in tens of steps; 0: from V of the next token, as in the paper, which puts
    parts of several conversations together, in hundreds of steps."""
    expectile: Annotated[float, Field(gt=0, lt=1)] = 0.7
    """Tau of V's regression: 0.5 is the mean of what was done, towards 1 the best of it."""
    cql: NonNegativeFloat = 0.1
    """Weight of the CQL term, which keeps Q of tokens that nobody said below. It lifts Q of the others by up to half of
    it, with `lam` 0 again for each token that follows: take at most 1 / tokens of an answer there."""
    lm: NonNegativeFloat = 1.0
    """Weight of the language-model term."""
    lm_beta: NonNegativeFloat = 0.0
    """Tokens count exp(lmBeta (Q - V)) in the language-model term; 0: all the same."""
    polyak: Probability = 0.1
    """Share of the Q heads that goes into their targets after each step."""
    heads_learning_rate: PositiveFloat = 1e-3
    """Of the Q and V heads, which begin at random."""
    optimizer: Optimizer = Optimizer(learning_rate=1e-4)
    """AdamW."""

    def check_place(self, place: Place) -> None:
        where = self.shown(place)
        for kind in self.learn_from:
            if kind not in place.data:
                mend = "set learnFrom: [preferences]" if place.demo else "add it or change learnFrom"
                raise ValueError(f"{where} learns from data.{kind}, which is missing; {mend}")
        if place.engine != "transformers":
            raise ValueError(
                f"{where}: its policy samples from log pi + beta (Q - V), which services.policy.engine {place.engine} "
                "cannot; use transformers"
            )
        later = next((stage for stage in place.later if stage.trains_policy), None)
        if later is not None:
            raise ValueError(
                f"{where} is followed by {to_camel(later.kind)}, which would train the language model without its Q "
                "and V heads; put ilql last of the stages that train the policy"
            )
        super().check_place(place)
