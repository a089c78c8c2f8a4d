"""From hidden states to logits and log-probabilities: the output layer of any causal language model.

    logits = softcap * tanh(s (h W^T + b) / softcap)

The scale s (Cohere, Granite, MiniCPM) has another name and another direction in every family, so it is measured: the
model's own code is given hidden states and asked for logits. Trainer, reference service and check all use this file.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPast

from steersman.errors import ConfigError
from steersman.nn.encoder_decoder import is_encoder_decoder
from steersman.nn.forward import trunk_of, unwrapped
from steersman.nn.logprobs import token_logprobs, top_p_sets_of

_CAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
"""What families call the cap of their logits."""


class OutputHead:
    """The output layer of a model; new values of its parameters count at once, adapters on it included."""

    def __init__(self, model: nn.Module) -> None:
        """Args:
        model: a causal LM, PEFT-wrapped or not, whole (not sharded).

        Raises:
            ConfigError: the model's logits are not what the formula above gives.
        """
        base = unwrapped(model)
        module = base.get_output_embeddings() if hasattr(base, "get_output_embeddings") else None
        if module is None or not hasattr(module, "weight"):
            raise ConfigError(
                f"{type(base).__name__} has no output layer over a vocabulary; use a causal language model"
            )
        self._module: Any = module
        text = base.config.get_text_config(decoder=True)
        self.softcap: float | None = next(filter(None, (getattr(text, name, None) for name in _CAPS)), None)
        self.scale = _measured_scale(base, self._parameters(), self.softcap)

    def token_logprobs(
        self,
        hidden: Tensor,
        targets: Tensor,
        *,
        temperature: float = 1.0,
        with_entropy: bool = False,
        sets: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """As `logprobs.token_logprobs`: hidden [T, D] are the states that predict `targets` [T]."""
        hidden, weight, bias = self._scaled(hidden)
        return token_logprobs(
            hidden,
            weight,
            targets,
            bias=bias,
            temperature=temperature,
            softcap=self.softcap,
            with_entropy=with_entropy,
            sets=sets,
        )

    def likeliest(self, hidden: Tensor, *, chunk_tokens: int = 512) -> Tensor:
        """int64 [T], the likeliest token after each of hidden [T, D]."""
        hidden, weight, bias = self._scaled(hidden)
        parts = hidden.split(chunk_tokens)
        return torch.cat([nn.functional.linear(part, weight, bias).argmax(-1) for part in parts])

    def top_p_sets(self, hidden: Tensor, targets: Tensor, top_p: float, *, temperature: float = 1.0) -> Tensor:
        """As `logprobs.top_p_sets_of`, without a gradient."""
        hidden, weight, bias = self._scaled(hidden)
        return top_p_sets_of(hidden, weight, targets, top_p, bias=bias, temperature=temperature, softcap=self.softcap)

    def _scaled(self, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Hidden states, weight and bias of a layer without the scale s."""
        weight, bias = self._parameters()
        if self.scale != 1.0:
            hidden, bias = hidden * self.scale, None if bias is None else bias * self.scale
        return hidden, weight, bias

    def _parameters(self) -> tuple[Tensor, Tensor | None]:
        """Weight [V, D] and bias [V] as they count now; gradients reach adapters through them."""
        module = self._module
        if isinstance(module, ModulesToSaveWrapper):
            module = module.modules_to_save[module.active_adapters[0]]
        if not isinstance(module, LoraLayer):
            return module.weight, getattr(module, "bias", None)
        own = module.get_base_layer()
        weight: Any = own.weight
        if not (module.merged or module.disable_adapters):
            for name in module.active_adapters:
                if name in module.lora_A:
                    weight = _adapted(module, name, weight)
        return weight, getattr(own, "bias", None)


def _adapted(module: Any, name: str, weight: Tensor) -> Tensor:
    """W + s B A; DoRA rescales its rows to the trained magnitudes (Liu et al. 2024, norm without gradient)."""
    adapted = weight + module.scaling[name] * (module.lora_B[name].weight @ module.lora_A[name].weight)
    if module.use_dora[name]:
        magnitude = module.lora_magnitude_vector[name].weight
        adapted = adapted * (magnitude / adapted.detach().norm(dim=1))[:, None]
    return adapted


@contextmanager
def _returning(trunk: nn.Module, hidden: Tensor) -> Iterator[None]:
    """Inside, the trunk answers every call with these hidden states."""
    own = trunk.__dict__.get("forward")
    trunk.forward = lambda *args, **kwargs: _Output(last_hidden_state=hidden)
    try:
        yield
    finally:
        if own is None:
            del trunk.forward
        else:
            trunk.forward = own


class _Output(BaseModelOutputWithPast):
    """Has whatever a model looks for beside the hidden states: nothing."""

    def __getattr__(self, name: str) -> None:
        return None


@torch.no_grad()
def _measured_scale(base: Any, parameters: tuple[Tensor, Tensor | None], softcap: float | None) -> float:
    """s, as the configuration writes it where it is one of its numbers."""
    weight, bias = parameters
    generator = torch.Generator().manual_seed(0)
    size = weight.shape[1]
    hidden = torch.randn(1, 4, size, generator=generator).to(weight.device, weight.dtype)
    plain = nn.functional.linear(hidden, weight, bias).float()
    if softcap is not None:  # where the cap is nearly straight
        hidden = hidden * min(1.0, float(0.5 * softcap / plain.abs().max()))
        plain = nn.functional.linear(hidden, weight, bias).float()
    ids = torch.full((1, 4), 5, device=weight.device)
    try:
        of_decoder = {"decoder_input_ids": ids} if is_encoder_decoder(base.config) else {}
        with _returning(trunk_of(base), hidden):
            found = base(input_ids=ids, use_cache=False, **of_decoder).logits.float()
    except Exception as error:  # whatever a model's own code raises
        raise ConfigError(
            f"{type(base).__name__}: its output layer cannot be asked for logits ({type(error).__name__}: {error})"
        ) from error
    if found.shape == plain.shape:
        wanted = softcap * torch.atanh((found / softcap).clamp(-0.999999, 0.999999)) if softcap else found
        ratio = float((wanted * plain).sum() / plain.square().sum())
        near = min(_written_scales(base.config), key=lambda one: abs(one - ratio))
        largest = float(wanted.abs().max())
        if abs(near - ratio) <= 0.02 * abs(ratio) and (wanted - near * plain).abs().max() <= 0.02 * largest:
            return near
        if (wanted - ratio * plain).abs().max() <= 1e-5 * largest:  # a number that has no name here
            return ratio
    raise ConfigError(f"{type(base).__name__} makes its logits by more than one linear layer, which is not supported")


def _written_scales(config: Any) -> list[float]:
    """1, and what the configuration's numbers about logits can mean."""
    scales = [1.0]
    text = config.get_text_config(decoder=True)
    for name in ("logit_scale", "logits_scaling", "lm_head_multiplier", "output_multiplier_scale", "logits_scale"):
        value = getattr(text, name, None)
        if isinstance(value, (int, float)) and value:
            scales += [float(value), 1.0 / value]
    if is_encoder_decoder(config):  # T5 where embedding and head are one
        scales.append(text.hidden_size**-0.5)
    if getattr(text, "dim_model_base", None):
        scales.append(text.dim_model_base / text.hidden_size)
    return scales
