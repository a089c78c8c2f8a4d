"""Every importer on the real rows: exact counts, and the quirks of each public data set."""

from __future__ import annotations

import itertools
import json
import math
import re
from collections import Counter
from pathlib import Path
from typing import Any

import orjson
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from steersman.data.formats import FORMATS, ImportOptions, Skip, hh, hh_common_prefix, hh_last_turn, hh_turns
from steersman.data.importing import ImportJob, Summary, convert_rows
from steersman.data.records import Preference
from steersman.data.sources import read_records
from steersman.data.splits import Splits
from steersman.data.table import ColumnMap, table_format

SAME = "rejected: the same as chosen; remove the pair, it carries no preference"
EMPTY = "assistant message is empty; remove the row or restore its text"


def run(name: str, *files: Path, **changes: Any) -> tuple[list[dict[str, Any]], Summary]:
    job = ImportJob(FORMATS[name], tuple(map(str, files)), **changes)
    return collect(job)


def collect(job: ImportJob) -> tuple[list[dict[str, Any]], Summary]:
    summary = Summary(job.format.name)
    return [row for row, _ in convert_rows(job, summary, lambda *_: None, lambda *_: None)], summary


def raw(path: Path) -> list[dict[str, Any]]:
    return [record.data for record in read_records(path)]  # type: ignore[misc]


# file -> (format, read, rows, duplicates, {reason: count})
COUNTS: dict[str, tuple[str, int, int, int, dict[str, int]]] = {
    "dolly/databricks-dolly-15k.sample.jsonl": ("dolly", 8, 8, 0, {}),
    "dolly/dolly_alpaca_prompt.jsonl": ("alpaca-prompt", 83, 83, 0, {}),
    "alpaca/alpaca_data.json": ("alpaca", 200, 199, 0, {f"messages: {EMPTY}": 1}),
    "gsm8k/train.jsonl": ("gsm8k", 1040, 1040, 0, {}),
    "gsm8k/test.jsonl": ("gsm8k", 393, 393, 0, {}),
    "hh-rlhf/helpful-base/train.jsonl.gz": (
        "hh", 1172, 1168, 0, {f"rejected: {EMPTY}": 3, "chosen and rejected are the same": 1}),
    "hh-rlhf/helpful-base/test.jsonl.gz": ("hh", 452, 451, 0, {f"rejected: {EMPTY}": 1}),
    "hh-rlhf/helpful-rejection-sampled/train.jsonl.gz": (
        "hh", 1080, 1067, 0, {"chosen and rejected are the same": 13}),
    "hh-rlhf/helpful-online/train.jsonl.gz": ("hh", 108, 108, 0, {}),
    "hh-rlhf/harmless-base/train.jsonl.gz": ("hh", 272, 272, 0, {}),
    "hh-rlhf/harmless-base/test.jsonl.gz": ("hh", 67, 67, 0, {}),
    "format_rows/shp_askculinary.jsonl": ("shp", 1, 1, 0, {}),
    "format_rows/helpsteer.jsonl": ("helpsteer", 1, 1, 0, {}),
    "format_rows/ultrafeedback_partial.jsonl": ("ultrafeedback", 1, 1, 0, {}),
    "llamafactory-demo/dpo_en_demo.json": ("sharegpt-dpo", 207, 203, 4, {}),
    "llamafactory-demo/kto_en_demo.json": ("kto", 184, 184, 0, {}),
    "topical-chat-usr/topical_chat.json": ("usr", 180, 180, 0, {}),
    "bitext-customer-support/Bitext_Sample_Customer_Support_Training_Dataset.csv": ("bitext", 1780, 1780, 0, {}),
    "oasst/en_100.trees.jsonl.gz": (
        "oasst", 59, 456, 0, {"flagged by a reader": 3, "reply without a rank beside other replies": 1}),
    "oasst/en_100_message.jsonl": ("oasst", 20, 136, 0, {"flagged by a reader": 2}),
    "tau-bench/gpt-4o-airline.json": ("tau-bench", 48, 48, 0, {}),
    "tau-bench/MockRetailDomainEnv-few_shot.jsonl": ("tau-bench-few-shot", 42, 42, 0, {}),
    "abcd/abcd_sample.json": ("abcd", 3, 3, 0, {}),
}  # fmt: skip


