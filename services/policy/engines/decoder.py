"""The model as the engine calls it: packed tokens in, logits out, weights held by a `WeightStore`.

`LlamaDecoder` is a forward pass of the Llama family with fewer and fused operations; `GenericDecoder` is the
transformers model itself with its linear layers and its attention exchanged; `plain.PlainDecoder` is the model as it
is. Which of them gives a model's own numbers is found by computing (`choice.py`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from services.policy.engines.attention import SLOT_ATTENTION, DecodeStep, PrefillStep, Scores
from services.policy.engines.decoded import Decoded, LastHidden
from services.policy.engines.hardware import Layout
from services.policy.engines.weights import Linear, Parameter, WeightStore, attach_parameters
from steersman.errors import ConfigError

if TYPE_CHECKING:
    from services.policy.engines.cpu_layers import CpuLayers

_LLAMA_FAMILY = {"LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM"}


class Decoder(Protocol):
    def prefill(self, token_ids: Tensor, positions: Tensor, step: PrefillStep) -> None:
        """Fills the cache. token_ids and positions: int64 [T]."""
        ...

    def decode(self, token_ids: Tensor, positions: Tensor, step: DecodeStep | PrefillStep) -> Decoded:
        """From int64 [B] and int64 [B]: the next token's logits after each of B tokens. Decoders with a cache of the
        model's own know one token a row only.
        """
        ...

    def score(self, token_ids: Tensor, positions: Tensor, step: PrefillStep) -> Decoded:
        """As `prefill`, and the next token's logits after each of T tokens, all of one row."""
        ...


DecoderName = Literal["llama", "generic", "cached", "uncached", "encoder-decoder"]


def build_decoder(
    model: PreTrainedModel, name: DecoderName, dtype: torch.dtype, layout: Layout
) -> tuple[Decoder, WeightStore]:
    """Takes the model apart: its parameters move into the store, its modules are not to be used any more.

    Raises ConfigError where the model is not of the kind that this decoder computes.
    """
    store = _store(model, dtype)
    if name == "llama":
        if type(model).__name__ not in _LLAMA_FAMILY or not LlamaDecoder.fits(model):
            raise ConfigError(f"{type(model).__name__} is not what the fast decoder computes")
        return LlamaDecoder(model, store, dtype, layout), store
    if name == "generic":
        return GenericDecoder(model, store, layout), store
    from services.policy.engines.plain import EncoderDecoder, PlainDecoder

    if name == "encoder-decoder":
        return EncoderDecoder(model, store), store

    return PlainDecoder(model, store, cached=name == "cached"), store


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
        self._layers = [LlamaLayer(layer, f"model.layers.{i}.", store, layout) for i, layer in enumerate(body.layers)]
        self._norm = _Norm(body.norm, "model.norm.weight", store)
        self._head = store.linear((store.name("lm_head.weight"),), (), layout)
        self._head_dim = self._layers[0].head_dim
        self._on_cpu: CpuLayers | None = None
        if self._embedding.device.type == "cpu" and dtype in (torch.float32, torch.bfloat16):
            from services.policy.engines.cpu_layers import CpuLayers  # compiles where nothing is cached

            self._on_cpu = CpuLayers(self._layers, dtype, layout)

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
        self._forward(token_ids, positions, step, fill=True)

    def decode(self, token_ids: Tensor, positions: Tensor, step: DecodeStep | PrefillStep) -> Decoded:
        hidden = self._norm(self._forward(token_ids, positions, step)).to(self._dtype)
        return Decoded(self._head(hidden), hidden)

    def score(self, token_ids: Tensor, positions: Tensor, step: PrefillStep) -> Decoded:
        return self.decode(token_ids, positions, step)

    def _forward(
        self, token_ids: Tensor, positions: Tensor, step: DecodeStep | PrefillStep, fill: bool = False
    ) -> Tensor:
        x = F.embedding(token_ids, self._embedding).float()
        cos, sin = self._rotary(x, positions.unsqueeze(0))
        cos, sin = cos[0].unsqueeze(1), sin[0].unsqueeze(1)
        # rotate_half(x) * sin == swap_halves(x) * signed sin
        half = self._head_dim // 2
        sin = torch.cat((-sin[..., :half], sin[..., half:]), -1)
        cos, sin = cos.to(self._dtype), sin.to(self._dtype)
        if isinstance(step, DecodeStep) and self._on_cpu is not None and self._on_cpu.fits(step):
            return self._on_cpu.forward(x, cos[:, 0], sin[:, 0], step)
        last = len(self._layers) - 1
        for index, layer in enumerate(self._layers):
            q, k, v = layer.project(x, cos, sin, self._dtype)
            if index == last and fill and isinstance(step, PrefillStep):
                step.store(index, k, v)  # nobody reads what the last layer makes of a prompt
                break
            attended = step.attend(index, q, k, v, layer.scores)
            x = layer.finish(x, attended.flatten(1), self._dtype)
        return x


