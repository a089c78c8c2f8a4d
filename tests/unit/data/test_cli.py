"""`steersman data` from import to release, as a user runs it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import orjson
import pytest
import sqlalchemy as sa
from typer.testing import CliRunner

from steersman.cli.data import app
from steersman.config.manifest import AlignmentRun
from steersman.config.stages import mark_complete
from steersman.errors import ConfigError, FailedPreconditionError, NotFoundError
from steersman.store import Store
from steersman.store.handing import next_task
from steersman.store.judging import NewJudgement, ensure_labeler, get_project, record
from steersman.store.models import Item
from steersman.store.verdicts import Verdict
from steersman.testing.fake_policy import FakePolicy, serve_policy

runner = CliRunner()


def invoke(*arguments: Any) -> str:
    result = runner.invoke(app, [str(argument) for argument in arguments], env={"COLUMNS": "200"})
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.output


@pytest.fixture
def store_url(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path / 'store.db'}"


def pairs(path: Path, number: int = 30) -> Path:
    rows = [
        {
            "prompt": [{"role": "user", "content": f"question {n}"}],
            "chosen": [{"role": "assistant", "content": f"good {n}"}],
            "rejected": [{"role": "assistant", "content": f"bad {n}"}],
            "customer": "acme" if n % 3 == 0 else "bolt",
        }
        for n in range(number)
    ]
    path.write_bytes(b"\n".join(map(orjson.dumps, rows)))
    return path


def judge(store_url: str, project: str, second_opinion: Any) -> None:
    """Two labelers judge everything; the second one's choice is a function of the item's number."""
    store = Store.open(store_url)
    for number, name in enumerate(("ann", "bob")):
        while True:
            with store.transaction() as session:
                found = get_project(session, project)
                labeler = ensure_labeler(session, name)
                task = next_task(session, found, labeler)
                if task is None:
                    break
                index = int(task.item.prompt[-1]["content"].split()[1])
                first = second_opinion(index) if number else index % 2
                verdict = Verdict(ranking=((first,), (1 - first,)))
                record(session, found, NewJudgement(task.item.id, labeler.id, verdict, 2.0))


def test_import_prints_counts_reasons_and_where(tmp_path: Path) -> None:
    source = tmp_path / "a.jsonl"
    good = {"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: a\n\nAssistant: c"}
    source.write_bytes(orjson.dumps(good) + b"\n{\n" + orjson.dumps(good) + b"\n")
    output = invoke("import", "hh", source, "--out", tmp_path / "out", "--customer", "acme")
    assert "3 records read, 1 rows written" in " ".join(output.split())
    assert "1 duplicates removed, 1 left out" in " ".join(output.split())
    assert "a.jsonl:2" in output
    (row,) = [json.loads(line) for path in (tmp_path / "out").glob("t*.jsonl") for line in path.open()]
    assert (row["customer"], row["licence"], row["source"], row["origin"]) == ("acme", "MIT", "hh", "a.jsonl:1")


def test_options_that_are_wrong_are_named(tmp_path: Path, store_url: str) -> None:
    for arguments, reason in (
        (("import", "xyz", "a", "--out", tmp_path / "o"), "format 'xyz': unknown; known are table, steersman, dolly"),
        (("import", "hh", "a", "--out", tmp_path / "o", "--splits", "train"), "expected NAME=VALUE"),
        (("import", "hh", "a", "--out", tmp_path / "o", "--splits", "train=x"), "expected NAME=SHARE"),
        (("import", "table", "a", "--out", tmp_path / "o", "--column", "reply=x"), "'reply' is no part of a row"),
        (("create-project", "p", "compare", "--threshold", "min_alpha=high", "--store", store_url), "min_alpha"),
        (("release", "Big Name", "--source", "x", "--store", store_url), "name"),
        (("release", "d", "--source", "x", "--set", "tie=keep", "--store", store_url), "tie: extra inputs"),
        (("label-studio-config", "pairs"), "'pairs' is no row type"),
    ):
        with pytest.raises(ConfigError, match=reason):
            invoke(*arguments)


def finished_run(tmp_path: Path, train: Path) -> Path:
    """The folder that a run with one reward-model stage leaves, without the weights."""
    folder = tmp_path / "aligned"
    (folder / "reward-model" / "model").mkdir(parents=True)
    stages = [{"rewardModel": {}}, {"evaluate": {}}]
    spec = {"data": {"preferences": {"train": str(train)}, "prompts": {"train": str(train)}}, "stages": stages}
    document = {"apiVersion": "steersman.dev/v1alpha1", "kind": "AlignmentRun", "metadata": {"name": "aligned"}}
    run = AlignmentRun.model_validate(document | {"spec": spec}, by_alias=True, by_name=False)
    mark_complete(run, "reward-model", folder)
    return folder


def test_a_folder_that_is_no_run_is_named(tmp_path: Path, store_url: str) -> None:
    with pytest.raises(NotFoundError, match="holds no complete stage with a model"):
        invoke("trained", tmp_path, "--store", store_url)


def test_from_candidates_to_a_release_and_a_deletion(tmp_path: Path, store_url: str) -> None:
    store = ("--store", store_url)
    invoke("create-project", "shop", "compare", "--overlap", 2, "--threshold", "min_alpha=0.6", *store)
    assert "30 items added" in invoke("add", "shop", pairs(tmp_path / "pairs.jsonl"), *store)
    assert "0 items added" in invoke("add", "shop", tmp_path / "pairs.jsonl", *store)
    judge(store_url, "shop", lambda index: 1 - index % 2 if index % 5 < 2 else index % 2)
    shown = invoke("agreement", "shop", *store)
    assert "blocks a release: preference: alpha is 0.2" in shown
    figures = json.loads(invoke("agreement", "shop", "--json", *store))
    assert figures["questions"][0]["raw"] == pytest.approx(0.6)
    release = ("release", "shop", "--source", "project:shop", "--out", tmp_path / "releases", *store)
    with pytest.raises(FailedPreconditionError, match=r"alpha is 0\.2\d\d, at least 0\.6 is asked"):
        invoke(*release)
    with pytest.raises(FailedPreconditionError, match=r"with a 95% interval from -0\.\d+ .* have the disputed items"):
        invoke(*release, "--threshold", "min_alpha=0.1")
    made = invoke(*release, "--threshold", "min_alpha=-0.5", "--set", "pii.entities=", "--set", "disagreement=drop")
    assert "shop v1: made; 18 rows" in made
    assert "12 x tie" in made
    assert "good" in invoke("releases", *store)
    invoke("trained-elsewhere", "shop", 1, "--run", "run-1", "--model", "reward-model v3", *store)
    run = finished_run(tmp_path, train=tmp_path / "releases" / "shop" / "v1" / "train.jsonl")
    assert "reward-model of aligned was trained on shop v1" in invoke("trained", run, *store)
    invoke("trained", run, *store)
    deleted = invoke("delete-customer", "acme", "--yes", *store)
    assert deleted.count("reward-model of aligned (on shop v1)") == 1
    assert "10 items" in deleted
    assert "shop: use v2" in deleted
    assert "trained on deleted data: reward-model v3 of run-1 (on shop v1)" in deleted
    assert "shop" in invoke("projects", *store)


async def test_generated_candidates_become_items(tmp_path: Path, store_url: str) -> None:
    import asyncio

    invoke("create-project", "shop", "compare", "--store", store_url)
    prompts = pairs(tmp_path / "pairs.jsonl", 5)
    async with serve_policy(FakePolicy(name="bot")) as target:
        output = await asyncio.to_thread(
            invoke, "generate", "shop", prompts, "--policy", target, "--n", 2, "--store", store_url
        )
    assert "5 items added to shop; 0 prompts got fewer than 2 different answers" in output
    with Store.open(store_url).reading() as session:
        item = session.scalars(sa.select(Item).order_by(Item.id)).first()
    assert item is not None
    assert [candidate["model"] for candidate in item.candidates] == ["bot", "bot"]
    assert item.candidates[0]["messages"][0]["content"] == "You said: question 0"


def test_export_and_its_configuration(tmp_path: Path) -> None:
    source = pairs(tmp_path / "pairs.jsonl", 4)
    assert "4 rows written" in invoke("export", source, tmp_path / "tasks.json", "--to", "label-studio")
    config = invoke("label-studio-config", "preference")
    for name in ("prompt", "answer_1", "answer_2"):
        assert f'value="${name}"' in config
        assert name in json.loads((tmp_path / "tasks.json").read_bytes())[0]["data"]
    assert '<Rating name="polite"' in invoke("label-studio-config", "aspects", "--aspect", "polite")
    assert "hh" in invoke("formats")


@pytest.mark.parametrize(
    ("shares", "reason"),
    [("train=0.5,train=1", "train is given twice"), ("Train=0.5,train=0.5", "differ in capitals only")],
)
def test_a_split_that_is_named_twice_is_refused(tmp_path: Path, shares: str, reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        invoke("import", "steersman", pairs(tmp_path / "p.jsonl"), "--out", tmp_path / "out", "--splits", shares)


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        (["trl", "--column", "prompt=q"], "trl knows its columns"),
        (["steersman", "--winner", "a=1"], "steersman knows its columns"),
        (["steersman", "--separator", "ab"], "'ab' is no separator"),
        (["steersman", "--separator", '"'], "is no separator"),
    ],
)
def test_an_option_that_would_do_nothing_is_refused(tmp_path: Path, given: list[str], reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        invoke("import", *given, pairs(tmp_path / "p.jsonl"), "--out", tmp_path / "out")


def test_a_tab_may_be_written_as_one(tmp_path: Path) -> None:
    table = tmp_path / "t.csv"
    table.write_text("q\ta,b\nWhy?\tSo, and so.\n")
    columns = ["--column", "prompt=q", "--column", "answer=a,b", "--separator", r"\t", "--splits", "train=1"]
    invoke("import", "table", table, "--out", tmp_path / "out", *columns)
    assert "So, and so." in (tmp_path / "out" / "train.jsonl").read_text()
