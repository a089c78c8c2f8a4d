"""References inside JSON schemas that callers send."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from services.gateway.errors import BadRequestError

# Values, not schemas: what looks like a reference in them is none.
_VALUES = frozenset({"const", "enum", "default", "examples"})


def check_references(schema: Any, param: str) -> None:
    """Refuses a `$ref` that leads outside the schema or nowhere.

    Raises:
        BadRequestError: naming `param` and the reference.
    """
    for holder in _holders(schema):
        ref = holder["$ref"]
        if not _leads_somewhere(schema, ref):
            shown = ref[:100]
            raise BadRequestError(
                f"{param}: $ref '{shown}' leads nowhere in this schema; refer to a part of it, as '#/$defs/name' does",
                param=param,
            )


def moved(schema: Any, place: str) -> Any:
    """A copy of a schema that will lie at `place`, a JSON pointer such as `/$defs/0`: its references go with it."""
    if isinstance(schema, list):
        return [moved(part, place) for part in schema]
    if not isinstance(schema, dict):
        return schema
    copy = {key: value if key in _VALUES else moved(value, place) for key, value in schema.items()}
    if isinstance(copy.get("$ref"), str):
        copy["$ref"] = f"#{place}{copy['$ref'][1:]}"
    return copy


def _holders(schema: Any) -> Iterator[dict[str, Any]]:
    parts = [schema]
    while parts:
        part = parts.pop()
        if isinstance(part, list):
            parts += part
        elif isinstance(part, dict):
            if isinstance(part.get("$ref"), str):
                yield part
            parts += [value for key, value in part.items() if key not in _VALUES]


def _leads_somewhere(schema: Any, ref: str) -> bool:
    if not ref.startswith("#") or (ref != "#" and not ref.startswith("#/")):
        return False
    found = schema
    for step in ref.split("/")[1:]:
        step = step.replace("~1", "/").replace("~0", "~")
        if isinstance(found, dict) and step in found:
            found = found[step]
        elif isinstance(found, list) and step.isdecimal() and int(step) < len(found):
            found = found[int(step)]
        else:
            return False
    return isinstance(found, (dict, bool))
