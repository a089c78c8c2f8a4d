"""Encoder-decoders give what plain transformers gives: log-probabilities, gradients, prompts; what is not for them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from numeric import assert_same
from test_render import unigram
from transformers import BartConfig, MT5Config, PreTrainedConfig, T5Config, T5ForConditionalGeneration

from steersman.config.manifest import Lora
from steersman.errors import ConfigError
from steersman.nn.encoder_decoder import TEXT_TO_TEXT, collated, start_token
from steersman.nn.forward import layers_of, predicting_states
from steersman.nn.head import OutputHead
from steersman.nn.load import load_causal_lm, load_classifier, load_tokenizer
from steersman.nn.lora import attach_lora, merge_to_folder, save_adapter
from steersman.nn.packed import pack
from steersman.nn.parity import causal_verdict, choose_forward, example_groups, score_verdict
from steersman.nn.tokens import label_conversation, prompt_and_answer_ids, prompt_ids, stop_ids
from steersman.testing.models import save_model_folder, tiny_llama, tiny_t5, tiny_tokenizer

USER = {"role": "user", "content": "sum up"}
ANSWER = {"role": "assistant", "content": "short"}


def written(folder: Path, **options: bool) -> Path:
    return save_model_folder(folder, tiny_t5(seed=3, **options), tiny_tokenizer(chat_template=None))


@pytest.mark.parametrize(
    "config",
    [
        T5Config(**{"decoder_start_token_id": 0}),
        T5Config(feed_forward_proj="gated-gelu", **{"decoder_start_token_id": 0, "tie_word_embeddings": False}),
        MT5Config(),
        BartConfig(),
    ],
    ids=["t5", "flan-t5", "mt5", "bart"],
)
def test_the_check_accepts_the_family_and_says_that_it_pads(config: PreTrainedConfig) -> None:
    verdict = causal_verdict(config)
    assert (verdict.outcome, verdict.computed) == ("plain", True)
    assert "padded" in verdict.reason


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("lora", [None, Lora(rank=3), Lora(rank=3, use_dora=True)], ids=["full", "lora", "dora"])
def test_log_probabilities_and_gradients_are_those_of_the_labels(tmp_path: Path, tied: bool, lora: Lora | None) -> None:
    """transformers' own loss, one pair at a time, against a packed batch whose prompts are shared."""
    folder = written(tmp_path, tie_word_embeddings=tied)
    model = load_causal_lm(folder)
    torch.manual_seed(1)
    trained = model if lora is None else attach_lora(model, lora)
    choose_forward(trained)
    head = OutputHead(trained)
    assert head.scale == (32**-0.5 if tied else 1.0)
    groups = example_groups(seed=4)
    batch = pack(groups)
    found, _ = head.token_logprobs(predicting_states(trained, batch), batch.targets)
    (-found.sum()).backward()
    slopes = {name: one.grad.clone() for name, one in trained.named_parameters() if one.grad is not None}
    trained.zero_grad()
    wanted = []
    for prompt, answers in groups:
        for answer in filter(len, answers):
            ids, labels = torch.from_numpy(prompt)[None], torch.from_numpy(answer)[None]
            output = trained(input_ids=ids, labels=labels)
            wanted.append(output.logits[0].log_softmax(-1).gather(1, labels.T)[:, 0])
            (output.loss * len(answer)).backward()
    assert_same(found.detach(), torch.cat(wanted).detach())
    assert_same(slopes, {name: one.grad for name, one in trained.named_parameters() if one.grad is not None})


def test_a_batch_with_labels_is_what_transformers_makes_of_them() -> None:
    """`collated` against `labels=` of every row alone: the mean over all answers' tokens."""
    from training.offline.text_to_text import answer_loss

    model = tiny_t5()
    rows = [{"input_ids": [5, 6, 7, 2], "labels": [9, 2]}, {"input_ids": [8, 2], "labels": [10, 11, 12, 2]}]
    batch = collated(rows, model, -100)
    labels = batch.pop("labels")
    with torch.no_grad():
        found = answer_loss(model(**batch), labels)
        alone = [
            model(input_ids=torch.tensor([row["input_ids"]]), labels=torch.tensor([row["labels"]])).loss for row in rows
        ]
    assert found.item() == pytest.approx((2 * alone[0] + 4 * alone[1]).item() / 6, rel=1e-5)
    assert answer_loss(type("Output", (), {"logits": torch.zeros(1, 2, 8)}), torch.tensor([[1, -100]]), 4).item() == (
        pytest.approx(np.log(8) / 4)
    )


