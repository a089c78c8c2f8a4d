"""`steersman init`, `doctor` and `runs`: what somebody tries first."""

from __future__ import annotations

import fcntl
import json
from pathlib import Path

import pytest
import yaml
from local_helpers import manifest
from typer.testing import CliRunner

from steersman.cli import app, doctor
from steersman.config.base import commented_yaml
from steersman.config.manifest import AlignmentRun, load_manifest
from steersman.config.stages import mark_complete
from steersman.data.records import Prompt, read_jsonl
from steersman.errors import ConfigError, ConflictError, SteersmanError
from steersman.local import folder

ROWS = [
    {
        "prompt": [{"role": "user", "content": f"Where is order {number}?"}],
        "chosen": [{"role": "assistant", "content": f"Order {number} is on its way, thank you."}],
        "rejected": [{"role": "assistant", "content": "No idea."}],
    }
    for number in range(10)
]


def invoke(*arguments: object) -> str:
    """Output of a command; raises what it raised."""
    done = CliRunner().invoke(app, [str(item) for item in arguments], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.output


@pytest.mark.parametrize("recipe", ["sft", "dpo", "kto", "ppo", "rloo", "grpo", "rejection-sampling"])
def test_every_recipe_makes_a_manifest_on_the_demos_data(recipe: str, tmp_path: Path) -> None:
    invoke("init", tmp_path / "My run", "--recipe", recipe)
    made = load_manifest(tmp_path / "My run" / "run.yaml")
    assert made.metadata.name == "my-run"
    assert made.spec.data.demo is not None
    assert made.spec.stages[0].sft is not None


def test_ten_own_rows_become_checked_data_and_sizes_that_learn(tmp_path: Path) -> None:
    (tmp_path / "mine.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    told = invoke("init", tmp_path / "ten", "--preferences", tmp_path / "mine.jsonl")
    assert "prompts.heldout.jsonl: 2 rows" in told
    made = load_manifest(tmp_path / "ten" / "run.yaml").spec
    assert [stage.kind for stage in made.stages] == ["reward_model", "rl", "evaluate"]
    reward = made.stages[0].reward_model
    assert reward is not None
    assert len(ROWS) * reward.epochs / reward.batch_size >= 8
    splits = [
        list(read_jsonl(tmp_path / "ten" / "data" / f"prompts.{name}.jsonl", Prompt)) for name in ("train", "heldout")
    ]
    assert sorted(row.prompt[0].content for split in splits for row in split) == sorted(
        row["prompt"][0]["content"] for row in ROWS
    )


@pytest.mark.parametrize(
    ("arguments", "error", "sentence"),
    [
        (["--recipe", "dpo", "--demonstrations", "mine.jsonl"], ConfigError, "--recipe dpo needs --preferences"),
        (["--preferences", "empty.jsonl"], SteersmanError, "no rows; the file is empty"),
        (["--preferences", "wrong.jsonl"], SteersmanError, "wrong.jsonl:1"),
    ],
)
def test_what_cannot_become_a_run_is_said_and_leaves_nothing(
    arguments: list[str], error: type[Exception], sentence: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("mine.jsonl").write_text('{"messages": []}\n')
    Path("empty.jsonl").write_text("")
    Path("wrong.jsonl").write_text('{"prompt": "no list"}\n')
    with pytest.raises(error, match=sentence):
        invoke("init", "new", *arguments)
    assert not Path("new").exists()
    Path("new").mkdir()
    with pytest.raises(ConflictError, match="exists already"):
        invoke("init", "new")


def test_a_commented_manifest_says_what_each_field_is_and_loads_to_the_same() -> None:
    document = manifest(
        stages=[
            {"sft": {"epochs": 2}},
            {"rl": {"algorithm": "rloo", "reward": {"verifiable": [{"name": "exact-facts"}]}}},
        ]
    )
    plain = document.model_dump(mode="json", by_alias=True, exclude_defaults=True)
    text = commented_yaml(AlignmentRun, plain, "Two\nlines")
    assert yaml.safe_load(text) == plain
    assert text.startswith("# Two\n# lines\n")
    assert "        # Passes over the data.\n        epochs: 2" in text


def test_runs_are_listed_with_their_state(tmp_path: Path) -> None:
    run = manifest()
    for name in ("ended", "halfway"):
        folder.write_manifest(run, tmp_path / name)
        for stage in run.stage_names() if name == "ended" else ["sft"]:
            (tmp_path / name / stage).mkdir()
            mark_complete(run, stage, tmp_path / name)
    (tmp_path / "ended" / "summary.json").write_text('{"reward": {"sft": [0.1, 0, 1], "rlhf": [0.9, 0, 1]}}')
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "manifest.yaml").write_text("{")
    with (tmp_path / "halfway" / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        found = {line["name"]: line for line in json.loads(invoke("runs", tmp_path, "--json"))}
    assert (found["ended"]["phase"], found["ended"]["reward"], found["ended"]["stage"]) == ("Complete", 0.9, "")
    assert (found["halfway"]["phase"], found["halfway"]["stage"]) == ("Running", "reward-model")
    assert found["broken"]["phase"].startswith("unreadable: ")
    table = invoke("runs", tmp_path)
    assert "Stopped" in table
    assert "1/4" in table


def test_doctor_looks_at_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    found = {item["name"]: item for item in json.loads(invoke("doctor", "--json"))["findings"]}
    assert found["extra training"]["state"] == "ok"
    assert {"memory", "disk", "GPU", "REST port", "model cache"} <= set(found)
    monkeypatch.setattr(doctor, "_folders", lambda: iter([doctor.Finding("model cache", "missing", "no", "mend it")]))
    done = CliRunner().invoke(app, ["doctor"])
    assert done.exit_code == 1
    assert "→ mend it" in done.output


def test_the_version_is_told() -> None:
    assert invoke("--version").startswith("steersman 0.")
