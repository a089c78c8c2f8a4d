"""Reward models whose best answer is known, because their weights are set instead of learned.

A learned reward has optima that nobody knows: trained on single letters, it may give an answer without any letter a
little more than the best letter, and a policy finds that. Here every token has a worth, and an answer of two tokens is
worth the sum.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForSequenceClassification

from steersman.nn.reward import Member, RewardSettings, write_settings
from steersman.nn.tokens import prompt_ids
from steersman.testing.models import VOCAB_SIZE, save_model_folder, tiny_tokenizer

ANSWER = 2
"""Tokens of the answers whose worth is exact."""


def write_reward_model(folder: Path, members: list[Mapping[str, float]], mode: str, prompt: str) -> Path:
    """A folder as the stage `rewardModel` writes it: one model, or an ensemble of several.

    Args:
        members: what each of them gives for the characters of an answer, by character; 0 for every other token. No
            prompt may contain these characters.
        prompt: any of the prompts, which are of one length.
    """
    tokenizer = tiny_tokenizer()
    seen = len(prompt_ids(tokenizer, [{"role": "user", "content": prompt}])) + ANSWER
    described = []
    for number, worth in enumerate(members):
        name = f"member-{number}" if len(members) > 1 else "."
        values = torch.zeros(VOCAB_SIZE)
        for character, value in worth.items():
            values[tokenizer.convert_tokens_to_ids(character)] = value
        save_model_folder(folder / name, _mean_of_tokens(values))
        described.append(Member(folder=name, std=1 / seen))
    write_settings(folder, RewardSettings(members=described, ensemble_mode=mode))  # type: ignore[arg-type]
    return folder


def _mean_of_tokens(values: torch.Tensor) -> LlamaForSequenceClassification:
    """A decoder whose score is the mean of `values` over all tokens: attention without keys attends to all alike."""
    config = LlamaConfig(
        vocab_size=len(values), hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1,
        num_labels=1, max_position_embeddings=512, bos_token_id=1, eos_token_id=2, pad_token_id=3,
    )  # fmt: skip
    model = LlamaForSequenceClassification(config)
    length = 100 * float(values.abs().max())  # of every embedding, so that the norms divide all by the same
    scale = length / math.sqrt(config.hidden_size)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.fill_(1.0 if "norm" in name else 0.0)
        layer = model.model.layers[0].self_attn
        model.model.embed_tokens.weight[:, 0] = values
        model.model.embed_tokens.weight[:, 1] = (length**2 - values.square()).sqrt()
        layer.v_proj.weight[0, 0] = layer.o_proj.weight[2, 0] = model.score.weight[0, 2] = 1.0
        layer.v_proj.weight.mul_(scale)
        model.score.weight.mul_(scale)
    return model