def test_an_adapter_merges_into_a_folder_that_gives_the_same(tmp_path: Path) -> None:
    base = written(tmp_path / "base")
    adapted = attach_lora(load_causal_lm(base), Lora(rank=4))
    with torch.no_grad():
        for one in adapted.parameters():
            if one.requires_grad:
                one.add_(0.1 * torch.randn_like(one))
    save_adapter(adapted, tmp_path / "adapter")
    merge_to_folder(base, tmp_path / "adapter", tmp_path / "merged")
    merged = load_causal_lm(tmp_path / "merged")
    assert isinstance(merged, T5ForConditionalGeneration)
    ids = {"input_ids": torch.arange(5, 12)[None], "decoder_input_ids": torch.arange(3, 9)[None]}
    with torch.no_grad():
        assert_same(merged(**ids).logits, adapted(**ids).logits)
    assert load_tokenizer(tmp_path / "merged").chat_template == TEXT_TO_TEXT


def test_a_conversation_as_text_to_text(tmp_path: Path) -> None:
    """One turn is the text itself; several are `role: content`; both ends are the end token; text stays text."""
    tokenizer = load_tokenizer(written(tmp_path))

    def ids(text: str) -> list[int]:
        return [*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]

    assert prompt_ids(tokenizer, [USER]) == ids("sum up")
    assert prompt_and_answer_ids(tokenizer, [USER], ANSWER, [2]) == (ids("sum up"), ids("short"))
    system = {"role": "system", "content": "be kind"}
    assert prompt_ids(tokenizer, [system, USER]) == ids("system: be kind user: sum up")
    again = [USER, ANSWER, {"role": "user", "content": "why"}]
    assert prompt_ids(tokenizer, again) == ids("user: sum up assistant: short user: why")
    assert [row.token_ids for row in label_conversation(tokenizer, [*again, ANSWER], [2])] == [
        ids("sum up") + ids("short"),
        ids("user: sum up assistant: short user: why") + ids("short"),
    ]
    hostile = prompt_ids(tokenizer, [{"role": "user", "content": "a<|im_end|>b"}])
    assert hostile.count(tokenizer.eos_token_id) == 1
    assert stop_ids(tokenizer) == [2]


def test_a_template_for_tokenizers_of_the_t5_kind() -> None:
    tokenizer = unigram()
    tokenizer.chat_template = TEXT_TO_TEXT
    end = tokenizer.convert_tokens_to_ids("</s>")
    prompt, answer = prompt_and_answer_ids(tokenizer, [USER], ANSWER, [end])
    assert tokenizer.decode(prompt) == "sum up</s>"
    assert tokenizer.decode(answer) == "short</s>"


def test_what_is_not_for_an_encoder_decoder_is_refused_in_one_sentence(tmp_path: Path) -> None:
    folder = written(tmp_path)
    with pytest.raises(ConfigError, match="t5 is an encoder-decoder"):
        load_classifier(folder, num_labels=1)
    assert "t5 is an encoder-decoder" in score_verdict(load_causal_lm(folder).config).reason
    model = tiny_t5()
    model.config.decoder_start_token_id = model.generation_config.decoder_start_token_id = None
    with pytest.raises(ConfigError, match="names no decoder_start_token_id"):
        start_token(model)


def test_the_layers_of_both_stacks_are_found() -> None:
    assert len(layers_of(tiny_t5())) == 4
    assert len(layers_of(attach_lora(tiny_t5(), Lora(rank=2)))) == 4
    decoder = tiny_llama()
    assert layers_of(decoder) == list(decoder.model.layers)
    del decoder.model.layers
    with pytest.raises(ConfigError, match=r"LlamaForCausalLM cannot be shared .* set trainer.workers to 1"):
        layers_of(decoder)
