"""The table 'client x call' of docs/gateway.md, from the benchmark's report.

python -m benchmarks.clients.table benchmarks/results/clients.json
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

_CELLS = {"works": "yes", "refused_by_name": "refused by name", "broken": "**broken**"}


def table(report: dict[str, Any]) -> str:
    """Markdown: a row a call, a column a client; empty where the client does not make the call."""
    clients = list(report["versions"])
    cells: dict[tuple[str, str], str] = {}
    for outcome, said in _CELLS.items():
        for name in report[outcome]:
            client = next(client for client in clients if name.startswith(f"{client} "))
            cells[name.removeprefix(f"{client} "), client] = said
    calls = dict.fromkeys(call for call, _ in cells)
    rows = [["call", *(f"{client} {_version(report, client)}" for client in clients)], ["---"] * (len(clients) + 1)]
    rows += [[call, *(cells.get((call, client), "") for client in clients)] for call in calls]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _version(report: dict[str, Any], client: str) -> str:
    versions = report["versions"][client]
    return str(versions.get({"vercel-ai": "ai"}.get(client, ""), next(iter(versions.values()))))


if __name__ == "__main__":
    print(table(json.loads(Path(sys.argv[1]).read_text())))
