"""Files of the kinds that once failed, from a collection beside a development checkout: exact counts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from steersman.data.formats import FORMATS
from steersman.data.importing import ImportJob, Summary, convert_rows
from steersman.data.table import ColumnMap, canonical_format, table_format

QA = {"prompt": "q", "answer": "a"}
JUDGED = {"prompt": "q", "chosen": "good", "rejected": "bad", "consent": "ok", "customer": "tenant"}
#: file -> (format, read, rows, rows left out)
CASES: dict[str, tuple[Any, int, int, int]] = {
    "alpaca_lf.json": (FORMATS["alpaca"], 1, 1, 0),
    "consent.csv": (table_format(ColumnMap(JUDGED)), 3, 3, 0),
    "consent.jsonl": (canonical_format("preference"), 7, 7, 0),
    "cut.jsonl.gz": (canonical_format("preference"), 0, 0, 1),
    "dupcol.csv": (table_format(ColumnMap(QA)), 1, 0, 1),
    "extra.jsonl": (canonical_format("demonstration"), 3, 3, 0),
    "float_label.jsonl": (table_format(ColumnMap(QA | {"label": "l"})), 7, 6, 1),
    "garbage.jsonl.gz": (canonical_format("preference"), 5, 4, 1),
    "helpsteer_pair.jsonl": (canonical_format("aspects"), 2, 2, 0),
    "hugeint.jsonl": (table_format(ColumnMap(QA | {"meta.n": "n"})), 2, 2, 0),
    "intid.jsonl": (canonical_format("preference"), 2, 2, 0),
    "rating_str.jsonl": (FORMATS["helpsteer"], 3, 2, 1),
    "semicolon.csv": (table_format(ColumnMap(QA)), 2, 2, 0),
    "surrogate.jsonl": (canonical_format("preference"), 2, 1, 1),
    "three_raters.jsonl": (canonical_format("preference"), 3, 3, 0),
    "toolnull.jsonl": (canonical_format("demonstration"), 2, 2, 0),
    "trl_implicit.jsonl": (canonical_format("preference"), 1, 1, 0),
    "ufb.jsonl": (canonical_format("preference"), 1, 1, 0),
    "z.jsonl.zst": (canonical_format("preference"), 3, 3, 0),
}


@pytest.mark.parametrize("file", CASES)
def test_every_case_gives_exactly_these_counts(shared_data: Path, file: str) -> None:
    path = shared_data.parent / "cases" / "data" / file
    if not path.is_file():
        pytest.skip(f"the case is not at {path}")
    format, read, kept, left_out = CASES[file]
    summary = Summary(format.name)
    rows = [row for row, _ in convert_rows(ImportJob(format, (str(path),)), summary, lambda *_: None, lambda *_: None)]
    assert summary.duplicates == 0
    if file == "cut.jsonl.gz":  # as many rows as could be unpacked, and that it is incomplete
        assert len(rows) > 10
        assert summary.incomplete == [f"{file}:{len(rows) + 1}"]
        return
    assert (summary.read, len(rows), summary.skips) == (read, kept, left_out)
    assert bool(summary.incomplete) is (file == "garbage.jsonl.gz")
    if file.startswith("consent"):
        refused = [row.get("consent") is False for row in rows]
        assert refused == ([True, False, True] if file.endswith("csv") else [True] * 4 + [False] * 3)


def test_no_case_is_forgotten(shared_data: Path) -> None:
    folder = shared_data.parent / "cases" / "data"
    if not folder.is_dir():
        pytest.skip(f"the cases are not at {folder}")
    assert {path.name for path in folder.iterdir()} == set(CASES)
