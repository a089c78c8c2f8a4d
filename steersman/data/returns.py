"""What each kind of judgement is worth as the return of a conversation, in [-1, 1]: one rule for files and releases.

comparison   chosen 2 s - 1, rejected 1 - 2 s,   s: share of the labelers who preferred `chosen` (1 without a word)
ranking      of each answer, the mean of its comparisons with the others
ratings      2 (value - worst) / (best - worst) - 1 of `steersman.data.aspects`' value
thumb        up 1, down -1
edit         the better text 1, what it replaced -1
outcome      good 1, bad -1, of everything that the assistant said in the conversation
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from steersman.data.aspects import OWN_SCALE, Rule, weights_of
from steersman.data.pairs import Preferred
from steersman.data.records import Aspects, Feedback, Preference, Return, Row
from steersman.errors import DataError

#: What `ilql.learnFrom` may name, by the row type of the files.
SOURCES: dict[str, type[Row]] = {
    "returns": Return,
    "preferences": Preference,
    "feedback": Feedback,
    "aspects": Aspects,
}
_JUDGEMENTS = ("chosen", "rejected", "completion", "label", "aspects", "scales", "margin", "soft_label")


def returns_of(row: Row, rule: Rule) -> Iterator[Return]:
    """The returns that one row of a file holds: two of a comparison, none of ratings without an aspect that counts.

    Args:
        rule: what ratings are worth.
    """
    if isinstance(row, Return):
        yield row
        return
    origin = {name: value for name, value in row.to_dict().items() if name not in _JUDGEMENTS}
    if isinstance(row, Preference):
        share = 1.0 if row.soft_label is None else row.soft_label
        for answer, worth, mark in ((row.chosen, 2 * share - 1, "+"), (row.rejected, 1 - 2 * share, "-")):
            own = {"id": f"{row.id}#{mark}"} if row.id else {}
            yield Return.model_validate({**origin, **own, "completion": answer, "reward": worth})
    elif isinstance(row, Feedback):
        yield Return.model_validate({**origin, "completion": row.completion, "reward": 1.0 if row.label else -1.0})
    elif isinstance(row, Aspects):
        worth_of = rating_return(row.to_dict(), rule)
        if worth_of is not None:
            yield Return.model_validate({**origin, "completion": row.completion, "reward": worth_of})


def rating_return(row: Mapping[str, Any], rule: Rule) -> float | None:
    """What ratings say of an answer; None where no rated aspect counts."""
    found = rule.value(row, row["aspects"])
    if found is None or rule.decide != "sum":
        return None if found is None else 2 * found / rule.best - 1
    counted = weights_of(row["aspects"], rule.weights)
    total = sum(map(abs, counted.values()))
    steps = OWN_SCALE[1] - OWN_SCALE[0]
    worst = steps * sum(weight for weight in counted.values() if weight < 0) / total
    return 2 * (found - worst) / steps - 1


def ranked_returns(found: Iterable[Preferred]) -> dict[int, float]:
    """What comparisons of an item's answers say of each, by the answer's number."""
    worth: dict[int, list[float]] = {}
    for pair in found:
        worth.setdefault(pair.chosen, []).append(2 * pair.share - 1)
        worth.setdefault(pair.rejected, []).append(1 - 2 * pair.share)
    return {answer: sum(values) / len(values) for answer, values in sorted(worth.items())}


def check_they_differ(rewards: Iterable[float], where: str) -> None:
    """Raises DataError where every return is the same, from which nothing can be preferred."""
    found = set(rewards)
    if len(found) < 2:
        raise DataError(
            f"{where}: every return is {found.pop() if found else 'missing'}; ILQL learns from what was worth more and "
            "what less"
        )


def conversation(turns: list[dict[str, Any]]) -> dict[str, Any]:
    """`prompt` and `completion` with every assistant turn of a conversation in the completion."""
    first = next((number for number, turn in enumerate(turns) if turn["role"] == "assistant"), len(turns))
    return {"prompt": turns[:first], "completion": turns[first:]}
