"""Making a release: rows from projects, live feedback and files become one versioned, documented data set.

    sources -> rules (ties, disagreement, unsafe, consent, tenants) -> scrub -> copies out -> splits -> files + card

The same store, files and options give the same bytes. What is left out is counted by reason in the data card.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from contextlib import ExitStack
from pathlib import Path
from typing import IO, Any

import sqlalchemy as sa
from pydantic import ValidationError
from sqlalchemy.orm import Session

from steersman.data.agreement import AgreementReport, Thresholds
from steersman.data.format import Skip
from steersman.data.pii import Scrubber
from steersman.data.plain import seldom_collected
from steersman.data.records import ROW_TYPES, describe_validation_error
from steersman.data.release import Draft, seal
from steersman.data.rules import ReleaseOptions
from steersman.data.splits import SeenSet, Splits, encode
from steersman.errors import FailedPreconditionError
from steersman.store.gather import source_rows
from steersman.store.judging import get_project
from steersman.store.models import Deletion
from steersman.store.statistics import agreement_report


def check_agreement(session: Session, options: ReleaseOptions) -> dict[str, dict[str, Any]]:
    """Agreement figures of the projects among the sources.

    Raises FailedPreconditionError with the figures when one misses a threshold.
    """
    figures = {}
    failures = []
    blocked = []
    for source in options.sources:
        if source.startswith("project:"):
            project = get_project(session, source.removeprefix("project:"))
            report = agreement_report(session, project)
            thresholds = options.thresholds or Thresholds.model_validate(project.thresholds)
            found = report.failures(thresholds)
            failures += [f"{project.name}: {failure}" for failure in found]
            blocked += [project.name] if found else []
            shown = report if options.name_labelers else without_names(report)
            figures[project.name] = shown.model_dump(mode="json", exclude={"pairs", "days"})
            figures[project.name]["thresholds"] = thresholds.model_dump(exclude_none=True)
    if failures:
        raise FailedPreconditionError(
            f"release {options.name}: blocked; {'; '.join(failures)}; judge more, or mend the guidelines and "
            f"have the disputed items judged again with `steersman data reopen {' '.join(blocked)}`",
            details={"failures": failures},
        )
    return figures


@seldom_collected()
def write_release(session: Session, options: ReleaseOptions, folder: Path) -> Draft:
    """Writes the files of a release into an empty folder: one JSONL a split, README.md and card.json.

    Raises FailedPreconditionError when agreement misses a threshold or no row is left, DataError for a wrong row in
    a file.
    """
    agreement = check_agreement(session, options)
    scrubber = Scrubber(options.pii)
    splits = Splits(options.splits, seed=options.seed, by=options.split_by, salt=split_salt(options.sources))
    deleted = {
        (customer, name)
        for customer, name in session.execute(
            sa.select(Deletion.customer, Deletion.end_customer).where(Deletion.lifted_at.is_(None))
        )
    }
    earlier: list[SeenSet] = []  # of each source: what another source holds too is a copy
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    released: Counter[tuple[str, str, str | None, str | None, str | None]] = Counter()
    validate = ROW_TYPES[options.kind].model_validate
    votes = options.kind != "demonstration"  # equal judgements of one source are several people's
    with ExitStack() as stack:
        files: dict[str, IO[bytes]] = {
            split: stack.enter_context(open(folder / f"{split}.jsonl", "wb", 1 << 20)) for split in splits.names
        }
        for source in options.sources:
            own = SeenSet()
            checked = (
                not source.startswith("project:") and source != "feedback"
            )  # rows of files were read by their type
            for row in source_rows(session, options, source):
                left_out = row if isinstance(row, Skip) else _refusal(options, deleted, row)
                if isinstance(row, Skip) or left_out is not None:
                    counts["left out"][(left_out or Skip("")).reason] += 1
                    continue
                split = splits.of(row)  # before scrubbing, so that two tags do not make one prompt
                scrubbed = scrubber.scrub_row(row)
                unchanged, row = scrubbed is row, scrubbed
                try:
                    if not (unchanged and checked):
                        validate(row)
                except ValidationError as error:
                    counts["left out"][describe_validation_error(error)] += 1
                    continue
                line, fingerprint = encode(row)
                fresh = own.add(fingerprint)
                if any(fingerprint in seen for seen in earlier) or not (fresh or votes):
                    counts["left out"]["duplicate"] += 1
                    continue
                files[split].write(line + b"\n")
                released[split, source, row.get("licence"), row.get("customer"), row.get("end_customer")] += 1
            earlier.append(own)
    options.rule.check_names()
    for (split, source, licence, customer, end_customer), n in released.items():
        for what, value in (
            ("splits", split),
            ("sources", source),
            ("licences", licence or "not stated"),
            ("customers", customer or ""),
            ("end customers", end_customer or ""),
        ):
            counts[what][value] += n
    if not counts["splits"]:
        why = ", ".join(f"{n} x {reason}" for reason, n in counts["left out"].items()) or "the sources are empty"
        raise FailedPreconditionError(f"release {options.name}: no row is left ({why})")
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
        "scrubbed samples": scrubber.samples,
        "empty splits": [name for name in splits.names if options.splits[name] and not counts["splits"][name]],
        "agreement": agreement,
        "options": options.model_dump(mode="json", exclude={"customers", "exclude_customers"}),
    }
    return seal(folder, card, customers, end_customers)


def split_salt(sources: tuple[str, ...]) -> str:
    """What makes the draw of a release independent of the draws that its sources went through.

    Imports are drawn with a salt of their own, and a release that serves as a source gives one here: either side of
    them can be divided again. Between versions of one data set a prompt stays on its side.
    """
    folders = {Path(source).absolute().parent for source in sources}
    return ":".join(
        sorted(f"{folder.parent.name}/{folder.name}" for folder in folders if (folder / "card.json").is_file())
    )


def without_names(report: AgreementReport) -> AgreementReport:
    """The report with its labelers numbered: a data card goes further than their names should."""
    labelers = [
        figures.model_copy(update={"labeler": f"labeler {number}"})
        for number, figures in enumerate(sorted(report.labelers, key=lambda figures: -figures.judgements), start=1)
    ]
    return report.model_copy(update={"labelers": labelers, "pairs": [], "days": []})


def _refusal(options: ReleaseOptions, deleted: set[tuple[Any, ...]], row: dict[str, Any]) -> Skip | None:
    """Why a row must not be released."""
    customer = row.get("customer")
    if (customer, "") in deleted:
        return Skip("tenant deleted")
    if row.get("end_customer") and (customer, row["end_customer"]) in deleted:
        return Skip("end customer deleted")
    if customer in options.exclude_customers or (
        customer and options.customers is not None and customer not in options.customers
    ):
        return Skip("tenant not included")
    if row.get("consent") is False or (options.consent == "given" and row.get("consent") is not True):
        return Skip("no consent")
    if options.licences is not None and row.get("licence") not in options.licences:
        return Skip(f"licence {row.get('licence') or 'not stated'}")
    if options.kind == "preference" and row.get("margin", options.min_margin) < options.min_margin:
        return Skip("margin too small")
    return None
