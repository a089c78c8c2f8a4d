"""The stage `release`: gates, checksums, the plain folder with its card, artifact store and registry."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
import yaml
from huggingface_hub import ModelCard, ModelCardData
from transformers import AutoModelForCausalLM, AutoTokenizer

from steersman.config.manifest import load_manifest
from steersman.config.stages import mark_complete
from steersman.errors import ChecksumError, FailedPreconditionError
from steersman.local.services import services_of
from steersman.registry import Registry
from steersman.report.schema import Evaluation, Message, Sample
from steersman.suites.asked import Asked, SuiteResult
from steersman.testing.models import save_model_folder, tiny_llama
from training import release
from training.stage import run_stage

GATES = {"reward": 0.5, "noEos": 0.5}


def samples(rewards: list[float]) -> tuple[Sample, ...]:
    question = (Message(role="user", content="Where is my order?"),)
    return tuple(
        Sample(
            prompt_id=str(number), prompt=question, answer="On its way.", reward=reward, length=3, finish_reason="stop"
        )
        for number, reward in enumerate(rewards)
    )


@pytest.fixture
def make_run(tmp_path: Path, base_model: Path) -> Callable[..., Path]:
    """A run's folder with everything before its release: the SFT model, and an evaluation that gains `gain`."""

    def make(gain: float = 1.0, stages: list[dict[str, Any]] | None = None, **spec: Any) -> Path:
        run_dir = tmp_path / "run"
        run_dir.mkdir()
        row = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
        (run_dir / "demos.jsonl").write_text(json.dumps(row) + "\n")
        (run_dir / "prompts.jsonl").write_text(json.dumps({"prompt": row["messages"][:1]}) + "\n")
        document = {
            "apiVersion": "steersman.dev/v1alpha1",
            "kind": "AlignmentRun",
            "metadata": {"name": "support-bot"},
            "spec": {
                "model": {"base": str(base_model), "device": "cpu", "precision": "fp32"},
                "data": {"demonstrations": {"train": "demos.jsonl"}, "prompts": {"train": "prompts.jsonl"}},
                "stages": stages or [{"sft": {}}, {"evaluate": {"gates": GATES}}, {"release": {}}],
                **spec,
            },
        }
        (run_dir / "manifest.yaml").write_text(yaml.safe_dump(document))
        run = load_manifest(run_dir / "manifest.yaml")
        save_model_folder(run_dir / "sft" / "model", tiny_llama())
        mark_complete(run, "sft", run_dir)
        before = [0.1, 0.2, 0.3, 0.4]
        models = {"base": samples(before), "sft": samples([value + gain for value in before])}
        (run_dir / "evaluate").mkdir()
        evaluation = Evaluation(name="support-bot", seed=17, models=models)
        (run_dir / "evaluate" / "evaluation.json").write_text(evaluation.model_dump_json())
        return run_dir

    return make


def test_the_model_is_a_plain_folder_with_its_card(make_run):
    run_dir = make_run()
    run_stage(run_dir, "release", [])
    model = run_dir / "release" / "model"
    loaded, trained = (AutoModelForCausalLM.from_pretrained(path) for path in (model, run_dir / "sft" / "model"))
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), trained.parameters(), strict=True))
    assert AutoTokenizer.from_pretrained(model).chat_template
    card = (model / "README.md").read_text()
    front = yaml.safe_load(card.split("---")[1])
    assert front["tags"] == ["steersman", "sft"]
    assert (front["library_name"], front["pipeline_tag"]) == ("transformers", "text-generation")
    (entry,) = front["model-index"]
    assert entry["name"] == "support-bot"
    metrics = {metric["name"]: metric["value"] for result in entry["results"] for metric in result["metrics"]}
    assert metrics == {"mean reward": 1.25, "win rate by reward against base": 1.0}
    assert {one.metric_name: one.metric_value for one in ModelCard(card).data.eval_results} == metrics
    assert str(run_dir.parent) not in card, "paths of this machine are nobody's business"
    assert "| reward | 0.250" in card
    assert "Gain in reward over base: 1.000" in card
    assert "passed: the reward gains at least 1.000 over base, 0.5 is asked for" in card
    assert "`demos.jsonl` sha256" in card
    pointer = json.loads((run_dir / "release" / "release.json").read_text())
    assert (pointer["model"], pointer["stage"], pointer["registered"]) == (str(model), "sft", None)
    assert "model.safetensors" in pointer["files"]


def test_the_cards_index_holds_the_whole_evaluation_as_the_hub_reads_it() -> None:
    """By Hugging Face's own reader of cards, which refuses a model-index that is none."""
    before, after = (
        tuple(one.model_copy(update={"rubric": {"total": good, "polite": good}}) for one in samples(rewards))
        for rewards, good in (([0.1, 0.2, 0.3], 0.5), ([1.0, 2.0, 4.5], 0.75))
    )

    def asked(target: str, passed: int) -> SuiteResult:
        cases = tuple(
            Asked(case=f"c{n}", question="q", answers=("a",), checks={"facts": None if n < passed else "no"})
            for n in range(4)
        )
        return SuiteResult(suite="shop", kind="business", target=target, decoding="greedy", asked=cases)

    evaluation = Evaluation(
        name="bot", seed=1, models={"base": before, "rlhf": after}, suites=(asked("base", 1), asked("rlhf", 3)),
        knowledge={"truthfulqa_mc1": {"base": (0.0, 1.0), "rlhf": (1.0, 1.0)}},
    )  # fmt: skip
    data = ModelCardData(model_name="bot", eval_results=release.eval_results(evaluation))
    found = ModelCard(f"---\n{data.to_yaml()}\n---\n# bot\n").data.eval_results
    assert {(one.dataset_name, one.metric_name): one.metric_value for one in found} == {
        ("held-out prompts", "mean reward"): 2.5,
        ("held-out prompts", "rubric: rubric total"): 0.75,
        ("held-out prompts", "rubric: polite"): 0.75,
        ("held-out prompts", "win rate by reward against base"): 1.0,
        ("suite shop", "cases passed"): 0.75,
        ("truthfulqa_mc1", "score"): 1.0,
    }


