"""Chunked log-probabilities against log_softmax: values, gradients, memory, autocast."""

from __future__ import annotations

import pytest
import torch
from numeric import assert_same
from torch import Tensor

from steersman.errors import InvalidArgumentError
from training.mathematics.logprobs import token_logprobs


def reference(
    hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None, temperature: float, softcap: float | None
) -> tuple[Tensor, Tensor]:
    logits = torch.nn.functional.linear(hidden, weight, bias)
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    log_p = torch.log_softmax(logits / temperature, -1)
    return log_p.gather(-1, targets[:, None]).squeeze(-1), -(log_p.exp() * log_p).sum(-1)


def inputs(dtype: torch.dtype, tokens: int = 23, width: int = 8, vocabulary: int = 31) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((tokens, width), (vocabulary, width), (vocabulary,))
    return [torch.randn(shape, generator=generator, dtype=dtype).requires_grad_() for shape in shapes]


TARGETS = torch.randint(0, 31, (23,), generator=torch.Generator().manual_seed(1))


def test_by_hand() -> None:
    # logits ln 2, 0 (W = rows): p = 2/3, 1/3; at temperature 0.5: 4/5, 1/5; entropy = -(0.8 ln 0.8 + 0.2 ln 0.2)
    hidden, weight = torch.tensor([[0.6931472]]), torch.tensor([[1.0], [0.0]])
    logprobs, _ = token_logprobs(hidden, weight, torch.tensor([0]))
    assert logprobs.exp().item() == pytest.approx(2 / 3)
    logprobs, entropy = token_logprobs(hidden, weight, torch.tensor([1]), temperature=0.5, with_entropy=True)
    assert logprobs.exp().item() == pytest.approx(0.2)
    assert entropy is not None
    assert entropy.item() == pytest.approx(0.5004024, abs=1e-6)


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("chunk", [1, 4, 23, 1000])
def test_values_and_gradients_equal_log_softmax(chunk: int, softcap: float | None) -> None:
    hidden, weight, bias = inputs(torch.float32)
    upstream = torch.randn(2, 23, generator=torch.Generator().manual_seed(2))
    expected = reference(hidden, weight, TARGETS, bias, 0.7, softcap)
    got = token_logprobs(
        hidden, weight, TARGETS, bias=bias, temperature=0.7, softcap=softcap, with_entropy=True, chunk_tokens=chunk
    )
    assert got[1] is not None
    assert got[0].dtype == torch.float32
    assert_same(torch.stack((got[0], got[1])), torch.stack(expected))
    parameters = (hidden, weight, bias)
    for ours, theirs in zip(
        torch.autograd.grad((upstream * torch.stack((got[0], got[1]))).sum(), parameters),
        torch.autograd.grad((upstream * torch.stack(expected)).sum(), parameters),
        strict=True,
    ):
        assert_same(ours, theirs)


@pytest.mark.parametrize("softcap", [None, 3.0])
def test_gradcheck(softcap: float | None) -> None:
    hidden, weight, bias = inputs(torch.float64, tokens=6, width=3, vocabulary=7)
    targets = TARGETS[:6] % 7

    def both(hidden: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor | None]:
        return token_logprobs(
            hidden, weight, targets, bias=bias, temperature=1.3, softcap=softcap, with_entropy=True, chunk_tokens=4
        )

    assert torch.autograd.gradcheck(both, (hidden, weight, bias))
    assert torch.autograd.gradcheck(lambda h: token_logprobs(h, weight.detach(), targets)[0], (hidden,))
    assert torch.autograd.gradcheck(lambda w: token_logprobs(hidden.detach(), w, targets)[0], (weight,))


def test_only_what_is_trained_gets_a_gradient() -> None:
    hidden, weight, bias = inputs(torch.float32)
    token_logprobs(hidden, weight.detach(), TARGETS, bias=bias.detach())[0].sum().backward()
    assert hidden.grad is not None
    assert weight.grad is None


