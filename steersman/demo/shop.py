"""The demo's shop as a chat finds it: one customer's open records, and what people ask first.

The records read as the system messages of the training data do, because what was trained is what is served.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

from steersman.demo.orderbook import CUSTOMERS, TOPICS
from steersman.demo.rubric import score

_KINDS = ("order", "delivery", "invoice")
_NUMBER = {"order": "order", "delivery": "order", "invoice": "invoice"}
"""Field that holds a record's number, by kind."""


@dataclass(frozen=True)
class FirstQuestion:
    """A question of somebody who opens the chat, and the values of which a grounded answer states one."""

    text: str
    record: Mapping[str, str]
    accepted: tuple[str, ...]

    def is_grounded(self, answer: str) -> bool:
        """Whether the answer states what was asked, and no number, day or carrier that the record does not hold."""
        prompt = [{"role": "user", "content": self.text}]
        scores = [score(prompt, answer, {"needed": [value], "record": self.record}) for value in self.accepted]
        return any(found.grounded == 1 and found.no_invented == 1 for found in scores)


@dataclass(frozen=True)
class Shop:
    """One customer and what is open for him."""

    customer: str
    records: Mapping[str, Mapping[str, str]]
    """By kind."""
    texts: Mapping[str, str]
    """The records as the model reads them."""

    def rows(self) -> dict[str, list[dict[str, str]]]:
        """The order book for the gateway's file system. A parcel is found by its order's number, too."""
        rows: dict[str, list[dict[str, str]]] = {
            kind: [{"number": record[_NUMBER[kind]], "customer": self.customer, "text": self.texts[kind]}]
            for kind, record in self.records.items()
        }
        rows["order"] = [*rows["delivery"], *rows["order"]]
        return rows

    def questions(self) -> list[FirstQuestion]:
        return [
            FirstQuestion(
                text.format(**self.records[kind]), self.records[kind], tuple(self.records[kind][f] for f in asked)
            )
            for kind, asked, texts in _QUESTIONS
            for text in texts
        ]


def open_shop(seed: int) -> Shop:
    """The shop of a seed: other numbers and days, another customer."""
    draw = Random(f"{seed}/shop")
    customer = draw.choice(sorted(CUSTOMERS))
    records: dict[str, dict[str, str]] = {}
    texts: dict[str, str] = {}
    while len({record[_NUMBER[kind]] for kind, record in records.items()} | {r["item"] for r in records.values()}) < 6:
        for kind in _KINDS:
            records[kind], template = TOPICS[kind](draw)
            texts[kind] = f"{customer}, {template.format(**records[kind])}"
    return Shop(customer, records, texts)


def gateway_options(shop: Shop, book: Path) -> dict[str, Any]:
    """What the gateway's configuration needs for the shop; writes the order book.

    Args:
        book: file for the order book.
    """
    book.parent.mkdir(parents=True, exist_ok=True)
    book.write_text(json.dumps(shop.rows(), indent=1), encoding="utf-8")
    kinds = {
        kind: {
            "entity": kind,
            "number": "number",
            "owner": "customer",
            "fields": {"text": "text"},
            "sentence": "{text}",
            "newestFirst": "number",
            "words": [shop.records[kind]["item"]],
        }
        for kind in _KINDS
    }
    shown = ("Where is my order?", "When will my parcel arrive?", "How much is my invoice?")
    order, invoice = shop.records["order"], shop.records["invoice"]
    return {
        "identity": {"localCustomer": shop.customer},
        "suggestions": [
            *shown,
            f"When does order {order['order']} ship?",
            f"When is invoice {invoice['invoice']} due?",
        ],
        "tools": {
            "systems": [{"name": "shop", "type": "file", "path": str(book), "kinds": kinds}],
            "instruction": "",
            "newest": 1,
            "records": 1,
        },
    }


_QUESTIONS: tuple[tuple[str, tuple[str, ...], tuple[str, ...]], ...] = (
    (
        "order",
        ("status", "ships"),
        (
            "Where is my order?",
            "where's my order",
            "Hi, where is my order {order}?",
            "What about order {order}?",
            "Hello! I ordered {item} some days ago. What is happening with my order?",
            "order {order}???",
            "Tell me about my order please",
            "I'd like some information on order number {order}.",
            "what's up with my {item}",
            "Good morning, could you look at my order?",
            "Any update on order no. {order}?",
            "My order #{order} - how is it going?",
            "Can you check order {order} for me",
            "hey is my order ok?",
        ),
    ),
    (
        "order",
        ("ships",),
        (
            "When does my order ship?",
            "when will {order} be shipped?",
            "Which day is order {order} leaving?",
            "On what date will you ship my {item}?",
            "When are you going to send my order?",
        ),
    ),
    (
        "order",
        ("status",),
        ("What's the status of my order?", "Status of order {order} please", "Is order {order} packed already?"),
    ),
    (
        "delivery",
        ("arrival",),
        (
            "When will my parcel arrive?",
            "When is my delivery coming?",
            "what day is my package delivered",
            "Hi! When do I get my parcel?",
            "When can I expect my delivery?",
            "my package is late, when does it arrive?",
            "Is my parcel coming this week?",
            "When does the delivery for order {order} arrive?",
            "Please tell me the delivery date.",
            "I'm waiting for my package. When?",
            "delivery date?",
        ),
    ),
    (
        "delivery",
        ("carrier",),
        (
            "Who is delivering my parcel?",
            "Which carrier has my package?",
            "what company is bringing my delivery?",
            "Is my parcel with DHL or with someone else?",
        ),
    ),
    ("delivery", ("arrival", "carrier", "sent"), ("Where is my parcel?", "Where's my package?", "Track my delivery")),
    (
        "invoice",
        ("total",),
        (
            "How much is my invoice?",
            "What's the total on invoice {invoice}?",
            "how much is the bill",
            "What do I have to pay for invoice {invoice}?",
            "Hello, what is the amount of my invoice?",
        ),
    ),
    (
        "invoice",
        ("due",),
        (
            "When is my invoice due?",
            "By when do I have to pay invoice {invoice}?",
            "until when can I pay my bill?",
            "due date of invoice {invoice}?",
        ),
    ),
    ("invoice", ("total", "due"), ("I have a question about my invoice.",)),
)
"""(kind, fields of which one has to be stated, wordings)"""
