"""What comes in at every door of an importer: consent, ids, packed and odd files, the shapes that others write."""

from __future__ import annotations

import bz2
import gzip
import http.server
import io
import json
import lzma
import random
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import orjson
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from typer.testing import CliRunner

from steersman.artifacts import file_digest
from steersman.cli.data import app
from steersman.data.formats import FORMATS
from steersman.data.importing import ImportJob, Summary, convert_rows
from steersman.data.near import NearDuplicates
from steersman.data.opening import expand
from steersman.data.plain import is_plain
from steersman.data.records import Preference, read_jsonl
from steersman.data.sources import read_records
from steersman.data.splits import Splits
from steersman.data.table import ColumnMap, canonical_format, table_format
from steersman.data.truth import read_consent, read_label
from steersman.errors import ConfigError, DataError


def pair(number: int, **more: Any) -> dict[str, Any]:
    return {
        "prompt": [{"role": "user", "content": f"question {number}"}],
        "chosen": [{"role": "assistant", "content": "good"}],
        "rejected": [{"role": "assistant", "content": "bad"}],
    } | more


def jsonl(*rows: Any) -> bytes:
    return b"".join(orjson.dumps(row) + b"\n" for row in rows)


def run(source: Path | str, format: Any, **changes: Any) -> tuple[list[dict[str, Any]], Summary]:
    summary = Summary(format.name)
    job = ImportJob(format, (str(source),), **changes)
    return [row for row, _ in convert_rows(job, summary, lambda *_: None, lambda *_: None)], summary


def imported(*arguments: Any, **more: Any) -> Any:
    command = ["import", *map(str, arguments), "--splits", "train=1"]
    return CliRunner().invoke(app, command, env={"COLUMNS": "200"}, **more)


PREFERENCES = canonical_format("preference")


# --- consent and truth ------------------------------------------------------------------------------------------

SAID = [
    (False, False), ("false", False), (0, False), (0.0, False), ("0", False), ("No", False), (" NO ", False),
    ("refused", False), ("opt-out", False), ("nein", False), (True, True), ("TRUE", True), (1, True), ("yes", True),
    ("granted", True), ("", None), (None, None), (float("nan"), None), ("ＮＯ", False), ("\u200bfalse", False),
    ("“No.”", False), ("not granted", False), ("NO_CONSENT", False), ("OptOut", False), ("agree", True),
    ("✅", True), ("❌", False), ("Нет", False), ("  ", None),
]  # fmt: skip


@pytest.mark.parametrize(("said", "meant"), SAID)
def test_consent_means_the_same_whoever_wrote_it(said: Any, meant: bool | None) -> None:
    assert read_consent(said) is meant


@pytest.mark.parametrize("said", ["maybe", "unknown", 2, -1, [], {"given": True}])
def test_consent_that_cannot_be_read_is_refused(said: Any) -> None:
    with pytest.raises(ValueError, match=r"consent is .*; expected yes or no, or leave the cell empty"):
        read_consent(said)


@pytest.mark.parametrize(
    ("said", "meant"),
    [
        (1.0, True),
        (0.0, False),
        ("TRUE", True),
        ("👍", True),
        ("👎🏽", False),
        ("thumbs_up", True),
        ("Thumbs down", False),
    ],
)
def test_thumbs_are_read_as_people_write_them(said: Any, meant: bool) -> None:
    assert read_label(said) is meant


def test_refused_consent_stays_refused_through_every_importer(tmp_path: Path) -> None:
    answers = ["false", 0, False, "no", True, "true"]
    path = tmp_path / "consent.jsonl"
    path.write_bytes(jsonl(*(pair(n, consent=said) for n, said in enumerate(answers)), pair(9), pair(10, consent="?")))
    rows, summary = run(path, PREFERENCES)
    assert [row.get("consent") for row in rows] == [False] * 4 + [True, True, None]
    assert [entry.first for entry in summary.skipped.values()] == [["consent.jsonl:8"]]
    table = tmp_path / "consent.csv"
    table.write_text("q,good,bad,ok,tenant\nq1,a,b,false,acme\nq2,a,b,true,acme\nq3,a,b,no,acme\nq4,a,b,,acme\n")
    columns = {"prompt": "q", "chosen": "good", "rejected": "bad", "consent": "ok", "customer": "tenant"}
    rows, _ = run(table, table_format(ColumnMap(columns)))
    assert [row.get("consent") for row in rows] == [False, True, False, None]
    assert {row["customer"] for row in rows} == {"acme"}
    foreign = tmp_path / "hh.jsonl"
    shared = "\n\nHuman: a\n\nAssistant:"
    foreign.write_bytes(
        jsonl({"chosen": f"{shared} b", "rejected": f"{shared} c", "consent": "no", "customer": "acme"})
    )
    ((row,), _) = run(foreign, FORMATS["hh"])
    assert (row["consent"], row["customer"]) == (False, "acme")


