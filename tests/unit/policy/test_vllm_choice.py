"""An engine with code of its own for an architecture is compared with transformers before it is trusted. What vLLM does
is played here by the transformers engine, which computes what the folder's configuration says.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from services.policy.engine import Engine
from services.policy.engines.transformers_engine import TransformersEngine
from services.policy.engines.vllm_choice import (
    accepted_context,
    after_new_weights,
    random_model,
    rounding,
    vllm_verdict,
)
from services.policy.engines.vllm_start import cache_groups, has_states
from steersman.errors import ConfigError
from steersman.nn.hardware import Precision
from steersman.nn.parity import NATS
from steersman.nn.tiny import tiny_config
from steersman.testing.models import LONGROPE


def serving(
    change: Callable[[dict[str, Any], int | None], None], precision: Precision = "fp32"
) -> Callable[[Path, int | None], Engine]:
    """Engines that compute another configuration than the folder's."""

    def start(folder: Path, context: int | None) -> Engine:
        path = folder / "config.json"
        config = json.loads(path.read_text())
        change(config, context)
        path.write_text(json.dumps(config))
        return TransformersEngine(folder, precision=precision, device="cpu", max_context=context, decoder="generic")

    return start


def as_it_is(config: dict[str, Any], context: int | None) -> None: ...


def test_an_engine_that_computes_the_same_agrees_before_and_after_new_weights() -> None:
    looked: list[float] = []
    config = CONFIG_MAPPING["gemma2"]()

    def afterwards(engine: Engine, longest: int | None) -> None:
        looked.append(float(after_new_weights(engine, random_model(config, 7), longest, 7).max()))

    verdict = vllm_verdict(config, serving(as_it_is), exact=True, afterwards=afterwards)
    assert (verdict.outcome, verdict.limit, verdict.computed) == ("agrees", None, True)
    assert 0 < max(verdict.difference, *looked) < NATS
    heads = random_model(config, 0).config
    assert heads.head_dim == config.head_dim  # kernels know certain widths


@pytest.mark.parametrize(("family", "field", "value"), [
    ("gemma2", "final_logit_softcapping", None),
    ("mistral", "sliding_window", None),
    ("granite", "residual_multiplier", 0.5),
])  # fmt: skip
def test_an_engine_that_leaves_something_out_is_refused(family: str, field: str, value: object) -> None:
    def change(config: dict[str, Any], context: int | None) -> None:
        config[field] = value

    with pytest.raises(ConfigError, match=r"cannot run on the vllm engine: its log-probabilities differ .* by \d"):
        accepted_context(CONFIG_MAPPING[family](), serving(change), exact=True)


@pytest.mark.parametrize("family", ["llama", "granite", "qwen3_moe"])
def test_in_bf16_as_much_is_allowed_as_rounding_moves_the_model_itself(family: str) -> None:
    """Which is a hundred times more where a rounding chooses other experts."""
    config = CONFIG_MAPPING[family]()
    verdict = vllm_verdict(config, serving(as_it_is, "bf16"), exact=False)
    assert (verdict.outcome, verdict.computed) == ("agrees", True)
    assert 0 < verdict.difference < 1.5 * max(rounding(random_model(config, seed), None) for seed in (0, 1))


@pytest.mark.parametrize(("family", "field", "value"), [
    ("gemma2", "final_logit_softcapping", None),
    ("mistral", "sliding_window", None),
    ("qwen3_moe", "norm_topk_prob", True),
])  # fmt: skip
def test_in_bf16_what_is_left_out_is_seen(family: str, field: str, value: object) -> None:
    def change(config: dict[str, Any], context: int | None) -> None:
        config[field] = value

    assert vllm_verdict(CONFIG_MAPPING[family](), serving(change, "bf16"), exact=False).outcome == "refused"


def test_rotations_that_are_chosen_by_the_context_bound_it(caplog) -> None:
    """vLLM takes the long factors for every row of a model whose context is longer than the original."""

    def change(config: dict[str, Any], context: int | None) -> None:
        rotations = config["rope_parameters"]
        if context is None or context > rotations["original_max_position_embeddings"]:
            rotations["short_factor"] = rotations["long_factor"]

    config = CONFIG_MAPPING["phi3"](rope_parameters=LONGROPE, max_position_embeddings=131072)
    with caplog.at_level(logging.WARNING):
        assert accepted_context(config, serving(change), exact=True) == 4096
    assert "the context of Phi3Config ends at 4096 tokens" in caplog.text


def test_new_weights_that_do_not_arrive_are_seen(monkeypatch) -> None:
    monkeypatch.setattr(TransformersEngine, "load_weights", lambda engine, update: 0.0)
    verdict = vllm_verdict(CONFIG_MAPPING["llama"](), serving(as_it_is), exact=True)
    assert verdict.outcome == "refused"
    assert "after new weights differ" in verdict.reason


def test_what_is_no_number_is_no_agreement(monkeypatch) -> None:
    monkeypatch.setattr("services.policy.engines.vllm_choice.differences", lambda *_, **__: np.array([np.nan]))
    assert vllm_verdict(CONFIG_MAPPING["llama"](), serving(as_it_is), exact=True).outcome == "refused"


def test_a_small_model_that_cannot_be_served_says_nothing_about_the_real_one(caplog) -> None:
    def start(folder: Path, context: int | None) -> Engine:
        raise ConfigError("vLLM cannot serve it: heads of 24 are not known")

    with caplog.at_level(logging.WARNING):
        assert accepted_context(CONFIG_MAPPING["qwen2"](), start, exact=True) is None
    assert "is not known: vLLM cannot serve it: heads of 24 are not known" in caplog.text


@pytest.mark.parametrize(("kinds", "groups"), [
    (None, 1),
    (["full_attention"] * 4, 1),
    (["sliding_attention", "full_attention"] * 9, 2),
    ((["sliding_attention"] * 5 + ["full_attention"]) * 4 + ["sliding_attention"] * 2, 7),
])  # fmt: skip
def test_layers_of_several_kinds_need_blocks_of_their_own(kinds: list[str] | None, groups: int) -> None:
    """What vLLM counts: Gemma 3 with blocks for one kind could not hold a row of its context."""
    config = CONFIG_MAPPING["llama"]()
    config.layer_types = kinds
    assert cache_groups(config) == groups


@pytest.mark.parametrize(("family", "states"), [
    ("llama", False), ("gemma3_text", False), ("gpt_oss", False), ("deepseek_v3", False), ("lfm2", True),
    ("mamba2", True), ("qwen3_5_text", True), ("jamba", True), ("recurrent_gemma", True), ("falcon_h1", True),
])  # fmt: skip
def test_layers_with_states_are_known(family: str, states: bool) -> None:
    assert has_states(CONFIG_MAPPING[family]()) is states


def test_a_small_model_has_widths_that_kernels_take() -> None:
    config = CONFIG_MAPPING["nemotron_h"]()
    assert tiny_config(config).moe_intermediate_size % 4 == 0  # grouped products want 16 bytes
    whole = tiny_config(config, whole_heads=True)
    assert (whole.hidden_size % 64, whole.head_dim) == (0, config.head_dim)
