"""Answers tickets: what a webhook told is on disk before it is acknowledged, and is done once, whoever dies meanwhile.

    webhook -> a row by ticket -> read the ticket -> answer its last message -> write it back -> the row is done

Several gateways share the rows. A ticket that is told of often, or again and again by an old webhook, is one row, and a
message that was answered is not answered again.
"""

from __future__ import annotations

import asyncio
import contextlib
import datetime as dt
import logging
import secrets
from collections.abc import Sequence
from dataclasses import dataclass

import httpx
import sqlalchemy as sa

from services.gateway.answer import Answer, Question
from services.gateway.answering import Assistant
from services.gateway.auth.callers import Caller, Customer
from services.gateway.inbox.systems import Message, TicketInbox, inbox_of
from services.gateway.leases import clock
from services.gateway.recorder import Record, audit_row
from services.gateway.store import InboxTicket, insert_new
from steersman.errors import SteersmanError, UnavailableError
from steersman.net import guarded_client
from steersman.store.engine import Store
from steersman.store.secret import pseudonym
from steersman.v1 import common_pb2
from steersman.v1.policy_pb2 import PolicyServiceChatRequest

log = logging.getLogger("steersman.gateway")

_AT_ONCE = 4
_LOOK_SECONDS = 5.0
_MARGIN_SECONDS = 30.0
_LONGEST_PAUSE = dt.timedelta(hours=1)
_PASSES = (408, 409, 429)
"""Refusals that are gone after a while."""


