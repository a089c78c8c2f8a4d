"""Writes the demo's data: demonstrations, judged comparisons and prompts of a simulated ERP customer service.

Everything is derived from one seed with the standard library's generator, so the same seed gives the same bytes. The
sets (train, validation, heldout) share neither a customer nor a wording of a question.
"""

import re
from collections.abc import Iterable, Mapping
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from random import Random
from statistics import fmean as mean
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from steersman.artifacts import write_whole
from steersman.data.records import Aspects, Demonstration, Feedback, Preference, Prompt, write_jsonl
from steersman.data.records import Row as AnyRow
from steersman.demo.answers import answer, draw_style
from steersman.demo.labelers import LABELERS, agreement, majority
from steersman.demo.orderbook import ASKED, CUSTOMERS, TOPICS, Case, draw_case
from steersman.demo.questions import SETS, ask
from steersman.demo.rubric import RubricScore, score

LICENCE = "CC0-1.0 (generated)"
SOURCE = "steersman.demo"
MANIFEST = "manifest.json"
CUSTOMER_SHARES = {"train": 0.65, "validation": 0.12, "heldout": 0.23}
SAME_STYLE = 0.04
"""Share of comparisons in which both candidates have the same manner; most of them become ties."""
THUMB_UP = 0.8
"""A labeler's thumb points up where the perceived score is above."""
RATED = ("grounded", "answers", "polite", "concise", "no_invented")
"""Criteria of the rubric that the labelers rate from 1 to 5."""
SENIOR = 0.65
"""Share of comparisons in which one candidate comes from a senior agent, who always answers well."""
MAX_PROMPT, MAX_ANSWER = 39, 32
"""Most pieces (see `_pieces`) of a prompt and an answer: at most 60 rendered tokens and 36 tokens of SmolLM2."""

Row = dict[str, Any]
_ORIGIN: Row = {"synthetic": True, "source": SOURCE, "licence": LICENCE}


class Sizes(BaseModel):
    """Rows per file; prompts that repeat are redrawn, so very large sizes take longer."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    demonstrations: int = Field(default=420, ge=1)
    validation_demonstrations: int = Field(default=48, ge=1)
    preferences: int = Field(default=320, ge=1)
    validation_preferences: int = Field(default=60, ge=1)
    heldout_preferences: int = Field(default=150, ge=1)
    prompts: int = Field(default=400, ge=1)
    heldout_prompts: int = Field(default=96, ge=1)


class FileEntry(BaseModel):
    """One written file."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    rows: int
    sha256: str


class LengthBaseline(BaseModel):
    """Accuracy of predicting the preferred answer by its length in characters; equal lengths count half."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    longer_wins: float
    shorter_wins: float


class Manifest(BaseModel):
    """What was generated: written as `manifest.json` beside the data."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    seed: int
    sizes: Sizes
    licence: str
    synthetic: bool
    files: dict[str, FileEntry]
    length_baseline: dict[str, LengthBaseline]
    """Per preference file."""
    labeler_agreement: dict[str, float]
    """Pairwise agreement and Fleiss' kappa over all judged comparisons, ties included."""
    tie_share: float
    """Share of judged comparisons that the majority called a tie; they are in `judgements.jsonl` only."""
    rubric_of_demonstrations: float
    """Mean rubric total of the training demonstrations: what imitation alone can reach."""


