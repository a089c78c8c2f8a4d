"""Reading and checking configuration.

A configuration is a frozen pydantic model. Its fields are the only home of defaults; a YAML file is
a sparse overlay; `--set a.b=c` goes on top. Keys are camelCase in YAML, as everywhere in Kubernetes.
"""

from __future__ import annotations

import difflib
import functools
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic.alias_generators import to_camel

from steersman.errors import ConfigError, meant, why

Positive = Annotated[int, Field(gt=0)]
NonNegative = Annotated[int, Field(ge=0)]
PositiveFloat = Annotated[float, Field(gt=0)]
NonNegativeFloat = Annotated[float, Field(ge=0)]
Probability = Annotated[float, Field(gt=0, le=1)]


class FrozenModel(BaseModel):
    """Base of every configuration model: immutable, unknown keys refused, docstrings as descriptions."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        alias_generator=to_camel,
        populate_by_name=True,
        use_attribute_docstrings=True,
        protected_namespaces=(),
        allow_inf_nan=False,
    )


M = TypeVar("M", bound=BaseModel)


class _UniqueKeys(yaml.SafeLoader):
    """YAML in which a key that stands twice is an error: PyYAML would silently keep the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge":
                continue
            key = self.construct_object(key_node, deep=True)
            if isinstance(key, (str, int, float, bool)):
                if key in seen:
                    raise yaml.constructor.ConstructorError(
                        None, None, f"the key {key!r} stands here twice; keep one", key_node.start_mark
                    )
                seen.add(key)
        return super().construct_mapping(node, deep)


