"""Label Studio tasks, back and forth."""

from __future__ import annotations

from typing import Any

from steersman.data.format import Converted, ImportOptions, Skip


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
    for annotation in done:
        row = task | dict(record["data"]) | _circumstances(annotation)
        rated = dict(row.pop("aspects", None) or {})
        for result in annotation["result"]:
            value = result["value"]
            if result["type"] == "pairwise":
                sides = ("answer_1", "answer_2") if value["selected"] == "left" else ("answer_2", "answer_1")
                row["chosen"], row["rejected"] = (row[side] for side in sides)
            elif result["type"] == "choices":
                row["label"] = value["choices"][0] == "good"
            elif result["type"] == "rating":
                name, rating = result["from_name"], value["rating"]
                before = rated.get(name)  # a mean has no whole star: it stays while nobody moves it
                kept = before if before is not None and round(before) == rating else rating
                row.setdefault("aspects", {})[name] = kept
            elif result["type"] == "textarea":
                text = value["text"] if isinstance(value["text"], str) else "\n".join(value["text"])
                row["messages"] = [*row.pop("prompt"), {"role": "assistant", "content": text}]
        for side in ("answer_1", "answer_2"):
            row.pop(side, None)
        yield row


def _circumstances(annotation: dict[str, Any]) -> dict[str, Any]:
    """Who said it, when, and how long it took."""
    rater = annotation.get("completed_by")
    if isinstance(rater, dict):
        rater = rater.get("email") or rater.get("username") or rater.get("id")
    found = {"labeler": rater, "time": annotation.get("created_at"), "seconds": annotation.get("lead_time")}
    known = {name: value for name, value in found.items() if value is not None}
    return known | ({"labeler": str(rater)} if rater is not None else {})
