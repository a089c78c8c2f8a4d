"""A conversation as token ids: control tokens come from the chat template, everything else is text.

    messages -- marked --> chat template --> text -- control tokens by id, the rest by the tokenizer's model --> ids

What a caller, a record, a tool or a data file says must never become a token that structures a conversation, whether
it is written out (`<|im_end|>`), made by a normalizer from look-alikes, or put together with the template's own text.

1. Every string that goes into the template is marked: a character that occurs nowhere is put into each control token
   that the string spells, and at an end that could complete one together with the template's text.
2. In what the template renders, the control tokens that are still whole are therefore its own.
3. They are encoded by a copy of the tokenizer in which every control token has a secret name. Their own names mean
   nothing there, before normalization and after it, so the marks can go before the text is encoded.

All else is the tokenizer's own: text without control tokens gives the ids of `apply_chat_template(tokenize=True)`.

Some templates mark turns with plain text (`[INST]`, `<<SYS>>`, `USER:`), which no tokenizer can tell from the same text
in a message. There a space is put into the marker in the message: `[ INST]`.
"""

from __future__ import annotations

import contextlib
import json
import re
import weakref
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from typing import Any

from transformers import PreTrainedTokenizerBase

from steersman.errors import ConfigError, DataError
from steersman.nn.control_tokens import ControlTokens, Encoder, longest_of, structures

Messages = Sequence[Mapping[str, Any]]
Tools = Sequence[Mapping[str, Any]] | None
ROLES = ("system", "developer", "user", "assistant", "tool")

_MARKS = [chr(code) for code in (*range(0xFDD0, 0xFDF0), *range(0xE000, 0xF900))]
"""Characters that no text should hold: noncharacters first, private use then."""
_SCHEMA_KEYS = frozenset(
    ("type", "function", "name", "description", "parameters", "properties", "required", "items", "enum", "id",
     "arguments", "tool_calls", "content", "role", "text", "return", "strict", "default")
)  # fmt: skip
"""Of tool definitions and calls: templates look them up, so they stay as they are; they are nobody's text."""
_TEXT_MARKERS = re.compile(
    r"\[/?[A-Z][A-Z_]+\]"  # Llama 2, Mistral
    r"|<</?[A-Z]+>>"
    r"|<[|｜][^<>\s'\"]+[|｜]>"
    r"|</?(?:think|tool\w*|\w+_of_\w+)>"
    r"|#{2,4} (?:User|Human|Instruction|Response|Input|Assistant|System)\w*:"  # Alpaca
    r"|\b(?:USER|ASSISTANT|SYSTEM|Human|User|Assistant|System): "  # Vicuna
)
_OWN_MARKERS = re.compile(r"</?(?:think|tool_call)>")
"""What a model writes itself; they stay in an assistant's turn where they are plain text."""
_PROBE = "steersman probe"
_THOUGHT = re.compile(r"\s*<think>(.*?)</think>\s*", re.DOTALL)


def prompt_ids(
    tokenizer: PreTrainedTokenizerBase,
    messages: Messages,
    tools: Tools = None,
    *,
    options: Mapping[str, Any] | None = None,
    beginning: str = "",
) -> list[int]:
    """Token ids of a conversation that waits for an answer, generation prompt included.

    Args:
        options: variables of the chat template in this rendering, beside those of the tokenizer.
        beginning: of the answer, to be continued.

    Raises:
        DataError: the template refuses the conversation.
        ConfigError: there is no template, or a tokenizer that cannot be rendered for.
    """
    renderer = _renderer(tokenizer)
    mark = renderer.mark_for([*messages, {"content": beginning}], tools)
    text = renderer.text(messages, tools, mark, generation_prompt=True, options=options)
    if beginning:
        text += _end_of_thought(text) + renderer.marked(beginning, mark)
    return renderer.encode(text, mark)


def answer_prefix(
    tokenizer: PreTrainedTokenizerBase,
    messages: Messages,
    tools: Tools = None,
    *,
    options: Mapping[str, Any] | None = None,
    begun: bool = False,
) -> str:
    """What the chat template writes between a conversation and its answer, and nothing that anybody said.

    Args:
        begun: the answer has a beginning, which is no thought.
    """
    renderer = _renderer(tokenizer)
    mark = renderer.mark_for(messages, tools)
    text = renderer.text(messages, tools, mark, generation_prompt=True, options=options)
    asked = renderer.text(messages, tools, mark, generation_prompt=False, options=options)
    same = next((at for at, (one, other) in enumerate(zip(text, asked, strict=False)) if one != other), len(asked))
    return text[same:] + (_end_of_thought(text) if begun else "")


