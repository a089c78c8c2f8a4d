"""Rewards of batches: somebody's own function, metrics, a judge; worked by hand or against a second reference."""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from judge_endpoint import Endpoint, judging
from pydantic import ValidationError

from services.reward.config import RewardConfig
from services.reward.engine import Item, RewardEngine
from services.reward.servicer import _items
from steersman.config.base import load_model
from steersman.config.manifest import VerifiableReward
from steersman.errors import ConfigError, InvalidArgumentError
from steersman.rewards import Answered, Failed, Verdict, build_batch_reward, build_reward, custom_reward
from steersman.rewards.metrics import greedy_match
from steersman.testing.models import save_model_folder, tiny_roberta_reward, tiny_tokenizer
from steersman.v1 import reward_pb2
from training.online.rollout import Prompt, score_item

OWN = '''
import asyncio

def short(completions, **kwargs):
    """As TRL's documentation shows one: completions are conversations."""
    return [-float(len(completion[0]["content"])) for completion in completions]

def equals(prompts, completions, completion_ids, answer, bonus=0.0, **kwargs):
    assert len(prompts) == len(completion_ids) == len(completions)
    assert prompts[0][-1]["role"] == "user"
    return [float(c[0]["content"] == a) + bonus if a else None for c, a in zip(completions, answer)]

async def waits(completions, **kwargs):
    return [0.5] * len(completions)

def raises(completions, **kwargs):
    raise KeyError("no such thing")

def too_few(completions, **kwargs):
    return [1.0]

def words(completions, **kwargs):
    return ["good", float("nan"), "1", 1]

def by_tokens(completion_ids, **kwargs):
    """The first example of TRL's documentation: longer completions are worth more."""
    return [float(len(ids)) for ids in completion_ids]

def logs(completions, trainer_state, log_extra=None, log_metric=None, **kwargs):
    """A curriculum that logs, by what TRL 1.16 hands over."""
    lengths = [len(completion[0]["content"]) for completion in completions]
    log_extra("length", lengths)
    log_extra("said", [completion[0]["content"] for completion in completions])
    log_metric("share_done", trainer_state.global_step / trainer_state.max_steps)
    log_metric("broken", float("inf"))
    return [float(length > trainer_state.global_step) for length in lengths]

LOOPS = []

async def keeps_its_loop(completions, **kwargs):
    """As a client with open connections must."""
    LOOPS.append(asyncio.get_running_loop())
    return [float(LOOPS[0] is LOOPS[-1] and not LOOPS[0].is_closed())] * len(completions)

async def raises_late(completions, **kwargs):
    raise ValueError("too late")

def nothing(completions, **kwargs):
    pass

def one_number(completions, **kwargs):
    return 1.0

def few(completions, answer, scale=1.0):
    """Names what it wants and takes no more."""
    return [scale * float(c[0]["content"] == a) for c, a in zip(completions, answer)]

def leaves(completions, **kwargs):
    raise SystemExit(3)

number = 3
'''


@pytest.fixture
def own(tmp_path: Path) -> str:
    (tmp_path / "mine.py").write_text(OWN)
    (tmp_path / "broken.py").write_text("import nothing_of_that_name")
    (tmp_path / "leaving.py").write_text("raise SystemExit(2)")
    return str(tmp_path / "mine.py")


def answered(*answers: str, **columns: list[Any]) -> list[Answered]:
    prompt = [{"role": "user", "content": "How much is two and two?"}]
    return [
        Answered(prompt, answer, {key: values[index] for key, values in columns.items()})
        for index, answer in enumerate(answers)
    ]


def test_a_function_with_trls_signature(own: str) -> None:
    assert custom_reward(f"{own}:short", {})(answered("four", "4")) == [Verdict(-4.0), Verdict(-1.0)]
    got = custom_reward(f"{own}:equals", {"bonus": 0.25})(answered("4", "5", "6", answer=["4", "4", None]))
    assert got == [Verdict(1.25), Verdict(0.25), None]
    assert custom_reward(f"{own}:waits", {})(answered("a")) == [Verdict(0.5)]
    keeps = custom_reward(f"{own}:keeps_its_loop", {})
    assert [keeps(answered("a")) for _ in range(2)] == [[Verdict(1.0)]] * 2


