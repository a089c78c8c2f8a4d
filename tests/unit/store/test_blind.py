"""A run's answers before people, blind, in one command, and the wins that come back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from typer.testing import CliRunner

from steersman.cli import app
from steersman.nn.reward import REWARD_FILE, RewardSettings
from steersman.report.schema import Evaluation, Message, Sample
from steersman.store import Store
from steersman.store.blind import duels_of
from steersman.store.judging import NewJudgement, ensure_labeler, get_project, record
from steersman.store.models import Item
from steersman.store.verdicts import Verdict
from steersman.testing.models import save_model_folder, tiny_llama, tiny_llama_reward


def make_run(folder: Path) -> Path:
    def samples(words: str) -> tuple[Sample, ...]:
        return tuple(
            Sample(
                prompt_id=f"p{n}#0", prompt=(Message(role="user", content=f"question {n}"),),
                answer="the same" if n == 3 else f"{words} {n}", reward=0.0, length=3, finish_reason="stop",
            )
            for n in range(4)
        )  # fmt: skip

    evaluation = Evaluation(name="shop", seed=1, models={"sft": samples("plain"), "rlhf": samples("kind")})
    (folder / "run" / "evaluate").mkdir(parents=True)
    (folder / "run" / "evaluate" / "evaluation.json").write_text(evaluation.model_dump_json())
    return folder / "run"


def test_a_run_is_judged_blind_and_the_wins_come_back(tmp_path: Path) -> None:
    run, url = make_run(tmp_path), f"sqlite:///{tmp_path / 'store.db'}"
    cli = CliRunner()

    def steersman(*arguments: str) -> str:
        done = cli.invoke(app, ["data", *arguments, "--store", url])
        assert done.exit_code == 0, done.output
        return done.output

    assert "3 pairs added to shop" in steersman("compare-run", str(run)), "equal answers are nothing to compare"
    assert "3 are there already" in steersman("compare-run", str(run))
    with Store.open(url).transaction() as session:
        project = get_project(session, "shop")
        people = [ensure_labeler(session, name) for name in ("ann", "ben")]
        items = list(session.scalars(sa.select(Item).order_by(Item.id)))
        assert [[candidate["model"] for candidate in item.candidates] for item in items] == [["sft", "rlhf"]] * 3
        # Ann prefers the aligned model everywhere; Ben once, finds a tie, and skips.
        better, tie, skip = Verdict(ranking=((1,), (0,))), Verdict(ranking=((0, 1),)), Verdict(skip=True)
        for labeler, verdicts in zip(people, ([better] * 3, [better, tie, skip]), strict=True):
            for item, verdict in zip(items, verdicts, strict=True):
                record(session, project, NewJudgement(item.id, labeler.id, verdict, 1.0))
    found = json.loads(steersman("wins", "shop", "--json"))
    assert found["judgements"] == 5
    # Of three prompts the aligned model has 1, (1 + 0.5) / 2 and 1.
    assert found["win_rates"]["rlhf"]["sft"][0] == pytest.approx(2.75 / 3, abs=1e-4)
    assert found["strengths"]["rlhf"][0] > 0
    with Store.open(url).reading() as session:
        assert {duel.prompt for duel in duels_of(session, get_project(session, "shop"))} == {"p0", "p1", "p2"}
    _a_reward_model_is_held_against_them(tmp_path, url)


def _a_reward_model_is_held_against_them(tmp_path: Path, url: str) -> None:
    model = save_model_folder(tmp_path / "reward", tiny_llama_reward())
    (model / REWARD_FILE).write_text(RewardSettings(max_length=256).model_dump_json(by_alias=True))
    sides = {side: [{"role": "assistant", "content": side}] for side in ("chosen", "rejected")}
    pair = {"prompt": [{"role": "user", "content": "q"}], **sides}
    (tmp_path / "pairs.jsonl").write_text(f"{json.dumps(pair)}\n" * 3)
    row = {"id": 1, "subset": "hep-go", "prompt": "p", "chosen": "right", "rejected": "wrong"}
    (tmp_path / "bench.jsonl").write_text(json.dumps(row) + "\n")

    def asked(*options: object) -> Any:
        return CliRunner().invoke(app, ["eval-reward", *map(str, options), "--store", url, "--json"])

    done = asked(model, "--project", "shop", "--pairs", tmp_path / "pairs.jsonl", "--bench", tmp_path / "bench.jsonl")
    assert done.exit_code == 0, done.output
    found = json.loads(done.output)
    assert found["bench"]["bench.jsonl"]["subsets"]["hep-go"]["rows"] == 1
    assert found["pairs"]["accuracy"][0] in (0.0, 0.5, 1.0)
    # Ann has three preferences and Ben one, which Ann shares; his tie shares half of one of hers.
    people = found["labelers"]["labelers"]
    assert {name: one["comparisons"] for name, one in people.items()} == {"ann": 3, "ben": 1}
    assert people["ben"]["other_labelers"][0] == 1.0
    assert people["ann"]["other_labelers"][0] == pytest.approx((1 + 0.5) / 2)
    policy = save_model_folder(tmp_path / "policy", tiny_llama())
    assert "a language model (LlamaForCausalLM), which scores nothing" in str(
        asked(policy, "--project", "shop").exception
    )
    assert "there is nothing to ask" in str(asked(model).exception)
