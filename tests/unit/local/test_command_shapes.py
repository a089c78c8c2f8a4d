"""`--json` over the whole tree of commands: who has it, what it prints, and that the reference says so."""

from __future__ import annotations

import dataclasses
import json
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from steersman.cli import app
from steersman.cli.shapes import OUTPUTS, RunState, print_json
from steersman.errors import SteersmanError
from steersman.store import Store
from steersman.store.feedback import Event, save_answer, submit
from steersman.store.models import Answer

TELL_NOTHING = {
    "cancel": "says that it asked",
    "data add": "says how many were added",
    "data allow-customer": "says that it did",
    "data assign": "says how many were given",
    "data compare-run": "says how many were added; `data wins` has the figures",
    "data create-project": "says that it did",
    "data edit-project": "says which version",
    "data export": "says how many were written",
    "data export-judgements": "says how many were written",
    "data generate": "says how many were added",
    "data import-judgements": "says how many were added",
    "data label-studio-config": "prints a configuration",
    "data order": "says how many were ordered",
    "data reopen": "says how many are open",
    "data retire-labeler": "says how many were taken back",
    "data trained-elsewhere": "says that it did",
    "init": "makes a folder, and prints what to do next",
    "logs": "prints a log",
    "merge": "prints the folder",
    "model prepare": "prints the folder",
    "run": "tells its progress (STEERSMAN_PROGRESS=json); `--check` ends with figures, `--dry-run` prints YAML",
    "serve": "stays up",
    "submit": "says that it did; `status --json` tells the rest",
    "track": "says that it did",
}
"""Commands that print no figures, states or lists, and what they do print: their exit code is what a script wants."""


def commands(group: Any = None, path: tuple[str, ...] = ()) -> Iterator[tuple[str, Any]]:
    group = group or typer.main.get_command(app)
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from commands(command, (*path, name))
        else:
            yield " ".join((*path, name)), command


def options(command: Any) -> set[str]:
    return {option for one in command.params for option in one.opts}


def test_whatever_tells_figures_states_or_lists_tells_them_as_json() -> None:
    with_json = {name for name, command in commands() if "--json" in options(command)}
    assert with_json == set(OUTPUTS), "steersman/cli/shapes.py says what each prints"
    assert {name for name, _ in commands()} - with_json == set(TELL_NOTHING)


def test_a_namespace_is_asked_for_in_one_way() -> None:
    for name, command in commands():
        for one in command.params:
            if "--context" in one.opts:
                assert {"-n", "--namespace"} <= options(command), name
            if "-n" in one.opts:
                assert one.opts == ["--namespace", "-n"], name


# --- names that are nearly right

RUN = """
apiVersion: steersman.dev/v1alpha1
kind: AlignmentRun
metadata: {name: a-run}
spec:
  data: {demo: {}}
  stages: [{sft: {}}, {rewardModel: {}}, {rl: {}}, {evaluate: {}}]
"""


@pytest.mark.parametrize(
    ("arguments", "near"),
    [
        ("run -f run.yaml --dry-run --set spec.stages.rll.steps=3", "rl"),
        ("run -f stage.yaml --dry-run", "rewardModel"),
        ("run -f reward.yaml --dry-run", "exact-facts"),
        ("run -f value.yaml --dry-run", "grpo"),
        ("init new --recipe dop", "dpo"),
        ("data import ultrafeedbak rows.jsonl --out in", "ultrafeedback"),
        ("data import steersman rows.jsonl --rows feedbak --out in", "feedback"),
        ("data create-project shop comprae", "compare"),
        ("data assign shop Ann --state opne", "open"),
        ("data export rows.jsonl x --to parqet", "parquet"),
        ("data label-studio-config preferenc", "preference"),
    ],
)
def test_a_name_that_is_nearly_right_is_answered_with_the_right_one(
    arguments: str, near: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run.yaml").write_text(RUN)
    (tmp_path / "stage.yaml").write_text(RUN.replace("rewardModel", "rewardModell"))
    rewards = "{rl: {reward: {verifiable: [{name: exact-fact}]}}}"
    (tmp_path / "reward.yaml").write_text(RUN.replace("{rl: {}}", rewards))
    (tmp_path / "value.yaml").write_text(RUN.replace("{rl: {}}", "{rl: {algorithm: grop}}"))
    done = CliRunner().invoke(app, arguments.split())
    assert isinstance(done.exception, SteersmanError), done.output
    assert f"did you mean '{near}'?" in str(done.exception)


# --- what is printed


def checked(text: str, shape: Any) -> Any:
    """The one line, as a value of exactly this shape."""
    (line,) = text.splitlines()
    found = json.loads(line)
    _same(found, shape, "")
    return found


def _same(found: Any, shape: Any, where: str) -> None:
    if typing.get_origin(shape) is list:
        assert isinstance(found, list), where
        for item in found:
            _same(item, typing.get_args(shape)[0], f"{where}[]")
    elif dataclasses.is_dataclass(shape):
        hints = typing.get_type_hints(shape)
        assert set(found) == set(hints), where
        for name, kind in hints.items():
            _same(found[name], kind, f"{where}.{name}")
    elif typing.get_origin(shape) is dict:
        assert isinstance(found, dict), where
    elif shape in (str, int, bool, float):
        assert isinstance(found, int | float if shape is float else shape), f"{where}: {found!r}"


def says(*arguments: str) -> str:
    done = CliRunner().invoke(app, [*arguments, "--json"])
    assert done.exit_code == 0, done.output
    return done.stdout


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Store]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("STEERSMAN_STORE", f"sqlite:///{tmp_path}/s.db")
    opened = Store.open(f"sqlite:///{tmp_path}/s.db")
    yield opened
    opened.close()


