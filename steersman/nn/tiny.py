"""A small random model of the same architecture: every layer kind is kept, everything else is cut.

What a model of billions of parameters computes can be checked in a second on a model with the same code and the same
configuration class: fewer layers (but every kind of them), fewer and narrower heads, few experts, a small vocabulary.
Windows, chunks and the length behind which long-context rotations change become so short that a row of some dozen
tokens goes past them.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForSequenceClassification, PreTrainedConfig, PreTrainedModel

from steersman.errors import ConfigError
from steersman.nn.encoder_decoder import is_encoder_decoder

VOCABULARY = 96
WINDOW = 8
"""Tokens of a window or chunk."""
_LOWER_CAPS = (
    (re.compile(r"^att(ention|n)_.*soft_?cap(ping)?$"), 20.0),
    (re.compile(r"^.*soft_?cap(ping)?$"), 5.0),
    (re.compile(r"^(.*(swiglu|activation)_limit|clip_qkv)$"), 1.5),
)
"""Of attention, logits, activations: small models would not come near the real ones. Some kernels of attention cap what
is masked already, so that e^-cap of it comes through: nothing in the real model, nor here."""
LENGTH = 16
"""Tokens behind which a rotation that depends on the length changes."""
MOST_LAYERS = 8
_MOST_PARAMETERS = 60_000_000

_HEADS = ("num_attention_heads", "n_head", "n_heads", "decoder_attention_heads", "num_heads", "encoder_attention_heads")
_KEY_HEADS = ("num_key_value_heads", "num_kv_heads", "n_head_kv", "multi_query_group_num", "num_query_groups")
_COUNTS = re.compile(
    r"^(swa_)?(num_|n_)?(attention_heads|attn_heads|key_value_heads|kv_heads|heads?|query_groups|head_kv|head)$"
    r"|^(en|de)coder_attention_heads$|^mamba_(n|num)_heads$|^n_mamba_heads$|^linear_num_((key|value)_)?heads$"
    r"|^(global_)?num_(global_)?(attention|key_value)_heads$|^index_n_heads$|^num_heads$"
)
_WIDTHS = re.compile(
    r"^(hidden_size|d_model|n_embd|dim|d_ff|n_inner|ffn_dim|ffn_hidden_size|(en|de)coder_ffn_dim|word_embed_proj_dim"
    r"|.*intermediate_size(_mlp)?|moe_latent_size|attention_hidden_size|mamba_d_ssm|mamba_dt_rank|time_step_rank"
    r"|lru_width|hidden_dim|embed_dim|embedding_size|attn_hidden_size|dim_model_base|swa_hidden_size|dim_ff"
    r"|hidden_size_per_layer_input|pooler_hidden_size|block_dim|emb_dim|moe_ffn_hidden_size|expert_ffn_hidden_size)$"
)
_HIDDEN = re.compile(r"^(hidden_size|d_model|n_embd|dim|word_embed_proj_dim)$")
"""What the heads' width follows from where a configuration does not name it."""
_HEAD_WIDTHS = re.compile(
    r"^((global_|swa_|v_|qk_|attention_)?head_dim|kv_channels|qk_(nope|rope)_head_dim|linear_((key|value)_)?head_dim|index_head_dim"
    r"|mamba_d_head|mamba_head_?dim|rotary_dim|d_kv|dim_head|swa_v_head_dim|qk_head_dim)$"
)
_LAYERS = re.compile(r"^(num_hidden_layers|n_layers?|num_layers|decoder_layers|encoder_layers|num_decoder_layers)$")
_EXPERTS = re.compile(r"^(num_(local_|routed_)?experts|n_routed_experts|moe_num_experts|num_experts_per_layer)$")
_CHOSEN = re.compile(
    r"^(num_experts_per_tok(en)?|moe_k|moe_topk|top_k_experts|num_selected_experts|moe_top_k|topk_group)$"
)
_WINDOWS = re.compile(
    r"^(sliding_window(_size)?|attention_chunk_size|window_size|local_attention|attention_window_size|floor_scale)$"
)
_CHUNKS = re.compile(r"^((mamba_)?chunk_size|ssm_chunk_size)$")
"""Of the recurrence: how much is computed at once, which changes no number."""
_PERIOD = re.compile(r".*(_period|_offset|_interval|_pattern|_step|_replace|_frequency|every_n.*)$")
_LENGTHS = ("max_position_embeddings", "n_positions", "max_seq_len", "n_ctx", "max_sequence_length")
_TOKENS = re.compile(r".*_token_(id|index)$")
_PER_LAYER = ("layer_types", "layers_block_type", "mlp_layer_types", "no_rope_layers")
_SIZES = ((8, 2), (4, 2), (2, 2), (1, 2), (1, 4), (1, 8), (8, 1))
"""How much narrower, with how many key heads: smaller ones first."""
CHANGING_ROTATIONS = ("longrope", "dynamic")
"""Rotations that depend on the longest position of a forward pass."""


