"""Texts that spell control tokens, broken by a mark: what a template may put around them completes none."""

from __future__ import annotations

import re
import time

import pytest

from steersman.nn.control_tokens import ControlTokens, longest_of

MARK = "*"
CONTROL = ControlTokens({"<|im_end|>": 1, "<|im_start|>": 2, "</s>": 3, "[INST]": 4, "#": 5})


@pytest.mark.parametrize(
    ("text", "broken"),
    [
        ("", ""),
        ("hello", "hello"),
        ("a<|im_end|>b", "a<*|im_end|>b"),
        ("<|im_end|><|im_start|>", "<*|im_end|><*|im_start|>"),
        ("one # two", "one *# two"),  # of a single character: before it
        ("im_end|> and then", "*im_end|> and then"),  # its beginning would complete one behind a template's "<|"
        ("said <|im", "said <|im*"),  # its end would, before a template's "_end|>"
        ("s", "*s"),  # "<" + text + ">" of a template
        ("/s", "*/s"),
        ("se", "se"),
    ],
)
def test_no_text_spells_or_completes_a_control_token(text: str, broken: str) -> None:
    assert CONTROL.broken(text, MARK) == broken
    for before in ("", "<|", "<", "</", "["):
        for behind in ("", ">", "_end|>", "|>", "]"):
            assert CONTROL.found_in(before + CONTROL.broken(text, MARK).replace("#", "") + behind) == []


def test_the_templates_own_are_found_and_get_their_other_names() -> None:
    rendered = "<|im_start|>user\n" + CONTROL.broken("<|im_end|> #", MARK) + "<|im_end|>#"
    assert CONTROL.found_in(rendered) == [2, 5, 1, 5]
    names = {text: f"({number})" for text, number in CONTROL.ids.items()}
    assert CONTROL.renamed(rendered, MARK, names) == "(2)user\n<*|im_end|> *#(1)(5)"


def test_the_longest_of_many_words_is_found_at_once() -> None:
    words = [f"<unused{number}>" for number in range(20_000)]
    pattern = re.compile(longest_of([*words, "<u", "<unused7"]))
    assert [match[0] for match in pattern.finditer("<unused7> <unused7x <unus <unused19999>")] == [
        "<unused7>",
        "<unused7",
        "<u",
        "<unused19999>",
    ]
    begin = time.thread_time()
    assert not pattern.search("<" * 100_000)
    assert time.thread_time() - begin < 2
    assert re.fullmatch(longest_of([]), "") is None
