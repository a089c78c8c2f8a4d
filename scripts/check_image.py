"""Builds an image without a container engine, and starts what it holds.

    python scripts/check_image.py                            # Dockerfile: runs the steps, checks size and entry points
    python scripts/check_image.py --parse Dockerfile.gpu     # checks its files and what becomes an image
    python scripts/check_image.py --resolve Dockerfile.gpu   # checks that its libraries fit together, all as pinned
    python scripts/check_image.py --lock Dockerfile.gpu      # writes its pins and digests anew, as for Dockerfile

The steps of the stage `build` are executed as they stand: `COPY` out of a read-only copy of the sources that holds just
what .dockerignore lets through, `RUN` with the same commands in a clean prefix. The base image is this machine's
Python; steps that need root (apt-get) are left out and named. The GPU image's libraries are many gigabytes: `--resolve`
solves what its `pip install` commands ask for with nothing but metadata from the package index.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import stat
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

from dockerfile import Installation, Stage, chain, installations, parse, problems

ROOT = Path(__file__).resolve().parent.parent
PYPROJECT = ROOT / "pyproject.toml"
BASE_IMAGE_MIB = 130
"""python:3.11-slim-bookworm, unpacked."""
LIMIT_MIB = 400
"""Of the whole image without torch."""
ENTRY_POINTS = ("services.gateway", "services.controller", "steersman.rpc.probe")
PYTHONS = {"python:3.11-slim": "3.11", "ubuntu24.04": "3.12"}
"""Python's version by a part of the base image's name."""


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


class Builder:
    """Executes the steps of a stage under a prefix that stands for `/`."""

    def __init__(self, source: Path, prefix: Path) -> None:
        self._source = source
        self._prefix = prefix
        self._directory = prefix
        # The base image calls its interpreter `python`; Debian's own has no such name outside of environments.
        path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
        self._environment = {"PATH": path, "HOME": str(prefix)}
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


def build(dockerfile: Path) -> list[str]:
    """Executes the build stage, then starts every entry point with read-only code."""
    stages = parse(dockerfile)
    with tempfile.TemporaryDirectory(prefix="image-") as folder:
        source, prefix = Path(folder) / "context", Path(folder) / "root"
        source.mkdir()
        prefix.mkdir()
        context(source)
        found = problems(dockerfile, stages, source)
        if not found:
            builder = Builder(source, prefix)
            for keyword, rest in chain(stages, "build")[1]:
                builder.step(keyword, rest)
            found += starts(prefix)
            libraries, code = size_mib(prefix / "opt/steersman"), size_mib(prefix / "opt/code")
            total = BASE_IMAGE_MIB + libraries + code
            print(f"base {BASE_IMAGE_MIB} MiB + libraries {libraries:.0f} MiB + code {code:.1f} MiB = {total:.0f} MiB")
            if total >= LIMIT_MIB:
                found.append(f"{total:.0f} MiB is not below {LIMIT_MIB} MiB")
        for path in Path(folder).rglob("*"):
            if path.is_dir() and not path.is_symlink():
                path.chmod(path.stat().st_mode | stat.S_IWUSR)
    return found


def starts(prefix: Path) -> list[str]:
    """Starts the modules that the chart starts, and a gateway that answers, from code that nobody may write."""
    code = prefix / "opt/code"
    for path in sorted(code.rglob("*"), reverse=True):
        path.chmod(path.stat().st_mode & ~0o222)
    environment = {
        "PYTHONPATH": str(code),
        "PYTHONDONTWRITEBYTECODE": "1",
        "PATH": os.environ["PATH"],
        "HOME": "/nonexistent",
    }
    commands = [["-m", module, "--help"] for module in ENTRY_POINTS]
    commands.append([str(ROOT / "scripts/image_smoke.py")])
    found = []
    for command in commands:
        run = subprocess.run(
            [str(prefix / "opt/steersman/bin/python"), *command],
            env=environment,
            cwd=prefix,
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        if run.returncode != 0:
            found.append(f"python {' '.join(command)} fails:\n{run.stderr[-2000:]}")
        elif command[0] != "-m":
            print(run.stdout, end="")
    return found


def resolve(dockerfile: Path) -> list[str]:
    """Solves what each stage installs; the pins must leave nothing open and allow just what is found."""
    stages = parse(dockerfile)
    found = problems(dockerfile, stages, ROOT)
    for installation in installations(stages, PYPROJECT):
        pins = _pins((ROOT / installation.constraints).read_text())
        solved = _pins(_solve(dockerfile, installation, "-c", str(ROOT / installation.constraints)))
        print(f"{installation.stage}: {len(solved)} packages fit together, among them")
        for name in ("torch", "vllm", "transformers", "trl", "peft", "grpcio", "protobuf", "numpy"):
            if name in solved:
                print(f"  {name} {solved[name]}")
        for name in sorted(solved.keys() - pins.keys()):
            found.append(f"{installation.stage}: {installation.constraints} does not pin {name}=={solved[name]}")
        locked = _pins((ROOT / installation.locks[0]).read_text())
        for name, version in sorted(solved.items()):
            if locked.get(name) != version and not _elsewhere(stages, installation).fullmatch(name):
                found.append(f"{installation.stage}: {installation.locks[0]} does not hold {name}=={version}")
    return found


def lock(dockerfile: Path) -> list[str]:
    """Writes the pins of a Dockerfile, and the digests of all that may be installed for them.

    The pins of `Dockerfile` are those of the tests, constraints.txt; of others a version of constraints.txt stays
    wherever the requirements let it.
    """
    stages = parse(dockerfile)
    head = f"Written by: python scripts/check_image.py --lock {dockerfile.name}\n"
    for installation in installations(stages, PYPROJECT):
        pins, (own, *alone) = ROOT / installation.constraints, installation.locks
        if installation.constraints != "constraints.txt":
            shutil.copy(ROOT / "constraints.txt", pins)
            _solve(dockerfile, installation, "--no-annotate", "--no-header", "-o", str(pins))
            pins.write_text(f"# Pins of {dockerfile.name}. {head}" + pins.read_text())
        elsewhere = _elsewhere(stages, installation)
        text = _digests(dockerfile, installation, "-c", str(pins))
        text = "".join(block for block in _blocks(text) if not elsewhere.fullmatch(_name(block)))
        (ROOT / own).write_text(f"# Stage {installation.stage} of {dockerfile.name}. {head}" + text)
        for name in alone:
            wanted = [f"{key}=={value}" for key, value in _pins((ROOT / name).read_text()).items()]
            text = _digests(dockerfile, replace(installation, requirements=wanted), "--no-deps")
            (ROOT / name).write_text(f"# What is installed without its requirements. {head}" + text)
    return []


def _digests(dockerfile: Path, installation: Installation, *options: str) -> str:
    return _solve(dockerfile, installation, "--no-annotate", "--no-header", "--generate-hashes", *options)


def _elsewhere(stages: list[Stage], installation: Installation) -> re.Pattern[str]:
    """What a stage has from an index and by a digest of its own: torch for CPUs, which needs no CUDA libraries."""
    stage = next(stage for stage in stages if stage.name == installation.stage)
    return re.compile("torch|triton|(nvidia|cuda)-.*" if ("ARG", "TORCH_DIGEST") in stage.steps else "")


def _blocks(text: str) -> list[str]:
    """The lines of each package."""
    return re.split(r"^(?=[A-Za-z0-9])", text, flags=re.MULTILINE)[1:]


def _name(block: str) -> str:
    return next(iter(_pins(block)))


def _pins(text: str) -> dict[str, str]:
    """Versions by normalized name in lines `name[extra]==version`."""
    matches = re.finditer(r"^([A-Za-z0-9._-]+)(?:\[.*\])?==(\S+)", text, re.MULTILINE)
    return {re.sub(r"[-_.]+", "-", match[1]).lower(): match[2] for match in matches}


def _solve(dockerfile: Path, installation: Installation, *options: str) -> str:
    """uv's answer: a line `name==version` for each package."""
    base, _ = chain(parse(dockerfile), installation.stage)
    version = next(version for part, version in PYTHONS.items() if part in base)
    uv = [shutil.which("uv", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}") or "uv", "pip", "compile"]
    command = [*uv, "-", "--quiet", "--no-progress", "--python-version", version]
    command += [*_index(everywhere="--generate-hashes" in options), *options]
    wanted = "\n".join(installation.requirements)
    done = subprocess.run(command, input=wanted, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{dockerfile.name}, stage {installation.stage}:\n{done.stderr}")
    return done.stdout


def _index(*, everywhere: bool) -> list[str]:
    """uv's options for where pip is configured to look; `everywhere` leaves out what only this machine has."""
    command = [sys.executable, "-m", "pip", "config", "list"]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    options = ["--index-strategy", "unsafe-best-match"]
    for name, _, value in (line.partition("=") for line in lines):
        option = name.rpartition(".")[2]
        if option in ("index-url", "extra-index-url", "find-links"):
            places = [place for place in value.strip("'").split() if not everywhere or place.startswith("https:")]
            options += [word for place in places for word in (f"--{option}", place)]
    return options


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dockerfile", nargs="?", default="Dockerfile")
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--parse", action="store_true", help="execute nothing")
    mode.add_argument("--resolve", action="store_true", help="install nothing, but let versions be solved")
    mode.add_argument("--lock", action="store_true", help="write the pins anew")
    arguments = parser.parse_args()
    dockerfile = ROOT / arguments.dockerfile
    if arguments.lock:
        found = lock(dockerfile)
    elif arguments.resolve:
        found = resolve(dockerfile)
    elif arguments.parse:
        found = problems(dockerfile, parse(dockerfile), ROOT)
    else:
        found = build(dockerfile)
    for problem in found:
        print(f"{dockerfile.name}: {problem}", file=sys.stderr)
    print(f"{dockerfile.name}: {'not ' if found else ''}in order")
    return 1 if found else 0


if __name__ == "__main__":
    raise SystemExit(main())
