"""The import pipeline: malformed input is named and passed, duplicates go, prompts stay on one side."""

from __future__ import annotations

import gzip
import json
import random
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import orjson
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from steersman.data.export import export, read_any
from steersman.data.formats import FORMATS, ImportOptions, Skip
from steersman.data.importing import (
    MAX_ROW_BYTES,
    ImportJob,
    Summary,
    _is_plain_metadata,
    convert_rows,
    describe_skips,
    import_to_folder,
)
from steersman.data.plain import is_plain
from steersman.data.records import Preference, Row, read_jsonl
from steersman.data.sources import Record, read_hugging_face, read_records
from steersman.data.splits import SeenSet, Splits, encode, encode_parts, group_key
from steersman.data.table import ColumnMap, canonical_format, table_format
from steersman.errors import ConfigError, DataError, StorageError

ALL_TRAIN = Splits({"train": 1.0})


def hh_row(number: int, answer: str = "good") -> dict[str, str]:
    shared = f"\n\nHuman: question {number}\n\nAssistant:"
    return {"chosen": f"{shared} {answer}", "rejected": f"{shared} bad"}


def lines(*rows: Any) -> bytes:
    return b"".join(row if isinstance(row, bytes) else orjson.dumps(row) + b"\n" for row in rows)


def run(path: Path, format: Any = FORMATS["hh"], **changes: Any) -> tuple[list[dict[str, Any]], Summary]:
    job = ImportJob(format, (str(path),), **changes)
    summary = Summary(job.format.name)
    return [row for row, _ in convert_rows(job, summary, lambda *_: None, lambda *_: None)], summary


def reasons(summary: Summary) -> dict[str, list[str]]:
    return {reason: entry.first for reason, entry in summary.skipped.items()}