def _end_of_thought(text: str) -> str:
    """What ends the thought that a generation prompt begins; empty where it begins none."""
    return "\n</think>\n\n" if text.rstrip().endswith("<think>") else ""


def conversation_ids(tokenizer: PreTrainedTokenizerBase, messages: Messages, tools: Tools = None) -> list[int]:
    """Token ids of a finished conversation, whatever its last turn is; errors as `prompt_ids`."""
    renderer = _renderer(tokenizer)
    mark = renderer.mark_for(messages, tools)
    return renderer.encode(renderer.text(messages, tools, mark, generation_prompt=False), mark)


def turn_ids(
    tokenizer: PreTrainedTokenizerBase, prompt: Messages, answer: Mapping[str, Any], tools: Tools = None
) -> tuple[list[int], list[int]]:
    """(prompt, answer) as token ids; the answer with everything that the template writes behind it.

    The prompt has the ids of `prompt_ids`, and the answer those that it has behind them: a tokenizer that begins every
    text with a space puts none between the two.

    Raises:
        DataError: as `prompt_ids`, or the template does not render prompt plus answer as a continuation of the prompt.
    """
    renderer = _renderer(tokenizer)
    messages = [*prompt, answer]
    mark = renderer.mark_for(messages, tools)
    start = renderer.text(prompt, tools, mark, generation_prompt=True)
    whole = renderer.text(messages, tools, mark, generation_prompt=False)
    rest = whole[len(start) :] if whole.startswith(start) else renderer.behind_thought(start, whole, answer, mark)
    for name in _names_of(answer.get("tool_calls") or ()):
        if name not in rest.replace(mark, ""):
            raise DataError(
                f"the chat template does not write the answer's call of {name!r}; use a template that knows tool_calls"
            )
    return renderer.split(start, rest, mark)


def closing_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Control tokens with which the template ends the assistant's turn: that of an answer, that of a call of a tool.

    Where it writes none, the token that begins the next turn is the end (GLM).
    """
    renderer = _renderer(tokenizer)
    question, answer = {"role": "user", "content": "?"}, {"role": "assistant", "content": _PROBE}
    found = renderer.control_behind(_PROBE, [question, answer])
    found = found or renderer.control_behind(_PROBE, [question, answer, question])
    call = {"role": "assistant", "tool_calls": [{"id": "probe1234", "function": {"name": "probe", "arguments": {}}}]}
    try:
        last = renderer.control_behind("probe", [question, call])[-1:]
    except DataError:
        last = []  # the template knows no calls
    return [*found[:1], *(token for token in last if renderer.structures(token))]


def text_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Token ids of a text that is no conversation, with the special tokens that the tokenizer itself puts around it."""
    return _renderer(tokenizer).encoder.ids(text, add_special_tokens=True)


def set_template_options(tokenizer: PreTrainedTokenizerBase, options: Mapping[str, Any]) -> None:
    """Variables that the chat template gets in every rendering (`enable_thinking`); saved with the tokenizer."""
    if options:
        tokenizer.init_kwargs["template_options"] = {**template_options(tokenizer), **options}


