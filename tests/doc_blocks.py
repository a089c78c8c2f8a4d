"""The fenced blocks of the documentation, and the commands in them."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGES = [
    *(ROOT / name for name in ("README.md", "ARCHITECTURE.md", "CONTRIBUTING.md")),
    *sorted((ROOT / "docs").glob("*.md")),
    *sorted((ROOT / "docs/tutorials").glob("*.md")),
    *sorted((ROOT / "docs/adr").glob("*.md")),
    *sorted((ROOT / "examples").glob("*/README.md")),
]
SHELL = ("sh", "bash", "console")
_FENCE = re.compile(r"^( *)```(\S*)[^\n]*\n(.*?)^ *```[ \t]*$", re.M | re.S)
_HERE = re.compile(r"<<'EOF'.*?^EOF$", re.M | re.S)


@dataclass(frozen=True)
class Block:
    page: str
    """Below the repository's root."""
    line: int
    language: str
    """Empty: none is said."""
    text: str

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"

    @cached_property
    def commands(self) -> list[list[str]]:
        """The words of each command of a block of shell; a pipe, `&&` and `$(...)` are several commands."""
        text = _HERE.sub("", self.text).replace("\\\n", " ")
        found = []
        for line in _whole_lines(text):
            inner = re.findall(r"\$\(([^()]*)\)", line)
            outer = re.sub(r"\$\([^()]*\)", "X", line)
            for part in (*re.split(r"\s(?:&&|\||&)(?:\s|$)", outer), *inner):
                words = shlex.split(part, comments=True)
                if words and re.fullmatch(r"[A-Z_]+=\S*", words[0]) and len(words) > 1:
                    words = [word for word in words if not re.fullmatch(r"[A-Z_]+=\S*", word)]
                if words:
                    found.append(words)
        return found


def _whole_lines(text: str) -> Iterator[str]:
    """Lines, those whose quote goes on in the next one put together."""
    whole = ""
    for line in text.splitlines():
        whole += line + "\n"
        try:
            shlex.split(whole, comments=True)
        except ValueError:
            continue
        yield whole.strip()
        whole = ""
    assert not whole.strip(), f"a quote is never closed: {whole}"


def blocks(*languages: str) -> list[Block]:
    """All blocks in these languages; without any, all blocks."""
    found = []
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for match in _FENCE.finditer(text):
            indent, language, inner = match.groups()
            line = text.count("\n", 0, match.start()) + 1
            inner = re.sub(rf"^{indent}", "", inner, flags=re.M)
            found.append(Block(page.relative_to(ROOT).as_posix(), line, language, inner))
    return [block for block in found if not languages or block.language in languages]
