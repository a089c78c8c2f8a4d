"""The row types of every data file, and reading and writing them as JSON lines.

The shapes are TRL's conversational standard formats, so a file trains without conversion; what is known about a
row (its origin, licence, tenant, verifiable facts ...) lies beside the conversation as further keys.

    demonstration  {"messages": [...]}
    preference     {"prompt": [...], "chosen": [...], "rejected": [...], "margin": 1.5}
    feedback       {"prompt": [...], "completion": [...], "label": true}
    aspects        {"prompt": [...], "completion": [...], "aspects": {"helpfulness": 4}}
    return         {"prompt": [...], "completion": [...], "reward": 1.0}
    prompt         {"prompt": [...]}

A wrong row raises `DataError` with `file:line`, the field, the reason and the mend.
"""

from __future__ import annotations

import gzip
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Annotated, Any, Literal, TypeVar

import orjson
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import PydanticCustomError

from steersman.artifacts import file_digest, whole_file
from steersman.data.opening import UNREADABLE, display_name, open_bytes
from steersman.data.plain import MAX_END_CUSTOMER, MAX_TENANT
from steersman.data.truth import read_consent, with_one_consent
from steersman.errors import DataError

Role = Literal["system", "user", "assistant", "tool"]

#: A line longer than this is never one training row; the reader names it and goes on behind it.
MAX_LINE_BYTES = 64 * 1024 * 1024


class Message(BaseModel):
    """One turn of a conversation, in the shape that chat templates take."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    role: Role
    content: str
    """Empty on a turn that only calls tools."""
    reasoning_content: str | None = None
    """Thoughts of an assistant turn, apart from what it says."""
    tool_calls: list[dict[str, Any]] | None = None
    """OpenAI tool calls of an assistant turn; arguments as JSON text or as an object."""
    tool_call_id: str | None = None
    """On a tool turn: the call that it answers."""
    name: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _as_others_write_it(cls, data: Any) -> Any:
        """OpenAI's other spellings of a turn; what a row cannot keep stays in place, and is refused by its name."""
        if not isinstance(data, dict):
            return data
        plain = (
            list(data) == _PLAIN_TURN
            and type(data["content"]) is str
            and data["role"] in ("system", "user", "assistant", "tool")
        )
        return data if plain else _plain_turn(data)

    @property
    def blank(self) -> bool:
        """True when the turn says and does nothing."""
        return not self.tool_calls and (not self.content or self.content.isspace())


_PLAIN_TURN = ["role", "content"]
_OTHER_ROLES = {"developer": "system", "function": "tool"}


def _plain_turn(data: dict[str, Any]) -> dict[str, Any]:
    kept = ("role", "content", "reasoning_content", "tool_calls", "tool_call_id", "name")
    turn = {name: value for name, value in data.items() if name in kept or value not in (None, [], {})}
    for name, role in _OTHER_ROLES.items():
        if turn.get("role") == name:
            turn["role"] = role
    if turn.get("weight") == 1:  # OpenAI's fine-tuning files: the turn is trained on, as every turn is here
        del turn["weight"]
    call = turn.pop("function_call", None)
    if isinstance(call, dict):
        turn["tool_calls"] = [{"type": "function", "function": call}]
    parts = turn.get("content")
    if isinstance(parts, list):
        for part in parts:
            if not isinstance(part, dict) or not isinstance(part.get("text"), str):
                kind = part.get("type") if isinstance(part, dict) else type(part).__name__
                raise _wrong("content", f"a part of type {kind!r}; rows hold text only, so remove the part or the row")
        turn["content"] = "".join(part["text"] for part in parts)
    elif parts is None and ("content" in turn or turn.get("tool_calls")):
        turn["content"] = ""
    return turn


def plain_messages(messages: Iterable[Message]) -> list[dict[str, Any]]:
    """As chat templates take them."""
    return [message.model_dump(exclude_none=True) for message in messages]


