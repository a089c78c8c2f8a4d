"""The report and the comparison of runs in a real browser: the looks, and search and filter."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
from gateway_browser import browsing, every_look

from steersman.report.compare import Version, write_compare
from steersman.report.report import write_report
from steersman.report.schema import Evaluation

pytestmark = [pytest.mark.browser, pytest.mark.timeout(600)]


def evaluated(seed: int) -> Evaluation:
    draw = random.Random(seed)

    def sample(number: int, shift: float) -> dict[str, Any]:
        total = min(1.0, max(0.0, draw.gauss(0.4 + shift / 5, 0.2)))
        return {
            "prompt_id": f"p{number}",
            "prompt": [{"role": "user", "content": f"Where is my order {number}? I ordered a desk last week."}],
            "answer": f"Order {number} was sent on 20 November." + " Anything else?" * int(draw.random() < shift),
            "reward": draw.gauss(shift, 0.6),
            "rubric": {"grounded": total, "polite": total, "total": total},
            "scores": {"preference": shift, "unseen": draw.gauss(shift, 0.5)},
            "kl": 0.5,
            "length": 20 + number % 9,
            "finish_reason": "length" if number % 7 == 0 else "stop",
        }

    models = {
        name: [sample(n, shift) for n in range(12)] for name, shift in (("base", -1), ("sft", 0.2), ("rlhf", 0.9))
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
            "seconds": {"rl": 20.5},
        }
    )


async def test_report_and_comparison_at_every_width_and_colour(tmp_path: Path) -> None:
    stage = tmp_path / "run" / "rl"
    stage.mkdir(parents=True)
    (stage / "metrics.jsonl").write_text("".join(f'{{"step": {n}, "reward": {n / 7}, "kl": {n}}}\n' for n in range(20)))
    report = write_report(tmp_path / "run", evaluated(1), tmp_path / "report")
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
        await every_look(page, "report")

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