def test_a_value_that_is_no_finite_number_is_a_failure(own: str) -> None:
    *failed, last = custom_reward(f"{own}:words", {})(answered("a", "b", "c", "d"))
    assert [outcome.reason for outcome in failed if isinstance(outcome, Failed)] == [
        f"it returned {value}, which is no finite number" for value in ("'good'", "nan", "'1'")
    ]
    assert last == Verdict(1.0)


def test_what_trl_hands_over_besides_columns(own: str) -> None:
    """The trainer's state and the two ways to log; an option of the same name as a column is the one that counts."""
    items = [replace(item, token_ids=(5, 6), progress=(1, 4)) for item in answered("a", "four")]
    assert custom_reward(f"{own}:by_tokens", {})(items) == [Verdict(2.0), Verdict(2.0)]
    assert custom_reward(f"{own}:logs", {})(items) == [
        Verdict(0.0, {"length": 1.0, "share_done": 0.25}),
        Verdict(1.0, {"length": 4.0, "share_done": 0.25}),
    ]
    options = {"answer": ["4", "4"]}
    assert custom_reward(f"{own}:equals", options)(answered("4", "5", answer=["5", "5"])) == [Verdict(1.0), Verdict(0)]


def test_a_function_without_kwargs_gets_what_it_names(own: str) -> None:
    assert custom_reward(f"{own}:few", {"scale": 2.0})(answered("4", answer=["4"])) == [Verdict(2.0)]
    with pytest.raises(ConfigError, match=r"mine.py:few: options.sacle: the function takes no sacle"):
        custom_reward(f"{own}:few", {"sacle": 2.0})


def test_a_file_is_imported_as_a_script_would_be(tmp_path: Path) -> None:
    """With its neighbours in reach, and with dataclasses whose annotations are texts."""
    (tmp_path / "beside_the_rewards.py").write_text("WORTH = 0.5")
    (tmp_path / "whole.py").write_text(
        "from __future__ import annotations\nfrom dataclasses import dataclass\nfrom beside_the_rewards import WORTH\n"
        "@dataclass\nclass Rule:\n    worth: float\n"
        "def fixed(completions, **kwargs):\n    return [Rule(WORTH).worth for _ in completions]\n"
    )
    assert custom_reward(f"{tmp_path / 'whole.py'}:fixed", {})(answered("a")) == [Verdict(0.5)]


@pytest.mark.parametrize(
    ("reference", "sentence"),
    [
        ("mine.py", "must have the form module:function"),
        ("{folder}/none.py:short", "does not exist; a path starts from the manifest's folder"),
        ("{folder}/mine.py:shorter", "has no function shorter"),
        ("{folder}/mine.py:number", "has no function number"),
        ("{folder}/broken.py:short", "No module named 'nothing_of_that_name'"),
        ("{folder}/leaving.py:short", "it cannot be imported"),
        ("no_such_module:short", "No module named 'no_such_module'"),
    ],
)
def test_a_function_that_is_not_there_is_named(reference: str, sentence: str, own: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=sentence):
        custom_reward(reference.format(folder=tmp_path), {})


def score(scorers: list[dict[str, Any]], answers: list[str], facts: list[dict[str, Any]]) -> Any:
    engine = RewardEngine(load_model(RewardConfig, {"scorers": scorers, "threads": 1}, "test"))
    engine.load()
    asked = {"role": "user", "content": "How much is two and two?"}
    return engine.score(
        [
            Item([asked, {"role": "assistant", "content": answer}], [], "", fact)
            for answer, fact in zip(answers, facts, strict=True)
        ]
    )


def test_the_service_adds_what_has_something_to_say(own: str) -> None:
    scorers = [
        {"name": "right", "kind": "verifiable", "python": f"{own}:equals", "weight": 2.0},
        {"name": "digits", "kind": "verifiable", "type": "regex", "options": {"pattern": r"^\d$"}, "weight": 0.5},
    ]
    both, other = score(scorers, ["4", "5"], [{"answer": "4"}, {"answer": None}])
    assert (both.reward, both.error) == (2.5, "")
    assert (other.reward, other.error) == (0.5, "")
    assert not other.parts[0].HasField("value")
    alone, nothing = score(scorers[:1], ["4", "5"], [{"answer": "4"}, {"answer": None}])
    assert alone.reward == 2.0
    assert not nothing.HasField("reward")
    assert nothing.error == "right: no reward for this answer (None)"