class Row(BaseModel):
    """What every row may carry beside its conversation; other keys are kept as they are."""

    model_config = ConfigDict(frozen=True, extra="allow")

    id: Annotated[str | None, BeforeValidator(lambda value: str(value) if type(value) is int else value)] = None
    """Unique within the file."""
    source: str | None = None
    """Where the row came from: data set, project or application."""
    licence: str | None = None
    """SPDX identifier or name of the licence that the text is under."""
    customer: str | None = Field(default=None, max_length=MAX_TENANT)
    """The tenant whose data this is; the key for deletion."""
    consent: Annotated[bool | None, BeforeValidator(read_consent)] = None
    """False: the person or tenant refused training; a release leaves the row out. Words and digits are read as
    `steersman.data.truth` says; what cannot be read is refused."""
    facts: dict[str, Any] | None = None
    """What a verifiable reward checks the answer against."""
    _one_consent = model_validator(mode="before")(with_one_consent)

    tools: list[dict[str, Any]] | None = None
    """OpenAI tool definitions that the conversation's assistant had; rendered as the chat service renders them."""

    @model_validator(mode="before")
    @classmethod
    def _end_customer_is_named(cls, data: Any) -> Any:
        """The pseudonym of the tenant's customer, a further key of the row, by which his data is found and erased."""
        if not isinstance(data, dict) or data.get("end_customer") is None:
            return data
        name = data["end_customer"]
        if type(name) is int:
            return data | {"end_customer": str(name)}
        if not isinstance(name, str) or len(name) > MAX_END_CUSTOMER:
            raise _wrong("end_customer", f"expected the customer's pseudonym, at most {MAX_END_CUSTOMER} characters")
        return data

    def to_json(self) -> bytes:
        """The row as one JSON line without its line end; keys that are None are left out."""
        return orjson.dumps(self.to_dict())

    def to_dict(self) -> dict[str, Any]:
        return self.model_dump(exclude_none=True)

    def known(self) -> dict[str, Any]:
        """What a computed reward is told of the row: its facts and its further keys."""
        return {**(self.model_extra or {}), **(self.facts or {})}

    def turns(self) -> Iterator[Message]:
        """Every message of the row, in reading order."""
        for name in ("messages", "prompt", "chosen", "rejected", "completion"):
            yield from getattr(self, name, ())


class Demonstration(Row):
    """A conversation to imitate (SFT)."""

    messages: list[Message] = Field(min_length=1)

    @model_validator(mode="after")
    def _check(self) -> Demonstration:
        _check_system_first("messages", self.messages)
        _check_answer("messages", self.messages, starts_with_answer=False)
        if not any(message.role == "user" for message in self.messages):
            raise _wrong("messages", "no user turn; an answer needs a question")
        return self


class Prompt(Row):
    """A conversation that waits for an answer."""

    prompt: list[Message] = Field(min_length=1)

    @model_validator(mode="after")
    def _check(self) -> Prompt:
        _check_system_first("prompt", self.prompt)
        last = self.prompt[-1]
        if last.role not in ("user", "tool"):
            raise _wrong(
                "prompt", f"the last turn is of role {last.role!r}; end the prompt with the user turn to be answered"
            )
        if last.blank:
            raise _wrong("prompt", "the last user message is empty; remove the row or restore its text")
        return self


class Preference(Prompt):
    """Two answers to one prompt; a person preferred `chosen`."""

    chosen: list[Message] = Field(min_length=1)
    rejected: list[Message] = Field(min_length=1)
    margin: float | None = Field(default=None, ge=0, allow_inf_nan=False, strict=True)
    """How much better `chosen` is (Llama 2, section 3.2.2), in the unit of its source."""
    soft_label: float | None = Field(default=None, ge=0, le=1)
    """Share of labelers who preferred `chosen`, where they disagreed."""

    @model_validator(mode="after")
    def _check_answers(self) -> Preference:
        _check_answer("chosen", self.chosen)
        _check_answer("rejected", self.rejected)
        if _texts(self.chosen) == _texts(self.rejected) and self.chosen == self.rejected:
            raise _wrong("rejected", "the same as chosen; remove the pair, it carries no preference")
        return self


class Feedback(Prompt):
    """One answer with a thumb (KTO)."""

    completion: list[Message] = Field(min_length=1)
    label: bool = Field(strict=True)

    @model_validator(mode="after")
    def _check_answers(self) -> Feedback:
        _check_answer("completion", self.completion)
        return self


class Aspects(Prompt):
    """One answer with a rating for each aspect."""

    completion: list[Message] = Field(min_length=1)
    aspects: dict[str, float] = Field(min_length=1)
    scales: dict[str, tuple[float, float]] | None = None
    """Lowest and highest value of an aspect."""

    @model_validator(mode="after")
    def _check_answers(self) -> Aspects:
        _check_answer("completion", self.completion)
        for name, value in self.aspects.items():
            low, high = (self.scales or {}).get(name, (float("-inf"), float("inf")))
            if not low <= value <= high or value in (float("inf"), float("-inf")):
                raise _wrong(
                    "aspects", f"{name} is {value:g}, outside {low:g} to {high:g}; mend the rating or the scale"
                )
        return self


