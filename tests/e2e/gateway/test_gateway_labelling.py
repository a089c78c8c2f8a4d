"""The labelling pages in a real Chromium: by keyboard, on a phone, and the whole way to a reward model."""

from __future__ import annotations

import asyncio
import glob
import itertools
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from gateway_browser import PHONE, accessible, browsing, fits, new_page, shoot
from typer.testing import CliRunner

from services.gateway.auth.keys import create_key
from services.gateway.store import open_store
from steersman.cli.data import app
from steersman.store.engine import Store
from steersman.store.judging import NewItem, add_items, create_project
from steersman.store.models import Item, Judgement
from steersman.testing.models import save_model_folder, tiny_llama

pytestmark = pytest.mark.browser


def _project(store: Store, kind: str, n: int = 3, **settings: Any) -> int:
    with store.transaction() as session:
        project = create_project(
            session, f"{kind} answers", kind, guidelines="Be **fair**.\n\n- polite\n- true", **settings
        )
        count = {"compare": 2, "rank": 3}.get(kind, 1)
        items = [
            NewItem(
                key=str(i),
                prompt=[{"role": "user", "content": f"question {i} <script>alert(1)</script>"}],
                candidates=[{"messages": [{"role": "assistant", "content": f"answer {i}-{c}"}]} for c in range(count)],
            )
            for i in range(n)
        ]
        add_items(session, project, items)
        return project.id


async def _log_in(page: Any, url: str, project: int) -> None:
    await page.goto(f"{url}/label/{project}")
    await page.goto(f"{url}/login?next=/label/{project}")
    await page.fill("#name", "Lena")
    await page.keyboard.press("Enter")
    await page.wait_for_selector("#task")


def _verdicts(store: Store) -> list[Judgement]:
    with store.reading() as session:
        return list(session.scalars(sa.select(Judgement).where(Judgement.undone_at.is_(None)).order_by(Judgement.id)))


async def test_comparing_by_keyboard_with_skip_flag_and_undo() -> None:
    async with browsing() as (page, gateway, _, url):
        project = _project(gateway.store, "compare")
        await _log_in(page, url, project)
        assert "<script>alert(1)</script>" in await page.inner_text(".conversation")
        assert await page.inner_text("aside strong") == "fair"
        await accessible(page)
        await shoot(page, "compare")
        await page.emulate_media(color_scheme="dark")
        await accessible(page)
        await shoot(page, "compare-dark")
        await page.set_viewport_size(PHONE)
        assert await fits(page)
        await accessible(page)
        await shoot(page, "compare-phone-dark")
        await page.emulate_media(color_scheme="light")
        await shoot(page, "compare-phone")
        shown = [await page.inner_text(f".answer:nth-child({n}) .text") for n in (1, 2)]
        await page.keyboard.press("2")
        await page.locator("#progress", has_text="1 done").wait_for()
        (verdict,) = _verdicts(gateway.store)
        best = verdict.verdict["ranking"][0][0]
        assert shown[0].endswith(f"-{best}")
        assert verdict.verdict["strength"] == 2
        await page.keyboard.press("u")
        await page.locator("#progress", has_text="0 done").wait_for()
        assert _verdicts(gateway.store) == []
        for key, done in (("4", "1 done"), ("s", "2 done")):
            await page.keyboard.press(key)
            await page.locator("#progress", has_text=done).wait_for()
        await page.keyboard.press("f")
        assert await page.is_checked("[name=unsafe]")
        await page.keyboard.press("7")
        await page.wait_for_selector("text=Nothing is left for you")
        tie, skipped, unsafe = (judgement.verdict for judgement in _verdicts(gateway.store))
        assert len(tie["ranking"]) == 1
        assert skipped["skip"]
        assert unsafe["unsafe"]


