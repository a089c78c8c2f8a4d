"""Domain types of generation: what a policy engine is asked for and what it answers.

Free of torch, so that the fake engine (`steersman.testing`), the servicer and clients share them.
Token ids in, token ids out: nothing here knows text.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np

from steersman.errors import ContextLengthError, InvalidArgumentError, SteersmanError

FinishReason = Literal["stop", "length", "cancelled"]

LOGPROBS_NOTE = (
    "float32 natural logarithm of the distribution at the sampling temperature (temperature 0: of the untempered "
    "distribution), penalties and logit_bias included, over the whole vocabulary (with mask_top_p: over the mask "
    "policy's set): before top-k, top-p, minimum length and token constraints"
)

MASK_POLICY = "mask_policy."
"""Begins the names of an update's tensors that belong to the mask policy, an older version of the policy (NLPO)."""


MAX_SAMPLES = 16_384
"""Of one request, over all its prompts."""
MAX_TOP_LOGPROBS = 100
"""Alternatives of a token."""
MAX_STOP_TOKENS = 1_024


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How the tokens of a sample are drawn.

    A sample ends with one of the engine's end-of-sequence tokens or of `stop_token_ids` (kept as its last token),
    after `max_new_tokens`, or where the context ends. Neither kind of stop token is drawn before `min_new_tokens`.
    """

    max_new_tokens: int
    temperature: float = 1.0
    """0 means greedy."""
    top_p: float = 1.0
    """1 means off."""
    top_k: int = 0
    """0 means off."""
    seed: int = 0
    """With the indices of prompt and sample and the position it fixes every random number of a sample."""
    stop_token_ids: tuple[int, ...] = ()
    """In addition to the model's own end-of-sequence tokens."""
    min_new_tokens: int = 0
    top_logprobs: int = 0
    """Number of alternatives reported with every token event."""
    presence_penalty: float = 0.0
    """Taken off the logit of every token that the sample already has."""
    frequency_penalty: float = 0.0
    """Taken off for every time that the sample already has the token."""
    logit_bias: tuple[tuple[int, float], ...] = ()
    """(token id, what is added to its logit)."""
    mask_top_p: float = 1.0
    """Draw from the tokens of the mask policy's top-p set, at the same temperature; 1 means off."""

    def __post_init__(self) -> None:
        checks = (
            (self.max_new_tokens >= 1, "max_new_tokens", self.max_new_tokens, "at least 1"),
            (self.temperature >= 0.0, "temperature", self.temperature, "0 (greedy) or positive"),
            (0.0 < self.top_p <= 1.0, "top_p", self.top_p, "in (0, 1]"),
            (0.0 < self.mask_top_p <= 1.0, "mask_top_p", self.mask_top_p, "in (0, 1]"),
            (
                self.mask_top_p == 1.0 or not self.min_new_tokens,
                "mask_top_p",
                self.mask_top_p,
                "1 (off) beside min_new_tokens: the set may hold nothing but the end",
            ),
            (self.top_k >= 0, "top_k", self.top_k, "0 (off) or positive"),
            (0 <= self.seed < 2**64, "seed", self.seed, "an unsigned 64-bit integer"),
            (
                0 <= self.min_new_tokens <= self.max_new_tokens,
                "min_new_tokens",
                self.min_new_tokens,
                f"between 0 and max_new_tokens ({self.max_new_tokens})",
            ),
            (
                0 <= self.top_logprobs <= MAX_TOP_LOGPROBS,
                "top_logprobs",
                self.top_logprobs,
                f"0 (off) to {MAX_TOP_LOGPROBS}",
            ),
            (
                len(self.stop_token_ids) <= MAX_STOP_TOKENS,
                "stop_token_ids",
                f"a list of {len(self.stop_token_ids)}",
                f"at most {MAX_STOP_TOKENS} tokens",
            ),
            (-2 <= self.presence_penalty <= 2, "presence_penalty", self.presence_penalty, "between -2 and 2"),
            (-2 <= self.frequency_penalty <= 2, "frequency_penalty", self.frequency_penalty, "between -2 and 2"),
            (len(self.logit_bias) <= 1024, "logit_bias", f"{len(self.logit_bias)} entries long", "at most 1024 long"),
            (all(-100 <= bias <= 100 for _, bias in self.logit_bias), "logit_bias", "too large", "from -100 to 100"),
        )
        for good, name, value, rule in checks:
            if not good:
                raise InvalidArgumentError(f"sampling.{name} is {value}, it must be {rule}")


TokenConstraint = Callable[[int, int, Sequence[int]], np.ndarray | None]
"""Called with (prompt index, sample index, token ids so far) before every token.

Returns bool [V], true where a token is allowed (at least one), or None for no restriction. Runs on the engine's
thread: it must be fast. An exception in it fails the request.
"""


