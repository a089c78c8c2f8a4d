"""docs/deployment.md: its commands are those of the command line, the chart, the Makefile; its objects are accepted."""

from __future__ import annotations

import functools
import re
import shlex
import subprocess
from itertools import pairwise
from pathlib import Path
from typing import Any

import doc_blocks
import kubernetes_validate
import pytest
import typer
import yaml

from services.controller.plan import parse_run
from services.gateway.auth import keys
from steersman.cli import app

ROOT = Path(__file__).resolve().parents[3]
TEXT = (ROOT / "docs/deployment.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(bash|yaml)\n(.*?)^```", TEXT, re.M | re.S)
SHELL = "\n".join(text for kind, text in BLOCKS if kind == "bash").replace("\\\n", " ")
COMMANDS = [line.partition("  #")[0].strip() for line in SHELL.splitlines()]
FILE = {"values.yaml": ["--set", "database.existingSecret=x"]}
"""Stands for the reader's own file."""


def commands(*start: str) -> list[list[str]]:
    """The words of the commands that begin so."""
    return [shlex.split(line, comments=True) for line in COMMANDS if line.startswith(" ".join(start))]


def objects() -> list[dict[str, Any]]:
    """Objects that the guide pipes into kubectl, and its manifest."""
    texts = re.findall(r"<<'EOF'\n(.*?)^EOF", TEXT, re.M | re.S) + [text for kind, text in BLOCKS if kind == "yaml"]
    every = [document for text in texts for document in yaml.safe_load_all(text)]
    return [document for document in every if "kind" in document]  # the others are values of the chart


def test_the_manifest_is_a_run() -> None:
    (run,) = [one for one in objects() if one["kind"] == "AlignmentRun"]
    manifest = parse_run({**run, "metadata": {**run["metadata"], "namespace": "steersman", "uid": "1"}})
    assert manifest.stage_names() == ["sft", "reward-model", "rl", "evaluate", "release"]


def test_the_pods_are_valid_and_restricted() -> None:
    (pod,) = [one for one in objects() if one["kind"] == "Pod"]
    kubernetes_validate.validate(pod, "1.37", strict=True)
    spec, context = pod["spec"], pod["spec"]["containers"][0]["securityContext"]
    assert spec["securityContext"]["runAsNonRoot"]
    assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert (context["allowPrivilegeEscalation"], context["capabilities"]) == (False, {"drop": ["ALL"]})


INSTALLS = [words for words in commands("helm", "upgrade", "--install") if words[3] == "steersman"]


@pytest.mark.parametrize("words", INSTALLS, ids=lambda words: " ".join(words)[-50:])
def test_the_chart_takes_the_values_of_each_installation(helm, chart, words) -> None:
    arguments: list[str] = []
    for flag, value in pairwise(words):
        if flag == "--set":
            arguments += [flag, value.replace("$REGISTRY", "registry.example.com")]
        elif flag == "-f":
            arguments += FILE.get(value) or [flag, str(ROOT / value)]
            assert value in FILE or (ROOT / value).is_file()
    done = helm.run("template", "steersman", str(chart), "-n", "steersman", *arguments)
    assert done.returncode == 0, done.stderr
    assert words[words.index("-n") + 1] == "steersman"


def test_there_are_installations_to_check() -> None:
    assert len(INSTALLS) == 5


@pytest.mark.parametrize("flags", re.findall(r"`((?:policy|gateway|monitoring|crds|networkPolicy)\.[A-Za-z.]+)", TEXT))
def test_values_that_the_text_names_exist(chart, flags) -> None:
    node: Any = yaml.safe_load((chart / "values.yaml").read_text())
    for part in flags.rstrip(".").split("."):
        if part in ("vllm", "config"):  # free in the values: the service's own configuration
            return
        assert part in node, flags
        node = node[part]