def tiny_model(auto: Any, config: PreTrainedConfig, *, seed: int = 0, whole_heads: bool = False) -> PreTrainedModel:
    """A random fp32 model on the CPU, in evaluation mode; the same arguments give the same weights.

    Args:
        auto: transformers' auto class, for example `AutoModelForCausalLM`.
        config: of the real model; it is not changed.
        whole_heads: heads are as wide as the real ones, other widths multiples of 64, for kernels that know certain
            widths.

    Raises:
        ConfigError: none of the smaller models can be built or run; the last reason is named.
    """
    if auto is AutoModelForSequenceClassification and type(config) not in auto._model_mapping:
        raise ConfigError(
            f"transformers has no sequence classifier for {type(config).__name__}; train the reward model from another "
            "base (rewardModel.base)"
        )
    problem: Exception | None = None
    for narrower, heads in _SIZES:
        try:
            small = tiny_config(config, narrower, heads, whole_heads=whole_heads)
            with torch.device("meta"):
                parameters = sum(one.numel() for one in auto.from_config(small).parameters())
            if parameters > _MOST_PARAMETERS:
                raise ValueError(f"{parameters:,} parameters are left")
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                model: PreTrainedModel = auto.from_config(copy.deepcopy(small), dtype=torch.float32)
                stir(model)
            model.eval().requires_grad_(True)
            options: dict[str, Any] = {"use_cache": False} if hasattr(small.get_text_config(), "use_cache") else {}
            ids = torch.arange(5, 10)[None]
            if is_encoder_decoder(config):
                options["decoder_input_ids"] = ids
            with torch.no_grad():
                logits = model(input_ids=ids, **options).logits
            if not logits.isfinite().all():
                raise ValueError("its outputs are not finite")
            return model
        except Exception as error:  # whatever a model's code raises for sizes it does not take
            problem = error
    raise ConfigError(
        f"{type(config).__name__}: no small model of this configuration can be built to check it "
        f"({type(problem).__name__}: {(str(problem).splitlines() or [''])[0][:160]})"
    ) from problem


def tiny_config(
    config: PreTrainedConfig, narrower: int = 8, heads: int = 2, *, whole_heads: bool = False
) -> PreTrainedConfig:
    """The configuration of a small model with so many key heads, so much narrower than the real ones."""
    small = copy.deepcopy(config)
    for part in _parts(small):
        _shrink(part, narrower, heads, whole_heads)
    text = small.get_text_config(decoder=True)
    for part in _parts(small):
        for name in list(part.__dict__):
            if _TOKENS.fullmatch(name):
                setattr(part, name, _small_tokens(name, getattr(part, name), text.vocab_size))
    if getattr(small, "quantization_config", None) is not None:
        del small.quantization_config
    return small


@torch.no_grad()
def stir(model: nn.Module) -> None:
    """Weights of a size at which attention, routing and recurrence matter; a fresh model is nearly linear."""
    for name, one in model.named_parameters():
        if one.dim() < 2:
            one.add_(0.1 * torch.randn_like(one))
        elif "A_log" not in name:
            one.normal_(std=one.shape[-1] ** -0.5 if one.shape[-1] > 4 else 0.5)


def _parts(config: PreTrainedConfig) -> Iterator[PreTrainedConfig]:
    yield config
    for value in list(config.__dict__.values()):
        if isinstance(value, PreTrainedConfig):
            yield from _parts(value)


def _first(config: PreTrainedConfig, names: tuple[str, ...]) -> int | None:
    found = (getattr(config, name, None) for name in names)
    return next((value for value in found if isinstance(value, int) and value > 0), None)