@pytest.mark.parametrize("file", COUNTS)
def test_every_file_gives_exactly_these_counts(shared_data: Path, file: str) -> None:
    name, read, kept, duplicates, reasons = COUNTS[file]
    rows, summary = run(name, shared_data / file)
    found = {reason: entry.count for reason, entry in summary.skipped.items()}
    assert (summary.read, len(rows), summary.duplicates, found) == (read, kept, duplicates, reasons)
    assert len({row["id"] for row in rows}) == len(rows)
    assert {row["source"] for row in rows} == {name}


CHOICES = {"prompt": "{0}\nA. {1}\nB. {2}\nC. {3}\nD. {4}", "answer": "5", "facts.answer": "5"}
TWICE = {"public_relations_test": 1}
JUDGED = {"prompt": "source", "answer": "system_output", "aspects.consistency": "scores.consistency"}
# file -> (read, column map, winners, header, duplicates, {reason: count})
TABLES: dict[str, tuple[int, dict[str, str], dict[str, str], bool, int, dict[str, int]]] = {
    "autoj-pairwise/testdata_pairwise.jsonl": (
        529, {"prompt": "prompt", "answer_a": "response 1", "answer_b": "response 2", "winner": "label"},
        {"a": "0", "b": "1", "tie": "2"}, True, 0, {"tie": 137, SAME: 1}),
    "truthfulqa/TruthfulQA.csv": (426, {"prompt": "Question", "answer": "Best Answer"}, {}, True, 0, {}),
    "banking77/train.csv": (2480, {"prompt": "text", "meta.intent": "category"}, {}, True, 0, {}),
    "banking77/test.csv": (595, {"prompt": "text", "meta.intent": "category"}, {}, True, 0, {}),
    "qags-news/qags_cnndm.json": (119, JUDGED, {}, True, 0, {}),
    "qags-news/qags_xsum.json": (115, JUDGED, {}, True, 0, {}),
    **{
        f"mmlu/{split}/{subject}_{split}.csv": (rows, CHOICES, {}, False, TWICE.get(f"{subject}_{split}", 0), {})
        for subject, (dev, val, test) in {
            "business_ethics": (5, 11, 41), "formal_logic": (5, 14, 72), "global_facts": (5, 10, 44),
            "high_school_statistics": (5, 23, 109), "high_school_world_history": (5, 26, 123),
            "management": (5, 11, 52), "marketing": (5, 25, 124), "moral_disputes": (5, 38, 181),
            "philosophy": (5, 34, 156), "professional_accounting": (5, 31, 136), "public_relations": (5, 12, 49),
            "world_religions": (5, 19, 83),
        }.items()
        for split, rows in (("dev", dev), ("val", val), ("test", test))
    },
}  # fmt: skip
# What holds no rows of a format above, and who else reads it.
OTHERS = {
    "hh-rlhf/edge_cases.jsonl": "single rows with their quirks; the tests of HH-RLHF below",
    "agreement/": "tables of votes; test_agreement.py",
    "xsum-annotations/": "votes without the texts; test_agreement.py",
    **dict.fromkeys(("abcd/kb.json", "abcd/ontology.json", "abcd/guidelines.json"), "what its agents knew"),
    "tau-bench/retail_wiki.md": "the policy that the agent follows",
    "banking77/categories.json": "names of the intents",
}


@pytest.mark.parametrize("file", TABLES)
def test_any_table_is_imported_with_a_column_map(shared_data: Path, file: str) -> None:
    read, columns, winners, header, duplicates, reasons = TABLES[file]
    mapped = ColumnMap(columns, winners) if winners else ColumnMap(columns)
    rows, summary = collect(ImportJob(table_format(mapped), (str(shared_data / file),), header=header))
    found = {reason: entry.count for reason, entry in summary.skipped.items()}
    assert (summary.read, summary.duplicates, found) == (read, duplicates, reasons)
    assert len(rows) == read - sum(reasons.values()) - duplicates


