"""A replica that speaks OpenAI's API: vLLM, or any other server of that kind."""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import AsyncGenerator, Mapping
from typing import Any

import httpx

from services.gateway.backends.base import ReplicaInfo
from services.gateway.errors import BadRequestError
from steersman.errors import (
    DeadlineError,
    InternalError,
    PermissionDeniedError,
    RateLimitedError,
    SteersmanError,
    UnavailableError,
)
from steersman.net import guarded_client
from steersman.rpc.finish import finish_reason
from steersman.v1 import common_pb2
from steersman.v1.policy_pb2 import (
    PolicyServiceChatRequest,
    PolicyServiceChatResponse,
    TokenAlternative,
    TokenLogprob,
)

_SCORES_AT_ONCE = 256


class OpenAIReplica:
    """See `services.gateway.backends.base.Replica`."""

    def __init__(self, url: str, model: str, key: str, connect_seconds: float) -> None:
        self.target = url
        self._model = model
        headers = {"authorization": f"Bearer {key}"} if key else {}
        self._client = guarded_client(
            base_url=url.rstrip("/").removesuffix("/v1") + "/v1/",
            headers=headers,
            timeout=httpx.Timeout(connect_seconds),
            transport=httpx.AsyncHTTPTransport(limits=httpx.Limits(max_connections=None)),
        )

    async def stream(
        self, request: PolicyServiceChatRequest, seconds: float
    ) -> AsyncGenerator[PolicyServiceChatResponse, None]:
        path = "completions" if request.prompt or request.prompt_token_ids else "chat/completions"
        body = {"model": self._model, **request_body(request)}
        if request.prompt_logprobs:
            body = {name: value for name, value in body.items() if name not in ("stream", "stream_options")}
            body["echo"] = True
        translator = Translator()
        timeout = httpx.Timeout(seconds, connect=self._client.timeout.connect)
        try:
            async with self._client.stream("POST", path, json=body, timeout=timeout) as response:
                if response.status_code != 200:
                    raise _refusal(response.status_code, _message(await response.aread()))
                if request.prompt_logprobs:
                    for scored in await asyncio.to_thread(_scored, request, await response.aread()):
                        yield scored
                    return
                async for line in response.aiter_lines():
                    if not line.startswith("data:") or line.endswith("[DONE]"):
                        continue
                    for translated in translator.take(json.loads(line[5:])):
                        yield translated
        except PermissionDeniedError as error:  # of the guard: the operator's to mend, not the caller's
            raise UnavailableError(error.message) from None
        except httpx.TimeoutException as error:
            if isinstance(error, httpx.ConnectTimeout):
                raise UnavailableError(f"{self.target} cannot be reached") from None
            raise DeadlineError(f"{self.target} took longer than {seconds:g} s") from None
        except (httpx.HTTPError, ValueError) as error:
            raise UnavailableError(f"{self.target} failed ({type(error).__name__})") from None
        for translated in translator.end():
            yield translated

    async def probe(self) -> ReplicaInfo:
        try:
            response = await self._client.get("models")
            response.raise_for_status()
            models = {model["id"]: model for model in response.json()["data"]}
        except (httpx.HTTPError, ValueError, KeyError, TypeError) as error:
            raise UnavailableError(f"{self.target}: {type(error).__name__}") from None
        if self._model not in models:
            raise UnavailableError(f"{self.target} does not serve '{self._model}' but {sorted(models)}")
        return ReplicaInfo(self._model, 0, "openai", models[self._model].get("max_model_len") or 0)

    async def close(self) -> None:
        await self._client.aclose()


