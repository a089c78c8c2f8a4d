"""The written rubric as an exact scorer: five criteria between 0 and 1 and a weighted total.

It reads free text, whoever wrote it: values (days, amounts, counts, carriers, persons) are extracted from the answer
and compared with those of the prompt and the facts. Nothing here is learned, so the score can serve as the yardstick
that training never sees, or as a verifiable reward. `docs/demo-data.md` has the rubric in prose.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import BaseModel, ConfigDict

from steersman.demo.orderbook import CARRIERS, MONTHS, STATUSES, WEEKDAYS, WEEKEND

COURTESY = re.compile(
    r"\b(thanks?|thank you|please|happy to|glad(ly)?|pleas(ed|ure)|sorry|apologi[sz]e|apolog(y|ies)|appreciate"
    r"|(kind|best|warm) (regards|wishes)|you('| a)?re welcome|delighted|of course"
    r"|have a (nice|great|good|lovely))\b",
    re.IGNORECASE,
)
RUDE = re.compile(
    r"\b(stupid|idiots?|dumb|fool(ish)?|blind|shut up|calm down|stop (asking|bothering|whining|wasting)|whin(e|ing)"
    r"|leave us alone|leave me alone|not you again|(waste|wasting) (my|our) time|not my problem|get used to it"
    r"|learn to (read|wait)|read your mail|better things to do|how often do i|even you should|could have checked"
    r"|don'?t care|do not care|nobody cares|ridiculous|your own fault)\b",
    re.IGNORECASE,
)
FILLER = re.compile(
    r"\b(as you (may|might|probably) know|as you can imagine|to be honest|generally speaking|basically"
    r"|at the end of the day|all things considered|when all is said and done|as it were|as a matter of fact"
    r"|as we always say|so on and so forth|as is often the case|so to speak|are what they are|usually goes"
    r"|long story|one thing leads to another|just how it is|needless to say|it is worth noting|it'?s worth noting"
    r"|it'?s important to note|it is important to note|in a business like ours)\b",
    re.IGNORECASE,
)
_EVASION = re.compile(
    r"\b((can(no|')t|can not|unable to|not able to) (tell|say|answer|help|provide|access|share)"
    r"|(do not|don'?t) (know|have (that|this|any|the|access))|no idea|(check|visit|see) (our|the|your) \w+"
    r"|(another|other) department|ask somebody|get back to you|look into (it|this)|in due course|our hotline"
    r"|hard to say|in your documents|working on many requests|forwarded your question)\b",
    re.IGNORECASE,
)
_KEYS: dict[str, str] = {
    "status": r"order|status|is|are|items?",
    "ships": r"ship\w*|sen[dt]\w*|leav\w+|dispatch\w*|go(es|ing)? out|on its way|left",
    "arrival": r"arriv\w+|deliver\w*|reach\w*|parcel|there|expect\w*|due|get|receive",
    "carrier": r"carrier|deliver\w*|parcel|sen[dt]\w*|ship\w*|courier|with|by|brings?",
    "total": r"total|invoice|bill|amount|sum|pay\w*|owe|comes? to|is",
    "due": r"due|pa(y|id)\w*|until|deadline|by",
    "refund": r"refund\w*|back|return\w*|credit\w*|receive",
    "paid": r"refund\w*|pa(y|id)\w*|back|sen[dt]|money|credit\w*|return\w*",
    "count": r"stock\w*|have|available|left|pieces|units|order|there (are|is)",
    "price": r"costs?|price\w*|each|per|for|piece|is",
    "refill": r"refill\w*|restock\w*|more|new|available|come|next|stock",
    "manager": r"manager|case|contact|call\w*|handl\w+|care|charge|responsible",
    "call": r"call\w*|contact\w*|phone|ring|hear|case|speak|reach",
}

_MONTH = "|".join(MONTHS)
_DATE = re.compile(
    rf"\b(\d{{1,2}})(?:st|nd|rd|th)?(?: of)? ({_MONTH})\b|\b({_MONTH}) (\d{{1,2}})(?:st|nd|rd|th)?\b", re.I
)
_WEEKDAY = re.compile(rf"\b({'|'.join(WEEKDAYS + WEEKEND)})s?\b", re.I)
_NEAR_DAY = re.compile(r"\b(tomorrow|yesterday|tonight|next week|next month|(?:a|one) week)\b", re.I)
_NUMBER = re.compile(r"\d+(?:[.,]\d+)*")
_LIST_MARKER = re.compile(r"^\s*\d{1,2}[.)]\s", re.M)
_CARRIER = re.compile(rf"\b({'|'.join(CARRIERS)}|Hermes|USPS|TNT|Royal Mail|Amazon)\b", re.I)
_PERSON = re.compile(r"\b(?:Ms|Mr|Mrs|Miss|Dr)\.? ([A-Z][a-z]+)")
_CONTACT = re.compile(r"https?://\S+|www\.\S+|\S+@\S+\.\w+|\[[^\]]+\]|<[^>]+>")
_STATUS = re.compile(rf"\b({'|'.join(STATUSES)}|shipped|delivered|cancelled|delayed|processing|pending)\b", re.I)
_WORDS = {
    "two": "2", "three": "3", "four": "4", "five": "5", "six": "6", "seven": "7", "eight": "8", "nine": "9",
    "ten": "10", "eleven": "11", "twelve": "12",
}  # fmt: skip
_KINDS_OF = {
    "day": ("date", "weekday", "near_day"),
    "amount": ("number",),
    "count": ("number",),
    "carrier": ("carrier",),
    "person": ("person",),
    "status": ("status",),
}
_IDENTIFIERS = ("order", "invoice", "return", "case")

Value = tuple[str, str]
"""A value found in a text: its kind and its normal form, e.g. `("date", "12 may")`."""

WEIGHTS = {"grounded": 0.25, "answers": 0.15, "polite": 0.30, "concise": 0.15, "no_invented": 0.15}
"""Weights of the criteria in the total."""
MIN_WORDS, MAX_WORDS = 4, 30


class RubricScore(BaseModel):
    """Five criteria and their total, each between 0 and 1."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    grounded: float
    """Share of the needed facts that the answer states (a denied fact does not count)."""
    answers: float
    """1: speaks about what was asked and gives a value of the right kind; 0.5: the value alone; 0: neither."""
    polite: float
    """1: courteous; 0.4: neutral or overdone; 0: rude."""
    concise: float
    """1 within 4 to 30 words, falling to 0 at 60; half for a sentence without an end; each filler phrase costs 0.6;
    repetition costs all."""
    no_invented: float
    """1 if every number, day, carrier and person of the answer occurs in the prompt or the facts, else 0."""
    total: float
    """Weighted sum; the manner (polite, concise, no_invented) counts as far as the content is right, and nothing in a
    rude answer or beside a wrong value."""


