"""Reads Dockerfiles: stages, what becomes an image, and what pip installs."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass, field
from pathlib import Path

from image_requirements import requirements

KEYWORDS = ("RUN", "COPY", "ENV", "ARG", "LABEL", "USER", "WORKDIR", "ENTRYPOINT", "CMD", "SHELL")
BUILD_TOOLS = ("gcc", "g++", "make", "git", "curl", "build-essential", "binutils", "devel")

Step = tuple[str, str]
"""Keyword and rest of an instruction."""


@dataclass
class Stage:
    """One `FROM ... AS name` and its instructions."""

    image: str
    name: str
    steps: list[Step] = field(default_factory=list)


@dataclass
class Installation:
    """What the `pip install` commands of a stage bring together."""

    stage: str
    requirements: list[str] = field(default_factory=list)
    alone: list[str] = field(default_factory=list)
    """Installed with `--no-deps`."""
    constraints: str = ""
    """Name of the file with the pins."""
    locks: list[str] = field(default_factory=list)
    """Files with pins and the digests of what may be installed for them: first of the requirements, then of what comes
    alone."""
    removed: list[str] = field(default_factory=list)
    """Taken out again."""


def parse(path: Path) -> list[Stage]:
    """The stages of a Dockerfile; ValueError for an instruction that is not understood."""
    text = re.sub(
        r"\\\n\s*", " ", "\n".join(line for line in path.read_text().splitlines() if not line.startswith("#"))
    )
    stages: list[Stage] = []
    for line in filter(None, map(str.strip, text.splitlines())):
        keyword, _, rest = line.partition(" ")
        if keyword == "FROM":
            image, _, name = rest.partition(" AS ")
            stages.append(Stage(image, name or str(len(stages))))
        elif keyword in KEYWORDS:
            if stages:
                stages[-1].steps.append((keyword, rest))
        else:
            raise ValueError(f"{path.name}: the instruction {keyword} is not understood")
    return stages


def chain(stages: list[Stage], name: str) -> tuple[str, list[Step]]:
    """The base image below a stage, and all steps from there to the stage's last."""
    named = {stage.name: stage for stage in stages}
    steps: list[Step] = []
    while name in named:
        steps = named[name].steps + steps
        name = named[name].image
    return name, steps


def problems(path: Path, stages: list[Stage], source: Path) -> list[str]:
    """What is wrong with the stages that become images (those with a CMD), and COPY sources that `source` lacks."""
    found = ["has a HEALTHCHECK; probes do that"] if "HEALTHCHECK" in path.read_text() else []
    for image in (stage.name for stage in stages if any(keyword == "CMD" for keyword, _ in stage.steps)):
        base, steps = chain(stages, image)
        if not re.search(r"@\$\{[A-Z]+_DIGEST\}$", base):
            found.append(f"{base} is not pinned by a digest argument")
        users = [rest for keyword, rest in steps if keyword == "USER"]
        if not users or users[-1].split(":")[0] in ("root", "0"):
            found.append(f"{image} runs as root")
        elif not any(
            keyword == "RUN" and f":x:{users[-1]}:" in rest and "/etc/passwd" in rest for keyword, rest in steps
        ):
            found.append(f"{image} has no entry in /etc/passwd for its user {users[-1]}")
        if not any(keyword == "LABEL" for keyword, _ in steps):
            found.append(f"{image} has no labels")
        copies = [rest for keyword, rest in steps if keyword == "COPY"]
        if not all(rest.startswith("--from=") for rest in copies):
            found.append(f"{image} copies from the context instead of a build stage")
        if not copies or not copies[-1].endswith(" /opt/code /opt/code"):
            found.append(f"{image} does not copy the code last")
        for tool in BUILD_TOOLS:
            if any(keyword == "RUN" and re.search(rf"\b{re.escape(tool)}(?!\w)", rest) for keyword, rest in steps):
                found.append(f"{image} installs {tool}")
    return found + [
        f"COPY {name}: no such file in the build context" for name in _copied(stages) if not (source / name).exists()
    ]


def _copied(stages: list[Stage]) -> list[str]:
    """What is copied out of the build context."""
    copied = [rest.split() for stage in stages for keyword, rest in stage.steps if keyword == "COPY"]
    return list(dict.fromkeys(name for words in copied if not words[0].startswith("--") for name in words[:-1]))


def installations(stages: list[Stage], pyproject: Path) -> list[Installation]:
    """What pip installs in each stage that installs libraries."""
    found = []
    for stage in stages:
        arguments = dict(rest.split("=", 1) for keyword, rest in stage.steps if keyword == "ARG" and "=" in rest)
        installation, listed = Installation(stage.name), list[str]()
        for run in (rest for keyword, rest in stage.steps if keyword == "RUN"):
            for name, value in arguments.items():
                run = run.replace(f"${{{name}}}", value)
            for command in map(shlex.split, run.split("&&")):
                if "image_requirements.py" in command:
                    listed = requirements(pyproject, command[command.index("pyproject.toml") + 1 : command.index(">")])
                elif "install" in command and "--target" not in command and command[0].endswith("pip"):
                    _collect(installation, command[command.index("install") + 1 :], listed)
                elif "uninstall" in command:
                    installation.removed += [word for word in command[2:] if not word.startswith("-")]
        if installation.requirements:
            copied = {name.rpartition("/")[2]: name for name in _copied([stage])}
            paths = [copied.get(lock, "") for lock in installation.locks]
            installation.locks = [path for path in paths if path.startswith("locks/")]
            found.append(installation)
    return found


def _collect(installation: Installation, words: list[str], listed: list[str]) -> None:
    if "--require-hashes" in words:
        installation.locks.append(words[words.index("-r") + 1])
        return
    target = installation.alone if "--no-deps" in words else installation.requirements
    rest = iter(words)
    for word in rest:
        if word == "-c":
            installation.constraints = next(rest)
        elif word == "-r":
            next(rest)
            target += listed
        elif word == "--index-url":
            next(rest)
        elif not word.startswith("-"):
            target.append(word)