def generate(out_dir: Path, seed: int, sizes: Sizes | None = None) -> Manifest:
    """Write all files into `out_dir` (made if missing), `manifest.json` last, and return the manifest."""
    sizes = sizes or Sizes()
    source = _Source(seed)
    demonstrations = {
        "train": source.demonstrations("train", sizes.demonstrations),
        "validation": source.demonstrations("validation", sizes.validation_demonstrations),
    }
    judgements: list[Row] = []
    preferences = {
        "train": source.preferences("train", sizes.preferences, judgements),
        "validation": source.preferences("validation", sizes.validation_preferences, judgements),
        "heldout": source.preferences("heldout", sizes.heldout_preferences, judgements),
    }
    prompts = {
        "train": source.prompts("train", sizes.prompts),
        "heldout": source.prompts("heldout", sizes.heldout_prompts),
    }
    (out_dir / MANIFEST).unlink(missing_ok=True)
    files: dict[str, FileEntry] = {}
    for kind, row_type, splits in (
        ("demonstrations", Demonstration, demonstrations),
        ("preferences", Preference, preferences),
        ("feedback", Feedback, {split: source.thumbs(split, rows) for split, rows in preferences.items()}),
        ("aspects", Aspects, {split: source.ratings(split, rows) for split, rows in preferences.items()}),
        ("prompts", Prompt, prompts),
        ("judgements", AnyRow, {"": judgements}),
    ):
        for split, rows in splits.items():
            name = ".".join(filter(None, (kind, split, "jsonl")))
            count, digest = write_jsonl(out_dir / name, map(row_type.model_validate, rows))
            files[name] = FileEntry(rows=count, sha256=digest)
    verdicts = [[row["verdict"] for row in item] for _, item in groupby(judgements, key=itemgetter("item"))]
    manifest = Manifest(
        seed=seed,
        sizes=sizes,
        licence=LICENCE,
        synthetic=True,
        files=files,
        length_baseline={f"preferences.{split}": length_baseline(rows) for split, rows in preferences.items()},
        labeler_agreement=agreement(verdicts),
        tie_share=round(mean(majority(row)[0] == "tie" for row in verdicts), 4),
        rubric_of_demonstrations=round(mean(row["rubric"] for row in demonstrations["train"]), 4),
    )
    write_whole(out_dir / MANIFEST, manifest.model_dump_json(indent=2) + "\n")
    return manifest


def length_baseline(preferences: Iterable[Mapping[str, Any]]) -> LengthBaseline:
    """How well length alone predicts the preference of at least one row."""
    longer = mean(
        0.5 if len(chosen) == len(rejected) else float(len(chosen) > len(rejected))
        for row in preferences
        for chosen, rejected in [(row["chosen"][-1]["content"], row["rejected"][-1]["content"])]
    )
    return LengthBaseline(longer_wins=round(longer, 4), shorter_wins=round(1 - longer, 4))