async def test_ranking_rating_and_editing() -> None:
    async with browsing() as (page, gateway, _, url):
        rank = _project(gateway.store, "rank", 1)
        await _log_in(page, url, rank)
        for place in ("2", "9", "1", "2"):  # there is no ninth place
            await page.keyboard.press(place)
        await accessible(page)
        await shoot(page, "rank")
        await page.keyboard.press("Control+Enter")
        await page.wait_for_selector("text=Nothing is left for you")

        rate = _project(gateway.store, "rate", 1, aspects=["helpful", "polite"])
        await page.goto(f"{url}/label/{rate}")
        await page.keyboard.press("5")
        await page.keyboard.press("3")
        await accessible(page)
        await shoot(page, "rate")
        await page.keyboard.press("Enter")
        await page.wait_for_selector("text=Nothing is left for you")

        edit = _project(gateway.store, "edit", 1)
        await page.goto(f"{url}/label/{edit}")
        await page.fill("#edit", "A better\nanswer")
        await page.set_viewport_size(PHONE)
        assert await fits(page)
        await accessible(page)
        await shoot(page, "edit-phone")
        await page.click("text=Save")
        await page.wait_for_selector("text=Nothing is left for you")
        ranked, rated, edited = (judgement.verdict for judgement in _verdicts(gateway.store))
        assert [len(group) for group in ranked["ranking"]] == [1, 2]
        assert rated["ratings"] == {"helpful": 5, "polite": 3}
        assert edited["edit"] == "A better\nanswer"


async def test_every_choice_can_be_reached_and_seen_with_tab_alone() -> None:
    async with browsing() as (page, gateway, _, url):
        project = _project(gateway.store, "compare", 1)
        await _log_in(page, url, project)
        focused = "document.activeElement"
        reached = []
        await page.keyboard.press("Tab")
        while not await page.evaluate(f"{focused} === document.body"):
            reached.append(await page.evaluate(f"{focused}.innerText || {focused}.name"))
            assert await page.evaluate(f"getComputedStyle({focused}).outlineStyle") != "none", reached[-1]
            await page.keyboard.press("Tab")
        labels = [text.split("\n")[0] for text in reached]
        choices = [name for name in labels if "better" in name or "good" in name]
        assert len(choices) == 7, reached
        for wanted in ("Projects", "unsafe", "Note", "Skip s", "Undo the last u"):
            assert wanted in labels, reached
        await page.locator("text=Equally good").focus()
        await page.keyboard.press("Enter")
        await page.wait_for_selector("text=Nothing is left for you")
        assert len(_verdicts(gateway.store)[0].verdict["ranking"]) == 1


async def test_a_double_click_judges_once_and_the_pages_work_without_a_script() -> None:
    async with browsing() as (page, gateway, _, url):
        project = _project(gateway.store, "compare")
        await _log_in(page, url, project)
        await page.dblclick("text=A is far better")
        await page.locator("#progress", has_text="1 done").wait_for()
        assert len(_verdicts(gateway.store)) == 1
        other = await new_page(page, java_script_enabled=False)
        await _log_in(other, url, project)
        await other.click("text=B is slightly better")
        await other.locator("#progress", has_text="2 done").wait_for()
        assert len(_verdicts(gateway.store)) == 2


async def test_agreement_is_for_operators(tmp_path: Path) -> None:
    database = f"sqlite:///{tmp_path}/g.db"
    store = open_store(database)
    keys = {scope: create_key(store, "acme", [scope, "label"], note=scope) for scope in ("chat", "operate")}
    async with browsing(database=database, requireApiKey=True) as (page, gateway, _, url):
        project = _project(gateway.store, "compare")
        for scope, seen, status in (("chat", 0, 403), ("operate", 1, 200)):
            await page.goto(f"{url}/login?next=/label")
            await page.fill("#key", keys[scope])
            await page.keyboard.press("Enter")
            await page.wait_for_selector("text=compare answers")
            assert await page.locator("text=Agreement").count() == seen
            answer = await page.request.get(f"{url}/label/{project}/agreement")
            assert answer.status == status
            again = await page.request.post(f"{url}/label/{project}/reopen", form={}, max_redirects=0)
            assert again.status == (403 if status == 403 else 303)
        assert (await page.request.get(f"{url}/label/99999999999/agreement")).status == 404


LOOKED_UP = [
    {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"id": "1", "type": "function", "function": {"name": "orders", "arguments": '{"id": 5}'}}],
    },
    {"role": "tool", "tool_call_id": "1", "content": '{"state": "sent"}'},
    {"role": "assistant", "content": "It is on its way."},
]


