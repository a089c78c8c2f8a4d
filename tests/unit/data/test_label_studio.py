"""Label Studio: what we write is valid by its own SDK, and what its raters say comes back."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import orjson
import pytest

from steersman.data.export import export, label_studio_config, label_studio_task, read_any
from steersman.data.format import Skip
from steersman.data.formats import FORMATS
from steersman.data.importing import ImportJob, _checked, _converted, _Unread
from steersman.data.records import Aspects, Demonstration, Feedback, Preference, Prompt, Row, row_type_of
from steersman.errors import DataError

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


def task_of(data: dict[str, Any], kind: str, value: dict[str, Any], name: str = "label") -> dict[str, Any]:
    return {"data": data, "annotations": [{"result": [{"from_name": name, "type": kind, "value": value}]}]}


def test_stars_mean_the_scale_of_the_row() -> None:
    row = Aspects.model_validate(
        {
            "prompt": PROMPT,
            "completion": GOOD,
            "aspects": {"a": 4, "b": 0, "c": 55.0},
            "scales": {"a": (0, 4), "c": (0, 100)},
        }
    )
    task = label_studio_task(row)
    results = task["annotations"][0]["result"]
    assert [result["value"]["rating"] for result in results] == [5, 0, 3]
    results[0]["value"]["rating"] = 1
    (made,) = back(task)
    assert isinstance(made, Aspects)
    assert made.aspects == {"a": 0.0, "b": 0.0, "c": 55.0}


def test_a_projects_own_texts_and_words_are_read_and_others_refused() -> None:
    texts = {"prompt": "q", "answer_1": "a", "answer_2": "b"}
    (made,) = back(task_of(texts, "pairwise", {"selected": "right"}))
    assert made == Preference.model_validate({"prompt": PROMPT, "chosen": BAD, "rejected": GOOD})
    (thumb,) = back(task_of({"prompt": "q", "completion": "a"}, "choices", {"choices": ["Yes"]}))
    assert thumb == Feedback.model_validate({"prompt": PROMPT, "completion": GOOD, "label": True})
    with pytest.raises(ValueError, match="label is 'perhaps'"):
        back(task_of({"prompt": "q", "completion": "a"}, "choices", {"choices": ["perhaps"]}))
    both = task_of(texts, "pairwise", {"selected": "both"})
    (skipped,) = _converted(ImportJob(FORMATS["label-studio"], ()), both, _Unread(Counter()))
    assert skipped == Skip("selected is 'both'; expected left or right")


def test_names_of_aspects_are_escaped_and_returns_refused(tmp_path: Path) -> None:
    config = label_studio_config(Aspects, ['"kind" & <right>'])
    assert [tag.get("name") for tag in ElementTree.fromstring(config).iter("Rating")] == ['"kind" & <right>']
    source = tmp_path / "r.jsonl"
    source.write_bytes(orjson.dumps({"prompt": PROMPT, "completion": GOOD, "reward": 1.0}))
    with pytest.raises(DataError, match="a return has no form in Label Studio"):
        export(source, tmp_path / "r.json", "label-studio")


def test_parquet_keeps_every_field_of_a_turn(tmp_path: Path) -> None:
    answer = {"role": "assistant", "content": "a", "reasoning_content": "why", "name": "bot"}
    source = tmp_path / "r.jsonl"
    source.write_bytes(orjson.dumps({"messages": [*PROMPT, answer]}))
    export(source, tmp_path / "r.parquet", "parquet")
    (row,) = read_any(tmp_path / "r.parquet")
    assert row.to_dict()["messages"][1] == answer
