"""Adapters in PEFT format: attach, save, load, and merge into a plain folder that transformers and vLLM load."""

from __future__ import annotations

import functools
import gc
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from peft import LoraConfig, PeftConfig, PeftModel, TaskType, get_peft_model, get_peft_model_state_dict
from peft.tuners.lora import Linear as LoraLinear
from safetensors import safe_open
from torch import Tensor, nn
from transformers import (
    AutoModelForSequenceClassification,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from steersman.artifacts import atomic_dir
from steersman.errors import ConfigError
from steersman.nn.encoder_decoder import is_encoder_decoder, language_model_class
from steersman.nn.fused_lora import fuse_lora
from steersman.nn.ilql import HeadTensors, read_heads, write_heads
from steersman.nn.load import load_causal_lm, load_classifier, load_tokenizer
from steersman.nn.parity import SameConfig
from steersman.nn.tiny import tiny_model

if TYPE_CHECKING:
    from steersman.config.manifest import Lora

MERGE_TOLERANCE = 1e-3
"""Of logits, relative to the largest one: rounding in fp32 stays a hundred times below."""
_HEADS = ("score", "classifier")
_MAMBAS = ("falcon_h1", "falcon_mamba", "mamba", "mamba2", "nemotron_h")
"""Families whose fused kernels read the weight of `out_proj`; PEFT refuses an adapter there."""


def attach_lora(model: nn.Module, lora: Lora) -> PeftModel:
    """Wraps a model so that only adapters are trained (LoRA, DoRA; QLoRA where the model is loaded in 4 bits).

    A classification head is new, so it is trained whole. Everything starts as the identity.

    Raises:
        ConfigError: target modules that the model lacks or whose weights it reads itself, or tied embeddings as target.
    """
    heads = [name for name in _HEADS if any(True for _ in getattr(model, name, nn.Identity()).parameters())]
    causal = not heads and getattr(model, "get_output_embeddings", lambda: None)() is not None
    misread = _misread_layers(model, classifies=bool(heads))
    writes = TaskType.SEQ_2_SEQ_LM if is_encoder_decoder(getattr(model, "config", None)) else TaskType.CAUSAL_LM
    config = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,  # type: ignore[arg-type]
        lora_dropout=lora.dropout,
        target_modules=lora.target_modules,
        exclude_modules=[*_special_layers(model), *misread] or None if lora.target_modules == "all-linear" else None,
        use_dora=lora.use_dora,
        modules_to_save=heads or None,
        task_type=TaskType.SEQ_CLS if heads else writes if causal else None,
    )
    try:
        wrapped = get_peft_model(model, config)
    except ValueError as error:
        raise ConfigError(f"lora.targetModules {lora.target_modules!r} does not fit the model ({error})") from None
    _refuse_tied_targets(wrapped)
    _refuse_misread_targets(wrapped, misread)
    fuse_lora(wrapped)
    return wrapped


def round_frozen_products(model: nn.Module) -> None:
    """Keeps the frozen weights below plain LoRA layers in bf16, in place, for products that run in bf16.

    Autocast would round them to the same numbers at every pass; this way they take half the memory.
    """
    for module in model.modules():
        if type(module) is LoraLinear and not module.lora_variant and type(module.base_layer) is nn.Linear:
            weight = module.base_layer.weight
            if not weight.requires_grad:
                weight.data = weight.data.to(torch.bfloat16)


def _special_layers(model: nn.Module) -> list[str]:
    """Layers that are linear by inheritance only, such as Llama 4's router, which gives two results; Falcon's compute
    what a linear layer does."""
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
        and type(module).__module__.startswith("transformers.models.")
        and type(module).forward is not nn.Linear.forward
        and not _computes_a_product(module)
    ]


@torch.no_grad()
def _computes_a_product(layer: nn.Linear) -> bool:
    x = torch.linspace(-1, 1, 2 * layer.in_features, device=layer.weight.device, dtype=layer.weight.dtype).view(2, -1)
    try:
        found = layer(x)
    except Exception:  # whatever its own code says of two rows
        return False
    wanted = nn.functional.linear(x, layer.weight, layer.bias)
    return isinstance(found, Tensor) and found.shape == wanted.shape and torch.allclose(found, wanted, 1e-2, 1e-3)