def test_no_file_of_the_samples_is_forgotten(shared_data: Path) -> None:
    files = {path.relative_to(shared_data).as_posix() for path in shared_data.glob("*/**/*") if path.is_file()}
    texts = {file for file in files if Path(file).name.startswith("LICENSE")}
    assert files - texts - COUNTS.keys() - TABLES.keys() == {f for f in files - texts if f.startswith(tuple(OTHERS))}


def test_what_the_samples_lose_is_named(shared_data: Path) -> None:
    lost = {}
    for file in (
        "tau-bench/MockRetailDomainEnv-few_shot.jsonl", "tau-bench/gpt-4o-airline.json", "abcd/abcd_sample.json",
        "llamafactory-demo/kto_en_demo.json", "format_rows/ultrafeedback_partial.jsonl",
    ):  # fmt: skip
        rows, summary = run(COUNTS[file][0], shared_data / file)
        lost[file.partition("/")[2]] = dict(summary.not_kept)
        assert not any(turn["content"] == "None" for row in rows for turn in row.get("messages", ()))
    judged = ("Rationale", "Rationale For Rating", "Type")
    assert lost == {
        "MockRetailDomainEnv-few_shot.jsonl": {"messages_display: which tool was called with what": 42},
        "abcd_sample.json": {},
        "gpt-4o-airline.json": {},
        "kto_en_demo.json": {},
        "ultrafeedback_partial.jsonl": {
            **dict.fromkeys(("source", "models", "incorrect_answers"), 1),
            **dict.fromkeys(("completions[].principle", "completions[].custom_system_prompt"), 1),
            **{f"completions[].annotations[].{name}": 1 for name in judged},
        },
    }


# --- HH-RLHF ----------------------------------------------------------------------------------------------------


def edge_cases(shared_data: Path, quirk: str) -> list[dict[str, str]]:
    cases = [case["row"] for case in raw(shared_data / "hh-rlhf" / "edge_cases.jsonl") if quirk in case["quirks"]]
    assert cases
    return cases


def converted(row: dict[str, str]) -> Any:
    (found,) = hh(row, ImportOptions())
    return found


def test_hh_identical_pairs_are_left_out(shared_data: Path) -> None:
    for row in edge_cases(shared_data, "identical_pair"):
        assert converted(row) == Skip("chosen and rejected are the same")


def test_hh_prompt_is_the_common_prefix_where_a_reply_holds_a_turn(shared_data: Path) -> None:
    for row in edge_cases(shared_data, "prompt_differs_by_naive_split"):
        found = converted(row)
        chosen, rejected = hh_turns(row["chosen"]), hh_turns(row["rejected"])
        assert found["prompt"] + found["chosen"] == chosen
        assert found["prompt"] + found["rejected"] == rejected
        assert found["prompt"][-1]["role"] == "user"
        assert found["chosen"][0] != found["rejected"][0]


def test_hh_empty_replies_are_named_and_empty_turns_before_them_kept(shared_data: Path) -> None:
    rows, summary = run("hh", *sorted((shared_data / "hh-rlhf").glob("*/*.jsonl.gz")))
    assert summary.skipped[f"rejected: {EMPTY}"].first[1] == "helpful-base/train.jsonl.gz:59"
    assert summary.read == 3151
    assert len(rows) == 3133
    assert all(row["chosen"][-1]["content"] and row["rejected"][-1]["content"] for row in rows)


def test_hh_turns_of_one_role_are_joined_and_inline_human_stays_text(shared_data: Path) -> None:
    for quirk in ("consecutive_same_role", "inline_Human_in_text"):
        for row in edge_cases(shared_data, quirk):
            found = converted(row)
            for side in ("chosen", "rejected"):
                roles = [turn["role"] for turn in hh_turns(row[side])]
                assert all(one != two for one, two in itertools.pairwise(roles))
                # No word is lost.
                words = re.sub(r"\n\n(Human|Assistant):", " ", row[side]).split()
                assert " ".join(turn["content"] for turn in hh_turns(row[side])).split() == words
            assert not isinstance(found, Skip)
    inline = converted(
        {
            "chosen": "\n\nHuman: Hi\n\nAssistant: Human: who?",
            "rejected": "\n\nHuman: Hi\n\nAssistant: x\n\n  Human: y",
        }
    )
    assert inline["chosen"] == [{"role": "assistant", "content": "Human: who?"}]
    assert inline["rejected"] == [{"role": "assistant", "content": "x\n\n  Human: y"}]


