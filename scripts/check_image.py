"""Builds an image without a container engine, and starts what it holds.

    python scripts/check_image.py                            # Dockerfile: runs the steps, checks size and entry points
    python scripts/check_image.py --resolve Dockerfile.gpu   # checks it, and that pip finds versions that fit together
    python scripts/check_image.py --parse Dockerfile.gpu     # checks its files and what becomes an image

The steps of the first stage are executed as they stand: `COPY` out of a read-only copy of the sources that holds just
what .dockerignore lets through, `RUN` with the same commands in a clean prefix. The base image is this machine's
Python; steps that need root (apt-get) are left out and named. The GPU image's libraries are many gigabytes: `--resolve`
asks the package index for what its last `pip install` would install, and downloads nothing but metadata.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import shutil
import stat
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from image_requirements import beside, requirements

ROOT = Path(__file__).resolve().parent.parent
BASE_IMAGE_MIB = 130
"""python:3.11-slim-bookworm, unpacked."""
LIMIT_MIB = 400
"""Of what the image adds to its base. KServe's SDK (pandas, pillow, kubernetes) is the half of it."""
ENTRY_POINTS = ("services.gateway", "services.controller", "steersman.rpc.probe")
BUILD_TOOLS = ("gcc", "g++", "make", "git", "curl", "build-essential", "devel")


@dataclass
class Stage:
    """One `FROM ... AS name` and its instructions."""

    image: str
    name: str
    steps: list[tuple[str, str]] = field(default_factory=list)


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
        elif keyword in ("RUN", "COPY", "ENV", "ARG", "LABEL", "USER", "WORKDIR", "ENTRYPOINT", "CMD", "SHELL"):
            if stages:
                stages[-1].steps.append((keyword, rest))
        else:
            raise ValueError(f"{path.name}: the instruction {keyword} is not understood")
    return stages


def context(target: Path) -> None:
    """Copies what .dockerignore lets into the build context, and makes it read-only."""
    allowed = [line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")]
    for name in allowed:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, target / name, ignore=shutil.ignore_patterns("__pycache__", "*.pyc"))
        else:
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(source, target / name)
    for path in sorted(target.rglob("*"), reverse=True):
        path.chmod(path.stat().st_mode & ~(stat.S_IWUSR | stat.S_IWGRP | stat.S_IWOTH))


def check_stages(path: Path, stages: list[Stage]) -> list[str]:
    """What is wrong with the stages that become images: those with a CMD."""
    chain = {stage.name: stage for stage in stages}
    problems = ["has a HEALTHCHECK; probes do that"] if "HEALTHCHECK" in path.read_text() else []
    for image in (stage for stage in stages if any(keyword == "CMD" for keyword, _ in stage.steps)):
        steps: list[tuple[str, str]] = []
        stage: Stage | None = image
        while stage is not None:
            steps = stage.steps + steps
            if stage.image not in chain and not re.search(r"@\$\{[A-Z]+_DIGEST\}$", stage.image):
                problems.append(f"{stage.image} is not pinned by a digest argument")
            stage = chain.get(stage.image)
        users = [rest for keyword, rest in steps if keyword == "USER"]
        if not users or users[-1].split(":")[0] in ("root", "0"):
            problems.append(f"{image.name} runs as root")
        if not any(keyword == "LABEL" for keyword, _ in steps):
            problems.append(f"{image.name} has no labels")
        copies = [rest for keyword, rest in steps if keyword == "COPY"]
        if not all(rest.startswith("--from=") for rest in copies):
            problems.append(f"{image.name} copies from the context instead of a build stage")
        if not copies or not copies[-1].endswith(" /opt/code /opt/code"):
            problems.append(f"{image.name} does not copy the code last")
        for tool in BUILD_TOOLS:
            if any(keyword == "RUN" and re.search(rf"\b{re.escape(tool)}\b", rest) for keyword, rest in steps):
                problems.append(f"{image.name} installs {tool}")
    return problems