def test_no_tokens() -> None:
    hidden, weight, _ = inputs(torch.float32)
    logprobs, entropy = token_logprobs(hidden[:0], weight, TARGETS[:0], with_entropy=True)
    assert entropy is not None
    assert logprobs.shape == entropy.shape == (0,)
    (logprobs.sum() + entropy.sum()).backward()
    assert weight.grad is not None
    assert not weight.grad.any()


class LargestTensor(torch.utils._python_dispatch.TorchDispatchMode):
    """Remembers the largest tensor that any operation returned."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for item in result if isinstance(result, tuple | list) else (result,):
            if isinstance(item, Tensor):
                self.elements = max(self.elements, item.numel())
        return result


def test_no_tensor_of_all_logits_ever_exists() -> None:
    tokens, width, vocabulary, chunk = 256, 4, 500, 8
    hidden, weight, _ = inputs(torch.float32, tokens, width, vocabulary)
    targets = torch.randint(0, vocabulary, (tokens,))
    with LargestTensor() as seen:
        logprobs, entropy = token_logprobs(hidden, weight, targets, with_entropy=True, chunk_tokens=chunk)
        assert entropy is not None
        (logprobs.sum() + entropy.sum()).backward()
    assert seen.elements <= max(chunk * vocabulary, vocabulary * width)
    with LargestTensor() as whole:
        reference(hidden, weight, targets, None, 1.0, None)
    assert whole.elements == tokens * vocabulary


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_bf16_autocast(device: str) -> None:
    """The product runs in bf16 as the model's own head would under autocast; the rest in fp32; gradients in fp32."""
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    hidden, weight, bias = (x.detach().to(device).requires_grad_() for x in inputs(torch.float32))
    targets = TARGETS.to(device)
    with torch.autocast(device, dtype=torch.bfloat16):
        logprobs, _ = token_logprobs(hidden, weight, targets, bias=bias, chunk_tokens=5)
        logits = torch.nn.functional.linear(hidden, weight, bias)
    assert logits.dtype == torch.bfloat16
    assert logprobs.dtype == torch.float32
    expected = torch.log_softmax(logits.float(), -1).gather(-1, targets[:, None]).squeeze(-1)
    assert_same(logprobs, expected)
    logprobs.sum().backward()
    exact = torch.autograd.grad(reference(hidden, weight, targets, bias, 1.0, None)[0].sum(), (hidden, weight, bias))
    for parameter, gradient in zip((hidden, weight, bias), exact, strict=True):
        assert parameter.grad is not None
        assert parameter.grad.dtype == torch.float32
        assert (parameter.grad - gradient).norm() <= 0.03 * gradient.norm()


def test_bf16_model() -> None:
    hidden, weight, _ = (x.detach().bfloat16().requires_grad_() for x in inputs(torch.float32))
    logprobs, _ = token_logprobs(hidden, weight, TARGETS)
    logprobs.sum().backward()
    assert logprobs.dtype == torch.float32
    assert hidden.grad is not None
    assert hidden.grad.dtype == torch.bfloat16


def test_wrong_input_is_refused() -> None:
    hidden, weight, _ = inputs(torch.float32)
    with pytest.raises(InvalidArgumentError, match="temperature"):
        token_logprobs(hidden, weight, TARGETS, temperature=0.0)
    with pytest.raises(InvalidArgumentError, match="targets"):
        token_logprobs(hidden, weight, TARGETS[:3])


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("chunk", [4, 1000])
def test_a_frozen_head_gives_the_same_gradient_without_a_second_product(chunk: int, temperature: float) -> None:
    hidden, weight, bias = inputs(torch.float32)
    weight, bias = weight.detach(), bias.detach()
    upstream = torch.randn(23, generator=torch.Generator().manual_seed(2))
    expected, _ = reference(hidden, weight, TARGETS, bias, temperature, None)
    got, _ = token_logprobs(hidden, weight, TARGETS, bias=bias, temperature=temperature, chunk_tokens=chunk)
    assert_same(got, expected)
    (ours,) = torch.autograd.grad(got @ upstream, hidden)
    (theirs,) = torch.autograd.grad(expected @ upstream, hidden)
    assert_same(ours, theirs)