def test_hh_a_transcript_without_a_last_answer_is_named() -> None:
    row = {"chosen": "\n\nHuman: Hi\n\nAssistant: Yes", "rejected": "\n\nHuman: Hi\n\nAssistant: No\n\nHuman: Why?"}
    found = converted(row)
    with pytest.raises(ValidationError, match="ends with role 'user'"):
        Preference.model_validate(found)
    assert converted({"chosen": "\n\nHuman: Hi", "rejected": "\n\nHuman: Hi\n\nAssistant: x"}) == Skip(
        "a transcript does not end with an assistant turn"
    )
    assert converted({"chosen": "no turns", "rejected": "none either"}) == Skip(
        "chosen and rejected share no human turn"
    )


def test_hh_first_questions_repeat_across_rows(shared_data: Path) -> None:
    rows, _ = run("hh", shared_data / "hh-rlhf" / "helpful-base" / "train.jsonl.gz")
    repeated = [n for n in Counter(row["prompt"][0]["content"] for row in rows).values() if n > 1]
    assert repeated, "the reason why splits go by the first question"


pieces = st.lists(
    st.sampled_from(["\n\nHuman:", "\n\nAssistant:", " a", " b", "Human:", "\n\n", " Assistant: x", ""]), max_size=9
)


@settings(deadline=None, max_examples=300, suppress_health_check=[HealthCheck.too_slow])
@given(pieces, pieces, pieces)
def test_hh_the_short_way_equals_the_general_way(shared: list[str], one: list[str], two: list[str]) -> None:
    prefix = "\n\nHuman: hello" + "".join(shared)
    chosen, rejected = prefix + "".join(one), prefix + "".join(two)
    short = hh_last_turn(chosen, rejected)
    general = hh_common_prefix(chosen, rejected)
    if short is not None and short["chosen"] != short["rejected"]:
        assert short == general


@pytest.mark.parametrize("file", [name for name in COUNTS if name.startswith("hh-")])
def test_hh_the_short_way_equals_the_general_way_on_real_rows(shared_data: Path, file: str) -> None:
    taken = 0
    for row in raw(shared_data / file):
        short = hh_last_turn(row["chosen"], row["rejected"])
        if short is not None and row["chosen"] != row["rejected"]:
            taken += 1
            assert short == hh_common_prefix(row["chosen"], row["rejected"])
    assert taken > 0.9 * COUNTS[file][2]


# --- instruction data -------------------------------------------------------------------------------------------


def test_dolly_context_joins_the_question_and_loses_citation_marks(shared_data: Path) -> None:
    rows, _ = run("dolly", shared_data / "dolly" / "databricks-dolly-15k.sample.jsonl")
    texts = [row["messages"][0]["content"] for row in rows]
    assert texts[0].startswith("When did Virgin Australia start operating?\n\nVirgin Australia, the trading name")
    assert "\n\n" not in texts[1], "an empty context adds nothing"
    record = {"instruction": "q", "context": "It rose.[2] Then [3 apples] fell.[14]", "response": "r", "category": "c"}
    (row,) = FORMATS["dolly"].convert(record, ImportOptions())
    assert row["messages"][0]["content"] == "q\n\nIt rose. Then [3 apples] fell."  # type: ignore[index]


def test_alpaca_prompt_template_and_end_mark_are_taken_off(shared_data: Path) -> None:
    rows, _ = run("alpaca-prompt", shared_data / "dolly" / "dolly_alpaca_prompt.jsonl")
    assert rows[0]["messages"] == [
        {"role": "user", "content": "Which US state produces the most pineapples?"},
        {"role": "assistant", "content": "Hawaii"},
    ]
    assert rows[1]["messages"][0]["content"].startswith("Extract the majors of Suzanne Collins")
    assert "\n\nCollins graduated" in rows[1]["messages"][0]["content"]
    assert not any("###" in turn["content"] for row in rows for turn in row["messages"])


