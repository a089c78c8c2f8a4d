"""What of a conversation is trained, and where an answer ends: the same for training and for every service.

Three rules keep what is trained equal to what is served:
- A prompt is what the chat template renders with its generation prompt; an answer is the rest of the rendered turn up
  to and including the token that ends it, as ids behind the prompt's ids (see `steersman.nn.render`).
- What a template writes behind the end of the turn (a line end, mostly) belongs to the next prompt, never to an answer.
- Nothing is inferred from the pad token, which may be the same as the end token.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import GenerationConfig, PreTrainedTokenizerBase

from steersman.errors import ConfigError
from steersman.nn.render import (
    Messages,
    Tools,
    closing_ids,
    conversation_ids,
    plain_message,
    prompt_ids,
    text_ids,
    turn_ids,
)

__all__ = [
    "IGNORE",
    "LabelledTokens",
    "Messages",
    "answer_ids",
    "conversation_parts",
    "distinct_pad_token",
    "generation_config_of",
    "label_conversation",
    "prompt_and_answer_ids",
    "prompt_ids",
    "stop_ids",
    "tokenizer_fingerprint",
]

IGNORE = -100
"""Label of a position that carries no loss, as in torch and transformers."""


@dataclass(frozen=True, slots=True)
class LabelledTokens:
    """A conversation for supervised training; `labels[t]` is `token_ids[t]` where it is trained, else -100."""

    token_ids: list[int]
    labels: list[int]


def answer_ids(
    tokenizer: PreTrainedTokenizerBase,
    prompt: Messages,
    answer: Mapping[str, Any],
    stop_ids: Sequence[int],
    tools: Tools = None,
) -> list[int]:
    """Token ids of an answer to `prompt`, ending with one of `stop_ids`.

    Raises:
        DataError: the template does not render prompt plus answer as a continuation of the prompt.
        ConfigError: the template does not end a turn with a stop token.
    """
    return prompt_and_answer_ids(tokenizer, prompt, answer, stop_ids, tools)[1]


def prompt_and_answer_ids(
    tokenizer: PreTrainedTokenizerBase,
    prompt: Messages,
    answer: Mapping[str, Any],
    stop_ids: Sequence[int],
    tools: Tools = None,
) -> tuple[list[int], list[int]]:
    """As `answer_ids`, with the prompt's ids before it."""
    before, ids = turn_ids(tokenizer, prompt, answer, tools)
    end = next((position for position, token in enumerate(ids) if token in stop_ids), None)
    if end is not None:
        return before, ids[: end + 1]
    closing = [token for token in closing_ids(tokenizer)[:1] if token in stop_ids]
    if closing:  # it begins the next turn and is therefore not in this one
        return before, ids + closing
    stops = ", ".join(map(repr, tokenizer.convert_ids_to_tokens(list(stop_ids))))
    raise ConfigError(
        f"the chat template does not end the assistant's turn with a stop token ({stops}), so a model trained with it "
        "would never stop; mend chat_template.jinja"
    )


def label_conversation(
    tokenizer: PreTrainedTokenizerBase, messages: Messages, stop_ids: Sequence[int], tools: Tools = None
) -> list[LabelledTokens]:
    """Tokens of a conversation with every assistant turn labelled, its end token included, and nothing else.

    Usually one element. A template that renders earlier turns otherwise than the last (reasoning models drop earlier
    thoughts) gives one element for each prompt that is no continuation of the turns before, so that every answer is
    trained behind the very prompt that it will be generated behind.
    """
    examples: list[LabelledTokens] = []
    for number, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        prompt, answer = prompt_and_answer_ids(tokenizer, messages[:number], message, stop_ids, tools)
        labels = [IGNORE] * len(prompt)
        if examples and prompt[: len(examples[-1].token_ids)] == examples[-1].token_ids:
            before = examples.pop().labels
            labels[: len(before)] = before
        examples.append(LabelledTokens(prompt + answer, labels + answer))
    return examples


