"""Tiny random models and a tokenizer with a chat template, built in milliseconds, for tests that need real parts.

Every builder is deterministic: the same arguments give the same weights and the same tokens.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers import models as tokenizer_models
from transformers import (
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    RobertaConfig,
    RobertaForSequenceClassification,
    T5Config,
    T5ForConditionalGeneration,
)

# ChatML as SmolLM2 and Qwen write it: a default system turn, a line end after every end-of-turn token.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nBe helpful.<|im_end|>\n' }}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
_SPECIAL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|pad|>"]


@functools.cache
def _byte_tokenizer() -> str:
    """JSON of a byte-level tokenizer: 4 special tokens, the 256 bytes, no merges; every text encodes and decodes."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: number for number, token in enumerate([*_SPECIAL_TOKENS, *alphabet])}
    tokenizer = Tokenizer(tokenizer_models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(_SPECIAL_TOKENS)
    return tokenizer.to_str()


def tiny_tokenizer(*, pad_is_eos: bool = False, chat_template: str | None = CHAT_TEMPLATE) -> PreTrainedTokenizerBase:
    """A byte-level tokenizer of 260 tokens: `<|endoftext|>` 0, `<|im_start|>` 1, `<|im_end|>` 2 (EOS), `<|pad|>` 3.

    Args:
        pad_is_eos: padding has the id of EOS, as many published models have it.
        chat_template: None for a base model without one.
    """
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(_byte_tokenizer()),
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        unk_token="<|endoftext|>",
        pad_token="<|im_end|>" if pad_is_eos else "<|pad|>",
        model_max_length=512,
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = chat_template
    return tokenizer


LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "partial_rotary_factor": 1.0,
    "short_factor": [1.0] * 48,
    "long_factor": [1.0 + index / 4 for index in range(48)],
    "original_max_position_embeddings": 4096,
    "factor": 32.0,
}
"""Rotations that change beyond a length, for a Phi-3 of the default sizes."""
VOCAB_SIZE = 4 + 256


def _seeded(seed: int, build: Any, config: Any) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = build(config)
    return model.eval()


def _decoder_sizes(hidden_size: int, layers: int, vocab_size: int, tie_word_embeddings: bool) -> dict[str, Any]:
    return {
        "vocab_size": vocab_size,
        "hidden_size": hidden_size,
        "intermediate_size": 2 * hidden_size,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,  # grouped queries, as in the models that are really used
        "max_position_embeddings": 512,
        "tie_word_embeddings": tie_word_embeddings,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 3,
    }


def tiny_llama(
    vocab_size: int = VOCAB_SIZE,
    *,
    hidden_size: int = 32,
    layers: int = 2,
    tie_word_embeddings: bool = True,
    seed: int = 0,
) -> LlamaForCausalLM:
    """A random Llama of about 30 thousand parameters in fp32."""
    config = LlamaConfig(**_decoder_sizes(hidden_size, layers, vocab_size, tie_word_embeddings))
    model = _seeded(seed, LlamaForCausalLM, config)
    model.generation_config = GenerationConfig(bos_token_id=1, eos_token_id=[2], pad_token_id=3)
    return model


def tiny_qwen2(
    vocab_size: int = VOCAB_SIZE,
    *,
    hidden_size: int = 32,
    layers: int = 2,
    tie_word_embeddings: bool = False,
    seed: int = 0,
) -> Qwen2ForCausalLM:
    """A random Qwen2: biases in the attention and, by default, an output head of its own."""
    config = Qwen2Config(**_decoder_sizes(hidden_size, layers, vocab_size, tie_word_embeddings))
    model = _seeded(seed, Qwen2ForCausalLM, config)
    model.generation_config = GenerationConfig(bos_token_id=1, eos_token_id=[2], pad_token_id=3)
    return model


def tiny_t5(
    vocab_size: int = VOCAB_SIZE,
    *,
    hidden_size: int = 32,
    layers: int = 2,
    tie_word_embeddings: bool = True,
    seed: int = 0,
) -> T5ForConditionalGeneration:
    """A random encoder-decoder; `tie_word_embeddings` False: with an output head of its own, as FLAN-T5 has."""
    config = T5Config(
        vocab_size=vocab_size,
        d_model=hidden_size,
        d_kv=hidden_size // 4,
        d_ff=2 * hidden_size,
        num_layers=layers,
        num_heads=4,
        feed_forward_proj="relu" if tie_word_embeddings else "gated-gelu",
        pad_token_id=3,
        eos_token_id=2,
    )
    config.update({"decoder_start_token_id": 3, "n_positions": 512})
    config.update({"tie_word_embeddings": tie_word_embeddings, "scale_decoder_outputs": tie_word_embeddings})
    model = _seeded(seed, T5ForConditionalGeneration, config)
    model.generation_config = GenerationConfig(eos_token_id=[2], pad_token_id=3, decoder_start_token_id=3)
    return model


def tiny_llama_reward(
    vocab_size: int = VOCAB_SIZE, *, hidden_size: int = 32, layers: int = 2, num_labels: int = 1, seed: int = 0
) -> LlamaForSequenceClassification:
    """A random decoder with a score head, as a reward model."""
    config = LlamaConfig(**_decoder_sizes(hidden_size, layers, vocab_size, True))
    config.num_labels = num_labels
    return _seeded(seed, LlamaForSequenceClassification, config)


def tiny_roberta_reward(
    vocab_size: int = VOCAB_SIZE, *, hidden_size: int = 32, layers: int = 2, num_labels: int = 1, seed: int = 0
) -> RobertaForSequenceClassification:
    """A random encoder with a classification head, as a reward model."""
    config = RobertaConfig(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=2 * hidden_size,
        num_hidden_layers=layers,
        num_attention_heads=4,
        max_position_embeddings=512 + 4,  # RoBERTa counts positions from pad_token_id + 1
        type_vocab_size=1,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=3,
    )
    config.num_labels = num_labels
    return _seeded(seed, RobertaForSequenceClassification, config)


def save_model_folder(folder: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None = None) -> Path:
    """Writes model (safetensors) and tokenizer as a plain Hugging Face folder and returns the folder."""
    model.save_pretrained(folder)
    (tiny_tokenizer() if tokenizer is None else tokenizer).save_pretrained(folder)
    return folder
