"""The exact rubric on texts that people and models really write, and on texts that try to cheat it."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from steersman.demo.rubric import score, values

PROMPT = [
    {"role": "system", "content": "Brandt, order 482: left Monday, carrier DHL, arrives 14 June."},
    {"role": "user", "content": "When do I get my 3 lamps?"},
]
FACTS = {
    "asked": "arrival",
    "kind": "day",
    "needed": ["14 June"],
    "record": {"order": "482", "carrier": "DHL", "sent": "Monday", "arrival": "14 June"},
}
GOOD = "Thank you for asking, your order 482 arrives on 14 June."


def total(answer: str) -> float:
    return score(PROMPT, answer, FACTS).total


@pytest.mark.parametrize(
    "answer",
    [
        GOOD,
        "Happy to help! Your three lamps left on Monday and will be delivered by DHL on June 14th.",
        "I'm sorry for the wait. Delivery is on the 14th of June.",
        "  your parcel should reach you on 14 june, thanks for your patience!",
    ],
)
def test_good_answers_in_free_wording_get_full_marks(answer: str) -> None:
    assert total(answer) == 1.0


@pytest.mark.parametrize(
    ("answer", "criterion", "expected"),
    [
        ("Thank you, your order arrives on 15 June.", "grounded", 0.0),
        ("Thank you, your order arrives on 15 June.", "no_invented", 0.0),
        ("Thank you, your order does not arrive on 14 June.", "grounded", 0.0),
        ("Do not worry, it arrives on 14 June. Thank you!", "grounded", 1.0),
        ("Thank you, it left on Monday.", "grounded", 0.0),
        ("Thank you, it left on Monday.", "no_invented", 1.0),
        ("Thank you, GLS delivers it on 14 June.", "no_invented", 0.0),
        ("Thank you, it arrives 14 June, call Ms Weber.", "no_invented", 0.0),
        ("Thank you, it arrives 14 June, call [phone number].", "no_invented", 0.0),
        ("Thank you, it arrives 14 June, see www.example.com/482.", "no_invented", 0.0),
        ("Thank you, it arrives within 24 hours, on 14 June.", "no_invented", 0.0),
        ("Thank you, it arrives tomorrow.", "no_invented", 0.0),
        ("We will look into it, thank you.", "answers", 0.0),
        ("I am sorry, I cannot tell you whether it is Monday.", "answers", 0.0),
        ("14 June. Thanks.", "answers", 0.5),
        ("Your order arrives on 14 June.", "polite", 0.4),
        ("Thank you, stop asking, it arrives on 14 June.", "polite", 0.0),
        ("Thanks, thanks, please, please, sorry, sorry: it arrives on 14 June.", "polite", 0.4),
        ("To be honest, thank you, it arrives on 14 June.", "concise", 0.4),
        ("June.", "concise", 0.5),
        ("Thank you, your order arrives on 14 June and", "concise", 0.5),
    ],
)
def test_each_criterion_by_itself(answer: str, criterion: str, expected: float) -> None:
    assert getattr(score(PROMPT, answer, FACTS), criterion) == pytest.approx(expected)


@pytest.mark.parametrize(
    "answer",
    [
        "Thank you. " * 12,
        "Thank you please sorry gladly.",
        "14 June " * 10,
        "Your order arrives on 14 June. " * 5,
        "Monday Tuesday Wednesday Thursday Friday 12 June 13 June 14 June 15 June, thank you.",
        "Thank you for your message, our team will look into it soon.",
        "Thank you, your order arrives on 15 June.",
        "Stop whining, your order 482 arrives on 14 June.",
        "",
        "   \n",
    ],
)
def test_cheating_and_bad_answers_stay_far_below_a_good_one(answer: str) -> None:
    assert total(answer) <= 0.75
    assert total(answer) <= total(GOOD) - 0.25


def test_manners_are_ranked_as_the_written_rubric_says() -> None:
    fact = "your order 482 arrives on 14 June"
    ranked = [
        f"Thank you for asking, {fact}.",
        f"As of now, {fact}. That is the current entry.",
        f"As you may know, to be honest, {fact}. And so on and so forth.",
        f"Learn to read, {fact}.",
        "Thank you for asking, our team will look into it soon.",
        "Thank you for asking, I think it arrives on Friday.",  # invented
    ]
    scores = [total(answer) for answer in ranked]
    assert scores == sorted(scores, reverse=True)
    assert len(set(scores)) == len(scores)


def test_another_value_of_the_record_is_a_wrong_answer_too() -> None:
    assert total("Thank you, your order arrives on Monday.") == pytest.approx(0.15)


def test_empty_answer_scores_zero_on_everything() -> None:
    assert set(score(PROMPT, "  ", FACTS).model_dump().values()) == {0.0}


def test_an_order_number_is_no_answer_to_a_question_for_an_amount() -> None:
    facts = {"asked": "total", "kind": "amount", "needed": ["240 euros"], "record": {"invoice": "913"}}
    prompt = [{"role": "user", "content": "How much is invoice 913?"}]
    assert score(prompt, "Thank you, I see your invoice 913.", facts).answers == 0.0
    assert score(prompt, "Thank you, invoice 913 is €240.00.", facts).total == 1.0


def test_a_status_that_the_record_does_not_hold_is_invented() -> None:
    facts = {"asked": "status", "kind": "status", "needed": ["packed"], "record": {"status": "packed"}}
    prompt = [{"role": "user", "content": "How is my order?"}]
    assert score(prompt, "Thank you, your order is packed.", facts).total == 1.0
    assert score(prompt, "Thank you, your order is on hold.", facts).no_invented == 0.0


def test_facts_need_only_the_needed_values() -> None:
    assert score(PROMPT, GOOD, {"needed": ["14 June", "482"]}).total == 1.0
    assert score(PROMPT, GOOD, {"needed": ["14 June", "483"]}).grounded == 0.5


def test_values_have_one_normal_form() -> None:
    assert values("1,200.00 and 1200") == {("number", "1200")}
    assert values("June 3rd, the 3rd of June, 3 June") == {("date", "3 june")}
    assert values("Mr. Cole and Mr Cole, fedex, Mondays") == {
        ("person", "cole"),
        ("carrier", "fedex"),
        ("weekday", "monday"),
    }
    assert values("1. First\n2. Second") == set()


@given(st.text(max_size=200))
def test_any_text_gets_a_score_between_0_and_1(answer: str) -> None:
    for value in score(PROMPT, answer, FACTS).model_dump().values():
        assert 0.0 <= value <= 1.0