_Number = Annotated[float, Field(strict=True, allow_inf_nan=False)]


class Return(Prompt):
    """What the assistant said in the rest of a conversation, and what that was worth (ILQL)."""

    completion: list[Message] = Field(min_length=1)
    """Turns of both sides; the assistant's are the actions."""
    reward: _Number | list[_Number]
    """At the end of the conversation, or one for each assistant turn of the completion."""

    @model_validator(mode="after")
    def _check_answers(self) -> Return:
        _check_answer("completion", self.completion)
        turns = sum(message.role == "assistant" for message in self.completion)
        if isinstance(self.reward, list) and len(self.reward) != turns:
            given = len(self.reward)
            raise _wrong(
                "reward",
                f"{given} numbers for {turns} assistant turns; give one for each, or one for the conversation",
            )
        return self

    def rewards(self) -> list[float]:
        """One for each assistant turn of the completion."""
        if isinstance(self.reward, list):
            return self.reward
        turns = sum(message.role == "assistant" for message in self.completion)
        return [0.0] * (turns - 1) + [self.reward]


RowT = TypeVar("RowT", bound=Row)

#: The names that the command line uses.
ROW_TYPES: dict[str, type[Row]] = {
    "demonstration": Demonstration,
    "preference": Preference,
    "feedback": Feedback,
    "aspects": Aspects,
    "return": Return,
    "prompt": Prompt,
}
#: The names of files that the manifest uses.
ROWS_OF = {kind if kind in ("feedback", "aspects") else f"{kind}s": row_type for kind, row_type in ROW_TYPES.items()}


def row_type_of(data: dict[str, Any]) -> type[Row]:
    """The row type that the keys of `data` belong to. Raises DataError when they fit none."""
    if "chosen" in data or "rejected" in data:
        return Preference
    if "completion" in data:
        return Aspects if "aspects" in data else Return if "reward" in data and "label" not in data else Feedback
    if "messages" in data:
        return Demonstration
    if "prompt" in data:
        return Prompt
    raise DataError(
        f"keys {sorted(data)} fit no row type; expected messages, or prompt with chosen/rejected/completion"
    )


def read_jsonl(path: str | os.PathLike[str], row_type: type[RowT]) -> Iterator[RowT]:
    """Streams the rows of a JSON lines file (plain or gzip; a path or an fsspec URL).

    Blank lines are passed over. Raises DataError at the first wrong row, and when the file is missing or holds
    no row.
    """
    return (row for _, row in numbered_rows(path, row_type))


def numbered_rows(path: str | os.PathLike[str], row_type: type[RowT]) -> Iterator[tuple[str, RowT]]:
    """(`file:line`, row) of every row; blank lines count as lines. Raises as `read_jsonl`."""
    name, found = display_name(path), False
    for number, line in read_lines(path):
        if isinstance(line, DataError):
            raise line
        found = True
        yield f"{name}:{number}", parse_row(line, row_type, f"{name}:{number}")
    if not found:
        raise DataError(f"{name}: no rows; the file is empty")


def keyed_prompts(path: str | os.PathLike[str]) -> Iterator[tuple[str, str, Prompt]]:
    """(`file:line`, key, row) of every prompt; the key is its id, or `line N` where it has none.

    Answers, winners and comparisons are kept by the key, so two rows with one id would be taken for one prompt.

    Raises:
        DataError: as `read_jsonl`; an id that an earlier row has, both lines named.
    """
    lines: dict[str, str] = {}
    for where, row in numbered_rows(path, Prompt):
        line = where.rpartition(":")[2]
        key = row.id or f"line {line}"
        if key in lines:
            raise DataError(
                f"{where}: id {key!r} is that of line {lines[key]}, too; give every prompt an id of its own, or none"
            )
        lines[key] = line
        yield where, key, row


@contextmanager
def at(where: str) -> Iterator[None]:
    """Names the row (`file:line`) in a DataError of what is done with it."""
    try:
        yield
    except DataError as error:
        raise DataError(f"{where}: {error.message}") from None


def parse_row(line: bytes, row_type: type[RowT], where: str) -> RowT:
    """One JSON line as a row. `where` is the `file:line` that an error begins with."""
    try:
        return row_type.model_validate(orjson.loads(line))
    except orjson.JSONDecodeError as error:
        raise DataError(f"{where}: {describe_json_error(error, line)}") from None
    except ValidationError as error:
        raise DataError(f"{where}: {describe_validation_error(error)}", details={"where": where}) from None


