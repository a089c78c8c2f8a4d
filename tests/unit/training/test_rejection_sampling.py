"""Which answers win a round of rejection sampling, on samples worked by hand."""

from __future__ import annotations

import math
from random import Random

import numpy as np

from steersman.v1 import reward_pb2
from training.online.clients import Sample, score_of
from training.online.rollout import Prompt, Scored
from training.rejection_sampling import merge_winners, prompts_of_round, winner_row

PROMPT = Prompt(np.zeros(3, np.int32), [{"role": "user", "content": "so?"}], key="row-1")


def sampled(text: str, reward: float | None, *, ended: bool = True) -> Scored:
    tokens = np.zeros(max(1, len(text)), np.int32)
    sample = Sample(0, 0, tokens, np.zeros(len(tokens), np.float32), ended, (1,))
    return Scored(sample, score_of(reward_pb2.ItemScore(reward=reward)), None, text)


def test_the_highest_reward_wins_among_answers_that_ended() -> None:
    samples = [
        sampled("good", 1.0),
        sampled("better", 2.0),
        sampled("cut short", 3.0, ended=False),
        sampled("", 4.0),
        sampled("no reward", None),
        sampled("no number", math.nan),
        sampled("overflow", math.inf),
        sampled("bad", -1.0),
    ]
    winner = {
        "id": "row-1",
        "messages": [{"role": "user", "content": "so?"}, {"role": "assistant", "content": "better"}],
        "reward": 2.0,
        "prompt_ids": [0, 0, 0],
        "answer_ids": [0] * len("better"),
    }
    for seed in range(5):
        Random(seed).shuffle(samples)
        assert winner_row(PROMPT, samples) == winner


def test_a_prompt_may_have_no_winner() -> None:
    assert winner_row(PROMPT, [sampled("cut short", 3.0, ended=False), sampled("no reward", None)]) is None


def test_an_earlier_winner_stays_until_a_better_one_comes() -> None:
    def rows(**rewards: float) -> list[dict]:
        return [{"id": key, "reward": reward} for key, reward in rewards.items()]

    earlier = {row["id"]: row for row in rows(kept=2.0, beaten=1.0, absent=-3.0)}
    merged = merge_winners(rows(kept=1.5, beaten=1.5, new=0.0), earlier)
    assert merged == rows(kept=2.0, beaten=1.5, absent=-3.0, new=0.0)


def test_every_prompt_is_used_once_before_any_is_used_again() -> None:
    prompts = [Prompt(np.zeros(1, np.int32), [], key=str(number)) for number in range(6)]
    used = [prompt.key for number in range(3) for prompt in prompts_of_round(prompts, 4, number, seed=3)]
    assert sorted(used[:6]) == sorted(used[6:]) == list("012345")
    assert [prompt.key for prompt in prompts_of_round(prompts, 4, 1, seed=3)] == used[4:8]
