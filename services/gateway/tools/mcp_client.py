"""Tools of MCP servers, through the official SDK."""

from __future__ import annotations

import asyncio
import json
import logging
from contextlib import AsyncExitStack
from typing import Any

import jsonschema
from mcp import MCPError
from mcp.client import Client
from mcp.client.stdio import StdioServerParameters, stdio_client
from mcp.client.streamable_http import streamable_http_client
from mcp_types import CONNECTION_CLOSED

from services.gateway.tools.records import visible
from services.gateway.tools_config import McpServer, McpTool
from steersman.background import Background
from steersman.environment import header_secret_in
from steersman.errors import UnavailableError
from steersman.net import guarded_client2

log = logging.getLogger("steersman.gateway")

_FIRST_RETRY_SECONDS, _LONGEST_RETRY_SECONDS = 0.25, 10.0
_LATE_IN_A_ROW = 3
"""So many calls without an answer, one after another, are a server that hangs: it is connected anew."""
_LARGEST_SCHEMA = 20_000


class McpConnection:
    """One server, connected by a task of its own and again after it broke.

    That task enters and leaves the SDK's scopes; calls are made by whoever asks. A call that takes too long ends alone.
    While a broken server is connected again its tools stay offered, and their calls fail.
    """

    def __init__(self, config: McpServer) -> None:
        self.config = config
        self.tools: dict[str, tuple[McpTool, dict[str, Any]]] = {}
        """By name: what the configuration and the server last said; empty before the first connection."""
        self._client: Client | None = None
        self._late = 0
        self._broken = asyncio.Event()
        self._connected = asyncio.Event()

    async def start(self, background: Background) -> None:
        """Connects in the background; waits a moment, so that tools are there for the first question."""
        background.add(f"mcp {self.config.name}", self._run)
        try:
            async with asyncio.timeout(self.config.seconds):
                await self._connected.wait()
        except TimeoutError:
            log.warning("an MCP server is not reachable yet", extra={"server": self.config.name})

    async def call(self, name: str, arguments: dict[str, Any]) -> tuple[str, bool]:
        """The tool's text, within `resultChars`, and whether it is a result rather than an error of the tool.

        Raises:
            UnavailableError: not connected, or the server does not answer in time.
        """
        client, reason = self._client, "not connected"
        if client is not None:
            try:
                async with asyncio.timeout(self.config.seconds):
                    result = await client.call_tool(name, arguments)
                self._late = 0
                text = "\n".join(part.text for part in result.content if part.type == "text")
                return _within(text, self.config.result_chars), not result.is_error
            except TimeoutError:
                self._late += 1
                reason = f"no answer within {self.config.seconds:g} s"
            except Exception as error:
                if isinstance(error, MCPError) and error.code != CONNECTION_CLOSED:
                    # The server refuses the call; it is not broken.
                    return _within(error.message, self.config.result_chars), False
                reason = type(error).__name__
                self._broken.set()
            if self._late >= _LATE_IN_A_ROW:
                self._broken.set()
        raise UnavailableError(f"{self.config.name} cannot be asked at the moment ({reason})")

    async def _run(self) -> None:
        pause = _FIRST_RETRY_SECONDS
        while True:
            try:
                async with AsyncExitStack() as stack:
                    async with asyncio.timeout(self.config.seconds * 2):
                        client = await self._connect(stack)
                        listed = await client.list_tools()
                    self.tools = self._offered({tool.name: tool for tool in listed.tools})
                    self._late = 0
                    self._broken.clear()
                    self._client = client
                    self._connected.set()
                    pause = _FIRST_RETRY_SECONDS
                    await self._broken.wait()
            except asyncio.CancelledError:
                raise
            except Exception as error:
                log.warning("an MCP server failed: %s", error, extra={"server": self.config.name})
            finally:
                self._client = None
            await asyncio.sleep(pause)
            pause = min(2 * pause, _LONGEST_RETRY_SECONDS)

    def _offered(self, listed: dict[str, Any]) -> dict[str, tuple[McpTool, dict[str, Any]]]:
        """The wanted ones of the tools that the server lists."""
        found = {}
        for wanted in self.config.tools:
            tool = listed.get(wanted.name)
            if tool is None:
                log.error("an MCP server lacks a tool", extra={"tool": wanted.name})
                continue
            if (problem := _problem(tool.input_schema)) is not None:
                log.error("an MCP tool's schema cannot be used: %s", problem, extra={"tool": wanted.name})
                continue
            description = _within(tool.description or "", self.config.description_chars)
            found[wanted.name] = (wanted, {"description": description, "parameters": tool.input_schema})
        return found

    async def _connect(self, stack: AsyncExitStack) -> Client:
        config = self.config
        if config.command:
            program, *arguments = config.command
            transport = stdio_client(StdioServerParameters(command=program, args=arguments, env=config.env or None))
            return await stack.enter_async_context(Client(transport))
        headers = {}
        if config.authorization_env:
            field = f"tools.mcpServers.{config.name}.authorizationEnv"
            headers["authorization"] = header_secret_in(config.authorization_env, field, words=True)
        http = await stack.enter_async_context(guarded_client2(headers=headers, timeout=config.seconds))
        assert config.url is not None
        return await stack.enter_async_context(Client(streamable_http_client(config.url, http_client=http)))


def _within(text: str, most: int) -> str:
    """Visible text of at most about `most` characters: whole, or with a mark where it was cut."""
    kept = "\n".join(visible(line) for line in text[:most].splitlines())
    return kept if len(text) <= most else f"{kept} [cut: the first {most} of {len(text)} characters]"


def _problem(schema: Any) -> str | None:
    """Why a tool's schema cannot be used; None when it can."""
    if len(json.dumps(schema, default=str)) > _LARGEST_SCHEMA:
        return f"it has more than {_LARGEST_SCHEMA} characters"
    try:
        jsonschema.Draft202012Validator.check_schema(schema)
    except (jsonschema.SchemaError, RecursionError) as error:
        return str(error).partition("\n")[0]
    return None