def test_alpaca_spellings_of_no_input_are_no_input(shared_data: Path) -> None:
    path = shared_data / "alpaca" / "alpaca_data.json"
    rows, summary = run("alpaca", path)
    texts = [row["messages"][0]["content"] for row in rows]
    assert not any(re.search(r"no\s*input\W*$", text, re.IGNORECASE) for text in texts)
    spelled = [record for record in raw(path) if re.fullmatch(r"\W*no\s*input\W*", record["input"], re.IGNORECASE)]
    assert len({record["input"] for record in spelled}) == 9
    assert any(text.endswith("\n\nbartender") for text in texts), "a short real input stays"
    assert summary.skipped[f"messages: {EMPTY}"].count == 1
    assert {row["licence"] for row in rows} == {"CC-BY-NC-4.0"}


def test_gsm8k_answers_become_facts_without_marks_and_commas(shared_data: Path) -> None:
    rows, _ = run("gsm8k", shared_data / "gsm8k" / "train.jsonl", shared_data / "gsm8k" / "test.jsonl")
    assert all(re.fullmatch(r"-?\d+(\.\d+)?", row["facts"]["answer"]) for row in rows)
    assert not any("<<" in turn["content"] or "####" in turn["content"] for row in rows for turn in row["messages"])
    assert any("," in record["answer"].rpartition("####")[2] for record in raw(shared_data / "gsm8k" / "train.jsonl"))


def test_bitext_paraphrases_of_an_intent_stay_on_one_side(shared_data: Path) -> None:
    path = shared_data / "bitext-customer-support" / "Bitext_Sample_Customer_Support_Training_Dataset.csv"
    rows, _ = run("bitext", path)
    splits = Splits({"train": 0.7, "test": 0.3}, by="intent")
    sides = {side: {row["intent"] for row in rows if splits.of(row) == side} for side in splits.names}
    assert not sides["train"] & sides["test"]
    assert all(sides.values())
    by_question = Splits({"train": 0.7, "test": 0.3})
    assert len({by_question.of(row) for row in rows if row["intent"] == rows[0]["intent"]}) == 2, "the leak it stops"


def test_bitext_line_ends_entities_and_placeholders(shared_data: Path) -> None:
    path = shared_data / "bitext-customer-support" / "Bitext_Sample_Customer_Support_Training_Dataset.csv"
    records = raw(path)
    rows, _ = run("bitext", path)
    assert sum("\r\n" in record["response"] for record in records) == 1345
    assert not any("\r" in turn["content"] for row in rows for turn in row["messages"])
    assert any("{{Website Name}}" in row["messages"][1]["content"] for row in rows)
    assert records[1]["entity_value"] == "4587345"
    assert rows[1]["entity"] == {"type": "order_id", "value": "00004587345"}, "leading zeros are back"
    assert sum("entity" not in row for row in rows) > len(rows) / 2
    assert {row["category"] for row in rows} >= {"ORDER", "REFUND", "INVOICE"}


# --- preferences, ratings, trees --------------------------------------------------------------------------------


def test_shp_margin_is_the_logarithm_of_the_score_ratio(shared_data: Path) -> None:
    path = shared_data / "format_rows" / "shp_askculinary.jsonl"
    rows, _ = run("shp", path)
    (record,) = raw(path)
    assert rows[0]["margin"] == pytest.approx(math.log(record["score_ratio"]))
    assert rows[0]["chosen"][0]["content"] == record["human_ref_A"]
    assert "https://i.imgur.com/" in rows[0]["prompt"][0]["content"], "escaped slashes are slashes"
    (swapped,) = FORMATS["shp"].convert(record | {"labels": 0}, ImportOptions())
    assert swapped["chosen"][0]["content"] == record["human_ref_B"]  # type: ignore[index]
    assert run("shp", path, options=ImportOptions(min_score_ratio=3))[1].skipped["score ratio below 3"].count == 1
    (refused,) = FORMATS["shp"].convert(record | {"score_ratio": 0.5}, ImportOptions())
    assert isinstance(refused, Skip)


