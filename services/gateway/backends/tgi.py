"""A replica of text-generation-inference, through `huggingface_hub.InferenceClient`."""

from __future__ import annotations

from collections.abc import AsyncGenerator

import httpx
import httpx2
from huggingface_hub import AsyncInferenceClient
from huggingface_hub.errors import HfHubHTTPError, InferenceTimeoutError

from services.gateway.backends.base import ReplicaInfo
from services.gateway.backends.openai import Translator, request_body
from services.gateway.errors import BadRequestError
from steersman.errors import DeadlineError, PermissionDeniedError, RateLimitedError, UnavailableError
from steersman.net import guard_hub, guarded_client
from steersman.rpc.finish import finish_reason
from steersman.v1.policy_pb2 import PolicyServiceChatRequest, PolicyServiceChatResponse, TokenLogprob

# What TGI's chat route does not know.
_REFUSED = {
    "prompt_token_ids": "prompt",
    "prompt_logprobs": "echo with logprobs",
    "continue_last": "continue_final_message",
    "reasoning_effort": "reasoning_effort",
}
"""Fields of a request, by what callers call them."""
_UNKNOWN = ("n", "top_k", "min_tokens")


class TgiReplica:
    """See `services.gateway.backends.base.Replica`."""

    def __init__(self, url: str, key: str, connect_seconds: float) -> None:
        self.target = url.rstrip("/")
        self._key = key or None
        self._http = guarded_client(timeout=connect_seconds)
        guard_hub()

    async def stream(
        self, request: PolicyServiceChatRequest, seconds: float
    ) -> AsyncGenerator[PolicyServiceChatResponse, None]:
        if request.n > 1:
            raise BadRequestError("n: this engine gives one choice at a time", param="n", code="unsupported")
        for name in ("presence_penalty", "frequency_penalty", "logit_bias"):
            if getattr(request.sampling, name):
                raise BadRequestError(f"{name}: this engine cannot do it; leave it out", param=name, code="unsupported")
        for name, param in _REFUSED.items():
            if getattr(request, name):
                raise BadRequestError(
                    f"{param}: this engine cannot do it; leave it out", param=param, code="unsupported"
                )
        client = AsyncInferenceClient(model=self.target, token=self._key, timeout=seconds)
        try:
            stream = self._complete(client, request) if request.prompt else self._chat(client, request)
            async for response in stream:
                yield response
        except PermissionDeniedError as error:  # of the guard: the operator's to mend, not the caller's
            raise UnavailableError(error.message) from None
        except (InferenceTimeoutError, httpx2.ReadTimeout):
            raise DeadlineError(f"{self.target} took longer than {seconds:g} s") from None
        except HfHubHTTPError as error:
            status = error.response.status_code if error.response is not None else 500
            if status == 429:
                raise RateLimitedError("The engine is busy") from None
            if status < 500:
                raise BadRequestError(f"The engine refuses the request: {error.server_message or status}") from None
            raise UnavailableError(f"{self.target} failed with status {status}") from None
        except (httpx2.HTTPError, OSError) as error:
            raise UnavailableError(f"{self.target} failed ({type(error).__name__})") from None
        finally:
            await client.close()

    async def _chat(
        self, client: AsyncInferenceClient, request: PolicyServiceChatRequest
    ) -> AsyncGenerator[PolicyServiceChatResponse, None]:
        body = request_body(request)
        for name in _UNKNOWN:
            body.pop(name, None)
        translator = Translator()
        async for chunk in await client.chat_completion(**body):
            for translated in translator.take(chunk):
                yield translated
        for translated in translator.end():
            yield translated

    async def _complete(
        self, client: AsyncInferenceClient, request: PolicyServiceChatRequest
    ) -> AsyncGenerator[PolicyServiceChatResponse, None]:
        sampling, tokens = request.sampling, 0
        greedy = sampling.temperature == 0
        async for part in await client.text_generation(
            request.prompt,
            stream=True,
            details=True,
            max_new_tokens=sampling.max_new_tokens,
            do_sample=not greedy,
            temperature=None if greedy else sampling.temperature,
            top_p=sampling.top_p if 0 < sampling.top_p < 1 else None,
            top_k=sampling.top_k or None,
            seed=sampling.seed % 2**63,
            stop=list(request.stop) or None,
        ):
            tokens += 1
            response = PolicyServiceChatResponse(completion_tokens=tokens)
            if not part.token.special:
                response.delta = part.token.text
                response.tokens.append(
                    TokenLogprob(
                        token_id=part.token.id,
                        text=part.token.text,
                        logprob=part.token.logprob or 0.0,
                        raw=part.token.text.encode(),
                    )
                )
            if part.details is not None:
                response.finish_reason = finish_reason(part.details.finish_reason)
                response.prompt_tokens = part.details.input_length or 0
            yield response

    async def probe(self) -> ReplicaInfo:
        try:
            (await self._http.get(f"{self.target}/health")).raise_for_status()
            info = await self._http.get(f"{self.target}/info")
            info.raise_for_status()
            said = info.json()
        except (httpx.HTTPError, ValueError) as error:
            raise UnavailableError(f"{self.target}: {type(error).__name__}") from None
        return ReplicaInfo(str(said.get("model_id", "")), 0, "tgi", int(said.get("max_total_tokens") or 0))

    async def close(self) -> None:
        await self._http.aclose()
