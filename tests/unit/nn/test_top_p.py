"""Top-p sets and log-probabilities over them, against sets worked by hand and dense autograd."""

from __future__ import annotations

import math

import pytest
import torch
from numeric import assert_same
from torch import Tensor

from steersman.errors import InvalidArgumentError
from steersman.nn.logprobs import token_logprobs, top_p_sets_of
from steersman.nn.top_p import pack_sets, top_p_sets, unpack_sets

CHANCES = torch.tensor([[0.5, 0.3, 0.15, 0.05], [0.05, 0.15, 0.3, 0.5], [0.25, 0.25, 0.25, 0.25]])


@pytest.mark.parametrize(
    ("top_p", "expected"),
    [
        (0.4, ["1000", "0001", "1111"]),
        (0.6, ["1100", "0011", "1111"]),
        (0.9, ["1110", "0111", "1111"]),
        (0.97, ["1111", "1111", "1111"]),
    ],
)
def test_sets_by_hand(top_p: float, expected: list[str]) -> None:
    """The smallest set that holds the share; of equal tokens at its edge all belong to it."""
    found = top_p_sets(CHANCES.log(), top_p)
    assert ["".join(str(int(one)) for one in row) for row in found] == expected


def test_a_flat_distribution_over_many_tokens() -> None:
    """The set holds more than the most likely thousand."""
    scores = torch.arange(3000.0)[None] * -1e-4
    sets = top_p_sets(scores, 0.9)
    share = scores.double().softmax(1)[sets].sum()
    least = scores.double().softmax(1)[sets].min()
    assert share - least < 0.9 <= share
    assert sets[0, : int(sets.sum())].all()


@pytest.mark.parametrize("vocabulary", [1, 7, 8, 9, 300])
def test_sets_in_bits(vocabulary: int) -> None:
    sets = torch.rand(5, vocabulary, generator=torch.Generator().manual_seed(1)) < 0.5
    assert pack_sets(sets).shape == (5, -(-vocabulary // 8))
    assert torch.equal(unpack_sets(pack_sets(sets), vocabulary), sets)


def dense(
    hidden: Tensor, weight: Tensor, targets: Tensor, sets: Tensor, temperature: float, cap: float | None
) -> Tensor:
    logits = hidden @ weight.T
    logits = cap * torch.tanh(logits / cap) if cap else logits
    logits = (logits / temperature).masked_fill(~sets, -math.inf)
    return logits.log_softmax(1).gather(1, targets[:, None])[:, 0]


@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize("cap", [None, 4.0])
def test_log_probabilities_over_sets_and_their_gradients(frozen: bool, cap: float | None) -> None:
    generator = torch.Generator().manual_seed(3)
    hidden = torch.randn(11, 6, generator=generator, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(29, 6, generator=generator, dtype=torch.float64, requires_grad=not frozen)
    older = torch.randn(11, 6, generator=generator, dtype=torch.float64)
    targets = torch.randint(29, (11,), generator=generator)
    packed = top_p_sets_of(older, weight, targets, 0.7, temperature=0.8, softcap=cap, chunk_tokens=4)
    sets = unpack_sets(packed, 29)
    assert sets[torch.arange(11), targets].all()  # drawn, so it belongs to the set
    assert not sets.all()
    factors = torch.randn(11, generator=generator, dtype=torch.float64)
    inputs = [one for one in (hidden, weight) if one.requires_grad]
    expected = dense(hidden, weight, targets, sets, 0.8, cap)
    wanted = torch.autograd.grad((expected * factors).sum(), inputs)
    options = {"temperature": 0.8, "softcap": cap, "sets": packed, "chunk_tokens": 4}
    found, _ = token_logprobs(hidden, weight, targets, **options)  # type: ignore[arg-type]
    assert_same(found.detach(), expected.detach())
    for one, other in zip(torch.autograd.grad((found * factors).sum(), inputs), wanted, strict=True):
        assert_same(one, other)


def test_entropies_over_sets_are_refused() -> None:
    hidden, weight, targets = torch.ones(1, 2), torch.ones(3, 2), torch.zeros(1, dtype=torch.int64)
    sets = top_p_sets_of(hidden, weight, targets, 0.5)
    with pytest.raises(InvalidArgumentError, match="whole distribution"):
        token_logprobs(hidden, weight, targets, sets=sets, with_entropy=True)