def _looked_up(store: Store, overlap: int = 2) -> int:
    """Two answers that say the same; one of them was looked up."""
    with store.transaction() as session:
        guidelines = "Look at **what was done**.\n\n| said | done |\n|---|---|\n| right | looked up |"
        project = create_project(session, "shop answers", "compare", guidelines=guidelines, overlap=overlap)
        said = {"messages": [{"role": "assistant", "content": "It is on its way."}]}
        question = [{"role": "user", "content": "Where is order 5?"}]
        add_items(session, project, [NewItem("five", question, [said, {"messages": LOOKED_UP}])])
        return project.id


async def test_tool_calls_are_seen_and_a_dispute_is_decided() -> None:
    async with browsing() as (page, gateway, _, url):
        project = _looked_up(gateway.store)
        for name, key in (("Lena", "1"), ("Max", "7")):
            await page.goto(f"{url}/login?next=/label/shop%20answers")
            await page.fill("#name", name)
            await page.keyboard.press("Enter")
            await page.wait_for_selector("#task")
            answers = await page.inner_text(".answers")
            for seen in ("calls orders", '"id": 5', "result of orders", '"state": "sent"'):
                assert seen in answers
            assert await page.locator("aside table").count() == 1
            # The answer that looked it up is A for the one and may be B for the other: choose by what is shown.
            first_did = "calls orders" in await page.inner_text(".answer:nth-child(1)")
            await page.keyboard.press("1" if first_did == (key == "1") else "7")
            await page.wait_for_selector("text=Nothing is left for you")
        await accessible(page)
        await page.goto(f"{url}/label/shop%20answers/me")
        assert await page.inner_text("#judged") == "1"
        await accessible(page)
        await shoot(page, "own")
        await page.goto(f"{url}/label/shop%20answers/agreement")
        assert "No threshold is set" in await page.inner_text("section[aria-label=Missing]")
        await page.fill("#hourly", "36")
        await page.keyboard.press("Enter")
        await page.wait_for_selector("#cost")
        await accessible(page)
        await shoot(page, "agreement-missing")
        await page.click("text=five")
        await page.wait_for_selector("text=What labelers said")
        assert "Max" in await page.inner_text("table")
        await accessible(page)
        await shoot(page, "item")
        await page.set_viewport_size(PHONE)
        assert await fits(page)
        await shoot(page, "item-phone")
        await page.get_by_role("button", name="B is clearly better").click()
        await page.wait_for_selector("text=decided: B > A")
        with gateway.store.reading() as session:
            item = session.scalars(sa.select(Item)).one()
        assert (item.resolution, item.resolved_by) == ({"ranking": [[1], [0]], "strength": 2}, "Max")
        await page.click("text=Take the decision back")
        await page.wait_for_selector("text=whatever the labelers said")
        answer = await page.request.get(f"{url}/label/{project}/judgements.csv")
        assert [line.split(",")[1] for line in (await answer.text()).splitlines()] == ["labeler", "Lena", "Max"]


async def test_settings_items_and_assignment() -> None:
    async with browsing() as (page, gateway, _, url):
        project = _project(gateway.store, "compare", 3)
        await _log_in(page, url, project)
        await page.goto(f"{url}/label/{project}/settings")
        await page.fill("#guidelines", "Be brief.")
        await page.fill("#thresholds", "min_alpha=0.7")
        await page.set_viewport_size(PHONE)
        assert await fits(page)
        await accessible(page)
        await shoot(page, "settings-phone")
        await page.click("text=Save as version 2")
        await page.wait_for_selector("text=Save as version 3")
        form = {"overlap": "3", "honeypot_every": "0", "thresholds": "min_alpha=high"}
        refused = await page.request.post(f"{url}/label/{project}/settings", form=form)
        assert refused.status == 400
        assert "Thresholds: min_alpha" in await refused.text()
        await page.goto(f"{url}/label/{project}/items")
        await page.fill("#q", "answer 1-")
        await page.click("text=Find")
        await page.wait_for_selector("text=Give the first 1 to")
        await page.set_viewport_size({"width": 1280, "height": 800})
        await accessible(page)
        await shoot(page, "items")
        await page.fill("#labeler", "Nele")
        await page.click("text=Assign")
        await page.wait_for_selector("text=1 items given to Nele")
        other = await new_page(page)
        await other.goto(f"{url}/login?next=/label/{project}")
        await other.fill("#name", "Nele")
        await other.keyboard.press("Enter")
        await other.wait_for_selector("text=question 1")
        answer = await page.request.get(f"{url}/label/{project}/items?state=none")
        assert answer.status == 400


