"""What a business system is to the gateway: kinds of records, options, and a client that answers queries."""

from __future__ import annotations

import re
import string
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Protocol, Self

from pydantic import Field, StringConstraints, TypeAdapter, field_validator, model_validator
from pydantic_core import SchemaError

from steersman.config.base import FrozenModel

Kind = Literal["order", "delivery", "invoice", "stock", "customer"]
Name = Annotated[str, Field(pattern=r"^[a-z][a-z0-9_-]{0,31}$")]
# A path in the business system; nothing that could end a query or a URL.
FieldPath = Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_./]{0,127}$")]


class RecordKind(FrozenModel):
    """Where one kind of record lies, whom it belongs to, and what of it may leave."""

    entity: Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_.]{0,127}$")]
    """Tryton or Odoo model, OData entity set, or key of the file's lists."""
    number: FieldPath
    """Field that people call the record's number."""
    owner: FieldPath | None
    """Field that holds the customer's key; null only for records that belong to nobody, such as stock."""
    fields: Annotated[dict[str, FieldPath], Field(min_length=1)]
    """Name shown to the model -> field. Nothing else leaves the system."""
    where: list[Any] | str | None = None
    """Fixed further condition: a Tryton or Odoo domain, or an OData filter."""
    newest_first: FieldPath | None = None
    """Field by which the latest records are found when no number was said."""
    sentence: Annotated[str, Field(min_length=1, max_length=500)] | None = None
    """How a record reads to the model, with names of `fields` in braces: `order {number}: {state}.`; for models that
    were trained on such sentences. None: its source and JSON."""
    words: list[Annotated[str, Field(min_length=2, max_length=64)]] = []
    """What people call such a record here, beside the built-in words of many languages."""
    numbers: list[Annotated[str, Field(min_length=1, max_length=200)]] = []
    """Patterns of whole numbers, for example `SO-?[0-9]{4,8}` (Rust's regex syntax, without regard to case): only such
    numbers are looked up, and before all others. Empty: whatever looks like a number."""

    @model_validator(mode="after")
    def _sentence_names_fields(self) -> RecordKind:
        try:
            parts = list(string.Formatter().parse(self.sentence or ""))
        except ValueError as error:
            raise ValueError(f"sentence: {error}") from None
        for _, name, spec, conversion in parts:
            if name is not None and (name not in self.fields or spec or conversion):
                raise ValueError(f"sentence: {{{name}}} is no field; there are {', '.join(self.fields)}")
        return self

    @field_validator("numbers")
    @classmethod
    def _numbers_are_patterns(cls, patterns: list[str]) -> list[str]:
        for pattern in patterns:
            try:
                TypeAdapter(Annotated[str, StringConstraints(pattern=pattern)])
            except SchemaError as error:
                raise ValueError(f"'{pattern}' is not a pattern ({error})") from None
        return patterns


@dataclass(frozen=True, slots=True)
class Query:
    """What is asked of a system; `owner` is set for every kind that has one."""

    kind: RecordKind
    number: str | None
    owner: str | None
    limit: int


class System(Protocol):
    name: str
    tenants: Sequence[str]
    kinds: Mapping[Kind, RecordKind]

    async def fetch(self, query: Query) -> list[dict[str, Any]]:
        """Rows by the system's own field names: the listed fields and the owner.

        Raises:
            UnavailableError: the system does not answer, or answers something else.
        """
        ...

    async def close(self) -> None: ...


class SystemOptions(FrozenModel):
    """What every system has; each adds its own, with a `type` of one value."""

    name: Name
    """Shown as the source of facts."""
    tenants: list[str] = []
    """Tenants that may ask it; empty: all."""
    seconds: Annotated[float, Field(gt=0, le=60)] = 5.0
    """Longest wait for one query."""
    kinds: dict[Kind, RecordKind]
    """Where each kind lies in it."""

    @model_validator(mode="after")
    def _owned(self) -> Self:
        for kind, record in self.kinds.items():
            if record.owner is None and kind != "stock":
                raise ValueError(f"kinds.{kind}.owner is missing: records of customers need the field with their owner")
        return self

    @abstractmethod
    def open(self) -> System:
        """The client. ConfigError where something that it needs is missing."""


def dig(row: Mapping[str, Any], path: str) -> Any:
    """A value by its path: `party.code` or `ToParty/Code`."""
    value: Any = row
    for part in re.split(r"[./]", path):
        value = value.get(part) if isinstance(value, Mapping) else None
    return value
