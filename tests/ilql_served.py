"""What a policy of ILQL samples from, by the transformers forward of whole rows: the reference of engine and stage."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from steersman.nn.ilql import AdvantageHeads, HeadTensors, read_heads
from steersman.nn.load import load_causal_lm


@torch.no_grad()
def served_logprobs(
    model: Any, heads: HeadTensors, prompt: list[int], answer: list[int], temperature: float = 1.0
) -> Tensor:
    """log softmax((log pi + beta (min Q - V)) / temperature) of the answer's tokens, [T]."""
    return _table(model, heads, prompt, answer, temperature).gather(1, torch.tensor(answer)[:, None])[:, 0]


@torch.no_grad()
def greedy(model: Any, heads: HeadTensors, prompt: list[int], stops: list[int], limit: int) -> list[int]:
    """The most likely answer, token by token."""
    answer: list[int] = []
    while len(answer) < limit and not (answer and answer[-1] in stops):
        answer.append(int(_table(model, heads, prompt, [*answer, 0], 1.0)[-1].argmax()))
    return answer


def of_folder(folder: Path) -> tuple[Any, HeadTensors]:
    return load_causal_lm(folder), read_heads(folder)


def _table(model: Any, heads: HeadTensors, prompt: list[int], answer: list[int], temperature: float) -> Tensor:
    out = model(input_ids=torch.tensor([prompt + answer]), output_hidden_states=True)
    rows = slice(len(prompt) - 1, len(prompt) + len(answer) - 1)
    scores = out.logits[0, rows].log_softmax(-1)
    if heads:
        hidden = out.hidden_states[-1][0, rows]
        made = AdvantageHeads.of(heads, hidden.shape[1], scores.shape[1])
        one, two = (head.last(head.first(hidden).clamp(min=0)) for head in made.q)
        scores = scores + made.beta * (torch.minimum(one, two) - made.v(hidden))
    return (scores / temperature).log_softmax(-1)
