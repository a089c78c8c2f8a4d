"""The trainer's model: policy with LoRA or all weights, and where its values come from."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model_state_dict
from torch import Tensor, nn

from steersman.config.manifest import Critic, Lora
from steersman.nn.load import load_causal_lm, load_reward_backbone
from steersman.nn.logprobs import token_logprobs
from steersman.nn.lora import attach_lora
from steersman.nn.packed import PackedBatch, enable_packed, hidden_states
from training.clients import WeightsPayload


@dataclass(frozen=True, eq=False)
class Forward:
    """Per response token of a micro-batch, fp32 [t]."""

    logprobs: Tensor
    values: Tensor | None


class PolicyModel(nn.Module):
    """Policy, and for PPO a critic: a head on the policy's trunk or a model of its own."""

    def __init__(
        self,
        folder: Path,
        lora: Lora | None,
        critic: Critic | None,
        reward_model: Path | None,
        *,
        device: str,
        precision: str,
        temperature: float,
        seed: int,
    ) -> None:
        """Args:
        folder: the policy to start from.
        lora: None: all weights are trained.
        critic: None: no values (critic-free methods).
        reward_model: what a separate critic starts from.
        device, precision: fp32 weights; `bf16` runs the products under autocast.
        temperature: of the sampling; log-probabilities have it applied.
        seed: of LoRA's initialisation.
        """
        super().__init__()
        torch.manual_seed(seed)
        self._device, self._precision, self._temperature = device, precision, temperature
        base = load_causal_lm(folder, dtype=torch.float32, device=device)
        self._lora = lora
        self.policy: Any = attach_lora(base, lora) if lora is not None else base
        enable_packed(self.policy)
        self.head_weight: Tensor = base.get_output_embeddings().weight
        self.critic: nn.Module | None = None
        self.value_head: nn.Linear | None = None
        if critic is not None and critic.kind == "valueHead":
            self.value_head = nn.Linear(base.config.hidden_size, 1, device=device)
            nn.init.zeros_(self.value_head.weight)
            nn.init.zeros_(self.value_head.bias)
        elif critic is not None:
            assert reward_model is not None
            self.critic, self.value_head = load_reward_backbone(reward_model, device=device)
            if lora is not None:
                self.critic = attach_lora(self.critic, lora)
            enable_packed(self.critic)
        self.shared_trunk = self.critic is None

    def forward(self, batch: PackedBatch) -> Forward:
        """Log-probabilities and values of the response tokens of a packed batch."""
        with self._autocast():
            hidden = hidden_states(self.policy, batch)[batch.predictor]
            logprobs, _ = token_logprobs(hidden, self.head_weight, batch.targets, temperature=self._temperature)
            values = None
            if self.value_head is not None:
                states = hidden if self.critic is None else hidden_states(self.critic, batch)[batch.predictor]
                values = self.value_head(states)[:, 0].float()
        return Forward(logprobs, values)

    def logprobs(self, batch: PackedBatch) -> Tensor:
        """fp32 [t] only."""
        with self._autocast():
            hidden = hidden_states(self.policy, batch)[batch.predictor]
            return token_logprobs(hidden, self.head_weight, batch.targets, temperature=self._temperature)[0]

    def _autocast(self) -> Any:
        if self._precision != "bf16":
            return nullcontext()
        return torch.autocast(self._device, dtype=torch.bfloat16)

    def policy_parameters(self) -> list[nn.Parameter]:
        """Trainable parameters of the policy."""
        return [parameter for parameter in self.policy.parameters() if parameter.requires_grad]

    def critic_parameters(self) -> list[nn.Parameter]:
        """Trainable parameters that only values use."""
        modules = [module for module in (self.critic, self.value_head) if module is not None]
        return [parameter for module in modules for parameter in module.parameters() if parameter.requires_grad]

    def trained_state(self) -> dict[str, Tensor]:
        """Everything that training changes, by name."""
        return {name: parameter.data for name, parameter in self.named_parameters() if parameter.requires_grad}

    def load_trained_state(self, state: dict[str, Tensor]) -> None:
        """Restores what `trained_state` gave."""
        own = self.trained_state()
        assert own.keys() == state.keys(), "the checkpoint belongs to another configuration"
        for name, value in state.items():
            own[name].copy_(value)

    def payload(self, dtype: torch.dtype) -> WeightsPayload:
        """What the policy service needs to serve these weights: the adapter, or all weights in `dtype`."""
        if self._lora is not None:
            config = self.policy.peft_config["default"].to_dict()  # type: ignore[index,union-attr]
            tensors = get_peft_model_state_dict(self.policy)
            return WeightsPayload.of("lora", tensors, {key: _plain(value) for key, value in config.items()})
        tensors = {name: value.to(dtype) for name, value in self.policy.named_parameters()}
        return WeightsPayload.of("full", tensors)


def _plain(value: Any) -> Any:
    if isinstance(value, (set, tuple)):
        return sorted(value)
    if value is None or isinstance(value, (str, int, float, bool, list, dict)):
        return value
    return str(value)
