"""The model as the engine calls it: packed tokens in, logits out, weights held by a `WeightStore`.

`LlamaDecoder` is a forward pass of the Llama family with fewer and fused operations; `GenericDecoder` is the
transformers model itself with its linear layers and its attention exchanged. Both give the same numbers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from services.policy.engines import kernels
from services.policy.engines.attention import SLOT_ATTENTION, DecodeStep, PrefillStep, Scores
from services.policy.engines.hardware import Layout
from services.policy.engines.weights import Linear, Parameter, WeightStore
from steersman.errors import ConfigError

_FEW_SCORES = 1 << 19
"""Rows times tokens times query width up to which one thread attends sooner than several calls."""
_LLAMA_FAMILY = {"LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM"}


class Decoder(Protocol):
    def prefill(self, token_ids: Tensor, positions: Tensor, step: PrefillStep) -> None:
        """Fills the cache. token_ids and positions: int64 [T]."""
        ...

    def decode(self, token_ids: Tensor, positions: Tensor, step: DecodeStep) -> Tensor:
        """int64 [B], int64 [B] -> logits [B, V]."""
        ...


def build_decoder(model: PreTrainedModel, dtype: torch.dtype, layout: Layout) -> tuple[Decoder, WeightStore]:
    """Takes the model apart: its parameters move into the store, its modules are not to be used any more.

    Raises ConfigError for an architecture that does not use transformers' AttentionInterface.
    """
    store = _store(model, dtype)
    if type(model).__name__ in _LLAMA_FAMILY and LlamaDecoder.fits(model):
        return LlamaDecoder(model, store, dtype, layout), store
    if not getattr(model, "_supports_attention_backend", False):
        raise ConfigError(
            f"{type(model).__name__} does not use transformers' AttentionInterface, which the transformers engine "
            "needs; use the vllm engine"
        )
    return GenericDecoder(model, store, layout), store


def _store(model: PreTrainedModel, dtype: torch.dtype) -> WeightStore:
    tensors = {name: parameter.detach() for name, parameter in model.named_parameters()}
    aliases: dict[str, str] = {}
    owners = {id(parameter): name for name, parameter in model.named_parameters()}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if owners[id(parameter)] != name:
            aliases[name] = owners[id(parameter)]
    return WeightStore(tensors, aliases, dtype)


class LlamaDecoder:
    """Llama, Mistral, Qwen2 and Qwen3: one product for queries, keys and values; activations, products and residual
    sums fused into the linear layers; the residual stream in float32, as under autocast in training.
    """

    def __init__(self, model: PreTrainedModel, store: WeightStore, dtype: torch.dtype, layout: Layout) -> None:
        body = model.model
        self._dtype = dtype
        self._rotary = body.rotary_emb.float()
        self._embedding: Tensor
        store.attach(Parameter("model.embed_tokens.weight", self._set_embedding))
        self._layers = [_Layer(layer, f"model.layers.{i}.", store, layout) for i, layer in enumerate(body.layers)]
        self._norm = _Norm(body.norm, "model.norm.weight", store)
        self._head = store.linear((store.name("lm_head.weight"),), (), layout)
        self._head_dim = self._layers[0].head_dim
        self._fuses_few = dtype == torch.float32 and not any(layer.has_head_norms for layer in self._layers)
        self._packed = layout == "packed"
        self._few: dict[int, _FewRows] = {}

    def _set_embedding(self, weight: Tensor) -> object:
        old = getattr(self, "_embedding", None)
        self._embedding = weight
        return old

    @staticmethod
    def fits(model: PreTrainedModel) -> bool:
        """Whether the checkpoint stays within what this forward pass computes."""
        config = model.config
        rotary = len(model.model.rotary_emb.inv_freq) * 2
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        return config.hidden_act == "silu" and rotary == head_dim and model.lm_head.bias is None

    def prefill(self, token_ids: Tensor, positions: Tensor, step: PrefillStep) -> None:
        self._forward(token_ids, positions, step)

    def decode(self, token_ids: Tensor, positions: Tensor, step: DecodeStep) -> Tensor:
        return self._head(self._norm(self._forward(token_ids, positions, step)).to(self._dtype))

    def _forward(self, token_ids: Tensor, positions: Tensor, step: DecodeStep | PrefillStep) -> Tensor:
        x = F.embedding(token_ids, self._embedding).float()
        cos, sin = self._rotary(x, positions.unsqueeze(0))
        cos, sin = cos[0].unsqueeze(1), sin[0].unsqueeze(1)
        # rotate_half(x) * sin == swap_halves(x) * signed sin
        half = self._head_dim // 2
        sin = torch.cat((-sin[..., :half], sin[..., half:]), -1)
        cos, sin = cos.to(self._dtype), sin.to(self._dtype)
        if isinstance(step, DecodeStep) and self._are_few(step):
            return self._decode_few(x, cos[:, 0], sin[:, 0], step)
        last = len(self._layers) - 1
        for index, layer in enumerate(self._layers):
            q, k, v = layer.project(x, cos, sin, self._dtype)
            if index == last and isinstance(step, PrefillStep):
                step.store(index, k, v)  # nobody reads what the last layer makes of a prompt
                break
            attended = step.attend(index, q, k, v, layer.scores)
            x = layer.finish(x, attended.flatten(1), self._dtype)
        return x

    def _are_few(self, step: DecodeStep) -> bool:
        if not self._fuses_few or step.positions.device.type != "cpu":
            return False
        rows = len(step.positions)
        if self._packed and rows > 1:  # products in oneDNN's layout come with what follows them
            return False
        return rows * step.longest * self._layers[0].query_width <= _FEW_SCORES

    def _decode_few(self, x: Tensor, cos: Tensor, sin: Tensor, step: DecodeStep) -> Tensor:
        rows = len(x)
        few = self._few.get(rows)
        if few is None:
            few = self._few[rows] = _FewRows.of(self._layers[0], rows)
        few.x.tensor.copy_(x)
        places = cos.numpy(), sin.numpy(), step.positions.numpy()
        for index, layer in enumerate(self._layers):
            layer.decode_few(few, *places, *step.cache.layers[index].arrays)
        return few.x.tensor


class _Norm:
    """RMS norm in float32. torch's own takes a dozen kernels on a CPU; here it is five, two of them over all of x."""

    def __init__(self, module: Any, name: str, store: WeightStore) -> None:
        self._eps = float(module.variance_epsilon)
        self._weight: Tensor
        store.attach(Parameter(name, self._place))

    def _place(self, weight: Tensor) -> None:
        self._weight = weight.float()
        self._array = self._weight.numpy() if weight.device.type == "cpu" else None
        self._offset = self._weight.new_tensor(self._eps)

    def __call__(self, x: Tensor) -> Tensor:
        length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        factor = torch.addcmul(self._offset, length, length, value=1.0 / x.shape[-1]).rsqrt_()
        return torch.mul(x, factor).mul_(self._weight)

    def few(self, x: np.ndarray, out: np.ndarray) -> None:
        """The same on a CPU, in one call."""
        kernels.rms_norm(x, self._array, self._eps, out)


