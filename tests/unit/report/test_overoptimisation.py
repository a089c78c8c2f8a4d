"""Over-optimisation: where the curve parts, which checkpoint is recommended, and how often the alarm is false."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from steersman.report import overoptimisation
from steersman.report.overoptimisation import Look, find_alarm, fit, parting, recommended


def look(step: int, reward: list[float], gold: list[float], kl: float | None = None) -> Look:
    def keyed(values: list[float]) -> dict[str, float]:
        return {f"p{place}": value for place, value in enumerate(values)}

    return Look(step=step, kl=float(step) if kl is None else kl, reward=keyed(reward), scorers={"gold": keyed(gold)})


NOISE = [-0.2, 0.1, 0.3, -0.1, 0.0, 0.2, -0.3, 0.05]


def shifted(by: float, times: float = 1.0) -> list[float]:
    return [by + times * value for value in NOISE]


def test_the_alarm_sounds_where_reward_rises_and_gold_falls_and_only_there() -> None:
    start = look(0, shifted(0), shifted(1))
    hacked = look(4, shifted(2, -1), shifted(0, 0.5))
    alarm = find_alarm([start, hacked], planned=3, false_alarms=0.05)
    assert alarm is not None
    assert (alarm.scorer, alarm.before, alarm.step) == ("gold", 0, 4)
    assert alarm.fall.high < 0 < alarm.rise.low
    p_fall = stats.ttest_rel(shifted(1), shifted(0, 0.5), alternative="greater").pvalue
    p_rise = stats.ttest_rel(shifted(2, -1), shifted(0), alternative="greater").pvalue
    assert alarm.p_value == pytest.approx(3 * max(p_fall, p_rise))
    assert "gold, which training never uses, falls by 1" in alarm.text
    both_rise = look(4, shifted(2, -1), shifted(2, 0.5))
    both_fall = look(4, shifted(-2, -1), shifted(0, 0.5))
    for later in (both_rise, both_fall):
        assert find_alarm([start, later], planned=3, false_alarms=0.05) is None


def test_a_fall_from_a_peak_is_found_although_gold_is_still_above_the_start() -> None:
    looks = [look(0, shifted(0), shifted(0)), look(4, shifted(1, -1), shifted(3)), look(8, shifted(2), shifted(1, -1))]
    alarm = find_alarm(looks, planned=3, false_alarms=0.05)
    assert alarm is not None
    assert alarm.before == 4
    assert parting(looks, "gold") is looks[1]
    assert recommended(looks) is looks[1]


def test_without_a_fall_nothing_parts_and_the_newest_is_recommended() -> None:
    looks = [look(step, shifted(step), shifted(step, 0.5)) for step in (0, 4, 8)]
    assert parting(looks, "gold") is None
    assert recommended(looks) is looks[-1]
    # A dip within a standard error is no reason to throw training away.
    dipped = [*looks, look(12, shifted(12), shifted(7.99, -1))]
    assert recommended(dipped) is dipped[-1]


@pytest.mark.parametrize("skewed", [False, True])
def test_a_training_without_a_fall_has_an_alarm_as_seldom_as_stated(skewed: bool) -> None:
    """The least favourable case: the reward surely rises, and gold stays where it is for all of 7 looks."""
    generator = np.random.default_rng(3)
    trainings, prompts, planned, alarms = 400, 24, 7, 0
    for _ in range(trainings):
        hard = generator.normal(size=prompts)
        looks: list[Look] = []
        for number in range(planned):
            noise = generator.exponential(size=prompts) if skewed else generator.normal(size=prompts)
            looks.append(look(number, list(hard + 9.0 * number), list(hard + noise)))
            if find_alarm(looks, planned, 0.05) is not None:
                alarms += 1
                break
    # Binomial: of 400 at 5% more than 31 have a chance below 1%.
    assert alarms <= 31


def test_the_law_of_gao_is_recovered() -> None:
    alpha, beta = 0.9, 0.3
    looks = [look(0, [0.0] * 3, [0.0] * 3, kl=0.0)]
    for step, d in enumerate((0.5, 1.0, 2.0, 4.0, 8.0), start=1):
        gold = d * (alpha - beta * math.log(d))
        looks.append(look(step, [d] * 3, [gold] * 3, kl=d * d))
    law = fit(looks, "gold")
    assert law is not None
    assert (law.alpha, law.beta) == pytest.approx((alpha, beta))
    assert law.peak_kl == pytest.approx(math.exp(alpha / beta - 1) ** 2)
    assert law.at(4.0) == pytest.approx(2 * (alpha - beta * math.log(2)))
    assert law.explained == pytest.approx(1.0)
    bent = [*looks[:-1], look(5, [8.0] * 3, [2.0] * 3, kl=64.0)]
    course = np.array([one.mean("gold") for one in bent[1:]])
    other = fit(bent, "gold")
    assert other is not None
    told = np.array([other.at(one.kl) for one in bent[1:]])
    assert other.explained == pytest.approx(1 - ((course - told) ** 2).sum() / ((course - course.mean()) ** 2).sum())
    assert fit(looks[:3], "gold") is None


def test_looks_survive_a_torn_line_and_the_summary_tells_everything(tmp_path) -> None:
    path = tmp_path / overoptimisation.LOOKS_FILE
    looks = [look(0, shifted(0), shifted(3)), look(4, shifted(1, -1), shifted(0, 0.5))]
    overoptimisation.write_looks(path, looks)
    with path.open("a") as file:
        file.write('{"step": 8, "kl"')
    assert list(overoptimisation.read_looks(path)) == looks
    told = overoptimisation.summary(looks, 2, 0.05)
    assert [row["step"] for row in told["curve"]] == [0, 4]
    assert told["curve"][1]["gold"] == pytest.approx(looks[1].mean("gold"), abs=1e-4)
    assert told["parts_at"] == {"gold": {"step": 0, "kl": 0.0}}
    assert told["recommended"] == 0
    assert told["alarm"]["scorer"] == "gold"
