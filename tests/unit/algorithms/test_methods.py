"""Every registered method: what the manifest offers, what holds it, and the numbers of its estimate and loss."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import ppo_reference as reference
import pytest
import torch
import yaml
from numeric import assert_same
from torch import Tensor

from steersman.config.algorithms import ONLINE_METHODS, PpoSpec, block_of, blocks
from steersman.config.base import load_model
from steersman.config.manifest import AlignmentRun, KlLoss, RlStage
from training.algorithms import METHODS, build
from training.algorithms.method import Part, Totals
from training.batch import SampleBatch, micro_batches
from training.online.passes import totals_of
from training.online.policy_model import Forward

ROOT = Path(__file__).parents[3]
LENGTHS = [2, 3, 1, 4]
GROUP = [0, 0, 1, 1]
SCORES = [1.0, -1.0, 0.5, 2.0]
OLD = [-1.0, -2.0, -0.5, -1.5, -1.0, -0.7, -0.3, -1.2, -2.0, -0.4]
NEW = [-0.8, -2.1, -0.9, -1.0, -1.3, -0.6, -0.1, -1.3, -1.9, -0.9]
REF = [-1.1, -1.8, -0.5, -1.6, -1.2, -0.6, -0.4, -1.2, -1.9, -0.5]
TOTAL = sum(LENGTHS)


def batch_of(**changes: Any) -> SampleBatch:
    responses = tuple(np.arange(4, 4 + length, dtype=np.int32) for length in LENGTHS)
    batch = SampleBatch(
        prompts=(np.arange(4, 7, dtype=np.int32), np.arange(4, 6, dtype=np.int32)),
        responses=responses,
        loss_mask=tuple(np.ones(len(response), dtype=bool) for response in responses),
        group=torch.tensor(GROUP),
        lengths=torch.tensor(LENGTHS),
        engine_logprobs=torch.tensor(OLD),
        ref_logprobs=torch.tensor(REF),
        scores=torch.tensor(SCORES),
        parts={},
        ended=torch.ones(len(LENGTHS), dtype=torch.bool),
        versions=torch.zeros(len(LENGTHS), dtype=torch.int64),
    )
    return replace(batch, **changes)


def stage(algorithm: str, **options: Any) -> RlStage:
    given: dict[str, Any] = {"kl_coefficient": 0.0, "score_clip": None, "algorithm": algorithm, **options}
    return RlStage(**given)


def loss_of(spec: RlStage, batch: SampleBatch, values: Tensor | None = None) -> tuple[Tensor, float]:
    """(what was estimated, loss) of the batch in one piece."""
    method = build(spec)
    estimates = method.estimate(batch, torch.tensor(OLD), values, spec.kl_coefficient)
    (micro,) = micro_batches(batch, [0, 1], 10_000)
    totals = totals_of(batch, estimates, [micro])
    order = micro.tokens
    part = Part.of(batch, estimates, micro, "cpu", False)
    forward = Forward(torch.tensor(NEW)[order], None if values is None else values[order])
    return estimates.advantages, method.loss(forward, part, totals)[0].item()


def rows(values: list[float]) -> list[np.ndarray]:
    return np.split(np.array(values), np.cumsum(LENGTHS)[:-1])


def group_advantages(scores: list[float], scale: bool = True) -> np.ndarray:
    found = np.zeros(len(scores))
    for group in set(GROUP):
        members = [index for index, other in enumerate(GROUP) if other == group]
        own = np.array([scores[index] for index in members])
        found[members] = (own - own.mean()) / (own.std(ddof=1) + 1e-4 if scale else 1.0)
    return found


def clipped(advantage: float, ratio: float, low: float, high: float) -> float:
    return max(-advantage * ratio, -advantage * min(max(ratio, 1 - low), 1 + high))


# -- what every method needs -------------------------------------------------------------------------------------------


def test_the_manifest_offers_exactly_what_is_registered() -> None:
    assert set(METHODS) == set(ONLINE_METHODS)
    schema = RlStage.model_json_schema(by_alias=True)
    assert set(schema["properties"]["algorithm"]["enum"]) == set(METHODS)
    crd = yaml.safe_load(
        "\n".join(
            line
            for line in (ROOT / "charts/steersman/templates/crds/alignmentruns.yaml").read_text().splitlines()
            if "{{" not in line
        )
    )
    spec = crd["spec"]["versions"][0]["schema"]["openAPIV3Schema"]["properties"]["spec"]
    rl = spec["properties"]["stages"]["items"]["properties"]["rl"]["properties"]
    assert set(rl["algorithm"]["enum"]) == set(METHODS)
    for name in METHODS:
        assert (re.sub(r"_(.)", lambda found: found[1].upper(), block_of(name)) in rl) == (name in blocks())


@pytest.mark.parametrize("name", sorted(ONLINE_METHODS))
def test_a_method_has_its_file_example_tests_and_row(name: str) -> None:
    """Learning, invariance, resuming and ranks are parametrised over the registry; golden numbers are below."""
    module = ROOT / "training/algorithms" / f"{block_of(name)}.py"
    text = module.read_text()
    assert re.search(r"^ *L +=", text, re.MULTILINE), f"{module} does not say its loss"
    examples = [yaml.safe_load(path.read_text()) for path in (ROOT / "examples").glob("*/*.yaml")]
    stages = [one["rl"] for document in examples for one in document["spec"]["stages"] if "rl" in one]
    assert any((one or {}).get("algorithm", "ppo") == name for one in stages)
    row = [line for line in (ROOT / "docs/algorithms.md").read_text().splitlines() if f"`algorithm: {name}`" in line]
    assert row, f"docs/algorithms.md has no row with `algorithm: {name}`"
    assert f"def test_{block_of(name)}_by_hand" in Path(__file__).read_text()


@pytest.mark.parametrize("name", sorted(ONLINE_METHODS))
def test_a_block_of_options_belongs_to_one_method(name: str) -> None:
    other = "rloo" if name != "rloo" else "grpo"
    assert build(stage(name)).__class__ is METHODS[name]
    if name in blocks():
        with pytest.raises(ValueError, match=f"no meaning for {other}"):
            stage(other, **{block_of(name): {}})


# -- numbers -----------------------------------------------------------------------------------------------------------


def test_ppo_by_hand() -> None:
    """Against the numpy reference written after lm-human-preferences."""
    values = torch.linspace(-0.5, 0.5, TOTAL)
    spec = stage("ppo", ppo=PpoSpec(critic={"kind": "valueHead"}), kl_coefficient=0.05)
    found, loss = loss_of(spec, batch_of(), values)
    rewards = reference.compute_rewards(np.array(SCORES), rows(OLD), rows(REF), 0.05)
    advantages, returns = reference.gae(rewards, rows(values.tolist()), 1.0, 0.95)
    whitened = reference.whiten(advantages)
    assert_same(found, torch.tensor(np.concatenate(whitened)))
    own = rows(values.tolist())
    numbers = reference.losses(rows(NEW), rows(OLD), whitened, own, own, returns, 0.2, 0.2)
    assert loss == pytest.approx(numbers["policy"] + 0.1 * numbers["value"], rel=1e-5)


def test_lm_human_preferences_recipe_equals_the_reference() -> None:
    """The example: rewards whitened without their mean, a score only where a sentence ends, KL to a target."""
    document = yaml.safe_load((ROOT / "examples/19-lm-human-preferences/run.yaml").read_text())
    run = load_model(AlignmentRun, document, "run.yaml")
    spec = next(one.rl for one in run.spec.stages if one.rl is not None)
    assert (spec.adaptive_kl.target, spec.adaptive_kl.horizon, spec.epochs) == (6, 10_000, 4)  # type: ignore[union-attr]
    assert (spec.generation.temperature, spec.generation.stop) == (0.7, ["."])
    values = torch.linspace(-0.5, 0.5, TOTAL)
    ended = torch.tensor([True, False, True, True])
    found, loss = loss_of(spec, batch_of(ended=ended), values)
    scores = np.where(ended.numpy(), SCORES, -1.0)
    rewards = reference.compute_rewards(scores, rows(OLD), rows(REF), 0.15)
    rewards = reference.whiten(rewards, shift_mean=False)
    advantages, returns = reference.gae(rewards, rows(values.tolist()), 1.0, 0.95)
    whitened = reference.whiten(advantages)
    assert_same(found, torch.tensor(np.concatenate(whitened)))
    own = rows(values.tolist())
    numbers = reference.losses(rows(NEW), rows(OLD), whitened, own, own, returns, 0.2, 0.2)
    assert loss == pytest.approx(numbers["policy"] + 0.1 * numbers["value"], rel=1e-5)


def test_nlpo_by_hand() -> None:
    """Its loss is PPO's of log-probabilities over the sets; the sets themselves are worked by hand in test_top_p."""
    values = torch.linspace(-0.5, 0.5, TOTAL)
    options = {"critic": {"kind": "valueHead"}}
    found = loss_of(stage("nlpo", nlpo={**options, "top_p": 0.9}, kl_coefficient=0.05), batch_of(), values)
    expected = loss_of(stage("ppo", ppo=options, kl_coefficient=0.05), batch_of(), values)
    assert torch.equal(found[0], expected[0])
    assert found[1] == expected[1]