def _shrink(config: PreTrainedConfig, narrower: int, left: int, whole_heads: bool) -> None:
    step, least = (64, 64) if whole_heads else (1, 8)  # what kernels want of widths
    derived = not any(_HEAD_WIDTHS.fullmatch(name) and value for name, value in config.__dict__.items())
    heads = _first(config, _HEADS) or 1
    key_heads = _first(config, _KEY_HEADS) or heads
    # Two key heads stay where there are several, so that their order counts.
    fewer = max(1, (key_heads if 1 < key_heads < heads else heads) // left)
    if heads % fewer:
        fewer = 1
    changes: list[tuple[re.Pattern[str], Callable[[int], int]]] = [
        (_COUNTS, lambda value: max(1, value // fewer)),
        (_WIDTHS, lambda value: max(least, value // (fewer * narrower * step) * step)),
        (_HEAD_WIDTHS, lambda value: value if whole_heads else max(2, value // narrower)),
        (_EXPERTS, lambda value: min(value, _experts(config))),
        (_CHOSEN, lambda value: min(value, 2)),
        (_WINDOWS, lambda value: min(value, WINDOW)),
        (_CHUNKS, lambda value: min(value, 2 * WINDOW)),
        *([(_HIDDEN, lambda value: value // fewer)] if whole_heads and derived else []),
    ]
    total, layers = _first(config, _layer_names(config)), _layers(config)
    for name, value in list(config.__dict__.items()):
        if name in ("vocab_size", "vocab_size_per_layer_input") and isinstance(value, int):
            setattr(config, name, min(value, VOCABULARY))
        elif _LAYERS.fullmatch(name) and isinstance(value, int):
            setattr(config, name, min(value, layers))
        elif isinstance(value, (int, float)) and value > 0 and (cap := _lower_cap(name, whole_heads)):
            setattr(config, name, min(value, cap))
        elif isinstance(value, int) and not isinstance(value, bool):
            change = next((one for pattern, one in reversed(changes) if pattern.fullmatch(name)), None)
            if change is not None and value > 0:
                setattr(config, name, change(value))
        elif isinstance(value, list) and len(value) > layers and len(value) == total:
            setattr(config, name, value[:layers])
        elif isinstance(value, list) and name.endswith(("_layers", "_idxs", "_ids")) and name not in _PER_LAYER:
            if all(isinstance(one, int) for one in value):
                setattr(config, name, [one for one in value if one < layers])
    _shorten(config, 1 if whole_heads else narrower)


def _lower_cap(name: str, foreign: bool) -> float | None:
    """`foreign`: for another library's code, which has the limit of activations written into it (vLLM's gpt-oss)."""
    caps = _LOWER_CAPS[:-1] if foreign else _LOWER_CAPS
    return next((cap for pattern, cap in caps if pattern.fullmatch(name)), None)


def _layer_names(config: PreTrainedConfig) -> tuple[str, ...]:
    return tuple(name for name in config.__dict__ if _LAYERS.fullmatch(name))


def _layers(config: PreTrainedConfig) -> int:
    """The first so many layers have every kind."""
    total = _first(config, _layer_names(config)) or 2
    kinds = list(zip(*(value for value in _lists(config, total)), strict=True)) if any(_lists(config, total)) else []
    needed = 2
    if kinds:
        needed = max(kinds.index(kind) for kind in kinds) + 1
    elif any(_PERIOD.fullmatch(name) and value for name, value in config.__dict__.items()):
        needed = MOST_LAYERS
    return min(total, max(2, min(needed, MOST_LAYERS + 4)))


def _lists(config: PreTrainedConfig, total: int) -> list[list[Any]]:
    values = config.__dict__.values()
    return [[str(one) for one in value] for value in values if isinstance(value, list) and len(value) == total]


def _experts(config: PreTrainedConfig) -> int:
    groups = getattr(config, "n_group", None) or 1
    return 4 if groups == 1 else 2 * groups


def _shorten(config: PreTrainedConfig, narrower: int) -> None:
    """Positions: learned ones few, rotations that change with the length early, factors by the heads' width."""
    rotations = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    changing = False
    for one in (rotations, *(value for value in rotations.values() if isinstance(value, dict))):
        for name in ("short_factor", "long_factor"):
            if isinstance(one.get(name), list):
                one[name] = one[name][: max(1, len(one[name]) // narrower)]
        if isinstance(one.get("mrope_section"), list):
            one["mrope_section"] = [max(1, size // narrower) for size in one["mrope_section"]]
        if one.get("rope_type") in CHANGING_ROTATIONS:
            changing = True
            if "original_max_position_embeddings" in one:
                one["original_max_position_embeddings"] = LENGTH
    for name in _LENGTHS:
        value = getattr(config, name, None)
        if not isinstance(value, int):
            continue
        if changing:
            original = getattr(config, "original_max_position_embeddings", None)
            setattr(config, name, LENGTH * max(1, value // original) if original else LENGTH)
        else:
            setattr(config, name, min(value, 512))
    if changing and getattr(config, "original_max_position_embeddings", None):
        config.original_max_position_embeddings = LENGTH


def _small_tokens(name: str, value: Any, vocabulary: int) -> Any:
    """Ids below the small vocabulary, and none that the check's rows hold."""
    if isinstance(value, list):
        return [index % 3 for index, _ in enumerate(value)][:3]
    if not isinstance(value, int) or value < 0:
        return value
    return {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}.get(name, vocabulary - 1)