class _Norm:
    """RMS norm in float32. torch's own is one kernel on a GPU and a dozen on a CPU; here it is five, two of them over
    all of x.
    """

    def __init__(self, module: Any, name: str, store: WeightStore) -> None:
        self.eps = float(module.variance_epsilon)
        self._weight: Tensor
        store.attach(Parameter(name, self._place))

    def _place(self, weight: Tensor) -> None:
        self._weight = weight.float()
        if weight.device.type == "cpu":
            self.array = self._weight.numpy()
        self._offset = self._weight.new_tensor(self.eps)

    def __call__(self, x: Tensor) -> Tensor:
        if x.is_cuda:
            return F.rms_norm(x, x.shape[-1:], self._weight, self.eps)
        length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        factor = torch.addcmul(self._offset, length, length, value=1.0 / x.shape[-1]).rsqrt_()
        return torch.mul(x, factor).mul_(self._weight)


class LlamaLayer:
    def __init__(self, module: Any, prefix: str, store: WeightStore, layout: Layout) -> None:
        attention = module.self_attn
        self.head_dim: int = attention.head_dim
        window = getattr(attention, "sliding_window", None)
        if attention.config.model_type == "mistral":
            window = attention.config.sliding_window
        self.scores = Scores(attention.scaling, window)
        self.size: int = attention.q_proj.in_features
        self.hidden: int = module.mlp.gate_proj.out_features
        self.heads = attention.q_proj.out_features // self.head_dim
        self.kv_heads = attention.k_proj.out_features // self.head_dim
        self.input_norm = _Norm(module.input_layernorm, prefix + "input_layernorm.weight", store)
        self.post_norm = _Norm(module.post_attention_layernorm, prefix + "post_attention_layernorm.weight", store)
        self.head_norms: tuple[_Norm, _Norm] | None = None
        if hasattr(attention, "q_norm"):
            self.head_norms = (
                _Norm(attention.q_norm, prefix + "self_attn.q_norm.weight", store),
                _Norm(attention.k_norm, prefix + "self_attn.k_norm.weight", store),
            )

        def linear(*names: str) -> Linear:
            modules = {name: module.get_submodule(name) for name in names}
            weights = [f"{prefix}{name}.weight" for name in names]
            biases = [f"{prefix}{name}.bias" for name, one in modules.items() if one.bias is not None]
            return store.linear(weights, biases, layout)

        self.qkv = linear("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
        self.out = linear("self_attn.o_proj")
        # Packed products come with the activation and the multiplication; others are better off as one.
        self.gate_up: Linear | None = None
        if layout == "packed":
            self.gate, self.up = linear("mlp.gate_proj"), linear("mlp.up_proj")
        else:
            self.gate_up = linear("mlp.gate_proj", "mlp.up_proj")
        self.down = linear("mlp.down_proj")

    def project(self, x: Tensor, cos: Tensor, sin: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        """Rotated queries and keys, and values, [T, heads, head dim]; cos, signed sin [T, 1, head dim]."""
        mixed = self.qkv(self.input_norm(x).to(dtype)).view(len(x), -1, self.head_dim)
        rotated, values = mixed[:, : -self.kv_heads], mixed[:, -self.kv_heads :]
        if self.head_norms is not None:
            queries, keys = rotated[:, : self.heads].float(), rotated[:, self.heads :].float()
            rotated = torch.cat((self.head_norms[0](queries), self.head_norms[1](keys)), 1).to(dtype)
        swapped = rotated.unflatten(2, (2, -1)).flip(2).flatten(2)
        rotated = torch.addcmul(rotated * cos, swapped, sin)
        return rotated[:, : self.heads], rotated[:, self.heads :], values

    def finish(self, x: Tensor, attended: Tensor, dtype: torch.dtype) -> Tensor:
        x = self.out.accumulate(attended, x)
        return self.down.accumulate(self.gated(self.post_norm(x).to(dtype)), x)

    def gated(self, normed: Tensor) -> Tensor:
        """silu(gate) * up, [T, hidden]."""
        if self.gate_up is None:
            return self.up.multiply(normed, self.gate.silu(normed))
        gate, up = self.gate_up(normed).chunk(2, -1)
        return F.silu(gate).mul_(up)


class GenericDecoder:
    """Any transformers causal LM whose attention goes through the AttentionInterface."""

    def __init__(self, model: PreTrainedModel, store: WeightStore, layout: Layout) -> None:
        self._model = model
        model.set_attn_implementation(SLOT_ATTENTION)
        self._seen = LastHidden(model)
        held = self._exchange_linears(model, store, layout)
        attach_parameters(model, store, held)

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

    def decode(self, token_ids: Tensor, positions: Tensor, step: DecodeStep | PrefillStep) -> Decoded:
        logits = self._call(token_ids, positions, step, torch.arange(len(token_ids), device=token_ids.device))
        return Decoded(logits, self._seen.take()[0])

    def score(self, token_ids: Tensor, positions: Tensor, step: PrefillStep) -> Decoded:
        return self.decode(token_ids, positions, step)

    def _call(self, token_ids: Tensor, positions: Tensor, step: DecodeStep | PrefillStep, keep: Tensor) -> Tensor:
        ids = token_ids.unsqueeze(0)
        output = self._model(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),  # without it transformers guesses where sequences begin
            position_ids=positions.unsqueeze(0),
            use_cache=False,
            logits_to_keep=keep,
            steersman_step=step,
        )
        return output.logits[0]