def missing_sources(stages: list[Stage], source: Path) -> list[str]:
    """COPY sources that the build context does not hold."""
    copies = [rest.split() for stage in stages for keyword, rest in stage.steps if keyword == "COPY"]
    wanted = [name for words in copies if not words[0].startswith("--") for name in words[:-1]]
    return [name for name in wanted if not (source / name).exists()]


class Builder:
    """Executes the steps of the first stage under a prefix that stands for `/`."""

    def __init__(self, source: Path, prefix: Path) -> None:
        self._source = source
        self._prefix = prefix
        self._directory = prefix
        self._environment = {"PATH": os.environ["PATH"], "HOME": str(prefix)}
        self._environment |= {
            key: value for key, value in os.environ.items() if key.startswith(("PIP_", "SSL_", "REQUESTS_"))
        }

    def step(self, keyword: str, rest: str) -> None:
        if keyword == "WORKDIR":
            self._directory = self._prefix / rest.lstrip("/")
            self._directory.mkdir(parents=True, exist_ok=True)
        elif keyword == "ENV":
            pairs = (pair.partition("=") for pair in rest.split())
            self._environment |= {name: value for name, _, value in pairs if name != "PATH"}
        elif keyword == "COPY":
            self._copy(rest.split())
        elif keyword == "RUN":
            if "apt-get" in rest:
                print(f"left out (needs root): {rest}", flush=True)
                return
            print(f"RUN {rest}", flush=True)
            command = rest.replace("/opt/", f"{self._prefix}/opt/")
            shell = ["bash", "-euo", "pipefail", "-c", command]
            subprocess.run(shell, cwd=self._directory, env=self._environment, check=True, stdout=subprocess.DEVNULL)

    def _copy(self, words: list[str]) -> None:
        *sources, target = words
        for name in sources:
            place = self._directory / target
            source = self._source / name
            if source.is_dir():
                shutil.copytree(source, place, copy_function=shutil.copyfile)
                continue
            place = place / source.name if target.endswith("/") else place
            shutil.copyfile(source, place)


def size_mib(folder: Path) -> float:
    return sum(path.lstat().st_size for path in folder.rglob("*") if not path.is_dir()) / 2**20


def build(dockerfile: Path) -> int:
    """Executes the build stage, then starts every entry point with read-only code."""
    stages = parse(dockerfile)
    with tempfile.TemporaryDirectory(prefix="image-") as folder:
        source, prefix = Path(folder) / "context", Path(folder) / "root"
        source.mkdir()
        prefix.mkdir()
        context(source)
        problems = check_stages(dockerfile, stages)
        problems += [f"COPY {name}: not in the build context" for name in missing_sources(stages, source)]
        if not problems:
            builder = Builder(source, prefix)
            for keyword, rest in stages[0].steps:
                builder.step(keyword, rest)
            problems += entry_points(prefix)
            libraries, code = size_mib(prefix / "opt/steersman"), size_mib(prefix / "opt/code")
            total = BASE_IMAGE_MIB + libraries + code
            print(f"libraries {libraries:.0f} MiB + code {code:.1f} MiB + base {BASE_IMAGE_MIB} MiB = {total:.0f} MiB")
            if libraries + code > LIMIT_MIB:
                problems.append(f"{libraries + code:.0f} MiB on top of the base are more than {LIMIT_MIB} MiB")
        _writable(Path(folder))
    return report(dockerfile, problems)


def entry_points(prefix: Path) -> list[str]:
    """Starts the modules that the chart starts, with `--help`, from code that nobody may write."""
    code = prefix / "opt/code"
    for path in sorted(code.rglob("*"), reverse=True):
        path.chmod(path.stat().st_mode & ~0o222)
    python = prefix / "opt/steersman/bin/python"
    environment = {
        "PYTHONPATH": str(code),
        "PYTHONDONTWRITEBYTECODE": "1",
        "PATH": os.environ["PATH"],
        "HOME": "/nonexistent",
    }
    problems = []
    for module in ENTRY_POINTS:
        command = [str(python), "-m", module, "--help"]
        run = subprocess.run(
            command, env=environment, cwd="/", capture_output=True, text=True, timeout=300, check=False
        )
        if run.returncode != 0:
            problems.append(f"python -m {module} does not start: {run.stderr.strip().splitlines()[-1:]}")
    probe = "import importlib.util, sys; sys.exit(importlib.util.find_spec('torch') is not None)"
    if subprocess.run([str(python), "-c", probe], env=environment, cwd="/", check=False).returncode:
        problems.append("torch is installed; this image must not carry it")
    return problems


