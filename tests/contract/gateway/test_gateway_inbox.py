"""Tickets that come in, with the webhooks and the signatures that Zammad and Zendesk document, against a small server
that keeps tickets as they do."""

from __future__ import annotations

import asyncio
import base64
import datetime as dt
import hashlib
import hmac
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import sqlalchemy as sa
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from services.gateway.inbox.systems import Message, text_of_html
from services.gateway.inbox.worker import turns_of
from services.gateway.server import Gateway
from services.gateway.store import Audit, InboxTicket
from services.gateway.testing import gateway_config, running_gateway, serve_app, until
from steersman.errors import ConfigError
from steersman.store.models import Answer, now
from steersman.store.serving import forget
from steersman.testing.fake_policy import FakePolicy, serve_policy

SECRET, TOKEN = "the-secret-of-the-webhook", "token-of-the-agent"
QUESTION = "Where is my parcel?"


class DeskServer:
    """The parts of Zammad's and Zendesk's interfaces that a bot needs; messages as (role, public, text, channel)."""

    def __init__(self) -> None:
        self.messages: list[dict[str, Any]] = []
        self.written: list[dict[str, Any]] = []
        self.asked: list[str] = []
        self.fail: list[int] = []
        """Statuses of the next answers."""
        self.lose_next_write = False
        """The next message is taken, and the answer to it is an error."""
        self.app = Starlette(
            routes=[
                Route("/api/v1/ticket_articles/by_ticket/{ticket}", self.articles),
                Route("/api/v1/ticket_articles", self.add_article, methods=["POST"]),
                Route("/api/v2/tickets/{ticket}/comments.json", self.comments),
                Route("/api/v2/tickets/{ticket}.json", self.add_comment, methods=["PUT"]),
            ]
        )

    def say(self, role: str, text: str, *, public: bool = True, **more: Any) -> int:
        number = 104 + len(self.messages)
        self.messages.append({"id": number, "role": role, "text": text, "public": public, **more})
        return number

    def refused(self, request: Request) -> Response | None:
        self.asked.append(request.url.path)
        if self.fail:
            return JSONResponse({"error": "down"}, self.fail.pop(0))
        agent = base64.b64encode(f"agent@example.com/token:{TOKEN}".encode()).decode()
        if request.headers["authorization"] not in (f"Token token={TOKEN}", f"Basic {agent}"):
            return JSONResponse({"error": "no"}, 401)
        return None

    async def articles(self, request: Request) -> Response:
        found = [
            {
                "id": one["id"],
                "ticket_id": int(request.path_params["ticket"]),
                "sender": "Customer" if one["role"] == "user" else "Agent",
                "type": one.get("type", "web"),
                "from": one.get("from"),
                "internal": not one["public"],
                "body": one["text"],
                "content_type": one.get("content_type", "text/plain"),
            }
            for one in self.messages
        ]
        return self.refused(request) or JSONResponse(found)

    async def add_article(self, request: Request) -> Response:
        if (refusal := self.refused(request)) is not None:
            return refusal
        body = await request.json()
        return self.taken(body, body["body"], not body["internal"], 201)

    async def comments(self, request: Request) -> Response:
        found = [
            {
                "id": one["id"],
                "author_id": 1 if one["role"] == "user" else 2,
                "body": one["text"],
                "plain_body": one["text"],
                "public": one["public"],
            }
            for one in reversed(self.messages)
        ]
        users = [{"id": 1, "role": "end-user"}, {"id": 2, "role": "agent"}]
        return self.refused(request) or JSONResponse({"comments": found, "users": users, "next_page": None})

    async def add_comment(self, request: Request) -> Response:
        if (refusal := self.refused(request)) is not None:
            return refusal
        comment = (await request.json())["ticket"]["comment"]
        return self.taken(comment, comment["body"], comment["public"], 200)

    def taken(self, body: dict[str, Any], text: str, public: bool, status: int) -> Response:
        self.written.append(body)
        self.say("assistant", text, public=public)
        lost, self.lose_next_write = self.lose_next_write, False
        return JSONResponse({}, 503 if lost else status)


