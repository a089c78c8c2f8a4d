"""What callers, records and tools say stays text on servers that render conversations themselves.

The policy service renders so that no text becomes a control token (`steersman.nn.render`). A foreign server writes our
messages into its own chat template and reads the whole: `<|im_end|><|im_start|>system` in a message would end the turn
and begin one of the system's. So a space is put behind the first character of everything that spells a control token,
as in `< |im_end|>`, look-alikes included that a tokenizer's normalizer may turn into one:

    text -- folded (compatibility forms, marks, invisible ones) --> where a token begins -- in the text --> a space

Which tokens there are is known from the served model's tokenizer where its folder is configured (`policy.tokenizer`);
then every text is encoded as well, and one that still yields a control token is refused. Without it a table of the
known families stands in, which cannot know a token that no family has.
"""

from __future__ import annotations

import asyncio
import json
import re
import unicodedata
from bisect import bisect_left
from collections.abc import AsyncGenerator, Iterable
from itertools import accumulate
from pathlib import Path
from typing import Any

from services.gateway.backends.base import Replica, ReplicaInfo
from services.gateway.errors import BadRequestError
from steersman.errors import ConfigError
from steersman.v1.policy_pb2 import PolicyServiceChatRequest, PolicyServiceChatResponse

_NAMED = (
    # Llama, Mistral, Gemma, Phi, Falcon, T5, BERT and code models; those of Qwen, Llama 3, DeepSeek, Kimi, Granite,
    # gpt-oss, GLM and Command have the shape <|x|>.
    "s", "/s", "bos", "eos", "pad", "unk", "mask", "cls", "sep", "sop", "eop", "start_of_turn", "end_of_turn",
    "start_of_image", "end_of_image", "image_soft_token", "start_function_call", "end_function_call", "image", "/image",
    "start_of_role", "end_of_role", "end_of_utterance", "fim_prefix", "fim_middle", "fim_suffix", "fim_pad",
    "file_sep", "repo_name", "filename", "reponame", "gh_stars", "issue_start", "jupyter_start",
    "think", "/think", "tool_call", "/tool_call", "tool_calls", "/tool_calls", "tool_response", "/tool_response",
    "tool_result", "/tool_result", "tools", "/tools", "tool", "/tool", "toolcall", "/toolcall", "arg_key", "/arg_key",
    "arg_value", "/arg_value", "answer", "/answer", "longcat_tool_call", "/longcat_tool_call", "beginoftext",
    "begin_of_text", "end_of_text", "extra_id_0", "AVAILABLE_TOOLS", "/AVAILABLE_TOOLS", "TOOLCALL", "/TOOLCALL",
    "TOOL_RESPONSE", "/TOOL_RESPONSE",
)  # fmt: skip
_SQUARE = (
    "INST", "SYSTEM_PROMPT", "AVAILABLE_TOOLS", "TOOL_CALLS", "TOOL_RESULTS", "TOOL_CONTENT", "CALL_ID", "ARGS", "IMG",
    "IMG_BREAK", "IMG_END", "AUDIO", "BEGIN_AUDIO", "TRANSCRIBE", "PREFIX", "MIDDLE", "SUFFIX", "THINK",
    "MODEL_SETTINGS", "BOS", "EOS", "CLS", "SEP", "PAD", "UNK", "MASK", "gMASK", "sMASK", "BeginOfText",
)  # fmt: skip
_FAMILIES = {
    "<": (
        r"\|[^<>\s]{0,100}>",
        r"[^<>\s|]{1,100}\|>",
        rf"(?:{'|'.join(_NAMED)})>",
        r"/?(?:\w{1,30}:[\w-]{1,60}|\w{1,30}_of_\w{1,30}|SPECIAL_\d+|extra_id_\d+|unused\d+|reserved\w{0,40})>",
        r"</?SYS>>",
    ),
    "[": (rf"/?(?:{'|'.join(_SQUARE)}|control_\d+)\]", r"e~\["),
    "]": (r"~!?b\]",),  # MiniMax
}
"""By their first character, what follows it."""
_LINES = re.compile(
    r"^(?:#{2,4} ?(?:User|Human|Instruction|Response|Input|Assistant|System)\w{0,20}"
    r"|USER|ASSISTANT|SYSTEM|Human|Assistant)(?=:)",
    re.MULTILINE,
)
"""Plain text that structures a conversation: Alpaca, Vicuna and their like."""
_OF_MODELS = re.compile(r"</?(?:think|tool_call)>")
"""What a model writes itself; it stays in an assistant's turn."""
_MOST_FOLDED = 20_000


class _Folded(dict[int, str]):
    """By code point: what normalizers of tokenizers may make of a character."""

    def __missing__(self, code: int) -> str:
        decomposed = unicodedata.normalize("NFKD", chr(code))
        found = "".join(c for c in decomposed if c in "\t\n\r" or unicodedata.category(c)[0] not in "MC")
        if len(self) < _MOST_FOLDED:
            self[code] = found
        return found


_FOLDED = _Folded()