class _Source:
    """Draws rows; keeps the prompts that were used, so that no prompt occurs twice in the whole data set."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.used: set[tuple[str, str]] = set()
        names = sorted(CUSTOMERS)
        Random(f"{seed}/customers").shuffle(names)
        train = round(CUSTOMER_SHARES["train"] * len(names))
        validation = train + round(CUSTOMER_SHARES["validation"] * len(names))
        self.customers = dict(zip(SETS, (names[:train], names[train:validation], names[validation:]), strict=True))

    def _prompt(self, rng: Random, split: str, topic: str) -> tuple[Case, Row]:
        """A case and the fields that every row shares."""
        while True:
            customer = rng.choice(self.customers[split])
            case = draw_case(rng, customer, topic)
            question, wording = ask(rng, case, split)
            fits = _pieces(case.system) + _pieces(question) <= MAX_PROMPT
            if fits and (case.system, question) not in self.used:
                self.used.add((case.system, question))
                break
        needed = case.value.split()[-1] if case.kind == "person" else case.value
        row = {
            "prompt": [{"role": "system", "content": case.system}, {"role": "user", "content": question}],
            "topic": topic,
            "customer": customer,
            "wording": wording,
            "facts": {"asked": case.asked, "kind": case.kind, "needed": [needed], "record": case.record},
            **_ORIGIN,
        }
        return case, row

    def _draw(self, kind: str, split: str) -> Iterable[tuple[str, Random, Case, Row]]:
        """Endless rows of one file, the asked fields in turn so that every topic is covered evenly."""
        rng = Random(f"{self.seed}/{kind}/{split}")
        number = 0
        while True:
            order = [topic for topic in sorted(TOPICS) for _ in ASKED[topic]]
            rng.shuffle(order)
            for topic in order:
                number += 1
                case, row = self._prompt(rng, split, topic)
                yield f"{kind}-{split}-{number:05d}", rng, case, row

    def prompts(self, split: str, size: int) -> list[Row]:
        return [
            {"id": key, **row} for (key, _, _, row), _ in zip(self._draw("prompt", split), range(size), strict=False)
        ]

    def demonstrations(self, split: str, size: int) -> list[Row]:
        rows = []
        for (key, rng, case, row), _ in zip(self._draw("demonstration", split), range(size), strict=False):
            style = draw_style(rng)
            text = _answer(rng, case, style)
            prompt = row.pop("prompt")
            rubric = score(prompt, text, row["facts"]).total
            messages = [*prompt, {"role": "assistant", "content": text}]
            rows.append({"id": key, "messages": messages, **row, "style": style, "rubric": rubric})
        return rows

    def preferences(self, split: str, size: int, judgements: list[Row]) -> list[Row]:
        """Judge comparisons until `size` of them have a winner; every verdict is appended to `judgements`."""
        rows: list[Row] = []
        draws = iter(self._draw("comparison", split))
        while len(rows) < size:
            key, rng, case, row = next(draws)
            styles, texts = _candidates(rng, case)
            rubrics = [score(row["prompt"], text, row["facts"]) for text in texts]
            votes = [labeler.compare(rng, *rubrics) for labeler in LABELERS]
            judgements.extend(
                {"item": key, "labeler": labeler.name, "verdict": vote, "a": texts[0], "b": texts[1]}
                for labeler, vote in zip(LABELERS, votes, strict=True)
            )
            verdict, margin, level = majority(votes)
            if verdict == "tie":
                continue
            win, lose = (0, 1) if verdict == "a" else (1, 0)
            rows.append(
                {
                    "id": key,
                    "prompt": row.pop("prompt"),
                    "chosen": [{"role": "assistant", "content": texts[win]}],
                    "rejected": [{"role": "assistant", "content": texts[lose]}],
                    "margin": margin,
                    "level": level,
                    **row,
                    "styles": {"chosen": styles[win], "rejected": styles[lose]},
                    "rubric": {"chosen": rubrics[win].total, "rejected": rubrics[lose].total},
                }
            )
        return rows

    def thumbs(self, split: str, preferences: list[Row]) -> list[Row]:
        """Every compared answer by itself, with the thumb of one labeler."""
        rng = Random(f"{self.seed}/thumb/{split}")
        return [
            {**row, "label": rng.choice(LABELERS).perceive(rng, rubric) > THUMB_UP}
            for row, rubric in _single_answers(preferences)
        ]

    def ratings(self, split: str, preferences: list[Row]) -> list[Row]:
        """Every compared answer by itself, rated by each criterion of the rubric; one in ten ratings was left out."""
        rng = Random(f"{self.seed}/rating/{split}")
        rows = []
        for row, rubric in _single_answers(preferences):
            noisy = {name: 1 + 4 * getattr(rubric, name) + rng.gauss(0, 0.4) for name in RATED}
            rated = [name for name in RATED if rng.random() > 0.1] or [RATED[0]]
            scales = dict.fromkeys(rated, (1, 5))
            rows.append(
                {**row, "aspects": {name: min(5, max(1, round(noisy[name]))) for name in rated}, "scales": scales}
            )
        return rows


def _single_answers(preferences: list[Row]) -> Iterable[tuple[Row, RubricScore]]:
    for pair in preferences:
        shared = {key: pair[key] for key in ("prompt", "topic", "customer", "wording", "facts")}
        for side in ("chosen", "rejected"):
            row = {"id": f"{pair['id']}-{side}", **shared, "completion": pair[side], **_ORIGIN}
            yield row, score(pair["prompt"], pair[side][0]["content"], pair["facts"])


def _pieces(text: str) -> int:
    """Words, digits, spaces before digits and punctuation marks: a lower bound of the tokens, four below at most."""
    return len(re.findall(r"[A-Za-z']+|\d|[^\w\s]| (?=\d)", text))


def _answer(rng: Random, case: Case, style: str) -> str:
    while _pieces(text := answer(rng, case, style)) > MAX_ANSWER:
        pass
    return text


def _candidates(rng: Random, case: Case) -> tuple[list[str], list[str]]:
    """Manners and texts of two different answers."""
    first = "good" if rng.random() < SENIOR else draw_style(rng)
    same = rng.random() < SAME_STYLE
    while True:
        second = first if same else draw_style(rng)
        if same or second != first:
            texts = [_answer(rng, case, first), _answer(rng, case, second)]
            if texts[0] != texts[1]:
                return [first, second], texts
