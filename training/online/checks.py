"""Doors that nothing passes which is not finite, or not of this model."""

from __future__ import annotations

from steersman.errors import FailedPreconditionError

OTHER_MODEL = 0.5
"""Nats a token between engine and trainer that no rounding explains; bf16 differs by 0.04 at most."""
MAX_BAD_UPDATES = 2
"""Updates in a row without a finite loss and gradient, after which the run pauses."""


def check_same_model(difference: float) -> None:
    """Raises FailedPreconditionError unless the policy service samples from the trainer's model.

    Args:
        difference: mean absolute difference of a token's log-probability in the first batch, for which the weights of
            both are the same, in nats.
    """
    if not difference <= OTHER_MODEL:  # also where it is no number
        raise FailedPreconditionError(
            f"the policy service's log-probabilities differ from the trainer's by {difference:.2f} nats a token "
            f"(rounding explains 0.04), so it serves another model; start it with the model that this stage trains"
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
