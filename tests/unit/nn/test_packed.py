"""Packed forward passes equal the plain forward of each whole sequence, gradients included."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numeric import assert_same, gradients_of
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

from steersman.errors import InvalidArgumentError
from steersman.nn import packed_attention
from steersman.nn.forward import enable_packed, hidden_states
from steersman.nn.packed import pack

VOCAB = 61
COMMON = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_key_value_heads": 2,
}


def build(kind: str) -> torch.nn.Module:
    torch.manual_seed(0)
    if kind == "llama":
        return LlamaForCausalLM(LlamaConfig(num_attention_heads=4, **COMMON))
    return Qwen2ForCausalLM(Qwen2Config(num_attention_heads=2, **COMMON))


def groups_of(shape: list[tuple[int, tuple[int, ...]]]) -> list[tuple[np.ndarray, list[np.ndarray]]]:
    rng = np.random.default_rng(0)
    return [(rng.integers(0, VOCAB, p), [rng.integers(0, VOCAB, r) for r in rs]) for p, rs in shape]


def plain(model: torch.nn.Module, groups: list) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities of all response tokens and the last hidden state of every sequence, one by one."""
    model.set_attn_implementation("eager")
    logprobs, last = [], []
    for prompt, responses in groups:
        for response in responses:
            ids = torch.from_numpy(np.concatenate([prompt, response]))[None]
            hidden = model.model(ids).last_hidden_state[0]
            table = torch.log_softmax(hidden @ model.lm_head.weight.T, -1)
            where = torch.arange(len(response)) + len(prompt) - 1
            logprobs.append(table[where, torch.from_numpy(response)])
            last.append(hidden[-1])
    return torch.cat(logprobs), torch.stack(last)


def packed(model: torch.nn.Module, groups: list) -> tuple[torch.Tensor, torch.Tensor]:
    enable_packed(model)
    batch = pack(groups)
    hidden = hidden_states(model, batch)
    table = torch.log_softmax(hidden[batch.predictor] @ model.lm_head.weight.T, -1)
    return table.gather(1, batch.targets[:, None])[:, 0], hidden[batch.last]


def gradients(model: torch.nn.Module, value: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    value.backward()
    return {name: gradient.clone() for name, gradient in gradients_of(model).items()}


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_equals_the_plain_forward_and_its_gradients(kind: str) -> None:
    groups = groups_of([(5, (3, 0, 7)), (1, (4,)), (9, (2, 2)), (3, (0,))])
    model = build(kind)
    got, got_last = packed(model, groups)
    weights = torch.randn(len(got))
    got_grads = gradients(model, (got * weights).mean() + got_last.square().mean())
    want, want_last = plain(model, groups)
    want_grads = gradients(model, (want * weights).mean() + want_last.square().mean())
    assert_same(got, want)
    assert_same(got_last, want_last)
    assert_same(got_grads, want_grads)


SHAPES = st.lists(
    st.tuples(st.integers(1, 8), st.lists(st.integers(0, 8), min_size=1, max_size=4).map(tuple)), min_size=1, max_size=5
)


@settings(max_examples=25, deadline=None)
@given(shape=SHAPES)
def test_any_shape_of_batch(shape: list) -> None:
    groups = groups_of(shape)
    model = build("llama").requires_grad_(False)
    got, got_last = packed(model, groups)
    want, want_last = plain(model, groups)
    assert_same(got, want)
    assert_same(got_last, want_last)


def test_a_response_does_not_see_its_siblings() -> None:
    model = build("llama").requires_grad_(False)
    prompt, first, second, other = np.arange(4), np.arange(5), np.arange(6), np.arange(6)[::-1]
    alone, _ = packed(model, [(prompt, [first, second])])
    changed, _ = packed(model, [(prompt, [first, other])])
    torch.testing.assert_close(alone[:5], changed[:5], atol=0, rtol=0)


def test_an_empty_prompt_is_refused() -> None:
    with pytest.raises(InvalidArgumentError, match="at least one prompt token"):
        pack([(np.zeros(0, np.int32), [np.arange(3)])])


def test_a_sliding_window_is_kept_past_its_end() -> None:
    config = Qwen2Config(
        num_attention_heads=2, **COMMON, use_sliding_window=True, sliding_window=4, max_window_layers=0
    )
    groups = groups_of([(5, (3, 11)), (9, (2,)), (2, (7,))])
    model = Qwen2ForCausalLM(config)
    got, _ = packed(model, groups)
    got_grads = gradients(model, got.mean())
    want, _ = plain(model, groups)
    assert_same(got, want)
    assert_same(got_grads, gradients(model, want.mean()))
    model.config.sliding_window = 100
    assert float((plain(model, groups)[0] - want).abs().max()) > 1e-3, "the window makes no difference"


def test_long_rows_are_computed_another_way_with_the_same_result(monkeypatch: pytest.MonkeyPatch) -> None:
    groups = groups_of([(5, (3, 0, 7)), (9, (2, 2))])
    model = build("llama")
    short, _ = packed(model, groups)
    of_short = gradients(model, short.mean())
    monkeypatch.setattr(packed_attention, "_SHORT", 0)
    long, _ = packed(model, groups)
    assert_same(short, long)
    assert_same(of_short, gradients(model, long.mean()))


def test_short_rows_in_bf16_err_no_more_than_torchs_own_kernel() -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, v, grad = (torch.randn(6, rows, 16, generator=generator).bfloat16() for rows in (40, 20, 20, 40))
    seen = torch.ones(20, 20, dtype=torch.bool).tril().repeat(2, 1)
    mask = torch.zeros(3, 1, 40, 20).masked_fill_(~seen, -torch.inf)

    def passes(dtype: torch.dtype, attend: Callable[..., torch.Tensor]) -> list[torch.Tensor]:
        own = [one.to(dtype, copy=True).requires_grad_() for one in (q, k, v)]
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):  # as training calls it
            out = attend(*own, mask.to(dtype))
        return [one.double() for one in (out.detach(), *torch.autograd.grad(out, own, grad.to(dtype)))]

    def short(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return packed_attention._ShortAttention.apply(q, k, v, mask, 0.25)

    def torchs(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        own = (one.view(3, 2, *one.shape[1:]) for one in (q, k, v))
        return torch.nn.functional.scaled_dot_product_attention(*own, attn_mask=mask, scale=0.25).flatten(0, 1)

    exact = passes(torch.float64, torchs)
    for one, right in zip(passes(torch.float64, short), exact, strict=True):
        assert_same(one, right)
    errors = [passes(torch.bfloat16, short), passes(torch.bfloat16, torchs)]
    for right, ours, theirs in zip(exact, *errors, strict=True):
        assert (ours - right).norm() <= 1.2 * (theirs - right).norm()