# --- malformed input --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("broken", "reason"),
    [
        (
            b'{"chosen": "\n',
            "not valid JSON (unexpected control character in string at column 13); mend or remove the line",
        ),
        (b'{"chosen": "\xe9t\xe9"}\n', "not UTF-8 (byte 13 is 0xe9); save the file as UTF-8"),
        (b'["a", "b"]\n', "a JSON list, expected an object; mend or remove the row"),
        (b"null\n", "a JSON NoneType, expected an object; mend or remove the row"),
        (b'{"chosen": "\\ud800"}\n', "not valid JSON"),
        (lines({"chosen": "x"}), "missing column 'rejected'; check the format and the file"),
        (lines({"chosen": 5, "rejected": None}), "record has another shape than hh"),
        (lines(hh_row(2, "")), "chosen: assistant message is empty; remove the row or restore its text"),
        (lines(hh_row(2, "bad")), "chosen and rejected are the same"),
        (lines({"chosen": "a", "rejected": "b"}), "chosen and rejected share no human turn"),
        (lines(hh_row(2, "x" * 1_000_000)), f"longer than {MAX_ROW_BYTES:,} bytes"),
    ],
)
def test_a_broken_row_in_the_middle_is_named_and_the_rest_read(tmp_path: Path, broken: bytes, reason: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(lines(hh_row(1)) + broken + lines(hh_row(3)))
    rows, summary = run(path)
    assert [row["origin"] for row in rows] == ["a.jsonl:1", "a.jsonl:3"]
    assert summary.read == 3
    ((found, where),) = reasons(summary).items()
    assert found.startswith(reason)
    assert where == ["a.jsonl:2"]
    assert "a.jsonl:2" in describe_skips(summary)


def test_a_truncated_gzip_gives_its_rows_and_names_where_it_breaks(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl.gz"
    draw = random.Random(0)
    whole = gzip.compress(lines(*(hh_row(n, f"good {draw.random()}") for n in range(2000))))
    path.write_bytes(whole[: len(whole) // 2])
    rows, summary = run(path)
    assert 500 < len(rows) < 1500
    last, where = next(reversed(reasons(summary).items()))
    assert last.startswith("damaged file (the gzip stream was cut off)")
    assert where[0].startswith("a.jsonl.gz:")
    path.write_bytes(whole[:300] + b"\0\0\0\0" + whole[304:])
    assert any("damaged file" in reason for reason in reasons(run(path)[1]))


@pytest.mark.parametrize(
    ("text", "kept", "reason"),
    [
        (b'[{"a": "1"},\n{"a": },\n{"a": "3"}]', ["1", "3"], "a.json:2: not valid JSON"),
        (b'[{"a": "1"},\n{"a": "2"\n', ["1"], "a.json:3: not valid JSON"),
        (b'[{"a": "1"},\n{"a": "\xff"},\n{"a": "3"}]', ["1", "3"], "a.json:2: not UTF-8"),
        (b'[{"a": "1"},\n7,\n{"a": "3"}]', ["1", "3"], "a.json:2: a JSON int, expected an object"),
        (b'[{"a": "1"}', ["1"], "a.json:1: the array has no closing bracket"),
    ],
)
def test_broken_json_arrays(tmp_path: Path, text: bytes, kept: list[str], reason: str) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(text)
    records = list(read_records(path))
    assert [record.data["a"] for record in records if isinstance(record.data, dict)] == kept
    (error,) = [record.data for record in records if isinstance(record.data, DataError)]
    assert str(error).startswith(reason)


@pytest.mark.parametrize(
    ("text", "kept", "reason"),
    [
        (b"a,b\n1,2\n3\n5,6\n", ["1", "5"], "a.csv:3: 1 columns, expected 2; check quotes and separators"),
        (b"a,b\n1,2\n3,4,5\n5,6\n", ["1", "5"], "a.csv:3: 3 columns, expected 2"),
        (b"a,b\n1,2\n\xe9,4\n5,6\n", ["1", "5"], "a.csv:3: not UTF-8; save the file as UTF-8"),
        (b'a,b\n1,2\n"3\n4,5\n', ["1"], "a.csv:3: 1 columns, expected 2"),
    ],
)
def test_broken_csv(tmp_path: Path, text: bytes, kept: list[str], reason: str) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes(text)
    records = list(read_records(path))
    assert [record.data["a"] for record in records if isinstance(record.data, dict)] == kept
    (error,) = [record.data for record in records if isinstance(record.data, DataError)]
    assert str(error).startswith(reason)


def test_csv_line_numbers_count_lines_within_quotes(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes(b'\xef\xbb\xbfa,b\r\n"1\r\n1",2\r\n\r\n3,4\r\n5\r\n')
    records = list(read_records(path))
    assert [record.line for record in records] == [2, 5, 6]
    assert records[0].data == {"a": "1\r\n1", "b": "2"}


def test_broken_parquet_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    path.write_bytes(b"PAR1 nonsense PAR1")
    (record,) = read_records(path)
    assert str(record.data).startswith("a.parquet:1: damaged Parquet")


def test_nothing_is_left_behind_when_nothing_can_be_imported(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"{\n")
    job = ImportJob(FORMATS["hh"], (str(path),))
    with pytest.raises(DataError, match=r"nothing to import: 1 records read; left out: 1 x not valid JSON.*a\.jsonl:1"):
        import_to_folder(job, tmp_path / "out", ALL_TRAIN)
    with pytest.raises(DataError, match=r"none\.jsonl: no such file"):
        import_to_folder(ImportJob(FORMATS["hh"], (str(tmp_path / "none.jsonl"),)), tmp_path / "out", ALL_TRAIN)
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.jsonl"]
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").touch()
    with pytest.raises(StorageError, match="is not empty"):
        import_to_folder(job, tmp_path / "out", ALL_TRAIN)


broken_bytes = st.lists(
    st.one_of(
        st.binary(max_size=40),
        st.integers(0, 5).map(lambda n: orjson.dumps(hh_row(n))),
        st.sampled_from([b'{"chosen":', b"[", b"]", b'"', b"\\", b"{}", b"\n", b",", b"\xef\xbb\xbf", b"\x1f\x8b"]),
    ),
    max_size=12,
).map(b"".join)


@settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.too_slow])
@given(broken_bytes, st.sampled_from(["a.jsonl", "a.json", "a.csv", "a.tsv", "a.jsonl.gz"]))
def test_no_bytes_stop_a_reader(tmp_path_factory: pytest.TempPathFactory, data: bytes, name: str) -> None:
    path = tmp_path_factory.mktemp("any") / name
    path.write_bytes(data)
    for record in read_records(path):
        assert record.line >= 1
        if isinstance(record.data, DataError):
            assert str(record.data).startswith(f"{name}:")


objects = st.lists(
    st.dictionaries(st.text(max_size=5), st.recursive(st.one_of(st.text(max_size=9), st.integers(-9, 9), st.booleans(),
    st.none()), lambda inner: st.lists(inner, max_size=3), max_leaves=4), max_size=4), max_size=8)  # fmt: skip


@settings(deadline=None, max_examples=100, suppress_health_check=[HealthCheck.too_slow])
@given(objects, st.sampled_from([None, 1]), st.integers(1, 40))
def test_json_arrays_are_read_as_the_library_reads_them(
    tmp_path_factory: pytest.TempPathFactory, rows: list[dict[str, Any]], indent: int | None, chunk: int
) -> None:
    path = tmp_path_factory.mktemp("array") / "a.json"
    path.write_text(json.dumps(rows, indent=indent, ensure_ascii=False))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("steersman.data.sources._CHUNK", chunk)
        assert [record.data for record in read_records(path)] == rows


@settings(deadline=None, max_examples=300, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.lists(
        st.lists(
            st.sampled_from(["\n\nHuman:", "\n\nAssistant:", "\nHuman:", " a", "b", " ", "\n", "\u00e9"]), max_size=9
        ),
        min_size=3,
        max_size=3,
    )
)
def test_what_passes_the_short_check_passes_the_model(parts: list[list[str]]) -> None:
    shared, chosen, rejected = ("".join(part) for part in parts)
    record = {"chosen": shared + chosen, "rejected": shared + rejected}
    for pair in FORMATS["hh"].convert(record, ImportOptions()):
        if isinstance(pair, Skip):
            continue
        for turns in pair.values():
            assert all(turn.keys() == {"role", "content"} and type(turn["content"]) is str for turn in turns)
            assert {turn["role"] for turn in turns} <= {"user", "assistant"}
        if is_plain(pair, "preference"):
            Preference.model_validate({"id": "a:1", **pair})
            assert encode_parts(pair, {"id": "a:1"}) == encode({"id": "a:1", **pair})


def test_metadata_that_is_not_plain_goes_the_long_way(tmp_path: Path) -> None:
    assert _is_plain_metadata({"source": "hh", "licence": "MIT"})
    assert not _is_plain_metadata({"source": 3})
    assert not _is_plain_metadata({"split": "train"})
    (tmp_path / "a.jsonl").write_bytes(lines(hh_row(1)))
    rows, summary = run(tmp_path / "a.jsonl", metadata={"customer": 3})
    assert not rows
    assert any("customer" in reason for reason in summary.skipped)


def test_the_short_check_takes_nearly_every_real_pair(shared_data: Path) -> None:
    rows, _ = run(shared_data / "hh-rlhf" / "helpful-base" / "train.jsonl.gz")
    assert all(is_plain(row, "preference") for row in rows)


# --- duplicates, splits, tables ---------------------------------------------------------------------------------


def test_duplicates_are_removed_across_files(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "x.jsonl").write_bytes(lines(hh_row(1), hh_row(2), hh_row(1)))
    files = (str(tmp_path / "a" / "x.jsonl"), str(tmp_path / "b" / "x.jsonl"))
    summary = import_to_folder(ImportJob(FORMATS["hh"], files), tmp_path / "out", ALL_TRAIN)
    assert (summary.read, summary.written, summary.duplicates) == (6, 2, 4)
    rows = list(read_jsonl(tmp_path / "out" / "train.jsonl", Preference))
    origins = [(row.model_extra or {})["origin"] for row in rows]
    assert origins == ["a/x.jsonl:1", "a/x.jsonl:2"], "files of one name are told apart"
    assert json.loads((tmp_path / "out" / "import.json").read_bytes())["duplicates"] == 4


def test_every_skipped_row_is_in_the_file(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(lines(*(hh_row(n, "bad" if n % 2 else "good") for n in range(40))))
    import_to_folder(ImportJob(FORMATS["hh"], (str(path),)), tmp_path / "out", ALL_TRAIN)
    skipped = [json.loads(line) for line in (tmp_path / "out" / "skipped.jsonl").read_text().splitlines()]
    assert [entry["where"] for entry in skipped] == [f"a.jsonl:{n}" for n in range(2, 41, 2)]


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(st.integers(0, 400), max_size=300))
def test_seen_set_is_a_set(values: list[int]) -> None:
    seen, plain = SeenSet(recent=16), set()
    for value in values:
        fingerprint = value * 2**55 % 2**64 + value
        assert seen.add(fingerprint) is (fingerprint not in plain)
        plain.add(fingerprint)


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.text(max_size=30), st.integers(0, 3))
def test_splits_ignore_case_and_white_space(text: str, seed: int) -> None:
    splits = Splits({"train": 0.5, "test": 0.5}, seed=seed)

    def side(content: str) -> str:
        return splits.of({"prompt": [{"role": "system", "content": "s"}, {"role": "user", "content": content}]})

    assert side(f"{text} q") == side(f"  {text}\n\tq ")
    assert group_key({"prompt": [{"role": "user", "content": "ÄB  c"}]}) == "äb c"


def test_split_shares_and_metadata_groups() -> None:
    splits = Splits({"train": 0.8, "valid": 0.1, "test": 0.1})
    sides = [splits.of_key(str(number)) for number in range(20_000)]
    assert abs(sides.count("train") / 20_000 - 0.8) < 0.02
    by_intent = Splits({"train": 0.5, "test": 0.5}, by="intent")
    assert len({by_intent.of({"intent": "refund", "messages": []}) for _ in range(5)}) == 1
    with pytest.raises(ConfigError, match="must be positive and sum to 1"):
        Splits({"train": 0.5})


def test_no_prompt_of_the_real_data_leaks_between_the_sides(shared_data: Path, tmp_path: Path) -> None:
    files = tuple(map(str, sorted((shared_data / "hh-rlhf").glob("helpful*/*.jsonl.gz"))))
    import_to_folder(ImportJob(FORMATS["hh"], files), tmp_path / "out", Splits({"train": 0.9, "test": 0.1}))
    first = {
        side: {row.prompt[0].content.lower() for row in read_jsonl(tmp_path / "out" / f"{side}.jsonl", Preference)}
        for side in ("train", "test")
    }
    assert not first["train"] & first["test"]
    assert len(first["test"]) > 50


def table(path: Path, rows: list[dict[str, Any]], columns: dict[str, str], **changes: Any) -> Any:
    path.write_bytes(lines(*rows))
    return run(path, table_format(ColumnMap(columns, **changes)))


def test_column_maps_make_every_row_type(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    source = {"q": "Q?", "a": "A.", "b": "B.", "good": "yes", "score": "4", "who": 7, "sys": "Be kind."}
    (row,), _ = table(path, [source], {"prompt": "q", "answer": "a", "system": "sys", "customer": "who"})
    assert [turn["role"] for turn in row["messages"]] == ["system", "user", "assistant"]
    assert row["customer"] == "7"
    (row,), _ = table(path, [source], {"prompt": "q", "answer": "a", "label": "good"})
    assert row["label"] is True
    (row,), _ = table(path, [source], {"prompt": "q", "answer": "a", "aspects.help": "score"})
    assert row["aspects"] == {"help": 4.0}
    (row,), _ = table(path, [source], {"prompt": "q", "chosen": "a", "rejected": "b", "margin": "score"})
    assert (row["chosen"][0]["content"], row["margin"]) == ("A.", 4.0)
    (row,), _ = table(path, [{**source, "s": {"help": 3}}], {"prompt": "q", "answer": "a", "aspects.help": "s.help"})
    assert row["aspects"] == {"help": 3.0}
    (row,), _ = table(path, [source], {"prompt": "{q} ({who})", "facts.n": "who"})
    assert (row["prompt"][0]["content"], row["facts"]) == ("Q? (7)", {"n": 7})
    chat = {"m": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}], "ok": 0}
    (row,), _ = table(path, [chat], {"messages": "m", "label": "ok"})
    assert (row["completion"][0]["content"], row["label"]) == ("y", False)
    _, summary = table(path, [source | {"good": "perhaps"}], {"prompt": "q", "answer": "a", "label": "good"})
    assert reasons(summary) == {"label is 'perhaps'; expected true or false": ["t.jsonl:1"]}
    winner = {"prompt": "q", "answer_a": "a", "answer_b": "b", "winner": "good"}
    _, summary = table(path, [source], winner)
    assert list(reasons(summary)) == ["winner is 'yes'; expected one of a, b, tie"]


@pytest.mark.parametrize(
    ("columns", "reason"),
    [
        ({"prompt": "q", "reply": "a"}, "'reply' is no part of a row"),
        ({"answer": "a"}, "names no prompt"),
        ({"prompt": "q", "chosen": "a"}, "needs chosen and rejected, or answer_a"),
    ],
)
def test_a_wrong_column_map_is_refused_before_reading(columns: dict[str, str], reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        ColumnMap(columns)


# --- round trips ------------------------------------------------------------------------------------------------


def imported(shared_data: Path, tmp_path: Path, name: str, file: str) -> Path:
    job = ImportJob(FORMATS[name], (str(shared_data / file),))
    import_to_folder(job, tmp_path / "in", ALL_TRAIN)
    return tmp_path / "in" / "train.jsonl"


ROUND_TRIPS = [
    ("hh", "hh-rlhf/harmless-base/test.jsonl.gz", "preference"),
    ("bitext", "bitext-customer-support/Bitext_Sample_Customer_Support_Training_Dataset.csv", "demonstration"),
    ("kto", "llamafactory-demo/kto_en_demo.json", "feedback"),
    ("usr", "topical-chat-usr/topical_chat.json", "aspects"),
    ("gsm8k", "gsm8k/test.jsonl", "demonstration"),
]


def dicts(rows: Any) -> list[dict[str, Any]]:
    return [row.to_dict() if isinstance(row, Row) else row for row in rows]


@pytest.mark.parametrize(("name", "file", "kind"), ROUND_TRIPS)
@pytest.mark.parametrize("form", ["jsonl", "parquet", "label-studio"])
def test_what_was_imported_exports_and_comes_back(
    shared_data: Path, tmp_path: Path, name: str, file: str, kind: str, form: str
) -> None:
    source = imported(shared_data, tmp_path, name, file)
    target = tmp_path / ("out.json" if form == "label-studio" else f"out.{form}")
    count = export(source, target, form)
    before = dicts(read_any(source))
    assert count == len(before) > 60
    back = FORMATS["label-studio"] if form == "label-studio" else canonical_format(kind)
    rows, summary = run(target, back)
    assert summary.skips == 0
    assert orjson.dumps(rows, option=orjson.OPT_SORT_KEYS) == orjson.dumps(before, option=orjson.OPT_SORT_KEYS)


def test_label_studio_tasks_show_the_better_answer_on_either_side(shared_data: Path, tmp_path: Path) -> None:
    source = imported(shared_data, tmp_path, "hh", "hh-rlhf/harmless-base/train.jsonl.gz")
    export(source, tmp_path / "tasks.json", "label-studio")
    tasks = json.loads((tmp_path / "tasks.json").read_bytes())
    results = [task["annotations"][0]["result"][0] for task in tasks]
    sides = [result["value"]["selected"] for result in results]
    assert 0.3 < sides.count("left") / len(sides) < 0.7
    assert results[0] | {"value": None} == {
        "from_name": "preference", "to_name": "answer_1", "type": "pairwise", "value": None,
    }  # fmt: skip
    assert tasks[0]["data"]["prompt"][0].keys() == {"role", "content"}
    cancelled = tasks[0] | {"annotations": [tasks[0]["annotations"][0] | {"was_cancelled": True}]}
    path = tmp_path / "cancelled.json"
    path.write_bytes(orjson.dumps([cancelled]))
    assert reasons(run(path, FORMATS["label-studio"])[1]) == {"task without an annotation": ["cancelled.json:1"]}


def test_an_export_stops_at_a_wrong_row_and_leaves_nothing(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": 1}\n')
    for form in ("jsonl", "parquet", "label-studio"):
        with pytest.raises(DataError, match=r"^a\.jsonl:1: keys \['text'\] fit no row type"):
            export(path, tmp_path / "out", form)
    with pytest.raises(ConfigError, match="no form of export"):
        export(path, tmp_path / "out", "xml")
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.jsonl"]


def test_tool_calls_survive_parquet(tmp_path: Path) -> None:
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    turns = [
        {"role": "user", "content": "x"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "y", "tool_call_id": "1"},
    ]
    path = tmp_path / "a.jsonl"
    path.write_bytes(lines({"prompt": turns, "n": 1}, {"prompt": turns[:1], "n": 2.5}, {"prompt": turns[:1], "n": [3]}))
    export(path, tmp_path / "a.parquet", "parquet")
    assert dicts(read_any(tmp_path / "a.parquet")) == dicts(read_any(path))


def test_foreign_parquet_and_hugging_face_folders_are_read(tmp_path: Path) -> None:
    folder = tmp_path / "set"
    folder.mkdir()
    rows = [hh_row(number) for number in range(5)]
    pq.write_table(pa.Table.from_pylist(rows), folder / "train.parquet")
    assert len(run(folder / "train.parquet")[0]) == 5
    records: list[Record] = list(read_hugging_face(str(folder)))
    assert [record.data for record in records] == rows
    assert [record.line for record in records] == [1, 2, 3, 4, 5]
    with pytest.raises(DataError, match="has no split 'dev'; it has train"):
        list(read_hugging_face(str(folder), split="dev"))
    job = ImportJob(FORMATS["hh"], (str(folder),), hugging_face=True)
    assert import_to_folder(job, tmp_path / "out", ALL_TRAIN).written == 5
    with pytest.raises(DataError, match="the datasets library cannot load it"):
        list(read_hugging_face(str(tmp_path / "nothing")))


def test_memory_does_not_grow_with_the_file(tmp_path: Path) -> None:
    def peak(rows: int) -> int:
        path = tmp_path / f"{rows}.jsonl"
        with open(path, "wb") as sink:
            for number in range(rows):
                sink.write(orjson.dumps(hh_row(number, "long answer " * 50)) + b"\n")
        tracemalloc.start()
        import_to_folder(ImportJob(FORMATS["hh"], (str(path),)), tmp_path / f"out{rows}", ALL_TRAIN)
        found = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return found

    small, big = peak(500), peak(4000)
    assert big - small < 4000 * 200, "some bytes of fingerprint a row, not the row's 1,300"


def progress_calls(path: Path) -> list[tuple[str, int]]:
    calls: list[tuple[str, int]] = []
    note: Callable[[str, int], None] = lambda file, position: calls.append((file, position))  # noqa: E731
    list(convert_rows(ImportJob(FORMATS["hh"], (str(path),)), Summary("hh"), lambda *_: None, note))
    return calls


def test_progress_follows_the_compressed_bytes(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl.gz"
    draw = random.Random(1)
    path.write_bytes(gzip.compress(lines(*(hh_row(n, f"good {draw.random()}") for n in range(5000)))))
    positions = [position for _, position in progress_calls(path)]
    assert positions[-1] == -1
    assert 0 < positions[1] <= path.stat().st_size
