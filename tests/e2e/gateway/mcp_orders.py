"""An MCP server with order tools, for tests: `python mcp_orders.py` (stdio) or `... PORT` (streamable HTTP)."""

from __future__ import annotations

import asyncio
import json
import os
import sys

from mcp.server.mcpserver import MCPServer

ORDERS = {"C-A": {"1": "delivered"}, "C-B": {"7": "blocked"}}
server = MCPServer("orders")


@server.tool()
def order_state(number: str, customer_id: str) -> str:
    """State of an order."""
    return json.dumps({"asked_for": customer_id, "state": ORDERS.get(customer_id, {}).get(number, "not found")})


@server.tool()
def opening_hours() -> str:
    """When the shop is open."""
    return "9 to 17"


@server.tool()
async def sleepy(seconds: float) -> str:
    """Takes its time."""
    await asyncio.sleep(seconds)
    return "awake"


@server.tool()
def one_line(size: int) -> str:
    """JSON on one line."""
    return json.dumps({"rows": "x" * size, "last": True})


@server.tool()
def crash() -> str:
    """Ends the process."""
    os._exit(1)


@server.tool(description="Very long. " * 500)
def long_winded() -> str:
    return "ok"


@server.tool()
def delete_everything() -> str:
    """Must never be offered."""
    raise AssertionError("called")


if __name__ == "__main__":
    if len(sys.argv) > 1:
        server.run("streamable-http", host="127.0.0.1", port=int(sys.argv[1]))
    else:
        server.run("stdio")
