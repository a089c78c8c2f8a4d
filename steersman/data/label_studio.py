"""Label Studio tasks, back and forth."""

from __future__ import annotations

from typing import Any

from steersman.data.format import Converted, ImportOptions, Skip


def label_studio(record: dict[str, Any], options: ImportOptions) -> Converted:
    """Tasks exported by `steersman data export --to label-studio`, or by Label Studio with the same configuration.

    Each annotation that says something gives one row; cancelled ones are left out.
    """
    done = [a for a in record.get("annotations") or [] if not a.get("was_cancelled")]
    if not done:
        if "messages" in record["data"]:
            yield dict(record["data"])
        else:
            yield Skip("task without an annotation")
    for annotation in done:
        row = dict(record["data"])
        for result in annotation["result"]:
            value = result["value"]
            if result["type"] == "pairwise":
                sides = ("answer_1", "answer_2") if value["selected"] == "left" else ("answer_2", "answer_1")
                row["chosen"], row["rejected"] = (row[side] for side in sides)
            elif result["type"] == "choices":
                row["label"] = value["choices"][0] == "good"
            elif result["type"] == "rating":
                row.setdefault("aspects", {})[result["from_name"]] = value["rating"]
        for side in ("answer_1", "answer_2"):
            row.pop(side, None)
        yield row