@pytest.mark.parametrize(
    ("function", "sentence"),
    [
        ("raises", "own: KeyError: 'no such thing'"),
        ("raises_late", "own: ValueError: too late"),
        ("too_few", "own: ValueError: it returned 1 rewards for 2 answers"),
        ("nothing", "own: ValueError: it returned None; return a list with one reward for each answer"),
        ("one_number", "own: ValueError: it returned 1.0; return a list"),
        ("leaves", "own: RuntimeError: it called sys.exit(3)"),
    ],
)
def test_a_function_that_fails_gives_no_reward_and_is_named(function: str, sentence: str, own: str) -> None:
    results = score([{"name": "own", "kind": "verifiable", "python": f"{own}:{function}"}], ["4", "5"], [{}, {}])
    assert [result.HasField("reward") for result in results] == [False, False]
    assert results[0].error.startswith(sentence)


def test_the_answers_own_tokens_and_the_step_reach_the_function(own: str) -> None:
    """From the request on, as the trainer sends it: a prompt of three tokens and an answer of two."""
    prompt = Prompt(np.arange(3, dtype=np.int32), [{"role": "user", "content": "How much?"}])
    item = score_item(prompt, np.array([7, 8], dtype=np.int32), "four")
    progress = reward_pb2.TrainingProgress(step=2, steps=8)
    (found,) = _items(reward_pb2.ScoreRequest(items=[item], progress=progress))
    assert (found.answered.token_ids, found.answered.progress) == ([7, 8], (2, 8))
    item.answer_length = 6
    with pytest.raises(InvalidArgumentError, match=r"items\[0\].answer_length is 6, more than its token_ids"):
        _items(reward_pb2.ScoreRequest(items=[item]))
    with pytest.raises(InvalidArgumentError, match="progress is -1 of 0 steps; neither may be below 0"):
        _items(reward_pb2.ScoreRequest(progress=reward_pb2.TrainingProgress(step=-1)))


def test_the_manifest_names_it_after_the_function() -> None:
    assert VerifiableReward(python="mine.py:short").name == "short"
    assert VerifiableReward(name="polite", type="regex", options={"pattern": "please"}).type == "regex"
    with pytest.raises(ValidationError, match="must have the form module:function"):
        VerifiableReward(python="mine.py")
    with pytest.raises(ValidationError, match="give either type or python"):
        VerifiableReward(name="x", type="regex", python="mine.py:short")


# -- metrics --------------------------------------------------------------------------------------


def test_rouge_and_bleu_on_a_reference_and_on_the_prompt() -> None:
    prompt = [{"role": "user", "content": "the cat sat on the mat"}]
    rouge = build_reward("rouge", {"reference": "summary", "variant": "rouge1", "stemmer": False})
    # 2 of the answer's 3 words stand in the reference of 4: F1 = 2 * (2/3) * (2/4) / (2/3 + 2/4).
    value = rouge(prompt, "the cat ran", {"summary": "the cat sat down"}).value
    assert value == pytest.approx(2 * (2 / 3) * (2 / 4) / (2 / 3 + 2 / 4))
    longest = build_reward("rouge", {"reference": "prompt", "part": "recall"})
    assert longest(prompt, "the cat on the mat", {}).value == pytest.approx(5 / 6)
    assert rouge(prompt, "same", {"summary": ["other", "same"]}).value == 1.0
    assert build_reward("bleu", {"reference": "prompt"})(prompt, "the cat sat on the mat", {}).value == pytest.approx(1)
    assert build_reward("chrf", {"reference": "prompt"})(prompt, "the cat sat on the mat", {}).value == pytest.approx(1)
    assert build_reward("chrf", {"reference": "prompt"})(prompt, "xyz", {}).value == 0.0
    with pytest.raises(ValueError, match="no text under 'summary'"):
        rouge(prompt, "the cat", {})