async def test_tenants_see_neither_each_others_items_nor_projects(tmp_path: Path) -> None:
    database = f"sqlite:///{tmp_path}/g.db"
    store = open_store(database)
    keys = {tenant: create_key(store, tenant, ["operate", "label"], note="boss") for tenant in ("acme", "bolt")}
    async with browsing(database=database, requireApiKey=True) as (page, gateway, _, url):
        with gateway.store.transaction() as session:
            shared = create_project(session, "shared", "compare")
            answers = [{"messages": [{"role": "assistant", "content": text}]} for text in "ab"]
            for tenant in ("acme", "bolt"):
                question = [{"role": "user", "content": f"secret of {tenant}"}]
                whose = {"end_customer": f"somebody-at-{tenant}"}
                add_items(session, shared, [NewItem(tenant, question, answers, whose, customer=tenant)])
            create_project(session, "only acme", "compare", customer="acme")
        for tenant, other in (("acme", "bolt"), ("bolt", "acme")):
            mine = await new_page(page)
            await mine.goto(f"{url}/login?next=/label")
            await mine.fill("#key", keys[tenant])
            await mine.keyboard.press("Enter")
            await mine.wait_for_selector("text=shared")
            assert await mine.locator("text=only acme").count() == (tenant == "acme")
            for path in ("shared", "shared/items", "shared/agreement"):
                await mine.goto(f"{url}/label/{path}")
                text = await mine.inner_text("main")
                assert f"secret of {other}" not in text, path
                assert f"secret of {tenant}" in text or path.endswith("agreement"), path
            await mine.goto(f"{url}/label/shared/items?whose=somebody-at-{other}")
            assert "secret" not in await mine.inner_text("main"), "the other tenant's customers are nobody here"
            await mine.goto(f"{url}/label/shared/items")
            await mine.click(f"a[title=somebody-at-{tenant}]")
            assert await mine.input_value("#whose") == f"somebody-at-{tenant}"
            assert f"secret of {tenant}" in await mine.inner_text("main")
            with gateway.store.reading() as session:
                theirs = session.scalars(sa.select(Item.id).where(Item.customer == other)).one()
            form = {"overlap": "1", "honeypot_every": "0"}
            assert (await mine.request.post(f"{url}/label/shared/settings", form=form)).status == 403
            for path, status in ((f"shared/items/{theirs}", 404), ("only%20acme", 200 if tenant == "acme" else 404)):
                assert (await mine.request.get(f"{url}/label/{path}")).status == status


# --- the whole way ----------------------------------------------------------------------------------------------

WORDS = ("red", "blue", "green", "tin", "oak", "sun")


def _questions(store: Store) -> int:
    """Twelve questions; one answer says yes, the other no."""
    with store.transaction() as session:
        project = create_project(
            session, "shop", "compare", overlap=3, thresholds={"min_alpha": 0.6, "min_common_items": 3}
        )
        pairs = list(itertools.product(WORDS, WORDS))[:12]
        add_items(
            session,
            project,
            [
                NewItem(
                    key=str(n),
                    prompt=[{"role": "user", "content": f"{one} {two}?"}],
                    candidates=[{"messages": [{"role": "assistant", "content": f"{w} {two}"}]} for w in sides],
                )
                for n, (one, two) in enumerate(pairs)
                for sides in [("no!", "yes") if n % 3 else ("yes", "no!")]
            ],
        )
        return project.id


