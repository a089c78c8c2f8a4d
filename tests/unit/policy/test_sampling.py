"""Drawing tokens: the distribution, transformers' filters as the reference, the random numbers."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import TopKLogitsWarper, TopPLogitsWarper

from services.policy.engines.sampling import Draw, Filter, draw, stream_key, uniforms


def _even(count: int) -> torch.Tensor:
    """Evenly spread numbers: the drawn frequencies are exact to 1/count."""
    return ((torch.arange(count, dtype=torch.float64) + 0.5) / count).unsqueeze(1)


def _frequencies(logits: torch.Tensor, count: int = 4000, **how: object) -> torch.Tensor:
    filters = how.pop("filter", None)
    rows = [Filter(row, **filters) for row in range(count)] if filters else []  # type: ignore[arg-type]
    drawn = draw(logits.repeat(count, 1), Draw(_even(count), filters=rows, **how))  # type: ignore[arg-type]
    return torch.bincount(drawn.tokens, minlength=logits.shape[-1]) / count


@pytest.mark.parametrize("vocab", [5, 16, 100, 4096, 5000])
def test_tokens_have_the_frequencies_of_the_softmax(vocab: int) -> None:
    logits = torch.randn(vocab, generator=torch.Generator().manual_seed(vocab)) * 2
    expected = logits.softmax(-1)
    assert (_frequencies(logits) - expected).abs().max() < 2 / 4000
    drawn = draw(logits.repeat(7, 1), Draw(_even(7)))
    torch.testing.assert_close(drawn.logprobs, logits.log_softmax(-1)[drawn.tokens])


def test_temperature_applies_to_frequencies_and_logprobs() -> None:
    logits = torch.randn(40, generator=torch.Generator().manual_seed(0))
    temperatures = torch.full((4000, 1), 0.3)
    assert (_frequencies(logits, temperatures=temperatures) - (logits / 0.3).softmax(-1)).abs().max() < 2 / 4000


@pytest.mark.parametrize(("top_k", "top_p"), [(3, 1.0), (0, 0.7), (10, 0.5), (1, 1.0), (0, 0.01), (1000, 1.0)])
def test_filters_equal_those_of_transformers(top_k: int, top_p: float) -> None:
    logits = torch.randn(50, generator=torch.Generator().manual_seed(1)) * 2
    expected = logits[None].clone()
    if top_k:
        expected = TopKLogitsWarper(min(top_k, 50))(None, expected)
    if top_p < 1:
        expected = TopPLogitsWarper(top_p)(None, expected)
    found = _frequencies(logits, 2000, filter={"top_k": top_k, "top_p": top_p})
    assert (found - expected[0].softmax(-1)).abs().max() < 2 / 2000
    drawn = draw(logits[None].clone(), Draw(_even(1), filters=[Filter(0, top_k, top_p)]))
    torch.testing.assert_close(drawn.logprobs, logits.log_softmax(-1)[drawn.tokens])  # of the unfiltered distribution


def test_top_p_over_a_flat_large_vocabulary_is_exact() -> None:
    logits = torch.randn(6000, generator=torch.Generator().manual_seed(2)) * 0.01
    kept = TopPLogitsWarper(0.9)(None, logits[None].clone())[0].isfinite()
    drawn = draw(logits.repeat(300, 1), Draw(_even(300), filters=[Filter(row, top_p=0.9) for row in range(300)]))
    assert kept[drawn.tokens].all()


def test_forbidden_tokens_are_not_drawn_and_keep_their_probability() -> None:
    logits = torch.tensor([0.0, 60.0, 1.0, 2.0]).repeat(3, 1)
    forbidden = (torch.tensor([0, 2, 2]), torch.tensor([1, 1, 3]))
    drawn = draw(logits.clone(), Draw(torch.full((3, 1), 0.999), forbidden=forbidden))
    assert drawn.tokens.tolist() == [3, 1, 2]
    torch.testing.assert_close(drawn.logprobs, torch.tensor([2.0, 60.0, 1.0]) - logits[0].logsumexp(0))
    assert drawn.top(0, 1)[0][0] == 1


def test_greedy_and_random_rows_share_a_batch() -> None:
    logits = torch.randn(6, 30, generator=torch.Generator().manual_seed(3))
    greedy = torch.tensor([1, 4])
    alone, mixed = draw(logits.clone(), Draw(_even(6))), draw(logits.clone(), Draw(_even(6), greedy=greedy))
    assert mixed.tokens[greedy].tolist() == logits[greedy].argmax(1).tolist()
    others = torch.tensor([0, 2, 3, 5])
    assert mixed.tokens[others].tolist() == alone.tokens[others].tolist()


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 600), st.integers(0, 2**32 - 1), st.sampled_from([0.0, 0.5, 1.0 - 2**-53]))
def test_a_token_without_probability_is_never_drawn(vocab: int, seed: int, uniform: float) -> None:
    rng = np.random.default_rng(seed)
    logits = torch.from_numpy(rng.normal(0, 30, vocab).astype(np.float32))
    logits[torch.from_numpy(rng.random(vocab) < 0.5)] = -torch.inf
    logits[rng.integers(vocab)] = 0.0
    drawn = draw(logits[None].clone(), Draw(torch.tensor([[uniform]], dtype=torch.float64)))
    assert drawn.logprobs.isfinite().all()


def test_random_numbers_are_uniform_and_depend_on_every_part_of_the_key() -> None:
    keys = np.array([stream_key(1, prompt, sample) for prompt in range(40) for sample in range(25)], np.uint64)
    assert len(set(keys.tolist())) == 1000
    numbers = np.stack([uniforms(keys, np.full(1000, position)) for position in range(50)])
    assert numbers.min() >= 0.0
    assert numbers.max() < 1.0
    assert len(np.unique(numbers)) == 50_000
    counts = np.histogram(numbers, bins=20, range=(0, 1))[0]
    assert ((counts - 2500) ** 2 / 2500).sum() < 43.8  # chi-square, 19 degrees of freedom, p = 0.001
    assert abs(np.corrcoef(numbers[:-1].ravel(), numbers[1:].ravel())[0, 1]) < 0.02
    assert uniforms(keys[:3], np.array([4, 9, 2])).tolist() == [numbers[4, 0], numbers[9, 1], numbers[2, 2]]
    assert stream_key(1, 0, 1) != stream_key(1, 1, 0) != stream_key(2, 0, 1)


def test_penalties_and_biases_move_logits_before_the_temperature() -> None:
    logits = torch.tensor([[1.0, 2.0, 3.0], [0.0, 0.0, 0.0]])
    rows, tokens = torch.tensor([0, 0, 1]), torch.tensor([2, 0, 1])
    shifts = (rows, tokens, torch.tensor([-1.5, 100.0, -2.0]))
    drawn = draw(
        logits.clone(),
        Draw(torch.zeros(2, 1, dtype=torch.float64), temperatures=torch.tensor([[0.5], [2.0]]), shifts=shifts),
    )
    expected = torch.log_softmax(torch.tensor([[101.0, 2.0, 1.5], [0.0, -2.0, 0.0]]) / torch.tensor([[0.5], [2.0]]), 1)
    torch.testing.assert_close(drawn.scores - drawn.normaliser, expected)
    assert drawn.tokens[0] == 0