def _misread_layers(model: nn.Module, *, classifies: bool) -> tuple[str, ...]:
    """The last two parts of the names of linear layers whose weight the model reads without calling the layer, such as
    `mamba.dt_proj` and a router's `classifier`: an adapter there would do nothing until it is merged."""
    if not isinstance(model, PreTrainedModel):
        return ()
    fused = ("mixer.out_proj", "mamba.out_proj") if model.config.model_type in _MAMBAS else ()
    return _misread(SameConfig(model.config), classifies) + fused


@functools.lru_cache(maxsize=64)
def _misread(same: SameConfig, classifies: bool) -> tuple[str, ...]:
    """Found by computing, on a small random model: a weight has a gradient, and its layer was not called. Draws no
    random number of the caller's."""
    try:
        small = tiny_model(
            AutoModelForSequenceClassification if classifies else language_model_class(same.config), same.config
        )
    except ConfigError:
        return ()  # no small model can be built; merging compares once more
    linear = {name: module for name, module in small.named_modules() if isinstance(module, nn.Linear)}
    called: set[str] = set()
    for name, module in linear.items():
        module.register_forward_hook(lambda layer, given, result, name=name: called.add(name))
    with torch.inference_mode(False), torch.enable_grad():
        _example_outputs(small).float().square().sum().backward()
    read = [name for name, module in linear.items() if name not in called and module.weight.grad is not None]
    return tuple(sorted({".".join(name.split(".")[-2:]) for name in read}))


def load_adapter(model: nn.Module, adapter: Path, *, trainable: bool = False) -> PeftModel:
    """Puts a saved adapter on its base model; `trainable` to go on training it.

    Raises:
        ConfigError: no adapter folder, or an adapter of a model of another shape.
    """
    check_adapter_folder(adapter)
    try:
        wrapped = PeftModel.from_pretrained(model, adapter, is_trainable=trainable)
        _restore(wrapped, adapter)
        return wrapped
    except (RuntimeError, ValueError) as error:  # sizes that differ; modules that the model does not have
        made_for = PeftConfig.from_pretrained(str(adapter)).base_model_name_or_path
        reason = " ".join(str(error).split())[:200]
        raise ConfigError(
            f"{adapter}: the adapter does not fit this base model ({reason}); it was made for {made_for or 'another'}"
        ) from None


@torch.no_grad()
def _restore(model: PeftModel, adapter: Path) -> None:
    """Sets every value of the file that has not arrived.

    PEFT renames what it loads as transformers renames a family's published checkpoints, also where the file has the
    model's own names, and says nothing of what then finds no place. A file with other names is left to PEFT.
    """
    own = get_peft_model_state_dict(model)
    with safe_open(adapter / "adapter_model.safetensors", "pt") as tensors:
        given = set(tensors.keys())
        if given.issuperset(own):
            for name, value in own.items():
                value.copy_(tensors.get_tensor(name))
            if given != own.keys():
                raise ValueError(f"it has no place for {min(given - own.keys())}")


def save_adapter(
    model: PeftModel, folder: Path, tokenizer: PreTrainedTokenizerBase | None = None, heads: HeadTensors | None = None
) -> None:
    """Writes adapter weights (safetensors) and config, a tokenizer that differs from the base's, and the heads of ILQL
    where there are some, atomically."""
    with atomic_dir(folder) as partial:
        model.save_pretrained(str(partial), save_embedding_layers=False)
        if heads:
            write_heads(partial, heads)
        if tokenizer is not None:
            tokenizer.save_pretrained(partial)
        (partial / "README.md").unlink(missing_ok=True)


def merge_to_folder(base: Path, adapter: Path, folder: Path, *, stop_ids: Sequence[int] = ()) -> None:
    """Writes base plus adapter as a plain fp32 model folder with its tokenizer, and with the adapter's ILQL heads.

    Merging starts from the base folder rather than from the trained module, so that a model trained in 4 bits merges
    into the original weights.

    Args:
        stop_ids: ids that end an answer, for the generation config; empty: as in the base.
    """
    check_adapter_folder(adapter)
    config = PeftConfig.from_pretrained(str(adapter))
    tokenizer = load_tokenizer(adapter if (adapter / "tokenizer_config.json").is_file() else base)
    if config.task_type == TaskType.SEQ_CLS:
        model = load_classifier(base, num_labels=_outputs_of(adapter))
        model.config.pad_token_id = tokenizer.pad_token_id
    else:
        model = load_causal_lm(base)
    wrapped = load_adapter(model, adapter)
    _refuse_tied_targets(wrapped)
    adapted = _example_logits(wrapped)
    merged = wrapped.merge_and_unload(safe_merge=True)
    _check_same(adapted, _example_logits(merged), adapter)
    save_model(merged, tokenizer, folder, stop_ids, read_heads(adapter))
    del model, wrapped, merged
    gc.collect()