def test_nlpo_refuses_what_would_mix_masks() -> None:
    with pytest.raises(ValueError, match="maxStaleness 0"):
        stage("nlpo", max_staleness=1)


def test_rloo_by_hand() -> None:
    found, loss = loss_of(stage("rloo"), batch_of())
    assert found.tolist() == [2.0, -2.0, -1.5, 1.5]
    ratios = [math.exp((new - old).sum()) for new, old in zip(rows(NEW), rows(OLD), strict=True)]
    terms = [clipped(a, r, 0.2, 0.2) for a, r in zip(found.tolist(), ratios, strict=True)]
    assert loss == pytest.approx(sum(terms) / 4, rel=1e-5)


def token_terms(advantages: np.ndarray, low: float = 0.2, high: float = 0.2) -> list[list[float]]:
    """Clipped terms of every sample."""
    return [
        [clipped(a, math.exp(n - o), low, high) for n, o in zip(new, old, strict=True)]
        for a, new, old in zip(advantages, rows(NEW), rows(OLD), strict=True)
    ]


def test_grpo_by_hand() -> None:
    found, loss = loss_of(stage("grpo"), batch_of())
    expected = group_advantages(SCORES)
    assert found.tolist() == pytest.approx(expected.tolist(), rel=1e-5)
    assert loss == pytest.approx(np.mean([np.mean(terms) for terms in token_terms(expected)]), rel=1e-5)