def test_every_command_of_steersman_exists() -> None:
    known = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    used = [shlex.split(text) for text in re.findall(r"(?:^|: )steersman ([a-z][^\n`#]*)", SHELL, re.M)]
    assert {words[0] for words in used} == {"submit", "status", "logs", "cancel"}
    for words in used:
        options = {name for one in known[words[0]].params for name in (*one.opts, *one.secondary_opts)}
        assert {word for word in words[1:] if word.startswith("-")} <= options, words


@pytest.fixture(scope="module")
def helps(helm):
    """What a program says of a command, and of all of its commands."""

    @functools.cache
    def of(program: str, *command: str) -> str:
        binary = [str(helm.binary.with_name(program))]
        asked = [[*binary, *command, "--help"], *([[*binary, "options"]] if program == "kubectl" else [])]
        said = [subprocess.run(words, capture_output=True, text=True, timeout=120, check=False) for words in asked]
        return "".join(done.stdout + done.stderr for done in said)

    return of


PLUGINS = ("diff",)
"""Commands of Helm's plugins, which are not here."""


@pytest.mark.parametrize("program", ["kubectl", "helm"])
def test_every_flag_exists(helps, program) -> None:
    """The programs themselves are asked about each command of the guide; they need no cluster for that."""
    used = [words for block in doc_blocks.blocks(*doc_blocks.SHELL) for words in block.commands if words[0] == program]
    assert len(used) > 10
    for words in used:
        told = words[: words.index("--")] if "--" in words else words  # behind it, a command in a container
        words = [word for word in told if word not in PLUGINS]
        names = [word for word in words[1:] if re.fullmatch(r"[a-z][a-z-]*", word)]
        namespace = words[words.index("-n") + 1] if "-n" in words else None
        path = next(
            names[start:end]
            for start in range(len(names))
            for end in (start + 3, start + 2, start + 1)
            if names[start] != namespace and known(helps, program, names[start:end])
        )
        said = helps(program, *path)
        for flag in (word.partition("=")[0] for word in words if re.match(r"--?[A-Za-z]", word)):
            assert re.search(rf"(^|[\s,]){re.escape(flag)}[\s,=]", said), f"{program} {' '.join(path)} has no {flag}"


def known(helps, program: str, path: list[str]) -> bool:
    """Whether a program has this command, and not only the one above it."""
    if not path or any((program, *path[:length]) not in GROUPS for length in range(1, len(path))):
        return False
    said = helps(program, *path)
    return "Usage" in said and not re.search(r"unknown command|Error:", said)


GROUPS = {("kubectl", "create"), ("kubectl", "create", "secret"), ("kubectl", "set"), ("helm", "repo")}
"""Commands that have commands of their own."""


def test_keys_are_made_as_the_guide_says(tmp_path, capsys, monkeypatch) -> None:
    """In the gateway's pod, where the database's URL is in the environment."""
    (line,) = re.findall(r"python -m services\.gateway\.auth\.keys ([^']*)'", SHELL)
    monkeypatch.setenv("STEERSMAN_DATABASE", f"sqlite:///{tmp_path}/gateway.db")
    assert keys.main(shlex.split(line)) == 0
    assert len(capsys.readouterr().out.split()) == 1, "the key alone, so that the shell can keep it"


def test_annotations_targets_and_scripts_exist() -> None:
    code = "".join(path.read_text() for path in (ROOT / "services/controller").glob("*.py"))
    for name in set(re.findall(r"steersman\.dev/(cancel|retry|approve)", TEXT)):
        assert f"steersman.dev/{name}" in code
    makefile = (ROOT / "Makefile").read_text()
    for target in set(re.findall(r"make ([a-z-]+)", TEXT)):
        assert re.search(rf"^{target}:", makefile, re.M) or (ROOT / f"benchmarks/{target[6:]}.py").is_file(), target
    for script in set(re.findall(r"scripts/\w+\.py", TEXT)):
        assert (ROOT / script).is_file()
