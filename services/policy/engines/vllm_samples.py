"""A request and its samples on their way through vLLM."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from services.policy.engines.in_flight import InFlight
from services.policy.engines.sampling import stream_key
from steersman.errors import InternalError
from steersman.generation import FinishReason, PromptScored, SampleFinished, TokenEvent

if TYPE_CHECKING:
    from vllm.lora.request import LoRARequest
    from vllm.outputs import CompletionOutput
    from vllm.sampling_params import SamplingParams as VllmParams


@dataclass(eq=False)
class Request(InFlight):
    handle: int
    adapter: LoRARequest | None = None
    running: set[str] = field(default_factory=set)
    """vLLM's ids of the samples that have not ended."""


class Sample:
    """One sample, put together from what vLLM sends."""

    def __init__(self, one: Request, prompt_index: int, sample_index: int) -> None:
        self.prompt_index = prompt_index
        self.sample_index = sample_index
        self._request = one
        self._token_ids: list[int] = []
        self._logprobs: list[float] = []
        self._versions: tuple[int, ...] = ()
        self._reason: FinishReason = "cancelled"

    def params(self, limit: int, eos: frozenset[int]) -> VllmParams:
        """What vLLM is asked for.

        Args:
            limit: most tokens of the response.
            eos: the model's end-of-sequence tokens.
        """
        from vllm.sampling_params import RequestOutputKind, StructuredOutputsParams
        from vllm.sampling_params import SamplingParams as VllmParams

        request = self._request.request
        params = request.params
        schema = getattr(request.constraint, "json_schema", None)
        return VllmParams(
            max_tokens=limit,
            min_tokens=min(params.min_new_tokens, limit),
            temperature=params.temperature,
            top_p=params.top_p,
            top_k=params.top_k,
            presence_penalty=params.presence_penalty,
            frequency_penalty=params.frequency_penalty,
            logit_bias=dict(params.logit_bias) or None,
            seed=int(self._key() >> np.uint64(1)),
            stop_token_ids=sorted(eos.union(params.stop_token_ids)),
            ignore_eos=True,  # they are among the stop tokens
            logprobs=params.top_logprobs,
            prompt_logprobs=params.top_logprobs if request.score_prompts and self.sample_index == 0 else None,
            flat_logprobs=True,
            detokenize=False,
            output_kind=RequestOutputKind.DELTA if request.stream else RequestOutputKind.FINAL_ONLY,
            structured_outputs=None if schema is None else StructuredOutputsParams(json=schema),
        )

    def _key(self) -> np.uint64:
        request = self._request.request
        return stream_key(request.params.seed, request.first_prompt + self.prompt_index, self.sample_index)

    def add_prompt(self, flat: Any) -> None:
        """vLLM's log-probabilities of the prompt, which come once; the first token's place is empty."""
        count = self._request.request.params.top_logprobs
        starts = np.array(flat.start_indices[1:], np.int64)
        logprobs, token_ids = np.array(flat.logprobs, np.float32), np.array(flat.token_ids, np.int32)
        top = starts[:, None] + 1 + np.arange(count)
        self._request.deliver(PromptScored(self.prompt_index, logprobs[starts], token_ids[top], logprobs[top]))

    def add(self, output: CompletionOutput, version: int) -> None:
        """`version` is that of streamed tokens; the sample itself has the exact spans that vLLM kept."""
        one = self._request
        if one.adapter is not None:
            version = one.adapter.lora_int_id
        flat: Any = output.logprobs
        for place, token in enumerate(output.token_ids):
            # At every position the drawn token comes first, then the alternatives.
            start, end = flat.start_indices[place], flat.end_indices[place]
            logprob = flat.logprobs[start]
            self._token_ids.append(token)
            self._logprobs.append(logprob)
            if one.request.stream:
                top = tuple(zip(flat.token_ids[start + 1 : end], flat.logprobs[start + 1 : end], strict=True))
                one.deliver(TokenEvent(self.prompt_index, self.sample_index, token, logprob, version, top))
        if output.finish_reason is None:
            return
        if output.finish_reason in ("stop", "length"):
            self._reason = "stop" if output.finish_reason == "stop" else "length"
        elif not one.cancelled:
            raise InternalError(f"vLLM ended a sample with '{output.finish_reason}'; its log tells why")
        if not self._token_ids:
            return
        spans = [int(span.version) for span in output.weight_versions or ()]
        self._versions = tuple(spans) if one.adapter is None else (version,)

    def finished(self) -> SampleFinished:
        return SampleFinished(
            prompt_index=self.prompt_index,
            sample_index=self.sample_index,
            token_ids=np.array(self._token_ids, np.int32),
            logprobs=np.array(self._logprobs, np.float32),
            finish_reason=self._reason,
            weights_versions=self._versions,
        )