def resolve(dockerfile: Path) -> int:
    """Lets pip resolve what the last `pip install` with constraints would install beside vllm."""
    stages = parse(dockerfile)
    problems = check_stages(dockerfile, stages)
    problems += [f"COPY {name}: no such file" for name in missing_sources(stages, ROOT)]
    steps = next(stage.steps for stage in stages if stage.name == "build")
    arguments = dict(rest.split("=", 1) for keyword, rest in steps if keyword == "ARG")
    command = next(rest for keyword, rest in steps if keyword == "RUN" and " -c beside.txt " in rest)
    for name, value in arguments.items():
        command = command.replace(f"${{{name}}}", value)
    extras = re.search(r"image_requirements.py pyproject.toml (.*?) >", command)
    install = re.search(r"pip install [^&]*-c beside.txt ([^&]*)", command)
    if extras is None or install is None:
        return report(dockerfile, [*problems, "no pip install with requirements and -c beside.txt was found"])
    words = [word for word in shlex.split(install[1]) if word not in ("-r", "requirements.txt")]
    vllm = next(word for word in words if word.startswith("vllm=="))
    with tempfile.TemporaryDirectory(prefix="image-") as folder:
        (bounds,) = _resolved(Path(folder), "--no-deps", vllm)
        lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
        constraints = Path(folder) / "beside.txt"
        constraints.write_text("\n".join(beside(lines, bounds["requires_dist"])))
        wanted = requirements(ROOT / "pyproject.toml", extras[1].split())
        found = {
            one["name"].lower(): one["version"]
            for one in _resolved(Path(folder), "-c", str(constraints), *words, *wanted)
        }
    print(f"{len(found)} packages fit together, among them:")
    for name in ("torch", "vllm", "transformers", "trl", "peft", "grpcio", "protobuf"):
        print(f"  {name} {found[name]}")
    return report(dockerfile, problems)


def _resolved(folder: Path, *arguments: str) -> list[dict[str, Any]]:
    """Metadata of what pip would install into an empty environment."""
    target = folder / "report.json"
    command = [sys.executable, "-m", "pip", "install", "--dry-run", "--ignore-installed", "--quiet"]
    subprocess.run([*command, "--report", str(target), *arguments], check=True)
    return [one["metadata"] for one in json.loads(target.read_text())["install"]]


def _writable(folder: Path) -> None:
    for path in folder.rglob("*"):
        if path.is_dir() and not path.is_symlink():
            path.chmod(path.stat().st_mode | stat.S_IWUSR)


def report(dockerfile: Path, problems: list[str]) -> int:
    for problem in problems:
        print(f"{dockerfile.name}: {problem}", file=sys.stderr)
    print(f"{dockerfile.name}: {'not ' if problems else ''}in order")
    return 1 if problems else 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dockerfile", nargs="?", default="Dockerfile")
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--parse", action="store_true", help="execute nothing")
    mode.add_argument("--resolve", action="store_true", help="execute nothing, but let pip look for versions")
    arguments = parser.parse_args()
    dockerfile = ROOT / arguments.dockerfile
    if arguments.resolve:
        return resolve(dockerfile)
    if not arguments.parse:
        return build(dockerfile)
    stages = parse(dockerfile)
    missing = [f"COPY {name}: no such file" for name in missing_sources(stages, ROOT)]
    return report(dockerfile, check_stages(dockerfile, stages) + missing)


if __name__ == "__main__":
    raise SystemExit(main())