@torch.no_grad()
def _example_logits(model: Any) -> Tensor:
    return _example_outputs(model).float()


def _example_outputs(model: Any) -> Tensor:
    text = model.config.get_text_config()
    ids = torch.arange(3, 19, device=next(model.parameters()).device)[None] % text.vocab_size
    options: dict[str, Any] = {"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}
    if hasattr(text, "use_cache"):
        options["use_cache"] = False
    logits: Tensor = model(input_ids=ids, attention_mask=torch.ones_like(ids), **options).logits
    return logits


def _check_same(adapted: Tensor, merged: Tensor, adapter: Path) -> None:
    """ConfigError where merging gives another model: one that reads an adapted weight past its layer (Mamba's)."""
    difference, size = float((adapted - merged).abs().max()), float(adapted.abs().max())
    if not difference <= MERGE_TOLERANCE * max(1.0, size):
        raise ConfigError(
            f"{adapter}: merged into its base model the adapter computes something else (logits differ by "
            f"{difference:.2g}): the model reads a weight that the adapter changes past its layer; name "
            "lora.targetModules without it and train again"
        )


def save_model(
    model: PreTrainedModel,
    tokenizer: Any,
    folder: Path,
    stop_ids: Sequence[int] = (),
    heads: HeadTensors | None = None,
) -> None:
    """Writes a plain model folder (safetensors, config, generation config, tokenizer, and the heads of ILQL where there
    are some), whole or not at all."""
    if stop_ids and getattr(model, "generation_config", None) is not None:
        model.generation_config.eos_token_id = list(stop_ids)
    with atomic_dir(folder) as partial:
        model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        if heads:
            write_heads(partial, heads)


def quantization(lora: Lora | None, device: str) -> object | None:
    """The 4-bit loading of QLoRA (Dettmers et al. 2023), or None.

    Raises:
        ConfigError: no CUDA device, or bitsandbytes is not installed.
    """
    if lora is None or lora.quantize is None:
        return None
    if device != "cuda":
        raise ConfigError("lora.quantize needs a CUDA device; remove it to train LoRA on a CPU")
    try:
        import bitsandbytes  # noqa: F401
    except ImportError:
        raise ConfigError("lora.quantize needs bitsandbytes; pip install bitsandbytes, or remove it") from None
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )


def check_adapter_folder(folder: Path) -> None:
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        if not (folder / name).is_file():
            raise ConfigError(f"{folder}: {name} is missing; an adapter folder in PEFT format has it")


def _outputs_of(adapter: Path) -> int:
    """Outputs of the classification head that an adapter folder carries."""
    with safe_open(adapter / "adapter_model.safetensors", "pt") as tensors:
        heads = [name for name in tensors.keys() if name.endswith(("score.weight", "out_proj.weight"))]  # noqa: SIM118 - not a dict
        if not heads:
            raise ConfigError(f"{adapter}: the adapter of a classifier has no head; train it with modules_to_save")
        return int(tensors.get_slice(heads[0]).get_shape()[0])


def _refuse_misread_targets(model: PeftModel, misread: Sequence[str]) -> None:
    for name, module in model.named_modules():
        if hasattr(module, "lora_A") and name.endswith(tuple(misread)):
            raise ConfigError(
                f"lora.targetModules names {name.split('.')[-1]}, whose weight {type(model.get_base_model()).__name__} "
                "reads itself, so that an adapter there would do nothing; leave it out"
            )


def _refuse_tied_targets(model: PeftModel) -> None:
    """An adapter on a matrix that serves as embedding and head would, merged, change the other use as well."""
    base: Any = model.get_base_model()
    embedding, head = base.get_input_embeddings(), getattr(base, "get_output_embeddings", lambda: None)()
    if head is None or head.weight is not embedding.weight:
        return
    if any(hasattr(module, "lora_A") or hasattr(module, "lora_embedding_A") for module in (embedding, head)):
        raise ConfigError(
            "lora.targetModules names the embedding or the LM head, which share their weights in this model; leave "
            "them out"
        )
