"""Two and more runs on one page."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from steersman.cli import app
from steersman.errors import DataError
from steersman.report.compare import Version, write_compare
from steersman.report.schema import Evaluation


def evaluated(gain: float, asked: str = "", samples: int = 1) -> Evaluation:
    def sample(number: int, reward: float, index: int) -> dict[str, Any]:
        return {
            "prompt_id": f"p{number}#{index}",
            "prompt": [{"role": "user", "content": f"Question {number}? <script>alert(1)</script>{asked}"}],
            "answer": f"Answer {number} of {gain:g}.",
            "reward": reward,
            "rubric": {"polite": reward / 10, "grounded": 0.1 * (number % 2), "total": reward / 10},
            "kl": 0.5,
            "length": 10 + number,
            "finish_reason": "stop",
        }

    models = {
        name: [sample(number, shift + 0.1 * (number % 3), n) for number in range(12) for n in range(samples)]
        for name, shift in (("sft", 0.0), ("rlhf", gain))
    }
    return Evaluation.model_validate({"name": "shop", "seed": 1, "models": models, "seconds": {"rl": 1.0}})


def test_the_page_says_where_each_run_is_better_and_worse(tmp_path: Path) -> None:
    spec = {"stages": {"rl": {"steps": 10, "ppo": {"clip": 0.2}}}}
    changed = {"stages": {"rl": {"steps": 20, "ppo": {"clip": 0.2}}}}
    versions = [Version("old", evaluated(1.0), spec), Version("new", evaluated(2.0), changed)]
    page = write_compare(versions, tmp_path).read_text()
    assert "new against old: better: reward, rubric total, polite; no certain change: grounded." in page
    assert "<code>spec.stages.rl.steps</code></th><td>10</td><td>20</td>" in page
    assert "clip" not in page  # the same in both
    assert "new</th><td>100.0%" in page, "it scores higher on every prompt"
    assert page.count('class="example"') == 12
    assert "<script>alert" not in page
    assert not re.search(r'(src|href)="(?!data:|#)', page), "the page needs nothing beside itself"


def test_what_is_counted_is_called_by_its_name(tmp_path: Path) -> None:
    for samples, unit in ((1, "prompts"), (3, "answers")):
        runs = [Version(name, evaluated(gain, samples=samples), {}) for name, gain in (("old", 1.0), ("new", 2.0))]
        page = write_compare(runs, tmp_path).read_text()
        assert (page.count('class="example"'), f"${{examples.length}} {unit}" in page) == (12 * samples, True)


def test_runs_of_other_prompts_stand_beside_each_other(tmp_path: Path) -> None:
    versions = [Version("old", evaluated(1.0), {}), Version("new", evaluated(2.0, asked=" Please."), {})]
    page = write_compare(versions, tmp_path).read_text()
    assert "new against old: no prompts in common." in page
    assert "The runs have no prompt in common." in page


def test_a_run_without_rewards_hides_nothing_of_the_others(tmp_path: Path) -> None:
    bare = evaluated(1.0)
    models = {
        name: tuple(sample.model_copy(update={"reward": None, "rubric": {}}) for sample in samples)
        for name, samples in bare.models.items()
    }
    page = write_compare(
        [Version("old", evaluated(1.0), {}), Version("bare", bare.model_copy(update={"models": models}), {})], tmp_path
    ).read_text()
    assert 'alt="Distribution of the rewards' in page
    assert "bare against old: no scores in common." in page


def test_one_run_is_nothing_to_compare(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="at least two runs with names of their own"):
        write_compare([Version("old", evaluated(1.0), {})] * 2, tmp_path)


def test_the_command_names_a_folder_without_an_evaluation(tmp_path: Path, repo_root: Path) -> None:
    manifest = yaml.safe_load((repo_root / "examples/01-quickstart/run.yaml").read_text())
    for name, gain in (("one", 1.0), ("two", 2.0)):
        (tmp_path / name / "evaluate").mkdir(parents=True)
        (tmp_path / name / "evaluate" / "evaluation.json").write_text(evaluated(gain).model_dump_json())
        (tmp_path / name / "manifest.yaml").write_text(yaml.safe_dump(manifest))
    runs, out = [str(tmp_path / name) for name in ("one", "two", "three")], str(tmp_path / "out")
    missing = CliRunner().invoke(app, ["compare", *runs, "--out", out])
    assert missing.exit_code != 0
    assert "three has no evaluation.json" in str(missing.exception)
    done = CliRunner().invoke(app, ["compare", *runs[:2], "--out", out])
    assert done.exit_code == 0, done.output
    assert done.output.strip() == f"{out}/compare.html"
    assert "The manifests are the same." in (tmp_path / "out" / "compare.html").read_text()
