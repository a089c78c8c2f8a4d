"""The report and the comparison of runs in a real browser: the looks, and search and filter."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
from gateway_browser import browsing, every_look

from steersman.judges.licence import measure, missing
from steersman.judges.options import Licence
from steersman.report.compare import Version, write_compare
from steersman.report.pages import write_suites
from steersman.report.report import write_report
from steersman.report.schema import Evaluation
from steersman.suites.asked import SuiteReport

pytestmark = [pytest.mark.browser, pytest.mark.timeout(600)]


def evaluated(seed: int, samples: int = 1) -> Evaluation:
    draw = random.Random(seed)

    def sample(number: int, shift: float, index: int = 0) -> dict[str, Any]:
        total = min(1.0, max(0.0, draw.gauss(0.4 + shift / 5, 0.2)))
        return {
            "prompt_id": f"p{number}#{index}",
            "prompt": [{"role": "user", "content": f"Where is my order {number}? I ordered a desk last week."}],
            "answer": f"Order {number} was sent on 20 November." + " Anything else?" * int(draw.random() < shift),
            "reward": draw.gauss(shift, 0.6),
            "rubric": {"grounded": total, "polite": total, "total": total},
            "scores": {"preference": shift, "unseen": draw.gauss(shift, 0.5)},
            "kl": 0.5,
            "length": 20 + number % 9,
            "finish_reason": "length" if number % 7 == 0 else "stop",
        }

    shifts = {"base": -1.0, "sft": 0.2, "rlhf": 0.9}
    models = {
        name: [sample(n, shift, index) for n in range(12) for index in range(samples)] for name, shift in shifts.items()
    }
    knowledge = [float(n % 3 == 0) for n in range(60)]
    return Evaluation.model_validate(
        {
            "name": "shop",
            "seed": seed,
            "models": models,
            "reward_model": {
                "pairs": [{"chosen": draw.gauss(1, 1), "rejected": 0.0, "margin": n % 3 / 2} for n in range(12)],
                "longer_wins": 0.45,
                "shorter_wins": 0.55,
            },
            "date": "2026-11-26T11:03:00+00:00",
            "base_model": "tiny",
            "hardware": "cpu, fp32",
            "settings": {"generation": {"temperature": 0.7}, "maxPrompts": 12},
            "data": {"prompts.heldout.jsonl": "0a" * 32},
            "knowledge": {"truthfulqa_mc1": {"base": knowledge, "rlhf": knowledge}},
            "suites": [suite(name, passed) for name, passed in (("base", 3), ("sft", 6), ("rlhf", 9))],
            "judges": {"llm": judged(draw)},
            "licences": {
                "llm": measure([1.0] * 40, Licence(kappa=0.2), 0.9).model_dump(),
                "preference": measure([1.0, 0.0] * 20, Licence()).model_dump(),
                "unseen": missing("it was not compared with people").model_dump(),
            },
            "watched": {
                "looks": [look(step, draw) for step in range(0, 28, 4)],
                "planned": 7,
                "false_alarms": 0.05,
            },
            "seconds": {"rl": 20.5},
        }
    )


def suite(target: str, passed: int) -> dict[str, Any]:
    asked = [
        {
            "case": f"case-{n}", "tags": ["orders" if n % 2 else "returns", "de"], "question": f"Where is order {n}?",
            "answers": [f"Order {n} left on Monday."], "seconds": 0.5, "tokens": 9,
            "checks": {"facts": None if n < passed else "it does not say 'Tuesday'", "forbidden": None},
        }
        for n in range(12)
    ]  # fmt: skip
    return {"suite": "shop", "kind": "business", "target": target, "decoding": "greedy", "asked": asked}


def judged(draw: random.Random) -> dict[str, Any]:
    names = (("rlhf", "base"), ("rlhf", "sft"), ("sft", "base"))
    pairs = [
        {"prompt_id": f"p{n}#0", "one": one, "other": other, "score": draw.choice((0.0, 0.5, 1.0, 1.0))}
        for n in range(12) for one, other in names
    ]  # fmt: skip
    return {
        "model": "a-large-judge", "pairs": pairs, "missing": 1, "swapped": 4, "calls": 74, "failures": 2,
        "tokens": 31_000, "cost": 0.42,
    }  # fmt: skip


def look(step: int, draw: random.Random) -> dict[str, Any]:
    """The unseen scorer rises with the reward at first, and falls when it goes on."""

    def values(mean: float) -> dict[str, float]:
        return {f"p{n}": draw.gauss(mean, 0.2) for n in range(12)}

    return {
        "step": step, "kl": step / 3, "reward": values(step / 8), "scorers": {"unseen": values(step / 6 - step**2 / 90)}
    }  # fmt: skip


async def test_report_and_comparison_at_every_width_and_colour(tmp_path: Path) -> None:
    stage = tmp_path / "run" / "rl"
    stage.mkdir(parents=True)
    (stage / "metrics.jsonl").write_text("".join(f'{{"step": {n}, "reward": {n / 7}, "kl": {n}}}\n' for n in range(20)))
    report = write_report(tmp_path / "run", evaluated(1, samples=4), tmp_path / "report")
    evaluation = evaluated(1)
    asked = SuiteReport(date=str(evaluation.date), settings={"samples": 1}, results=evaluation.suites)
    suites = write_suites(asked, tmp_path, None, evaluation.judges, evaluation.licences)
    specs = [{"stages": {"rl": {"steps": steps, "clip": 0.2}}} for steps in (10, 20)]
    runs = [Version(name, evaluated(seed), spec) for seed, (name, spec) in enumerate(zip("ab", specs, strict=True))]
    compared = write_compare(runs, tmp_path)
    async with browsing(report=str(report)) as (page, _, _, url):
        await page.goto(url)
        await page.click("text=Report")
        await page.wait_for_selector("h2:text('Training')")
        for summary in await page.locator("details > summary").all():
            await summary.click()
        shown = await page.evaluate("[...document.images].every((image) => image.complete && image.naturalWidth > 0)")
        assert shown, "its pictures are shown although the gateway lets it load nothing"
        assert "prompts.heldout.jsonl" in await page.inner_text("#settings")
        await page.click("th >> text=KL to the reference")
        assert await page.evaluate("document.querySelector(':target').textContent") == "KL"
        shown = await page.inner_text("main")
        for section in (
            "Wins by llm (a-large-judge)",
            "Licences",
            "Over-optimisation",
            "along training",
            "Best of n",
            "Suites",
        ):
            assert section in shown, section
        await every_look(page, "report")

        await page.goto(f"file://{suites}")
        for summary in await page.locator("details > summary").all():
            await summary.click()
        await every_look(page, "suites")

        await page.goto(f"file://{compared}")
        await every_look(page, "compare-runs")
        count, examples = page.locator("#count"), page.locator(".example:visible")
        assert await count.inner_text() == "12 of 12 prompts"
        await page.fill("#search", "ORDER 11")
        await page.locator("#count:text('1 of 12')").wait_for()
        assert "order 11?" in await examples.inner_text()
        await page.fill("#search", "")
        found = {}
        for kind in ("better", "worse", "changed"):
            await page.select_option("#show", kind)
            found[kind] = await examples.count()
        assert found["better"] + found["worse"] == 12
        assert 0 < found["changed"] < 12
        assert "spec.stages.rl.steps" in await page.inner_text("main")
        assert "clip" not in await page.inner_text("main")