@dataclass(frozen=True, slots=True, eq=False)
class GenerationRequest:
    """`n` samples of every prompt. Admitted as one: in order of prompts, then samples."""

    request_id: str
    prompts: Sequence[np.ndarray]
    """int32 [P] token ids each; no prompt is empty."""
    params: SamplingParams
    n: int = 1
    """Samples a prompt; the prompt's prefix is computed once."""
    first_prompt: int = 0
    """Place of the first prompt in the caller's batch, from which random numbers follow."""
    stream: bool = False
    """Send a `TokenEvent` for every token, too."""
    constraint: TokenConstraint | None = None
    score_prompts: bool = False
    """Send a `PromptScored` for every prompt, before its first token."""

    def __post_init__(self) -> None:
        if self.n < 1:
            raise InvalidArgumentError(f"n is {self.n}, it must be at least 1")
        if self.n * len(self.prompts) > MAX_SAMPLES:
            raise InvalidArgumentError(
                f"n is {self.n} for {len(self.prompts)} prompts, a request makes {MAX_SAMPLES:,} samples at most; "
                "send several requests"
            )
        if self.constraint is not None and self.params.mask_top_p < 1.0:
            raise InvalidArgumentError("sampling.mask_top_p cannot be combined with a token constraint; leave one out")
        if not self.prompts:
            raise InvalidArgumentError("prompts is empty, send at least one prompt")

    def check(self, vocab_size: int, max_context: int) -> None:
        """Raises InvalidArgumentError for a prompt that a model with these limits cannot continue."""
        for index, prompt in enumerate(self.prompts):
            if prompt.ndim != 1 or prompt.size == 0:
                raise InvalidArgumentError(
                    f"prompts[{index}] has shape {list(prompt.shape)}, send at least one token id"
                )
            if prompt.size >= max_context:
                raise ContextLengthError(
                    f"prompts[{index}] has {prompt.size} tokens, the model's context holds {max_context} "
                    "with at least one new token; shorten the prompt"
                )
            low, high = int(prompt.min()), int(prompt.max())
            if low < 0 or high >= vocab_size:
                raise InvalidArgumentError(
                    f"prompts[{index}] holds token id {low if low < 0 else high}, the vocabulary has {vocab_size}; "
                    "use the tokenizer of the served model"
                )
        for token, _ in self.params.logit_bias:
            if not 0 <= token < vocab_size:
                raise InvalidArgumentError(f"sampling.logit_bias holds {token}, the vocabulary has {vocab_size}")
        for token in self.params.stop_token_ids:
            if not 0 <= token < vocab_size:
                raise InvalidArgumentError(f"sampling.stop_token_ids holds {token}, the vocabulary has {vocab_size}")


@dataclass(frozen=True, slots=True)
class TokenEvent:
    """One token of a streamed sample."""

    prompt_index: int
    sample_index: int
    token_id: int
    logprob: float
    weights_version: int
    top_logprobs: tuple[tuple[int, float], ...] = ()
    """(token id, log-probability), most likely first."""


@dataclass(frozen=True, slots=True, eq=False)
class PromptScored:
    """Log-probabilities of a prompt's tokens but the first, under the model's own distribution: untempered, without
    penalties and biases."""

    prompt_index: int
    logprobs: np.ndarray
    """float32 [P - 1], of the second token and those after it."""
    top_ids: np.ndarray
    """int32 [P - 1, `top_logprobs`], the tokens that were most likely in each place, the first of them most."""
    top_logprobs: np.ndarray
    """float32, as `top_ids`."""


@dataclass(frozen=True, slots=True, eq=False)
class SampleFinished:
    """A sample that came to its end. A cancelled one carries what it had."""

    prompt_index: int
    sample_index: int
    token_ids: np.ndarray
    """int32 [R], the stop token included."""
    logprobs: np.ndarray
    """float32 [R], see `LOGPROBS_NOTE`."""
    finish_reason: FinishReason
    weights_versions: tuple[int, ...]
    """Every version that made a token of this sample, oldest first."""


@dataclass(frozen=True, slots=True)
class RequestFailed:
    """The request broke; it is its last event. Samples reported before it are good."""

    error: SteersmanError


Event = TokenEvent | PromptScored | SampleFinished | RequestFailed


@dataclass(frozen=True, slots=True, eq=False)
class WeightsUpdate:
    """New weights under a version."""

    version: int
    kind: Literal["full", "lora"]
    tensors: Mapping[str, Any]
    """Torch tensors. full: by transformers parameter name, any subset. lora: a PEFT adapter's state dict. The same
    again with `MASK_POLICY` before every name: those of the mask policy."""
    adapter_config: Mapping[str, Any] | None = None
    """PEFT's adapter_config.json; only for lora. The adapter lies on the weights that the engine was started with."""

    def split(self) -> tuple[WeightsUpdate, WeightsUpdate | None]:
        """The policy's part and the mask policy's; None: the update holds none."""
        size = len(MASK_POLICY)
        mask = {name[size:]: value for name, value in self.tensors.items() if name.startswith(MASK_POLICY)}
        own = {name: value for name, value in self.tensors.items() if not name.startswith(MASK_POLICY)}
        return replace(self, tensors=own), replace(self, tensors=mask) if mask else None


@dataclass(frozen=True, slots=True)
class EngineInfo:
    """What an engine serves and how busy it is."""

    engine: str
    model: str
    vocab_size: int
    max_context: int
    """Tokens of prompt and response together."""
    eos_token_ids: tuple[int, ...]
    dtype: str
    device: str
    weights_version: int
    running: int
    """Samples that are being generated."""
    waiting: int
    """Samples that wait for a place."""
    logprobs_note: str = LOGPROBS_NOTE
    details: Mapping[str, float] = field(default_factory=dict)
    """Engine-specific numbers, for example the use of the key-value cache."""
