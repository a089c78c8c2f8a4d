"""What is trained and what is not, token by token."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import GenerationConfig

from steersman.errors import ConfigError, DataError
from steersman.nn.tokens import (
    answer_ids,
    distinct_pad_token,
    label_conversation,
    prompt_ids,
    stop_ids,
    tokenizer_fingerprint,
)
from steersman.testing.models import CHAT_TEMPLATE, tiny_tokenizer

# Reasoning models show the thoughts of the last turn only.
FORGETTING_TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{% if m['role'] == 'assistant' and loop.last %}{{ '(thought)' }}{% endif %}"
    "{{ m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
CHAT = [
    {"role": "system", "content": "s"},
    {"role": "user", "content": "q1"},
    {"role": "assistant", "content": "a1"},
    {"role": "user", "content": "q2"},
    {"role": "assistant", "content": "a2"},
]


def trained_text(tokenizer, example) -> str:
    return tokenizer.decode([label for label in example.labels if label != -100])


def test_labels_are_at_hand_worked_positions():
    tokenizer = tiny_tokenizer()
    (example,) = label_conversation(tokenizer, CHAT, [2])
    # One token for each byte and special token:
    # <s>system\ns<e>\n = 11, <s>user\nq1<e>\n = 10, <s>assistant\n = 11: 'a1<e>' begins at 32. Then \n, 10, 11.
    trained = [position for position, label in enumerate(example.labels) if label != -100]
    assert trained == [32, 33, 34, 57, 58, 59]
    assert [example.token_ids[position] for position in trained] == [label for label in example.labels if label != -100]
    assert tokenizer.convert_ids_to_tokens(example.token_ids[32:36]) == ["a", "1", "<|im_end|>", "Ċ"]
    assert tokenizer.decode(example.token_ids) + "\n" == tokenizer.apply_chat_template(CHAT, tokenize=False)


def test_the_end_token_is_trained_also_where_it_pads():
    (example,) = label_conversation(tiny_tokenizer(pad_is_eos=True), CHAT, [2])
    assert example.labels.count(2) == 2


def test_a_template_that_forgets_gives_an_example_for_each_prompt():
    tokenizer = tiny_tokenizer(chat_template=FORGETTING_TEMPLATE)
    first, second = label_conversation(tokenizer, CHAT, [2])
    assert trained_text(tokenizer, first) == "(thought)a1<|im_end|>"
    assert trained_text(tokenizer, second) == "(thought)a2<|im_end|>"
    assert second.token_ids[: len(prompt_ids(tokenizer, CHAT[:4]))] == prompt_ids(tokenizer, CHAT[:4])
    assert "(thought)a1" not in tokenizer.decode(second.token_ids)


words = st.text(st.characters(codec="utf-8", exclude_categories=["Cs"]), min_size=1, max_size=8)


@settings(deadline=None, max_examples=60)
@given(st.lists(st.tuples(words, words), min_size=1, max_size=4))
def test_exactly_the_answers_are_trained(turns):
    tokenizer = tiny_tokenizer()
    chat = []
    for question, answer in turns:
        chat += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    (example,) = label_conversation(tokenizer, chat, [2])
    assert trained_text(tokenizer, example) == "".join(f"{answer}<|im_end|>" for _, answer in turns)
    assert len(example.labels) == len(example.token_ids)


def test_a_template_without_an_end_is_refused():
    endless = CHAT_TEMPLATE.replace("message['content'] + '<|im_end|>'", "message['content']")
    tokenizer = tiny_tokenizer(chat_template=endless)
    with pytest.raises(ConfigError, match="would never stop"):
        label_conversation(tokenizer, CHAT, [2])


def test_a_template_that_renders_the_prompt_otherwise_is_refused():
    shifty = (
        "{% for m in messages %}{{ m['content'] }}<|im_end|>{% endfor %}{% if add_generation_prompt %}>>{% endif %}"
    )
    tokenizer = tiny_tokenizer(chat_template=shifty)
    with pytest.raises(DataError, match="renders the prompt otherwise"):
        answer_ids(tokenizer, CHAT[:2], CHAT[2], [2])


def test_a_refusing_template_is_quoted():
    picky = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(DataError, match="roles must alternate"):
        prompt_ids(tiny_tokenizer(chat_template=picky), CHAT)


def test_no_template_is_said():
    with pytest.raises(ConfigError, match="has no chat template"):
        prompt_ids(tiny_tokenizer(chat_template=None), CHAT)


def test_stop_ids_join_model_tokenizer_and_template():
    tokenizer = tiny_tokenizer()
    assert stop_ids(tokenizer) == [2]
    assert stop_ids(tokenizer, GenerationConfig(eos_token_id=[0, 2])) == [0, 2]
    tokenizer.eos_token = "<|endoftext|>"  # a base model: documents end otherwise than turns
    assert stop_ids(tokenizer) == [0, 2]


@pytest.mark.parametrize("pad_is_eos", [True, False])
def test_a_pad_token_that_no_conversation_contains(pad_is_eos):
    token = distinct_pad_token(tiny_tokenizer(pad_is_eos=pad_is_eos))
    assert token == ("<|endoftext|>" if pad_is_eos else "<|pad|>")


def test_the_fingerprint_follows_the_token_ids_and_nothing_else():
    print_of = tokenizer_fingerprint
    assert print_of(tiny_tokenizer()) == print_of(tiny_tokenizer(chat_template=None))
    other = tiny_tokenizer()
    other.add_tokens(["<new>"])
    assert print_of(other) != print_of(tiny_tokenizer())
