"""Knowledge: the authors' files as the harness's tasks, and the same numbers as the harness alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

import steersman.local.knowledge as demo
from steersman.errors import ConfigError, DataError, RateLimitedError, SteersmanError
from steersman.knowledge import ask_knowledge, available, write_tasks
from steersman.report.schema import Evaluation, Sample
from steersman.report.summary import knowledge, summarise

TRUTHFUL = """Type,Category,Question,Best Answer,Correct Answers,Incorrect Answers,Source
A,B,Where is Rome?,In Italy,In Italy; In Europe,In Spain; In Peru,x
A,B,What is two and two?,Four,Four,"Five, surely; Six",x
"""
MMLU = 'Who is first?,Ann,Bob,Cid,Dan,A\n"Which, then?",Ann,Bob,Cid,Dan,C\n'


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for place, text in {
        "truthfulqa/TruthfulQA.csv": TRUTHFUL,
        "mmlu/dev/world_religions_dev.csv": MMLU,
        "mmlu/test/world_religions_test.csv": MMLU,
    }.items():
        (tmp_path / "data" / place).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "data" / place).write_text(text)
    return tmp_path / "data"


TASKS = ["truthfulqa_mc1", "truthfulqa_mc2", "mmlu_world_religions"]


def test_what_a_folder_has(folder: Path, tmp_path: Path) -> None:
    assert available(folder) == TASKS
    assert available(tmp_path / "nothing") == []


def test_the_files_become_what_the_harness_reads(folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("lm_eval", reason="lm-eval is not installed (extra `knowledge`)")
    write_tasks(folder, TASKS, tmp_path / "tasks")
    rows = [json.loads(line) for line in (tmp_path / "tasks" / "truthfulqa.jsonl").read_text().splitlines()]
    assert rows[0]["mc1_targets"] == {"choices": ["In Italy", "In Spain", "In Peru"], "labels": [1, 0, 0]}
    assert rows[0]["mc2_targets"] == {
        "choices": ["In Italy", "In Europe", "In Spain", "In Peru"],
        "labels": [1, 1, 0, 0],
    }
    assert rows[1]["mc1_targets"]["choices"] == ["Four", "Five, surely", "Six"]
    asked = [json.loads(line) for line in (tmp_path / "tasks/mmlu_world_religions.test.jsonl").read_text().splitlines()]
    assert asked[1] == {"question": "Which, then?", "choices": ["Ann", "Bob", "Cid", "Dan"], "answer": 2}
    with pytest.raises(ConfigError, match="no files for gsm8k; there are truthfulqa_mc1"):
        write_tasks(folder, ["gsm8k"], tmp_path / "tasks")
    (folder / "mmlu/test/world_religions_test.csv").write_text("a,b\n")
    with pytest.raises(DataError, match=r"world_religions_test\.csv:1"):
        write_tasks(folder, TASKS[2:], tmp_path / "tasks")


@pytest.mark.parametrize(
    ("place", "content", "task", "said"),
    [
        ("mmlu/test/world_religions_test.csv", b"Who?,Ann,Bob,Cid,Dan,\n", TASKS[2], "world_religions_test.csv:1"),
        ("mmlu/test/world_religions_test.csv", b"Who?,Ann,Bob,Cid,Dan,AB\n", TASKS[2], "world_religions_test.csv:1"),
        ("mmlu/test/world_religions_test.csv", b"Who?,K\xf6ln,Bob,Cid,Dan,A\n", TASKS[2], "cannot be read"),
        ("mmlu/dev/world_religions_dev.csv", b"", TASKS[2], "no questions"),
        (
            "truthfulqa/TruthfulQA.csv",
            TRUTHFUL.replace("In Spain; In Peru", " ").encode(),
            TASKS[1],
            "TruthfulQA.csv:2",
        ),
        ("truthfulqa/TruthfulQA.csv", b"Question,Answer\na,b\n", TASKS[0], "not a row of TruthfulQA.csv"),
        ("gsm8k/test.jsonl", b'{"question": "a", "answer": 4}\n', "gsm8k", "test.jsonl:1: a row has question and"),
        ("gsm8k/test.jsonl", b'{"question": \n', "gsm8k", "test.jsonl:1"),
    ],
)
def test_a_wrong_file_is_named_before_a_model_is_loaded(
    folder: Path, tmp_path: Path, place: str, content: bytes, task: str, said: str
) -> None:
    pytest.importorskip("lm_eval", reason="lm-eval is not installed (extra `knowledge`)")
    (folder / "gsm8k").mkdir()
    for split in ("train", "test"):
        (folder / f"gsm8k/{split}.jsonl").write_text('{"question": "One and one?", "answer": "#### 2"}\n')
    write_tasks(folder, [task], tmp_path / "good")
    (folder / place).write_bytes(content)
    with pytest.raises(DataError) as told:
        write_tasks(folder, [task], tmp_path / "tasks")
    assert said in str(told.value)


def test_a_folder_without_questions_is_no_reason_to_load_a_model(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="has no files of TruthfulQA, MMLU or GSM8K"):
        write_tasks(tmp_path, [], tmp_path / "tasks")


def test_the_numbers_are_those_of_the_harness_alone(folder: Path, tmp_path: Path) -> None:
    lm_eval = pytest.importorskip("lm_eval", reason="lm-eval is not installed (extra `knowledge`)")
    from lm_eval.tasks import TaskManager

    from steersman.testing.models import save_model_folder, tiny_llama

    model = save_model_folder(tmp_path / "model", tiny_llama())
    write_tasks(folder, TASKS, tmp_path / "tasks")
    found = ask_knowledge(str(model), TASKS, tmp_path / "tasks", batch_size=2)
    assert {task: len(scores) for task, scores in found.items()} == dict.fromkeys(TASKS, 2)
    alone = lm_eval.simple_evaluate(
        model="hf", model_args=f"pretrained={model},dtype=float32", tasks=TASKS, device="cpu", batch_size=1,
        bootstrap_iters=0, task_manager=TaskManager(include_path=str(tmp_path / "tasks"), include_defaults=False),
    )["results"]  # fmt: skip
    for task in TASKS:
        assert sum(found[task]) / 2 == pytest.approx(alone[task]["acc,none"], abs=1e-6), task


@pytest.mark.parametrize("packed", [True, False])
def test_what_questions_share_is_computed_once_and_changes_no_number(
    tmp_path: Path, packed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("lm_eval", reason="lm-eval is not installed (extra `knowledge`)")
    from lm_eval.models.huggingface import HFLM

    from steersman.nn import harness
    from steersman.testing.models import save_model_folder, tiny_llama

    monkeypatch.setattr(harness, "_TOKENS_AT_ONCE", 100)
    folder = save_model_folder(tmp_path / "model", tiny_llama())
    model = harness.FolderModel(pretrained=str(folder), dtype="float32", device="cpu", batch_size=2)
    context = [5, 6, 7, 8] * 12
    asked = [((str(n), ""), context[: 10 + n], [40 + n % 3, 50, 51 + n][: 1 + n % 3]) for n in range(30)]
    asked += [(("", ""), context, follows) for follows in ([9], [9, 10], [9, 10, 11], [12])]
    asked += [(("", ""), [4], [5, 6]), asked[3]]
    if not packed:  # beyond the context the harness leaves tokens out, and so do its numbers
        asked += [(("", ""), context * 11, [9, 9])]
    before = model.model.config._attn_implementation
    found = model._loglikelihood_tokens(asked, disable_tqdm=True)
    assert model.model.config._attn_implementation == before
    wanted = HFLM._loglikelihood_tokens(model, asked, disable_tqdm=True)
    assert [best for _, best in found] == [best for _, best in wanted]
    assert [value for value, _ in found] == pytest.approx([value for value, _ in wanted], abs=1e-4)
    # The likeliest is told as such.
    ((_, best),) = model._loglikelihood_tokens([(("", ""), context, [_greedy(model, context)])], disable_tqdm=True)
    assert best


def _greedy(model: Any, context: list[int]) -> int:
    import torch

    with torch.no_grad():
        return int(model.model(torch.tensor([context])).logits[0, -1].argmax())


def test_before_and_after_stand_in_the_summary_with_interval_and_equivalence() -> None:
    samples = tuple(
        Sample(prompt_id=f"p{n}", prompt=(), answer="", reward=float(n), length=1, finish_reason="stop")
        for n in range(3)
    )
    before = (1.0, 0.0) * 200
    known = {
        "mmlu": {"base": before, "rlhf": tuple(1.0 - value if n == 0 else value for n, value in enumerate(before))}
    }
    evaluated = Evaluation(name="a", seed=1, models={"base": samples, "rlhf": samples}, knowledge=known)
    found = knowledge(evaluated)["mmlu"]
    assert found["before"][0] == 0.5
    assert found["difference"][0] == pytest.approx(-1 / 400, abs=1e-4)
    assert (found["equivalent"], found["questions"], found["bound"]) == (True, 400, 0.03)
    assert {name: mean[0] for name, mean in found["models"].items()} == {"base": 0.5, "rlhf": 0.4975}
    assert summarise(evaluated)["knowledge"]["mmlu"] == found


def finished_run(run_dir: Path) -> Path:
    """A run as `--check` finds it: base, SFT's and the aligned model."""
    from steersman.testing.models import save_model_folder, tiny_llama

    stages = [{"sft": {}}, {"rewardModel": {}}, {"rl": {}}, {"evaluate": {}}]
    manifest = {"apiVersion": "steersman.dev/v1alpha1", "kind": "AlignmentRun", "metadata": {"name": "tiny"},
                "spec": {"data": {"demo": {}}, "stages": stages}}  # fmt: skip
    run_dir.mkdir()
    (run_dir / "manifest.yaml").write_text(yaml.safe_dump(manifest))
    for seed, name in enumerate(("base", "sft", "rl")):
        folder = run_dir / name if name == "base" else run_dir / name / "model"
        save_model_folder(folder, tiny_llama(seed=seed))
        (run_dir / name / "complete.json").write_text(json.dumps({"stage": name}))
    (run_dir / "prepared.json").write_text(json.dumps({"base": str(run_dir / "base")}))
    return run_dir


