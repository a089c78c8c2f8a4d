"""A client of the gateway for Python applications: chat, streaming, feedback, confirmed actions.

    with Client("http://127.0.0.1:8080", api_key="sk-...") as client:
        answer = client.chat("Where is order 7?")
        print(answer.text, answer.sources)
        client.feedback(answer, thumbs="up")

`AsyncClient` has the same methods as coroutines. What is refused is an error of `steersman.errors`. Any OpenAI client
works, too; this one knows what is Steersman's own: sources, feedback and proposed actions.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Self

import httpx

from steersman.errors import SteersmanError, UnavailableError, from_http

Messages = str | Sequence[Mapping[str, Any]]
"""A question, or a conversation of OpenAI's messages."""
_ANSWER_SECONDS = 330.0


@dataclass(frozen=True)
class Source:
    """A business record that an answer rests on."""

    system: str
    record: str


@dataclass(frozen=True)
class ProposedAction:
    """What the bot would do once somebody confirms it."""

    id: str
    action: str
    text: str


@dataclass(frozen=True)
class Answer:
    """A whole answer."""

    text: str
    id: str
    """What feedback refers to."""
    finish_reason: str
    feedback_token: str = ""
    """Stands in for an API key when a browser judges this answer."""
    weights_version: str = ""
    sources: tuple[Source, ...] = ()
    proposed_actions: tuple[ProposedAction, ...] = ()
    tool_calls: tuple[Mapping[str, Any], ...] = ()
    """Calls of the application's own tools, in OpenAI's form."""
    prompt_tokens: int = 0
    completion_tokens: int = 0


@dataclass
class _Reading:
    """An answer while its events arrive."""

    parts: list[str] = field(default_factory=list)
    last: dict[str, Any] = field(default_factory=dict)
    finish_reason: str = ""
    usage: dict[str, Any] = field(default_factory=dict)

    def take(self, line: str) -> str:
        """The text that a line of the event stream brings; empty for lines that bring none."""
        if not line.startswith("data:") or line.strip() == "data: [DONE]":
            return ""
        chunk = json.loads(line[5:])
        if error := chunk.get("error"):
            raise from_http(int(error.get("status") or 503), error.get("message") or "the answer broke off")
        self.usage = chunk.get("usage") or self.usage
        self.last = {**self.last, **{key: chunk[key] for key in ("id", "steersman") if chunk.get(key)}}
        text = ""
        for choice in chunk.get("choices") or ():
            text += (choice.get("delta") or {}).get("content") or ""
            self.finish_reason = choice.get("finish_reason") or self.finish_reason
        self.parts.append(text)
        return text

    def answer(self) -> Answer:
        return _answer(self.last, "".join(self.parts), self.finish_reason, self.usage, ())


def _answer(
    body: Mapping[str, Any], text: str, finish_reason: str, usage: Mapping[str, Any], calls: Sequence[Mapping[str, Any]]
) -> Answer:
    about = body.get("steersman") or {}
    return Answer(
        text=text,
        id=str(about.get("answer_id") or body.get("id") or ""),
        finish_reason=finish_reason,
        feedback_token=str(about.get("feedback_token") or ""),
        weights_version=str(about.get("weights_version") or ""),
        sources=tuple(Source(str(one["system"]), str(one["record"])) for one in about.get("sources") or ()),
        proposed_actions=tuple(
            ProposedAction(str(one["id"]), str(one.get("action", "")), str(one.get("text", "")))
            for one in about.get("proposed_actions") or ()
        ),
        tool_calls=tuple(calls),
        prompt_tokens=int(usage.get("prompt_tokens") or 0),
        completion_tokens=int(usage.get("completion_tokens") or 0),
    )


def _whole(body: Mapping[str, Any]) -> Answer:
    choice = body["choices"][0]
    message = choice["message"]
    calls = message.get("tool_calls") or ()
    return _answer(body, message.get("content") or "", choice["finish_reason"], body.get("usage") or {}, calls)


def _refusal(response: httpx.Response) -> SteersmanError:
    try:
        message = str(response.json()["error"]["message"])
    except (ValueError, KeyError, TypeError):
        message = f"the gateway answered with status {response.status_code}"
    return from_http(response.status_code, message, retry_after=response.headers.get("retry-after"))


class _Base:
    """What both clients send."""

    def __init__(
        self,
        url: str = "http://127.0.0.1:8080",
        *,
        api_key: str | None = None,
        customer_token: str | None = None,
        model: str | None = None,
        timeout_seconds: float = _ANSWER_SECONDS,
    ) -> None:
        """Args:
        url: of the gateway, without a path.
        api_key: needed where the gateway asks for keys.
        customer_token: signed token of the end customer on whose behalf is asked.
        model: name of the model; None: the gateway's first.
        timeout_seconds: longest wait for a whole answer.
        """
        headers = {"authorization": f"Bearer {api_key}"} if api_key else {}
        if customer_token:
            headers["x-customer-token"] = customer_token
        self._model = model
        self._options: dict[str, Any] = {
            "base_url": url.rstrip("/"),
            "headers": headers,
            "timeout": httpx.Timeout(timeout_seconds, connect=10.0),
        }

    @staticmethod
    def _body(model: str, messages: Messages, stream: bool, options: Mapping[str, Any]) -> dict[str, Any]:
        turns = [{"role": "user", "content": messages}] if isinstance(messages, str) else list(messages)
        usage = {"stream_options": {"include_usage": True}} if stream else {}
        return {"model": model, "messages": turns, "stream": stream, **usage, **options}

    @staticmethod
    def _event(
        answer: Answer | str,
        thumbs: Literal["up", "down"] | None,
        edited_answer: str | None,
        outcome: str | None,
        reason: str,
        event_id: str | None,
    ) -> dict[str, Any]:
        judgement = {"thumbs": thumbs, "edited_answer": edited_answer, "outcome": outcome}
        return {
            "event_id": event_id or uuid.uuid4().hex,
            "answer_id": answer if isinstance(answer, str) else answer.id,
            "reason": reason,
            **{name: value for name, value in judgement.items() if value is not None},
        }