def test_dr_grpo_by_hand() -> None:
    found, loss = loss_of(stage("dr-grpo", generation={"max_new_tokens": 5}), batch_of())
    assert found.tolist() == [1.0, -1.0, -0.75, 0.75]
    total = sum(map(sum, token_terms(group_advantages(SCORES, scale=False))))
    assert loss == pytest.approx(total / (4 * 5), rel=1e-5)


def test_reinforce_by_hand() -> None:
    found, loss = loss_of(stage("reinforce", whiten_advantages=False), batch_of())
    advantages = np.array(SCORES) - np.mean(SCORES)
    assert found.tolist() == pytest.approx(np.repeat(advantages, LENGTHS).tolist(), rel=1e-5)
    assert loss == pytest.approx(sum(map(sum, token_terms(advantages))) / TOTAL, rel=1e-5)


@pytest.mark.parametrize("group_baseline", [False, True])
def test_reinforce_plus_plus_by_hand(group_baseline: bool) -> None:
    """Returns to go with the KL of every token, whitened over all tokens (OpenRLHF's `reinforce` and `_baseline`)."""
    options = {"reinforce_plus_plus": {"group_baseline": group_baseline}}
    found, loss = loss_of(stage("reinforce-plus-plus", kl_coefficient=0.05, **options), batch_of())
    scores = group_advantages(SCORES, scale=False) if group_baseline else np.array(SCORES)
    rewards = reference.compute_rewards(scores, rows(OLD), rows(REF), 0.05)
    togo = [np.cumsum(row[::-1])[::-1] for row in rewards]
    expected = reference.whiten(togo)
    assert_same(found, torch.tensor(np.concatenate(expected)))
    terms = [clipped(a, math.exp(n - o), 0.2, 0.2) for a, n, o in zip(np.concatenate(expected), NEW, OLD, strict=True)]
    assert loss == pytest.approx(sum(terms) / TOTAL, rel=1e-5)


