"""What a format is: a name, a row type, and a function from one record to rows."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import orjson

from steersman.data.records import Row


@dataclass(frozen=True, slots=True)
class Skip:
    """A part of a record that was left out on purpose."""

    reason: str


def beside(parts: Iterable[Mapping[str, Any]], kept: Container[str], where: str) -> Iterator[str]:
    """What the parts of a record say beside the fields that are kept, as `conversations[].weight`."""
    for part in parts:
        for name, value in part.items():
            if name not in kept and value not in (None, "", [], {}):
                yield f"{where}[].{name}"


@dataclass(frozen=True, slots=True)
class ImportOptions:
    """What the user asks of an import, beside files and format."""

    languages: frozenset[str] = frozenset()
    """Languages to keep where a format names them; empty keeps all."""
    min_score_ratio: float = 1.0
    """SHP: leave out pairs whose score ratio is lower (the authors train on 2 and above)."""


Converted = Iterator[dict[str, Any] | Skip]
Converter = Callable[[dict[str, Any], ImportOptions], Converted]


@dataclass(frozen=True, slots=True)
class Format:
    """A data set format that `steersman data import` knows."""

    name: str
    row_type: type[Row] | None
    """None: each row by its own keys."""
    convert: Converter
    licence: str | None
    """Licence of the public data set; None where a format is used by many."""
    about: str
    plain: bool = False
    """Turns are made by the converter itself, of a user or the assistant with a text: nobody need look at each."""
    votes: bool = False
    """Equal rows are several people's judgements and are all kept; in other formats they are copies."""
    lost: Callable[[dict[str, Any]], Iterator[str]] = lambda record: iter(())
    """What lies within the fields of a record that are read, and has no place in a row."""


def message(role: str, content: str) -> dict[str, Any]:
    return {"role": role, "content": content}


def tool_call(id: str, name: str, arguments: Any) -> dict[str, Any]:
    """OpenAI's form of a call; arguments as JSON text."""
    text = arguments if isinstance(arguments, str) else orjson.dumps(arguments).decode()
    return {"id": id, "type": "function", "function": {"name": name, "arguments": text}}


def offered_tools(record: dict[str, Any]) -> dict[str, Any]:
    """`tools` of a record in OpenAI's form, where it has some; others write JSON text, or leave the wrapping out."""
    tools = record.get("tools")
    if isinstance(tools, str):
        tools = orjson.loads(tools) if tools.strip() else None
    if not tools:
        return {}
    return {"tools": [tool if "function" in tool else {"type": "function", "function": tool} for tool in tools]}
