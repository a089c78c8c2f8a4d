"""docs/security.md names a test for each threat; all of them exist."""

from __future__ import annotations

import re
from pathlib import Path


def test_every_threat_has_tests_that_exist(repo_root: Path) -> None:
    text = (repo_root / "docs" / "security.md").read_text()
    rows = [line for line in text.partition("## Threats")[2].partition("## Left")[0].splitlines() if "|" in line]
    threats = [row for row in rows if not row.startswith(("| threat", "|---"))]
    assert len(threats) > 25
    folders = (repo_root / "tests", repo_root / "charts")
    source = "\n".join(path.read_text() for folder in folders for path in folder.rglob("test_*.py"))
    known = set(re.findall(r"def (test_\w+)", source))
    for row in threats:
        named = set(re.findall(r"`(test_\w+)`", row))
        assert named, f"no test: {row}"
        assert named <= known, named - known
