"""Files and scores of RewardBench and RewardBench 2, worked by hand."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from steersman.errors import DataError
from steersman.local.reward_report import against_labelers, on_benchmark, on_pairs, open_scorer, pairs_of
from steersman.nn.reward import REWARD_FILE, RewardSettings
from steersman.report.reward_bench import Question, Scored, correct, read_questions, report, ties
from steersman.testing.models import save_model_folder, tiny_llama_reward


def scored(subset: str, right: tuple[float, ...], wrong: tuple[float, ...], identity: str = "1") -> Scored:
    return Scored(Question(identity, subset, "p", ("a",) * len(right), ("b",) * len(wrong)), right, wrong)


def write(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_both_versions_are_read_and_a_wrong_row_is_named(tmp_path: Path) -> None:
    one = {"id": 7, "subset": "hep-go", "prompt": "p", "chosen": "right", "rejected": "wrong", "chosen_model": "m"}
    two = {"id": "tied:3", "subset": "Ties", "prompt": "p", "chosen": ["a", "b"], "rejected": ["c"], "num_correct": 2}
    found = read_questions(write(tmp_path / "rows.jsonl", [one, two]))
    assert found[0] == Question("7", "hep-go", "p", ("right",), ("wrong",))
    assert found[1] == Question("tied:3", "Ties", "p", ("a", "b"), ("c",))
    with pytest.raises(DataError, match=r"bad\.jsonl:2: not a row of RewardBench"):
        read_questions(write(tmp_path / "bad.jsonl", [one, {"prompt": "p"}]))
    with pytest.raises(DataError, match="chosen or rejected is empty"):
        read_questions(write(tmp_path / "none.jsonl", [{**two, "rejected": []}]))


def published(version: int) -> list[dict[str, Any]]:
    """Rows with the columns of allenai/reward-bench (split filtered) and of allenai/reward-bench-2 (split test)."""
    if version == 1:
        return [
            {"prompt": f"Question {n}?", "chosen": "+" * n, "chosen_model": "GPT4-Turbo", "rejected": "-" * 3,
             "rejected_model": "vicuna-7b", "subset": subset, "id": n}
            for n, subset in enumerate(("alpacaeval-easy", "mt-bench-hard", "xstest-should-refuse",
                                        "xstest-should-respond", "math-prm", "hep-rust"), start=1)
        ]  # fmt: skip
    metadata = dict.fromkeys(("category", "correct", "instruction_id_list", "label", "method", "models", "prompt_norm",
                              "subcategory", "valid"))  # fmt: skip

    def row(identity: str, subset: str, chosen: list[str], rejected: list[str]) -> dict[str, Any]:
        counts = {"num_correct": len(chosen), "num_incorrect": len(rejected)}
        counts["total_completions"] = sum(counts.values())
        models = ["human"] * counts["total_completions"]
        return {"id": identity, "prompt": "Name a color of the rainbow.", "chosen": chosen, "rejected": rejected,
                **counts, "models": models, "subset": subset, "additional_metadata": metadata}  # fmt: skip

    subsets = [("Factuality", 4), ("Precise IF", 2), ("Math", 9), ("Safety", 1), ("Focus", 5)]
    four = [row(f"{n}", name, ["+" * length], ["-", "-" * 3, "-" * 5]) for n, (name, length) in enumerate(subsets)]
    ties = [
        row("ref:0", "Ties", ["+" * 6], ["-" * 3, "-"]), row("tied:0", "Ties", ["+" * 6, "+" * 5], ["-" * 3]),
        row("ref:1", "Ties", ["+" * 4], ["-" * 3]), row("tied:1", "Ties", ["+" * 9, "+" * 4], ["-" * 3, "-"]),
        row("ref:2", "Ties", ["+"], ["-" * 2]), row("tied:2", "Ties", ["+" * 3, "+" * 3, "+" * 3], ["-" * 2]),
    ]  # fmt: skip
    return four + ties


@pytest.mark.parametrize("form", ["jsonl", "parquet"])
def test_the_published_files_are_scored_as_their_authors_do(tmp_path: Path, form: str) -> None:
    """By a scorer that likes long answers, so that every figure can be told from the rows."""

    def file(version: int) -> Path:
        path = tmp_path / f"bench-{version}.{form}"
        if form == "jsonl":
            return write(path, published(version))
        pa, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
        parquet.write_table(pa.Table.from_pylist(published(version)), path)
        return path

    def score(ones: Any) -> list[float]:
        return [float(len(one[-1]["content"])) for one in ones]

    one = on_benchmark(score, file(1))
    assert {name: found["score"] for name, found in one["subsets"].items()} == {
        "alpacaeval-easy": 0.0, "mt-bench-hard": 0.0, "xstest-should-refuse": 0.5, "xstest-should-respond": 1.0,
        "math-prm": 1.0, "hep-rust": 1.0,
    }  # fmt: skip
    safety = (154 * 0.5 + 250 * 1.0) / 404
    assert one["sections"] == pytest.approx({"Chat": 0.0, "Chat Hard": 0.0, "Safety": safety, "Reasoning": 1.0})
    assert one["total"] == pytest.approx((0 + 0 + safety + 1) / 4)

    two = on_benchmark(score, file(2))
    assert {name: found["score"] for name, found in two["subsets"].items() if name != "Ties"} == {
        "Factuality": 0.0, "Precise IF": 0.0, "Math": 1.0, "Safety": 0.0, "Focus": 0.5,
    }  # fmt: skip
    # Gaps of ref 3, 1, -1; of tied 2, 1, 1; spreads 1, 5, 0: all tied and two of three ref are right.
    preferred, hard = 2 / 3, 1 / 3  # N = 0 and 2, and of these only 0 by both gaps
    margins = (math.tanh(2 / 1 - 1) + math.tanh(1 / 5 - 1) + math.tanh(-math.inf)) / 3
    wanted = 0.3 * 1 + 0.3 * 2 / 3 + 0.2 * preferred + 0.2 * hard + 0.01 * margins
    assert two["subsets"]["Ties"] == {"score": pytest.approx(wanted), "rows": 6}
    assert two["total"] == pytest.approx((0 + 0 + 1 + 0 + 0.5 + wanted) / 6)


@pytest.mark.parametrize("change", [{"prompt": None}, {"subset": 3}, {"chosen": ["a", None]}, {"rejected": {"a": "b"}}])
def test_what_is_no_text_is_not_scored_as_one(tmp_path: Path, change: dict[str, Any]) -> None:
    with pytest.raises(DataError, match=r"rows\.jsonl:2: not a row of RewardBench"):
        read_questions(write(tmp_path / "rows.jsonl", [published(2)[0], {**published(2)[1], **change}]))


def test_sections_weigh_their_subsets_as_published() -> None:
    rows = [scored("math-prm", (1.0,), (0.0,)), scored("math-prm", (0.0,), (1.0,)), scored("hep-go", (1.0,), (0.0,))]
    rows += [scored("mt-bench-hard", (0.0,), (1.0,)), scored("mt-bench-easy", (1.0,), (1.0,))]
    found = report(rows)
    assert found["sections"]["Reasoning"] == pytest.approx((984 * 0.5 + 164 * 1.0) / (984 + 164))
    assert found["sections"]["Chat Hard"] == 0.0
    assert found["sections"]["Chat"] == 0.5, "equal scores are half right"
    assert found["total"] == pytest.approx((found["sections"]["Reasoning"] + 0.0 + 0.5) / 3)
    assert found["subsets"]["math-prm"]["rows"] == 2
    assert found["subsets"]["math-prm"]["low"] < 0.5 < found["subsets"]["math-prm"]["high"]


def test_the_best_of_four_must_be_right() -> None:
    assert correct(scored("Math", (2.0,), (1.0, 0.0, -1.0))) == 1.0
    assert correct(scored("Math", (2.0,), (3.0, 0.0, -1.0))) == 0.0
    assert correct(scored("Math", (2.0,), (2.0, 2.0, -1.0))) == pytest.approx(1 / 3)
    found = report([scored("Math", (2.0,), (1.0,)), scored("Safety", (0.0,), (1.0,))])
    assert (found["sections"], found["total"]) == ({}, 0.5)


def test_ties_have_a_score_of_their_own() -> None:
    rows = [
        scored("Ties", (3.0,), (1.0, 0.0), "ref:1"),  # gap 2
        scored("Ties", (5.0, 4.0), (1.0,), "tied:1"),  # gap 3, spread 1
        scored("Ties", (1.0,), (2.0,), "ref:2"),  # gap -1
        scored("Ties", (6.0, 2.0), (1.0,), "tied:2"),  # gap 1, spread 4
    ]
    margin = (math.tanh(2 / 1 - 1) + math.tanh(-1 / 4 - 1)) / 2
    assert ties(rows) == pytest.approx(0.3 * 1.0 + 0.3 * 0.5 + 0.2 * 0.5 + 0.2 * 0.5 + 0.01 * margin)
    assert report(rows)["total"] == pytest.approx(ties(rows))


def test_a_reward_model_is_compared_with_each_labeler_and_they_with_each_other() -> None:
    # Item 1: ann and ben prefer the first, cem the second; item 2: ann prefers the second, ben finds a tie.
    verdicts = [
        *pairs_of(1, "ann", [[0], [1]]), *pairs_of(1, "ben", [[0], [1]]), *pairs_of(1, "cem", [[1], [0]]),
        *pairs_of(2, "ann", [[1], [0]]), *pairs_of(2, "ben", [[0, 1]]),
    ]  # fmt: skip
    found = against_labelers(verdicts, {(1, 0): 2.0, (1, 1): 1.0, (2, 0): 0.0, (2, 1): 0.0})
    shares = {name: (one["model"][0], one["other_labelers"][0]) for name, one in found["labelers"].items()}
    # Of ann's two preferences the model has the first, and scores the second equal; ben agrees once and half.
    assert shares == {"ann": (0.75, 0.5), "ben": (1.0, 0.5), "cem": (0.0, 0.0)}
    assert found["model"][0] == pytest.approx((1 + 0.5 + 1 + 0) / 4)
    assert found["labelers_with_each_other"][0] == pytest.approx((1 + 0 + 0.5 + 1 + 0 + 0 + 0) / 7)


def test_comparisons_tell_length_from_preference(tmp_path: Path) -> None:
    def row(chosen: str, rejected: str) -> dict[str, Any]:
        prompt = [{"role": "user", "content": "q"}]
        answers = {"chosen": chosen, "rejected": rejected}
        return {"prompt": prompt} | {k: [{"role": "assistant", "content": text}] for k, text in answers.items()}

    path = write(tmp_path / "pairs.jsonl", [row("long answer", "short"), row("ok", "a longer one"), row("yes", "a no")])
    found = on_pairs(lambda ones: [float(len(one[-1]["content"])) for one in ones], path)
    assert found["accuracy"][0] == pytest.approx(1 / 3)
    assert found["length_baseline"] == pytest.approx(2 / 3)
    by_length = found["accuracy_where_people_prefer_the"]
    assert (by_length["longer"][0], by_length["shorter"][0]) == (1.0, 0.0)
    bench = write(tmp_path / "b.jsonl", [{"subset": "hep-go", "prompt": "p", "chosen": "longer", "rejected": "no"}])
    assert on_benchmark(lambda ones: [float(len(one[-1]["content"])) for one in ones], bench)["total"] == 1.0


def test_rows_that_are_longer_than_the_model_takes_are_left_out_and_counted(tmp_path: Path) -> None:
    folder = save_model_folder(tmp_path / "model", tiny_llama_reward())
    (folder / REWARD_FILE).write_text(RewardSettings(max_length=64).model_dump_json(by_alias=True))
    score = open_scorer(folder)
    rows = [{"subset": "hep-go", "prompt": "p", "chosen": "good " * n, "rejected": "bad"} for n in (1, 2, 400)]
    found = on_benchmark(score, write(tmp_path / "b.jsonl", rows))
    assert (found["left_out"], found["subsets"]["hep-go"]["rows"]) == (1, 2)

    def pair(text: str) -> dict[str, Any]:
        sides = {k: [{"role": "assistant", "content": one}] for k, one in (("chosen", text), ("rejected", "no"))}
        return {"prompt": [{"role": "user", "content": "q"}], **sides}

    found = on_pairs(score, write(tmp_path / "p.jsonl", [pair("yes"), pair("well, yes"), pair("yes " * 500)]))
    assert (found["pairs"], found["left_out"]) == (2, 1)
    with pytest.raises(DataError, match="all are longer than the reward model takes"):
        on_benchmark(score, write(tmp_path / "c.jsonl", rows[2:]))
