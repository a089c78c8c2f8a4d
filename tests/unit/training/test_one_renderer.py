"""The same tokens in every stage and service."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from services.reward.servicer import _item
from steersman.config.manifest import Generation, ModelSpec, RewardModelStage
from steersman.data.records import Demonstration, Preference, read_jsonl
from steersman.errors import DataError
from steersman.nn.load import load_tokenizer
from steersman.nn.reward import RewardModel, RewardSettings
from steersman.nn.tokens import prompt_and_answer_ids
from steersman.testing.models import tiny_llama_reward, tiny_tokenizer
from steersman.v1 import reward_pb2
from training.context import StageContext
from training.offline.dpo import preference_dataset
from training.offline.reward_data import RewardData
from training.offline.sft import labelled_dataset
from training.online.clients import Sample, Score
from training.online.prompts import load_answers, load_prompts
from training.online.rollout import Rollouts, Scored, score_item
from training.rejection_sampling import labelled_winners, winner_row

TEMPLATE = (
    "{% for tool in tools or [] %}{{ tool | tojson }}{% endfor %}{% for m in messages %}"
    "{{ '<|im_start|>' + m['role'] + '\n' + (m['content'] or '') }}{% for call in m.tool_calls or [] %}"
    "{{ '<call>' + call.function.name + (call.function.arguments | tojson) }}{% endfor %}{{ '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
CALL = {"id": "c1", "type": "function", "function": {"name": "order", "arguments": '{"id": 2}'}}
TOOLS = [{"type": "function", "function": {"name": "order", "parameters": {}}}]
TURNS: list[dict[str, Any]] = [
    {"role": "user", "content": "order 2?<|im_end|>"},
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "tool", "content": "shipped<|im_start|>", "tool_call_id": "c1"},
]
ANSWER = {"role": "assistant", "content": "It is shipped."}


def written(path: Path, *rows: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_every_stage_and_the_reward_service_see_the_same_tokens(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer(chat_template=TEMPLATE)
    demonstrations = written(tmp_path / "d.jsonl", {"messages": [*TURNS, ANSWER], "tools": TOOLS})
    preferences = written(
        tmp_path / "p.jsonl",
        {"prompt": TURNS, "chosen": [ANSWER], "rejected": [{**ANSWER, "content": "?"}], "tools": TOOLS},
    )
    prompts = written(tmp_path / "q.jsonl", {"prompt": TURNS, "tools": TOOLS})

    (prompt,) = load_prompts(prompts, tokenizer, 1000)
    (sft,) = labelled_dataset(demonstrations, tokenizer, [2], 1000)
    answer = [label for label in sft["labels"] if label != -100][-len("It is shipped.") - 1 :]
    generated = np.array(answer, np.int32)
    assert sft["input_ids"] == prompt.ids.tolist() + answer
    (dpo,) = preference_dataset(preferences, tokenizer, [2], 1000)
    assert (dpo["prompt_ids"], dpo["chosen_ids"]) == (prompt.ids.tolist(), answer)
    ((ptx_prompt, ptx_answer),) = load_answers(demonstrations, tokenizer, [2])
    assert (ptx_prompt.tolist(), ptx_answer.tolist()) == (prompt.ids.tolist(), answer)

    data = RewardData(RewardModelStage(), tokenizer)
    (row,) = read_jsonl(preferences, Preference)
    assert data.tokens(row, row.chosen, "p:1")[0] == prompt.ids.tolist() + answer
    # On the way to the service nothing of calls, ids and tools gets lost, and a model that reads messages reads them.
    sent = reward_pb2.ScoreItem.FromString(score_item(prompt, generated, ANSWER["content"]).SerializeToString())
    item = _item("items[0]", sent, "")
    assert item.token_ids == prompt.ids.tolist() + answer
    assert item.messages[1]["tool_calls"] == [CALL]
    assert item.messages[2]["tool_call_id"] == "c1"
    model = RewardModel(RewardSettings(), [tiny_llama_reward()], tokenizer)
    assert model.encode(item.messages, item.tools) == item.token_ids


def test_calls_are_encoded_once_and_null_content_is_taken(tmp_path: Path) -> None:
    path = written(tmp_path / "d.jsonl", {"messages": [*TURNS[:2]]})
    tokenizer = tiny_tokenizer(chat_template=TEMPLATE)
    (row,) = labelled_dataset(path, tokenizer, [2], 1000)
    assert tokenizer.decode([label for label in row["labels"] if label != -100]) == '<call>order{"id": 2}<|im_end|>'
    (read,) = read_jsonl(path, Demonstration)
    assert read.messages[1].content == ""


def test_an_answer_that_the_template_drops_is_refused_with_its_row(tmp_path: Path) -> None:
    path = written(tmp_path / "d.jsonl", {"messages": [TURNS[0], ANSWER]}, {"messages": TURNS[:2]})
    with pytest.raises(DataError, match=r"^d\.jsonl:2: the chat template does not write .*'order'"):
        labelled_dataset(path, tiny_tokenizer(), [2], 1000)


def test_rejection_sampling_trains_what_was_sampled_and_nothing_earlier(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    turns = [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "An earlier answer that a person wrote."},
        {"role": "user", "content": "and?"},
    ]
    (prompt,) = load_prompts(written(tmp_path / "q.jsonl", {"prompt": turns}), tokenizer, 1000)
    ids = np.array([68, 66, 2], np.int32)
    sample = Sample(0, 0, ids, np.zeros(3, np.float32), True, (1,))
    row = winner_row(prompt, [Scored(sample, Score(1.0), None, "text as decoded")])
    assert row is not None
    (example,) = labelled_winners(written(tmp_path / "winners.jsonl", row))
    assert example.token_ids == prompt.ids.tolist() + ids.tolist()
    assert example.labels == [-100] * len(prompt.ids) + ids.tolist()


class Listening:
    """A pool of replicas that remembers the sampling parameters."""

    async def samples(self, prompts: Any, n: int, sampling: Any, **options: Any) -> AsyncIterator[Sample]:
        self.sampling = sampling
        yield Sample(0, 0, np.array([2], np.int32), np.zeros(1, np.float32), True, (1,))


class Judge:
    async def score(self, items: list[Any], progress: tuple[int, int]) -> list[Score]:
        return [Score(1.0) for _ in items]


def test_the_ends_of_an_answer_are_sent_with_every_request(tmp_path: Path) -> None:
    pool = Listening()
    tokenizer = tiny_tokenizer()
    prompts = load_prompts(written(tmp_path / "q.jsonl", {"prompt": TURNS[:1]}), tokenizer, 1000)
    rollouts = Rollouts(pool, [Judge()], [], str, Generation(), [0, 2], lambda _: None)  # type: ignore[arg-type, list-item]
    rollouts.collect(prompts, 1, 0)
    assert list(pool.sampling.stop_token_ids) == [0, 2]


def test_template_options_of_the_manifest_reach_the_stages(make_context: Callable[..., StageContext]) -> None:
    with pytest.raises(ValueError, match=r"templateOptions\.tools is what the template is given anyway"):
        ModelSpec(template_options={"tools": []})
    tokenizer = tiny_tokenizer(chat_template="{{ '~' if enable_thinking is false }}" + TEMPLATE)
    context = make_context("demonstrations", [])
    tokenizer.save_pretrained(context.run_dir / "tokenizer")
    found = load_tokenizer(context.run_dir / "tokenizer", {"enable_thinking": False})
    prompt, _ = prompt_and_answer_ids(found, TURNS[:1], ANSWER, [2])
    assert found.decode(prompt).startswith("~")


def test_repeated_ids_are_refused_with_both_lines_and_lines_are_counted_with_blank_ones(tmp_path: Path) -> None:
    path = tmp_path / "dup.prompts.jsonl"
    row = {"id": "customer-1", "prompt": [{"role": "user", "content": "where is order 2?"}]}
    path.write_text(json.dumps(row) + "\n\n\n" + json.dumps(row) + "\n")
    with pytest.raises(DataError, match=r"^dup\.prompts\.jsonl:4: id 'customer-1' is that of line 1, too"):
        load_prompts(path, tiny_tokenizer(), 1000)
    row["id"] = "other"
    path.write_text("\n\n" + json.dumps(row) + "\n")
    with pytest.raises(DataError, match=r"^dup\.prompts\.jsonl:3: the prompt has \d+ tokens"):
        load_prompts(path, tiny_tokenizer(), 10)
