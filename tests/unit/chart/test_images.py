"""The Dockerfiles, without a container engine: what they say, and what their steps do (`scripts/check_image.py`)."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tomllib
from importlib.metadata import distributions
from pathlib import Path

import pytest
from packaging.specifiers import SpecifierSet

ROOT = Path(__file__).resolve().parents[3]
FILES = ["Dockerfile", "Dockerfile.gpu"]


def check(*arguments: str) -> str:
    """Output of the script; it needs the package index, and without one the test is left out, but not in CI."""
    command = [sys.executable, str(ROOT / "scripts/check_image.py"), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    if done.returncode and "No matching distribution" in done.stderr and not os.environ.get("CI"):
        pytest.skip("the package index is not reached")
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize("name", FILES)
def test_hadolint_is_silent(name) -> None:
    binary = shutil.which("hadolint", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    assert binary is not None
    done = subprocess.run([binary, str(ROOT / name)], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "")


@pytest.mark.parametrize("name", FILES)
def test_images_are_pinned_labelled_without_root_and_without_build_tools(name) -> None:
    assert "in order" in check("--parse", name)


@pytest.mark.parametrize(
    ("before", "after", "words"),
    [
        ("USER 10001:10001", "USER root", "runs as root"),
        ("steersman:x:10001:10001:", "steersman:x:10002:10002:", "has no entry in /etc/passwd"),
        ("@${PYTHON_DIGEST} AS base", " AS base", "is not pinned by a digest argument"),
        ("COPY services services", "COPY service services", "COPY service: no such file"),
        ("WORKDIR /tmp", "RUN apt-get install gcc", "installs gcc"),
    ],
)
def test_what_is_wrong_with_a_dockerfile_is_found(tmp_path, before, after, words) -> None:
    text = (ROOT / "Dockerfile").read_text()
    assert before in text
    (tmp_path / "Dockerfile").write_text(text.replace(before, after))
    command = [sys.executable, str(ROOT / "scripts/check_image.py"), "--parse", str(tmp_path / "Dockerfile")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 1
    assert words in done.stderr


@pytest.mark.timeout(900)
def test_the_image_without_torch_is_below_400_mib_and_its_programs_answer_from_read_only_code() -> None:
    """A real installation of gateway and controller, by the Dockerfile's own commands."""
    output = check()
    sizes = re.search(r"base (\d+) MiB \+ libraries (\d+) MiB \+ code ([\d.]+) MiB", output)
    assert sizes is not None
    assert sum(map(float, sizes.groups())) < 400
    assert "answers over OpenAI's API, OIP REST and OIP gRPC" in output


@pytest.mark.timeout(900)
def test_the_libraries_of_the_gpu_image_fit_together() -> None:
    """vllm, torch and what Steersman needs, solved against the package index; every one is pinned."""
    output = check("--resolve", "Dockerfile.gpu")
    assert "torch 2.13.0" in output
    assert re.search(r"vllm \d", output)


@pytest.mark.timeout(900)
def test_the_libraries_of_the_cpu_image_fit_together() -> None:
    assert "torch 2.13.0" in check("--resolve", "Dockerfile")


def test_the_gpu_image_holds_what_was_tested_wherever_vllm_allows() -> None:
    def pins(name: str) -> dict[str, str]:
        return dict(re.findall(r"^([\w.-]+)==(\S+)$", (ROOT / name).read_text(), re.MULTILINE))

    tested, gpu = pins("constraints.txt"), pins("constraints.gpu.txt")
    for name in ("accelerate", "datasets", "grpcio", "peft", "protobuf", "safetensors", "tokenizers", "torch", "trl"):
        assert gpu[name] == tested[name], name


def test_every_library_installs_on_the_oldest_python_that_is_promised() -> None:
    """Pins are made on some 3.11.x; Debian 12 has 3.11.2, and a library may ask for a later one."""
    promised = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["requires-python"]
    oldest = promised.removeprefix(">=") + ".0"
    wrong = {
        found.name: wanted
        for found in distributions()
        if (wanted := found.metadata.get("Requires-Python")) and not SpecifierSet(wanted).contains(oldest)
    }
    assert wrong == {}