def read_yaml(path: Path) -> dict[str, Any]:
    """Reads one YAML mapping; ConfigError names the file and, for a syntax error, the line."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(f"{path}: there is no such file; check the path") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read ({why(error)}); it must be readable UTF-8 text") from None
    try:
        data = yaml.load(text, Loader=_UniqueKeys)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{path}:{mark.line + 1}" if mark else str(path)
        raise ConfigError(f"{where}: not valid YAML ({getattr(error, 'problem', error)})") from None
    if not isinstance(data, dict):
        raise ConfigError(f"{path}: must hold a mapping of keys to values, not {type(data).__name__}")
    return data


def dump_yaml(model: BaseModel) -> str:
    """The complete configuration, defaults included, as YAML that loads to the same model."""
    return yaml.safe_dump(model.model_dump(mode="json", by_alias=True), sort_keys=False)


def commented_yaml(cls: type[BaseModel], data: dict[str, Any], head: str) -> str:
    """Plain data as YAML with each field's docstring above it; loads to the same data.

    Args:
        cls: the model that the data are of.
        data: keys in camelCase; only these are written.
        head: comment on top.
    """
    schema = _schema(cls)
    return "".join(f"# {line}\n" for line in head.splitlines()) + "\n".join(_commented(schema, schema, data)) + "\n"


def _commented(schema: dict[str, Any], node: dict[str, Any], value: Any) -> list[str]:
    """Lines of a mapping or of a list of mappings; plain values are YAML in one line."""
    node = _resolve(schema, node)
    lines: list[str] = []
    if isinstance(value, list):
        for item in value:
            inner = _commented(schema, node.get("items", {}), item)
            first = next(number for number, line in enumerate(inner) if not line.startswith("#"))
            lines += [*inner[:first], f"- {inner[first]}", *(f"  {line}" for line in inner[first + 1 :])]
        return lines
    for key, child in value.items():
        field = node.get("properties", {}).get(key, {})
        if described := field.get("description"):
            lines += [f"# {line}" for line in described.splitlines()]
        nested = isinstance(child, (dict, list)) and child
        if nested and (isinstance(child, dict) or isinstance(child[0], dict)):
            lines += [f"{key}:", *(f"  {line}" for line in _commented(schema, field, child))]
        else:
            written = yaml.safe_dump(child, default_flow_style=True, width=10_000).removesuffix("...\n")
            lines.append(f"{key}: {written.strip()}")
    return lines


def apply_overrides(data: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """Applies `a.b=c` overrides to plain data; values are read as YAML.

    A list element is addressed by its number, or, where the elements are mappings with one key
    (stages), by that key: `spec.stages.rl.steps=3`.
    """
    for override in overrides:
        path, separator, value = override.partition("=")
        if not separator or not path:
            raise ConfigError(f"--set {override}: must have the form a.b=value")
        keys = path.split(".")
        node: Any = data
        for position, key in enumerate(keys[:-1]):
            node = _descend(node, key, ".".join(keys[: position + 1]))
        try:
            parsed = yaml.safe_load(value)
        except yaml.YAMLError:
            raise ConfigError(f"--set {override}: the value is not valid YAML; put it in quotes") from None
        if isinstance(node, list):
            index = _list_index(node, keys[-1], path)
            if not keys[-1].isdigit():
                node[index] = {keys[-1]: parsed}
            else:
                node[index] = parsed
        else:
            node[keys[-1]] = parsed
    return data


def _descend(node: Any, key: str, path: str) -> Any:
    if isinstance(node, list):
        index = _list_index(node, key, path)
        child = node[index]
        if not key.isdigit():
            if child[key] is None:
                child[key] = {}
            return child[key]
        return child
    if not isinstance(node, dict):
        raise ConfigError(f"--set {path}: {path.rpartition('.')[0]} is a plain value and has no fields")
    if node.get(key) is None:
        node[key] = {}
    return node[key]


def _list_index(node: list[Any], key: str, path: str) -> int:
    if key.isdigit():
        if int(key) >= len(node):
            raise ConfigError(f"--set {path}: the list has {len(node)} elements, there is no number {key}")
        return int(key)
    for index, element in enumerate(node):
        if isinstance(element, dict) and key in element:
            return index
    known = [name for element in node if isinstance(element, dict) for name in element]
    there = f"; it has {', '.join(known)}" if known else ""
    raise ConfigError(f"--set {path}: the list has no element '{key}'{there}{meant(key, known)}")


def load_model(cls: type[M], data: dict[str, Any], source: str) -> M:
    """Validates plain data; ConfigError lists every wrong field with reason and mend.

    Args:
        cls: the model.
        data: keys in camelCase.
        source: what the data was read from, for the message.
    """
    try:
        return cls.model_validate(data, by_alias=True, by_name=False)
    except ValidationError as error:
        problems = [_explain(cls, problem) for problem in error.errors(include_url=False)]
        raise ConfigError(f"{source}: " + "; ".join(problems)) from None


def _explain(cls: type[BaseModel], problem: Any) -> str:
    location = ".".join(str(part) for part in problem["loc"]) or "the document"
    if problem["type"] == "extra_forbidden":
        known = _field_names(cls, problem["loc"][:-1])
        close = difflib.get_close_matches(str(problem["loc"][-1]), known, n=1, cutoff=0.6)
        hint = f"did you mean '{close[0]}'?" if close else f"known fields: {', '.join(sorted(known))}"
        if holder := _field_with_value(cls, problem["loc"][:-1], str(problem["loc"][-1])):
            hint = f"it is a value of {holder}"
        return f"{location} is not a known field ({hint})"
    if problem["type"] == "literal_error":
        allowed = re.findall(r"'([^']+)'", problem["ctx"]["expected"])
        close = difflib.get_close_matches(str(problem["input"]), allowed, n=1, cutoff=0.6)
        hint = f"did you mean {close[0]!r}?" if close else f"use {', '.join(allowed)}"
        return f"{location} is {problem['input']!r} ({hint})"
    if problem["type"] == "missing":
        return f"{location} is missing; add it"
    message = problem["msg"].removeprefix("Value error, ").removeprefix("Assertion failed, ")
    shown = problem.get("input")
    if isinstance(shown, (str, int, float, bool)) and problem["type"] != "value_error":
        return f"{location} is {shown!r}: {message}"
    return f"{location}: {message}"


@functools.cache
def _schema(cls: type[BaseModel]) -> dict[str, Any]:
    """Of a whole run it takes a third of a second to make, and a document may have many faults."""
    return cls.model_json_schema(by_alias=True)


def _field_names(cls: type[BaseModel], path: Sequence[Any]) -> list[str]:
    """Aliases of the fields of the model at `path`, or of none where the path leaves the models."""
    schema = _schema(cls)
    return list(_node_at(schema, path).get("properties", {}))


def _field_with_value(cls: type[BaseModel], path: Sequence[Any], value: str) -> str | None:
    """A field of a field of the model at `path` that takes `value`: where people write `ppo:` for `algorithm: ppo`."""
    schema = _schema(cls)
    for outer, holder in _node_at(schema, path).get("properties", {}).items():
        for inner, node in _resolve(schema, holder).get("properties", {}).items():
            node = _resolve(schema, node)
            if value in (*node.get("enum", ()), node.get("const")):
                return f"{outer}.{inner}, write {outer}: {{{inner}: {value}}}"
    return None


def _node_at(schema: dict[str, Any], path: Sequence[Any]) -> dict[str, Any]:
    """The part of a JSON schema that describes the value at `path`; empty where the path leaves it."""
    node = schema
    for part in path:
        node = _resolve(schema, node)
        node = node.get("items", {}) if isinstance(part, int) else node.get("properties", {}).get(part, {})
    return _resolve(schema, node)


def _resolve(schema: dict[str, Any], node: dict[str, Any]) -> dict[str, Any]:
    for option in node.get("anyOf", []):
        if "$ref" in option:
            node = option
            break
    if "$ref" in node:
        node = schema["$defs"][node["$ref"].rpartition("/")[2]]
    return node
