"""Doors that nothing passes which is not finite, or not of this model."""

from __future__ import annotations

from steersman.errors import FailedPreconditionError

OTHER_MODEL = {True: 0.01, False: 0.2}
"""Nats a token between engine and trainer that no rounding explains, where both compute in fp32 (which differs by 1e-4
at most), and where one of them computes in bf16 (0.04)."""
MAX_BAD_UPDATES = 2
"""Updates in a row without a finite loss and gradient, after which the run pauses."""


def check_same_model(difference: float, *, exact: bool = False) -> None:
    """Raises FailedPreconditionError unless the policy service samples from the trainer's model.

    It also fires where both have the same weights and one of them computes the architecture wrongly.

    Args:
        difference: mean absolute difference of a token's log-probability in the first batch, for which the weights of
            both are the same, in nats.
        exact: both compute in fp32.
    """
    if not difference <= OTHER_MODEL[exact]:  # also where it is no number
        raise FailedPreconditionError(
            f"the policy service's log-probabilities differ from the trainer's by {difference:.2f} nats a token "
            f"(rounding explains {1e-4 if exact else 0.04}), so it serves another model or computes it otherwise; "
            "start it with the model that this stage trains, or with the engine transformers"
        )


def check_finite_weights(finite: bool, steps: int) -> None:
    """Raises FailedPreconditionError when a weight is not finite: nothing is written or published then."""
    if not finite:
        raise FailedPreconditionError(
            f"after step {steps} a weight of the policy or the critic is not finite; the last checkpoint stays: "
            "lower optimizer.learningRate and start the run again"
        )


class BadUpdates:
    """Counts the updates that were not made because their loss or gradient was not finite."""

    def __init__(self) -> None:
        self._in_a_row = 0

    def saw(self, made: bool, step: int) -> None:
        """Raises FailedPreconditionError after too many in a row that were not made."""
        self._in_a_row = 0 if made else self._in_a_row + 1
        if self._in_a_row >= MAX_BAD_UPDATES:
            raise FailedPreconditionError(
                f"{self._in_a_row} updates in a row had a loss or gradient that is not finite (step {step + 1}); none "
                "of them was made and the last checkpoint stays: lower optimizer.learningRate, and start the run again"
            )