@pytest.mark.parametrize(
    ("name", "options", "sentence"),
    [
        ("rouge", {"variant": "rouge9"}, "variant is 'rouge9': input should be 'rouge1'"),
        ("rouge", {"part": "f1"}, "part is 'f1'"),
        ("judge", {"url": "http://x/v1"}, "its options do not fit"),
        (
            "judge",
            {"url": "http://x/v1", "model": "m", "rubric": "r", "mode": "x"},
            "mode is 'x': input should be 'points' or 'pairs'",
        ),
        ("judge", {"url": "http://x/v1", "model": "m", "rubric": "r", "api_key_env": "NOT_SET_X"}, "is not set"),
    ],
)
def test_wrong_options_are_named(name: str, options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        build_batch_reward(name, options)


def test_a_classifier_gives_the_probability_of_its_label(tmp_path: Path) -> None:
    model = tiny_roberta_reward(num_labels=3)
    model.config.id2label = {0: "negative", 1: "neutral", 2: "positive"}
    folder = save_model_folder(tmp_path / "classifier", model)
    reward = build_batch_reward("classifier", {"path": str(folder), "label": "neutral"})
    texts = ["fine", "a much longer answer than that"]
    together = reward(answered(*texts))
    tokenizer = tiny_tokenizer()
    for text, outcome in zip(texts, together, strict=True):
        ids = torch.tensor([tokenizer(text)["input_ids"]])
        expected = model.eval()(ids).logits.softmax(-1)[0, 1].item()
        assert isinstance(outcome, Verdict)
        assert outcome.value == pytest.approx(expected, abs=1e-5)
        assert sum(outcome.criteria.values()) == pytest.approx(1.0, abs=1e-5)
    with pytest.raises(ConfigError, match="label is 'happy'; use negative, neutral, positive"):
        build_batch_reward("classifier", {"path": str(folder), "label": "happy"})


def test_bertscore_matches_each_token_with_its_nearest() -> None:
    answer = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    text = torch.tensor([[1.0, 0.0], [0.6, 0.8], [-1.0, 0.0]])
    verdict = greedy_match(answer, text)
    assert verdict.criteria["precision"] == pytest.approx((1.0 + 0.8) / 2)
    assert verdict.criteria["recall"] == pytest.approx((1.0 + 0.8 + 0.0) / 3)
    assert verdict.value == pytest.approx(2 * 0.9 * 0.6 / 1.5)


def test_bertscore_of_a_batch_equals_the_definition_by_itself(tmp_path: Path) -> None:
    folder = save_model_folder(tmp_path / "encoder", tiny_roberta_reward())
    reward = build_batch_reward("bertscore", {"path": str(folder), "reference": "text", "layer": 1})
    items = answered("same", "a longer answer", text=["same", ["quite another", "a longer text"]])
    first, second, without = reward([*items, *answered("a row without a text")])
    together = [outcome.value for outcome in (first, second)]  # type: ignore[union-attr]
    assert without == Failed("the row has no text under 'text' to compare with")
    assert together[0] == pytest.approx(1.0, abs=1e-5)
    from transformers import AutoModel

    model, tokenizer = AutoModel.from_pretrained(folder).eval(), tiny_tokenizer()

    def vectors(text: str) -> np.ndarray:
        found = tokenizer(text, return_special_tokens_mask=True)
        hidden = model(torch.tensor([found["input_ids"]]), output_hidden_states=True).hidden_states[1][0]
        kept = hidden.detach().numpy()[np.array(found["special_tokens_mask"]) == 0]
        return kept / np.linalg.norm(kept, axis=1, keepdims=True)

    def f1(one: str, other: str) -> float:
        similarity = vectors(one) @ vectors(other).T
        precision, recall = similarity.max(1).mean(), similarity.max(0).mean()
        return float(2 * precision * recall / (precision + recall))

    wanted = max(f1("a longer answer", text) for text in ("quite another", "a longer text"))
    assert together[1] == pytest.approx(wanted, abs=1e-4)


# -- a judge --------------------------------------------------------------------------------------


@pytest.fixture
def endpoint() -> Iterator[Endpoint]:
    with judging() as server:
        yield server


def judge(endpoint: Endpoint, **options: Any) -> Any:
    return build_batch_reward("judge", {"url": endpoint.url, "model": "m", "rubric": "Be brief.", **options})


def test_a_judge_gives_points(endpoint: Endpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JUDGE_KEY", "secret")
    outcomes = judge(endpoint, api_key_env="JUDGE_KEY")(answered("1", "1234567890", "12345"))
    assert [outcome.value for outcome in outcomes] == pytest.approx([0.0, 1.0, 4 / 9])
    body = endpoint.asked[0]
    assert body["authorization"] == "Bearer secret"
    assert body["response_format"]["json_schema"]["schema"]["properties"]["score"]["maximum"] == 10
    assert "Be brief." in body["messages"][0]["content"]


def test_pairs_are_judged_in_both_orders_and_a_judge_that_likes_a_place_gives_ties(endpoint: Endpoint) -> None:
    outcomes = judge(endpoint, mode="pairs")(answered("aaa", "bb", "cc"))
    # aaa beats both; bb and cc are equally long, so each order gives another one: a tie.
    assert [outcome.value for outcome in outcomes] == [1.0, 0.25, 0.25]
    assert len(endpoint.asked) == 6
    (alone,) = judge(endpoint, mode="pairs")(answered("a"))
    assert isinstance(alone, Failed)
    assert "no other answer to this prompt" in alone.reason


def test_what_was_asked_before_comes_from_the_disk_and_the_budget_ends_the_rest(
    endpoint: Endpoint, tmp_path: Path
) -> None:
    cache = str(tmp_path / "judge.db")
    first = judge(endpoint, cache=cache)(answered("a", "bb"))
    assert judge(endpoint, cache=cache, calls=1)(answered("a", "bb")) == first
    assert len(endpoint.asked) == 2
    outcomes = judge(endpoint, cache=cache, calls=1, concurrency=1)(answered("a", "ccc", "dddd"))
    assert [isinstance(outcome, Failed) for outcome in outcomes] == [False, False, True]
    assert "budget of 1 calls is used up" in outcomes[2].reason


def test_a_judge_that_does_not_answer_in_the_schema_gives_no_verdict(endpoint: Endpoint, tmp_path: Path) -> None:
    endpoint.broken = True
    cache = str(tmp_path / "judge.db")
    (outcome,) = judge(endpoint, cache=cache)(answered("a"))
    assert outcome == Failed("the judge's answer does not fit the schema")
    endpoint.broken = False
    (again,) = judge(endpoint, cache=cache)(answered("a"))  # a failure is not kept
    assert again == Verdict(0.0)
    endpoint.shutdown()
    endpoint.server_close()
    (outcome,) = judge(endpoint, timeout_seconds=1.0)(answered("a"))
    assert "the judge does not answer" in outcome.reason


def test_a_full_judge_is_asked_again_and_one_that_fails_says_how(endpoint: Endpoint) -> None:
    endpoint.refuses = [429, 429]
    assert judge(endpoint)(answered("1234567890")) == [Verdict(1.0)]
    assert len(endpoint.asked) == 3
    endpoint.refuses = [500]
    (outcome,) = judge(endpoint)(answered("a"))
    assert outcome == Failed("the judge does not answer (status 500)")
    endpoint.refuses = [429] * 9
    (outcome,) = judge(endpoint, calls=2)(answered("a"))
    assert "budget of 2 calls is used up" in outcome.reason


@pytest.mark.parametrize("usage", [None, [], "many", {"total_tokens": "many"}])
def test_a_strange_count_of_tokens_and_a_broken_cache_cost_no_verdict(
    usage: Any, endpoint: Endpoint, tmp_path: Path
) -> None:
    endpoint.usage = usage
    cache = tmp_path / "cache.sqlite"
    reward = judge(endpoint, cache=str(cache))
    with contextlib.closing(sqlite3.connect(cache)) as connection:
        connection.execute("drop table judgements")
    assert reward(answered("1234567890")) == [Verdict(1.0)]