def conversation_parts(
    tokenizer: PreTrainedTokenizerBase, messages: Messages, tools: Tools = None
) -> tuple[list[int], list[int]]:
    """(prompt, answer) as token ids of a finished conversation, as a reward model reads it: one after the other.

    With a chat template the answer ends with the token that ends the turn; it is empty where the last turn is not the
    assistant's. Without a template (encoders) the prompt is everything, as `role: content` lines with the special
    tokens that the tokenizer adds, and the answer is empty.
    """
    if not tokenizer.chat_template:
        ids = text_ids(tokenizer, "\n".join(map(_line, messages)))
        ends = (tokenizer.sep_token_id, tokenizer.eos_token_id)
        return (ids if ids and ids[-1] in ends else [*ids, tokenizer.eos_token_id]), []
    if messages[-1]["role"] != "assistant":
        return conversation_ids(tokenizer, messages, tools), []
    return prompt_and_answer_ids(tokenizer, messages[:-1], messages[-1], stop_ids(tokenizer), tools)


def _line(message: Mapping[str, Any]) -> str:
    """A turn for a model without a chat template; what it calls stands behind what it says."""
    plain = plain_message(message)
    calls = [json.dumps(call["function"], ensure_ascii=False) for call in plain.get("tool_calls", ())]
    return f"{plain['role']}: {' '.join(filter(None, [plain['content'], *calls]))}"


def stop_ids(tokenizer: PreTrainedTokenizerBase, generation_config: GenerationConfig | None = None) -> list[int]:
    """Sorted ids that end an answer: those of the generation config, the tokenizer's EOS and the template's own.

    The last matters for base models whose EOS ends documents (`<|endoftext|>`) while their template ends turns with
    another special token (`<|im_end|>`).
    """
    found: set[int] = set()
    configured = generation_config.eos_token_id if generation_config is not None else None
    if configured is not None:
        found.update([configured] if isinstance(configured, int) else configured)
    if tokenizer.eos_token_id is not None:
        found.add(tokenizer.eos_token_id)
    if tokenizer.chat_template:
        found.update(closing_ids(tokenizer))
    return sorted(found)


def generation_config_of(folder: Path) -> GenerationConfig | None:
    """The generation config of a model folder; None where there is none."""
    return GenerationConfig.from_pretrained(folder) if (folder / "generation_config.json").is_file() else None


def distinct_pad_token(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """A special token that no rendered conversation contains, to pad with; None where there is none.

    transformers' sequence classifiers find the last token by comparing with the pad token, so padding with EOS would
    hide the very token that the score is read from.
    """
    used: set[int] = set()
    if tokenizer.chat_template:
        turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}]
        used = set(conversation_ids(tokenizer, turns))
    else:
        used = {*text_ids(tokenizer, "?"), tokenizer.eos_token_id}
    for token_id in (tokenizer.pad_token_id, tokenizer.unk_token_id, *sorted(tokenizer.added_tokens_decoder)):
        if token_id is not None and token_id not in used and token_id != tokenizer.eos_token_id:
            return str(tokenizer.convert_ids_to_tokens(token_id))
    return None


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """SHA-256 over what decides token ids (vocabulary, merges, normalisation, added and special tokens).

    The chat template does not enter: two models with the same fingerprint understand each other's token ids.
    """
    parts: dict[str, Any] = {
        "vocab": sorted(tokenizer.get_vocab().items(), key=lambda item: item[1]),
        "added": {index: str(token) for index, token in sorted(tokenizer.added_tokens_decoder.items())},
    }
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        state = json.loads(backend.to_str())
        parts["pipeline"] = [state.get("normalizer"), state.get("pre_tokenizer"), state["model"].get("merges")]
    return hashlib.sha256(json.dumps(parts, ensure_ascii=True).encode()).hexdigest()