def test_dapo_by_hand() -> None:
    """The limit is 4 tokens, the last 2 of which cost: 0 up to 2 tokens, a half at 3, all of the penalty at 4."""
    dapo = {"clip_high": 0.28, "overlong": {"buffer": 2, "penalty": 0.8}}
    spec = stage("dapo", dapo=dapo, generation={"max_new_tokens": 4})
    found, loss = loss_of(spec, batch_of())
    expected = group_advantages([1.0, -1.0 - 0.4, 0.5, 2.0 - 0.8])
    assert found.tolist() == pytest.approx(expected.tolist(), rel=1e-5)
    assert loss == pytest.approx(sum(map(sum, token_terms(expected, 0.2, 0.28))) / TOTAL, rel=1e-5)
    same = batch_of(scores=torch.tensor([1.0, 1.0, 0.5, 2.0]))
    method = build(stage("dapo"))
    assert method.informative(same).tolist() == [False, False, True, True]
    assert method.rounds == 3


def test_gspo_by_hand() -> None:
    found, loss = loss_of(stage("gspo", gspo={"clip_low": 0.05, "clip_high": 0.1}), batch_of())
    ratios = [math.exp((new - old).mean()) for new, old in zip(rows(NEW), rows(OLD), strict=True)]
    terms = [clipped(a, r, 0.05, 0.1) for a, r in zip(group_advantages(SCORES), ratios, strict=True)]
    assert loss == pytest.approx(np.mean(terms), rel=1e-5)
    assert found.shape == (4,)


def test_cispo_by_hand() -> None:
    _, loss = loss_of(stage("cispo", cispo={"weight_cap": 1.2}), batch_of())
    terms = [
        -min(math.exp(n - o), 1.2) * a * n
        for a, new, old in zip(group_advantages(SCORES), rows(NEW), rows(OLD), strict=True)
        for n, o in zip(new, old, strict=True)
    ]
    assert loss == pytest.approx(sum(terms) / TOTAL, rel=1e-5)


@pytest.mark.parametrize("kind", ["sigmoid", "ipo"])
def test_online_dpo_by_hand(kind: str) -> None:
    found, loss = loss_of(stage("online-dpo", online_dpo={"beta": 0.3, "loss": kind}), batch_of())
    assert found.tolist() == [1.0, -1.0, -1.0, 1.0]
    ratio = [(new - ref).sum() for new, ref in zip(rows(NEW), rows(REF), strict=True)]
    margins = [ratio[0] - ratio[1], ratio[3] - ratio[2]]
    if kind == "sigmoid":
        terms = [math.log1p(math.exp(-0.3 * margin)) for margin in margins]
    else:
        terms = [(margin - 1 / 0.6) ** 2 for margin in margins]
    assert loss == pytest.approx(np.mean(terms), rel=1e-5)


def test_online_dpo_leaves_out_prompts_that_say_nothing() -> None:
    spec = stage("online-dpo")
    found, loss = loss_of(spec, batch_of(scores=torch.tensor([1.0, 1.0, 0.5, 2.0])))
    assert found.tolist() == [0.0, 0.0, -1.0, 1.0]
    assert loss > 0
    assert build(spec).denominator(Totals(3, 2, found[:2])) == 0


