"""Wrong combinations in a manifest are refused in one sentence, before anything is loaded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from steersman.config.base import load_model
from steersman.config.manifest import AlignmentRun
from steersman.errors import ConfigError, DataError
from steersman.local.prepare import check_rows_fit_stages

FILES = {"train": "rows.jsonl"}
ANSWER = [{"role": "assistant", "content": "yes"}]
REFUSAL = [{"role": "assistant", "content": "no"}]
KINDS = ("demonstrations", "preferences", "prompts", "feedback")
SAFE = {"aspect": "helpfulness", "limit": 3}
ASPECTS = {"objective": "aspects", "aspects": {"helpfulness": 1.0}}


def load(*stages: dict[str, Any], data: dict[str, Any] | None = None, **spec: Any) -> AlignmentRun:
    manifest = {
        "apiVersion": "steersman.dev/v1alpha1",
        "kind": "AlignmentRun",
        "metadata": {"name": "test"},
        "spec": {"data": {"demo": {}} if data is None else data, "stages": list(stages), **spec},
    }
    return load_model(AlignmentRun, manifest, "run.yaml")


def rl(**options: Any) -> list[dict[str, Any]]:
    return [{"rewardModel": {}}, {"rl": options}]


@pytest.mark.parametrize(
    ("stages", "reason"),
    [
        (rl(algorithm="rloo", ppo={"critic": {"kind": "valueHead"}}), "no meaning for rloo"),
        (rl(algorithm="grpo", samplesPerPrompt=1), "samplesPerPrompt must be at least 2"),
        (rl(algorithm="rloo", dualClip=3.0), "dualClip has no meaning for rloo"),
        (rl(dualClip=1.0), "dualClip must be above 1"),
        (rl(klCoefficient=0.0, adaptiveKl={}), "adaptiveKl multiplies klCoefficient"),
        (rl(stopKl=0.1), "stopKl needs epochs or minibatches above 1"),
        (rl(deterministic=True, maxStaleness=1), "deterministic needs maxStaleness 0"),
        (rl(ppo={"critic": {"coefficient": 0.5}}), "belongs to kind valueHead"),
        (rl(generation={"topP": 0.9}), "topP must be 1"),
        (rl(lora={"dropout": 0.1}), "lora.dropout must be 0"),
        (rl(minibatches=13), "minibatches must not exceed promptsPerStep"),
        (rl(reward={"verifiable": [{"name": "regexp"}]}), "'regexp' is not registered"),
        (rl(reward={"verifiable": [{"name": "regex"}]}), "options do not fit"),
        (rl(reward={"verifiable": [{"name": "regex", "options": {"pattern": "("}}]}), "not a regular expression"),
        (rl(reward={"verifiable": [{"name": "json-schema", "options": {"schema": {"type": 1}}}]}), "schema is wrong"),
        (rl(reward={"verifiable": [{"name": "demo-rubric"}] * 2}), "two scorers named demo-rubric"),
        ([{"rl": {"ppo": {"critic": {"kind": "valueHead"}}}}], "nothing to reward"),
        ([{"rl": {"reward": {"verifiable": [{"name": "demo-rubric"}]}}}], "no rewardModel stage comes before"),
        ([{"rewardModel": {"margin": True, **ASPECTS}}], "margin belongs to the objective pairwise"),
        ([{"rewardModel": {"margin": "0.5"}}], "rewardModel.margin"),
        ([{"rewardModel": {"aspects": {"tone": 1.0}}}], "set objective: aspects"),
        ([{"rewardModel": {"objective": "aspects"}}], "give the weight of every aspect"),
        ([{"rewardModel": {**ASPECTS, "decide": "threshold"}}], "decide threshold needs thresholds"),
        ([{"rewardModel": {**ASPECTS, "thresholds": [SAFE]}}], "decide sum has no thresholds; remove them"),
        (
            [{"rewardModel": {**ASPECTS, "decide": "threshold", "thresholds": [{**SAFE, "aspect": "tone"}]}}],
            "tone is none",
        ),
        ([{"rewardModel": {**ASPECTS, "decide": "lexicographic", "thresholds": [SAFE, SAFE]}}], "stands there twice"),
        ([{"rewardModel": {**ASPECTS, "decide": "threshold", "thresholds": [SAFE]}}, {"rl": {}}], "kind: valueHead"),
        ([{"rewardModel": {"ensembleMode": "worst"}}], "set ensemble to at least 2"),
        ([{"dpo": {"loss": "robust"}}], "set labelSmoothing above 0"),
        ([{"dpo": {"loss": "ipo", "labelSmoothing": 0.1}}], "no meaning for the loss ipo"),
        ([{"kto": {"microBatchSize": 1}}], "must be at least 2"),
        ([{"ilql": {"learnFrom": ["returns"]}}], "learns from data.returns, which is missing"),
        ([{"ilql": {"learnFrom": []}}], "learnFrom"),
        ([{"ilql": {"expectile": 1.0}}], "expectile"),
        ([{"ilql": {"learnFrom": ["preferences"]}}, {"dpo": {}}], "followed by dpo, which would train"),
    ],
)
def test_refused(stages: list[dict[str, Any]], reason: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(*stages)
    assert reason in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("stage", "workers", "reason"),
    [
        ({"sft": {"batchSize": 8}}, 3, "batchSize 8, which 3 trainer.workers cannot share"),
        ({"kto": {"batchSize": 2}}, 2, "share of batchSize of each of the trainer.workers must be at least 2"),
    ],
)
def test_a_batch_that_the_ranks_cannot_share_is_refused(stage: dict[str, Any], workers: int, reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        load(stage, trainer={"workers": workers})


def test_ptx_without_demonstrations_is_refused() -> None:
    data = {"prompts": FILES, "preferences": FILES}
    with pytest.raises(ConfigError, match=r"ptxCoefficient needs data\.demonstrations"):
        load(*rl(ppo={"ptxCoefficient": 0.5}), data=data)


def test_aspects_without_rated_rows_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"needs data\.aspects"):
        load({"rewardModel": ASPECTS}, data={"preferences": FILES})


@pytest.mark.parametrize(
    ("stage", "rows", "reason"),
    [
        (
            {"rewardModel": {"objective": "aspects", "aspects": {"tone": 1.0, "humour": 0.5}}},
            {"aspects": [{"completion": ANSWER, "aspects": {"tone": 3}}]},
            r"aspects\.jsonl: no row rates the aspect 'humour' of stage reward-model; the rows rate tone",
        ),
        (
            {"rewardModel": {"margin": True}},
            {"preferences": [{"chosen": ANSWER, "rejected": REFUSAL, "margin": m} for m in (1.0, None)]},
            r"preferences\.jsonl: row 2 has no margin; add it, or set margin: false in stage reward-model",
        ),
        (
            {"rewardModel": {"margin": True}},
            {"preferences": [{"chosen": ANSWER, "rejected": REFUSAL, "margin": "large"}]},
            r"preferences\.jsonl:1: margin: input should be a valid number, found 'large'",
        ),
        (
            {"rewardModel": {"margin": True}},
            {"preferences": [{"chosen": ANSWER, "rejected": REFUSAL, "margin": True}]},
            r"preferences\.jsonl:1: margin: input should be a valid number, found True",
        ),
        (
            {"kto": {}},
            {"feedback": [{"completion": ANSWER, "label": True}] * 2},
            r"feedback\.jsonl: every label is True; stage kto learns from both thumbs",
        ),
        (
            {"ilql": {"learnFrom": ["returns"]}},
            {"returns": [{"completion": ANSWER, "reward": 0.5}] * 2},
            r"returns\.jsonl: every return is 0\.5; ILQL learns from what was worth more",
        ),
    ],
)
def test_rows_that_a_later_stage_cannot_use_are_found_first(
    stage: dict[str, Any], rows: dict[str, list[dict[str, Any]]], reason: str, tmp_path: Path
) -> None:
    """Before anything is loaded and before the SFT stage spends an hour."""
    question = [{"role": "user", "content": "so?"}]
    rows = {"demonstrations": [{"messages": question + ANSWER}], **rows}
    for kind, items in rows.items():
        lines = [json.dumps(item if "messages" in item else {"prompt": question, **item}) for item in items]
        (tmp_path / f"{kind}.jsonl").write_text("\n".join(lines) + "\n")
    run = load({"sft": {}}, stage, data={kind: {"train": f"{kind}.jsonl"} for kind in rows})
    with pytest.raises(DataError, match=reason):
        check_rows_fit_stages(run, tmp_path)


@pytest.mark.parametrize("stage", ["sft", "rewardModel", "dpo", "kto", "rl"])
def test_four_bits_on_a_cpu_are_refused(stage: str) -> None:
    options: dict[str, Any] = {"lora": {"quantize": "nf4"}}
    stages = rl(**options) if stage == "rl" else [{stage: options}]
    with pytest.raises(ConfigError, match=r"lora\.quantize needs a CUDA device"):
        load(
            *stages,
            data=dict.fromkeys(("demonstrations", "preferences", "prompts", "feedback"), FILES),
            model={"device": "cpu"},
        )


def test_what_is_resolved_loads_again() -> None:
    """A resolved manifest names every field, also those that only another algorithm reads."""
    import yaml

    from steersman.config.base import dump_yaml

    run = load(*rl(algorithm="rloo"))
    assert load_model(AlignmentRun, yaml.safe_load(dump_yaml(run)), "manifest.yaml") == run
