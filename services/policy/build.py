"""From the configuration to an engine."""

from __future__ import annotations

import logging
import os
import signal
from pathlib import Path

from services.policy.chat import ChatFormat
from services.policy.config import PolicyConfig
from services.policy.engine import Engine
from services.policy.engine_kinds import ENGINES, EngineOptions, Served
from steersman.errors import ConfigError

log = logging.getLogger("steersman.policy")


def model_folder(config: PolicyConfig) -> Path:
    """The model's folder; the embedded default is unpacked when it is not there yet."""
    from steersman.nn.prepare import resolve_model

    return resolve_model(config.model, config.cache_dir, note=log.info)


def load_chat_format(config: PolicyConfig) -> ChatFormat:
    """The tokenizer of the served model."""
    from steersman.nn.load import load_tokenizer
    from steersman.nn.tokens import generation_config_of, stop_ids, tokenizer_fingerprint

    folder = model_folder(config)
    tokenizer = load_tokenizer(folder, config.template_options)
    stops = stop_ids(tokenizer, generation_config_of(folder)) if tokenizer.chat_template else ()
    chat = ChatFormat(tokenizer, tokenizer_fingerprint(tokenizer), stops)
    if tokenizer.chat_template:
        chat.family()  # now, and not while the first caller waits
    return chat


def build_engine(config: PolicyConfig) -> Engine:
    """The engine that the configuration names; its libraries are imported here and not before."""
    _check_heads(config)
    kind = ENGINES[config.engine]
    options: EngineOptions = getattr(config, config.engine, None) or kind()
    compute = config.model_dump(include={"precision", "device", "threads", "max_context", "kv_cache_tokens"})
    return options.build(Served(model_folder(config), config.model_name, compute, _stop_process))


def _check_heads(config: PolicyConfig) -> None:
    """Raises ConfigError where the engine would serve the language model alone, which is another policy."""
    from steersman.nn.ilql import has_heads

    if not ENGINES[config.engine].holds_heads and has_heads(model_folder(config)):
        raise ConfigError(
            f"{config.model} has the Q and V heads of ILQL, which engine {config.engine} cannot sample with; "
            "use engine transformers"
        )


def _stop_process() -> None:
    """Ends the service as Kubernetes does, so that it is started again."""
    os.kill(os.getpid(), signal.SIGTERM)