@pytest.mark.parametrize("name", sorted(name for name, one in ONLINE_METHODS.items() if one.kl_in_loss))
def test_the_kl_in_the_loss_is_added_by_every_method(name: str) -> None:
    """0.1 * k3 * ratio of each token, averaged as the method averages its terms."""
    values = torch.linspace(-0.5, 0.5, TOTAL)
    options: dict[str, Any] = {"ppo": {"critic": {"kind": "valueHead"}}} if name == "ppo" else {}
    plain = loss_of(stage(name, **options), batch_of(), values)[1]
    term = KlLoss(coefficient=0.1, correction=name != "gspo")
    with_kl = loss_of(stage(name, kl_loss=term, **options), batch_of(), values)[1]
    new, old, ref = np.array(NEW), np.array(OLD), np.array(REF)
    k3 = np.exp(ref - new) - 1 - (ref - new)
    tokens = 0.1 * k3 * (np.exp(new - old) if term.correction else 1.0)
    per_sample = [row.sum() for row in rows(tokens.tolist())]
    expected = {
        "rloo": np.sum(per_sample) / 4,
        "grpo": np.mean([row.mean() for row in rows(tokens.tolist())]),
        "gspo": np.mean([row.mean() for row in rows(tokens.tolist())]),
        "dr-grpo": np.sum(tokens) / (4 * 48),
    }
    assert with_kl - plain == pytest.approx(expected.get(name, np.sum(tokens) / TOTAL), rel=1e-3)


def test_only_standardised_scores_are_clipped() -> None:
    """A reward model's 7 counts 5; 60 points of a computed reward stay 60 points."""
    values = torch.tensor([7.0, -9.0, 1.0, 4.0])
    points = torch.tensor([60.0, 100.0, 80.0, 7.0])
    batch = batch_of(
        scores=0.5 * values + points, parts={"preference": values, "points": points}, standardised={"preference": 0.5}
    )
    method: Any = build(stage("grpo", score_clip=5.0))
    assert method.scores(batch).tolist() == [62.5, 97.5, 80.5, 9.0]
    plain = replace(batch, standardised={}, scores=points)
    assert method.scores(plain).tolist() == points.tolist()


def test_masked_tokens_teach_nothing() -> None:
    """The customer speaks in the middle of an answer: the own tokens' numbers are those without him."""
    batch = batch_of()
    longer, masks = list(batch.responses), list(batch.loss_mask)
    longer[1] = np.array([4, 99, 98, 5, 97, 6], np.int32)
    masks[1] = np.array([True, False, False, True, False, True])
    masked = replace(batch, responses=tuple(longer), loss_mask=tuple(masks))
    values = torch.linspace(-0.5, 0.5, TOTAL)
    for name in ONLINE_METHODS:
        options: dict[str, Any] = {"ppo": {"critic": {"kind": "valueHead"}}} if name == "ppo" else {}
        spec = stage(name, **options)
        ours, theirs = loss_of(spec, masked, values), loss_of(spec, batch, values)
        assert torch.equal(ours[0].sort().values, theirs[0].sort().values)
        assert ours[1] == pytest.approx(theirs[1], rel=1e-6)


def test_a_scorer_that_said_nothing_in_a_round_is_missing_there() -> None:
    values = torch.tensor([1.0, 2.0, 3.0, 4.0])
    spoken = batch_of(parts={"own": values, "model": values}, standardised={"model": 0.5})
    silent = batch_of(parts={"late": values})
    joined = SampleBatch.joined([spoken, silent])
    missing = torch.full((4,), math.nan)
    said, late = torch.cat([values, missing]), torch.cat([missing, values])
    wanted = {"own": said, "model": said, "late": late}
    torch.testing.assert_close(joined.parts, wanted, equal_nan=True)
    assert joined.standardised == {"model": 0.5}


def test_a_part_that_failed_and_has_no_weight_does_not_take_the_score_away() -> None:
    batch = batch_of(parts={"model": torch.tensor([math.nan, 9.0, 1.0, 1.0])}, standardised={"model": 0.0})
    method: Any = build(stage("grpo", score_clip=5.0))
    assert method.scores(batch).tolist() == SCORES
