"""The documentation says what is true: it builds without a warning, its commands parse, its configuration loads."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml

from services.gateway.config import GatewayConfig
from steersman.cli import app
from steersman.config.base import load_model
from steersman.config.manifest import AlignmentRun

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), *sorted((ROOT / "docs/tutorials").glob("*.md"))]
PAGES += sorted((ROOT / "examples").glob("*/README.md"))
BLOCK = re.compile(r"^( *)```(\w+)\n(.*?)^ *```", re.M | re.S)


def blocks(*languages: str) -> list[Any]:
    """(page, text) of every block in these languages."""
    return [
        pytest.param(page, re.sub(rf"^{indent}", "", text, flags=re.M), id=f"{page.relative_to(ROOT)}:{number}")
        for page in PAGES
        for number, (indent, language, text) in enumerate(BLOCK.findall(page.read_text(encoding="utf-8")))
        if language in languages
    ]


def commands(text: str) -> list[list[str]]:
    """Words behind `steersman` on each line that begins with it, or with its path."""
    lines = re.sub(r"\\\n\s*", " ", text).splitlines()
    words = [shlex.split(line, comments=True) for line in lines if re.match(r"[\w./-]*steersman ", line)]
    return [rest for program, *rest in words if Path(program).name == "steersman"]


def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    pytest.importorskip("sphinx", reason="Sphinx is not installed (extra `docs`)")
    command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "-b", "html", "docs", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "Every field of" in (tmp_path / "reference/manifest.html").read_text()


@pytest.mark.parametrize(("page", "text"), blocks("sh", "bash", "console"))
def test_every_command_of_steersman_parses(page: Path, text: str) -> None:
    for words in commands(text):
        group: Any = typer.main.get_command(app)
        name = "steersman"
        while hasattr(group, "commands") and words:
            name, *words = words
            assert name in group.commands, f"{page.name}: there is no command {name}"
            group = group.commands[name]
        group.make_context(name, list(words), resilient_parsing=False).close()


@pytest.mark.parametrize(("page", "text"), blocks("sh", "bash", "console"))
def test_every_target_and_example_exists(page: Path, text: str) -> None:
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"\bmake ([a-z][a-z-]+)", text):
        bench = ROOT / f"benchmarks/{target.removeprefix('bench-').replace('-', '_')}.py"
        assert re.search(rf"^{target}:", makefile, re.M) or bench.is_file(), target
    for path in re.findall(r"\bexamples/[\w./-]+", text):
        assert (ROOT / path).exists(), path


@pytest.mark.parametrize(("page", "text"), blocks("yaml"))
def test_every_piece_of_configuration_loads(page: Path, text: str) -> None:
    """What it is a piece of is seen from its keys."""
    for document in yaml.safe_load_all(text):
        if isinstance(document, list):  # stages that follow training
            before = [{"sft": {}}, {"rewardModel": {}}, {"rl": {"algorithm": "rloo"}}]
            before += [] if any("evaluate" in stage for stage in document) else [{"evaluate": {}}]
            document = {"spec": {"data": {"demo": {}}, "stages": [*before, *document]}}
        keys = set(document)
        if "kind" in keys and document["kind"] == "AlignmentRun":
            load_model(AlignmentRun, document, page.name)
        elif keys == {"spec"}:
            head = {"apiVersion": "steersman.dev/v1alpha1", "kind": "AlignmentRun", "metadata": {"name": "piece"}}
            load_model(AlignmentRun, {**head, **document}, page.name)
        elif keys <= {field.alias for field in GatewayConfig.model_fields.values()}:
            load_model(GatewayConfig, document, page.name)
        elif keys == {"reward"}:
            stage = {"rl": {"algorithm": "rloo", **document}}
            spec = {"data": {"demo": {}}, "stages": [{"rewardModel": {}}, stage]}
            head = {"apiVersion": "steersman.dev/v1alpha1", "kind": "AlignmentRun", "metadata": {"name": "piece"}}
            load_model(AlignmentRun, {**head, "spec": spec}, page.name)
        else:
            assert page.name == "deployment.md", f"{page.name}: what is {sorted(keys)} a piece of?"


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) < 120


def test_there_are_blocks_to_check() -> None:
    assert len(blocks("sh", "bash")) > 10
    assert len(blocks("yaml")) > 5
