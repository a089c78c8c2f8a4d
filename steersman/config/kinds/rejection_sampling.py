"""Best of n and fine-tuning."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from steersman.config.base import Positive, PositiveFloat
from steersman.config.kinds.registry import stage
from steersman.config.kinds.sampling import OnlineStage
from steersman.config.kinds.supervised import Lora, Optimizer


@stage("rejection_sampling")
class RejectionSamplingStage(OnlineStage):
    """Best of n by reward, fine-tune on the winners, in rounds (Llama 2, section 3.2.3)."""

    title = "Best of n and fine-tuning."
    runner = "training.rejection_sampling:run_rejection_sampling"
    reads = "prompts"
    trains_policy = uses_services = True

    rounds: Positive = 2
    """Rounds of sampling and fine-tuning."""
    prompts_per_round: Positive = 96
    """Prompts a round."""
    samples_per_prompt: Annotated[int, Field(ge=2)] = 8
    """Samples of each prompt."""
    keep_earlier_winners: bool = True
    """Earlier rounds' best answers compete with the new ones (Llama 2's remedy against forgetting)."""
    lora: Lora | None = Lora()
    """None (`null`): full fine-tuning."""
    optimizer: Optimizer = Optimizer(learning_rate=2e-4)
    """AdamW."""
    epochs: PositiveFloat = 1.0
    """Passes over a round's winners."""
    batch_size: Positive = 16
    """Conversations an optimizer step."""
    micro_batch_size: Positive = 8
    """Conversations a forward pass."""
    gradient_checkpointing: bool = False
    """Trades time for memory."""

    def steps_on(self, rows: int) -> int | None:
        return self.rounds