class Sender:
    """Sends webhooks as one of the systems does."""

    def __init__(self, kind: str, gateway: Gateway, desk: DeskServer) -> None:
        self.kind, self.gateway, self.desk = kind, gateway, desk

    def hook(self, *, staff: bool = False, public: bool = True) -> dict[str, Any]:
        """As documented, shortened; nulls are among it as in real ones."""
        if self.kind == "zammad":
            article = {
                "id": 104,
                "body": "This is a simple Webhook Test.<div><br></div>",
                "content_type": "text/html",
                "from": "Emily Adams <emily@example.com>",
                "sender": "Agent" if staff else "Customer",
                "internal": not public,
                "ticket_id": 81,
                "type": "phone",
                "in_reply_to": None,
                "attachments": [],
            }
            customer = {"email": "emily@example.com", "id": 8, "erp_number": "C-17", "note": None}
            ticket = {"id": 81, "number": "10081", "title": "Webhook-Test", "state": "open", "customer": customer}
            return {"ticket": ticket, "article": article}
        comment = {
            "author": {"id": "8447388090494", "is_staff": staff, "name": "Author"},
            "body": "Sample ticket comment",
            "id": "8679283744894",
            "is_public": public,
        }
        return {
            "account_id": 22129848,
            "detail": {"id": "81", "external_id": None, "is_public": True, "status": "OPEN", "via": {"channel": "web"}},
            "event": {"comment": comment},
            "id": "c0cd5a2e-0fd6-4ef3-96fd-9a6a6d7d7d7d",
            "subject": "zen:ticket:81",
            "time": "2025-01-08T10:12:07.672717030Z",
            "type": "zen:event-type:ticket.comment_added",
            "zendesk_event_version": "2022-11-06",
        }

    def signed(self, body: bytes, *, secret: str = SECRET, moment: str | None = None) -> dict[str, str]:
        headers = {"content-type": "application/json; charset=utf-8"}
        if self.kind == "zammad":
            signature = hmac.new(secret.encode(), body, hashlib.sha1).hexdigest()
            return headers | {
                "x-hub-signature": f"sha1={signature}",
                "x-zammad-delivery": "2f8a",
                "x-zammad-trigger": "t",
            }
        moment = moment or dt.datetime.now(dt.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        digest = hmac.new(secret.encode(), moment.encode() + body, hashlib.sha256).digest()
        return headers | {
            "x-zendesk-webhook-signature": base64.b64encode(digest).decode(),
            "x-zendesk-webhook-signature-timestamp": moment,
        }

    async def post(self, body: bytes, headers: dict[str, str], name: str | None = None) -> httpx.Response:
        async with httpx.AsyncClient(base_url=self.gateway.url, timeout=30) as client:
            return await client.post(f"/hooks/{name or self.kind}", content=body, headers=headers)

    async def send(self, content: Any = None, **how: Any) -> httpx.Response:
        body = json.dumps(self.hook() if content is None else content).encode()
        return await self.post(body, self.signed(body, **how))

    def ticket(self) -> InboxTicket:
        with self.gateway.store.reading() as session:
            return session.get_one(InboxTicket, (self.kind, 81))

    async def settled(self) -> str:
        """How the ticket ended, when nobody has anything to do with it any more."""

        def done() -> bool:
            row = self.ticket()
            return row.due_at is None and row.held_until is None

        await until(done, 60)
        return self.ticket().outcome


def inboxes(url: str, **changes: Any) -> list[dict[str, Any]]:
    both = {"url": url, "tokenEnv": "TEST_DESK_TOKEN", "secretEnv": "TEST_DESK_SECRET", "tenant": "acme"}
    both |= {"retrySeconds": 0.02, "attempts": 3, **changes}
    return [
        {"name": "zammad", "type": "zammad", **both},
        {"name": "zendesk", "type": "zendesk", "user": "agent@example.com", **both},
    ]


@pytest.fixture(autouse=True)
def secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TEST_DESK_TOKEN", TOKEN)
    monkeypatch.setenv("TEST_DESK_SECRET", SECRET)


@asynccontextmanager
async def sending(
    kind: str, policy: FakePolicy, config: dict[str, Any] | None = None, **changes: Any
) -> AsyncIterator[Sender]:
    desk = DeskServer()
    async with serve_app(desk.app) as url, serve_policy(policy) as endpoint:
        every = {"inboxes": inboxes(url, **changes), **(config or {})}
        async with running_gateway(gateway_config(endpoint, **every)) as gateway:
            yield Sender(kind, gateway, desk)


KINDS = pytest.mark.parametrize("kind", ["zammad", "zendesk"])


@KINDS
async def test_a_customers_message_gets_a_suggestion_that_only_people_read(kind: str, policy: FakePolicy) -> None:
    async with sending(kind, policy, instructions="You help at Acme.") as sender:
        desk = sender.desk
        desk.say("user", "Hello")
        desk.say("assistant", "Good morning, how can I help?")
        desk.say("assistant", "Seems to be a new customer", public=False)
        desk.say("user", QUESTION)
        taken = await sender.send()
        assert (taken.status_code, taken.json()) == (202, {"taken": True, "ticket": 81})
        assert await sender.settled() == "note"
        (written,) = desk.written
        assert written["body"] == f"You said: {QUESTION}"
        assert (
            (written["public"] is False) if kind == "zendesk" else (written["internal"] and written["ticket_id"] == 81)
        )
        # What people noted among themselves is not told to the model; who says what is.
        said = [(message.role, message.content) for message in policy.requests[0].messages]
        greeting = ("assistant", "Good morning, how can I help?")
        assert said == [("system", "You help at Acme."), ("user", "Hello"), greeting, ("user", QUESTION)]
        with sender.gateway.store.reading() as session:
            answer = session.scalars(sa.select(Answer)).one()
            lines = session.scalars(sa.select(Audit).where(Audit.action == "inbox")).all()
        assert (answer.customer, answer.answer) == ("acme", f"You said: {QUESTION}")
        assert [(line.outcome, line.answer_id, line.key_id) for line in lines] == [("note", answer.id, f"inbox:{kind}")]
        metrics = sender.gateway.metrics.render().decode()
        assert f'steersman_gateway_inbox_total{{inbox="{kind}",outcome="note"}} 1.0' in metrics


@KINDS
async def test_the_same_webhook_again_and_again_is_one_answer(kind: str, policy: FakePolicy) -> None:
    async with sending(kind, policy) as sender:
        sender.desk.say("user", QUESTION)
        body = json.dumps(sender.hook()).encode()
        headers = sender.signed(body)
        answers = await asyncio.gather(*(sender.post(body, headers) for _ in range(6)))
        assert {answer.status_code for answer in answers} == {202}
        await sender.settled()
        assert (await sender.post(body, headers)).status_code == 202  # an old one, replayed
        assert await sender.settled() in ("before", "note")
        assert len(sender.desk.written) == 1
        sender.desk.say("assistant", "It comes on Friday.")  # a person, after reading the note
        sender.desk.say("user", "And my invoice?")
        await sender.send()
        assert await sender.settled() == "note"
        assert [one["body"] for one in sender.desk.written] == [f"You said: {QUESTION}", "You said: And my invoice?"]


@KINDS
async def test_the_customer_gets_the_answer_where_that_is_configured(kind: str, policy: FakePolicy) -> None:
    async with sending(kind, policy, reply="public", mostReplies=2) as sender:
        sender.desk.say("user", QUESTION, type="email", **{"from": "Emily Adams <emily@example.com>"})
        await sender.send()
        assert await sender.settled() == "public"
        (written,) = sender.desk.written
        if kind == "zammad":
            assert (written["type"], written["to"], written["internal"]) == (
                "email",
                "Emily Adams <emily@example.com>",
                False,
            )
        else:
            assert written["public"] is True
        # An automatic mail answers, and is answered; that has an end.
        for _ in range(2):
            sender.desk.say("user", "I am out of office")
            await sender.send()
            last = await sender.settled()
        assert (last, len(sender.desk.written)) == ("enough", 2)


async def test_an_answer_that_a_person_should_see_first_is_a_note(policy: FakePolicy, tmp_path: Path) -> None:
    (tmp_path / "orders.json").write_text('{"orders": []}')
    kinds = {"order": {"entity": "orders", "number": "code", "owner": "customer", "fields": {"code": "code"}}}
    tools = {"systems": [{"name": "book", "type": "file", "path": str(tmp_path / "orders.json"), "kinds": kinds}]}
    policy.reply = lambda request: "Your order 391 arrives on Friday."
    async with sending("zammad", policy, {"tools": tools}, reply="public") as sender:
        sender.desk.say("user", "Where is my order 391?")
        await sender.send()
        assert await sender.settled() == "note"
        assert "Friday" not in sender.desk.written[0]["body"]


async def test_records_are_read_for_the_customer_that_the_system_names(policy: FakePolicy, tmp_path: Path) -> None:
    orders = [{"code": "391", "customer": "C-17", "state": "packed"}, {"code": "7", "customer": "C-2", "state": "lost"}]
    (tmp_path / "orders.json").write_text(json.dumps({"orders": orders}))
    fields = {"code": "code", "state": "state"}
    kinds = {"order": {"entity": "orders", "number": "code", "owner": "customer", "fields": fields}}
    tools = {"systems": [{"name": "book", "type": "file", "path": str(tmp_path / "orders.json"), "kinds": kinds}]}
    policy.reply = lambda request: "\n".join(message.content for message in request.messages)
    async with sending("zammad", policy, {"tools": tools}, customerField="ticket.customer.erp_number") as sender:
        sender.desk.say("user", "Where are my orders 391 and 7?")
        await sender.send()
        await sender.settled()
        shown = policy.requests[0].messages[0].content
        assert "packed" in shown
        assert "lost" not in shown
        assert sender.ticket().customer == "C-17"
        with sender.gateway.store.transaction() as session:
            forget(session, "acme", "C-17")
        with sender.gateway.store.reading() as session:
            assert session.scalars(sa.select(InboxTicket)).all() == []
    async with sending("zammad", policy, {"tools": tools}) as sender:
        policy.requests.clear()
        sender.desk.say("user", "Where is my order 391?")
        await sender.send()
        await sender.settled()
        assert not any("packed" in message.content for message in policy.requests[0].messages)


@KINDS
async def test_what_is_not_signed_is_refused(kind: str, policy: FakePolicy) -> None:
    async with sending(kind, policy) as sender:
        body = json.dumps(sender.hook()).encode()
        good = sender.signed(body)
        unsigned = {name: value for name, value in good.items() if "signature" not in name}
        other = json.dumps({**sender.hook(), "more": 1}).encode()
        for content, headers in (
            (body, unsigned),
            (body, sender.signed(body, secret="another-secret-of-others")),
            (other, good),
            (body, {**good, **{name: "é" for name in good if name.endswith("signature")}}),
        ):
            sent = {name: value.encode("latin-1") for name, value in headers.items()}
            refused = await sender.post(content, sent)  # type: ignore[arg-type]
            assert refused.status_code == 401, refused.text
            assert "signature" in refused.json()["error"]["message"]
            assert SECRET not in refused.text
        assert sender.desk.asked == []
        with sender.gateway.store.reading() as session:
            assert session.scalars(sa.select(InboxTicket)).all() == []


@pytest.mark.parametrize("moment", ["2020-01-08T10:12:07Z", "2999-01-08T10:12:07Z", "yesterday", "2025-01-08T10:12:07"])
async def test_an_old_webhook_of_zendesk_is_refused(moment: str, policy: FakePolicy) -> None:
    async with sending("zendesk", policy) as sender:
        refused = await sender.send(moment=moment)
        assert refused.status_code == 401
        assert "send it anew" in refused.text or "must be a time" in refused.text


@KINDS
async def test_news_of_other_things_ask_nobody(kind: str, policy: FakePolicy) -> None:
    async with sending(kind, policy) as sender:
        news = [sender.hook(staff=True), sender.hook(public=False)]
        if kind == "zammad":
            news += [{"ticket": {"id": 81}}, {"ticket": {"id": 81}, "article": None}]
        else:
            news += [{**sender.hook(), "type": "zen:event-type:ticket.status_changed", "event": {"current": "OPEN"}}]
        for content in news:
            ignored = await sender.send(content)
            assert (ignored.status_code, ignored.json()) == (200, {"taken": False})
        sender.desk.say("user", QUESTION)
        sender.desk.say("assistant", "A person was sooner.")
        await sender.send()
        assert await sender.settled() == "people"
        assert (policy.requests, sender.desk.written) == ([], [])


async def test_a_new_ticket_of_zendesk_is_answered(policy: FakePolicy) -> None:
    async with sending("zendesk", policy) as sender:
        sender.desk.say("user", QUESTION)
        await sender.send({**sender.hook(), "type": "zen:event-type:ticket.created", "event": {}})
        assert await sender.settled() == "note"


@KINDS
@pytest.mark.parametrize(
    ("content", "says"),
    [
        ([], "object"),
        ({}, "missing"),
        ({"ticket": {"id": "../../users/1"}, "type": "t", "detail": {"id": "1/2"}}, "id"),
    ],
)
async def test_a_webhook_of_another_shape_names_the_field(
    kind: str, content: Any, says: str, policy: FakePolicy
) -> None:
    async with sending(kind, policy) as sender:
        refused = await sender.send(content)
        assert refused.status_code == 400, refused.text
        assert says in refused.json()["error"]["message"]


async def test_the_door_has_bounds(policy: FakePolicy) -> None:
    async with sending("zammad", policy, {"limits": {"bodyBytes": 20_000}}) as sender:
        body = json.dumps({**sender.hook(), "more": "x" * 30_000}).encode()
        assert (await sender.post(body, sender.signed(body))).status_code == 413
        assert (await sender.post(b"{", sender.signed(b"{"))).status_code == 400
        values = json.dumps({"ticket": {"id": 1}, "more": [[]] * 4000}).encode()
        assert (await sender.post(values, sender.signed(values), "nobody")).status_code == 404


@KINDS
async def test_a_ticket_system_that_is_away_is_tried_again(kind: str, policy: FakePolicy) -> None:
    async with sending(kind, policy) as sender:
        sender.desk.say("user", QUESTION)
        sender.desk.fail = [503]
        sender.desk.lose_next_write = True
        await sender.send()
        # Read: 503. Then written, but the answer to it is lost. Then it is found to be there.
        assert await sender.settled() == "note"
        assert len(sender.desk.written) == 1
        assert len(policy.requests) == 1, "the model is not asked again either"


async def test_a_ticket_that_cannot_be_answered_is_given_up_in_the_open(
    policy: FakePolicy, caplog: pytest.LogCaptureFixture
) -> None:
    async with sending("zammad", policy) as sender:
        sender.desk.say("user", QUESTION)
        sender.desk.fail = [500] * 10
        await sender.send()
        assert await sender.settled() == "failed"
        assert "the ticket system answers 500; it gets no answer" in caplog.text
        assert len(sender.desk.asked) == 3
        sender.desk.fail = []
        await sender.send()  # whoever mended it has the webhook sent again
        assert await sender.settled() == "note"


async def test_redirects_and_metadata_services_are_no_ticket_system(
    policy: FakePolicy, caplog: pytest.LogCaptureFixture
) -> None:
    desk = DeskServer()

    async def away(request: Request) -> Response:
        return Response(status_code=307, headers={"location": "http://169.254.169.254/latest"})

    desk.app.router.routes.insert(0, Route("/api/v1/ticket_articles/by_ticket/{ticket}", away))
    async with serve_app(desk.app) as url, serve_policy(policy) as endpoint:
        settings = inboxes(url)
        settings[1]["url"] = "http://169.254.169.254"
        async with running_gateway(gateway_config(endpoint, inboxes=settings)) as gateway:
            for kind in ("zammad", "zendesk"):
                sender = Sender(kind, gateway, desk)
                await sender.send()
                assert await sender.settled() == "failed"
    assert "the ticket system answers 307" in caplog.text
    assert "169.254.169.254" in caplog.text
    assert "not connected to" in caplog.text


async def test_what_a_killed_gateway_held_is_looked_at_by_the_next(policy: FakePolicy, tmp_path: Path) -> None:
    desk = DeskServer()
    desk.say("user", QUESTION)
    database = f"sqlite:///{tmp_path}/gateway.db"
    async with serve_app(desk.app) as url, serve_policy(policy) as endpoint:
        config = gateway_config(endpoint, inboxes=inboxes(url), database=database)
        async with running_gateway(config) as gateway:
            gateway.inboxes.stop()  # takes, and looks at nothing
            await until(lambda: "inboxes" not in gateway.background.tasks)
            await Sender("zammad", gateway, desk).send()
            with gateway.store.transaction() as session:
                session.execute(sa.update(InboxTicket).values(held_until=now() - dt.timedelta(seconds=1)))
        async with running_gateway(config) as gateway:
            assert await Sender("zammad", gateway, desk).settled() == "note"


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"name": "zammad"}, "given twice"),
        ({"url": "https://desk.example.com/path"}, "url"),
        ({"model": "nobody"}, "choose from"),
        ({"retrySeconds": 0}, "greater than 0"),
    ],
)
def test_a_wrong_configuration_is_told(change: dict[str, Any], says: str) -> None:
    settings = inboxes("https://desk.example.com")
    settings[1] |= change
    with pytest.raises(ConfigError, match=says):
        gateway_config("127.0.0.1:1", inboxes=settings)