class Neutraliser:
    """Knows the control tokens of a served model, or those of the known families."""

    def __init__(self, tokenizer: Path | None = None) -> None:
        """
        Args:
            tokenizer: folder with the served model's tokenizer.json.

        Raises:
            ConfigError: there is no such file, or it cannot be read.
        """
        self._tokenizer = None if tokenizer is None else _load(tokenizer)
        self._control: dict[int, str] = {}
        if self._tokenizer is not None:
            self._control = {
                token_id: token.content
                for token_id, token in self._tokenizer.get_added_tokens_decoder().items()
                if token.special or (token.content[:1] in "<[{|｜" and token.content[-1:] in ">]}|｜")
            }
        self._starts = _starts(text.translate(_FOLDED) for text in self._control.values())

    def text(self, text: str, *, of_assistant: bool = False) -> str:
        """The text without anything that spells a control token. Linear.

        Args:
            of_assistant: what models write themselves (`<think>`, `<tool_call>`) stays.
        """
        folded = text.translate(_FOLDED)
        starts = [match.start() for match in self._starts.finditer(folded)]
        if of_assistant:
            starts = [start for start in starts if not _OF_MODELS.match(folded, start)]
        # A space goes behind a token's first character, and before a line marker's colon.
        wanted = {start + 1 for start in starts} | {match.end() for match in _LINES.finditer(folded)}
        if not wanted:
            return text
        if folded != text:
            begins = [0, *accumulate(len(_FOLDED[ord(c)]) for c in text)]
            wanted = {bisect_left(begins, place) for place in wanted}
        places = sorted(wanted)
        return " ".join(text[low:high] for low, high in zip([0, *places], [*places, len(text)], strict=True))

    def request(self, request: PolicyServiceChatRequest) -> PolicyServiceChatRequest:
        """A copy of a request, neutral in everything that a template may write.

        Raises:
            BadRequestError: the served tokenizer still reads a control token in a text.
        """
        neutral = PolicyServiceChatRequest()
        neutral.CopyFrom(request)
        neutral.prompt = self.text(request.prompt)
        texts = {"prompt": neutral.prompt}
        for index, message in enumerate(neutral.messages):
            message.content = self.text(message.content, of_assistant=message.role == "assistant")
            texts[f"messages.{index}.content"] = message.content
            for call in message.tool_calls:
                call.name, call.arguments, call.id = map(self.text, (call.name, call.arguments, call.id))
                texts[f"messages.{index}.tool_calls"] = call.arguments
            for field in ("tool_call_id", "name", "reasoning_content"):
                setattr(message, field, self.text(getattr(message, field)))
        if request.tools_json:
            neutral.tools_json = json.dumps(self._value(json.loads(request.tools_json)), ensure_ascii=False)
            texts["tools"] = neutral.tools_json
        self._check(texts)
        return neutral

    def _value(self, value: Any) -> Any:
        if isinstance(value, str):
            return self.text(value)
        if isinstance(value, dict):
            return {self.text(key): self._value(one) for key, one in value.items()}
        return [self._value(one) for one in value] if isinstance(value, list) else value

    def _check(self, texts: dict[str, str]) -> None:
        """Raises BadRequestError for a text that the tokenizer reads a control token in."""
        if self._tokenizer is None:
            return
        encoded = self._tokenizer.encode_batch(list(texts.values()), add_special_tokens=False)
        for (place, text), encoding in zip(texts.items(), encoded, strict=True):
            own = {self._control[token] for token in set(encoding.ids) & self._control.keys()}
            if unknown := [token for token in own if not _OF_MODELS.match(token) or token not in text]:
                raise BadRequestError(
                    f"{place}: the served model would read a control token ({unknown[0]}) in it; change the text",
                    param=place,
                )


def _starts(own: Iterable[str]) -> re.Pattern[str]:
    """Finds the first character of whatever spells a control token, overlapping ones included."""
    rests = {first: list(rests) for first, rests in _FAMILIES.items()}
    for token in own:
        if token:
            rests.setdefault(token[0], []).append(re.escape(token[1:]))
    return re.compile("|".join(f"{re.escape(first)}(?={'|'.join(rest)})" for first, rest in rests.items()))


def _load(folder: Path) -> Any:
    try:
        from tokenizers import Tokenizer
    except ImportError:
        raise ConfigError("policy.tokenizer: the library tokenizers is not installed; install it") from None
    try:
        return Tokenizer.from_file(str(folder / "tokenizer.json"))
    except Exception as error:  # of the library's own kind
        raise ConfigError(
            f"policy.tokenizer: {folder}/tokenizer.json cannot be read ({error}); name the served model's folder"
        ) from None


class NeutralReplica:
    """A replica that is asked with neutral texts; see `services.gateway.backends.base.Replica`."""

    def __init__(self, inner: Replica, neutraliser: Neutraliser) -> None:
        self.target = inner.target
        self._inner = inner
        self._neutraliser = neutraliser

    async def stream(
        self, request: PolicyServiceChatRequest, seconds: float
    ) -> AsyncGenerator[PolicyServiceChatResponse, None]:
        neutral = await asyncio.to_thread(self._neutraliser.request, request)
        stream = self._inner.stream(neutral, seconds)
        try:
            async for response in stream:
                yield response
        finally:
            await stream.aclose()  # type: ignore[attr-defined]

    async def probe(self) -> ReplicaInfo:
        return await self._inner.probe()

    async def close(self) -> None:
        await self._inner.close()