def test_helpsteer_and_ultrafeedback_ratings_become_numbers(shared_data: Path) -> None:
    (row,), _ = run("helpsteer", shared_data / "format_rows" / "helpsteer.jsonl")
    assert row["aspects"] == {"helpfulness": 3, "correctness": 4, "coherence": 4, "complexity": 2, "verbosity": 2}
    path = shared_data / "format_rows" / "ultrafeedback_partial.jsonl"
    (row,), _ = run("ultrafeedback", path)
    assert row["aspects"] == {"instruction_following": 2, "honesty": 3, "truthfulness": 3, "helpfulness": 3}
    assert row["model"] == "falcon-40b-instruct"
    assert "facts" not in row, 'correct_answers ["None"] is none'
    (record,) = raw(path)
    record["correct_answers"] = ["Cairo"]
    for annotation in record["completions"][0]["annotations"].values():
        annotation["Rating"] = "N/A"
    assert list(FORMATS["ultrafeedback"].convert(record, ImportOptions())) == [Skip("completion without a rating")]
    record["completions"][0]["annotations"]["honesty"]["Rating"] = "4"
    (row,) = FORMATS["ultrafeedback"].convert(record, ImportOptions())
    assert (row["aspects"], row["facts"]) == ({"honesty": 4.0}, {"correct_answers": ["Cairo"]})  # type: ignore[index]


def test_usr_ratings_keep_their_scales_and_the_dialogue_ends_with_the_user(shared_data: Path) -> None:
    rows, _ = run("usr", shared_data / "topical-chat-usr" / "topical_chat.json")
    assert all(row["prompt"][-1]["role"] == "user" for row in rows)
    assert rows[0]["aspects"]["overall"] == pytest.approx(14 / 3)
    assert rows[0]["scales"]["groundedness"] == (0, 1)


def test_llama_factory_files_keep_system_turns_and_labels(shared_data: Path) -> None:
    rows, _ = run("sharegpt-dpo", shared_data / "llamafactory-demo" / "dpo_en_demo.json")
    assert sum(row["prompt"][0]["role"] == "system" for row in rows) == 61
    assert {len(row["prompt"]) for row in rows} <= set(range(1, 14))
    labelled, _ = run("kto", shared_data / "llamafactory-demo" / "kto_en_demo.json")
    assert {row["label"] for row in labelled} == {True, False}
    turn = {"conversations": [{"from": "martian", "value": "x"}]}
    assert list(FORMATS["sharegpt"].convert(turn, ImportOptions())) == [Skip("turn of unknown role 'martian'")]
    open_end = {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"},
                                  {"from": "human", "value": "c"}]}  # fmt: skip
    (row,) = FORMATS["sharegpt"].convert(open_end, ImportOptions())
    assert [turn["role"] for turn in row["messages"]] == ["user", "assistant"]  # type: ignore[index]


def tree(*replies: dict[str, Any], **root: Any) -> dict[str, Any]:
    def node(role: str, **fields: Any) -> dict[str, Any]:
        return {"message_id": "m", "role": role, "lang": "en", "deleted": False, "replies": []} | fields

    answers = [node("assistant", **reply) for reply in replies]
    prompt = node("prompter", text="question", replies=answers) | root
    return {"message_tree_id": "t", "tree_state": root.pop("state", "ready_for_export"), "prompt": prompt}


def oasst(record: dict[str, Any], *languages: str) -> tuple[list[tuple[str, str, float]], list[str]]:
    parts = list(FORMATS["oasst"].convert(record, ImportOptions(frozenset(languages))))
    rows = [part for part in parts if not isinstance(part, Skip)]
    return (
        [(row["chosen"][0]["content"], row["rejected"][0]["content"], row["margin"]) for row in rows],
        [part.reason for part in parts if isinstance(part, Skip)],
    )


