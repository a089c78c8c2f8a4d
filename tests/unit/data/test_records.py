"""Row types, and reading and writing them with errors that name file, line, field, reason and mend."""

from __future__ import annotations

import gzip
import subprocess
import sys
from pathlib import Path
from typing import Any

import orjson
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from steersman.data.records import (
    Aspects,
    Demonstration,
    Feedback,
    Message,
    Preference,
    Prompt,
    Row,
    parse_row,
    read_jsonl,
    read_lines,
    row_type_of,
    write_jsonl,
)
from steersman.errors import DataError

USER = {"role": "user", "content": "Hi"}
ANSWER = {"role": "assistant", "content": "Hello"}
OTHER = {"role": "assistant", "content": "Go away"}


def preference(**changes: Any) -> dict[str, Any]:
    return {"prompt": [USER], "chosen": [ANSWER], "rejected": [OTHER]} | changes


def error_of(row_type: type[Row], row: Any) -> str:
    with pytest.raises(DataError) as caught:
        parse_row(orjson.dumps(row), row_type, "train.jsonl:17")
    return str(caught.value)


@pytest.mark.parametrize(
    ("row_type", "row", "message"),
    [
        (Demonstration, {"messages": [USER, {"role": "assistant", "content": " "}]},
         "train.jsonl:17: messages: assistant message is empty; remove the row or restore its text"),
        (Demonstration, {"messages": [ANSWER]}, "train.jsonl:17: messages: no user turn"),
        (Demonstration, {"messages": [USER]}, "train.jsonl:17: messages: ends with role 'user'"),
        (Demonstration, {"messages": [USER, {"role": "system", "content": "x"}, ANSWER]},
         "train.jsonl:17: messages[1]: a system turn after the first turn; move it to the front"),
        (Preference, preference(rejected=[ANSWER]), "train.jsonl:17: rejected: the same as chosen; remove the pair"),
        (Preference, preference(prompt=[USER, ANSWER]), "train.jsonl:17: prompt: the last turn is of role 'assistant'"),
        (Preference, preference(prompt=[]), "train.jsonl:17: prompt: empty list; add at least one message"),
        (Preference, preference(margin=-1), "train.jsonl:17: margin: input should be greater than or equal to 0"),
        (Preference, preference(soft_label=1.5), "train.jsonl:17: soft_label: input should be less than or equal to 1"),
        (Preference, {"prompt": [USER], "chosen": [ANSWER]}, "train.jsonl:17: rejected: missing; add it"),
        (Preference, preference(chosen=[{"role": "bot", "content": "x"}]), "train.jsonl:17: chosen[0].role: input"),
        (Preference, preference(chosen=[USER, ANSWER]), "train.jsonl:17: chosen: begins with role 'user'"),
        (Preference, preference(chosen=[{"role": "assistant", "content": 5}]), "train.jsonl:17: chosen[0].content"),
        (Feedback, {"prompt": [USER], "completion": [ANSWER], "label": "yes"}, "train.jsonl:17: label: input"),
        (Aspects, {"prompt": [USER], "completion": [ANSWER], "aspects": {"a": 9}, "scales": {"a": [0, 4]}},
         "train.jsonl:17: aspects: a is 9, outside 0 to 4"),
        (Prompt, [USER], "train.jsonl:17: row: "),
    ],
)  # fmt: skip
def test_a_wrong_row_is_named_with_field_and_mend(row_type: type[Row], row: Any, message: str) -> None:
    assert error_of(row_type, row).startswith(message)


def test_tool_turns_and_metadata_are_kept() -> None:
    call = {"id": "c1", "type": "function", "function": {"name": "get_order", "arguments": "{}"}}
    row = {
        "prompt": [
            USER,
            {"role": "assistant", "content": "", "tool_calls": [call]},
            {"role": "tool", "content": "shipped", "tool_call_id": "c1"},
        ],
        "facts": {"order": "shipped", "none": None},
        "intent": "track",
    }
    assert parse_row(orjson.dumps(row), Prompt, "x:1").to_dict() == row


def test_row_types_are_told_apart_by_their_keys() -> None:
    assert row_type_of({"messages": []}) is Demonstration
    assert row_type_of({"prompt": [], "chosen": []}) is Preference
    assert row_type_of({"prompt": [], "completion": [], "label": True}) is Feedback
    assert row_type_of({"prompt": [], "completion": [], "aspects": {}}) is Aspects
    assert row_type_of({"prompt": []}) is Prompt
    with pytest.raises(DataError, match="fit no row type"):
        row_type_of({"text": "x"})