def request_body(request: PolicyServiceChatRequest) -> dict[str, Any]:
    """The request in OpenAI's form, with vLLM's additions `top_k` and `min_tokens` where they are set."""
    sampling = request.sampling
    body: dict[str, Any] = {
        "stream": True,
        "stream_options": {"include_usage": True},
        "max_tokens": sampling.max_new_tokens,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        # Servers read it as a signed integer.
        "seed": sampling.seed % 2**63,
        "n": request.n or 1,
    }
    if request.stop:
        body["stop"] = list(request.stop)
    if sampling.top_k:
        body["top_k"] = sampling.top_k
    if sampling.presence_penalty:
        body["presence_penalty"] = sampling.presence_penalty
    if sampling.frequency_penalty:
        body["frequency_penalty"] = sampling.frequency_penalty
    if sampling.logit_bias:
        body["logit_bias"] = {str(token): bias for token, bias in sampling.logit_bias.items()}
    if sampling.min_new_tokens:
        body["min_tokens"] = sampling.min_new_tokens
    if request.prompt or request.prompt_token_ids:
        return {**body, "prompt": request.prompt or list(request.prompt_token_ids), "logprobs": request.top_logprobs}
    body |= {"messages": [_message_body(message) for message in request.messages], "logprobs": True}
    if request.top_logprobs:
        body["top_logprobs"] = request.top_logprobs
    if request.continue_last:
        body |= {"continue_final_message": True, "add_generation_prompt": False}
    if request.reasoning_effort:
        body["reasoning_effort"] = request.reasoning_effort
    if request.tools_json:
        body["tools"] = json.loads(request.tools_json)
    if request.json_schema:
        schema = {"name": "answer", "schema": json.loads(request.json_schema), "strict": True}
        body["response_format"] = {"type": "json_schema", "json_schema": schema}
    return body