def template_options(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    return dict(getattr(tokenizer, "init_kwargs", {}).get("template_options") or {})


def plain_message(message: Mapping[str, Any]) -> dict[str, Any]:
    """A message as templates take it: no nulls, content a text, the arguments of a call an object.

    Raises:
        DataError: a role that is none.
    """
    plain = {key: value for key, value in message.items() if value is not None}
    if plain.get("role") not in ROLES:
        raise DataError(f"role {plain.get('role')!r} is none of {', '.join(ROLES)}")
    plain.setdefault("content", "")
    if "tool_calls" in plain:
        plain["tool_calls"] = [_plain_call(call) for call in plain["tool_calls"]]
    return plain


def _plain_call(call: Mapping[str, Any]) -> dict[str, Any]:
    function = call.get("function") or call
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise DataError("tool_calls: a call has no function.name; write it in OpenAI's form")
    arguments = function.get("arguments") or {}
    if isinstance(arguments, str):
        with contextlib.suppress(ValueError, RecursionError):  # a model may have written what is not JSON
            arguments = json.loads(arguments)
    found = {"type": "function", "function": {"name": function["name"], "arguments": arguments}}
    return {"id": call["id"], **found} if call.get("id") else found


def _with_text_arguments(message: Mapping[str, Any]) -> dict[str, Any]:
    calls = [
        {**call, "function": {**call["function"], "arguments": json.dumps(call["function"]["arguments"])}}
        for call in message.get("tool_calls", ())
    ]
    return {**message, "tool_calls": calls} if calls else dict(message)


def _names_of(calls: Iterable[Mapping[str, Any]]) -> list[str]:
    return [(call.get("function") or call)["name"] for call in calls]


def _renderer(tokenizer: PreTrainedTokenizerBase) -> Renderer:
    """The tokenizer's renderer, made anew when its tokens or its template have changed."""
    found = _RENDERERS.get(tokenizer)
    if found is None or found.state != _state_of(tokenizer):
        found = Renderer(tokenizer)
        _RENDERERS[tokenizer] = found
    return found


def _state_of(tokenizer: PreTrainedTokenizerBase) -> tuple[Any, ...]:
    return (
        tokenizer.chat_template,
        len(tokenizer),
        tuple(tokenizer.all_special_ids),
        len(tokenizer.added_tokens_decoder),
    )


class Renderer:
    """Chat template and encoder of one tokenizer; see the module's docstring."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer: Any = weakref.proxy(tokenizer)
        self.state = _state_of(tokenizer)
        self._source = template_source(tokenizer)
        self._control = ControlTokens.of(tokenizer, self._source)
        markers = set(_TEXT_MARKERS.findall(self._source)) - set(self._control.ids)
        self._markers = re.compile(longest_of(markers)) if markers else None
        own = {marker for marker in markers if not _OWN_MARKERS.fullmatch(marker)}
        self._markers_of_assistant = re.compile(longest_of(own)) if own else None

    @cached_property
    def encoder(self) -> Encoder:
        """Made when it is first needed."""
        backend = getattr(self._tokenizer, "backend_tokenizer", None)
        if backend is None:
            raise ConfigError(
                f"{type(self._tokenizer).__name__} has no fast tokenizer, without which texts cannot be kept apart "
                "from control tokens; add tokenizer.json to the model's folder"
            )
        return Encoder.under_secret_names(backend, self._control.ids)

    def mark_for(self, messages: Messages, tools: Tools) -> str:
        """A character that occurs neither in the conversation nor in the template."""
        everything = json.dumps([list(map(dict, messages)), tools, self._source], ensure_ascii=False, default=str)
        return next(mark for mark in _MARKS if mark not in everything)

    def text(
        self,
        messages: Messages,
        tools: Tools,
        mark: str,
        *,
        generation_prompt: bool,
        options: Mapping[str, Any] | None = None,
    ) -> str:
        """What the template renders of the marked conversation."""
        if not self._source:
            raise ConfigError("the tokenizer has no chat template; add chat_template.jinja to the model's folder")
        plain = [plain_message(message) for message in messages]
        marked = [self._marked_message(message, mark) for message in plain]
        if self._takes_parts:
            for message in marked:
                message["content"] = [{"type": "text", "text": message["content"]}]
        variables = {
            "tools": [self._marked(tool, mark) for tool in tools] if tools else None,
            "add_generation_prompt": generation_prompt,
            **template_options(self._tokenizer),
            **(options or {}),
        }
        try:
            try:
                return self._applied(marked, variables)
            except TypeError:  # some templates (DeepSeek V3) want the arguments of a call as text
                return self._applied([_with_text_arguments(message) for message in marked], variables)
        except Exception as error:  # jinja raises whatever a template asks for
            reason = str(error).replace(mark, "")
            raise DataError(
                f"the chat template refuses the conversation ({reason}); mend its roles or their order"
            ) from None

    def _applied(self, messages: list[dict[str, Any]], options: Mapping[str, Any]) -> str:
        return str(self._tokenizer.apply_chat_template(messages, tokenize=False, **options))

    @cached_property
    def _takes_parts(self) -> bool:
        """Content must be a list of parts: templates of models that also see."""
        for content, answer in ((_PROBE, False), ([{"type": "text", "text": _PROBE}], True)):
            try:
                if _PROBE in self._applied([{"role": "user", "content": content}], template_options(self._tokenizer)):
                    return answer
            except Exception:  # jinja raises whatever a template asks for
                continue
        return False

    def marked(self, text: str, mark: str) -> str:
        """A text of the assistant's, of which nothing is a control token any more."""
        return self._marked_text(text, mark, self._markers_of_assistant)

    def encode(self, text: str, mark: str) -> list[int]:
        """Token ids of what the template rendered."""
        return self.encoder.ids(self._named(text, mark))

    def split(self, start: str, rest: str, mark: str) -> tuple[list[int], list[int]]:
        """Token ids of `start` and of the `rest` behind it."""
        before, together = self.encode(start, mark), self.encode(start + rest, mark)
        if together[: len(before)] == before:
            return before, together[len(before) :]
        # Text of both sides is one token. A model generates behind the tokens of `start`, so they stay apart: by a
        # token that nothing merges with, or behind a line end where the tokenizer begins every piece with a space.
        encoder, named = self.encoder, self._named(rest, mark)
        apart = encoder.ids(self._named(start, mark) + encoder.boundary + named)
        apart = apart[apart.index(encoder.boundary_id) + 1 :]
        line_end, behind = encoder.ids("\n"), encoder.ids("\n" + named)
        if behind[: len(line_end)] == line_end and len(behind) - len(line_end) < len(apart):
            apart = behind[len(line_end) :]
        return before, apart

    def behind_thought(self, start: str, whole: str, answer: Mapping[str, Any], mark: str) -> str:
        """What follows a generation prompt that opens a thought, where the template leaves thoughts out of an answer.

        Raises:
            DataError: the answer is no continuation for another reason.
        """
        stem, opened, _ = start.rpartition("<think>")
        if not opened or not whole.startswith(stem):
            raise DataError(
                "the chat template renders the prompt otherwise once the answer follows, so what is trained would "
                "differ from what is generated; use a template whose generation prompt begins the assistant's turn"
            )
        rest = whole[len(stem) :]
        if rest.startswith("<think>"):
            return rest.removeprefix("<think>").lstrip("\n")
        message = plain_message(answer)
        said = _THOUGHT.match(message["content"])
        thought = message.get("reasoning_content") or (said[1] if said else "")
        return f"{self._marked(thought.strip(), mark)}\n</think>\n\n{rest.lstrip()}"

    def control_behind(self, text: str, messages: Messages) -> list[int]:
        """Control tokens behind the last occurrence of `text` in a rendered conversation."""
        mark = self.mark_for(messages, None)
        tail = self.text(messages, None, mark, generation_prompt=False).rpartition(text)[2]
        return self._control.found_in(tail)

    def structures(self, token_id: int) -> bool:
        """The control token is special or looks like it, unlike `</tool_call>`, which may come several times."""
        return structures(self._tokenizer.added_tokens_decoder[token_id])

    def _named(self, text: str, mark: str) -> str:
        # A template may have written the mark as JSON does.
        named = self._control.renamed(text, mark, self.encoder.names)
        return named.replace(mark, "").replace(f"\\u{ord(mark):04x}", "")

    def _marked_message(self, message: dict[str, Any], mark: str) -> dict[str, Any]:
        assistant = message["role"] == "assistant"
        kept = ""
        if assistant and (thought := _THOUGHT.match(message["content"])) and "</think>" in self._source:
            # Thoughts stand in a field of their own; templates that do not know it take them out of the text.
            if "reasoning_content" in self._source:
                message.setdefault("reasoning_content", thought[1].strip("\n"))
                message["content"] = message["content"][thought.end() :]
            else:
                kept = f"<think>{self._marked(thought[1], mark)}</think>"
                message["content"] = message["content"][thought.end() :]
        if "reasoning_content" in message:
            message.setdefault("thinking", message["reasoning_content"])  # gpt-oss
        markers = self._markers_of_assistant if assistant else self._markers
        marked = {key: value if key == "role" else self._marked(value, mark, markers) for key, value in message.items()}
        marked["content"] = kept + marked["content"]
        return marked

    def _marked(self, value: Any, mark: str, markers: re.Pattern[str] | None = None) -> Any:
        """The value with every string in it marked, keys as well."""
        if isinstance(value, str):
            return self._marked_text(value, mark, markers)
        if isinstance(value, Mapping):
            return {
                key if key in _SCHEMA_KEYS else self._marked(key, mark, markers): self._marked(one, mark, markers)
                for key, one in value.items()
            }
        if isinstance(value, (list, tuple)):
            return [self._marked(one, mark, markers) for one in value]
        return value

    def _marked_text(self, text: str, mark: str, markers: re.Pattern[str] | None) -> str:
        if markers is not None:
            text = markers.sub(lambda match: _spaced(match[0]), text)
        return self._control.broken(text, mark)


_RENDERERS: weakref.WeakKeyDictionary[PreTrainedTokenizerBase, Renderer] = weakref.WeakKeyDictionary()


def template_source(tokenizer: PreTrainedTokenizerBase) -> str:
    """All that templates of a tokenizer say; several go by name."""
    template = tokenizer.chat_template
    return "\n".join(template.values()) if isinstance(template, dict) else template or ""


def _spaced(marker: str) -> str:
    """A text marker that is none any more."""
    place = marker.rindex(":") if marker.rstrip().endswith(":") else 1
    return f"{marker[:place]} {marker[place:]}"
