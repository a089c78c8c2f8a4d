"""Encoder-decoders (T5 and its family) in the terms of everything else: a prompt, and an answer behind it.

The prompt goes to the encoder, and the decoder begins with its start token, so the state at that token predicts
the first token of the answer. The states are given where a decoder-only model has them, in the packed row of
`packed.PackedBatch`:

    packed row      [prompt ...... p][y_1][y_2] ...
    state           [0 ... 0, start  ][y_1][y_2] ...   the decoder's; start predicts y_1

So training, services and critics need not know the difference. Prompts and answers are padded, which attention masks
make exact; a prompt is encoded once for all its answers.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, PreTrainedConfig

from steersman.errors import ConfigError
from steersman.nn.packed import PackedBatch

TEXT_TO_TEXT = (
    "{%- set asked = messages[:-1] if messages[-1].role == 'assistant' and not add_generation_prompt else messages -%}"
    "{%- for message in asked -%}"
    "{%- if asked|length > 1 -%}{{- message.role + ': ' -}}{%- endif -%}{{- message.content -}}"
    "{%- if not loop.last -%}{{- ' ' -}}{%- endif -%}"
    "{%- endfor -%}{{- eos_token -}}"
    "{%- if asked|length < messages|length -%}{{- messages[-1].content + eos_token -}}{%- endif -%}"
)
"""The chat template of an encoder-decoder whose tokenizer brings none: a single turn is the text as it is, a longer
conversation its turns as `role: content`; prompt and answer end with the end token, as T5 was trained."""


def is_encoder_decoder(config: PreTrainedConfig | None) -> bool:
    return bool(getattr(config, "is_encoder_decoder", False))


def folder_is_encoder_decoder(folder: Path) -> bool:
    """Whether a model folder's configuration says so; False where there is none."""
    try:
        return bool(json.loads((folder / "config.json").read_bytes()).get("is_encoder_decoder", False))
    except (OSError, ValueError):
        return False


def refuse_encoder_decoder(config: PreTrainedConfig, what: str) -> None:
    """Raises ConfigError, a sentence that begins with `what`."""
    if is_encoder_decoder(config):
        raise ConfigError(
            f"{what}, and {config.model_type} is an encoder-decoder; these go through sft, rl and rejectionSampling"
        )


def language_model_class(config: PreTrainedConfig) -> Any:
    """transformers' auto class of models that write text."""
    return AutoModelForSeq2SeqLM if is_encoder_decoder(config) else AutoModelForCausalLM


def start_token(model: Any) -> int:
    """The token that every answer's decoder begins with.

    Raises:
        ConfigError: neither configuration names one.
    """
    for config in (model.config, getattr(model, "generation_config", None)):
        found = getattr(config, "decoder_start_token_id", None)
        if found is not None:
            return int(found)
    raise ConfigError(f"{type(model).__name__}: config.json names no decoder_start_token_id; T5 has its pad_token_id")


def answer_logits(model: Any, prompt: Tensor, answer: Tensor) -> Tensor:
    """Logits [R, V] that predict the tokens of an answer int64 [R] behind a prompt int64 [P]: the model's own code on
    this one row, decoder-only or not."""
    if is_encoder_decoder(model.config):
        begun = torch.cat([answer.new_full((1,), start_token(model)), answer])
        logits: Tensor = model(input_ids=prompt[None], decoder_input_ids=begun[None], use_cache=False).logits[0]
        return logits[: len(answer)]
    logits = model(input_ids=torch.cat([prompt, answer])[None], use_cache=False).logits[0]
    return logits[len(prompt) - 1 : len(prompt) - 1 + len(answer)]


def hidden_states(model: Any, batch: PackedBatch) -> Tensor:
    """[T, hidden] in the order of the packed row, see above; `model` is not PEFT-wrapped."""
    layout, ids = batch.layout, batch.token_ids
    lengths = (~layout.prompts.padding).sum(1)
    prompts = ids[: layout.prompt_tokens].split(lengths.tolist())
    asked = pad_sequence(list(prompts), batch_first=True)
    mask = (torch.arange(asked.shape[1], device=ids.device) < lengths[:, None]).long()
    encoded = model.get_encoder()(input_ids=asked, attention_mask=mask).last_hidden_state

    sizes = batch.lengths.tolist()
    group = layout.group.tolist()
    alone = sorted(set(range(len(prompts))).difference(group))
    group += alone
    sizes += [0] * len(alone)
    begin = ids.new_full((1,), start_token(model))
    answers = [torch.cat([begin, one]) for one in ids[layout.prompt_tokens :].split(sizes)]
    members = torch.tensor(group, device=ids.device)
    states = model.get_decoder()(
        input_ids=pad_sequence(answers, batch_first=True),
        encoder_hidden_states=encoded[members],
        encoder_attention_mask=mask[members],
        use_cache=False,
    ).last_hidden_state

    firsts = [group.index(number) for number in range(len(prompts))]
    starts = lengths.cumsum(0) - 1
    own = torch.cat([states[row, 1 : 1 + size] for row, size in enumerate(sizes)])
    found = states.new_zeros(len(ids), states.shape[-1])
    found = found.index_copy(0, starts, states[torch.tensor(firsts, device=ids.device), 0])
    return torch.cat([found[: layout.prompt_tokens], own])


def collated(rows: Sequence[dict[str, list[int]]], model: nn.Module, ignore: int) -> dict[str, Tensor]:
    """A padded batch of rows `input_ids` (prompt) and `labels` (answer), with what the decoder reads."""
    prompts = [torch.tensor(row["input_ids"]) for row in rows]
    answers = [torch.tensor(row["labels"]) for row in rows]
    begin = torch.tensor([start_token(model)])
    return {
        "input_ids": pad_sequence(prompts, batch_first=True),
        "attention_mask": pad_sequence([torch.ones_like(one) for one in prompts], batch_first=True),
        "decoder_input_ids": pad_sequence([torch.cat([begin, one[:-1]]) for one in answers], batch_first=True),
        "labels": pad_sequence(answers, batch_first=True, padding_value=ignore),
    }
