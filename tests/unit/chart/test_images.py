"""The Dockerfiles, without a container engine: what they say, and what their steps do (`scripts/check_image.py`)."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

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
def test_the_image_without_torch_is_small_and_its_programs_start_from_read_only_code() -> None:
    """A real installation of gateway and controller, by the Dockerfile's own commands."""
    output = check()
    libraries = re.search(r"libraries (\d+) MiB", output)
    assert libraries is not None
    assert int(libraries[1]) < 400
    print(output)


def test_constraints_beside_a_package_leave_out_what_it_bounds() -> None:
    spec = importlib.util.spec_from_file_location("image_requirements", ROOT / "scripts/image_requirements.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    bounds = ["transformers<5.20.0,>=5.16.1", "numpy", "Prometheus_Client>=0.18", "tqdm; python_version < '4'"]
    constraints = ["transformers==5.23.0", "numpy==2.4.6", "prometheus-client==0.26.0", "tqdm==4.70", "typer==1.0"]
    assert module.beside(constraints, bounds) == ["tqdm==4.70", "typer==1.0"]
