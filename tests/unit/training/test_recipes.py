"""Recipes of examples/ that combine parts, each on a task whose best answer is known.

Stages and options are the example's; model, data and sizes are tiny. The reward model is given, its weights are set
(known_reward.py), and so is mostly the result of SFT, a random model that says anything: only the method decides.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from known_reward import write_reward_model
from live_services import Cluster, LoopThread

from steersman.config.base import dump_yaml, load_model
from steersman.config.manifest import AlignmentRun
from steersman.config.stages import mark_complete
from steersman.local.services import services_of
from steersman.nn.load import load_causal_lm, load_tokenizer
from steersman.nn.tokens import prompt_ids
from steersman.testing.models import save_model_folder, tiny_llama
from training.stage import run_stage

EXAMPLES = Path(__file__).parents[3] / "examples"
PROMPTS = [f"p{number}" for number in range(8)]
FIRST, SECOND = "CDEFGHIJKLM", "NOPQRSTUVWXYZ"
"""Two kinds of answers; no prompt and no template has these letters."""
FAST = {"learningRate": 0.01, "schedule": "constant", "warmupRatio": 0.0}
RL = {
    "steps": 30,
    "promptsPerStep": 8,
    "samplesPerPrompt": 4,
    "generation": {"maxNewTokens": 2},
    "klCoefficient": 0.001,
    "missingEosPenalty": 0.0,
    "optimizer": FAST,
    "checkpointEvery": 15,
}


class Recipe:
    """Runs the online stages of an example."""

    def __init__(self, folder: Path, *, scale: float = 10) -> None:
        """Args:
        scale: of the base's embedding; what an adapter, which leaves it alone, can be sure of grows with it.
        """
        self.folder = folder
        model = tiny_llama()
        model.get_input_embeddings().weight.data *= scale
        self.base = save_model_folder(folder / "base", model)
        self.members: list[dict[str, float]] = [dict.fromkeys(FIRST, 1.0)]
        self.demonstrations = [("so?", "yes")]

    def run(self, example: str, **options: dict[str, Any]) -> Path:
        """Runs the stages with the given options in place of the example's, and returns the run's folder.

        SFT without options is skipped: its result is the base model.
        """
        document = yaml.safe_load((EXAMPLES / example).read_text())
        spec = document["spec"]
        stages = [stage for stage in spec["stages"] if "evaluate" not in stage]
        for stage in stages:
            ((kind, own),) = stage.items()
            own.update(options.get(kind, {}))
        model = {"base": str(self.base), "precision": "fp32", "device": "cpu", "threads": 1}
        document["spec"] = {**spec, "seed": 3, "model": model, "data": self._data(), "stages": stages}
        run = load_model(AlignmentRun, document, example)
        run_dir = self.folder / "run"
        run_dir.mkdir()
        (run_dir / "manifest.yaml").write_text(dump_yaml(run))
        for name, stage in zip(run.stage_names(), run.spec.stages, strict=True):
            if stage.sft is not None and "sft" not in options:
                shutil.copytree(self.base, run_dir / name / "model")
                mark_complete(run, name, run_dir)
            elif stage.reward_model is not None:
                assert len(self.members) in (1, stage.reward_model.ensemble)
                mode = stage.reward_model.ensemble_mode
                write_reward_model(run_dir / name / "model", self.members, mode, PROMPTS[0])
                mark_complete(run, name, run_dir)
            else:
                self._run_stage(run, name, run_dir)
        return run_dir

    def _data(self) -> dict[str, Any]:
        def user(text: str) -> dict[str, str]:
            return {"role": "user", "content": text}

        rows = {
            "prompts": [{"id": text, "prompt": [user(text)]} for text in PROMPTS],
            "demonstrations": [
                {"messages": [user(prompt), {"role": "assistant", "content": answer}]}
                for prompt, answer in self.demonstrations
            ],
        }
        rows["preferences"] = rows["demonstrations"]  # there for the manifest; the reward model is given
        for kind, items in rows.items():
            (self.folder / f"{kind}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in items))
        return {kind: {"train": str(self.folder / f"{kind}.jsonl")} for kind in rows}

    def _run_stage(self, run: AlignmentRun, name: str, run_dir: Path) -> None:
        cluster = Cluster(LoopThread())
        try:
            for service in services_of(run, name, run_dir, self.base):
                kind = service.name.partition("-")[0]
                if kind == "reward":
                    cluster.start_reward(service.config["scorers"])
                else:
                    getattr(cluster, f"start_{kind}")(Path(service.config["model"]))
            overrides = [f"spec.services={json.dumps(cluster.services())}"] if cluster.endpoints else []
            run_stage(run_dir, name, overrides)
        finally:
            cluster.close()


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    return Recipe(tmp_path)


def share(model: Path, characters: str, prompts: list[str] = PROMPTS) -> float:
    """Probability, over the prompts, that the first token of an answer is one of the characters."""
    policy, tokenizer = load_causal_lm(model), load_tokenizer(model)
    wanted = tokenizer.convert_tokens_to_ids(list(characters))
    shares = []
    with torch.no_grad():
        for prompt in prompts:
            ids = torch.tensor([prompt_ids(tokenizer, [{"role": "user", "content": prompt}])])
            shares.append(policy(ids).logits[0, -1].softmax(-1)[wanted].sum().item())
    return sum(shares) / len(shares)


def test_the_worth_of_an_answer_is_known(tmp_path: Path) -> None:
    """Of a single model, and of an ensemble whose members disagree."""
    from steersman.nn.load import load_reward_model

    def scores(members: list[dict[str, float]], mode: str) -> list[float]:
        model = load_reward_model(write_reward_model(tmp_path / mode, members, mode, "p0"))
        turns = [[{"role": "user", "content": "p3"}, {"role": "assistant", "content": said}] for said in "CNx"]
        return model.score([model.encode(messages) for messages in turns]).reward.tolist()

    members = [{"C": 4.0, "N": 1.0}, {"C": -1.0, "N": 1.0}]
    assert scores(members, "mean") == pytest.approx([1.5, 1.0, 0.0], abs=1e-2)
    assert scores(members, "worst") == pytest.approx([-1.0, 1.0, 0.0], abs=1e-2)


@pytest.mark.parametrize(("mode", "best"), [("worst", SECOND), ("mean", FIRST)])
def test_an_ensemble_decides_what_is_best(recipe: Recipe, mode: str, best: str) -> None:
    """One of four models overrates the first kind of answers, another warns of them: the worst case heeds it."""
    agree = dict.fromkeys(SECOND, 1.0)
    warns, overrates = dict.fromkeys(FIRST, -1.0), dict.fromkeys(FIRST, 8.0)
    recipe.members = [agree | overrates, agree | warns, agree, agree]
    ensemble = {"ensembleMode": mode}
    run_dir = recipe.run("13-ensemble-worst-case/run.yaml", rewardModel=ensemble, rl={**RL, "lora": None})
    assert share(recipe.base, best) < 0.2
    assert share(run_dir / "rl" / "model", best) > 0.9


def test_learned_and_verifiable_rewards_find_what_both_like(recipe: Recipe) -> None:
    """The reward model likes half of the letters, the rule likes others too: only what both like is best."""
    both = FIRST[:6]
    rule = {"name": "regex", "weight": 1.0, "options": {"pattern": f"[{both}{SECOND}]"}}
    run_dir = recipe.run(
        "14-verifiable-rewards/run.yaml",
        rl={**RL, "lora": None, "reward": {"modelWeight": 1.0, "verifiable": [rule]}},
    )
    assert share(run_dir / "rl" / "model", both) > 0.9


@pytest.mark.parametrize("dora", [True, False], ids=["dora", "lora"])
def test_an_adapter_finds_the_best_answer(tmp_path: Path, dora: bool) -> None:
    """DoRA reaches the service as merged weights, LoRA as an adapter."""
    recipe = Recipe(tmp_path, scale=20)
    recipe.members = [dict.fromkeys(FIRST + SECOND, 1.0)]
    rl = RL if dora else {**RL, "lora": {"rank": 16}}
    run_dir = recipe.run("15-dora-and-qlora/run.yaml", rl=rl)
    assert share(recipe.base, FIRST + SECOND) < 0.2
    assert share(run_dir / "rl" / "model", FIRST + SECOND) > 0.9
    adapter = json.loads((run_dir / "rl" / "adapter" / "adapter_config.json").read_text())
    assert adapter["use_dora"] is dora


def test_ppo_ptx_finds_the_best_answer_and_learns_the_demonstrations(recipe: Recipe) -> None:
    """What is rewarded is learned at the prompts; what nothing but the mixed loss teaches, at those demonstrated."""
    recipe.members = [dict.fromkeys(FIRST + SECOND, 1.0)]
    demonstrated = ["quite another question " * 3]
    recipe.demonstrations = [(prompt, "7") for prompt in demonstrated]
    ppo = {"critic": {"kind": "rewardModel", "learningRate": 0.01, "warmupSteps": 2}, "ptxCoefficient": 0.2}
    run_dir = recipe.run("03-instructgpt-ppo-ptx/run.yaml", rl={**RL, "lora": None, "ppo": ppo})
    assert share(recipe.base, "7", demonstrated) < 0.2
    model = run_dir / "rl" / "model"
    assert share(model, FIRST + SECOND) > 0.9
    assert share(model, "7", demonstrated) > 0.9


def test_llama_2_samples_by_rejection_and_goes_on_with_ppo(recipe: Recipe) -> None:
    """SFT teaches answers of one letter, each as often as the other; then half of the letters are good."""
    recipe.members = [dict.fromkeys(SECOND, 1.0)]
    recipe.demonstrations = [(prompt, letter) for prompt in PROMPTS for letter in FIRST + SECOND]
    sft = {"optimizer": FAST, "batchSize": 16, "microBatchSize": 16, "maxSteps": 20}
    sampling = {
        "promptsPerRound": 8,
        "samplesPerPrompt": 4,
        "generation": {"maxNewTokens": 2},
        "optimizer": {**FAST, "learningRate": 0.003},
        "batchSize": 4,
    }
    rl = {**RL, "lora": None, "steps": 15}
    run_dir = recipe.run("04-llama2/run.yaml", sft=sft, rejectionSampling=sampling, rl=rl)
    learned, sampled, aligned = (
        share(run_dir / name / "model", SECOND) for name in ("sft", "rejection-sampling", "rl")
    )
    assert learned < 0.7
    assert sampled > learned + 0.05
    assert aligned > max(0.95, sampled)
