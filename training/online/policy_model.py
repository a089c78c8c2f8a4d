"""The trainer's model: policy with LoRA or all weights, and where its values come from."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from peft import get_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import ParamWrapper
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from steersman.config.algorithms import Critic
from steersman.config.manifest import Lora
from steersman.errors import FailedPreconditionError
from steersman.generation import MASK_POLICY
from steersman.nn.forward import predicting_states, unwrapped
from steersman.nn.fused_layers import fuse_layers
from steersman.nn.head import OutputHead
from steersman.nn.load import load_causal_lm, load_reward_backbone
from steersman.nn.lora import attach_lora, quantization, round_frozen_products
from steersman.nn.packed import PackedBatch
from steersman.nn.parity import choose_forward
from training.online.mask_policy import MaskPolicy
from training.online.publication import WeightsPayload
from training.parallel import sharded_like, unsharded, whole


@dataclass(frozen=True, eq=False)
class Forward:
    """Per response token of a micro-batch, fp32 [t]."""

    logprobs: Tensor
    values: Tensor | None


class PolicyModel(nn.Module):
    """Policy, and for PPO a critic: a head on the policy's trunk or a model of its own."""

    def __init__(
        self,
        model: Path | PreTrainedModel,
        lora: Lora | None,
        critic: Critic | None,
        reward_model: Path | None,
        *,
        device: str,
        precision: str,
        temperature: float,
        seed: int,
        gradient_checkpointing: bool = False,
    ) -> None:
        """Args:
        model: folder of the policy to start from, or one in memory, which is changed.
        lora: None: all weights are trained.
        critic: None: no values (critic-free methods).
        reward_model: what a separate critic starts from.
        device, precision: fp32 weights; `bf16` runs the products under autocast.
        temperature: of the sampling; log-probabilities have it applied.
        seed: of LoRA's initialisation.
        gradient_checkpointing: recompute the layers in the backward pass.

        Raises:
            ConfigError: 4-bit weights that this machine cannot hold, or a head of an unknown kind.
        """
        super().__init__()
        torch.manual_seed(seed)
        self.device, self.precision, self._temperature = device, precision, temperature
        if isinstance(model, Path):
            quantized = quantization(lora, device)
            model = load_causal_lm(model, dtype=torch.float32, device=device, quantization_config=quantized)
        base = model
        self._lora = lora
        self.policy: Any = attach_lora(base, lora) if lora is not None else base
        if lora is not None and precision == "bf16" and not dist.is_initialized():  # FSDP wants one dtype in a layer
            round_frozen_products(self.policy)
        choose_forward(self.policy)
        self._head = OutputHead(self.policy)
        self.critic: nn.Module | None = None
        self.value_head: nn.Linear | None = None
        if critic is not None and critic.kind == "valueHead":
            self.value_head = nn.Linear(base.config.get_text_config(decoder=True).hidden_size, 1, device=device)
            nn.init.zeros_(self.value_head.weight)
            nn.init.zeros_(self.value_head.bias)
        elif critic is not None:
            assert reward_model is not None
            self.critic, self.value_head = load_reward_backbone(reward_model, device=device)
            if lora is not None:
                self.critic = attach_lora(self.critic, lora.model_copy(update={"quantize": None}))
            choose_forward(self.critic)
        self.shared_trunk = self.critic is None
        self.mask: MaskPolicy | None = None
        """Restricts `forward` to its top-p sets; set where a method asks for one."""
        fuse_layers(self)
        if gradient_checkpointing:
            for part in (base, self.critic):
                if part is not None:
                    unwrapped(part).gradient_checkpointing_enable({"use_reentrant": False})

    def forward(self, batch: PackedBatch, *, detach_values: bool = False) -> Forward:
        """Log-probabilities and values of the response tokens of a packed batch.

        Args:
            detach_values: the value loss must not reach a trunk that the policy shares (critic warm-up).
        """
        with self._autocast():
            hidden = predicting_states(self.policy, batch)
            values = None
            if self.value_head is not None:
                states = hidden if self.critic is None else predicting_states(self.critic, batch)
                if detach_values and self.shared_trunk:
                    states = states.detach()
                values = self.value_head(states)[:, 0].float()
            return Forward(self._token_logprobs(hidden, batch, sets=self._sets(batch)), values)

    def _sets(self, batch: PackedBatch) -> Tensor | None:
        """uint8 [t, ceil(V / 8)]: the mask policy's set of every token; None without one."""
        if self.mask is None:
            return None
        with self.mask.in_place():
            hidden = predicting_states(self.policy, batch)
            return self._head.top_p_sets(hidden, batch.targets, self.mask.top_p, temperature=self._temperature)

    def logprobs(self, batch: PackedBatch, temperature: float | None = None) -> Tensor:
        """fp32 [t] only, of the whole distribution.

        Args:
            temperature: None: that of the sampling.
        """
        with self._autocast():
            return self._token_logprobs(predicting_states(self.policy, batch), batch, temperature)

    def _token_logprobs(
        self, hidden: Tensor, batch: PackedBatch, temperature: float | None = None, sets: Tensor | None = None
    ) -> Tensor:
        temperature = temperature or self._temperature
        return self._head.token_logprobs(hidden, batch.targets, temperature=temperature, sets=sets)[0]

    def _autocast(self) -> Any:
        if self.precision != "bf16":
            return nullcontext()
        return torch.autocast(self.device, dtype=torch.bfloat16)

    def policy_parameters(self) -> list[nn.Parameter]:
        """Trainable parameters of the policy."""
        return [parameter for parameter in self.policy.parameters() if parameter.requires_grad]

    def critic_parameters(self) -> list[nn.Parameter]:
        """Trainable parameters that only values use."""
        modules = [module for module in (self.critic, self.value_head) if module is not None]
        return [parameter for module in modules for parameter in module.parameters() if parameter.requires_grad]

    def trained_state(self) -> dict[str, Tensor]:
        """Everything that training changes, by name; of several ranks all must call it."""
        return {name: whole(parameter.data) for name, parameter in self._trained().items()}

    def load_trained_state(self, state: dict[str, Tensor]) -> None:
        """Restores what `trained_state` gave.

        Raises:
            FailedPreconditionError: the state is that of another model or other options.
        """
        own = self._trained()
        if {name: value.shape for name, value in own.items()} != {name: value.shape for name, value in state.items()}:
            raise FailedPreconditionError(
                "the checkpoint was made with another model or other lora and critic options; remove the stage's "
                "folder to start over"
            )
        for name, value in state.items():
            own[name].data.copy_(sharded_like(value, own[name].data))

    @torch.no_grad()
    def is_finite(self) -> bool:
        """Whether everything that training changes is; of a sharded parameter this rank's part."""
        local = [value.to_local() if isinstance(value, DTensor) else value for value in self._trained().values()]
        return all(bool(value.isfinite().all()) for value in local)

    def _trained(self) -> dict[str, nn.Parameter]:
        return {name: parameter for name, parameter in self.named_parameters() if parameter.requires_grad}

    @torch.no_grad()
    def payload(self, dtype: torch.dtype) -> WeightsPayload:
        """What the policy service needs to serve these weights; of several ranks all must call it.

        LoRA goes as the adapter. DoRA rescales the rows of the weights, which no sum of two factors can express, and an
        adapter on stacked experts is a sum of many, so these go as the merged weights of the adapted layers.

        A mask policy goes along, its names after `MASK_POLICY`.

        Args:
            dtype: of full weights, the service's own; an adapter goes in fp32 and is merged there.
        """
        own = self._payload(dtype)
        if self.mask is None:
            return own
        with self.mask.in_place():
            of_mask = {f"{MASK_POLICY}{name}": value.clone() for name, value in self._payload(dtype).tensors.items()}
        return replace(own, tensors={**own.tensors, **of_mask})

    def _payload(self, dtype: torch.dtype) -> WeightsPayload:
        if self._lora is None:
            tensors = {name: whole(value).to(dtype) for name, value in self.policy.named_parameters()}
            return WeightsPayload("full", tensors)
        if self._lora.use_dora or any(isinstance(module, ParamWrapper) for module in self.policy.modules()):
            return WeightsPayload("full", _merged_layers(self.policy, dtype))
        config = self.policy.peft_config["default"].to_dict()  # type: ignore[index,union-attr]
        return WeightsPayload("lora", whole(self._adapter), {key: _plain(value) for key, value in config.items()})

    @cached_property
    def _adapter(self) -> dict[str, Tensor]:
        """The adapter's parameters by PEFT's names, the same memory; PEFT goes over the whole model to find them."""
        return dict(get_peft_model_state_dict(self.policy))


def _merged_layers(policy: Any, dtype: torch.dtype) -> dict[str, Tensor]:
    """Weights of the adapted layers with the adapter merged, by their transformers name."""
    merged = {}
    with unsharded(policy):
        for name, layer in policy.get_base_model().named_modules():
            module: Any = layer
            if isinstance(layer, ParamWrapper):  # several lie around one module
                weight: Any = module.get_param()
                path = f"{name.replace('.base_layer', '')}.{module.parameter_name}"
                merged[path] = (weight + module.get_delta_weight("default")).to(dtype)
            elif isinstance(layer, LoraLayer):
                weight = module.get_base_layer().weight
                if "default" in module.lora_variant:
                    weight = module.lora_variant["default"].merge_safe(module, "default", weight)
                else:
                    weight = weight + module.get_delta_weight("default")
                merged[f"{name}.weight"] = weight.to(dtype)
    return merged


def _plain(value: Any) -> Any:
    if isinstance(value, (set, tuple)):
        return sorted(value)
    if value is None or isinstance(value, (str, int, float, bool, list, dict)):
        return value
    return str(value)