def test_it_may_be_repeated(make_run, monkeypatch):
    """A complete release is not made again; one that was killed before its mark gives the same files."""
    run_dir = make_run()
    run_stage(run_dir, "release", [])
    first = json.loads((run_dir / "release" / "release.json").read_text())
    (run_dir / "release" / "complete.json").unlink()
    run_stage(run_dir, "release", [])
    assert json.loads((run_dir / "release" / "release.json").read_text()) == first
    monkeypatch.setattr(release, "run_release", lambda *_: pytest.fail("made again"))
    run_stage(run_dir, "release", [])


def test_a_gate_that_is_not_passed_refuses_with_the_figures(make_run):
    run_dir = make_run(gain=0.2)
    with pytest.raises(FailedPreconditionError, match=r"the reward gains at least 0\.200 over base, 0\.5 is asked for"):
        run_stage(run_dir, "release", [])
    assert not (run_dir / "release" / "model").exists()
    assert not (run_dir / "release" / "complete.json").exists()


def test_gates_of_an_earlier_model_say_nothing(make_run):
    stages = [{"sft": {}}, {"evaluate": {"gates": GATES}}, {"sft": {"epochs": 2}}, {"release": {}}]
    run_dir = make_run(stages=stages)
    save_model_folder(run_dir / "sft-2" / "model", tiny_llama())
    mark_complete(load_manifest(run_dir / "manifest.yaml"), "sft-2", run_dir)
    with pytest.raises(FailedPreconditionError, match="the gates of evaluate were passed by an earlier model"):
        run_stage(run_dir, "release", [])


def test_a_changed_model_is_not_released(make_run):
    run_dir = make_run()
    with (run_dir / "sft" / "model" / "model.safetensors").open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"\x7f")
    with pytest.raises(ChecksumError, match="the content has changed"):
        run_stage(run_dir, "release", [])


def test_the_artifact_store_gets_a_copy(make_run, tmp_path):
    run_dir = make_run(artifacts=f"file://{tmp_path}/store")
    run_stage(run_dir, "release", [])
    copy = tmp_path / "store" / "support-bot" / "release" / "model"
    assert AutoModelForCausalLM.from_pretrained(copy).num_parameters() > 0
    assert (copy / "README.md").is_file()
    assert json.loads((run_dir / "release" / "release.json").read_text())["model"] == f"file://{copy}"


@pytest.mark.parametrize(
    ("spec", "aliases"), [({}, {"candidate", "champion"}), ({"inferenceService": "chat"}, {"candidate"})]
)
def test_the_registry_points_at_it(make_run, monkeypatch, spec, aliases):
    """Somebody else promotes where an InferenceService is named."""
    pointed: dict[str, Any] = {}
    sources: list[str] = []

    def mlflow(request: httpx.Request) -> httpx.Response:
        if request.url.path.endswith("/model-versions/search"):
            return httpx.Response(200, json={"model_versions": [{"version": "3"}] if sources else []})
        body = json.loads(request.content)
        if request.url.path.endswith("/model-versions/create"):
            sources.append(body["source"])
            return httpx.Response(200, json={"model_version": {"version": "3"}})
        if request.url.path.endswith("/alias"):
            pointed[body["alias"]] = body["version"]
        return httpx.Response(200, json={})

    monkeypatch.setenv(release.TRACKING_URI, "http://mlflow")
    monkeypatch.setattr(release, "Registry", lambda url, name: Registry(url, name, httpx.MockTransport(mlflow)))
    run_dir = make_run(stages=[{"sft": {}}, {"release": spec}])
    run_stage(run_dir, "release", [])
    assert pointed == dict.fromkeys(aliases, "3")
    assert sources == [str(run_dir / "release" / "model")]


def test_the_card_of_the_base_model_stays_as_it_is(make_run):
    run_dir = make_run()
    card = run_dir / "sft" / "model" / "README.md"
    card.write_text("the base model's own card")
    run_stage(run_dir, "release", [])
    assert card.read_text() == "the base model's own card"
    assert (run_dir / "release" / "model" / "README.md").read_text().startswith("---")


def test_it_needs_no_services(make_run, base_model):
    run_dir = make_run()
    assert services_of(load_manifest(run_dir / "manifest.yaml"), "release", run_dir, base_model) == []


def test_an_override_releases_and_stands_in_the_card(make_run):
    override = {"name": "Ada Example", "reason": "a pilot with ten customers"}
    run_dir = make_run(
        gain=0.2, stages=[{"sft": {}}, {"evaluate": {"gates": GATES}}, {"release": {"override": override}}]
    )
    run_stage(run_dir, "release", [])
    card = (run_dir / "release" / "model" / "README.md").read_text()
    assert "**failed**: the reward gains at least 0.200 over base, 0.5 is asked for" in card
    assert "passed: 0.0% of the answers do not end" in card
    assert "in spite of the failed gates by Ada Example: a pilot with ten customers" in card
