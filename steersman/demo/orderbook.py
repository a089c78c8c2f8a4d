"""A small order book of a fictitious office supplier, the source of every fact in the demo's conversations.

A topic draws one record (a flat mapping of field to value) and renders it as the short system message the bot sees.
A question asks for one field of the record; what kind of value that field holds decides how an answer is checked.
"""

from collections.abc import Callable
from dataclasses import dataclass
from random import Random

WEEKDAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday")
WEEKEND = ("Saturday", "Sunday")
MONTHS = (
    "January", "February", "March", "April", "May", "June",
    "July", "August", "September", "October", "November", "December",
)  # fmt: skip
CARRIERS = ("DHL", "UPS", "DPD", "GLS", "FedEx")
STATUSES = ("packed", "confirmed", "on hold", "in production", "ready to ship")
PERSONS = ("Ms Weber", "Mr Klein", "Ms Stone", "Mr Hall", "Ms Lake", "Mr Cole", "Ms Reed", "Mr Frost")
ITEMS = (
    "desk lamps", "chairs", "printers", "monitors", "keyboards", "desks", "shelves", "headsets", "cables",
    "toner boxes", "whiteboards", "scanners", "phones", "laptops", "projectors", "cabinets", "notebooks", "labels",
    "batteries", "mouse pads",
)  # fmt: skip
FAULTS = ("broken chair", "late parcel", "wrong item", "missing part", "double charge", "damaged box")

CUSTOMERS = (
    "Adams", "Allen", "Baker", "Barnes", "Bell", "Bennett", "Berg", "Black", "Boyd", "Brandt", "Brooks", "Brown",
    "Burns", "Butler", "Campbell", "Carter", "Chapman", "Clark", "Collins", "Cook", "Cooper", "Cox", "Craig", "Cross",
    "Davis", "Dean", "Dixon", "Duncan", "Dunn", "Edwards", "Ellis", "Evans", "Fischer", "Fisher", "Fleming", "Ford",
    "Foster", "Fox", "Gardner", "Gibson", "Gordon", "Graham", "Grant", "Gray", "Green", "Griffin", "Hamilton", "Hansen",
    "Harper", "Harris", "Hart", "Harvey", "Hayes", "Henry", "Hill", "Holmes", "Howard", "Hudson", "Hughes", "Hunt",
    "Hunter", "Jackson", "James", "Jenkins", "Jensen", "Johnson", "Jordan", "Kelly", "Kennedy", "King", "Knight",
    "Lane", "Larson", "Lawrence", "Lee", "Lewis", "Logan", "Long", "Marshall", "Martin", "Mason", "Meyer", "Miller",
    "Mills", "Mitchell", "Moore", "Morgan", "Morris", "Murphy", "Murray", "Myers", "Nelson", "Newman", "Olson", "Owens",
    "Palmer", "Parker", "Perry", "Peters", "Porter", "Powell", "Price", "Reynolds", "Rice", "Roberts", "Rogers", "Rose",
    "Ross", "Russell", "Schmidt", "Scott", "Shaw", "Simmons", "Smith", "Spencer", "Stevens", "Stewart", "Sullivan",
    "Taylor", "Thomas", "Thompson", "Tucker", "Turner", "Wagner", "Walker", "Wallace", "Ward", "Warren", "Watson",
    "Webb", "Wells", "West", "White", "Wilson", "Wood", "Woods", "Wright", "Young",
)  # fmt: skip


@dataclass(frozen=True)
class Case:
    """One customer's record and the field that the customer asks for."""

    topic: str
    asked: str
    """Name of the asked field, e.g. `arrival`."""
    kind: str
    """Kind of its value: day, amount, count, carrier, person or status."""
    record: dict[str, str]
    system: str
    """The record as the system message."""

    @property
    def value(self) -> str:
        return self.record[self.asked]


def _day(rng: Random) -> str:
    return rng.choice(WEEKDAYS) if rng.random() < 0.6 else f"{rng.randint(2, 29)} {rng.choice(MONTHS)}"


def _two_days(rng: Random) -> tuple[str, str]:
    """An earlier and a later day, both in the same notation."""
    if rng.random() < 0.6:
        first, last = sorted(rng.sample(range(len(WEEKDAYS)), 2))
        return WEEKDAYS[first], WEEKDAYS[last]
    month = rng.choice(MONTHS)
    first, last = sorted(rng.sample(range(2, 29), 2))
    return f"{first} {month}", f"{last} {month}"


def _number(rng: Random) -> str:
    return str(rng.randint(102, 989))


def _amount(rng: Random) -> str:
    return f"{rng.choice((rng.randint(15, 99), 10 * rng.randint(10, 98)))} euros"


