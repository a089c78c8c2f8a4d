"""A simulated support staff of uneven quality: the grammar that writes demonstrations and candidate answers.

An answer joins a core that carries the fact (or a guess, or an evasion) with a phrase before and after it. The phrases
of every manner have similar lengths, so that length says little about quality.
"""

from collections.abc import Sequence
from random import Random

from steersman.demo.orderbook import Case, other_value

STYLES = {
    "good": 0.28,
    "plain": 0.16,
    "rude": 0.20,
    "curt": 0.06,
    "rambling": 0.18,
    "inventing": 0.05,
    "evasive": 0.07,
}
"""Share of each manner among the staff's answers."""

CORES: dict[str, dict[str, tuple[str, ...]]] = {
    "order": {
        "status": (
            "your order {order} is {v}",
            "order {order} is currently {v}",
            "your {item} are {v}",
            "the status of order {order} is {v}",
            "your {item} are {v} at the moment",
            "your order with {quantity} {item} is {v}",
        ),
        "ships": (
            "your order {order} ships on {v}",
            "your {item} will be shipped on {v}",
            "we ship order {order} on {v}",
            "your order leaves our warehouse on {v}",
            "the {item} of order {order} ship on {v}",
            "the shipping day of your order is {v}",
        ),
    },
    "delivery": {
        "arrival": (
            "your order {order} arrives on {v}",
            "your parcel will arrive on {v}",
            "the delivery of order {order} is planned for {v}",
            "{carrier} delivers your parcel on {v}",
            "order {order} should reach you on {v}",
            "your parcel left on {sent} and arrives on {v}",
        ),
        "carrier": (
            "your order {order} is delivered by {v}",
            "{v} has your parcel",
            "the carrier of order {order} is {v}",
            "we sent your parcel with {v}",
            "{v} brings your parcel on {arrival}",
            "your parcel is on its way with {v}",
        ),
    },
    "invoice": {
        "total": (
            "the total of invoice {invoice} is {v}",
            "your invoice {invoice} comes to {v}",
            "the amount to pay is {v}",
            "the open amount of your invoice is {v}",
            "invoice {invoice} has a total of {v}",
            "you owe {v} on invoice {invoice}",
        ),
        "due": (
            "invoice {invoice} is due on {v}",
            "your invoice is payable by {v}",
            "the due day of invoice {invoice} is {v}",
            "you can pay invoice {invoice} until {v}",
            "the payment of {total} is due on {v}",
            "your payment is due by {v}",
        ),
    },
    "return": {
        "refund": (
            "your refund for return {return} is {v}",
            "you get {v} back for return {return}",
            "we refund {v} to you",
            "the refund amount is {v}",
            "return {return} has a refund of {v}",
            "you receive a refund of {v} on {paid}",
        ),
        "paid": (
            "your refund is paid on {v}",
            "we pay your refund of {refund} on {v}",
            "the refund for return {return} is sent on {v}",
            "you get your refund on {v}",
            "return {return} will be refunded on {v}",
            "the money for return {return} is paid on {v}",
        ),
    },
    "stock": {
        "count": (
            "we have {v} {item} in stock",
            "there are {v} {item} available",
            "the stock of {item} is {v}",
            "{v} {item} are in stock now",
            "you can order up to {v} {item} today",
            "our stock holds {v} {item}",
        ),
        "price": (
            "the {item} cost {v} each",
            "the price of the {item} is {v}",
            "one piece costs {v}",
            "the price is {v} each, with {count} in stock",
            "we sell the {item} for {v} each",
            "the unit price of the {item} is {v}",
        ),
        "refill": (
            "the {item} are refilled on {v}",
            "we get more {item} on {v}",
            "the next refill is on {v}",
            "new {item} come in on {v}",
            "our stock of {item} is refilled on {v}",
            "more {item} will be available on {v}",
        ),
    },
    "escalation": {
        "manager": (
            "{v} is handling your case",
            "{v} takes care of case {case}",
            "your contact for case {case} is {v}",
            "{v} is the manager of your case",
            "{v} will call you about case {case}",
            "the manager for the {fault} is {v}",
        ),
        "call": (
            "the manager calls you on {v}",
            "{manager} will call you on {v}",
            "your call for case {case} is on {v}",
            "you get a call about the {fault} on {v}",
            "we call you about case {case} on {v}",
            "{manager} calls you about your case on {v}",
        ),
    },
}