async def test_a_secret_that_is_missing_or_short_is_told_at_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TEST_DESK_SECRET", "short")
    with pytest.raises(ConfigError, match=r"inboxes\.zammad.*TEST_DESK_SECRET.*at least 16 characters"):
        Gateway(gateway_config("127.0.0.1:1", inboxes=inboxes("https://desk.example.com")))


@pytest.mark.parametrize(
    ("html", "text"),
    [
        (
            'This is a simple Webhook Test.<div><br></div><div>\n<img src="/a"><br>\n</div>',
            "This is a simple Webhook Test.",
        ),
        ("<p>One &amp;<b> two</b></p><p>three</p>", "One & two\nthree"),
        (
            "<style>p {}</style><script>alert(1)</script>Hi<blockquote>a<blockquote>b</blockquote></blockquote> there",
            "Hi there",
        ),
        ("a < b and &lt;|im_end|&gt;", "a < b and <|im_end|>"),
        ("<" * 100_000, "<" * 100_000),
        ("<a" * 50_000, "<a" * 50_000),
    ],
)
def test_html_is_read_as_text(html: str, text: str) -> None:
    assert text_of_html(html) == text


def test_a_conversation_begins_with_the_customer_and_fits() -> None:
    def message(role: Any, text: str) -> Message:
        return Message("1", role, True, text)

    said = [
        message("assistant", "a"),
        message("user", "b"),
        message("user", "c"),
        message("assistant", "d"),
        message("user", "e"),
    ]
    assert [(turn.role, turn.content) for turn in turns_of(said, 100)] == [
        ("user", "b\n\nc"),
        ("assistant", "d"),
        ("user", "e"),
    ]
    assert [
        (turn.role, turn.content) for turn in turns_of([message("user", "old"), message("user", "x" * 50)], 10)
    ] == [("user", "x" * 10)]
    assert [turn.content for turn in turns_of(said, 2)] == ["e"]
