"""How often a gate lets a model pass that is no better, and finds one that is: simulated evaluations.

    python -m benchmarks.gates [--simulations 1000] [--prompts 96] [--samples 8]

A simulated evaluation has prompts of different difficulty, on each of which the later model is better or worse by an
amount of its own (standard deviation 1), and samples that scatter around it (standard deviation 1). Over all prompts
the amounts average `gain`: 0 is a model that is no better, only otherwise. `training.evaluate.pass_gates` decides with
the gate `reward: 0`, whose limit is the lower end of a 95% interval, so that 2.5% pass wrongly. `independent` is the
same decision taken as if all answers were independent. Writes build/bench/gates.json: `false_pass` with its interval,
`coverage` of the interval, `power` by true gain; of `benchmarks.hacks` `hacks_planted`, `hacks_caught`, `good_passed`;
`false_alarm`: share of trainings in which `rl.watch` sounds although the scorer that training never uses stays where it
is while the reward rises, stated as 5%; `alarm_found`: of trainings in which it falls by two standard deviations.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from benchmarks import hacks
from benchmarks.report import command_line, heading, table, write
from steersman.config.manifest import EvaluateStage
from steersman.errors import FailedPreconditionError
from steersman.report.overoptimisation import Look, find_alarm
from steersman.report.schema import Evaluation, Sample
from steersman.statistics import compare, wilson_interval
from training.evaluate import pass_gates

GAINS = (0.2, 0.4)
FALSE_ALARMS = 0.05
PROMPT_SD, EFFECT_SD, SAMPLE_SD = 1.0, 1.0, 1.0


def rewards(generator: np.random.Generator, prompts: int, samples: int, gain: float) -> tuple[np.ndarray, np.ndarray]:
    """Rewards [prompts, samples] of the model before and of the model after."""
    difficulty = generator.normal(0, PROMPT_SD, (prompts, 1))
    effect = generator.normal(gain, EFFECT_SD, (prompts, 1))

    def noise() -> np.ndarray:
        return generator.normal(0, SAMPLE_SD, (prompts, samples))

    return difficulty + noise(), difficulty + effect + noise()


def evaluation(before: np.ndarray, after: np.ndarray) -> Evaluation:
    """As the evaluate stage writes it; fields that no gate reads are left out."""
    models = {}
    for name, values in (("sft", before), ("rlhf", after)):
        models[name] = tuple(
            Sample.model_construct(prompt_id=f"p{prompt}#{index}", reward=float(value), rubric={}, finish_reason="stop")
            for prompt, row in enumerate(values)
            for index, value in enumerate(row)
        )
    return Evaluation.model_construct(name="simulated", seed=0, models=models, reward_model=None)


def passes(found: Evaluation) -> bool:
    try:
        pass_gates(EvaluateStage.model_validate({"gates": {"reward": 0.0}}), found)
    except FailedPreconditionError:
        return False
    return True


def simulate(simulations: int, prompts: int, samples: int, seed: int = 0) -> dict[str, Any]:
    """Shares with 95% intervals over `simulations` evaluations of each kind."""
    generator = np.random.default_rng(seed)
    passed = covered = independent = 0
    for _ in range(simulations):
        before, after = rewards(generator, prompts, samples, 0.0)
        found = evaluation(before, after)
        interval = found.change("sft", "rlhf").difference
        passed += passes(found)
        covered += interval.low <= 0.0 <= interval.high
        independent += compare(before.ravel().tolist(), after.ravel().tolist()).difference.low >= 0.0
    power = {}
    for gain in GAINS:
        count = max(1, simulations // 10)
        power[str(gain)] = sum(
            passes(evaluation(*rewards(generator, prompts, samples, gain))) for _ in range(count)
        ) / max(1, count)
    return {
        "false_pass": passed / simulations,
        "false_pass_interval": list(wilson_interval(passed, simulations)),
        "coverage": covered / simulations,
        "independent_false_pass": independent / simulations,
        "power": power,
    }


def alarms(trainings: int, fall: float) -> float:
    """Share of trainings with an alarm, where the unseen scorer ends `fall` standard deviations lower."""
    generator = np.random.default_rng(0)
    prompts, looks, sounded = 32, 7, 0
    for _ in range(trainings):
        hard = generator.normal(size=prompts)
        seen: list[Look] = []
        for number in range(looks):
            gold = hard - fall * number / (looks - 1) + generator.normal(size=prompts)
            names = [f"p{prompt}" for prompt in range(prompts)]
            reward = dict(zip(names, (hard + 9.0 * number + generator.normal(size=prompts)).tolist(), strict=True))
            scorers = {"gold": dict(zip(names, gold.tolist(), strict=True))}
            seen.append(Look(step=number, kl=float(number), reward=reward, scorers=scorers))
            if find_alarm(seen, looks, FALSE_ALARMS) is not None:
                sounded += 1
                break
    return sounded / trainings


def main() -> None:
    parser = command_line(__doc__, "gates")
    parser.add_argument("--simulations", type=int, default=1000)
    parser.add_argument("--prompts", type=int, default=96)
    parser.add_argument("--samples", type=int, default=8)
    arguments = parser.parse_args()
    cases = [simulate(arguments.simulations, arguments.prompts, samples) | {"samples": samples}
             for samples in sorted({1, arguments.samples})]  # fmt: skip
    main_case = cases[-1]
    table(
        ("samples a prompt", "false pass", "as if independent", "coverage", *(f"found at +{gain}" for gain in GAINS)),
        [
            [c["samples"], c["false_pass"], c["independent_false_pass"], c["coverage"], *c["power"].values()]
            for c in cases
        ],
    )
    options = {"simulations": arguments.simulations, "prompts": arguments.prompts}
    planted = hacks.judge()
    for name, found in planted["hacks"].items():
        print(f"{name}: {'caught' if found['caught'] else 'NOT CAUGHT'}: {'; '.join(found['reasons'].values())}")
    print(f"good candidate: {'passes' if planted['good_passed'] else planted['good_failed']}")
    share, found = alarms(arguments.simulations, 0.0), alarms(max(1, arguments.simulations // 10), 2.0)
    print(f"over-optimisation: {share:.1%} false alarms ({FALSE_ALARMS:.0%} stated), {found:.0%} of falls by 2 found")
    watched = {"false_alarm": share, "false_alarm_stated": FALSE_ALARMS, "alarm_found": found}
    write({**heading(1), **main_case, **options, **planted, **watched, "cases": cases}, arguments.out)


if __name__ == "__main__":
    main()
