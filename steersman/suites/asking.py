"""Speaks to an OpenAI-compatible endpoint as a customer's client does."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import httpx

from steersman.environment import header_secret_in
from steersman.errors import ConfigError, DeadlineError, InternalError, UnavailableError, from_http
from steersman.net import guarded_sync_client, patiently
from steersman.suites.checks import Spoken

GREEDY, SERVED = "greedy", "served"
"""Decodings beside a temperature: the likeliest answer, and whatever the endpoint does by default."""


@dataclass(frozen=True)
class Decoding:
    """How answers are drawn."""

    name: str
    """`greedy`, `served`, or the temperature."""
    temperature: float | None
    """None: the endpoint's own."""

    @classmethod
    def parse(cls, text: str) -> Self:
        """Raises ConfigError for what is neither `greedy`, `served` nor a temperature from 0 to 2."""
        if text in (GREEDY, SERVED):
            return cls(text, 0.0 if text == GREEDY else None)
        try:
            temperature = float(text)
        except ValueError:
            temperature = -1.0
        if not 0 <= temperature <= 2:
            raise ConfigError(f"--decoding {text}: use greedy, served, or a temperature from 0 to 2")
        return cls(f"{temperature:g}", temperature)

    @property
    def is_greedy(self) -> bool:
        return self.temperature == 0.0


@dataclass(frozen=True)
class Reply:
    """One answer."""

    text: str
    tool_calls: tuple[Mapping[str, Any], ...] = ()
    actions: tuple[str, ...] = ()
    tokens: int = 0
    seconds: float = 0.0


def converse(reply: Callable[[list[dict[str, Any]]], Reply], messages: Sequence[Mapping[str, Any]]) -> Spoken:
    """The whole conversation: the bot also answers where two user messages follow each other."""
    said: list[dict[str, Any]] = []
    replies: list[Reply] = []
    for place, message in enumerate(messages):
        said.append(dict(message))
        last = place + 1 == len(messages)
        if last or (message["role"] == "user" and messages[place + 1]["role"] == "user"):
            replies.append(reply(said))
            if not last:
                said.append({"role": "assistant", "content": replies[-1].text})
    return Spoken(
        answers=tuple(one.text for one in replies),
        tool_calls=replies[-1].tool_calls,
        actions=replies[-1].actions,
        tokens=sum(one.tokens for one in replies),
        seconds=sum(one.seconds for one in replies),
        messages=tuple(said),
    )


class Endpoint:
    """A chat behind `URL/chat/completions`; a context manager."""

    def __init__(
        self, url: str, model: str | None = None, *, key_env: str | None = None, timeout_seconds: float = 300.0
    ) -> None:
        """Args:
        url: ends with the API's version (https://host/v1).
        model: name; None: the first that the endpoint lists.
        key_env: environment variable with the API key; None: none.

        Raises:
            ConfigError: the variable is not set, or no header can carry what it holds.
            UnavailableError: the endpoint does not answer.
        """
        headers = {}
        if key_env is not None:
            headers["authorization"] = f"Bearer {header_secret_in(key_env, '--key-env')}"
        self.url = url.rstrip("/")
        self._client = guarded_sync_client(base_url=f"{self.url}/", timeout=timeout_seconds, headers=headers)
        self.model = model or self._first_model()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self._client.close()

    def reply(
        self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]], decoding: Decoding,
        max_tokens: int, seed: int,
    ) -> Reply:  # fmt: skip
        """The next answer of a conversation; what the endpoint refuses is an error of the tree."""
        body: dict[str, Any] = {"messages": list(messages), "max_tokens": max_tokens}
        if decoding.temperature is not None:
            body["temperature"] = decoding.temperature
        if not decoding.is_greedy:
            body["seed"] = seed
        if tools:
            body["tools"] = list(tools)
        answer, seconds = patiently(lambda: self._timed(body))
        try:
            message = answer["choices"][0]["message"]
            own = answer.get("steersman") or {}
            return Reply(
                text=text_of(message.get("content")) or text_of(message.get("refusal")),
                tool_calls=tuple(_call(one) for one in message.get("tool_calls") or ()),
                actions=tuple(str(one.get("action", "")) for one in own.get("proposed_actions") or ()),
                tokens=int((answer.get("usage") or {}).get("completion_tokens") or 0),
                seconds=seconds,
            )
        except (KeyError, IndexError, TypeError, AttributeError, ValueError, OverflowError):
            raise UnavailableError(
                f"{self.url}: the answer is no chat completion; give an OpenAI-compatible URL"
            ) from None

    def converse(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]],
        decoding: Decoding,
        max_tokens: int,
        seed: int,
    ) -> Spoken:
        """See `converse`."""
        return converse(lambda said: self.reply(said, tools, decoding, max_tokens, seed), messages)

    def post(self, path: str, body: Mapping[str, Any]) -> Any:
        """What the endpoint answers to a body that names no model; what it refuses is an error of the tree."""
        return self._json("POST", path, json={"model": self.model, **body})

    def _timed(self, body: Mapping[str, Any]) -> tuple[Any, float]:
        start = time.monotonic()
        return self.post("chat/completions", body), time.monotonic() - start

    def _first_model(self) -> str:
        try:
            return str(self._json("GET", "models")["data"][0]["id"])
        except (KeyError, IndexError, TypeError):
            raise ConfigError(f"{self.url} lists no model; name one with --model") from None

    def _json(self, method: str, path: str, **request: Any) -> Any:
        try:
            response = self._client.request(method, path, **request)
        except httpx.TimeoutException:
            seconds = self._client.timeout.read
            raise DeadlineError(f"{self.url} does not answer within {seconds:g} s; ask fewer at a time") from None
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise UnavailableError(f"{self.url} does not answer ({type(error).__name__}); check the URL") from None
        if not response.is_success:
            retry = response.headers.get("retry-after")
            raise from_http(response.status_code, f"{self.url}/{path}: {_reason(response)}", retry_after=retry)
        try:
            return response.json()
        except ValueError:
            raise InternalError(f"{self.url}/{path} answers no JSON; the URL must end with the API's version") from None


def text_of(content: Any) -> str:
    """A message's content, whole or in parts; what cannot stand in a file is replaced. Raises TypeError for others."""
    if isinstance(content, list):
        content = "".join(part["text"] for part in content if part.get("type") == "text")
    if not isinstance(content, str | None):
        raise TypeError
    return (content or "").encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _call(call: Any) -> Mapping[str, Any]:
    function = call["function"]
    name, arguments = function["name"], function.get("arguments")
    if not isinstance(name, str):
        raise TypeError
    arguments = arguments if isinstance(arguments, str | None) else json.dumps(arguments)
    return {"function": {"name": text_of(name), "arguments": text_of(arguments)}}


def _reason(response: httpx.Response) -> str:
    try:
        return str(response.json()["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return f"status {response.status_code}"
