"""Prints what pip installs into an image: requirements of the core and of extras.

    python scripts/image_requirements.py pyproject.toml gateway controller

The Dockerfiles install these before they copy the code, so that a change of code rebuilds one small layer.
"""

from __future__ import annotations

import sys
import tomllib
from pathlib import Path


def requirements(pyproject: Path, extras: list[str]) -> list[str]:
    """Requirements of the core and the extras; `steersman[x]` inside an extra is followed."""
    project = tomllib.loads(pyproject.read_text(encoding="utf-8"))["project"]
    found: list[str] = list(project["dependencies"])
    queue = list(extras)
    while queue:
        for requirement in project["optional-dependencies"][queue.pop()]:
            if requirement.startswith("steersman["):
                queue += requirement[len("steersman[") : requirement.index("]")].split(",")
            elif requirement not in found:
                found.append(requirement)
    return found


if __name__ == "__main__":
    print("\n".join(requirements(Path(sys.argv[1]), sys.argv[2:])))
