"""Making a release: rows from projects, live feedback and files become one versioned, documented data set.

    sources -> rules (ties, disagreement, unsafe, consent, tenants) -> scrub -> duplicates out -> splits -> files + card

The same store, files and options give the same bytes. What is left out is counted by reason in the data card.
"""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import IO, Any

import orjson
import sqlalchemy as sa
from pydantic import BaseModel, ValidationError
from sqlalchemy.orm import Session

from steersman.data.agreement import Thresholds
from steersman.data.gather import source_rows
from steersman.data.pii import Scrubber
from steersman.data.records import ROW_TYPES, describe_validation_error, file_digest
from steersman.data.rules import ReleaseOptions
from steersman.data.splits import SeenSet, Splits, encode
from steersman.errors import FailedPreconditionError
from steersman.store.judging import get_project
from steersman.store.models import Deletion
from steersman.store.statistics import agreement_report


class Draft(BaseModel):
    """A release written to a folder, not yet registered."""

    card: dict[str, Any]
    digest: str
    customers: dict[str, int]
    """Tenant -> rows."""
    end_customers: dict[str, int] = {}
    """Pseudonym of an end customer -> rows."""


def check_agreement(session: Session, options: ReleaseOptions) -> dict[str, dict[str, Any]]:
    """Agreement figures of the projects among the sources.

    Raises FailedPreconditionError with the figures when one misses a threshold.
    """
    figures = {}
    failures = []
    for source in options.sources:
        if source.startswith("project:"):
            project = get_project(session, source.removeprefix("project:"))
            report = agreement_report(session, project)
            thresholds = options.thresholds or Thresholds.model_validate(project.thresholds)
            failures += [f"{project.name}: {failure}" for failure in report.failures(thresholds)]
            figures[project.name] = report.model_dump(mode="json", exclude={"pairs", "days"})
            figures[project.name]["thresholds"] = thresholds.model_dump(exclude_none=True)
    if failures:
        raise FailedPreconditionError(
            f"release {options.name}: blocked; {'; '.join(failures)}; judge more or mend the guidelines first",
            details={"failures": failures},
        )
    return figures


def write_release(session: Session, options: ReleaseOptions, folder: Path) -> Draft:
    """Writes the files of a release into an empty folder: one JSONL a split, README.md and card.json.

    Raises FailedPreconditionError when agreement misses a threshold or no row is left, DataError for a wrong row in
    a file.
    """
    agreement = check_agreement(session, options)
    scrubber = Scrubber(options.pii)
    splits = Splits(options.splits, seed=options.seed, by=options.split_by)
    deleted = {
        (customer, name) for customer, name in session.execute(sa.select(Deletion.customer, Deletion.end_customer))
    }
    seen = SeenSet()
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    validate = ROW_TYPES[options.kind].model_validate
    with ExitStack() as stack:
        files: dict[str, IO[bytes]] = {
            split: stack.enter_context(open(folder / f"{split}.jsonl", "wb")) for split in splits.names
        }
        for source in options.sources:
            for row in source_rows(session, options, source):
                reason = row if isinstance(row, str) else _refusal(options, deleted, row)
                if reason is not None or isinstance(row, str):
                    counts["left out"][reason or ""] += 1
                    continue
                split = splits.of(row)  # before scrubbing, so that two tags do not make one prompt
                row = scrubber.scrub_row(row)
                try:
                    validate(row)
                except ValidationError as error:
                    counts["left out"][describe_validation_error(error)] += 1
                    continue
                line, fingerprint = encode(row)
                if not seen.add(fingerprint):
                    counts["left out"]["duplicate"] += 1
                    continue
                files[split].write(line + b"\n")
                for what, value in (
                    ("splits", split),
                    ("sources", source),
                    ("licences", row.get("licence") or "not stated"),
                    ("customers", row.get("customer") or ""),
                    ("end customers", row.get("end_customer") or ""),
                ):
                    counts[what][value] += 1
    if not counts["splits"]:
        left_out = ", ".join(f"{n} x {reason}" for reason, n in counts["left out"].items()) or "the sources are empty"
        raise FailedPreconditionError(f"release {options.name}: no row is left ({left_out})")
    customers, end_customers = (
        {name: n for name, n in counts.pop(what).items() if name} for what in ("customers", "end customers")
    )
    card = {
        "name": options.name,
        "kind": options.kind,
        "rows": sum(counts["splits"].values()),
        **{what: dict(sorted(counts[what].items())) for what in ("splits", "sources", "licences", "left out")},
        "tenants": len(customers),
        "scrubbed": dict(sorted(scrubber.found.items())),
        "agreement": agreement,
        "options": options.model_dump(mode="json", exclude={"customers", "exclude_customers"}),
    }
    return seal(folder, card, customers, end_customers)


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


def _refusal(options: ReleaseOptions, deleted: set[tuple[Any, ...]], row: dict[str, Any]) -> str | None:
    """Why a row must not be released."""
    customer = row.get("customer")
    if (customer, "") in deleted:
        return "tenant deleted"
    if row.get("end_customer") and (customer, row["end_customer"]) in deleted:
        return "end customer deleted"
    if customer in options.exclude_customers or (
        customer and options.customers is not None and customer not in options.customers
    ):
        return "tenant not included"
    if row.get("consent") is False or (options.consent == "given" and row.get("consent") is not True):
        return "no consent"
    if options.licences is not None and row.get("licence") not in options.licences:
        return f"licence {row.get('licence') or 'not stated'}"
    if options.kind == "preference" and row.get("margin", options.min_margin) < options.min_margin:
        return "margin too small"
    return None


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