async def _judge_everything(page: Any, url: str, project: int, name: str, says_yes: Callable[[int], bool]) -> int:
    """One labeler in a browser of their own, by keyboard until nothing is left; returns how many were judged."""
    mine = await new_page(page)
    await mine.goto(f"{url}/login?next=/label/{project}")
    await mine.fill("#name", name)
    await mine.keyboard.press("Enter")
    progress = mine.locator("#progress")
    await progress.wait_for()
    count, done = 0, int(re.findall(r"(\d+) done", await progress.inner_text())[0])
    while True:
        await mine.wait_for_load_state()  # the keys work once the script runs
        if not await mine.locator("#task").count():
            break
        one, two = (await mine.inner_text(".conversation .turn")).split("\n")[-1].rstrip("?").split()
        index = WORDS.index(one) * len(WORDS) + WORDS.index(two)
        first_is_yes = (await mine.inner_text(".answer:nth-child(1) .text")).startswith("yes")
        await mine.keyboard.press("2" if first_is_yes == says_yes(index) else "6")
        count += 1
        await mine.locator("#progress", has_text=f": {done + count} done").wait_for()
    await mine.context.close()
    return count


def _release(database: str, folder: Path) -> str:
    command = ["release", "shop", "--source", "project:shop", "--out", str(folder), "--store", database]
    result = CliRunner().invoke(app, [*command, "--splits", "train=0.6,test=0.4", "--set", "pii.entities="])
    return result.output if result.exception is None else str(result.exception)


def _train_reward_model(tmp_path: Path, release: Path) -> dict[str, Any]:
    """A tiny reward model on the released files; its evaluation on the test split."""
    from stage_context import stage_context

    from steersman.config.manifest import Lora, Optimizer, RewardModelStage
    from training.context import DataFiles
    from training.offline.reward_model import run_reward_model

    base = save_model_folder(tmp_path / "base", tiny_llama())
    data = {"preferences": DataFiles(release / "train.jsonl", heldout=release / "test.jsonl")}
    context = stage_context(tmp_path, base, data)
    sizes = {"max_steps": 40, "batch_size": 8, "micro_batch_size": 8, "max_length": 256}
    spec = RewardModelStage(lora=Lora(rank=4), optimizer=Optimizer(learning_rate=1e-2), **sizes)
    return json.loads(run_reward_model(spec, context)["evaluation"].read_text())


@pytest.mark.timeout(900)
async def test_three_labelers_judge_until_a_release_is_allowed_and_a_reward_model_learns_from_it(
    tmp_path: Path,
) -> None:
    database = f"sqlite:///{tmp_path}/g.db"
    async with browsing(database=database) as (page, gateway, _, url):
        project = _questions(gateway.store)

        async def judge(**labelers: Callable[[int], bool]) -> list[int]:
            work = (_judge_everything(page, url, project, name, says) for name, says in labelers.items())
            return await asyncio.gather(*work)

        minds = {"Ann": lambda n: True, "Ben": lambda n: n % 2 == 0, "Cem": lambda n: n % 4 < 2}
        assert await judge(**minds) == [12, 12, 12]
        await page.goto(f"{url}/label/{project}/agreement")
        assert await page.inner_text("#judgements") == "36"
        blocked = await page.inner_text(".notice li")
        assert re.fullmatch(r"preference: alpha is -?0\.\d{3}, at least 0\.6 is asked", blocked)
        await accessible(page)
        await shoot(page, "agreement")
        await page.set_viewport_size(PHONE)
        assert await fits(page)
        await shoot(page, "agreement-phone")
        refused = await asyncio.to_thread(_release, database, tmp_path / "releases")
        assert "release shop: blocked; shop: " + blocked in refused
        assert not glob.glob(f"{tmp_path}/releases/**/*.jsonl", recursive=True)

        await page.click("text=Ask again about the disputed items")
        await page.wait_for_selector("text=Nothing blocks a release")
        assert await page.inner_text("#judgements") == "9", "the three items that all agreed on stay judged"
        assert await judge(**dict.fromkeys(minds, lambda n: True)) == [9, 9, 9]
        await page.reload()
        assert await page.inner_text("#judgements") == "36"
        assert await page.locator(".notice").count() == 0

        made = await asyncio.to_thread(_release, database, tmp_path / "releases")
        assert "shop v1: made; 12 rows" in made
        with gateway.store.reading() as session:
            assert session.scalar(sa.select(sa.func.count(Judgement.id))) == 63, "what was said first stays on record"
            assert session.scalar(sa.select(sa.func.sum(Item.open_slots))) == 0
    evaluation = await asyncio.to_thread(_train_reward_model, tmp_path, tmp_path / "releases" / "shop" / "v1")
    assert len(evaluation["pairs"]) >= 3
    assert evaluation["accuracy"][0] == 1.0
