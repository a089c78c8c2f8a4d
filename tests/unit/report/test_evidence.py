"""Judges, their licences, and what the report shows of them."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from judge_endpoint import judging
from sklearn.metrics import cohen_kappa_score

from steersman.errors import FailedPreconditionError
from steersman.judges.comparing import JudgeOfPairs, Rivals
from steersman.judges.licence import enforce, kappa_interval, measure, missing, people_agreement
from steersman.judges.options import Licence, LlmJudge
from steersman.report.evidence import evidence
from steersman.report.overoptimisation import Look
from steersman.report.pages import write_suites
from steersman.report.report import write_report
from steersman.report.schema import Evaluation, JudgedPair, JudgeResult, Message, Sample, Watched
from steersman.report.summary import summarise
from steersman.statistics import wilson_interval
from steersman.suites.asked import Asked, SuiteReport, SuiteResult


def test_a_licence_is_the_lower_end_of_the_agreement_with_people() -> None:
    verdicts = [1.0] * 80 + [0.0] * 20
    found = measure(verdicts, Licence(accuracy=0.7))
    assert found.granted
    assert found.accuracy == wilson_interval(80, 100)
    assert not measure(verdicts, Licence(accuracy=0.72)).granted, "the estimate is 0.8, its lower end 0.711"
    # Of people who agree with their majority in 95%, four fifths are 0.76.
    against = measure(verdicts, Licence(accuracy=0.5, of_people=0.8), people=0.95)
    assert not against.granted
    assert "one person agrees with the majority in 95.0%" in against.text
    assert people_agreement([1.0, 0.8, 0.4, None]) == pytest.approx((1.0 + 0.8 + 0.6) / 3)
    assert people_agreement([None]) is None


def test_kappa_is_sklearns_with_the_answers_in_alternating_places() -> None:
    verdicts = [1.0, 1.0, 0.0, 0.5, 1.0, 1.0, 0.0, 1.0, 1.0, 1.0, 0.5, 1.0]
    people = [place % 2 for place in range(len(verdicts))]
    judge = [verdict if place % 2 else 1 - verdict for place, verdict in enumerate(verdicts)]
    found = kappa_interval(verdicts)
    assert found is not None
    assert found.estimate == pytest.approx(cohen_kappa_score([2 * p for p in people], [int(2 * j) for j in judge]))
    assert found.low < found.estimate < found.high
    assert measure(verdicts, Licence(accuracy=0.0, kappa=0.9)).granted is False
    assert measure([1.0] * 40, Licence(kappa=0.9)).granted


def test_without_a_licence_the_run_warns_or_refuses() -> None:
    said: list[str] = []
    nothing = {"preference": missing("it was not compared with people: add data.preferences.heldout")}
    enforce(nothing, Licence(), said.append, "reward")
    assert said == [
        "warning: preference has no licence to reward: it was not compared with people: add data.preferences.heldout"
    ]
    with pytest.raises(FailedPreconditionError, match="preference has no licence to gate"):
        enforce(nothing, Licence(without="refuse"), said.append, "gate")
    enforce({"preference": measure([1.0] * 50, Licence())}, Licence(without="refuse"), said.append, "reward")
    assert len(said) == 1


def test_a_judge_compares_in_both_orders_and_counts_ties_failures_and_cost() -> None:
    def rivals(*answers: tuple[str, str]) -> list[Rivals]:
        asked = [{"role": "user", "content": "q"}]
        return [Rivals(f"p{n}#0", asked, "rlhf", "sft", *pair) for n, pair in enumerate(answers)]

    with judging() as endpoint:  # likes the longer answer, of equally long ones the first
        spec = LlmJudge(name="llm", url=endpoint.url, model="m", rubric="Be long.", price=2.0, concurrency=1)
        result = JudgeOfPairs(spec).result(rivals(("long answer", "short"), ("a", "bcd"), ("xyz", "abc"), ("x", "x")))
        assert [pair.score for pair in result.pairs] == [1.0, 0.0, 0.5, 0.5]
        assert (result.swapped, result.calls, result.failures, result.missing) == (1, 6, 0, 0)
        assert result.tokens == 6 * 7
        assert result.cost == pytest.approx(42 * 2.0 / 1e6)
        endpoint.broken = True
        broken = JudgeOfPairs(spec).result(rivals(("long answer", "short"), ("x", "x")))
        assert (len(broken.pairs), broken.missing, broken.failures) == (1, 1, 1)
        assert broken.reason == "the judge's answer does not fit the schema"
        assert broken.tokens == 7, "what does not fit the schema is paid for, too"


def full_evaluation() -> Evaluation:
    def samples(shift: float) -> tuple[Sample, ...]:
        return tuple(
            Sample(
                prompt_id=f"p{n}#0", prompt=(Message(role="user", content="q"),), answer=f"a{n}", reward=n % 3 + shift,
                rubric={"total": 0.5, "polite": 0.5}, length=4, finish_reason="stop",
            )
            for n in range(8)
        )  # fmt: skip

    def asked(passes: int) -> tuple[Asked, ...]:
        return tuple(
            Asked(
                case=f"c{n}", tags=("orders",), question="q", answers=("a",),
                checks={"facts": None if n < passes else "no"},
            )
            for n in range(4)
        )  # fmt: skip

    def suite(target: str, passes: int) -> SuiteResult:
        return SuiteResult(suite="shop", kind="business", target=target, decoding="greedy", asked=asked(passes))

    pairs = tuple(JudgedPair(prompt_id=f"p{n}#0", one="rlhf", other="base", score=1.0 if n else 0.5) for n in range(8))

    def values(by: float) -> dict[str, float]:
        return {f"p{n}": by + n % 2 for n in range(4)}

    looks = tuple(Look(step=n, kl=float(n), reward=values(n), scorers={"gold": values(-n)}) for n in range(3))
    return Evaluation(
        name="run", seed=1, models={"base": samples(0.0), "rlhf": samples(1.0)},
        suites=(suite("base", 1), suite("rlhf", 3)),
        knowledge={"mmlu_world_religions": {"base": (1.0, 0.0, 1.0, 1.0), "rlhf": (1.0, 0.0, 1.0, 0.0)}},
        judges={"llm": JudgeResult(model="m", pairs=pairs, calls=16, tokens=100, cost=0.5, swapped=1)},
        licences={"llm": measure([1.0] * 30, Licence()), "preference": measure([0.0] * 30, Licence())},
        watched=Watched(looks=looks, planned=3, false_alarms=0.05),
    )  # fmt: skip


def test_the_report_shows_every_section(tmp_path: Path) -> None:
    evaluation = full_evaluation()
    found = evidence(evaluation)
    assert [one["by"] for one in found["wins"]] == ["reward", "llm (m)"]
    judged = found["wins"][1]["rows"]
    assert judged[1].cells[0].rate.estimate == pytest.approx(7.5 / 8)
    assert [(row["suite"], row["tag"], [cell.estimate for cell in row["cells"]]) for row in found["suites"]] == [
        ("shop", "", [0.25, 0.75]),
        ("shop", "orders", [0.25, 0.75]),
    ]
    table: dict[str, Any] = {row["label"]: row for row in found["sawyer"]}
    rewards = [n % 3 for n in range(8)]
    mean = sum(rewards) / 8
    assert table["reward, mean"]["cells"][0].estimate == pytest.approx(mean)
    assert table["reward, variance"]["numbers"][0] == pytest.approx(sum((x - mean) ** 2 for x in rewards) / 7)
    assert [cell.estimate for cell in table["mmlu_world_religions"]["cells"]] == [0.75, 0.5]
    html = write_report(tmp_path, evaluation, tmp_path / "report").read_text()
    for words in ("Wins by llm (m)", "cost 0.5", "Licences", "granted", "Over-optimisation", "Recommended", "Suites",
                  "unseen scorers along training",
                  "Rewards and knowledge", "mmlu_world_religions", "reward, variance"):  # fmt: skip
        assert words in html, words


def test_every_win_stands_under_the_version_that_it_is_against(tmp_path: Path) -> None:
    """The judge met the versions in another order than the suites have them."""
    names = ("first", "second", "third")
    scores = {("third", "first"): 1.0, ("third", "second"): 0.5, ("second", "first"): 0.0}
    pairs = tuple(
        JudgedPair(prompt_id=f"p{n}#0", one=one, other=other, score=score)
        for n in range(8) for (one, other), score in scores.items()
    )  # fmt: skip
    results = tuple(
        SuiteResult(suite="shop", kind="business", target=name, decoding="greedy",
                    asked=(Asked(case="c", question="q", answers=("a",), checks={"facts": None}),))
        for name in names
    )  # fmt: skip
    report = SuiteReport(date="2026-11-26", settings={}, results=results)
    html = write_suites(report, tmp_path, None, {"llm": JudgeResult(model="m", pairs=pairs)}).read_text()
    table = html[html.index("Wins by llm") :].split("</table>")[0]
    head = re.findall(r'<th scope="col">([^<]*)', table)[1:-1]
    assert head == list(names)
    for row in re.findall(r"<tr><th scope=\"row\">(.*?)</tr>", table):
        name, cells = row.split("</th>", 1)
        shown = re.findall(r"<td>([^<]*)", cells)[:3]
        won = [scores.get((name, one), 1 - scores.get((one, name), 0)) for one in names]
        wanted = ["–" if one == name else f"{share:.1%}" for one, share in zip(names, won, strict=True)]
        assert shown == wanted, name


def test_the_summary_has_judges_and_licences() -> None:
    told = json.loads(json.dumps(summarise(full_evaluation())))
    assert told["win_rate"]["llm"][0] == pytest.approx(7.5 / 8, abs=1e-4)
    assert told["judges"]["llm"] == {
        "model": "m", "comparisons": 8, "missing": 0, "swapped": 1, "calls": 16, "failures": 0, "tokens": 100,
        "cost": 0.5,
    }  # fmt: skip
    assert told["licences"]["preference"]["granted"] is False
    assert told["overoptimisation"]["recommended"] == 0
