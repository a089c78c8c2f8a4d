"""Secrets apart from the database, pseudonyms of people, and deleting one of them."""

from __future__ import annotations

import datetime as dt
from pathlib import Path

import pytest
import sqlalchemy as sa
from sqlalchemy import event
from sqlalchemy.orm import ORMExecuteState
from typer.testing import CliRunner

from steersman.cli import app
from steersman.data.pii import PiiOptions
from steersman.data.rules import ReleaseOptions
from steersman.errors import ConfigError
from steersman.store import Store
from steersman.store.feedback import Event, save_answer, submit
from steersman.store.judging import NewItem, add_items, create_project, withdraw_items
from steersman.store.models import Answer, Item, now
from steersman.store.releases import Subject, delete_customer, get_release, publish
from steersman.store.secret import pseudonym, read_secret
from steersman.store.serving import Audit, Conversation, Idempotency, ProposedAction, Secret

KEY = b"k" * 32


def test_the_secret_lies_in_a_file_of_its_own(tmp_path: Path) -> None:
    opened = Store.open(f"sqlite:///{tmp_path}/g.db")
    secret = read_secret(opened)
    assert read_secret(opened) == secret
    file = tmp_path / "g.db.secret"
    assert file.stat().st_mode & 0o777 == 0o600
    opened.close()
    assert secret.hex().encode() not in (tmp_path / "g.db").read_bytes()
    file.chmod(0o644)
    with pytest.raises(ConfigError, match="chmod 600"):
        read_secret(opened)


def test_a_secret_that_lay_in_the_database_moves_out(tmp_path: Path) -> None:
    opened = Store.open(f"sqlite:///{tmp_path}/g.db")
    with opened.transaction() as session:
        session.add(Secret(name="signing", value="ab" * 32))
    assert read_secret(opened) == bytes.fromhex("ab" * 32)
    with opened.reading() as session:
        assert session.get(Secret, "signing") is None


def test_a_secret_by_configuration(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("S", "x" * 32)
    assert read_secret(store, env="S") == b"x" * 32
    for wrong, words in (("", "S is not set"), ("short", "at least 32")):
        monkeypatch.setenv("S", wrong)
        with pytest.raises(ConfigError, match=words):
            read_secret(store, env="S")
    named = tmp_path / "named"
    assert read_secret(store, file=named) == read_secret(store, file=named)
    named.write_text("short")
    with pytest.raises(ConfigError, match="at least 32"):
        read_secret(store, file=named)
    with pytest.raises(ConfigError, match="cannot be read or made"):
        read_secret(store, file=tmp_path / "no" / "folder")


def test_pseudonyms_say_nothing_and_keep_their_borders() -> None:
    assert pseudonym(KEY, "acme", "ann") == pseudonym(KEY, "acme", "ann")
    assert len({pseudonym(KEY, "a", "bc"), pseudonym(KEY, "ab", "c"), pseudonym(b"o" * 32, "a", "bc")}) == 3
    assert len(pseudonym(KEY, "acme", "\ud800")) == 32


def fill(store: Store, tmp_path: Path, secret: bytes) -> None:
    expires = now() + dt.timedelta(days=1)
    with store.transaction() as session:
        project = create_project(session, "shop", "edit")
        for person in ("ann", "bob"):
            name = pseudonym(secret, "acme", person)
            prompt = [{"role": "user", "content": f"I am {person}"}]
            save_answer(
                session,
                Answer(id=person, customer="acme", end_customer=name, consent=True, prompt=prompt, answer="Hm."),
            )
            submit(session, "acme", Event(person, person, "edit", f"Hello {person}."))
            candidate = [{"messages": [{"role": "assistant", "content": "Hm."}]}]
            add_items(
                session,
                project,
                [NewItem(person, prompt, candidate, meta={"end_customer": name}, customer="acme")],
            )
            mine = {"tenant": "acme", "customer": person, "expires_at": expires}
            session.add(Conversation(id="c", turns=prompt, **mine))
            session.add(Idempotency(scope=person, key="k", request_digest="", result={"text": person}, **mine))
            session.add(
                ProposedAction(
                    id=person, action="hand_over", arguments={}, transcript=prompt, state="done", ticket="1", **mine
                )
            )
            session.add(
                Audit(request_id="r", action="answer", outcome="stop", tenant="acme", key_id="k", customer=person)
            )
    release = ReleaseOptions(
        name="support", sources=("feedback",), pii=PiiOptions(entities=()), splits={"train": 1.0}, consent="given"
    )
    publish(store, release, tmp_path / "releases")


def everything(store: Store) -> str:
    with store.reading() as session:
        found = [
            str(row)
            for name in sa.inspect(store.engine).get_table_names()
            if name not in ("alembic_version", "deletions")
            for row in session.execute(sa.text(f"SELECT * FROM {name}")).all()
        ]
        new = get_release(session, "support")
    return "\n".join(found) + "".join(path.read_text() for path in sorted(Path(new.url).iterdir()))


def test_erasing_one_end_customer_leaves_the_others(store: Store, tmp_path: Path) -> None:
    fill(store, tmp_path, KEY)
    subject = Subject("acme", pseudonym(KEY, "acme", "ann"), "ann")
    report = delete_customer(store, subject)
    assert (report.items, report.answers, report.remembered) == (1, 1, 3)
    assert report.new_versions == {"support": 2}
    assert report.withdrawn == ["support v1"]
    left = everything(store)
    assert "ann" not in left
    assert "bob" in left
    assert not (tmp_path / "releases" / "support" / "v1").exists()
    with store.reading() as session:
        assert session.scalars(sa.select(Item.key)).all() == ["bob"]
        assert session.scalar(sa.select(sa.func.count()).select_from(Audit)) == 2, "the trail's lines stay"
    assert delete_customer(store, subject).withdrawn == []
    assert "bob" not in everything_after_tenant(store)


def everything_after_tenant(store: Store) -> str:
    report = delete_customer(store, "acme")
    assert (report.answers, report.remembered, report.new_versions) == (1, 3, {"support": None})
    with store.reading() as session:
        return str(
            [session.execute(sa.select(table)).all() for table in (Answer.id, Conversation.turns, Audit.customer)]
        )


def test_the_command_line_erases_an_end_customer(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/g.db"
    opened = Store.open(url)
    fill(opened, tmp_path, read_secret(opened))
    arguments = ["data", "delete-customer", "acme", "--end-customer", "ann", "--yes", "--store", url]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert "1 items, 1 answers and 3 kept turns deleted" in result.output
    assert "support: use v2" in result.output
    assert "ann" not in everything(opened)
    opened.close()


def test_a_tenants_items_are_deleted_without_a_look_at_each_other(store: Store) -> None:
    """By default SQLAlchemy compares a deletion with all objects of the session: the square of the items."""
    looks: list[object] = []

    def note(state: ORMExecuteState) -> None:
        if state.is_delete and state.execution_options.get("synchronize_session", "auto") is not False:
            looks.append(state.statement)

    said = [{"role": "user", "content": "Hi"}]
    answers = [{"messages": [{"role": "assistant", "content": text}]} for text in ("Hm.", "Hello.")]
    with store.transaction() as session:
        project = create_project(session, "p", "compare")
        add_items(session, project, [NewItem(str(number), said, answers, customer="acme") for number in range(4)])
        session.flush()
        event.listen(session, "do_orm_execute", note)
        assert withdraw_items(session, "acme") == 4
        assert session.scalar(sa.select(sa.func.count()).select_from(Item)) == 0
    assert not looks
