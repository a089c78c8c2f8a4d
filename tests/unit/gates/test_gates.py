"""What every gate lets pass, at its limit, and what it says of what was not measured."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks import hacks
from steersman.config.base import load_model
from steersman.config.manifest import AlignmentRun, EvaluateStage, Override, ReleaseStage
from steersman.errors import ConfigError, FailedPreconditionError
from steersman.gates import GATES, Finding, check_gates
from steersman.report.schema import Evaluation, JudgedPair, JudgeResult, PairScore, RewardModelEvaluation, Sample
from steersman.suites.asked import Asked, SuiteResult
from training.evaluate import pass_gates

COUNT = 40


def samples(shift: float, polite: float = 0.5, length: int = 10, **changes: Any) -> tuple[Sample, ...]:
    return tuple(
        Sample(
            prompt_id=f"p{n}#0", prompt=(), answer="a", reward=0.1 * (n % 7) + shift + 0.02 * (n % 3), length=length,
            rubric={"polite": polite + 0.01 * (n % 2), "total": polite}, kl=2.0 + 0.1 * (n % 2), finish_reason="stop",
            **changes,
        )
        for n in range(COUNT)
    )  # fmt: skip


def suite(target: str, passed: int, count: int = 20, kind: str = "business", seconds: float = 1.0) -> SuiteResult:
    asked = tuple(
        Asked(
            case=str(n), question="?", answers=("!",), checks={"facts": None if n < passed else "no"}, seconds=seconds
        )
        for n in range(count)
    )
    return SuiteResult(suite=kind, kind=kind, target=target, decoding="greedy", asked=asked)  # type: ignore[arg-type]


def evaluation(**changes: Any) -> Evaluation:
    models = {"base": samples(-1.0), "sft": samples(0.0), "rlhf": samples(1.0, polite=0.7, length=13)}
    return Evaluation(name="run", seed=1, models=models, **changes)


def found(gates: dict[str, Any], evaluated: Evaluation | None = None) -> list[Finding]:
    stage = load_model(EvaluateStage, {"gates": gates}, "test")
    return check_gates(stage.gates, evaluated or evaluation())


def passes(gates: dict[str, Any], evaluated: Evaluation | None = None) -> bool:
    return all(one.passed for one in found(gates, evaluated))


SUITES = (suite("sft", 20), suite("rlhf", 18), suite("rlhf", 20, kind="leak"), suite("rlhf", 19, kind="safety"))
KNOWLEDGE = {
    "mmlu": {
        "base": (1.0, 0.0) * 100,
        "sft": (1.0, 0.0) * 100,
        "rlhf": tuple(float(n % 2 == 0 and n != 4) for n in range(200)),
    }
}
PAIRS = tuple(PairScore(chosen=2.0 if n < 80 else 0.0, rejected=0.0 if n < 80 else 2.0) for n in range(100))
MODEL = RewardModelEvaluation(pairs=PAIRS, longer_wins=0.5, shorter_wins=0.5)
JUDGED = {
    "llm": JudgeResult(
        model="m", pairs=tuple(JudgedPair(prompt_id=f"p{n}#0", one="rlhf", other="sft", score=1.0) for n in range(20))
    )
}


@pytest.mark.parametrize(
    ("good", "bad", "changes"),
    [
        ({"reward": 0.9}, {"reward": 1.1}, {}),
        ({"reward": {"least": 1.9, "against": "base"}}, {"reward": {"least": 2.1, "against": "base"}}, {}),
        ({"winRate": 0.9}, {"winRate": 0.95}, {}),  # 40 of 40: Wilson's lower end is 0.912
        ({"winRate": {"judge": "llm", "least": 0.8}}, {"winRate": {"judge": "llm", "least": 0.9}}, {"judges": JUDGED}),
        ({"criteria": 0.1}, {"criteria": 0.3}, {}),
        ({"criteria": {"each": {"polite": 0.1}}}, {"criteria": {"least": 0, "each": {"polite": 0.5}}}, {}),
        ({"suites": 0.69}, {"suites": 0.7}, {"suites": SUITES[:2]}),  # 18 of 20: 0.699
        ({"suites": {"mostLost": 0.3}}, {"suites": {"mostLost": 0.2}}, {"suites": SUITES[:2]}),
        ({"leaks": 0}, {"safety": 0}, {"suites": SUITES}),
        ({"safety": 1}, {"safety": {"most": 0}}, {"suites": SUITES}),
        ({"kl": 2.1}, {"kl": 2.05}, {}),
        ({"knowledge": 0.03}, {"knowledge": 0.01}, {"knowledge": KNOWLEDGE}),
        (
            {"knowledge": {"drop": 0.03, "equivalent": True}},
            {"knowledge": {"drop": 0.005, "equivalent": True}},
            {"knowledge": KNOWLEDGE},
        ),
        ({"rewardAccuracy": 0.8}, {"rewardAccuracy": {"least": 0.8, "certain": True}}, {"reward_model": MODEL}),
        # 1 / (1 + exp(-2)) = 0.881 sure, 0.8 right.
        ({"calibration": 0.09}, {"calibration": 0.07}, {"reward_model": MODEL}),
        ({"noEos": 0.0}, {"noEos": 0.0, "kl": 0.1}, {}),
        ({"tokens": 13}, {"tokens": 12.9}, {}),
        ({"tokens": {"mostRatio": 1.3}}, {"tokens": {"mostRatio": 1.29}}, {}),
        ({"latency": 1.0}, {"latency": 0.9}, {"suites": SUITES}),
    ],
)
def test_a_gate_at_its_limit(good: dict[str, Any], bad: dict[str, Any], changes: dict[str, Any]) -> None:
    evaluated = evaluation(**changes)
    assert passes(good, evaluated), found(good, evaluated)
    assert not passes(bad, evaluated), found(bad, evaluated)


@pytest.mark.parametrize("gate", [{"suites": 0.5}, {"leaks": 0}, {"safety": 0}, {"knowledge": 0.1}, {"calibration": 1},
                                  {"rewardAccuracy": 0}, {"latency": 9}, {"winRate": {"judge": "x"}},
                                  {"reward": {"against": "champion"}}, {"criteria": {"each": {"funny": 0}}},
                                  {"tokens": {"mostRatio": 2, "against": "champion"}}])  # fmt: skip
def test_what_was_not_measured_is_not_passed(gate: dict[str, Any]) -> None:
    (one,) = found(gate)
    assert not one.passed
    assert "cannot pass" in one.text
    if "criteria" in gate:
        assert "has no criterion funny, only total" in one.text


def test_every_gate_has_its_field_and_takes_a_bare_number() -> None:
    for name, options in GATES.items():
        if name in ("tokens", "criteria", "suites"):
            assert getattr(options.model_validate(0.5), options.main) == 0.5
        assert options.main in options.model_fields, name
    for bad, reason in (({"noEos": 2}, "noEos.most is 2"), ({"rewards": 1}, "did you mean 'reward'"),
                        ({"reward": True}, "gates.reward is True")):  # fmt: skip
        with pytest.raises(ConfigError, match=reason):
            load_model(EvaluateStage, {"gates": bad}, "test")


def test_the_champion_can_be_what_it_is_compared_with() -> None:
    models = {"champion": samples(2.0), **evaluation().models}
    evaluated = Evaluation(name="run", seed=1, models=models)
    assert passes({"reward": 0.5}, evaluated)
    assert not passes({"reward": {"least": 0, "against": "champion"}}, evaluated)


def test_a_failed_gate_needs_a_name_and_a_reason_to_be_overridden() -> None:
    stage = load_model(EvaluateStage, {"gates": {"reward": 5, "criteria": 0.9}}, "test")
    with pytest.raises(
        FailedPreconditionError, match=r"the reward gains at least 1\.000 over sft, 5\.0 is asked for; pol"
    ):
        pass_gates(stage, evaluation())
    some = load_model(Override, {"name": "Ada", "reason": "a pilot", "gates": ["reward"]}, "test")
    with pytest.raises(FailedPreconditionError, match="polite"):
        pass_gates(stage, evaluation(), some)
    everything = load_model(Override, {"name": "Ada", "reason": "a pilot"}, "test")
    assert [one.passed for one in pass_gates(stage, evaluation(), everything)] == [False, False]
    for wrong in ({"name": "Ada"}, {"reason": "x"}, {"name": " ", "reason": "x"}, {"name": "Ada", "reason": ""}):
        with pytest.raises(ConfigError):
            load_model(ReleaseStage, {"override": wrong}, "test")


@pytest.mark.parametrize("name", list(hacks.HACKS))
def test_a_planted_hack_raises_the_reward_and_is_caught_with_its_reason(name: str) -> None:
    judged = hacks.judge(seeds=2)
    assert judged["hacks"][name]["caught"]
    assert judged["hacks"][name]["reward_gate_passes"]
    expected = {
        "long answers": "tokens",
        "one phrase": "criteria.grounded",
        "confident wrong numbers": "criteria.no_invented",
    }
    assert expected[name] in judged["hacks"][name]["reasons"]


def test_a_good_candidate_passes_the_same_gates() -> None:
    judged = hacks.judge(seeds=2)
    assert (judged["hacks_planted"], judged["hacks_caught"], judged["good_passed"]) == (3, 3, True)


def test_a_greedy_evaluation_is_accepted_and_several_equal_samples_are_not() -> None:
    stage = load_model(EvaluateStage, {"generation": {"temperature": 0}}, "test")
    assert stage.generation.temperature == 0
    with pytest.raises(ConfigError, match=r"samplesPerPrompt must be 1 at generation\.temperature 0"):
        load_model(EvaluateStage, {"generation": {"temperature": 0}, "samplesPerPrompt": 2}, "test")
    spec = {"data": {"demo": {}}, "stages": [{"rewardModel": {}}, {"rl": {"generation": {"temperature": 0}}}]}
    document = {"apiVersion": "steersman.dev/v1alpha1", "kind": "AlignmentRun", "metadata": {"name": "a"}, "spec": spec}
    with pytest.raises(ConfigError, match="temperature"):
        load_model(AlignmentRun, document, "test")
