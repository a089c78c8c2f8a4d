"""Schema, summary, table and report of an evaluation."""

import base64
import io
import json
import re
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from steersman.errors import DataError
from steersman.report.report import pick_examples, stage_metrics, write_report
from steersman.report.schema import Evaluation, read_evaluation
from steersman.report.summary import render_table, summarise, verdict
from steersman.report.terms import TERMS

PNG = b"\x89PNG\r\n\x1a\n"


def sample(number: int, reward: float | None, total: float = 0.5, **changes: Any) -> dict[str, Any]:
    return {
        "prompt_id": f"p{number}",
        "prompt": [{"role": "user", "content": f"Question {number}? <script>alert(1)</script>"}],
        "answer": f"Answer <b>{number}</b> & more.",
        "reward": reward,
        "rubric": {"grounded": total, "polite": total, "total": total},
        "kl": 0.5,
        "length": 10 + number,
        "finish_reason": "stop",
        **changes,
    }


def document(**changes: Any) -> dict[str, Any]:
    models = {
        "base": [sample(i, -1.0 + 0.3 * (i % 4), 0.2 + 0.01 * i) for i in range(12)],
        "sft": [sample(i, 0.2 * (i % 5), 0.5 + 0.01 * i) for i in range(12)],
        "rlhf": [sample(i, 1.0 + 0.1 * (i % 3), 0.8 + 0.01 * i) for i in range(12)],
    }
    models["base"][0]["finish_reason"] = "length"
    return {
        "name": "quickstart",
        "seed": 4,
        "models": models,
        "reward_model": {
            "pairs": [{"chosen": 1.0 + 0.1 * i, "rejected": 0.1 * i * i, "margin": (i % 4) / 3} for i in range(12)],
            "longer_wins": 0.45,
            "shorter_wins": 0.55,
        },
        "logprob_mismatch": 2e-6,
        "seconds": {"sft": 10.0, "rl": 20.5},
        "peak_memory_gib": 3.2,
        **changes,
    }


def evaluation(**changes: Any) -> Evaluation:
    return Evaluation.model_validate(document(**changes))


def test_summary_has_the_keys_of_demo_check_and_exact_numbers() -> None:
    result = summarise(evaluation())
    assert set(result) >= {
        "seconds", "peak_memory_gib", "reward", "rlhf_minus_sft", "rubric", "rm_accuracy", "length_baseline", "kl",
        "no_eos", "logprob_mismatch", "seed",
    }  # fmt: skip
    assert result["seconds"] == {"sft": 10.0, "rl": 20.5, "total": 30.5}
    after = sum(1.0 + 0.1 * (i % 3) for i in range(12)) / 12
    before = sum(0.2 * (i % 5) for i in range(12)) / 12
    assert result["reward"]["rlhf"][0] == pytest.approx(after, abs=1e-4)
    assert result["rlhf_minus_sft"][0] == pytest.approx(after - before, abs=1e-4)
    assert result["rlhf_minus_sft"][1] > 0
    assert result["rubric_rlhf_minus_sft"][0] == pytest.approx(0.3, abs=1e-4)
    assert result["no_eos"] == {"base": round(1 / 12, 4), "sft": 0.0, "rlhf": 0.0}
    assert result["length_baseline"] == 0.55
    drawn = result["bootstrap"]
    assert set(drawn) == {"reward", "total", *result["criteria"]}
    assert drawn["reward"][0] == result["rlhf_minus_sft"][0]
    assert 0 < drawn["reward"][1] < drawn["reward"][0] < drawn["reward"][2]
    json.dumps(result)


def test_the_verdict_names_what_did_not_improve() -> None:
    data = document()
    for number, row in enumerate(data["models"]["rlhf"]):
        sign = 1 if number % 2 else -1  # on average nothing
        row["rubric"] = {**data["models"]["sft"][number]["rubric"], "polite": 0.9}
        row["rubric"]["grounded"] += 0.1 * sign
    changed = Evaluation.model_validate(data)
    assert verdict(changed) == "By the rubric's criteria better: polite; no certain change: grounded."
    numbers = summarise(changed)["criteria"]
    assert numbers["polite"][1] > 0
    assert numbers["grounded"][1] < 0 < numbers["grounded"][2]