def test_data_from_import_to_deletion(store: Store, tmp_path: Path) -> None:
    row = {"prompt": [{"role": "user", "content": "Hi"}], "completion": [{"role": "assistant", "content": "Hello"}]}
    lines = [json.dumps({**row, "label": True}), json.dumps({**row, "label": True}), "{"]
    (tmp_path / "rows.jsonl").write_text("\n".join(lines))
    arguments = ("data", "import", "steersman", "rows.jsonl", "--rows", "feedback", "--out", "in")
    imported = checked(says(*arguments), OUTPUTS["data import"])
    assert (imported["read"], imported["written"], imported["splits"]) == (3, 2, {"train": 2})
    assert sum(imported["left_out"].values()) == 1

    formats = checked(says("data", "formats"), OUTPUTS["data formats"])
    assert {"steersman", "table"} <= {one["name"] for one in formats}

    CliRunner().invoke(app, ["data", "create-project", "shop", "compare"])
    assert checked(says("data", "projects"), OUTPUTS["data projects"]) == [
        {"name": "shop", "kind": "compare", "overlap": 3, "items": 0, "judgements": 0}
    ]
    with store.transaction() as session:
        for number in range(4):
            said = [{"role": "user", "content": f"Question {number}"}]
            answer = Answer(
                id=f"a{number}", customer="acme", deployment="d", model="m", prompt=said, answer="A", consent=True
            )
            save_answer(session, answer)
    with store.transaction() as session:
        for number in range(4):
            submit(session, "acme", Event(f"e{number}", f"a{number}", "thumbs", "up"))
    release = ("data", "release", "live", "--source", "feedback", "--set", "kind=feedback")
    made, again = (checked(says(*release), OUTPUTS["data release"]) for _ in range(2))
    assert (made["version"], made["created"], made["rows"]) == (1, True, 4)
    assert (again["created"], again["digest"]) == (False, made["digest"])
    (listed,) = checked(says("data", "releases"), OUTPUTS["data releases"])
    assert (listed["name"], listed["version"], listed["good"], listed["state"]) == ("live", 1, True, "good")
    gone = checked(says("data", "delete-customer", "acme", "--yes"), OUTPUTS["data delete-customer"])
    assert (gone["answers"], gone["new_versions"], gone["withdrawn"]) == (4, {"live": None}, ["live v1"])
    (listed,) = checked(says("data", "releases"), OUTPUTS["data releases"])
    assert listed["good"] is False


def test_runs_and_doctor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs/broken").mkdir(parents=True)
    (tmp_path / "runs/broken/manifest.yaml").write_text("kind: Nothing\n")
    (run,) = checked(says("runs"), OUTPUTS["runs"])
    assert (run["name"], run["reward"]) == ("broken", None)
    assert run["phase"].startswith("unreadable")
    done = CliRunner().invoke(app, ["doctor", "--json"])
    found = checked(done.stdout, OUTPUTS["doctor"])
    assert {"Python", "memory", "disk"} <= {one["name"] for one in found["findings"]}


def test_a_manifest_that_is_valid(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is computed stands in the log then; test_architecture.py lets it be computed."""
    shown: list[bool] = []
    monkeypatch.setattr("steersman.local.executor.run_child", lambda *given, show: shown.append(show))
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run.yaml").write_text(RUN)
    valid = checked(says("validate", "-f", "run.yaml"), OUTPUTS["validate"])
    stages = ["sft", "reward-model", "rl", "evaluate"]
    assert (valid["file"], valid["name"], valid["stages"], valid["seconds"]) == ("run.yaml", "a-run", stages, None)
    assert list(valid["steps"]) == list(valid["memory_gib"]) == stages
    assert CliRunner().invoke(app, ["validate", "-f", "run.yaml"]).output.endswith("evaluate\n")
    assert shown == [False, True]


@pytest.mark.parametrize(
    "content", [b"{{{", b"\xff\xfe\x00", b"[]", b"contexts: 1\ncurrent-context: a\n", b"a: 1\n", None]
)
def test_a_kubeconfig_that_is_none_is_said_in_a_sentence(
    content: bytes | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "config"
    path.write_bytes(content) if content is not None else path.mkdir()
    monkeypatch.setenv("KUBECONFIG", str(path))
    monkeypatch.setattr("kubernetes.config.kube_config.KUBE_CONFIG_DEFAULT_LOCATION", str(path))
    done = CliRunner().invoke(app, ["doctor", "--cluster", "--json"])
    (finding,) = checked(done.stdout, OUTPUTS["doctor"])["findings"]
    assert (done.exit_code, finding["name"], finding["state"]) == (1, "API server", "missing")
    assert "kubeconfig" in finding["found"]
    assert isinstance(CliRunner().invoke(app, ["status"]).exception, SteersmanError)


def test_a_run_in_a_cluster() -> None:
    status = {
        "phase": "Failed",
        "stage": "rl",
        "step": 3,
        "totalSteps": 9,
        "reward": 0.5,
        "message": "the loss is not a number",
        "stages": [{"name": "rl", "phase": "Failed", "reason": "FailedPrecondition", "attempts": 1, "log": "long"}],
    }
    state = RunState.of({"metadata": {"name": "demo", "namespace": "ml"}, "status": status})
    assert (state.phase, state.step, state.total_steps, state.kl) == ("Failed", 3, 9, None)
    assert state.stages[0].reason == "FailedPrecondition"
    assert RunState.of({"metadata": {"name": "new"}}).phase == "Pending"


def test_what_json_cannot_say_is_null(capsys: pytest.CaptureFixture[str]) -> None:
    print_json({"a": float("nan"), "b": [float("inf"), 1.0], "c": {"d": (2.0,)}})
    assert json.loads(capsys.readouterr().out) == {"a": None, "b": [None, 1.0], "c": {"d": [2.0]}}