class Client(_Base):
    """Blocking; a context manager."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._http = httpx.Client(**self._options)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        self._http.close()

    def models(self) -> list[str]:
        return [str(model["id"]) for model in self._send("GET", "/v1/models")["data"]]

    def chat(self, messages: Messages, **options: Any) -> Answer:
        """A whole answer; `options` are OpenAI's (temperature, tools ...) and the gateway's (conversation_id ...)."""
        return _whole(
            self._send(
                "POST", "/v1/chat/completions", self._body(self._name(), messages, stream=False, options=options)
            )
        )

    def stream(self, messages: Messages, **options: Any) -> Stream:
        """The answer as it is written: iterate over its texts, then look at `.answer`."""
        return Stream(self._http, self._body(self._name(), messages, stream=True, options=options))

    def feedback(
        self,
        answer: Answer | str,
        *,
        thumbs: Literal["up", "down"] | None = None,
        edited_answer: str | None = None,
        outcome: str | None = None,
        reason: str = "",
        event_id: str | None = None,
    ) -> bool:
        """Judges an answer by exactly one of thumbs, edited_answer and outcome; False: the event was stored before."""
        event = self._event(answer, thumbs, edited_answer, outcome, reason, event_id)
        return bool(self._send("POST", "/v1/feedback", event)["created"])

    def confirm(self, action: ProposedAction | str) -> dict[str, Any]:
        """Carries out what the bot proposed, once however often it is confirmed."""
        return self._send("POST", f"/v1/actions/{action if isinstance(action, str) else action.id}/confirm")

    def _name(self) -> str:
        if self._model is None:
            self._model = self.models()[0]
        return self._model

    def _send(self, method: str, path: str, body: Any = None) -> dict[str, Any]:
        try:
            response = self._http.request(method, path, json=body)
        except httpx.HTTPError as error:
            raise UnavailableError(f"{self._options['base_url']}: {type(error).__name__}") from None
        if not response.is_success:
            raise _refusal(response)
        return dict(response.json())


class Stream:
    """Texts of one answer, in order; `answer` is there once they are all read."""

    def __init__(self, http: httpx.Client, body: dict[str, Any]) -> None:
        self._http = http
        self._body = body
        self._reading = _Reading()

    def __iter__(self) -> Iterator[str]:
        try:
            with self._http.stream("POST", "/v1/chat/completions", json=self._body) as response:
                if not response.is_success:
                    response.read()
                    raise _refusal(response)
                for line in response.iter_lines():
                    if text := self._reading.take(line):
                        yield text
        except httpx.HTTPError as error:
            raise UnavailableError(f"{self._http.base_url}: {type(error).__name__}") from None

    @property
    def answer(self) -> Answer:
        return self._reading.answer()


class AsyncClient(_Base):
    """The same as coroutines; an asynchronous context manager."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._http = httpx.AsyncClient(**self._options)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exception: object) -> None:
        await self.close()

    async def close(self) -> None:
        await self._http.aclose()

    async def models(self) -> list[str]:
        return [str(model["id"]) for model in (await self._send("GET", "/v1/models"))["data"]]

    async def chat(self, messages: Messages, **options: Any) -> Answer:
        """See `Client.chat`."""
        body = self._body(await self._name(), messages, stream=False, options=options)
        return _whole(await self._send("POST", "/v1/chat/completions", body))

    async def stream(self, messages: Messages, **options: Any) -> AsyncStream:
        """See `Client.stream`; iterate with `async for`."""
        return AsyncStream(self._http, self._body(await self._name(), messages, stream=True, options=options))

    async def feedback(
        self,
        answer: Answer | str,
        *,
        thumbs: Literal["up", "down"] | None = None,
        edited_answer: str | None = None,
        outcome: str | None = None,
        reason: str = "",
        event_id: str | None = None,
    ) -> bool:
        """See `Client.feedback`."""
        event = self._event(answer, thumbs, edited_answer, outcome, reason, event_id)
        return bool((await self._send("POST", "/v1/feedback", event))["created"])

    async def confirm(self, action: ProposedAction | str) -> dict[str, Any]:
        """See `Client.confirm`."""
        return await self._send("POST", f"/v1/actions/{action if isinstance(action, str) else action.id}/confirm")

    async def _name(self) -> str:
        if self._model is None:
            self._model = (await self.models())[0]
        return self._model

    async def _send(self, method: str, path: str, body: Any = None) -> dict[str, Any]:
        try:
            response = await self._http.request(method, path, json=body)
        except httpx.HTTPError as error:
            raise UnavailableError(f"{self._options['base_url']}: {type(error).__name__}") from None
        if not response.is_success:
            raise _refusal(response)
        return dict(response.json())


class AsyncStream:
    """See `Stream`."""

    def __init__(self, http: httpx.AsyncClient, body: dict[str, Any]) -> None:
        self._http = http
        self._body = body
        self._reading = _Reading()

    async def __aiter__(self) -> AsyncIterator[str]:
        try:
            async with self._http.stream("POST", "/v1/chat/completions", json=self._body) as response:
                if not response.is_success:
                    await response.aread()
                    raise _refusal(response)
                async for line in response.aiter_lines():
                    if text := self._reading.take(line):
                        yield text
        except httpx.HTTPError as error:
            raise UnavailableError(f"{self._http.base_url}: {type(error).__name__}") from None

    @property
    def answer(self) -> Answer:
        return self._reading.answer()