@dataclass(frozen=True, slots=True)
class Held:
    """A ticket that this gateway looks at now."""

    inbox: str
    ticket: int
    customer: str
    told: int
    attempts: int
    answered: str
    replies: int


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a look ended."""

    name: str
    """note, public: written; people: somebody of the company wrote last; before: the message was answered already;
    enough: `mostReplies` are reached; empty: the model said nothing; failed, retried: the log has the cause."""
    answered: str = ""
    answer_id: str = ""


class Inboxes:
    def __init__(self, assistant: Assistant, store: Store, secret: bytes) -> None:
        """`secret`: what pseudonyms are made with.

        Raises ConfigError when a secret of a ticket system is not set.
        """
        self.systems = {config.name: inbox_of(config) for config in assistant.config.inboxes}
        self._assistant = assistant
        self._store = store
        self._secret = secret
        self._clients = {name: guarded_client(timeout=one.config.seconds) for name, one in self.systems.items()}
        self._wake = asyncio.Event()
        self._free = _AT_ONCE
        self._ending = False
        limits = assistant.config.limits
        self._longest = limits.queue_seconds + 2 * limits.answer_seconds + _MARGIN_SECONDS
        self._pause = min([_LOOK_SECONDS, *(one.config.retry_seconds for one in self.systems.values())])

    def stop(self) -> None:
        """No further ticket is looked at; `run` returns when those that are have ended."""
        self._ending = True
        self._wake.set()

    async def close(self) -> None:
        for client in self._clients.values():
            await client.aclose()

    async def take(self, name: str, ticket: int, customer: str) -> None:
        """Notes that a ticket has something new; returns when that is on disk."""
        await asyncio.to_thread(self._note, name, ticket, customer)
        self.count(name, "taken")
        self._wake.set()

    def count(self, name: str, outcome: str) -> None:
        self._assistant.metrics.inbox.labels(name, outcome).inc()

    async def run(self) -> None:
        """Looks at tickets until `stop`; may be begun again."""
        self._free = _AT_ONCE
        async with asyncio.TaskGroup() as looks:
            while not self._ending:
                self._wake.clear()
                try:
                    for held in await asyncio.to_thread(self._hold, self._free):
                        self._free -= 1
                        looks.create_task(self._look(held))
                except UnavailableError as error:
                    log.warning("tickets cannot be looked at now, trying again: %s", error)
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(self._pause):
                        await self._wake.wait()

    async def _look(self, held: Held) -> None:
        inbox = self.systems[held.inbox]
        caller = self._caller(inbox, held.customer)
        try:
            try:
                outcome = await self._answered(inbox, held, caller)
            except (httpx.HTTPError, ValueError, SteersmanError) as error:
                outcome = self._failed(inbox, held, error)
            self.count(held.inbox, outcome.name)
            if outcome.name in ("note", "public", "failed"):
                records = [{"system": held.inbox, "record": str(held.ticket)}]
                row = audit_row(caller, f"inbox-{held.ticket}", "inbox", outcome.name, outcome.answer_id, records)
                await self._assistant.recorder.put(Record(row))
            await asyncio.to_thread(self._end, held, outcome)
        except asyncio.CancelledError:
            await asyncio.shield(asyncio.to_thread(self._release, held))
            raise
        except UnavailableError as error:  # the row is looked at again when nobody holds it any more
            log.warning("ticket %s of %s: %s", held.ticket, held.inbox, error)
        finally:
            self._free += 1
            self._wake.set()

    async def _answered(self, inbox: TicketInbox, held: Held, caller: Caller) -> Outcome:
        """Answers the last message, where it is a customer's and was not answered."""
        client = self._clients[held.inbox]
        messages = await inbox.read(client, held.ticket)
        shown = [message for message in messages if message.public and message.text]
        if not shown or shown[-1].role != "user":
            return Outcome("people")
        last = shown[-1]
        if last.id == held.answered:
            return Outcome("before")
        if held.replies >= inbox.config.most_replies:
            return Outcome("enough")
        answer = await self._ask(inbox, held, caller, shown)
        text = answer.choices[0].text.strip() if answer.choices else ""
        if not text:
            return Outcome("empty", last.id, answer.id)
        public = inbox.config.reply == "public" and not self._doubtful(answer, text)
        # A gateway that died may have written it, and so may a call that nobody heard the answer of.
        since = messages[messages.index(last) + 1 :]
        if not any(_same(message.text, text) for message in since):
            await inbox.write(client, held.ticket, text, last, public=public)
        return Outcome("public" if public else "note", last.id, answer.id)

    async def _ask(self, inbox: TicketInbox, held: Held, caller: Caller, shown: Sequence[Message]) -> Answer:
        key = f"{held.inbox}:{held.ticket}:{shown[-1].id}"
        turns = turns_of(shown[-inbox.config.turns :], self._assistant.config.limits.message_chars // 2)
        request = PolicyServiceChatRequest(messages=turns, n=1, whole=True)
        request.sampling.seed = secrets.randbits(64)
        question = Question(
            caller,
            f"inbox-{held.ticket}",
            request,
            model=inbox.config.model,
            id_prefix="ticket-",
            instructions=inbox.config.instructions,
            idempotency_key=key,
            fingerprint=key.encode(),
        )
        answer = await self._assistant.answer(question)
        await answer.read()
        return answer

    def _doubtful(self, answer: Answer, text: str) -> bool:
        """A person is to read it first. An answer that is replayed forgot what was held back; its text tells."""
        tools = self._assistant.config.tools
        return bool(answer.proposals or answer.unsourced) or tools.held_text in text or tools.mark_text in text

    def _failed(self, inbox: TicketInbox, held: Held, error: Exception) -> Outcome:
        final = isinstance(error, SteersmanError) and error.http_status < 500 and error.http_status not in _PASSES
        last = final or held.attempts >= inbox.config.attempts
        # Of errors of libraries only the kind: their texts may hold what a customer wrote, or an address with a key.
        said = error if isinstance(error, SteersmanError) else _kind(error)
        log.warning(
            "ticket %s of %s, try %d: %s; %s",
            held.ticket,
            held.inbox,
            held.attempts,
            said,
            "it gets no answer" if last else "trying again later",
        )
        return Outcome("failed" if last else "retried")

    def _caller(self, inbox: TicketInbox, customer: str) -> Caller:
        config = inbox.config
        name = f"inbox:{config.name}"
        known = Customer(customer, name, pseudonym(self._secret, config.tenant, customer)) if customer else None
        return Caller(name, config.tenant, frozenset({"chat"}), name=name, customer=known)

    # --- rows, in a thread

    def _note(self, name: str, ticket: int, customer: str) -> None:
        row = {
            "inbox": name,
            "ticket": ticket,
            "tenant": self.systems[name].config.tenant,
            "customer": customer,
            "told": 1,
            "held_until": None,
            "attempts": 0,
            "answered": "",
            "replies": 0,
            "outcome": "",
        }
        with self._store.transaction() as session:
            row |= {"due_at": clock(session), "changed_at": clock(session)}
            if not insert_new(session, InboxTicket, row):
                again = {name: row[name] for name in ("tenant", "customer", "due_at", "attempts", "changed_at")}
                mine = (InboxTicket.inbox == name, InboxTicket.ticket == ticket)
                session.execute(sa.update(InboxTicket).where(*mine).values(told=InboxTicket.told + 1, **again))

    def _hold(self, most: int) -> list[Held]:
        if most <= 0:
            return []
        held = []
        with self._store.transaction() as session:
            at = clock(session)
            free = sa.or_(InboxTicket.held_until.is_(None), InboxTicket.held_until <= at)
            due = (InboxTicket.due_at <= at, free, InboxTicket.inbox.in_(self.systems))
            oldest = sa.select(InboxTicket).where(*due).order_by(InboxTicket.due_at).limit(most)
            for row in session.scalars(oldest.with_for_update(skip_locked=True)):
                row.held_until = at + dt.timedelta(seconds=self._longest + 3 * self.systems[row.inbox].config.seconds)
                row.attempts += 1
                fields = (row.inbox, row.ticket, row.customer, row.told, row.attempts, row.answered, row.replies)
                held.append(Held(*fields))
        return held

    def _release(self, held: Held) -> None:
        """Whoever comes next may look at it at once."""
        with contextlib.suppress(UnavailableError), self._store.transaction() as session:
            mine = (InboxTicket.inbox == held.inbox, InboxTicket.ticket == held.ticket)
            session.execute(sa.update(InboxTicket).where(*mine).values(held_until=None))

    def _end(self, held: Held, outcome: Outcome) -> None:
        with self._store.transaction() as session:
            row = session.get(InboxTicket, (held.inbox, held.ticket), with_for_update=True)
            if row is None:  # it was erased meanwhile
                return
            at = clock(session)
            row.held_until, row.outcome, row.changed_at = None, outcome.name, at
            if outcome.name == "retried":
                first = dt.timedelta(seconds=self.systems[held.inbox].config.retry_seconds)
                row.due_at = at + min(_LONGEST_PAUSE, first * 2 ** (held.attempts - 1))
                return
            row.attempts = 0
            row.answered = outcome.answered or row.answered
            row.replies += outcome.name in ("note", "public")
            # Something may have come while it was looked at.
            row.due_at = at if row.told != held.told else None


def turns_of(messages: Sequence[Message], most_chars: int) -> list[common_pb2.Message]:
    """The conversation for a model: it begins with the customer, and nobody speaks twice in a row.

    The newest messages that have together no more than `most_chars`; the last one is cut where it alone is longer.
    """
    turns: list[common_pb2.Message] = []
    for message in reversed(messages):
        left = most_chars - sum(len(turn.content) for turn in turns)
        if turns and len(message.text) > left:
            break
        if turns and turns[0].role == message.role:
            turns[0].content = f"{message.text}\n\n{turns[0].content}"
        else:
            turns.insert(0, common_pb2.Message(role=message.role, content=message.text[:left]))
    return turns[1:] if turns and turns[0].role == "assistant" else turns


def _same(one: str, other: str) -> bool:
    return one.split() == other.split()


def _kind(error: Exception) -> str:
    if isinstance(error, httpx.HTTPStatusError):
        return f"the ticket system answers {error.response.status_code}"
    return f"the ticket system cannot be reached or understood ({type(error).__name__})"
