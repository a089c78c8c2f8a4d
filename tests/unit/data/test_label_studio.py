"""Label Studio: what we write is valid by its own SDK, and what its raters say comes back."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest

from steersman.data.export import label_studio_config, label_studio_task
from steersman.data.formats import FORMATS
from steersman.data.importing import ImportJob, _checked, _converted, _Unread
from steersman.data.records import Aspects, Demonstration, Feedback, Preference, Prompt, Row, row_type_of

SAID = (("user", "q"), ("assistant", "a"), ("assistant", "b"))
PROMPT, GOOD, BAD = ([{"role": role, "content": text}] for role, text in SAID)
ROWS: list[Row] = [
    Preference.model_validate({"prompt": PROMPT, "chosen": GOOD, "rejected": BAD, "id": "r1"}),
    Preference.model_validate({"prompt": PROMPT, "chosen": BAD, "rejected": GOOD, "id": "r2"}),
    Feedback.model_validate({"prompt": PROMPT, "completion": GOOD, "label": True}),
    Feedback.model_validate({"prompt": PROMPT, "completion": GOOD, "label": False}),
    Aspects.model_validate(
        {"prompt": PROMPT, "completion": GOOD, "aspects": {"kind": 2.3333, "right": 0}, "scales": {"right": (0, 4)}}
    ),
    Demonstration.model_validate({"messages": PROMPT + GOOD}),
    Prompt.model_validate({"prompt": PROMPT}),
]  # fmt: skip


def back(task: dict[str, Any]) -> list[Row]:
    format = FORMATS["label-studio"]
    rows = _converted(ImportJob(format, ()), task, _Unread(Counter()))
    made = []
    for row in rows:
        assert isinstance(row, dict), row
        content, metadata = _checked(format, row)
        made.append(row_type_of(content).model_validate(content | metadata))
    return made


@pytest.mark.parametrize("row", ROWS, ids=lambda row: type(row).__name__)
def test_every_task_is_valid_by_label_studios_own_validator(row: Row) -> None:
    sdk = pytest.importorskip("label_studio_sdk.label_interface", reason="make test installs it")
    interface = sdk.LabelInterface(label_studio_config(type(row), ["kind", "right"]))
    interface.validate()
    task = label_studio_task(row)
    assert interface.validate_task({"data": task["data"]})
    for annotation in task["annotations"]:
        assert interface._validate_object(annotation, return_errors=True) == []


@pytest.mark.parametrize("row", ROWS[:6], ids=lambda row: type(row).__name__)
def test_what_was_exported_comes_back_the_same(row: Row) -> None:
    (made,) = back(label_studio_task(row))
    assert made == row


def test_raters_times_ids_and_texts_come_back() -> None:
    task = label_studio_task(ROWS[0]) | {"id": 17}
    left, right = (
        [{"from_name": "preference", "to_name": "answer_1,answer_2", "type": "pairwise", "value": {"selected": side}}]
        for side in ("left", "right")
    )
    task["annotations"] = [
        {"completed_by": 5, "lead_time": 7.5, "created_at": "2026-03-04T10:00:00Z", "result": left},
        {"completed_by": {"id": 6, "email": "bob@example.com"}, "result": right},
        {"completed_by": 7, "was_cancelled": True, "result": left},
    ]
    one, two = back(task)
    assert (one.model_extra or {}) == {"labeler": "5", "time": "2026-03-04T10:00:00Z", "seconds": 7.5}
    assert (two.model_extra or {})["labeler"] == "bob@example.com"
    assert one.id == two.id == "r1"
    assert one.chosen == two.rejected  # type: ignore[attr-defined]
    text = {"from_name": "answer", "to_name": "prompt", "type": "textarea", "value": {"text": ["It is", "here."]}}
    written = label_studio_task(ROWS[6]) | {"id": 3, "annotations": [{"completed_by": 1, "result": [text]}]}
    (made,) = back(written)
    assert isinstance(made, Demonstration)
    assert (made.messages[-1].content, made.id) == ("It is\nhere.", "task-3")


def test_a_moved_star_takes_the_place_of_a_mean() -> None:
    task = label_studio_task(ROWS[4])
    task["annotations"][0]["result"][0]["value"]["rating"] = 4
    (made,) = back(task)
    assert isinstance(made, Aspects)
    assert made.aspects == {"kind": 4, "right": 0}
