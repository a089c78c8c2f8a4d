"""The files of a release: sealed with their hashes, described by a data card, copied without somebody's rows."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import orjson
from pydantic import BaseModel

from steersman.artifacts import file_digest


class Draft(BaseModel):
    """A release written to a folder, not yet registered."""

    card: dict[str, Any]
    digest: str
    customers: dict[str, int]
    """Tenant -> rows."""
    end_customers: dict[str, int] = {}
    """Pseudonym of an end customer -> rows."""


def seal(folder: Path, card: dict[str, Any], customers: dict[str, int], end_customers: dict[str, int]) -> Draft:
    """Adds file hashes, card.json and README.md to a folder of JSONL files."""
    card = card | {"files": {path.name: file_digest(path) for path in sorted(folder.glob("*.jsonl"))}}
    digest = hashlib.sha256(orjson.dumps(card["files"], option=orjson.OPT_SORT_KEYS)).hexdigest()
    (folder / "card.json").write_bytes(orjson.dumps(card, option=orjson.OPT_INDENT_2) + b"\n")
    (folder / "README.md").write_text(render_card(card, digest))
    return Draft(card=card, digest=digest, customers=customers, end_customers=end_customers)


def render_card(card: dict[str, Any], digest: str) -> str:
    """The data card for people."""
    lines = [f"# {card['name']}", "", f"{card['rows']:,} rows of type {card['kind']}. SHA-256 `{digest}`.", ""]
    for title, key in (
        ("Splits", "splits"), ("Sources", "sources"), ("Licences", "licences"), ("Left out", "left out"),
        ("Personal data replaced", "scrubbed"), ("Files", "files"),
    ):  # fmt: skip
        if card.get(key):
            lines += [f"## {title}", "", *(f"- {name}: {value}" for name, value in card[key].items()), ""]
    restricted = sorted(name for name in card["licences"] if "-NC" in name or "-SA" in name)
    if restricted:
        lines += [f"Mind the terms of {', '.join(restricted)}: non-commercial or share-alike.", ""]
    if card["agreement"]:
        lines += [
            "## Agreement",
            "",
            "| project | question | units | raw | alpha | Fleiss' kappa |",
            "|---|---|---|---|---|---|",
        ]
        for project, report in card["agreement"].items():
            for q in report["questions"]:
                figures = " | ".join("-" if q[key] is None else f"{q[key]:.3f}" for key in ("raw", "alpha", "fleiss"))
                lines.append(f"| {project} | {q['question']} | {q['units']} | {figures} |")
        lines.append("")
    if card.get("replaces"):
        lines += [f"Made from version {card['replaces']} by deleting somebody's rows.", ""]
    return "\n".join(lines)


RowFilter = Callable[[dict[str, Any]], bool]


def write_without(old: Path, folder: Path, card: dict[str, Any], wanted: RowFilter) -> Draft:
    """Writes a copy of a release's files that holds only the wanted rows."""
    splits: Counter[str] = Counter()
    sources: Counter[str] = Counter()
    customers: Counter[str] = Counter()
    end_customers: Counter[str] = Counter()
    licences: Counter[str] = Counter()
    for name in sorted(card["files"]):
        with open(folder / name, "wb") as sink, open(old / name, "rb") as lines:
            for line in lines:
                row = orjson.loads(line)
                if wanted(row):
                    sink.write(line)
                    splits[name.removesuffix(".jsonl")] += 1
                    sources[row.get("source") or "not stated"] += 1
                    licences[row.get("licence") or "not stated"] += 1
                    customers[row.get("customer") or ""] += 1
                    end_customers[row.get("end_customer") or ""] += 1
    customers.pop("", None)
    end_customers.pop("", None)
    changed = {
        "rows": sum(splits.values()),
        "splits": dict(sorted(splits.items())),
        "licences": dict(sorted(licences.items())),
        "tenants": len(customers),
    }
    return seal(folder, card | changed, dict(customers), dict(end_customers))