def _message_body(message: common_pb2.Message) -> dict[str, Any]:
    body: dict[str, Any] = {"role": message.role, "content": message.content}
    if message.tool_calls:
        body["tool_calls"] = [
            {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
            for call in message.tool_calls
        ]
    if message.reasoning_content:
        body["reasoning_content"] = message.reasoning_content
    if message.tool_call_id:
        body["tool_call_id"] = message.tool_call_id
    return body


def _scored(request: PolicyServiceChatRequest, body: bytes) -> list[PolicyServiceChatResponse]:
    """The prompt's tokens, then the answer, of a completion that begins with its prompt.

    Raises:
        UnavailableError: it is none.
    """
    try:
        whole = json.loads(body)
        (choice,) = whole["choices"]
        count, made = (_count(whole["usage"][name]) for name in ("prompt_tokens", "completion_tokens"))
        tokens = _tokens(choice["logprobs"])
        reason = finish_reason(choice["finish_reason"])
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UnavailableError(f"The engine sent no completion with its prompt ({type(error).__name__})") from None
    if len(tokens) < count:
        raise UnavailableError(f"The engine told {len(tokens)} of the prompt's {count} tokens")
    if count:
        tokens[0].logprob = 0.0
    of_ids = "".join(token.text for token in tokens[:count]) if request.prompt_token_ids else ""
    found = [
        PolicyServiceChatResponse(
            prompt_logprobs=tokens[begin : min(begin + _SCORES_AT_ONCE, count)], prompt_tokens=count,
            prompt_text="" if begin else of_ids,
        )
        for begin in range(0, count, _SCORES_AT_ONCE)
    ]  # fmt: skip
    end = PolicyServiceChatResponse(
        delta="".join(token.text for token in tokens[count:]), tokens=tokens[count:], finish_reason=reason,
        prompt_tokens=count, completion_tokens=made,
    )  # fmt: skip
    return [*found, end]


class Translator:
    """From chunks in OpenAI's form to responses of the contract.

    A chunk's finish reason is held back until the end: usage comes after it, and so may tool calls.
    """

    def __init__(self) -> None:
        self._calls: dict[int, dict[int, dict[str, str]]] = {}
        self._finish: dict[int, common_pb2.FinishReason] = {}
        self._tokens: dict[int, int] = {}
        self._prompt_tokens = self._thoughts = 0

    def take(self, chunk: Any) -> list[PolicyServiceChatResponse]:
        """What a chunk brings.

        Raises:
            InternalError: the engine broke off.
            UnavailableError: it sent something else than a chunk.
        """
        try:
            return self._read(chunk)
        except (AttributeError, KeyError, TypeError, ValueError, OverflowError) as error:
            raise UnavailableError(f"The engine sent no chunk of a completion ({type(error).__name__})") from None

    def _read(self, chunk: Mapping[str, Any]) -> list[PolicyServiceChatResponse]:
        if error := chunk.get("error"):
            raise InternalError(f"The engine broke off: {_message(json.dumps({'error': error}).encode())}")
        usage = chunk.get("usage") or {}
        self._prompt_tokens = _count(usage.get("prompt_tokens") or self._prompt_tokens)
        details = usage.get("completion_tokens_details") or {}
        self._thoughts = _count(details.get("reasoning_tokens") or self._thoughts)
        found = []
        for choice in chunk.get("choices") or []:
            index = _count(choice.get("index") or 0)
            delta = choice.get("delta") or {}
            text = (delta.get("content") if delta else choice.get("text")) or ""
            # vLLM's name now and the one it had, which is DeepSeek's.
            thought = delta.get("reasoning") or delta.get("reasoning_content") or ""
            tokens = _tokens(choice.get("logprobs"))
            self._tokens[index] = self._tokens.get(index, 0) + (len(tokens) or bool(text or thought))
            for call in delta.get("tool_calls") or []:
                self._take_call(index, call)
            if reason := choice.get("finish_reason"):
                self._finish[index] = finish_reason(reason)
            if text or thought or tokens:
                found.append(
                    PolicyServiceChatResponse(
                        choice_index=index,
                        delta=text,
                        reasoning_delta=thought,
                        tokens=tokens,
                        completion_tokens=self._tokens[index],
                    )
                )
        return found

    def end(self) -> list[PolicyServiceChatResponse]:
        """The last response of every choice."""
        return [
            PolicyServiceChatResponse(
                choice_index=index,
                finish_reason=reason,
                tool_calls=[common_pb2.ToolCall(**call) for call in self._calls.get(index, {}).values()],
                prompt_tokens=self._prompt_tokens,
                completion_tokens=self._tokens.get(index, 0),
                reasoning_tokens=min(self._thoughts, self._tokens.get(index, 0)) if len(self._finish) == 1 else 0,
            )
            for index, reason in sorted(self._finish.items())
        ]

    def _take_call(self, choice: int, call: Mapping[str, Any]) -> None:
        calls = self._calls.setdefault(choice, {})
        known = calls.setdefault(call.get("index") or 0, {"id": "", "name": "", "arguments": ""})
        function = call.get("function") or {}
        known["id"] = str(call.get("id") or known["id"])
        known["name"] = str(function.get("name") or known["name"])
        piece = function.get("arguments") or ""
        (known["id"] + known["name"] + piece).encode()  # half a character ends here, not where the call is sent on
        known["arguments"] += piece


def _count(value: Any) -> int:
    """A number that the contract can carry; ValueError for anything else."""
    if type(value) is not int or not 0 <= value < 2**31:
        raise ValueError(f"{value!r} is no count")
    return value


def _raw(token: Mapping[str, Any]) -> bytes:
    """A token's bytes; ValueError or TypeError for what are none: of a number, `bytes` would make as many zeros."""
    given = token.get("bytes")
    if given is not None and not isinstance(given, list):
        raise ValueError(f"bytes is a {type(given).__name__} and no list of numbers")
    return bytes(given or token["token"].encode())


def _tokens(logprobs: Mapping[str, Any] | None) -> list[TokenLogprob]:
    if not logprobs:
        return []
    if content := logprobs.get("content"):
        return [
            TokenLogprob(
                text=token["token"],
                logprob=_finite(token["logprob"]),
                raw=_raw(token),
                top=[
                    TokenAlternative(text=other["token"], logprob=_finite(other["logprob"]))
                    for other in token.get("top_logprobs") or []
                ],
            )
            for token in content
        ]
    texts, values = logprobs.get("tokens") or [], logprobs.get("token_logprobs") or []
    tops = logprobs.get("top_logprobs") or [None] * len(texts)
    return [
        TokenLogprob(
            text=text,
            logprob=_finite(value),
            raw=text.encode(),
            top=[TokenAlternative(text=other, logprob=_finite(lp)) for other, lp in (top or {}).items()],
        )
        for text, value, top in zip(texts, values, tops, strict=False)
    ]


def _finite(value: float | None) -> float:
    """JSON has no infinity; servers send null or a very small number."""
    return value if value is not None and math.isfinite(value) else -9999.0


def _message(body: bytes) -> str:
    try:
        found = json.loads(body)
        error = found.get("error", found)
        return str(error.get("message", error) if isinstance(error, dict) else error)[:500]
    except (ValueError, AttributeError):
        return "no reason given"


def _refusal(status: int, message: str) -> SteersmanError:
    if status == 429:
        return RateLimitedError(f"The engine is busy: {message}")
    if status in (401, 403):
        # The gateway's own key is wrong; the caller cannot mend that.
        return UnavailableError("The engine refuses the gateway's key; see policy.apiKeyEnv")
    if status < 500:
        return BadRequestError(f"The engine refuses the request: {message}")
    return UnavailableError(f"The engine failed: {message}")
