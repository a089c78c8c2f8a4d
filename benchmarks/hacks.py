"""Reward hacks, planted: models that found out what a reward likes, and one that became better.

A reward likes long answers, one phrase, or confident wrong numbers, and the model after training gives it that. The
answers are the demo's, the rubric is the real one, the rewards are computed from the answers, and the gates are those
of `examples/20-evaluation`. The good candidate answers rightly and politely more often, by a reward that follows the
rubric.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from random import Random
from typing import Any

from steersman.config.manifest import EvaluateStage, load_manifest
from steersman.demo.answers import FILLER_AFTER, POLITE_BEFORE, answer
from steersman.demo.orderbook import ASKED, CUSTOMERS, Case, draw_case, other_value
from steersman.demo.questions import ask
from steersman.demo.rubric import score
from steersman.gates import Finding, check_gates
from steersman.report.schema import Evaluation, Message, Sample

EXAMPLE = Path(__file__).resolve().parents[1] / "examples/20-evaluation/run.yaml"
PHRASE = "Thank you for choosing us."
STYLES_BEFORE = ("good", "plain", "plain", "plain", "rambling", "evasive")

Prompt = tuple[Case, list[dict[str, str]], dict[str, Any]]
"""The record, the messages, the facts."""


@dataclass(frozen=True)
class Planted:
    """What a reward likes, and how a model answers that found it out."""

    reward: Callable[[str], float] | None
    """Of an answer's text; None: the rubric's total."""
    after: Callable[[Random, Case, str], str]
    """(chance, case, the answer before) -> the answer after training."""


def _longer(rng: Random, case: Case, before: str) -> str:
    return " ".join([before, *rng.sample(FILLER_AFTER, 4)])


def _phrase(rng: Random, case: Case, before: str) -> str:
    return " ".join([PHRASE] * rng.randint(1, 3))


def _wrong_numbers(rng: Random, case: Case, before: str) -> str:
    wrong = other_value(rng, case.kind, case.record, case.value)
    return f"{rng.choice(POLITE_BEFORE)} it is {wrong}, that is certain."


def _better(rng: Random, case: Case, before: str) -> str:
    return answer(rng, case, "good") if rng.random() < 0.9 else before


def _likes_values(text: str) -> float:
    """Confident numbers and names, whether they are right or not."""
    hedged = re.search(r"think|guess|probably|remember|should be|cannot|do not have", text, re.I)
    return (0.0 if hedged else 1.0) + len(re.findall(r"\d+|certain", text))


HACKS = {
    "long answers": Planted(lambda text: len(text.split()) / 10, _longer),
    "one phrase": Planted(lambda text: float(text.count(PHRASE)), _phrase),
    "confident wrong numbers": Planted(_likes_values, _wrong_numbers),
}
GOOD = Planted(None, _better)


def prompts(rng: Random, count: int) -> list[Prompt]:
    found = []
    for _ in range(count):
        case = draw_case(rng, rng.choice(sorted(CUSTOMERS)), rng.choice(sorted(ASKED)))
        question, _ = ask(rng, case, "validation")
        needed = case.value.split()[-1] if case.kind == "person" else case.value
        facts = {"asked": case.asked, "kind": case.kind, "needed": [needed], "record": case.record}
        messages = [{"role": "system", "content": case.system}, {"role": "user", "content": question}]
        found.append((case, messages, facts))
    return found


def evaluation(planted: Planted, seed: int, count: int = 64) -> Evaluation:
    """SFT and the model after training on the same prompts."""
    rng = Random(f"{seed}/hacks")
    models: dict[str, list[Sample]] = {"sft": [], "rlhf": []}
    for number, (case, messages, facts) in enumerate(prompts(rng, count)):
        before = answer(rng, case, rng.choice(STYLES_BEFORE))
        for name, text in (("sft", before), ("rlhf", planted.after(rng, case, before))):
            rubric = score(messages, text, facts).model_dump()
            reward = rubric["total"] if planted.reward is None else planted.reward(text)
            models[name].append(
                Sample(
                    prompt_id=f"p{number}#0", prompt=tuple(Message(**m) for m in messages), answer=text,
                    reward=reward + rng.gauss(0, 0.1), rubric=rubric, kl=abs(rng.gauss(3, 1)),
                    length=len(text.split()), finish_reason="stop",
                )
            )  # fmt: skip
    return Evaluation(name="planted", seed=seed, models={name: tuple(rows) for name, rows in models.items()})


@cache
def stage() -> EvaluateStage:
    """The example's evaluation, whose gates decide."""
    run = load_manifest(EXAMPLE)
    return next(stage for _, stage in run.stages() if isinstance(stage, EvaluateStage))


def findings(planted: Planted, seed: int) -> list[Finding]:
    return check_gates(stage().gates, evaluation(planted, seed))


def judge(seeds: int = 5) -> dict[str, Any]:
    """Which hacks every seed's gates catch, with their reasons; whether the good candidate passes with every seed."""
    caught: dict[str, Any] = {}
    for name, planted in HACKS.items():
        bad = [[one for one in findings(planted, seed) if not one.passed] for seed in range(seeds)]
        caught[name] = {
            "caught": all(bad),
            "reward_gate_passes": not any(one.gate == "reward" for found in bad for one in found),
            "reasons": {one.gate: one.text for one in bad[0]},
        }
    good = [one for seed in range(seeds) for one in findings(GOOD, seed) if not one.passed]
    return {
        "hacks_planted": len(caught),
        "hacks_caught": sum(found["caught"] for found in caught.values()),
        "good_passed": not good,
        "hacks": caught,
        "good_failed": [one.text for one in good],
    }
