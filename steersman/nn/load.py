"""Loading models the same way in training and in every service: safetensors only, dropout off, no chatter."""

from __future__ import annotations

import logging
import os
import warnings
from pathlib import Path

import torch
import transformers
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from steersman.errors import ConfigError, NotFoundError
from steersman.nn.hardware import DTYPES


def quiet_libraries() -> None:
    """Turns off the progress bars and advice of the Hugging Face libraries, and everything that phones home."""
    for name in (
        "HF_HUB_DISABLE_TELEMETRY",
        "HF_HUB_DISABLE_PROGRESS_BARS",
        "DO_NOT_TRACK",
        "TRL_EXPERIMENTAL_SILENCE",
    ):
        os.environ.setdefault(name, "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    for name in ("trl", "peft", "accelerate", "datasets"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module=r"(transformers|trl|peft|accelerate|datasets|torch)\..*")


def has_safetensors(folder: Path) -> bool:
    return any(folder.glob("*.safetensors"))


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a folder; padding on the right."""
    quiet_libraries()
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="right")
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(f"{folder}: the tokenizer cannot be loaded ({_first_line(error)})") from None
    if tokenizer.pad_token_id is None:
        # Padded positions are masked by length everywhere, so any id does.
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_causal_lm(
    folder: Path,
    *,
    dtype: torch.dtype | str = torch.float32,
    device: str = "cpu",
    attention: str = "sdpa",
    quantization_config: object | None = None,
) -> PreTrainedModel:
    """A causal language model in evaluation mode with dropout off.

    Args:
        dtype: of the weights; `fp32`, `bf16` or a torch dtype.
        attention: name of a transformers attention function.
        quantization_config: for QLoRA.

    Raises:
        NotFoundError, ConfigError: the folder is not there, has no safetensors, or is damaged.
    """
    options = {} if quantization_config is None else {"quantization_config": quantization_config}
    model = _load(AutoModelForCausalLM, folder, dtype, attention, **options)
    return ready(model, device if quantization_config is None else None)


def ready(model: nn.Module, device: str | None) -> PreTrainedModel:
    """Moves to the device, switches dropout off for good and enters evaluation mode."""
    if device is not None:
        model.to(device)
    disable_dropout(model)
    return model.eval()  # type: ignore[return-value]


def disable_dropout(model: nn.Module) -> None:
    """Sets every dropout probability to 0, so that training mode computes the same function as evaluation mode."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name in ("attention_dropout", "dropout_prob", "dropout"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)


def _load(auto: type, folder: Path, dtype: torch.dtype | str, attention: str, **options: object) -> nn.Module:
    quiet_libraries()
    if not folder.is_dir():
        raise NotFoundError(f"{folder}: there is no such model folder; check the path or run the stage that writes it")
    if not has_safetensors(folder):
        raise ConfigError(f"{folder}: no *.safetensors; pickled weights are not loaded, convert them to safetensors")
    kind = DTYPES[dtype] if isinstance(dtype, str) else dtype
    try:
        config = AutoConfig.from_pretrained(folder)
        return auto.from_pretrained(  # type: ignore[attr-defined]
            folder, config=config, dtype=kind, attn_implementation=attention, use_safetensors=True, **options
        )
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise ConfigError(f"{folder}: the model cannot be loaded ({_first_line(error)})") from error


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]
