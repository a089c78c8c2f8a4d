"""Every manifest of examples/ is valid, and rejection sampling finds the best answer of a task whose best one is known.

The task: an answer is good when it is a lower-case letter. Stages and options are the example's; model, data and sizes
are tiny. Stages that several examples begin with are run once.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from random import Random
from typing import Any

import pytest
import yaml
from live_services import Cluster, LoopThread

from steersman.config.base import dump_yaml, load_model
from steersman.config.manifest import AlignmentRun
from steersman.config.stages import mark_complete
from steersman.local.services import services_of
from steersman.testing.models import save_model_folder, tiny_llama, tiny_roberta_reward

EXAMPLES = sorted((Path(__file__).parents[2] / "examples").glob("*/*.yaml"))
LETTERS = "abcdefghijklmnopqrstuvwxyz"
OTHERS = [
    chr(code)
    for code in (*range(1, 128), *range(128, 0x800, 31), *range(0x800, 0xD800, 1543), *range(0x10000, 0x110000, 50_021))
    if not chr(code).isspace() and chr(code) not in LETTERS
]
"""Characters with every byte of UTF-8 in them, because each byte is a token that the policy may try."""
FAST = {"learningRate": 0.01, "schedule": "constant", "warmupRatio": 0.0}
TRL = {"optimizer": FAST, "maxSteps": 40, "batchSize": 16, "microBatchSize": 16, "maxLength": 128}
SMALL: dict[str, dict[str, Any]] = {
    "sft": TRL | {"maxSteps": 30},
    "rewardModel": TRL,
    "dpo": TRL,
    "kto": TRL,
    "ilql": TRL,
    "rejectionSampling": {
        "promptsPerRound": 16,
        "samplesPerPrompt": 8,
        "generation": {"maxNewTokens": 2},
        "optimizer": FAST,
        "epochs": 10,
    },
    "rl": {
        "steps": 24,
        "generation": {"maxNewTokens": 2},
        "klCoefficient": 0.01,
        "optimizer": FAST | {"schedule": "linear"},
    },
}


def name_of(example: Path) -> str:
    return f"{example.parent.name}/{example.stem}"


@pytest.mark.parametrize("example", EXAMPLES, ids=name_of)
def test_is_valid(example: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from typer.testing import CliRunner

    from steersman.cli import app

    monkeypatch.chdir(tmp_path)
    shown = CliRunner().invoke(app, ["run", "-f", str(example), "--dry-run"])
    assert shown.exit_code == 0, shown.output
    resolved = load_model(AlignmentRun, yaml.safe_load(shown.output), str(example))
    assert f"# {resolved.stage_names()[-1]}" in shown.output
    assert example.parent.name in (example.parent / "README.md").read_text()
    assert not list(tmp_path.iterdir())


def write_rows(folder: Path) -> dict[str, Any]:
    """Data of every kind about the same task; returns the manifest's `data`."""
    draw = Random(5)
    names = ("demonstrations", "preferences", "prompts", "feedback", "aspects")
    rows: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    for number, other in enumerate(draw.sample(OTHERS, len(OTHERS))):
        prompt = [{"role": "user", "content": f"p{number % 8}"}]
        good, bad = ([{"role": "assistant", "content": text}] for text in (draw.choice(LETTERS), other))
        rows["demonstrations"].append({"messages": [*prompt, *(bad if number % 4 else good)]})
        rows["preferences"].append({"prompt": prompt, "chosen": good, "rejected": bad, "margin": 1.0})
        for said in (good, bad):
            ratings = dict.fromkeys(
                ("grounded", "answers", "polite", "concise", "no_invented"), 5 if said is good else 1
            )
            rows["feedback"].append({"prompt": prompt, "completion": said, "label": said is good})
            rows["aspects"].append({"prompt": prompt, "completion": said, "aspects": ratings})
        if number < 16:
            rows["prompts"].append({"id": f"p{number}", "prompt": prompt, "facts": {"needed": list(LETTERS)}})
    for kind, items in rows.items():
        (folder / f"{kind}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in items))
    return {kind: {"train": str(folder / f"{kind}.jsonl")} for kind in rows}


def shrunk(stage: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """The example's stage with its method's options and the task's sizes."""
    ((kind, options),) = stage.items()
    small = {**options, **SMALL[kind]}
    if kind != "sft":
        small["lora"] = options.get("lora")
    if kind == "rl":
        if "ppo" in options:
            small["ppo"] = {**options["ppo"], "critic": {**options["ppo"]["critic"], "learningRate": 0.01}}
    elif kind == "rewardModel" and "base" in options:
        small["base"] = str(folder / "encoder")
    return {kind: small}


class Task:
    """Runs manifests on the task; stages with the same history are run once."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        base = tiny_llama()
        # So that an adapter, which leaves the embedding alone, can be sure of a token.
        base.get_input_embeddings().weight.data *= 10
        save_model_folder(folder / "base", base)
        save_model_folder(folder / "encoder", tiny_roberta_reward())
        self.data = write_rows(folder)
        self._done: dict[str, Path] = {}

    def run(self, example: Path) -> Path:
        """Runs all stages but the evaluation, and returns the run's folder."""
        from training.stage import run_stage

        document = yaml.safe_load(example.read_text())
        spec = document["spec"]
        stages = [shrunk(stage, self.folder) for stage in spec["stages"] if "evaluate" not in stage]
        model = {"base": str(self.folder / "base"), "precision": "fp32", "device": "cpu", "threads": 1}
        document["spec"] = {**spec, "seed": 3, "model": model, "data": self.data, "stages": stages}
        run = load_model(AlignmentRun, document, str(example))
        run_dir = self.folder / document["metadata"]["name"]
        run_dir.mkdir()
        (run_dir / "manifest.yaml").write_text(dump_yaml(run))
        for number, name in enumerate(run.stage_names(), start=1):
            history = json.dumps(stages[:number], sort_keys=True)
            if history in self._done:
                shutil.copytree(self._done[history], run_dir / name)
                mark_complete(run, name, run_dir)
                continue
            cluster = Cluster(LoopThread())
            overrides = []
            for service in services_of(run, name, run_dir, self.folder / "base"):
                kind = service.name.partition("-")[0]
                if kind == "reward":
                    cluster.start_reward(service.config["scorers"])
                else:
                    getattr(cluster, f"start_{kind}")(Path(service.config["model"]))
            for kind, endpoints in cluster.endpoints.items():
                key = "policy.weightsEndpoints" if kind == "weights" else f"{kind}.endpoints"
                overrides.append(f"spec.services.{key}={json.dumps(endpoints)}")
            try:
                run_stage(run_dir, name, overrides)
            finally:
                cluster.close()
            self._done[history] = run_dir / name
        return run_dir


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> Task:
    return Task(tmp_path_factory.mktemp("task"))


def share_of_letters(model: Path) -> float:
    """Probability, over the prompts, that an answer begins with a letter."""
    import torch

    from steersman.nn.load import load_causal_lm, load_tokenizer
    from steersman.nn.tokens import prompt_ids

    policy, tokenizer = load_causal_lm(model), load_tokenizer(model)
    good = tokenizer.convert_tokens_to_ids(list(LETTERS))
    shares = []
    with torch.no_grad():
        for number in range(8):
            ids = prompt_ids(tokenizer, [{"role": "user", "content": f"p{number}"}])
            shares.append(policy(torch.tensor([ids])).logits[0, -1].softmax(-1)[good].sum().item())
    return sum(shares) / len(shares)


# The other methods have learning tests of their own: test_rl.py, test_rl_async.py, and in tests/unit/training.
LEARNS = [path for path in EXAMPLES if path.parent.name == "02-rejection-sampling"]


@pytest.mark.parametrize("example", LEARNS, ids=name_of)
def test_finds_the_best_answer(example: Path, task: Task) -> None:
    run_dir = task.run(example)
    newest = [path for path in run_dir.glob("*/model/config.json") if path.parts[-3] not in ("reward-model", "sft")]
    last = max(newest, key=lambda path: path.stat().st_mtime).parent
    assert share_of_letters(run_dir / "sft" / "model") < 0.5
    assert share_of_letters(last) > 0.8
