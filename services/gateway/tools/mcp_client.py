"""Tools of MCP servers, through the official SDK."""

from __future__ import annotations

import asyncio
import logging
import os
from contextlib import AsyncExitStack
from typing import Any

import httpx2
from mcp.client import Client
from mcp.client.stdio import StdioServerParameters, stdio_client
from mcp.client.streamable_http import streamable_http_client

from services.gateway.tools.config import McpServer, McpTool
from steersman.errors import ConfigError, UnavailableError

log = logging.getLogger("steersman.gateway")

_RETRY_SECONDS = 10.0


class McpConnection:
    """One server, connected by a task of its own and again after it broke.

    A call is handed to that task, because the SDK's scopes must be left where they were entered.
    """

    def __init__(self, config: McpServer) -> None:
        self.config = config
        self.tools: dict[str, tuple[McpTool, dict[str, Any]]] = {}
        """By name: what the configuration and the server say; empty while not connected."""
        self._client: Client | None = None
        self._broken = asyncio.Event()
        self._connected = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Connects in the background; waits a moment, so that tools are there for the first question."""
        self._task = asyncio.create_task(self._run())
        try:
            async with asyncio.timeout(self.config.seconds):
                await self._connected.wait()
        except TimeoutError:
            log.warning("an MCP server is not reachable yet", extra={"server": self.config.name})

    async def close(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def call(self, name: str, arguments: dict[str, Any]) -> str:
        """The tool's text.

        Raises:
            UnavailableError: not connected, or the server does not answer in time.
        """
        if self._client is None:
            raise UnavailableError(f"{self.config.name} cannot be asked at the moment")
        try:
            async with asyncio.timeout(self.config.seconds):
                result = await self._client.call_tool(name, arguments)
        except Exception as error:
            self._broken.set()
            raise UnavailableError(
                f"{self.config.name} cannot be asked at the moment ({type(error).__name__})"
            ) from None
        text = "\n".join(part.text for part in result.content if part.type == "text")
        return f"error: {text}" if result.is_error else text

    async def _run(self) -> None:
        while True:
            try:
                async with AsyncExitStack() as stack:
                    self._client = await self._connect(stack)
                    listed = await self._client.list_tools()
                    offered = {tool.name: tool for tool in listed.tools}
                    for wanted in self.config.tools:
                        if wanted.name not in offered:
                            log.error("an MCP server lacks a tool", extra={"tool": wanted.name})
                            continue
                        tool = offered[wanted.name]
                        schema = {"description": tool.description or "", "parameters": tool.input_schema}
                        self.tools[wanted.name] = (wanted, schema)
                    self._connected.set()
                    self._broken.clear()
                    await self._broken.wait()
            except asyncio.CancelledError:
                raise
            except Exception as error:
                log.warning("an MCP server failed: %s", error, extra={"server": self.config.name})
            finally:
                self._client = None
                self.tools = {}
            await asyncio.sleep(_RETRY_SECONDS)

    async def _connect(self, stack: AsyncExitStack) -> Client:
        config = self.config
        if config.command:
            program, *arguments = config.command
            transport = stdio_client(StdioServerParameters(command=program, args=arguments, env=config.env or None))
            return await stack.enter_async_context(Client(transport))
        headers = {}
        if config.authorization_env:
            headers["authorization"] = os.environ.get(config.authorization_env, "")
            if not headers["authorization"]:
                raise ConfigError(f"tools.mcpServers.{config.name}: {config.authorization_env} is not set")
        http = await stack.enter_async_context(httpx2.AsyncClient(headers=headers, timeout=config.seconds))
        assert config.url is not None
        return await stack.enter_async_context(Client(streamable_http_client(config.url, http_client=http)))
