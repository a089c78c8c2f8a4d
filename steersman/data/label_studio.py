"""Label Studio tasks, back and forth."""

from __future__ import annotations

from typing import Any

from steersman.data.format import Converted, ImportOptions, Skip, message
from steersman.errors import DataError

_SIDES = {"left": ("answer_1", "answer_2"), "right": ("answer_2", "answer_1")}
_CHOICES = {"good": True, "bad": False}
_SPEAKERS = {"prompt": "user", "answer_1": "assistant", "answer_2": "assistant", "completion": "assistant"}
_STARS = 5


def label_studio(record: dict[str, Any], options: ImportOptions) -> Converted:
    """Tasks exported by `steersman data export --to label-studio`, or by Label Studio with the same configuration.

    Each annotation that says something gives one row with its rater (`labeler`), time and seconds; cancelled ones are
    left out. A text written to a prompt makes a demonstration.
    """
    done = [a for a in record.get("annotations") or [] if not a.get("was_cancelled")]
    task = {} if record.get("id") is None else {"id": f"task-{record['id']}"}
    if not done:
        if "messages" in record["data"]:
            yield task | dict(record["data"])
        else:
            yield Skip("task without an annotation")
    said = {
        name: [message(_SPEAKERS[name], value)] if name in _SPEAKERS and isinstance(value, str) else value
        for name, value in record["data"].items()
    }
    for annotation in done:
        row: dict[str, Any] = {**task, **said, **_circumstances(annotation)}
        rated = dict(row.pop("aspects", None) or {})
        for result in annotation["result"]:
            value = result["value"]
            if result["type"] == "pairwise":
                if value["selected"] not in _SIDES:
                    raise DataError(f"selected is {value['selected']!r}; expected left or right")
                row["chosen"], row["rejected"] = (row[side] for side in _SIDES[value["selected"]])
            elif result["type"] == "choices":
                choice = value["choices"][0]
                row["label"] = _CHOICES.get(choice, choice)  # other words are read as any label's
            elif result["type"] == "rating":
                name, rating = result["from_name"], value["rating"]
                before = rated.get(name)  # a mean has no whole star: it stays while nobody moves it
                scale = (row.get("scales") or {}).get(name)
                moved = before is None or stars(before, scale) != rating
                row.setdefault("aspects", {})[name] = _rating(rating, scale) if moved else before
            elif result["type"] == "textarea":
                text = value["text"] if isinstance(value["text"], str) else "\n".join(value["text"])
                row["messages"] = [*row.pop("prompt"), {"role": "assistant", "content": text}]
        for side in ("answer_1", "answer_2"):
            row.pop(side, None)
        yield row


def stars(rating: float, scale: tuple[float, float] | None) -> int:
    """A rating in Label Studio's whole stars, 1 to 5; one without a scale is taken to be in stars."""
    low, high = _ends(scale)
    return round(1 + (_STARS - 1) * (rating - low) / (high - low))


def _rating(given: int, scale: tuple[float, float] | None) -> float:
    low, high = _ends(scale)
    return low + (given - 1) / (_STARS - 1) * (high - low)


def _ends(scale: tuple[float, float] | None) -> tuple[float, float]:
    return scale if scale and scale[0] < scale[1] else (1, _STARS)


def _circumstances(annotation: dict[str, Any]) -> dict[str, Any]:
    """Who said it, when, and how long it took."""
    rater = annotation.get("completed_by")
    if isinstance(rater, dict):
        rater = rater.get("email") or rater.get("username") or rater.get("id")
    found = {"labeler": rater, "time": annotation.get("created_at"), "seconds": annotation.get("lead_time")}
    known = {name: value for name, value in found.items() if value is not None}
    return known | ({"labeler": str(rater)} if rater is not None else {})
