"""From the configuration to an engine."""

from __future__ import annotations

import logging
import os
import signal
from pathlib import Path
from typing import Any

from services.policy.chat import ChatFormat
from services.policy.config import PolicyConfig
from services.policy.engine import Engine
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
    if config.engine == "tgi":
        from services.policy.engines.tgi import TgiEngine

        if config.engine_url is None:
            raise ConfigError("engineUrl is missing; set the address of the TGI server")
        return TgiEngine(config.engine_url, model_folder(config), name=config.model_name)
    options: dict[str, Any] = config.model_dump(
        include={"precision", "device", "threads", "max_context", "kv_cache_tokens"}
    )
    if config.engine == "transformers":
        from services.policy.engines.transformers_engine import TransformersEngine

        options |= config.model_dump(include={"prefix_tokens", "lookahead"})
        return TransformersEngine(model_folder(config), name=config.model_name, on_death=_stop_process, **options)
    try:
        from services.policy.engines.vllm_engine import VllmEngine
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"engine vllm is not in this installation ({error.name} is missing); use transformers"
        ) from None
    options |= config.vllm.model_dump()
    return VllmEngine(model_folder(config), name=config.model_name, on_death=_stop_process, **options)


def _check_heads(config: PolicyConfig) -> None:
    """Raises ConfigError where the engine would serve the language model alone, which is another policy."""
    from steersman.nn.ilql import has_heads

    if config.engine != "transformers" and has_heads(model_folder(config)):
        raise ConfigError(
            f"{config.model} has the Q and V heads of ILQL, which engine {config.engine} cannot sample with; "
            "use engine transformers"
        )


def _stop_process() -> None:
    """Ends the service as Kubernetes does, so that it is started again."""
    os.kill(os.getpid(), signal.SIGTERM)
