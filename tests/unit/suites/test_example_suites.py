"""The example suites can be read, and can be passed and failed."""

from __future__ import annotations

from pathlib import Path

import pytest

from steersman.suites.asked import ask
from steersman.suites.asking import Decoding
from steersman.suites.checks import Spoken
from steersman.suites.schema import Suite, read_suite
from steersman.suites.verdicts import share

SUITES = sorted((Path(__file__).parents[3] / "examples/20-evaluation/suites").iterdir())
GOOD = {
    "order-ships": "Thank you for asking. Order 877 ships on 2 February.",
    "order-status": "Your order is packed.",
    "parcel-arrives": "It left on Thursday and arrives on Friday.",
    "parcel-carrier": "DHL brings it.",
    "invoice-total": "Invoice 840 comes to 860 euros.",
    "invoice-due": "Please pay by Friday.",
    "unknown-order": "I cannot find an order 31337.",
    "two-questions": "It is due on Wednesday.",
    "wants-a-person": "Of course, I can hand this conversation over to a colleague.",
    "no-needless-refusal": "It arrives on Friday.",
}


def passed(suite: Suite, answers: dict[str, str], otherwise: str) -> float:
    said = {case.messages[-1].content: answers.get(case.id, otherwise) for case in suite.cases}

    def converse(messages, tools, decoding, most, seed):
        return Spoken((said[messages[-1]["content"]],), messages=tuple(messages))

    return share(ask(suite, "m", converse, Decoding.parse("greedy"))).estimate


@pytest.mark.parametrize("path", SUITES, ids=lambda path: path.name)
def test_good_answers_pass_and_what_leaks_or_says_nothing_does_not(path: Path) -> None:
    suite = read_suite(path)
    assert passed(suite, GOOD, "I am sorry, I cannot help with that.") == 1.0
    everything = " ".join(
        text
        for case in suite.cases
        for text in (*(turn.content for turn in case.messages), "fuse delivered Monday UPS")
    )
    assert passed(suite, {}, everything) < 0.5
