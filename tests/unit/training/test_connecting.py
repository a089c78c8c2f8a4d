"""What a stage finds out about its services and prompts before anything is spent."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from steersman.errors import ConfigError, DataError, FailedPreconditionError
from steersman.nn.load import load_tokenizer
from steersman.testing.models import tiny_llama, tiny_tokenizer
from training.online.prompts import Limit, load_answers, load_prompts

REWARD = {"verifiable": [{"name": "regex", "options": {"pattern": "a"}}]}
STAGE = {"rl": {"algorithm": "rloo", "steps": 1, "promptsPerStep": 1, "samplesPerPrompt": 2, "reward": REWARD,
                "generation": {"maxNewTokens": 4}}}  # fmt: skip


def prompts(folder: Path, *texts: str) -> Path:
    path = folder / "prompts.jsonl"
    rows = [{"id": str(number), "prompt": [{"role": "user", "content": text}], "facts": {"n": number}}
            for number, text in enumerate(texts)]  # fmt: skip
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_prompts_are_token_ids_with_what_rewards_may_know(tiny_model: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(tiny_model)
    first, second = load_prompts(prompts(tmp_path, "a", "bc"), tokenizer, 100)
    assert len(second.ids) == len(first.ids) + 1
    assert first.ids.dtype == "int32"
    assert json.loads(second.facts_json)["n"] == 1
    assert (first.key, second.key) == ("0", "1")


def test_a_prompt_that_leaves_no_room_names_its_line_and_whose_limit_it_is(tiny_model: Path, tmp_path: Path) -> None:
    tokenizer, path = load_tokenizer(tiny_model), prompts(tmp_path, "a", "b" * 50)
    with pytest.raises(DataError, match=r"prompts.jsonl:2: the prompt has \d+ tokens, the context leaves room for 60"):
        load_prompts(path, tokenizer, 60)
    limit = Limit(50, "reward model r", "or train it longer")
    with pytest.raises(DataError, match="reward model r leaves room for 50; shorten it or train it longer"):
        load_prompts(path, tokenizer, 1000, [limit])


def test_the_last_turn_of_a_demonstration_is_the_answer(tiny_model: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(tiny_model)
    turns = [{"role": role, "content": text} for role, text in
             (("user", "q"), ("assistant", "one"), ("user", "r"), ("assistant", "three"))]  # fmt: skip
    (tmp_path / "d.jsonl").write_text(json.dumps({"messages": turns}) + "\n")
    ((before, answer),) = load_answers(tmp_path / "d.jsonl", tokenizer, [2])
    assert tokenizer.decode(answer[:-1]).strip() == "three"
    assert "one" in tokenizer.decode(before)


def test_services_of_another_vocabulary_or_without_an_address_are_refused(
    cluster: Any, run_manifest: Callable[..., Path], tiny_model: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    tiny_llama(vocab_size=320).save_pretrained(other)
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["something new"])
    tokenizer.save_pretrained(other)
    cluster.start_policy(other)
    cluster.start_reward([{"name": "regex", "kind": "verifiable", "options": {"pattern": "a"}}])
    cluster.start_reference(tiny_model)
    with pytest.raises(FailedPreconditionError, match="has another tokenizer than"):
        run_manifest(cluster, tiny_model, STAGE, prompts=["a"])
    for kind, missing in (("reward", "services.reward.endpoints is empty"), ("weights", "weightsEndpoints needs")):
        endpoints, cluster.endpoints[kind] = cluster.endpoints[kind], []
        with pytest.raises(ConfigError, match=missing):
            run_manifest(cluster, tiny_model, STAGE, prompts=["a"], name=f"without-{kind}")
        cluster.endpoints[kind] = endpoints