def test_a_refused_row_is_no_copy_of_an_allowed_one(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    answer = {"instruction": "q", "input": "", "output": "a"}
    path.write_bytes(jsonl(answer, answer | {"consent": "no"}, answer))
    rows, summary = run(path, FORMATS["alpaca"])
    assert [row.get("consent") for row in rows] == [None, False]
    assert summary.duplicates == 1


@pytest.mark.parametrize(
    ("said", "meant"),
    [
        ({"Consent": "no"}, False), ({"CONSENT_GIVEN": 0}, False), ({"has-consent": "yes"}, True),
        ({"training consent": "refused"}, False), ({"opt_out": "yes"}, False), ({"optOut": False}, None),
        ({"consent": "yes", "do_not_train": 1}, False), ({"consent": None, "userConsent": True}, True),
    ],
)  # fmt: skip
def test_consent_is_found_whatever_its_field_is_called(
    tmp_path: Path, said: dict[str, Any], meant: bool | None
) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(jsonl(pair(1, **said)))
    ((row,), _) = run(path, PREFERENCES)
    assert row.get("consent") is meant
    assert is_plain(pair(1, **said), "preference") is False, "nobody passes it by"
    assert Preference.model_validate(pair(1, **said)).consent is meant
    path.write_bytes(jsonl({"instruction": "q", "input": "", "output": "a"} | said))
    ((row,), summary) = run(path, FORMATS["alpaca"])
    assert row.get("consent") is meant
    assert not summary.not_kept


def test_consent_under_another_name_that_cannot_be_read_leaves_the_row_out(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("q,a,Consent given\none,1,perhaps\ntwo,2,yes\nthree,3,\n")
    rows, summary = run(path, table_format(ColumnMap({"prompt": "q", "answer": "a"})))
    assert [row.get("consent") for row in rows] == [True, None]
    assert list(summary.skipped) == ["consent is 'perhaps'; expected yes or no, or leave the cell empty"]


# --- ids --------------------------------------------------------------------------------------------------------


def test_ids_come_from_content_and_not_from_the_files_name(tmp_path: Path) -> None:
    for number in range(4):
        (tmp_path / str(number)).mkdir()
        (tmp_path / str(number) / "train.jsonl").write_bytes(jsonl(*(pair(10 * number + n) for n in range(5))))
    ids = [row["id"] for number in range(4) for row in run(tmp_path / str(number) / "train.jsonl", PREFERENCES)[0]]
    assert len(set(ids)) == 20
    again = [row["id"] for row in run(tmp_path, PREFERENCES)[0]]
    assert again == ids
    named = [row["id"] for row in run(tmp_path, PREFERENCES, namespace="shop/")[0]]
    assert named == [f"shop/{name}" for name in ids]


def test_own_ids_are_kept_and_equal_ones_told_apart(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(jsonl(pair(1, id=7), pair(2, id="8"), pair(3, id="8"), pair(3, id="8")))
    rows, summary = run(path, PREFERENCES)
    assert [row["id"] for row in rows] == ["7", "8", "8.1", "8.2"]
    assert summary.ids_made_unique == 2


def test_equal_judgements_of_several_people_are_all_kept(tmp_path: Path) -> None:
    path = tmp_path / "raters.jsonl"
    swapped = pair(1) | {"chosen": pair(1)["rejected"], "rejected": pair(1)["chosen"]}
    path.write_bytes(jsonl(pair(1, id="r1"), pair(1, id="r1"), swapped | {"id": "r3"}, pair(1), pair(1)))
    rows, summary = run(path, PREFERENCES)
    assert (len(rows), summary.duplicates, len({row["id"] for row in rows})) == (5, 0, 5)


def test_near_duplicates_go_on_request(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    text = " ".join(f"word{n}" for n in range(60))
    path.write_bytes(
        jsonl(
            *({"instruction": f"{text} {n}", "output": "fine"} for n in range(4)), {"instruction": "x", "output": "y"}
        )
    )
    shares = ["--splits", "train=0.5,test=0.5"]
    for number, (asked, left) in enumerate((([], 5), (["--near-duplicates", "0.7"], 2))):
        out = tmp_path / str(number)
        result = CliRunner().invoke(app, ["import", "alpaca", str(path), "--out", str(out), *asked, *shares])
        assert result.exit_code == 0, result.output
        counts = json.loads((out / "import.json").read_bytes())
        assert (counts["written"], counts["near_duplicates"], sum(counts["splits"].values())) == (left, 5 - left, left)
        files = [out / f"{split}.jsonl" for split in counts["splits"]]
        assert sum(len(file.read_bytes().splitlines()) for file in files) == left
        assert {file.name: file_digest(file) for file in files}.items() <= counts["files"].items()
        assert not list(out.glob("*.kept"))
    assert "3 near-duplicates removed" in result.output
    wrong = imported("alpaca", path, "--out", tmp_path / "wrong", "--near-duplicates", 2)
    assert "near duplicates: 2.0 is no similarity" in str(wrong.exception)


@pytest.mark.parametrize("threshold", [0.5, 0.8, 1.0])
def test_near_copies_are_those_of_exact_similarity(threshold: float) -> None:
    """Against the Jaccard similarity itself: all far above the threshold are found, none far below it."""
    draw = random.Random(2)
    words = [f"word{n}" for n in range(400)]
    texts: list[str] = []
    for _ in range(120):
        text = draw.choices(words, k=120)
        texts.append(" ".join(text))
        for changed in (0, 1, 3, 8, 20):
            other = list(text)
            for at in draw.sample(range(120), changed):
                other[at] = draw.choice(words)
            texts.append(" ".join(other).upper())

    def shingles(text: str) -> set[tuple[str, ...]]:
        split = text.casefold().split()
        return {tuple(split[at : at + 5]) for at in range(len(split) - 4)}

    with NearDuplicates(threshold) as near:
        for text in texts:
            near.add(text)
        found = near.copies()
    sets = [shingles(text) for text in texts]
    for at, copy in enumerate(found):
        family = range(at - at % 6, at)
        closest = max((len(sets[at] & sets[other]) / len(sets[at] | sets[other]) for other in family), default=0.0)
        if closest > threshold + 0.16 or closest == 1.0:
            assert copy, (at, closest)
        elif closest < threshold - 0.16 or (threshold == 1.0 and closest < 0.9):
            assert not copy, (at, closest)
    assert found.sum() > 100


def test_short_and_odd_texts_have_no_near_copies_but_equal_ones() -> None:
    texts = ["", "", "a", "A.", "a b", "b a", "\ud800", "...", "a b c d e", "a b c d e f", "日本語", "日本"]
    with NearDuplicates(0.9) as near:
        for text in texts * 700:  # beyond one block
            near.add(text)
        first = near.copies()[: len(texts)].tolist()
    assert first == [False, True, False, True, *[False] * 8]


def test_case_and_signs_of_other_scripts_make_no_other_text() -> None:
    texts = ["ÉTÉ à l’œuvre — «ΟΧΙ» ДА! 😀 x²", "été À L'ŒUVRE, οχι… да? X²", "été a l'œuvre, οχι… да? X²"]
    with NearDuplicates(1.0) as near:
        for text in texts:
            near.add(text)
        assert near.copies().tolist() == [False, True, False]


def test_what_a_format_cannot_keep_is_counted_and_said(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    row = {"instruction": "q", "input": "", "output": "a"}
    path.write_bytes(jsonl(row, row | {"output": "b", "rating": 4, "note": ""}, row | {"output": "c", "rating": 5}))
    result = imported("alpaca", path, "--out", tmp_path / "out")
    assert result.exit_code == 0
    assert "not kept: field 'rating' of 2 records" in result.output
    assert json.loads((tmp_path / "out" / "import.json").read_bytes())["not_kept"] == {"rating": 2}


def test_what_rows_keep_whole_is_not_said_to_be_lost(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(jsonl(pair(1, note="kept"), pair(2, other=5)))
    rows, summary = run(path, PREFERENCES)
    assert (rows[0]["note"], rows[1]["other"], dict(summary.not_kept)) == ("kept", 5, {})


def test_llama_factorys_pairs_and_thumbs_come_as_turns_or_instructions(tmp_path: Path) -> None:
    call = '{"name": "track", "arguments": {"order": 5}}'
    asked = [{"from": "human", "value": "q"}]
    used = [{"from": "function_call", "value": call}, {"from": "observation", "value": "r"}]
    told = {"system": "s", "history": [["a", "b"]], "instruction": "q", "input": "x"}
    path = tmp_path / "dpo.jsonl"
    path.write_bytes(jsonl(
        {"conversations": asked, "chosen": {"from": "function_call", "value": call}, "rejected": "No."},
        {"messages": [{"role": "user", "content": "q"}], "chosen": [*used, {"from": "gpt", "value": "a"}],
         "rejected": {"role": "assistant", "content": "No."}},
        told | {"chosen": "a", "rejected": "b"},
        {"conversations": asked, "chosen": {"from": "nobody", "value": "a"}, "rejected": "b"},
    ))  # fmt: skip
    rows, summary = run(path, FORMATS["sharegpt-dpo"])
    assert [turn.get("tool_calls", [{}])[0].get("function") for turn in rows[0]["chosen"]] == [
        {"name": "track", "arguments": '{"order":5}'}
    ]
    assert [turn["role"] for turn in rows[1]["chosen"]] == ["assistant", "tool", "assistant"]
    assert rows[1]["chosen"][1]["tool_call_id"] == rows[1]["chosen"][0]["tool_calls"][0]["id"]
    assert [turn["content"] for turn in rows[2]["prompt"]] == ["s", "a", "b", "q\n\nx"]
    assert list(summary.skipped) == ["turn of unknown role 'nobody'"]
    path = tmp_path / "kto.jsonl"
    path.write_bytes(
        jsonl(told | {"output": "a", "kto_tag": "false"}, {"conversations": [*asked, *asked], "kto_tag": 1})
    )
    rows, summary = run(path, FORMATS["kto"])
    assert [(row["completion"][0]["content"], row["label"]) for row in rows] == [("a", False)]
    assert summary.read == 2


def test_answers_that_are_texts_follow_a_prompt_of_messages(tmp_path: Path) -> None:
    path = tmp_path / "trl.jsonl"
    path.write_bytes(jsonl(pair(1) | {"chosen": "good 1"}, pair(2) | {"chosen": "good", "rejected": "bad"}))
    rows, summary = run(path, FORMATS["trl"])
    assert [(row["chosen"][0]["content"], row["rejected"][0]["content"]) for row in rows] == [("good", "bad")]
    assert "chosen and rejected must both be texts" in next(iter(summary.skipped))


def test_what_turns_say_beside_their_text_is_counted_once_a_record(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    turns = [{"from": "human", "value": "q", "weight": 0}, {"from": "gpt", "value": "a", "weight": 1, "loss": None}]
    path.write_bytes(jsonl({"conversations": turns}, {"conversations": turns[:1] * 2 + turns[1:]}))
    rows, summary = run(path, FORMATS["sharegpt"])
    assert (len(rows), dict(summary.not_kept)) == (2, {"conversations[].weight": 2})


# --- files ------------------------------------------------------------------------------------------------------

PACKING = {
    "gz": gzip.compress,
    "bz2": lambda data: bz2.compress(data, 1),
    "xz": lzma.compress,
    "zst": lambda data: zstandard.ZstdCompressor().compress(data),
}
ROWS = [pair(n) for n in range(3)]


@pytest.mark.parametrize("packing", PACKING)
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32"])
def test_packed_and_encoded_files_are_read(tmp_path: Path, packing: str, encoding: str) -> None:
    path = tmp_path / f"a.jsonl.{packing}"
    path.write_bytes(PACKING[packing](jsonl(*ROWS).decode().encode(encoding)))
    assert len(run(path, PREFERENCES)[0]) == 3
    path.write_bytes(PACKING[packing](b"a,b\n") + PACKING[packing]("1,\u00e9\n".encode()))
    assert [record.data for record in read_records(path.rename(tmp_path / f"a.csv.{packing}"))] == [
        {"a": "1", "b": "é"}
    ]


@pytest.mark.parametrize("packing", PACKING)
@pytest.mark.parametrize("damage", ["garbage", "cut"])
def test_the_rows_before_damage_are_kept_and_the_exit_code_says_it(tmp_path: Path, packing: str, damage: str) -> None:
    path = tmp_path / f"a.jsonl.{packing}"
    packed = PACKING[packing](b"".join(jsonl(pair(n, note=f"{hash(str(n))} {n * 7919 % 1013}")) for n in range(3000)))
    path.write_bytes(packed + b"garbage behind it" if damage == "garbage" else packed[:-60])
    result = imported("steersman", path, "--out", tmp_path / "out")
    assert result.exit_code != 0
    assert "ends there before its end" in str(result.exception)
    kept = len(list(read_jsonl(tmp_path / "out" / "train.jsonl", Preference)))
    assert kept == 3000 if damage == "garbage" else 0 < kept < 3000
    assert json.loads((tmp_path / "out" / "import.json").read_bytes())["incomplete"] == [
        f"a.jsonl.{packing}:{kept + 1}"
    ]


@pytest.mark.parametrize(
    ("text", "rows"),
    [
        ("q;a\nhello;world, you\nx;y\n", [{"q": "hello", "a": "world, you"}, {"q": "x", "a": "y"}]),
        ("q\ta\n1\t2\n", [{"q": "1", "a": "2"}]),
        ("q,a\nx;y,z\n", [{"q": "x;y", "a": "z"}]),
        ("sep=;\nq;a\n1;2\n", [{"q": "1", "a": "2"}]),
        ('q;a\n"1;2";"3\n4"\n', [{"q": "1;2", "a": "3\n4"}]),
        ("q\nalone, with a comma; and more\n", ["q"]),
    ],
)
def test_separators_are_told_from_the_file(tmp_path: Path, text: str, rows: list[Any]) -> None:
    path = tmp_path / "a.csv"
    path.write_text(text)
    found = [record.data for record in read_records(path)]
    if rows == ["q"]:
        assert len(found) == 1
    else:
        assert found == rows


def test_a_column_that_stands_twice_is_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("q,a,a\nhello,first,second\n")
    (record,) = read_records(path)
    assert str(record.data) == "a.csv:1: column 'a' stands twice; give each column a name of its own"


def test_a_json_field_that_stands_twice_is_refused_by_name(tmp_path: Path) -> None:
    turn = '[{"role": "assistant", "content": "%s"}]'
    line = '{"prompt": "q", "chosen": %s, "rejected": %s%s}'
    lines = [line % (turn % "a", turn % "b", more) for more in (', "chosen": ' + turn % "c", "")]
    (tmp_path / "a.jsonl").write_text("\n".join([*lines, line % (turn % '\\"chosen\\": x', turn % "b", "")]))
    first, *others = [record.data for record in read_records(tmp_path / "a.jsonl")]
    assert str(first) == "a.jsonl:1: field 'chosen' stands twice in one object; give each a name of its own"
    assert all(isinstance(record, dict) for record in others)


def test_column_names_have_no_blanks_around_them(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text(" q , a \nhello,world\n")
    assert [record.data for record in read_records(path)] == [{"q": "hello", "a": "world"}]


@pytest.mark.parametrize(("encoding", "text"), [("cp1252", "Größe “x”"), ("shift_jis", "日本"), ("koi8-r", "нет")])
def test_an_encoding_that_nothing_marks_is_named_by_whoever_knows_it(tmp_path: Path, encoding: str, text: str) -> None:
    columns = ["--column=prompt=q", "--column=answer=a"]
    path = tmp_path / "a.csv.gz"
    path.write_bytes(gzip.compress(f"q;a\n{text};b\n".encode(encoding)))
    result = imported("table", path, *columns, "--out", tmp_path / "no")
    assert "not UTF-8; save the file as UTF-8, or name its encoding with --encoding" in str(result.exception)
    assert imported("table", path, *columns, "--out", tmp_path / "yes", "--encoding", encoding).exit_code == 0
    assert text in (tmp_path / "yes" / "train.jsonl").read_text()
    wrong = imported("table", path, *columns, "--out", tmp_path / "x", "--encoding", "klingon")
    assert "encoding 'klingon' is not known" in str(wrong.exception)
    path.write_bytes("q;a\né;b\n".encode("utf-16"))
    assert [record.data for record in read_records(path, encoding=encoding)] == [{"q": "é", "a": "b"}]


def test_archives_are_named(tmp_path: Path) -> None:
    import tarfile
    import zipfile

    (tmp_path / "a.jsonl").write_bytes(jsonl(*ROWS))
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as packed:
        packed.write(tmp_path / "a.jsonl")
    with tarfile.open(tmp_path / "a.tar.gz", "w:gz") as tarred:
        tarred.add(tmp_path / "a.jsonl")
    for name, what in (("a.zip", "a ZIP archive or an Excel file"), ("a.tar.gz", "a tar archive")):
        (record,) = read_records(tmp_path / name)
        assert str(record.data).startswith(f"{name}:1: the file is {what}; unpack it")


def test_long_numbers_lose_no_digit(tmp_path: Path) -> None:
    big, most, exact = "12345678901234567890123", "18446744073709551615", "0.12345678901234567891"
    line = f'{{"q": "x", "n": [{big}, {most}, 1.5, 0.1, {exact}, -3]}}'
    wanted = [big, int(most), 1.5, 0.1, exact, -3]
    for name, text in (("a.jsonl", line), ("a.json", f"[{line}]")):
        (tmp_path / name).write_text(text)
        (record,) = read_records(tmp_path / name)
        assert isinstance(record.data, dict)
        assert record.data["n"] == wanted
    import decimal

    column = pa.array([decimal.Decimal("1.50"), decimal.Decimal("123456789012345678.55")], pa.decimal128(20, 2))
    pq.write_table(pa.table({"n": column}), tmp_path / "a.parquet")
    assert [record.data for record in read_records(tmp_path / "a.parquet")] == [
        {"n": 1.5},
        {"n": "123456789012345678.55"},
    ]


def test_folders_patterns_and_standard_input(tmp_path: Path) -> None:
    (tmp_path / "in" / "deep").mkdir(parents=True)
    (tmp_path / "in" / "a.jsonl").write_bytes(jsonl(pair(1)))
    (tmp_path / "in" / "deep" / "b.jsonl.gz").write_bytes(gzip.compress(jsonl(pair(2))))
    (tmp_path / "in" / "README.md").write_text("no data")
    assert len(run(tmp_path / "in", PREFERENCES)[0]) == 2
    assert len(run(tmp_path / "in" / "*.jsonl", PREFERENCES)[0]) == 1
    assert len(expand([str(tmp_path / "in" / "**" / "*.gz")])) == 1
    for name in (tmp_path / "in" / "*.csv", tmp_path / "none[0-9]"):
        with pytest.raises(DataError, match="no file matches"):
            expand([str(name)])
    sent = {"jsonl": jsonl(*ROWS), "packed": gzip.compress(jsonl(*ROWS)), "array": orjson.dumps(ROWS)}
    for name, data in sent.items():
        result = imported("steersman", "-", "--out", tmp_path / name, "--quiet", input=data)
        assert result.exit_code == 0, result.output
        assert len((tmp_path / name / "train.jsonl").read_bytes().splitlines()) == 3
    table = ("--column", "prompt=q", "--column", "answer=a")
    result = imported("table", "-", *table, "--out", tmp_path / "csv", "--quiet", input="q;a\nhello;world\n")
    assert result.exit_code == 0, result.output


@pytest.fixture
def web(tmp_path: Path) -> Iterator[tuple[str, Path]]:
    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *arguments: Any) -> None:
            pass

    (tmp_path / "web").mkdir()
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(tmp_path / "web")))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", tmp_path / "web"
    server.shutdown()
    server.server_close()


def test_files_come_over_http_and_what_is_missing_is_named(web: tuple[str, Path]) -> None:
    url, folder = web
    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(ROWS), buffer)
    for name, data in (
        ("a.jsonl", jsonl(*ROWS)), ("a.json.gz", gzip.compress(orjson.dumps(ROWS))), ("a.parquet", buffer.getvalue()),
    ):  # fmt: skip
        (folder / name).write_bytes(data)
        assert len(run(f"{url}/{name}?download=true", PREFERENCES)[0]) == 3, name
    for address, error, reason in (
        (f"{url}/none.jsonl", DataError, r"none\.jsonl: not found \(404\)"),
        ("nonsense://a/b.jsonl", ConfigError, "Protocol not known: nonsense"),
        ("s3://bucket/a.jsonl", ConfigError, "s3fs"),
    ):
        with pytest.raises(error, match=reason):
            run(address, PREFERENCES)


@pytest.mark.parametrize("shares", [{"../../x": 1.0}, {"a/b": 1.0}, {"": 1.0}, {"skipped": 1.0}])
def test_a_split_is_no_path(shares: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match="is no name of a split"):
        Splits(shares)


@pytest.mark.parametrize("share", [float("nan"), float("inf"), -1.0])
def test_shares_are_numbers(share: float) -> None:
    with pytest.raises(ConfigError, match="must be positive and sum to 1"):
        Splits({"train": share, "test": 1.0})


# --- shapes that others write -----------------------------------------------------------------------------------


def test_turns_in_openais_spellings() -> None:
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    user, result, answer = (
        {"role": "user", "content": "q"},
        {"role": "tool", "tool_call_id": "1", "content": "r"},
        {"role": "assistant", "content": "a"},
    )
    for turn in (
        {"content": None, "tool_calls": [call]},
        {"tool_calls": [call]},
        {"content": None, "function_call": call["function"]},
    ):
        row = read(
            canonical_format("demonstration"), {"messages": [user, {"role": "assistant"} | turn, result, answer]}
        )
        assert row["messages"][1]["content"] == ""
        assert row["messages"][1]["tool_calls"][0]["function"]["name"] == "f"
    odd = [
        {"role": "developer", "content": "s"},
        {"role": "user", "content": [{"type": "text", "text": "hi"}], "weight": 1},
        {"role": "assistant", "content": "a", "refusal": None, "annotations": []},
    ]
    row = read(canonical_format("demonstration"), {"messages": odd})
    assert [(turn["role"], turn["content"]) for turn in row["messages"]] == [
        ("system", "s"),
        ("user", "hi"),
        ("assistant", "a"),
    ]
    for wrong, reason in (
        ({"role": "user", "content": [{"type": "image_url", "image_url": {}}]}, "a part of type 'image_url'"),
        ({"role": "user", "content": "x", "weight": 0}, "weight"),
        ({"role": ["user"], "content": "x"}, "role"),
    ):
        assert reason in reason_of(canonical_format("demonstration"), {"messages": [wrong, answer]})


def read(format: Any, record: dict[str, Any]) -> dict[str, Any]:
    from steersman.data.importing import _checked, _converted, _Unread

    (row,) = _converted(ImportJob(format, ()), record, _Unread(Summary(format.name).not_kept))
    assert isinstance(row, dict), row
    content, metadata = _checked(format, row)
    return content | metadata


def reason_of(format: Any, record: dict[str, Any]) -> str:
    from steersman.data.records import describe_validation_error

    with pytest.raises(ValueError, match=r".") as caught:
        read(format, record)
    return describe_validation_error(caught.value)  # type: ignore[arg-type]


def test_trls_formats_with_and_without_a_prompt() -> None:
    user, good, bad = (
        {"role": role, "content": text} for role, text in (("user", "p"), ("assistant", "good"), ("assistant", "bad"))
    )
    wanted = {"prompt": [user], "chosen": [good], "rejected": [bad]}
    implicit = {"chosen": [user, good], "rejected": [user, bad]}
    binarized = implicit | {
        "prompt": "p",
        "prompt_id": "x",
        "messages": [user, good],
        "score_chosen": 8.0,
        "score_rejected": 5.0,
    }
    texts = {"prompt": "p", "chosen": "good", "rejected": "bad"}
    for record in (implicit, binarized, texts, wanted):
        for format in (FORMATS["trl"], PREFERENCES):
            row = read(format, record)
            assert {name: row[name] for name in wanted} == wanted
    row = read(FORMATS["ultrafeedback-binarized"], binarized)
    assert (row["id"], row["margin"], "messages" in row) == ("x", 3.0, False)
    sky = read(FORMATS["trl"], {"chosen": "The sky is blue.", "rejected": "The sky is green."})
    assert [sky[name][0]["content"] for name in wanted] == ["The sky is", "blue.", "green."]
    thumb = read(FORMATS["trl"], {"prompt": "p", "completion": "good", "label": 1.0})
    assert thumb["label"] is True
    assert read(FORMATS["trl"], {"prompt": "p", "completion": "good"})["messages"] == [user, good]


def test_llama_factorys_system_history_tools_and_function_calls() -> None:
    record = {"instruction": "and now?", "input": "", "output": "third", "system": "You are a pirate.",
              "history": [["first q", "first a"], ["second q", "second a"]]}  # fmt: skip
    turns = read(FORMATS["alpaca"], record)["messages"]
    assert [turn["content"] for turn in turns] == [
        "You are a pirate.",
        "first q",
        "first a",
        "second q",
        "second a",
        "and now?",
        "third",
    ]
    record = {
        "conversations": [
            {"from": "human", "value": "weather?"},
            {"from": "function_call", "value": '{"name": "weather", "arguments": {"city": "Bonn"}}'},
            {"from": "observation", "value": "sunny"},
            {"from": "gpt", "value": "It is sunny."},
        ],
        "tools": '[{"name": "weather"}]',
    }
    row = read(FORMATS["sharegpt"], record)
    call, result = row["messages"][1]["tool_calls"][0], row["messages"][2]
    assert json.loads(call["function"]["arguments"]) == {"city": "Bonn"}
    assert result == {"role": "tool", "content": "sunny", "tool_call_id": call["id"]}
    assert row["tools"] == [{"type": "function", "function": {"name": "weather"}}]


def test_dialogues_of_agents(shared_data: Path) -> None:
    rows, summary = run(shared_data / "tau-bench" / "gpt-4o-airline.json", FORMATS["tau-bench"])
    assert (summary.read, len(rows), summary.skips) == (48, 48, 0)
    raw = json.loads((shared_data / "tau-bench" / "gpt-4o-airline.json").read_bytes())
    assert [row["label"] for row in rows] == [entry["reward"] == 1 for entry in raw]
    assert any(turn.get("tool_calls") for row in rows for turn in row["completion"])
    solved, _ = run(shared_data / "tau-bench" / "gpt-4o-airline.json", FORMATS["tau-bench-demonstrations"])
    assert len(solved) == sum(row["label"] for row in rows)
    rows, summary = run(shared_data / "abcd" / "abcd_sample.json", FORMATS["abcd"])
    assert (summary.read, len(rows), dict(summary.not_kept)) == (3, 3, {})
    calls = [call for turn in rows[0]["messages"] for call in turn.get("tool_calls", ())]
    assert calls[0]["function"] == {"name": "pull-up-account", "arguments": '{"values":["crystal minh"]}'}


def test_labels_and_ratings_as_odd_files_have_them(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    labels = [1.0, 0.0, None, "TRUE", "👍", "thumbs_up", -1]
    path.write_bytes(jsonl(*({"q": str(n), "a": "x", "l": label} for n, label in enumerate(labels))))
    rows, summary = run(path, table_format(ColumnMap({"prompt": "q", "answer": "a", "label": "l"})))
    assert [row["label"] for row in rows] == [True, False, True, True, True, False]
    assert list(summary.skipped) == ["label is None; expected true or false"]
    names = ("helpfulness", "correctness", "coherence", "complexity", "verbosity")
    ratings = [("4", "3", "4", "1", "2"), ("N/A", 3, 4, 1, 2), (5, 3, 4, 1, 2)]
    path.write_bytes(
        jsonl(
            *(
                {"prompt": f"p{n}", "response": "r"} | dict(zip(names, values, strict=True))
                for n, values in enumerate(ratings)
            )
        )
    )
    rows, summary = run(path, FORMATS["helpsteer"])
    assert [len(row["aspects"]) for row in rows] == [5, 4]
    assert list(summary.skipped) == ["aspects: helpfulness is 5, outside 0 to 4; mend the rating or the scale"]


def test_a_key_that_no_row_has_is_said(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(jsonl(pair(1), pair(2)))
    result = imported("steersman", path, "--out", tmp_path / "out", "--split-by", "intnet")
    assert "2 rows lack the key of --split-by" in result.output