def test_the_demos_models_are_asked_once_each_and_again_when_one_has_changed(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("lm_eval", reason="lm-eval is not installed (extra `knowledge`)")
    monkeypatch.setenv("STEERSMAN_KNOWLEDGE", str(folder))
    run_dir = finished_run(tmp_path / "run")
    asked: list[str] = []
    whole = demo.compare_knowledge
    monkeypatch.setattr(
        demo, "compare_knowledge", lambda models, *a, **kw: asked.extend(models) or whole(models, *a, **kw)
    )
    assert demo.known_of(run_dir) == {}
    assert demo.ask_demo_knowledge(run_dir) is True
    assert asked == ["base", "sft", "rlhf"]
    found = demo.known_of(run_dir)
    assert {task: list(models) for task, models in found.items()} == {task: ["base", "sft", "rlhf"] for task in TASKS}
    assert {len(scores) for models in found.values() for scores in models.values()} == {2}
    assert demo.ask_demo_knowledge(run_dir) is False
    (run_dir / "rl" / "complete.json").unlink()
    assert demo.known_of(run_dir) == {}
    (run_dir / "rl" / "complete.json").write_text("{}")
    assert demo.known_of(run_dir) == {}, "what another model knew is not told of this one"
    assert demo.ask_demo_knowledge(run_dir) is True
    assert asked == ["base", "sft", "rlhf", "rlhf"]
    monkeypatch.setenv("STEERSMAN_KNOWLEDGE_QUESTIONS", "1")
    assert demo.ask_demo_knowledge(run_dir) is True
    assert {len(scores) for models in demo.known_of(run_dir).values() for scores in models.values()} == {1}


def test_a_folder_without_the_questions_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("STEERSMAN_KNOWLEDGE", str(tmp_path / "elsewhere"))
    assert demo.ask_demo_knowledge(tmp_path) is None
    assert "elsewhere holds none of truthfulqa_mc1" in "".join(capsys.readouterr())
    monkeypatch.setenv("STEERSMAN_KNOWLEDGE_QUESTIONS", "-3")
    with pytest.raises(ConfigError, match="STEERSMAN_KNOWLEDGE_QUESTIONS is '-3'; give the number"):
        demo.ask_demo_knowledge(tmp_path)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--suite", "s.yaml", "--task", "gsm8k"], "--task changes nothing without --knowledge"),
        (["--suite", "s.yaml", "--limit", "3"], "--limit changes nothing without --knowledge"),
        (["--suite", "s.yaml", "--people", "p.jsonl"], "--people changes nothing without --judge"),
        (["--knowledge", "k", "--judge", "j.yaml"], "--judge changes nothing without --suite"),
        (["--knowledge", "k", "--previous", "suites.json"], "--previous changes nothing without --suite"),
        (["--knowledge", "k", "--tokenizer", "nowhere"], "--tokenizer nowhere is not a folder"),
    ],
)
def test_an_option_without_effect_is_refused_before_anything_loads(options: list[str], said: str) -> None:
    from typer.testing import CliRunner

    from steersman.cli import app

    result = CliRunner().invoke(app, ["eval", "model", *options])
    assert isinstance(result.exception, SteersmanError)
    assert said in str(result.exception)