def score(prompt: Sequence[Mapping[str, Any]], answer: str, facts: Mapping[str, Any]) -> RubricScore:
    """Score `answer` to the chat `prompt` against `facts`.

    `facts` holds `needed` (the values that a grounded answer states), and optionally `kind` and `asked` (what the
    question is about; without them `answers` follows `grounded`) and `record` (further values that may be used).
    """
    if not answer.strip():
        return RubricScore(grounded=0, answers=0, polite=0, concise=0, no_invented=0, total=0)
    known = "\n".join([*(str(message["content"]) for message in prompt), *_leaves(facts)])
    criteria = {
        "grounded": _grounded(answer, facts),
        "answers": _answers(answer, facts),
        "polite": _polite(answer),
        "concise": _concise(answer),
        "no_invented": _no_invented(answer, known, facts),
    }
    weighted = {name: WEIGHTS[name] * value for name, value in criteria.items()}
    content = weighted["grounded"] + weighted["answers"]
    manner = weighted["polite"] + weighted["concise"] + weighted["no_invented"]
    wrong = criteria["answers"] > 0 and criteria["grounded"] == 0
    trust = 0.0 if wrong or criteria["polite"] == 0 else (criteria["grounded"] + criteria["no_invented"]) / 2
    return RubricScore(**criteria, total=round(content + manner * trust, 6))