def test_oasst_ranks_become_all_pairs() -> None:
    replies = ({"text": "c", "rank": 2}, {"text": "a", "rank": 0}, {"text": "b", "rank": 1})
    assert oasst(tree(*replies)) == ([("a", "b", 1.0), ("a", "c", 2.0), ("b", "c", 1.0)], [])
    tied = ({"text": "a", "rank": 0}, {"text": "b", "rank": 0})
    assert oasst(tree(*tied)) == ([], ["replies of equal rank"])


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"deleted": True}, "deleted message"),
        ({"review_result": False}, "spam"),
        ({"labels": {"spam": {"value": 0.8, "count": 3}}}, "spam"),
        ({"labels": {"name": ["spam", "quality"], "value": [0.9, 0.1]}}, "spam"),
        ({"emojis": {"red_flag": 1}}, "flagged by a reader"),
        ({"lang": "de"}, "language de"),
    ],
)
def test_oasst_deleted_spam_flagged_and_foreign_messages_are_left_out(change: dict[str, Any], reason: str) -> None:
    replies = ({"text": "a", "rank": 0}, {"text": "b", "rank": 1} | change, {"text": "c", "rank": 2})
    assert oasst(tree(*replies), "en") == ([("a", "c", 2.0)], [reason])
    assert oasst(tree(*replies, **change), "en") == ([], [reason]), "with the root goes the tree"


def test_oasst_quirks_of_the_real_trees(shared_data: Path) -> None:
    path = shared_data / "oasst" / "en_100.trees.jsonl.gz"

    def nodes(node: dict[str, Any]) -> Any:
        yield node
        for reply in node.get("replies") or []:
            yield from nodes(reply)

    messages = [node for record in raw(path) for node in nodes(record["prompt"])]
    assert len(messages) == 705
    assert sum("rank" in node for node in messages) == 398, "a lone reply has no rank"
    assert any(name.startswith("_skip") for node in messages for name in node.get("emojis", {}))
    rows, _ = run("oasst", path)
    assert all(row["margin"] >= 1 for row in rows)
    assert all(row["prompt"][-1]["role"] == "user" for row in rows)
    assert max(len(row["prompt"]) for row in rows) > 1, "deeper turns carry their path"
    synthetic = {node["text"] for node in messages if node["synthetic"]}
    demonstrations, summary = run("oasst-demonstrations", path)
    assert not synthetic & {turn["content"] for row in demonstrations for turn in row["messages"]}
    assert len(demonstrations) == 54
    assert summary.skipped["made by a model"].count == 3
    assert run("oasst", path, options=ImportOptions(frozenset({"de"})))[1].skipped["language en"].count == 59
    bare, _ = run("oasst", shared_data / "oasst" / "en_100_message.jsonl")
    assert {row["tree"] for row in bare} & {row["tree"] for row in rows}, "trees without their wrapper"


def test_mmlu_and_truthfulqa_cells_survive_quotes_newlines_and_spaces(shared_data: Path) -> None:
    records = list(read_records(shared_data / "mmlu" / "test" / "world_religions_test.csv", header=False))
    assert sum(record.data["0"].startswith(" ") for record in records) == 47  # type: ignore[index, union-attr]
    assert {record.data["5"] for record in records} <= set("ABCD")  # type: ignore[index, union-attr]
    banking = list(read_records(shared_data / "banking77" / "train.csv"))
    assert any("\n" in record.data["text"] for record in banking)  # type: ignore[index, union-attr]
    assert [record.line for record in banking] != list(range(2, len(banking) + 2)), "lines of the file, not rows"


def test_json_arrays_are_read_one_object_at_a_time_with_lines(shared_data: Path) -> None:
    path = shared_data / "alpaca" / "alpaca_data.json"
    records = list(read_records(path))
    assert [record.data for record in records] == json.loads(path.read_text())
    lines = path.read_text().split("\n")
    for record in records[:: len(records) // 7]:
        here = "\n".join(lines[record.line - 1 : record.line + 1])
        assert here.lstrip().startswith("{")
        assert orjson.dumps(record.data["instruction"]).decode()[:20] in here  # type: ignore[index]