class FullEndpoint:
    """Has no place for every second request; of a prompt [a, b, c] it tells -a, -b, -c."""

    url = "http://it"

    def __init__(self) -> None:
        self.bodies: list[dict[str, Any]] = []

    def post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        self.bodies.append(body)
        if len(self.bodies) % 2:
            raise RateLimitedError("full", retry_after=0.0)
        told = [None, *(-float(token) for token in body["prompt"][1:]), -99.0]
        tops = [None, *({"x": 0.0 if value < -6 else value} for value in told[1:])]
        return {"choices": [{"logprobs": {"token_logprobs": told, "top_logprobs": tops}}]}


def test_an_endpoint_that_is_full_is_asked_again_and_what_is_too_long_loses_its_beginning() -> None:
    pytest.importorskip("lm_eval", reason="lm-eval is not installed (extra `knowledge`)")
    from steersman.nn.harness import EndpointModel

    endpoint = FullEndpoint()
    model = EndpointModel(endpoint, None, context=6)  # type: ignore[arg-type]
    asked = [(("", ""), [1, 2], [3, 4]), (("", ""), [1, 2], [3, 4]), (("", ""), [1, 2, 3, 4, 5], [6, 7])]
    assert model._loglikelihood_tokens(asked, disable_tqdm=True) == [(-7.0, True), (-7.0, True), (-13.0, False)]
    assert {tuple(body["prompt"]) for body in endpoint.bodies} == {(1, 2, 3, 4), (3, 4, 5, 6, 7)}
    with pytest.raises(ConfigError, match="--tokenizer FOLDER"):
        model.tok_encode("x")