def read_lines(path: str | os.PathLike[str]) -> Iterator[tuple[int, bytes | DataError]]:
    """The lines of a file; see `lines_of`."""
    with open_bytes(path) as stream:
        yield from lines_of(stream, display_name(path))


def lines_of(stream: IO[bytes], name: str) -> Iterator[tuple[int, bytes | DataError]]:
    """Yields (line number, line) with blank lines left out.

    What cannot be read is yielded as a DataError in place of the line (an over-long line, then reading goes on; as an
    IncompleteFileError where the file is damaged or cut off, then it ends), so that an importer can count it.
    """
    number = 0
    while True:
        try:
            line = stream.readline(MAX_LINE_BYTES)
            number += 1
            if len(line) == MAX_LINE_BYTES and not line.endswith(b"\n"):
                while (rest := stream.readline(MAX_LINE_BYTES)) and not rest.endswith(b"\n"):
                    pass
                limit = MAX_LINE_BYTES // 2**20
                yield number, DataError(f"{name}:{number}: longer than {limit} MiB; split the row or remove it")
                continue
        except UNREADABLE as error:
            yield number + 1, damaged(name, number + 1, error)
            return
        if not line:
            return
        if number == 1 and line.startswith(b"\xef\xbb\xbf"):
            line = line[3:]
        if not line.isspace():
            yield number, line


class IncompleteFileError(DataError):
    """A file ends before its end: damaged, cut off, or not readable any further."""


def damaged(name: str, line: int, error: Exception) -> DataError:
    """What a reader yields where a file ends too early."""
    if isinstance(error, DataError):
        return error
    return IncompleteFileError(f"{name}:{line}: damaged file ({error}); fetch it again")


def write_jsonl(path: str | os.PathLike[str], rows: Iterable[Row]) -> tuple[int, str]:
    """Writes rows to a local file (gzip when it ends in .gz) and returns their number and the file's SHA-256.

    The file appears whole or not at all. The bytes depend on the rows only (gzip carries no time).
    """
    target, count = Path(path), 0
    with whole_file(target) as partial, open(partial, "wb") as raw:
        sink: Any = gzip.GzipFile("", "wb", 6, raw, mtime=0) if target.suffix == ".gz" else raw
        for row in rows:
            sink.write(row.to_json() + b"\n")
            count += 1
        if sink is not raw:
            sink.close()
        raw.flush()
        os.fsync(raw.fileno())
    return count, file_digest(target)


def describe_json_error(error: orjson.JSONDecodeError, line: bytes) -> str:
    """Reason and mend of a line that is not JSON."""
    try:
        line.decode()
    except UnicodeDecodeError as encoding:
        return f"not UTF-8 (byte {encoding.start + 1} is 0x{line[encoding.start]:02x}); save the file as UTF-8"
    return f"not valid JSON ({error.msg} at column {error.colno}); mend or remove the line"


def describe_validation_error(error: ValidationError) -> str:
    """First finding of pydantic as `field: reason; mend`."""
    first = error.errors(include_url=False)[0]
    field = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in first["loc"]).lstrip(".")
    more = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
    if first["type"] == "steersman_row":
        return f"{field}.{first['msg']}" if field else first["msg"]
    if first["type"] == "value_error":
        return f"{first['ctx']['error']}{more}"
    if first["type"] == "missing":
        return f"{field}: missing; add it{more}"
    if first["type"] == "too_short":
        return f"{field}: empty list; add at least one message{more}"
    value = repr(first["input"])
    return f"{field or 'row'}: {first['msg'].lower()}, found {value[:60] + '...' if len(value) > 60 else value}{more}"


def _wrong(field: str, reason: str) -> PydanticCustomError:
    return PydanticCustomError("steersman_row", "{text}", {"text": f"{field}: {reason}"})


def _texts(messages: list[Message]) -> list[str]:
    return [message.content for message in messages]


def _check_system_first(field: str, messages: list[Message]) -> None:
    for index, message in enumerate(messages):
        if index and message.role == "system":
            raise _wrong(f"{field}[{index}]", "a system turn after the first turn; move it to the front")


def _check_answer(field: str, messages: list[Message], *, starts_with_answer: bool = True) -> None:
    if starts_with_answer and messages[0].role != "assistant":
        raise _wrong(field, f"begins with role {messages[0].role!r}; an answer begins with an assistant turn")
    last = messages[-1]
    if last.role != "assistant":
        raise _wrong(field, f"ends with role {last.role!r}; the last turn must be the assistant's")
    if last.blank:
        raise _wrong(field, "assistant message is empty; remove the row or restore its text")
