"""Phone numbers in the texts of a business, whose orders, invoices and parcels have numbers, too.

A number is a person's when it is valid in some country and either
- begins with its country code (+49 ...), or
- a word before it says so (call, phone, Tel. ...), nearer than any word of business (order, invoice ...), or
- it is written in the groups that its country writes it in, and no word of business stands before it.
Any other run of digits stays: an order number lost is an answer spoilt.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

_CANDIDATE = re.compile(r"(?<![\w#@.,/=&-])(?:\+|00)?\(?\d[\d ()./\u2013\u00a0-]{4,22}\d(?![\w%@]|[.,]\d)")
#: What every candidate of seven digits holds from its first digit on: a text is searched for that much faster.
_DIGITS = re.compile(r"\d[\d ()./\u2013\u00a0-]{5,22}\d")
LOOK_BACK = 48
"""Characters before a number in which a word says what it is."""
_NUMBER = re.compile(r"\d{4}")
# For small letters. What must begin a word stands together, so that it is tried where one begins.
_PERSONAL = re.compile(
    r"\b(?:phone\b|tel(?:\b|[.:])|cell\b|call|ring\b|dial|fax|sms\b|text (?:me|us)|reach|contact|phn\b)|"
    r"telephone|telefon|teléfono|téléphone|mobile?\b|whatsapp|handy|anruf|rufen|erreichbar|appele|llam|hotline|landline"
)
_BUSINESS = re.compile(
    r"\b(?:bill|item|sku\b|part\b|case\b|ref\b|po\b|rma\b|zip\b|code|ids?\b|no\b|nr\b|isbn|ean\b|vat\b|tax\b|"
    r"lot\b|model)|order|purchase|invoice|receipt|ticket|track|shipment|parcel|package|deliver|product|article|serial|"
    r"refer|customer|client|account|contract|policy|booking|reservation|flight|return|refund|quote|postcode|postal|_ids?\b|"
    r"payment|transaction|amount|price|bestell|auftrag|rechnung|kunden|sendung|artikel|vertrag|commande|facture|pedido|"
    r"factura|version|batch|meter|license|licence|warranty|catalog"
)


def phone_spans(text: str, regions: Sequence[str]) -> Iterator[tuple[int, int, float]]:
    """(first character, character behind the last, certainty) of each phone number.

    Args:
        text: Any text.
        regions: Countries whose numbers are recognised without a country code.
    """
    for found in _candidates(text):
        start, number = found.start(), found[0]
        # Of "(212) 555-0123 (home)" the bracket at the end is no part of it.
        number = number.rstrip(" (-./\u2013\u00a0")
        if number.count("(") != number.count(")"):
            number = number.lstrip("(") if number.startswith("(") else number
        start = found.start() + found[0].index(number)
        if not 7 <= sum(letter.isdigit() for letter in number) <= 15:
            continue
        certainty = _certainty(text, start, number, regions)
        if certainty:
            yield start, start + len(number), certainty


def _candidates(text: str) -> Iterator[re.Match[str]]:
    """`_CANDIDATE.finditer`, but beginning at the digits."""
    at = 0
    while digits := _DIGITS.search(text, at):
        found = _CANDIDATE.search(text, max(at, digits.start() - 2))  # behind + and (
        if found is None:
            return
        yield found
        at = found.end()


def is_called_personal(text: str, start: int) -> bool:
    """Whether a word shortly before a number says that it is a person's."""
    return _PERSONAL.search(_before(text, start)) is not None


def belongs_to_business(text: str, start: int) -> bool:
    """Whether the nearest telling word before a number is one of business."""
    return _nearest(text, start) == "business"


def _certainty(text: str, start: int, number: str, regions: Sequence[str]) -> float:
    grouped = len(re.findall(r"\d+", number)) > 1
    international = number.startswith(("+", "00"))
    if not grouped and not international and not is_called_personal(text, start):
        return 0.0  # a run of digits that nobody calls a phone number: most numbers of a business
    nearest = _nearest(text, start)
    if international:
        written = "+" + number[2:] if number.startswith("00") else number
        if _is_valid(written, None) or (number.startswith("+") and nearest == "personal"):
            return 0.95 if number.startswith("+") or nearest != "business" else 0.0
    if nearest == "business":
        return 0.0
    if nearest == "personal" and any(_is_valid(number, region) for region in regions):
        return 0.9
    return 0.5 if grouped and any(_is_written_so(number, region) for region in regions) else 0.0


def _nearest(text: str, start: int) -> str | None:
    before = _before(text, start)
    last = {
        kind: max((found.end() for found in pattern.finditer(before)), default=-1)
        for kind, pattern in (("personal", _PERSONAL), ("business", _BUSINESS))
    }
    if last["personal"] >= 0 and _NUMBER.search(before, last["personal"]):
        last["personal"] = -1  # that word spoke of the number between
    if max(last.values()) < 0:
        return None
    return max(last, key=lambda kind: last[kind])


def _before(text: str, start: int) -> str:
    return text[max(0, start - LOOK_BACK) : start].lower()


def _is_valid(number: str, region: str | None) -> bool:
    import phonenumbers

    try:
        return phonenumbers.is_valid_number(phonenumbers.parse(number, region))
    except phonenumbers.NumberParseException:
        return False


def _is_written_so(number: str, region: str) -> bool:
    """Whether the digits stand in the groups in which the region writes this number."""
    import phonenumbers

    try:
        parsed = phonenumbers.parse(number, region)
    except phonenumbers.NumberParseException:
        return False
    if not phonenumbers.is_valid_number(parsed):
        return False
    written = phonenumbers.format_number(parsed, phonenumbers.PhoneNumberFormat.NATIONAL)
    return re.findall(r"\d+", written) == re.findall(r"\d+", number)