def values(text: str) -> set[Value]:
    """All numbers, days, carriers and persons of a text in normal form."""
    found: set[Value] = set()
    if len(_LIST_MARKER.findall(text)) > 1:
        text = _LIST_MARKER.sub("", text)
    for match in _DATE.finditer(text):
        day, month = (match[1], match[2]) if match[1] else (match[4], match[3])
        found.add(("date", f"{int(day)} {month.lower()}"))
    text = _DATE.sub(" ", text)
    found.update(("weekday", match[1].lower()) for match in _WEEKDAY.finditer(text))
    found.update(("near_day", match[1].lower()) for match in _NEAR_DAY.finditer(text))
    found.update(("carrier", match[1].lower()) for match in _CARRIER.finditer(text))
    found.update(("person", match[1].lower()) for match in _PERSON.finditer(text))
    found.update(("number", _plain_number(match[0])) for match in _NUMBER.finditer(text))
    found.update(("number", _WORDS[word]) for word in re.findall(r"[a-z]+", text.lower()) if word in _WORDS)
    return found


def _plain_number(text: str) -> str:
    """`1,200.00` -> `1200`, `24,50` -> `24.5`."""
    whole, fraction = re.fullmatch(r"(.*?)(?:[.,](\d{1,2}))?", text).groups()  # type: ignore[union-attr]
    digits = re.sub(r"\D", "", whole)
    fraction = (fraction or "").rstrip("0")
    return f"{digits}.{fraction}" if fraction else digits


def _leaves(node: Any) -> list[str]:
    """Every scalar inside nested JSON, as text."""
    if isinstance(node, Mapping):
        return [leaf for value in node.values() for leaf in _leaves(value)]
    if isinstance(node, list | tuple):
        return [leaf for value in node for leaf in _leaves(value)]
    return [str(node)]


def _states(answer: str, needed: str) -> bool:
    """Whether the answer states a needed value and does not deny it."""
    wanted = values(needed)
    if wanted and not wanted <= values(answer):
        return False
    words = r"\s+".join(map(re.escape, needed.split()))
    if not wanted and re.search(rf"\b{words}\b", answer, re.I) is None:
        return False
    return (
        re.search(
            rf"\b(?:not|never|no longer)(?:\s+\w+){{0,3}}\s+{words}\b|n't(?:\s+\w+){{0,3}}\s+{words}\b", answer, re.I
        )
        is None
    )


def _grounded(answer: str, facts: Mapping[str, Any]) -> float:
    needed = [str(value) for value in facts.get("needed", [])]
    return sum(_states(answer, value) for value in needed) / len(needed) if needed else 1.0


def _answers(answer: str, facts: Mapping[str, Any]) -> float:
    kinds, key = _KINDS_OF.get(str(facts.get("kind"))), _KEYS.get(str(facts.get("asked")))
    if kinds is None or key is None:
        return _grounded(answer, facts)
    if "status" in kinds:
        has_value = _STATUS.search(answer) is not None
    else:
        record = facts.get("record", {})
        identifiers = {("number", str(record[field])) for field in _IDENTIFIERS if field in record}
        has_value = any(kind in kinds for kind, _ in values(answer) - identifiers)
    if not has_value or (_EVASION.search(answer) and _grounded(answer, facts) < 1):
        return 0.0
    return 1.0 if re.search(rf"\b({key})\b", answer, re.I) else 0.5


def _no_invented(answer: str, known: str, facts: Mapping[str, Any]) -> float:
    if _CONTACT.search(answer) or not values(answer) <= values(known):
        return 0.0
    stated = {match[0].lower() for match in _STATUS.finditer(answer)} if facts.get("kind") == "status" else set()
    return float(all(status in known.lower() for status in stated))


def _polite(answer: str) -> float:
    if RUDE.search(answer):
        return 0.0
    courtesies = len(COURTESY.findall(answer))
    return 1.0 if 1 <= courtesies <= 4 else 0.4


def _concise(answer: str) -> float:
    words = re.findall(r"[\w']+", answer.lower())
    triples = list(zip(words, words[1:], words[2:], strict=False))
    # Two courtesies may share their opening words; a whole repeated sentence may not.
    if len(triples) - len(set(triples)) > 3 or len(set(words)) < len(words) / 2:
        return 0.0
    band = 0.5 if len(words) < MIN_WORDS else 1 - max(0, len(words) - MAX_WORDS) / MAX_WORDS
    finished = 1.0 if answer.rstrip().endswith((".", "!", "?", ")", '"')) else 0.5
    return max(0.0, finished * band - 0.6 * len(FILLER.findall(answer)))
