"""What `benchmarks.algorithms` measures of a cell, apart from all code that trains: answers to held-out prompts by
transformers' own `generate`, and a number for each.

    reward   the seed's reward model, where there is one
    rubric   the demo's exact rubric, which no method sees
    kl       log pi / pi_SFT at the temperature of the sampling, nats
    length   tokens
    cut      1 where the answer was cut short
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks.algorithms import COLUMNS, GENERATION
from steersman.config.manifest import load_manifest
from steersman.data import records
from steersman.nn.ilql import AdvantageHeads, read_heads
from steersman.nn.load import load_causal_lm, load_reward_model, load_tokenizer
from steersman.nn.tokens import prompt_ids, stop_ids
from steersman.rewards import build_reward

TEMPERATURE = GENERATION["temperature"]
SEED = 5
BATCH = 16


def evaluate(run: Path, start: Path, judge: Path) -> dict[str, Any]:
    """Lets a run's last model answer the held-out prompts; `answers`, and a list of numbers by column.

    Args:
        start: the seed's shared run: data, and the SFT model that the KL is measured to.
        judge: the run with the seed's reward model, which may not be there.
    """
    torch.set_num_threads(1)
    torch.manual_seed(SEED)
    manifest = load_manifest(run / "manifest.yaml")
    names = manifest.stage_names()
    last = next(run / name / "model" for name in reversed(names) if name != "reward-model")
    tokenizer = load_tokenizer(last)
    policy, reference = with_heads(load_causal_lm(last), last), load_causal_lm(start / "sft" / "model")
    rubric, scorer = build_reward("demo-rubric"), judge / "reward-model" / "model"
    reward_model = load_reward_model(scorer) if scorer.is_dir() else None
    stops = stop_ids(tokenizer, policy.generation_config)
    rows = list(records.read_jsonl(start / "data" / "prompts.heldout.jsonl", records.Prompt))
    chats = [[message.model_dump(exclude_none=True) for message in row.prompt] for row in rows]
    prompts = [prompt_ids(tokenizer, chat) for chat in chats]
    texts: list[str] = []
    columns: dict[str, list[float]] = {name: [] for name in COLUMNS}
    for row, chat, prompt, answer in zip(rows, chats, prompts, sample(policy, prompts, stops), strict=True):
        text = str(tokenizer.decode(answer, skip_special_tokens=True)).strip()
        texts.append(text)
        if reward_model is not None:
            columns["reward"].append(reward_model.score([prompt + answer]).reward.item())
        columns["rubric"].append(rubric(chat, text, row.facts or {}).value)
        columns["kl"].append(logprob(policy, prompt, answer) - logprob(reference, prompt, answer))
        columns["length"].append(float(len(answer)))
        columns["cut"].append(float(answer[-1] not in stops))
    return {"answers": texts, **columns}


def with_heads(policy: Any, folder: Path) -> Any:
    """The model with ILQL's advantages in its logits, where its folder has heads: `generate` draws with them."""
    tensors = read_heads(folder)
    if not tensors:
        return policy
    text = policy.config.get_text_config(decoder=True)
    heads = AdvantageHeads.of(tensors, text.hidden_size, text.vocab_size)
    forward = policy.forward

    @functools.wraps(forward)
    def steered(*inputs: Any, **options: Any) -> Any:
        output = forward(*inputs, **{**options, "output_hidden_states": True})
        output.logits = output.logits + heads(output.hidden_states[-1][:, -output.logits.shape[1] :])
        return output

    policy.forward = steered
    return policy


def sample(policy: Any, prompts: list[list[int]], stops: list[int]) -> Iterator[list[int]]:
    """An answer to every prompt, its end token included."""
    for first in range(0, len(prompts), BATCH):
        batch = prompts[first : first + BATCH]
        width = max(map(len, batch))
        answers = policy.generate(
            torch.tensor([[stops[0]] * (width - len(prompt)) + prompt for prompt in batch]),
            attention_mask=torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in batch]),
            do_sample=True,
            temperature=TEMPERATURE,
            top_k=0,
            top_p=1.0,
            max_new_tokens=int(GENERATION["maxNewTokens"]),
            eos_token_id=stops,
            pad_token_id=stops[0],
        )[:, width:].tolist()
        for answer in answers:
            end = next((place for place, token in enumerate(answer) if token in stops), len(answer) - 1)
            yield answer[: end + 1]


def logprob(model: Any, prompt: list[int], answer: list[int]) -> float:
    """Log-probability of the answer at the temperature of the sampling, in nats."""
    with torch.no_grad():
        logits = model(torch.tensor([prompt + answer]), logits_to_keep=len(answer) + 1).logits[0, :-1]
    logprobs = (logits / TEMPERATURE).log_softmax(-1)
    return logprobs.gather(1, torch.tensor(answer)[:, None]).sum().item()
