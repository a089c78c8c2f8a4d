"""Which architectures train without padding, which in the plain way, which not: by computing."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from numeric import assert_same
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from steersman.config.manifest import Lora
from steersman.errors import ConfigError, InvalidArgumentError
from steersman.nn import parity
from steersman.nn.forward import predicting_states
from steersman.nn.head import OutputHead
from steersman.nn.lora import attach_lora
from steersman.nn.packed import pack
from steersman.nn.parity import (
    ParityVerdict,
    SameConfig,
    causal_verdict,
    choose_forward,
    example_groups,
    score_verdict,
    skip_padding,
)
from steersman.nn.tiny import WINDOW, tiny_config, tiny_model
from steersman.testing.models import LONGROPE


def config_of(family: str, **changes):
    config = CONFIG_MAPPING[family](**changes)
    return config


AGREE = {
    "llama": {},
    "mistral": {"sliding_window": 4096},
    "qwen2": {"use_sliding_window": True, "max_window_layers": 1},
    "qwen3": {},
    "gemma": {},
    "gemma2": {},
    "gemma3_text": {},
    "olmo3": {},
    "phi": {},
    "phi3": {},
    "granite": {"logits_scaling": 8.0},
    "cohere": {},
    "gpt_oss": {},
    "mixtral": {},
    "qwen3_moe": {},
    "deepseek_v3": {},
    "gpt2": {},
}
PLAIN = {
    "lfm2": {"full_attn_idxs": [2, 5, 8], "num_hidden_layers": 9},
    "qwen3_5_text": {},
    "granitemoehybrid": {"layer_types": ["mamba", "attention", "mamba"], "num_hidden_layers": 3, "mamba_n_heads": 128},
    "bloom": {},
    "gptj": {},
    "mpt": {},
    "jamba": {},
    "llama4_text": {},
    "nemotron": {"num_key_value_heads": 8},
    "recurrent_gemma": {},
}


@pytest.mark.parametrize("family", AGREE)
def test_they_train_without_padding(family: str) -> None:
    verdict = causal_verdict(config_of(family, **AGREE[family]))
    assert verdict.outcome == "agrees", verdict.reason
    assert verdict.difference < 1e-4
    assert verdict.limit is None


@pytest.mark.parametrize("family", PLAIN)
def test_they_train_in_the_plain_way(family: str) -> None:
    """Recurrence, convolutions, masks of their own, queries scaled by their place in the batch: a packed row would
    change with its neighbours. RecurrentGemma keeps the state it computed last, and calls the cap of its logits by a
    name of its own.
    """
    verdict = causal_verdict(config_of(family, **PLAIN[family]))
    assert verdict.outcome == "plain"
    assert verdict.reason
    assert verdict.difference < 1e-4


def test_rotations_that_depend_on_the_longest_row_bound_the_rows() -> None:
    config = config_of("phi3", rope_parameters=LONGROPE, max_position_embeddings=131072)
    verdict = causal_verdict(config)
    assert (verdict.outcome, verdict.limit) == ("agrees", 4096)
    model = tiny_model(AutoModelForCausalLM, config)
    model.config.rope_parameters["original_max_position_embeddings"] = 16
    choose_forward(model)
    model.steersman_limit = 16
    predicting_states(model, pack([(np.arange(5, 9), [np.arange(5, 17)])]))
    with pytest.raises(InvalidArgumentError, match="a row has 17 tokens, but beyond 16 Phi3ForCausalLM"):
        predicting_states(model, pack([(np.arange(5, 9), [np.arange(5, 18)])]))


def test_a_bidirectional_model_is_no_policy() -> None:
    verdict = causal_verdict(config_of("roberta"))
    assert verdict.outcome == "refused"
    with pytest.raises(ConfigError, match="RobertaForCausalLM cannot be used: "):
        choose_forward(tiny_model(AutoModelForCausalLM, config_of("roberta")))


@pytest.mark.parametrize(
    "family", ["llama", "gemma3_text", "mistral", "jamba", "roberta", "bert", "modernbert", "deberta-v2"]
)
def test_reward_models(family: str) -> None:
    verdict = score_verdict(config_of(family, **PLAIN.get(family, {})))
    assert verdict.outcome == ("plain" if family == "jamba" else "agrees"), verdict.reason


def test_a_family_without_a_classifier_is_named() -> None:
    verdict = score_verdict(config_of("lfm2"))
    assert verdict.outcome == "refused"
    assert "transformers has no sequence classifier for Lfm2Config" in verdict.reason


def test_where_no_small_model_can_be_built_the_model_itself_is_checked(monkeypatch) -> None:
    model = tiny_model(AutoModelForCausalLM, config_of("llama", num_hidden_layers=7))

    def unbuildable(*_: object) -> None:
        raise ConfigError("no small model")

    monkeypatch.setattr(parity, "tiny_model", unbuildable)
    assert causal_verdict(config_of("llama", num_hidden_layers=9)).outcome == "refused"
    verdict = choose_forward(model)
    assert verdict.outcome == "agrees"
    assert 0 < verdict.difference < 1e-4


@pytest.mark.parametrize("family", ["phi", "gemma2", "cohere", "granite"])
def test_the_head_is_the_models_own(family: str) -> None:
    """Bias, soft cap, scale: what the reference service had dropped."""
    model = tiny_model(AutoModelForCausalLM, config_of(family, **AGREE[family]))
    choose_forward(model)
    groups = example_groups()
    batch = pack(groups)
    with torch.no_grad():
        found, _ = OutputHead(model).token_logprobs(predicting_states(model, batch), batch.targets, temperature=0.7)
    plain = tiny_model(AutoModelForCausalLM, config_of(family, **AGREE[family]))
    expected = []
    for prompt, answers in groups:
        for answer in answers:
            logits = plain(input_ids=torch.from_numpy(np.concatenate([prompt, answer]))[None]).logits[0] / 0.7
            table = logits.detach().log_softmax(-1)
            expected.append(table[np.arange(len(answer)) + len(prompt) - 1, answer])
    assert_same(found, torch.cat(expected), roundings=1024)


@pytest.mark.parametrize("dora", [False, True])
def test_an_adapter_on_the_output_layer_is_trained(dora: bool) -> None:
    base = tiny_model(AutoModelForCausalLM, config_of("qwen3", tie_word_embeddings=False))
    model = attach_lora(base, Lora(rank=4, target_modules=["q_proj", "lm_head"], use_dora=dora))
    with torch.no_grad():
        for name, one in model.named_parameters():
            if "lora_B" in name:
                one.normal_(std=0.1)
    batch = pack(example_groups())
    choose_forward(model)
    head = OutputHead(model)
    found, _ = head.token_logprobs(predicting_states(model, batch), batch.targets)
    found.sum().backward()
    gradients = {name: one.grad for name, one in model.named_parameters() if "lm_head" in name and one.requires_grad}
    assert gradients
    assert all(one is not None and one.abs().max() > 0 for one in gradients.values())
    logits = model.get_base_model().lm_head(predicting_states(model, batch))
    assert_same(found, logits.log_softmax(-1).gather(1, batch.targets[:, None])[:, 0], roundings=1024)


def test_a_mixture_of_experts_keeps_its_balance_loss() -> None:
    plain = tiny_model(AutoModelForCausalLM, config_of("mixtral"))
    model = copy.deepcopy(plain)
    assert skip_padding(model).outcome == "agrees"
    ids = torch.tensor([[5, 6, 7, 8], [5, 6, 9, 0], [5, 0, 0, 0]])
    options = {
        "attention_mask": (ids != 0).long(),
        "labels": ids.masked_fill(ids == 0, -100),
        "output_router_logits": True,
    }
    expected, found = plain(input_ids=ids, **options), model(input_ids=ids, **options)
    assert_same(found.loss, expected.loss)
    assert_same(found.aux_loss, expected.aux_loss)


def test_the_tiny_model_keeps_every_layer_kind_and_goes_past_the_window() -> None:
    config = config_of("gemma3_text", num_hidden_layers=26)
    small = tiny_config(config)
    assert set(small.layer_types) == set(config.layer_types)
    assert small.sliding_window == WINDOW < max(len(a) + len(p) for p, answers in example_groups() for a in answers)
    assert config.num_hidden_layers == 26
    assert tiny_config(config_of("jamba")).num_hidden_layers == 8


def test_the_check_finds_what_a_library_gets_wrong(monkeypatch) -> None:
    """The packed way of a model with a recurrence is wrong by nats; were it trusted, the verdict would say so."""
    verdict = causal_verdict(config_of("mamba"))
    assert verdict.outcome == "plain"
    assert "differ" in verdict.reason or "Error" in verdict.reason
    assert isinstance(verdict, ParityVerdict)
    assert SameConfig(config_of("llama")) == SameConfig(config_of("llama"))
    assert SameConfig(config_of("llama")) != SameConfig(config_of("llama", num_hidden_layers=3))