def test_reading_streams_plain_and_gzip_and_passes_blank_lines(tmp_path: Path) -> None:
    lines = b"\xef\xbb\xbf" + orjson.dumps(preference()) + b"\r\n\n" + orjson.dumps(preference(margin=1)) + b"\n"
    for name, data in (("a.jsonl", lines), ("a.jsonl.gz", gzip.compress(lines))):
        (tmp_path / name).write_bytes(data)
        assert [row.margin for row in read_jsonl(tmp_path / name, Preference)] == [None, 1.0]


def test_reading_names_the_line(tmp_path: Path) -> None:
    path = tmp_path / "train.jsonl"
    path.write_bytes(orjson.dumps(preference()) + b"\n\n" + b'{"prompt": [\n')
    with pytest.raises(DataError, match=r"^train\.jsonl:3: not valid JSON .* mend or remove the line$"):
        list(read_jsonl(path, Preference))
    path.write_bytes(b'{"prompt": "\xff"}')
    with pytest.raises(DataError, match=r"^train\.jsonl:1: not UTF-8 \(byte 13 is 0xff\); save the file as UTF-8$"):
        list(read_jsonl(path, Preference))
    path.write_bytes(b"\n")
    with pytest.raises(DataError, match=r"^train\.jsonl: no rows"):
        list(read_jsonl(path, Preference))
    with pytest.raises(DataError, match="no such file"):
        list(read_jsonl(tmp_path / "none.jsonl", Preference))
    path.write_bytes(gzip.compress(orjson.dumps(preference()) + b"\n" + bytes(range(256)) * 999)[:-20])
    with pytest.raises(DataError, match=r"^train\.jsonl:\d: "):
        list(read_jsonl(path, Preference))


def test_an_endless_line_is_named_and_passed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("steersman.data.records.MAX_LINE_BYTES", 1 << 20)
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"1\n" + b"x" * (3 << 20) + b"\n2\n")
    found = list(read_lines(path))
    assert [number for number, _ in found] == [1, 2, 3]
    assert str(found[1][1]) == "a.jsonl:2: longer than 1 MiB; split the row or remove it"


texts = st.text(min_size=1, max_size=20).filter(lambda text: not text.isspace())
turns = st.builds(lambda content: {"role": "assistant", "content": content}, texts)


@settings(deadline=None, max_examples=50, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.lists(
        st.builds(
            lambda prompt, chosen, rejected, margin, meta: {
                "prompt": [{"role": "user", "content": prompt}],
                "chosen": chosen,
                "rejected": [*rejected, {"role": "assistant", "content": "other"}],
                "margin": margin,
                "meta": meta,
            },
            texts,
            st.lists(turns, min_size=1, max_size=3),
            st.lists(turns, max_size=2),
            st.floats(0, 1e9),
            st.dictionaries(st.text(max_size=5), st.one_of(st.integers(-(2**53), 2**53), st.booleans()), max_size=3),
        ).filter(lambda row: row["chosen"] != row["rejected"]),
        min_size=1,
        max_size=5,
    )
)
def test_what_is_written_is_read(tmp_path_factory: pytest.TempPathFactory, rows: list[dict[str, Any]]) -> None:
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl.gz"
    typed = [Preference.model_validate(row) for row in rows]
    count, digest = write_jsonl(path, typed)
    assert count == len(rows)
    assert [row.to_dict() for row in read_jsonl(path, Preference)] == rows
    assert write_jsonl(path, typed)[1] == digest, "the bytes depend on the rows only"


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("old")

    def rows() -> Any:
        yield Preference.model_validate(preference())
        raise RuntimeError

    with pytest.raises(RuntimeError):
        write_jsonl(path, rows())
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_messages_know_when_they_are_blank() -> None:
    assert Message(role="assistant", content=" \n").blank
    assert not Message(role="assistant", content="", tool_calls=[{}]).blank


def test_importing_the_row_types_is_light() -> None:
    code = (
        "import sys, steersman.data.records; "
        "print([m for m in ('torch', 'pandas', 'datasets', 'pyarrow', 'numpy') if m in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"
