"""The documentation says what is true: it builds without a warning, its commands parse, its configuration loads.

`tests/contract/test_docs_run.py` runs its commands and programs.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import typer
import yaml
from doc_blocks import PAGES, ROOT, SHELL, Block, blocks

from services.gateway.config import GatewayConfig
from steersman.cli import app
from steersman.config.base import load_model
from steersman.config.manifest import AlignmentRun

TESTED = (*SHELL, "yaml", "python", "json", "html", "text")
"""Languages of which every block is tested, here, in test_docs_run.py or in the chart's tests; `text` are drawings."""


def test_every_block_is_in_a_language_that_is_tested() -> None:
    other = [str(block) for block in blocks() if block.language not in TESTED and not block.language.startswith("{")]
    assert not other, f"say a language behind the fence, of {', '.join(TESTED)}: {other}"


def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    pytest.importorskip("sphinx", reason="Sphinx is not installed (extra `docs`)")
    command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "-b", "html", "docs", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "Every field of" in (tmp_path / "reference/manifest.html").read_text()


def steersman_commands(block: Block) -> list[list[str]]:
    """Words behind `steersman`, or behind its path."""
    return [rest for program, *rest in block.commands if Path(program).name == "steersman"]


def parses(words: list[str], where: str) -> None:
    group: Any = typer.main.get_command(app)
    name = "steersman"
    while hasattr(group, "commands") and words:
        name, *words = words
        assert name in group.commands, f"{where}: there is no command {name}"
        group = group.commands[name]
    if words:
        group.make_context(name, list(words), resilient_parsing=False).close()


@pytest.mark.parametrize("block", blocks(*SHELL), ids=str)
def test_every_command_of_steersman_parses(block: Block) -> None:
    for words in steersman_commands(block):
        parses(words, str(block))


INLINE = re.compile(r"`(?:\.venv/bin/)?steersman ([^`\n]+)`")


def test_every_command_within_a_line_parses() -> None:
    found = [(page, words) for page in PAGES for words in INLINE.findall(page.read_text(encoding="utf-8"))]
    assert len(found) > 20
    for page, words in found:
        if words.endswith("..."):
            continue
        # A command that is only named has no arguments yet.
        group: Any = typer.main.get_command(app)
        path = words.split()
        while hasattr(group, "commands") and path:
            assert path[0] in group.commands, f"{page.name}: steersman {words}"
            group = group.commands[path.pop(0)]
        known = {option for one in group.params for option in (*one.opts, *one.secondary_opts)}
        assert {word for word in path if word.startswith("-")} <= known, f"{page.name}: steersman {words}"


def test_every_target_and_example_exists() -> None:
    makefile = (ROOT / "Makefile").read_text()
    texts = [(str(block), block.text) for block in blocks(*SHELL)]
    texts += [(page.name, words) for page in PAGES for words in re.findall(r"`(make [^`\n]+)`", page.read_text())]
    for where, text in texts:
        for target in re.findall(r"\bmake ([a-z][a-z-]+)", text):
            bench = ROOT / f"benchmarks/{target.removeprefix('bench-').replace('-', '_')}"
            there = bench.is_dir() or bench.with_suffix(".py").is_file()
            assert re.search(rf"^{target}:", makefile, re.M) or there or "NAME" in text, f"{where}: make {target}"
        for path in re.findall(r"\bexamples/[\w./-]+", text):
            assert (ROOT / path).exists(), f"{where}: {path}"


def test_the_tree_of_the_readme_is_there() -> None:
    (tree,) = [block for block in blocks("text") if block.page == "README.md"]
    above = ROOT
    for line in tree.text.splitlines():
        name = line.split()[0]
        if not line.startswith(" "):
            above = ROOT / name
            assert above.exists(), name
        else:
            assert (above / name).exists(), f"{above.name}/{name}"


def test_the_widgets_tag_is_understood() -> None:
    (block,) = blocks("html")
    script = (ROOT / "services/gateway/pages/static/widget.js").read_text()
    for name in re.findall(r"data-(\w+)=", block.text):
        assert f"dataset.{name}" in script, name


@pytest.mark.parametrize("block", blocks("yaml"), ids=str)
def test_every_piece_of_configuration_loads(block: Block) -> None:
    """What it is a piece of is seen from its keys."""
    page = Path(block.page)
    chart = json.loads((ROOT / "charts/steersman/values.schema.json").read_text())
    for document in yaml.safe_load_all(block.text):
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
            assert page.name == "deployment.md", f"{block}: what is {sorted(keys)} a piece of?"
            # A part of the chart's values: what would be missing is in values.yaml.
            defaults = yaml.safe_load((ROOT / "charts/steersman/values.yaml").read_text())
            for name in keys:
                assert set(document[name]) <= set(defaults[name]), name
                schema = {"$defs": chart["$defs"], **chart["properties"][name]}
                jsonschema.validate({**defaults[name], **document[name]}, schema)


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) < 120


def test_there_are_blocks_to_check() -> None:
    assert len(blocks(*SHELL)) > 50
    assert len(blocks("yaml")) > 10
