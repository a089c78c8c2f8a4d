"""Precision and recall of scrubbing personal data on labelled rows of customer service.

    python -m benchmarks.pii

In the rows `[[phone:...]]` marks what must be replaced, and by which tag; `[[keep:...]]` marks a number of the business
that must stay. Writes build/bench/pii.json: `precision` (of all replacements those that were marked), `recall` (of all
marks those that were replaced whole, by the right tag), `business_numbers_kept` (share of the numbers that stay).
All numbers are invented, or from the ranges that the countries keep free for films.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from benchmarks.report import command_line, write
from steersman.data.pii import Scrubber

ROWS = Path(__file__).with_name("pii_rows.txt")
_MARK = re.compile(r"\[\[(\w+):(.+?)\]\]")


@dataclass(frozen=True)
class Labelled:
    """A text with what is to be replaced and what is to stay, by character."""

    text: str
    personal: dict[tuple[int, int], str]
    business: list[tuple[int, int]]


def read_rows(path: Path = ROWS) -> list[Labelled]:
    """The labelled rows, one a line; lines that begin with # say what follows."""
    rows = []
    for line in path.read_text().splitlines():
        if not line or line.startswith("# "):
            continue
        text, behind = "", 0
        personal: dict[tuple[int, int], str] = {}
        business: list[tuple[int, int]] = []
        for mark in _MARK.finditer(line):
            text += line[behind : mark.start()]
            place = (len(text), len(text) + len(mark[2]))
            if mark[1] == "keep":
                business.append(place)
            else:
                personal[place] = f"<{mark[1].upper()}>"
            text, behind = text + mark[2], mark.end()
        rows.append(Labelled(text + line[behind:], personal, business))
    return rows


def measure(rows: list[Labelled], scrubber: Scrubber) -> dict[str, float]:
    """Counts and shares over all rows."""
    marked = right = replaced = kept = business = 0
    for row in rows:
        found = {(start, end): tag for start, end, tag in scrubber.find(row.text)}
        marked += len(row.personal)
        replaced += len(found)
        right += sum(row.personal.get(place) == tag for place, tag in found.items())
        business += len(row.business)
        kept += sum(all(end <= a or b <= start for a, b in found) for start, end in row.business)
    return {
        "precision": right / replaced if replaced else 0.0,
        "recall": right / marked if marked else 0.0,
        "business_numbers_kept": kept / business if business else 0.0,
        "rows": len(rows),
        "personal": marked,
        "business_numbers": business,
    }


def main() -> None:
    parser = command_line(__doc__, "pii")
    parser.add_argument("--rows", type=Path, default=ROWS, help="labelled rows of your own")
    arguments = parser.parse_args()
    figures = measure(read_rows(arguments.rows), Scrubber())
    write(figures, arguments.out)
    print(", ".join(f"{name} {value:.3f}" if value <= 1 else f"{value:.0f} {name}" for name, value in figures.items()))


if __name__ == "__main__":
    main()
