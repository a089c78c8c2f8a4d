"""What the scripts of the clients share. They run in environments of their own, so this imports nothing else."""

from __future__ import annotations

import asyncio
import inspect
import json
import sys
from collections.abc import Callable
from typing import Any

URL, MODEL, KEY, EMBEDDING, GRPC = sys.argv[1:6] if len(sys.argv) > 5 else ("",) * 5
ORDER = {
    "type": "object",
    "properties": {"number": {"type": "integer", "minimum": 0, "maximum": 999}},
    "required": ["number"],
    "additionalProperties": False,
}
HELLO = [{"role": "user", "content": "hello there"}]


async def run(calls: dict[str, Callable[[], Any]]) -> None:
    """Makes every call, and prints one line for each: its name, and what went wrong."""
    for name, call in calls.items():
        outcome: dict[str, Any] = {"call": name}
        try:
            made = call()
            if inspect.isawaitable(made):
                await asyncio.wait_for(made, 120)
        except BaseException as error:
            outcome |= {"error": f"{type(error).__name__}: {error}"[:600]}
        print("RESULT " + json.dumps(outcome), flush=True)


def main(calls: dict[str, Callable[[], Any]]) -> None:
    asyncio.run(run(calls))


def must(condition: object, what: object = "") -> None:
    if not condition:
        raise AssertionError(f"not what was asked for: {what}")
