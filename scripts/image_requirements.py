"""Prints what pip installs into an image.

    python scripts/image_requirements.py pyproject.toml gateway controller   # requirements of the core and of extras
    python scripts/image_requirements.py --beside vllm constraints.txt       # constraints, less what vllm bounds itself

The Dockerfiles install these before they copy the code, so that a change of code rebuilds one small layer.
"""

from __future__ import annotations

import re
import sys
import tomllib
from importlib import metadata
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


def beside(constraints: list[str], bounds: list[str]) -> list[str]:
    """The constraints of packages for which `bounds`, a package's own requirements, leaves every version.

    numpy's is left out as well: vllm pins numba, and numba bounds numpy.
    """
    bounded = {"numpy"} | {_name(bound) for bound in bounds if re.search(r"[<=!~]=?\s*\d", bound.partition(";")[0])}
    return [line for line in constraints if _name(line) not in bounded]


def _name(requirement: str) -> str:
    return re.split(r"[^A-Za-z0-9._-]", requirement, maxsplit=1)[0].lower().replace("_", "-")


def main(arguments: list[str]) -> None:
    if arguments[0] == "--beside":
        lines = Path(arguments[2]).read_text(encoding="utf-8").splitlines()
        print("\n".join(beside(lines, metadata.requires(arguments[1]) or [])))
    else:
        print("\n".join(requirements(Path(arguments[0]), arguments[1:])))


if __name__ == "__main__":
    main(sys.argv[1:])
