"""Tools that a model may call. None of them takes a customer: who is asking is not the model's to say."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import jsonschema
import jsonschema.validators
import referencing
import referencing.exceptions

from services.gateway.answer import Lookup, LookupOutcome, Source
from services.gateway.auth.callers import Caller
from services.gateway.proposals import ActionName, Proposal
from services.gateway.systems.base import Kind
from services.gateway.tools.desk import Desk
from services.gateway.tools.lookup import describe
from services.gateway.tools.records import Records, clean
from steersman.errors import InvalidArgumentError, SteersmanError
from steersman.v1.common_pb2 import ToolCall

if TYPE_CHECKING:
    from services.gateway.tools.mcp_client import McpConnection

log = logging.getLogger("steersman.gateway")

_LONGEST_ARGUMENTS = 10_000
_NUMBER_SCHEMA = {"type": "string", "pattern": "^[A-Za-z0-9][A-Za-z0-9._/-]{0,39}$"}
_FINDERS: dict[str, tuple[Kind, str, str]] = {
    "find_order": ("order", "number", "State of an order of this customer; without a number the latest orders."),
    "find_delivery": ("delivery", "number", "State of a delivery of this customer; without a number the latest."),
    "find_invoice": ("invoice", "number", "State of an invoice of this customer; without a number the latest."),
    "check_stock": ("stock", "product", "How much of a product is available, by its code."),
    "customer_data": ("customer", "", "The data that is stored about this customer."),
}
_HAND_OVER = "Propose to hand the conversation over to a person. The customer has to confirm."
_RETURN = "Propose the return of an order of this customer. The customer has to confirm."


@dataclass(slots=True)
class Outcome:
    """What a tool call gave."""

    lookup: Lookup
    proposal: Proposal | None = None


class Toolbox:
    def __init__(self, records: Records, connections: Sequence[McpConnection], desk: Desk | None) -> None:
        self._records = records
        self._connections = connections
        self._desk = desk

    def definitions(self, caller: Caller) -> list[dict[str, Any]]:
        """OpenAI tool definitions of what this caller's customer may use."""
        kinds = self._records.kinds(caller.tenant)
        found = []
        for name, (kind, argument, description) in _FINDERS.items():
            if kind in kinds and (caller.customer is not None or kind == "stock"):
                found.append(_definition(name, description, _finder_schema(argument, required=kind == "stock")))
        if self._desk is not None and "act" in caller.scopes:
            found.append(_definition("hand_over", _HAND_OVER, _text_schema(["reason"])))
            if "order" in kinds and caller.customer is not None:
                found.append(_definition("request_return", _RETURN, _text_schema(["order", "reason"])))
        for connection in self._open(caller):
            for tool, said in connection.tools.values():
                if tool.customer_argument is None or caller.customer is not None:
                    schema = _without(said["parameters"], tool.customer_argument)
                    found.append(_definition(_mcp_name(connection, tool.name), said["description"], schema))
        return found

    async def call(self, caller: Caller, call: ToolCall, transcript: list[dict[str, str]]) -> Outcome:
        """Carries out a call; whatever is wrong is told to the model in the outcome."""
        definition = next((d["function"] for d in self.definitions(caller) if d["function"]["name"] == call.name), None)
        if definition is None:
            return _told("unknown", {}, "refused", f"error: there is no tool {clean(call.name)}")
        try:
            arguments = await asyncio.to_thread(checked_arguments, call.arguments, definition["parameters"])
        except InvalidArgumentError as error:
            return _told(call.name, {}, "refused", f"error: wrong arguments: {clean(error.message)}")
        try:
            if call.name in _FINDERS:
                return await self._find(caller, call.name, arguments)
            if call.name in ("hand_over", "request_return"):
                return await self._propose(caller, call.name, arguments, transcript)
            return await self._mcp(caller, call.name, arguments)
        except SteersmanError as error:
            log.warning("a tool failed: %s", error, extra={"tool": call.name})
            return _told(call.name, arguments, "failed", "error: this cannot be looked up at the moment")

    async def _find(self, caller: Caller, name: str, arguments: dict[str, Any]) -> Outcome:
        kind, argument, _ = _FINDERS[name]
        found = await self._records.find(caller, kind, arguments.get(argument) if argument else None)
        if not found:
            return _told(name, arguments, "not_found", "not found")
        text = "\n".join(map(describe, found))
        return _told(name, arguments, "found", text, *(Source(r.system, r.source) for r in found))

    async def _propose(
        self, caller: Caller, name: str, arguments: dict[str, Any], transcript: list[dict[str, str]]
    ) -> Outcome:
        assert self._desk is not None
        arguments = {key: str(clean(value)) for key, value in arguments.items()}
        action: ActionName = "request_return" if name == "request_return" else "hand_over"
        if action == "request_return" and not await self._records.find(caller, "order", arguments["order"]):
            return _told(name, arguments, "not_found", "not found")
        proposal = await self._desk.propose(caller, action, arguments, transcript)
        return Outcome(Lookup(name, arguments, "proposed", text=proposal.text), proposal)

    async def _mcp(self, caller: Caller, name: str, arguments: dict[str, Any]) -> Outcome:
        for connection in self._open(caller):
            for tool, _ in list(connection.tools.values()):
                if _mcp_name(connection, tool.name) == name:
                    hidden = {}
                    if tool.customer_argument is not None:
                        assert caller.customer is not None  # definitions() offers it to no one else
                        hidden[tool.customer_argument] = caller.customer.id
                    text, good = await connection.call(tool.name, arguments | hidden)
                    if not good:
                        return _told(name, arguments, "failed", f"error: {text}")
                    return _told(name, arguments, "found", text, Source(connection.config.name, tool.name))
        return _told(name, arguments, "refused", f"error: there is no tool {name}")

    def _open(self, caller: Caller) -> list[McpConnection]:
        return [c for c in self._connections if not c.config.tenants or caller.tenant in c.config.tenants]