POLITE_BEFORE = (
    "Thank you for your message.",
    "Thank you for asking,",
    "Thanks for your question,",
    "Happy to help:",
    "I am glad to help you,",
    "Hello, and thank you for writing.",
    "Thank you for your patience,",
    "Gladly,",
    "Thanks for getting in touch.",
    "I am sorry for the wait,",
    "Sorry for the trouble,",
    "It is my pleasure to help:",
)
POLITE_AFTER = (
    "Please let us know if you need more.",
    "Thank you for your patience.",
    "Please write to us any time.",
    "I am happy to help further.",
    "We are sorry for any trouble.",
    "Thank you for choosing us.",
    "Please ask if anything is unclear.",
    "We appreciate your order, thank you.",
    "Kind regards and thank you.",
    "Please tell me if I can help more.",
)
PLAIN_BEFORE = (
    "According to the record,",
    "The system shows this:",
    "Going by our data,",
    "As of today,",
    "Here is the entry:",
    "Looking at the file,",
    "Checked the record,",
    "From what is listed here,",
)
PLAIN_AFTER = (
    "That is the current entry.",
    "There is no more in the record.",
    "This is the state right now.",
    "Nothing else is listed for it.",
    "That is all the file says.",
    "The entry was made by the office.",
    "The data comes from the system.",
)
RUDE_BEFORE = (
    "Read your mail for once.",
    "Not you again.",
    "How often do I have to say it:",
    "Calm down,",
    "Stop bothering us,",
    "What a stupid question.",
    "Are you blind?",
    "I have better things to do.",
    "Learn to read,",
)
RUDE_AFTER = (
    "You could have checked that yourself.",
    "Stop asking me this.",
    "Do not waste my time again.",
    "That is really not my problem.",
    "Even you should understand that.",
    "Now leave us alone.",
    "Your whining does not help.",
    "Get used to it.",
)
SHRUGS = (
    "as anyone can see",
    "as it says right there",
    "as written in the mail",
    "and that is that",
    "how hard can it be",
    "end of discussion",
)
FILLER_BEFORE = (
    "As you may know, in a business like ours,",
    "To be honest, generally speaking,",
    "Well, basically, at the end of the day,",
    "As we always say around here,",
    "As a matter of fact, all things considered,",
    "When all is said and done, as it were,",
)
FILLER_AFTER = (
    "And so on and so forth, as is often the case.",
    "But things are what they are, so to speak.",
    "That is how it usually goes in this business.",
    "It is a long story, as you can imagine.",
    "In any case, one thing leads to another.",
    "Generally speaking, that is just how it is.",
)
GUESSES = ("I think", "I guess", "probably", "if I remember right,", "it should be that", "off the top of my head,")
EVASIONS = (
    "our team will look into it soon",
    "you can check our website for that",
    "I cannot tell you that right now",
    "another department takes care of this",
    "we are working on many requests today",
    "somebody will get back to you at some point",
    "you will find that in your documents",
    "your request will be handled in due course",
    "you may call our hotline about this",
    "I do not have that information for you",
    "we have forwarded your question to the office",
    "that is hard to say from here",
)


def _join(before: str, core: str, after: str) -> str:
    """Join the parts into sentences; a part that opens a sentence gets a capital, the core a full stop."""
    opens_sentence = not before or before[-1] in ".!?"
    core = core[0].upper() + core[1:] if opens_sentence else core
    return " ".join(filter(None, (before[:1].upper() + before[1:], core + ".", after)))


def _wrap(rng: Random, core: str, before: Sequence[str], after: Sequence[str]) -> str:
    """Put a phrase before the core, after it, or both."""
    where = rng.random()
    opening = rng.choice(before) if where < 0.7 else ""
    closings = [phrase for phrase in after if opening.rstrip(",.") not in phrase] if opening else after
    return _join(opening, core, rng.choice(closings) if where > 0.4 else "")


def _core(rng: Random, case: Case, value: str) -> str:
    return rng.choice(CORES[case.topic][case.asked]).format(v=value, **case.record)


def answer(rng: Random, case: Case, style: str) -> str:
    """Write one answer to `case` in the manner of `style` (a key of `STYLES`)."""
    core = _core(rng, case, case.value)
    if style == "good":
        return _wrap(rng, core, POLITE_BEFORE, POLITE_AFTER)
    if style == "plain":
        return _wrap(rng, core, PLAIN_BEFORE, PLAIN_AFTER)
    if style == "rude":
        return _wrap(rng, core, RUDE_BEFORE, RUDE_AFTER)
    if style == "curt":
        return _join("", f"{case.value}, {rng.choice(SHRUGS)}", rng.choice(RUDE_AFTER))
    if style == "rambling":
        opening = rng.choice((rng.choice(FILLER_BEFORE), rng.choice(POLITE_BEFORE), ""))
        return _join(opening, core, "" if opening in FILLER_BEFORE else rng.choice(FILLER_AFTER))
    tone = (POLITE_BEFORE, POLITE_AFTER) if rng.random() < 0.7 else (PLAIN_BEFORE, PLAIN_AFTER)
    if style == "evasive":
        return _wrap(rng, rng.choice(EVASIONS), *tone)
    guess = _core(rng, case, other_value(rng, case.kind, case.record, case.value))
    hedge = f"{rng.choice(GUESSES)} " if rng.random() < 0.8 else ""
    return _wrap(rng, hedge + guess, *tone)


def draw_style(rng: Random) -> str:
    return rng.choices(list(STYLES), list(STYLES.values()))[0]