def _order(rng: Random) -> tuple[dict[str, str], str]:
    record = {
        "order": _number(rng),
        "quantity": str(rng.randint(2, 9)),
        "item": rng.choice(ITEMS),
        "status": rng.choice(STATUSES),
        "ships": _day(rng),
    }
    return record, rng.choice(
        (
            "order {order}, {quantity} {item}, {status}, ships {ships}.",
            "order {order}: {quantity} {item}, now {status}, ships {ships}.",
        )
    )


def _delivery(rng: Random) -> tuple[dict[str, str], str]:
    sent, arrival = _two_days(rng)
    record = {
        "order": _number(rng),
        "item": rng.choice(ITEMS),
        "carrier": rng.choice(CARRIERS),
        "sent": sent,
        "arrival": arrival,
    }
    return record, rng.choice(
        (
            "order {order}, {item}, sent {sent} with {carrier}, arrives {arrival}.",
            "order {order}: left {sent}, carrier {carrier}, arrives {arrival}.",
        )
    )


def _invoice(rng: Random) -> tuple[dict[str, str], str]:
    record = {"invoice": _number(rng), "item": rng.choice(ITEMS), "total": _amount(rng), "due": _day(rng)}
    return record, rng.choice(
        (
            "invoice {invoice} for {item}, total {total}, payable by {due}.",
            "invoice {invoice}: {total}, open, payable by {due}.",
        )
    )


def _return(rng: Random) -> tuple[dict[str, str], str]:
    received, paid = _two_days(rng)
    record = {
        "return": _number(rng),
        "item": rng.choice(ITEMS),
        "received": received,
        "refund": _amount(rng),
        "paid": paid,
    }
    return record, rng.choice(
        (
            "return {return}, received {received}, refund {refund} on {paid}.",
            "return {return}: {item}, refund {refund}, paid {paid}.",
        )
    )


def _stock(rng: Random) -> tuple[dict[str, str], str]:
    record = {
        "item": rng.choice(ITEMS),
        "count": str(rng.randint(3, 98)),
        "price": f"{rng.randint(11, 99)} euros",
        "refill": _day(rng),
    }
    return record, rng.choice(
        (
            "asks about {item}: {count} in stock, {price} each, refill {refill}.",
            "item {item}, stock {count}, price {price}, refill {refill}.",
        )
    )


def _escalation(rng: Random) -> tuple[dict[str, str], str]:
    opened, call = _two_days(rng)
    record = {
        "case": _number(rng),
        "fault": rng.choice(FAULTS),
        "opened": opened,
        "manager": rng.choice(PERSONS),
        "call": call,
    }
    return record, rng.choice(
        (
            "case {case}, {fault}, opened {opened}, {manager} calls {call}.",
            "case {case}: {fault}, manager {manager}, calls {call}.",
        )
    )


TOPICS: dict[str, Callable[[Random], tuple[dict[str, str], str]]] = {
    "order": _order,
    "delivery": _delivery,
    "invoice": _invoice,
    "return": _return,
    "stock": _stock,
    "escalation": _escalation,
}
"""Topic to its record maker; the maker returns the record and the template of its system message."""

ASKED: dict[str, dict[str, str]] = {
    "order": {"status": "status", "ships": "day"},
    "delivery": {"arrival": "day", "carrier": "carrier"},
    "invoice": {"total": "amount", "due": "day"},
    "return": {"refund": "amount", "paid": "day"},
    "stock": {"count": "count", "price": "amount", "refill": "day"},
    "escalation": {"manager": "person", "call": "day"},
}
"""Topic to the fields that a customer may ask for, with the kind of their values."""


def draw_case(rng: Random, customer: str, topic: str) -> Case:
    """Draw a record of `topic` for `customer` and the field that is asked."""
    record, template = TOPICS[topic](rng)
    asked, kind = rng.choice(sorted(ASKED[topic].items()))
    return Case(topic, asked, kind, record, f"{customer}, {template.format(**record)}")


def other_value(rng: Random, kind: str, record: dict[str, str], value: str) -> str:
    """A value of the same kind and notation that the record does not hold: what an agent who guesses would say."""
    taken = " ".join(record.values())
    while True:
        if kind == "day":
            dated = any(month in value for month in MONTHS)
            candidate = f"{rng.randint(2, 29)} {value.split()[1]}" if dated else rng.choice(WEEKDAYS + WEEKEND)
        elif kind == "amount":
            candidate = _amount(rng)
        elif kind == "count":
            candidate = str(rng.randint(3, 98))
        else:
            candidate = rng.choice({"carrier": CARRIERS, "person": PERSONS, "status": STATUSES}[kind])
        if candidate.removesuffix(" euros") not in taken:
            return candidate
