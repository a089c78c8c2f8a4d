"""Packs what `make gpu-check` needs on a machine without a network: wheels, and the default model's tokenizer.

    python -m benchmarks.gpu.bundle [--out build/gpu]

The machine has Python 3.12 on x86-64 and `PRESENT` with the libraries that these bring. Everything else that services,
training and tests import is fetched here, in the versions of constraints.txt. Weights do not travel: the models of the
check are random.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

from benchmarks.report import command_line
from steersman.nn.prepare import EMBEDDED_MODEL, resolve_model

ROOT = Path(__file__).parents[2]
MOST_BYTES = 60 * 2**20
PRESENT = ("torch", "transformers", "peft", "accelerate", "numpy", "pandas", "pyarrow", "numba")
"""The last three are too large to travel."""
PACKAGES = (
    *("grpcio", "grpcio-health-checking", "grpcio-reflection", "grpcio-status", "googleapis-common-protos", "protobuf"),
    *("pydantic", "pydantic-core", "annotated-types", "typing-inspection", "typing-extensions"),
    *("orjson", "isal", "zstandard", "blake3", "jsonschema", "jsonschema-specifications", "referencing", "rpds-py"),
    *("sqlalchemy", "alembic", "mako", "greenlet", "prometheus-client", "typer", "rich", "httpx"),
    *("starlette", "httpx2", "httpcore2", "truststore", "httpcore", "certifi", "sortedcontainers", "attrs"),
    *("iniconfig", "pluggy", "pytest-xdist", "execnet", "pytest-timeout"),
    *("xxhash", "python-dateutil", "pytz", "six", "tzdata"),
    *("llguidance", "trl", "datasets", "dill", "multiprocess", "pytest", "pytest-asyncio", "hypothesis"),
)
"""What such a machine lacks, or may have in a version that the contracts' stubs refuse."""
_PLATFORMS = ("2_34", "2_31", "2_28", "2_27", "2_24", "2_17", "2_12", "2_5")


def pinned(packages: tuple[str, ...] = PACKAGES, constraints: Path = ROOT / "constraints.txt") -> list[str]:
    """`name==version` of each, as constraints.txt has it; KeyError where one is not pinned."""
    pins = {}
    for line in constraints.read_text().splitlines():
        name, found, version = line.partition("==")
        if found:
            pins[_normal(name)] = f"{name.strip()}=={version.split()[0]}"
    return [pins[_normal(name)] for name in packages]


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name.strip()).lower()


def fetch_wheels(folder: Path) -> int:
    """Downloads the wheels for CPython 3.12 on Linux x86-64; returns their bytes."""
    shutil.rmtree(folder, ignore_errors=True)
    platforms = [f"--platform=manylinux_{one}_x86_64" for one in _PLATFORMS]
    platforms += ["--platform=manylinux2014_x86_64", "--platform=manylinux1_x86_64"]
    target = ["--only-binary=:all:", "--python-version=3.12", "--implementation=cp", *platforms]
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", *target, "--dest", str(folder)]
    subprocess.run([*command, *pinned()], check=True)
    return sum(path.stat().st_size for path in folder.iterdir())


def copy_tokenizer(folder: Path) -> None:
    """The default model's tokenizer and configuration, without its weights."""
    source = resolve_model(EMBEDDED_MODEL, Path.home() / ".cache" / "steersman", note=print)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for path in source.iterdir():
        if path.suffix != ".safetensors":
            shutil.copy(path, folder)


def main() -> None:
    parser = command_line(__doc__)
    parser.add_argument("--out", type=Path, default=Path("build/gpu"))
    folder: Path = parser.parse_args().out
    size = fetch_wheels(folder / "wheels")
    copy_tokenizer(folder / "tokenizer")
    size += sum(path.stat().st_size for path in (folder / "tokenizer").iterdir())
    print(f"{folder}: {size / 2**20:.1f} MiB")
    if size > MOST_BYTES:
        raise SystemExit(f"at most {MOST_BYTES / 2**20:.0f} MiB may travel")


if __name__ == "__main__":
    main()