def test_a_missing_reward_is_missing_in_the_pair_and_not_zero() -> None:
    data = document()
    data["models"]["sft"][3]["reward"] = None
    found = Evaluation.model_validate(data)
    before, after, _ = found.paired("sft", "rlhf")
    assert len(before) == len(after) == 11
    assert summarise(found)["missing_rewards"] == {"base": 0, "sft": 1, "rlhf": 0}


def test_equal_scores_of_the_reward_model_count_half() -> None:
    pairs = [{"chosen": 1, "rejected": 0}, {"chosen": 0, "rejected": 0}]
    model = evaluation(reward_model={"pairs": pairs, "longer_wins": 0.5, "shorter_wins": 0.5}).reward_model
    assert model is not None
    assert model.accuracy == 0.75


def test_table_shows_every_model_and_fits_80_columns() -> None:
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(render_table(evaluation()))
    text = console.export_text()
    assert all(len(line) <= 80 for line in text.splitlines())
    text = " ".join(text.split())
    for part in ("RLHF − SFT", "reward", "rubric total", "polite", "+0.30 ± 0.00", "8.3%", "by length alone 0.550"):
        assert part in text


def test_report_is_one_safe_file_beside_its_plots(tmp_path: Path) -> None:
    run = tmp_path / "run"
    curves = {"sft": ("loss",), "ppo": ("reward", "kl", "policy_loss", "value_loss"), "evaluate": ("reward",)}
    for stage, keys in curves.items():
        (run / stage).mkdir(parents=True)
        lines = [json.dumps({"step": step, **dict.fromkeys(keys, step / 7)}) for step in range(20)]
        (run / stage / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    path = write_report(run, evaluation(), tmp_path / "report")  # the evaluation's row for each model is no curve
    html = path.read_text(encoding="utf-8")
    plots = {file.name: file.read_bytes() for file in (tmp_path / "report" / "plots").iterdir()}
    assert set(plots) == {
        "rewards.png", "rubric.png", "reward_model.png", "length.png", "training_sft.png", "training_ppo.png",
    }  # fmt: skip
    assert all(data.startswith(PNG) and len(data) > 5000 for data in plots.values())
    pictures = [base64.b64decode(data).decode() for data in re.findall(r"data:image/svg\+xml;base64,([\w+/=]+)", html)]
    assert len(pictures) == len(plots)
    for picture in pictures:
        assert "@media(prefers-color-scheme:dark)" in picture
        assert "#222222" not in picture.partition("</style>")[2], "what is drawn in ink is bright on a dark page"
    assert not re.search(r"""(src|href)=["'](?!data:|#)""", html)
    assert "<script>alert" not in html
    assert "Answer &lt;b&gt;" in html
    assert "RLHF scores higher than SFT" in html
    assert "width=device-width" in html
    again = write_report(run, evaluation(), tmp_path / "again")
    assert again.read_bytes() == path.read_bytes()


def test_every_figure_is_explained_and_every_link_leads_somewhere(tmp_path: Path) -> None:
    knowledge = {"truthfulqa_mc1": {"base": [0.0, 1.0] * 20, "rlhf": [0.0, 1.0] * 20}}
    settings = {"maxPrompts": 12, "generation": {"temperature": 0.7}}
    found = evaluation(
        date="2026-11-26T11:03:00+00:00", settings=settings, data={"prompts.jsonl": "0a" * 32}, knowledge=knowledge
    )
    html = write_report(tmp_path, found, tmp_path / "out").read_text()
    assert html.count('class="card"') == html.count('class="why"') == 5
    for section in re.findall("<section.*?</section>", html, re.DOTALL):
        if "<table>" in section and "About this run" not in section:
            assert "How to read this" in section, section[:80]
    for target in re.findall('href="#([^"]+)"', html):
        assert f'id="{target}"' in html, target
    for shown in ("2026-11-26 11:03:00 UTC", "evaluate.generation.temperature", "prompts.jsonl", "0a" * 8):
        assert shown in html
    assert "truthfulqa_mc1" in html
    assert "Wins by reward" in html


def test_words_mean_in_the_report_what_they_mean_in_the_glossary(repo_root: Path) -> None:
    entries = re.findall(r"^(\S.*)\n: (.+(?:\n  .+)*)", (repo_root / "docs/glossary.md").read_text(), re.MULTILINE)
    glossary = {term: " ".join(text.split()) for term, text in entries}
    assert {term: glossary[term] for term in TERMS} == TERMS


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda m: m.update(rlhf=m["sft"]), "cannot be told apart"),
        (lambda m: m.update(rlhf=m["base"]), "scores lower than SFT"),
        (lambda m: m.update(rlhf=[{**s, "reward": s["reward"] + 1} for s in m["base"]]), "being fooled"),
        (lambda m: (m.pop("sft"), m.pop("rlhf")), "nothing to compare"),
    ],
)
def test_report_says_what_the_numbers_say(
    tmp_path: Path, change: Any, sentence: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("steersman.report.report._plots", lambda *_: [])  # seconds of drawing that no sentence needs
    data = document()
    change(data["models"])
    html = write_report(tmp_path, Evaluation.model_validate(data), tmp_path / "out").read_text()
    assert sentence in " ".join(html.split())


def test_report_of_a_bare_evaluation_without_rubric_and_reward_model(tmp_path: Path) -> None:
    data = document(reward_model=None, logprob_mismatch=None, seconds={}, peak_memory_gib=None)
    for samples in data["models"].values():
        for row in samples:
            row.update(rubric={}, kl=None)
    write_report(tmp_path, Evaluation.model_validate(data), tmp_path / "out")
    assert {file.name for file in (tmp_path / "out" / "plots").iterdir()} == {"rewards.png", "length.png"}
    assert "rubric" not in summarise(Evaluation.model_validate(data))["reward"]


def test_examples_run_from_the_greatest_gain_to_the_greatest_loss() -> None:
    changes = [example["change"] for example in pick_examples(evaluation(), 5)]
    assert len(changes) == 5
    assert changes == sorted(changes, reverse=True)
    before, after, _ = evaluation().paired("sft", "rlhf")
    gains = sorted(b - a for a, b in zip(before, after, strict=True))
    assert (changes[0], changes[-1]) == (gains[-1], gains[0])


def test_a_torn_last_metrics_line_is_left_out_and_a_bad_one_is_named(tmp_path: Path) -> None:
    (tmp_path / "ppo").mkdir()
    path = tmp_path / "ppo" / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"st')
    assert stage_metrics(tmp_path) == {"ppo": [{"step": 1}, {"step": 2}]}
    path.write_text('{"step": 1}\n{"st\n{"step": 3}\n')
    with pytest.raises(DataError, match=r"metrics\.jsonl:2: not JSON"):
        stage_metrics(tmp_path)


def test_evaluation_round_trips_and_bad_files_are_named(tmp_path: Path) -> None:
    path = tmp_path / "evaluation.json"
    path.write_text(evaluation().model_dump_json())
    assert read_evaluation(path) == evaluation()
    with pytest.raises(DataError, match="no such file"):
        read_evaluation(tmp_path / "none.json")
    path.write_text(json.dumps(document(speed=1)))
    with pytest.raises(DataError, match=r"evaluation\.json: speed: Extra inputs"):
        read_evaluation(path)
    data = document()
    data["models"]["sft"].pop()
    path.write_text(json.dumps(data))
    with pytest.raises(DataError, match=r"models\.sft and models\.base have different prompts"):
        read_evaluation(path)
    path.write_text("{")
    with pytest.raises(DataError, match="Invalid JSON"):
        read_evaluation(path)