# As JSON schema says, but nothing is fetched, and what is dearer than linear is left to the tool: patterns of other
# people's schemas, and comparing all items of a list with each other.
_Validator = jsonschema.validators.extend(
    jsonschema.Draft202012Validator,
    {"uniqueItems": None, "patternProperties": None, "pattern": None},
)
_NOTHING_REMOTE: referencing.Registry[Any] = referencing.Registry()


def checked_arguments(text: str, schema: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a call.

    Raises:
        InvalidArgumentError: they are no JSON object, too long, or do not fit the schema.
    """
    if len(text) > _LONGEST_ARGUMENTS:
        raise InvalidArgumentError(f"longer than {_LONGEST_ARGUMENTS} characters")
    try:
        arguments = json.loads(text or "{}")
        problem = next(_Validator(schema, registry=_NOTHING_REMOTE).iter_errors(arguments), None)
    except (ValueError, RecursionError):
        raise InvalidArgumentError("not valid JSON") from None
    except (referencing.exceptions.Unresolvable, jsonschema.exceptions.UnknownType):
        raise InvalidArgumentError("the tool's schema cannot be used; its $ref leads nowhere") from None
    if problem is not None:
        raise InvalidArgumentError(problem.message)
    if not isinstance(arguments, dict):
        raise InvalidArgumentError("they must be an object")
    return arguments


def _told(name: str, arguments: dict[str, Any], outcome: LookupOutcome, text: str, *records: Source) -> Outcome:
    return Outcome(Lookup(name, arguments, outcome, records, text))


def _mcp_name(connection: McpConnection, tool: str) -> str:
    return f"{connection.config.name}_{tool}"


def _definition(name: str, description: str, parameters: dict[str, Any]) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "description": description, "parameters": parameters}}


def _finder_schema(argument: str, *, required: bool) -> dict[str, Any]:
    properties = {argument: _NUMBER_SCHEMA} if argument else {}
    needed = [argument] if required else []
    return {"type": "object", "properties": properties, "required": needed, "additionalProperties": False}


def _text_schema(names: list[str]) -> dict[str, Any]:
    properties = {name: {"type": "string", "minLength": 1, "maxLength": 500} for name in names}
    return {"type": "object", "properties": properties, "required": names, "additionalProperties": False}


def _without(schema: dict[str, Any], argument: str | None) -> dict[str, Any]:
    """The schema as the model sees it: without the customer, and without room for one."""
    schema = {**schema, "additionalProperties": False}
    if argument is not None:
        schema["properties"] = {k: v for k, v in schema.get("properties", {}).items() if k != argument}
        schema["required"] = [name for name in schema.get("required", []) if name != argument]
    return schema