class _Buffer(NamedTuple):
    tensor: Tensor
    array: np.ndarray
    """The same memory."""

    @staticmethod
    def of(rows: int, width: int) -> _Buffer:
        tensor = torch.empty(rows, width)
        return _Buffer(tensor, tensor.numpy())


class _FewRows(NamedTuple):
    """What a layer computes for a few rows, one layer after the other in the same memory."""

    x: _Buffer
    """The residual stream."""
    normed: _Buffer
    mixed: _Buffer
    """Queries, keys and values."""
    attended: _Buffer
    gate_up: _Buffer
    hidden: _Buffer

    @staticmethod
    def of(layer: _Layer, rows: int) -> _FewRows:
        return _FewRows(*(_Buffer.of(rows, width) for width in layer.widths()))


class _Layer:
    def __init__(self, module: Any, prefix: str, store: WeightStore, layout: Layout) -> None:
        attention = module.self_attn
        self.head_dim: int = attention.head_dim
        window = getattr(attention, "sliding_window", None)
        if attention.config.model_type == "mistral":
            window = attention.config.sliding_window
        self.scores = Scores(attention.scaling, window)
        self._heads = attention.q_proj.out_features // self.head_dim
        self._kv_heads = attention.k_proj.out_features // self.head_dim
        self.query_width = self._heads * self.head_dim
        self._hidden = module.mlp.gate_proj.out_features
        self._size = module.mlp.gate_proj.in_features
        self._input_norm = _Norm(module.input_layernorm, prefix + "input_layernorm.weight", store)
        self._post_norm = _Norm(module.post_attention_layernorm, prefix + "post_attention_layernorm.weight", store)
        self._head_norms: tuple[_Norm, _Norm] | None = None
        if hasattr(attention, "q_norm"):
            self._head_norms = (
                _Norm(attention.q_norm, prefix + "self_attn.q_norm.weight", store),
                _Norm(attention.k_norm, prefix + "self_attn.k_norm.weight", store),
            )

        def linear(*names: str) -> Linear:
            modules = {name: module.get_submodule(name) for name in names}
            weights = [f"{prefix}{name}.weight" for name in names]
            biases = [f"{prefix}{name}.bias" for name, one in modules.items() if one.bias is not None]
            return store.linear(weights, biases, layout)

        self._qkv = linear("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
        self._out = linear("self_attn.o_proj")
        # Packed products come with the activation and the multiplication; others are better off as one.
        self._gate_up: Linear | None = None
        if layout == "packed":
            self._gate, self._up = linear("mlp.gate_proj"), linear("mlp.up_proj")
        else:
            self._gate_up = linear("mlp.gate_proj", "mlp.up_proj")
        self._down = linear("mlp.down_proj")
        self.has_head_norms = self._head_norms is not None

    def project(self, x: Tensor, cos: Tensor, sin: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        """Rotated queries and keys, and values, [T, heads, head dim]; cos, signed sin [T, 1, head dim]."""
        mixed = self._qkv(self._input_norm(x).to(dtype)).view(len(x), -1, self.head_dim)
        rotated, values = mixed[:, : -self._kv_heads], mixed[:, -self._kv_heads :]
        if self._head_norms is not None:
            queries, keys = rotated[:, : self._heads].float(), rotated[:, self._heads :].float()
            rotated = torch.cat((self._head_norms[0](queries), self._head_norms[1](keys)), 1).to(dtype)
        swapped = rotated.unflatten(2, (2, -1)).flip(2).flatten(2)
        rotated = torch.addcmul(rotated * cos, swapped, sin)
        return rotated[:, : self._heads], rotated[:, self._heads :], values

    def finish(self, x: Tensor, attended: Tensor, dtype: torch.dtype) -> Tensor:
        x = self._out.accumulate(attended, x)
        normed = self._post_norm(x).to(dtype)
        if self._gate_up is None:
            hidden = self._up.multiply(normed, self._gate.silu(normed))
        else:
            gate, up = self._gate_up(normed).chunk(2, -1)
            hidden = F.silu(gate).mul_(up)
        return self._down.accumulate(hidden, x)

    def widths(self) -> tuple[int, ...]:
        """Of the buffers of `_FewRows`."""
        mixed = self.query_width + 2 * self._kv_heads * self.head_dim
        return self._size, self._size, mixed, self.query_width, 2 * self._hidden, self._hidden

    def decode_few(
        self,
        few: _FewRows,
        cos: np.ndarray,
        sin: np.ndarray,
        positions: np.ndarray,
        keys: np.ndarray,
        values: np.ndarray,
    ) -> None:
        """`project`, attention and `finish` on the residual stream `few.x`."""
        self._input_norm.few(few.x.array, few.normed.array)
        self._qkv.into(few.normed.tensor, few.mixed.tensor)
        window = self.scores.window or 0
        kernels.attend(
            few.mixed.array, cos, sin, positions, keys, values, self.scores.scale, window, few.attended.array
        )
        self._out.accumulate(few.attended.tensor, few.x.tensor)
        self._post_norm.few(few.x.array, few.normed.array)
        if self._gate_up is None:
            self._gate.into(few.normed.tensor, few.gate_up.tensor[:, : self._hidden])
            self._up.into(few.normed.tensor, few.gate_up.tensor[:, self._hidden :])
        else:
            self._gate_up.into(few.normed.tensor, few.gate_up.tensor)
        kernels.silu_multiply(few.gate_up.array, few.hidden.array)
        self._down.accumulate(few.hidden.tensor, few.x.tensor)


class GenericDecoder:
    """Any transformers causal LM whose attention goes through the AttentionInterface."""

    def __init__(self, model: PreTrainedModel, store: WeightStore, layout: Layout) -> None:
        self._model = model
        model.set_attn_implementation(SLOT_ATTENTION)
        held = self._exchange_linears(model, store, layout)
        for module_name, module in model.named_modules():
            for attribute in list(module._parameters):
                name = store.name(f"{module_name}.{attribute}")
                if module._parameters[attribute] is not None and f"{module_name}.{attribute}" not in held:
                    store.attach(Parameter(name, _setter(module._parameters, attribute)))

    @staticmethod
    def _exchange_linears(model: PreTrainedModel, store: WeightStore, layout: Layout) -> set[str]:
        held: set[str] = set()
        for name, module in list(model.named_modules()):
            if type(module) is not nn.Linear:
                continue
            biases = (f"{name}.bias",) if module.bias is not None else ()
            holder = store.linear((store.name(f"{name}.weight"),), biases, layout)
            parent = model.get_submodule(name.rpartition(".")[0])
            setattr(parent, name.rpartition(".")[2], holder)
            held.update((f"{name}.weight", *biases))
        return held

    def prefill(self, token_ids: Tensor, positions: Tensor, step: PrefillStep) -> None:
        self._call(token_ids, positions, step, token_ids.new_zeros(1))

    def decode(self, token_ids: Tensor, positions: Tensor, step: DecodeStep) -> Tensor:
        return self._call(token_ids, positions, step, torch.arange(len(token_ids), device=token_ids.device))

    def _call(self, token_ids: Tensor, positions: Tensor, step: DecodeStep | PrefillStep, keep: Tensor) -> Tensor:
        output = self._model(
            input_ids=token_ids.unsqueeze(0),
            position_ids=positions.unsqueeze(0),
            use_cache=False,
            logits_to_keep=keep,
            steersman_step=step,
        )
        return output.logits[0]


def _setter(parameters: dict[str, nn.Parameter | None], attribute: str) -> Callable[[Tensor], object]:
    def place(tensor: Tensor) -> object:
        old = parameters[attribute]
        parameters[attribute] = nn.Parameter(tensor, requires_grad=False)
        return old

    return place
