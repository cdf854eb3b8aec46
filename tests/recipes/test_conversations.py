"""Follow-up questions: right answers, nothing held out in training, and texts that do not change."""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from dataclasses import astuple

import pytest

from recipes.nano.conversations import (
    ASKED_NAMES,
    FORMS,
    FURTHER_FORMS,
    FURTHER_NAMES,
    NAMES,
    Conversation,
    conversations,
    forms,
)
from recipes.nano.questions import all_questions, words

pytestmark = pytest.mark.slow

NUMBERS = {words(number): number for number in range(1001)}
OPERATORS = {"plus": int.__add__, "minus": int.__sub__, "times": int.__mul__}


@pytest.fixture(scope="module")
def train() -> list[Conversation]:
    return conversations("train", 6000, 0)


@pytest.fixture(scope="module")
def held_out() -> list[Conversation]:
    return conversations("held_out", 1000, 0)


def last_number(text: str) -> int | None:
    """The result that an answer ends with."""
    found = re.search(r"(?: is|comes) ([a-z -]+)\.$", text)
    return NUMBERS.get(found[1]) if found else None


def test_number_of_forms():
    assert sum(len(texts) for texts in FORMS.values()) >= 300
    assert {form for form, _ in forms("train")} == {form for form, _ in forms("held_out")} == set(FORMS)
    assert not set(forms("train")) & set(forms("held_out"))
    assert set(FURTHER_FORMS) == set(FORMS)
    held_out = {text.lower() for _, text in forms("held_out")}
    assert not {text.lower() for texts in FURTHER_FORMS.values() for text in texts} & held_out
    assert not set(FURTHER_NAMES) & set(NAMES)


def test_further_phrasings_have_the_fields_of_their_form():
    for form, texts in FURTHER_FORMS.items():
        expected = {tuple(sorted(re.findall(r"{(\w+)}", text))) for text in FORMS[form]}
        for text in texts:
            assert tuple(sorted(re.findall(r"{(\w+)}", text))) in expected, text


def test_calculations_continue_with_the_last_result(train, held_out):
    checked = Counter()
    for made in train + held_out:
        if made.kind in ("add", "subtract", "multiply"):
            a, operator, b, result = re.fullmatch(
                r"([a-z -]+) (plus|minus|times) ([a-z -]+) is ([a-z -]+)\.", made.answer.lower()
            ).groups()
            assert NUMBERS[a] == last_number(made.history[-1].answer), made
            assert OPERATORS[operator](NUMBERS[a], NUMBERS[b]) == NUMBERS[result], made
            assert b in made.question.lower(), made
            checked[made.kind] += 1
        elif made.kind in ("after", "before") and made.question in FOLLOW_UPS:
            assert made.answer.lower().split()[1] in made.history[-1].answer.lower(), made
            checked[made.kind] += 1
    assert len(checked) == 5
    assert min(checked.values()) >= 20


FOLLOW_UPS = {text[0].upper() + text[1:] for form in ("after", "before") for text in FORMS[form]}


@pytest.mark.parametrize(
    ("kind", "answer"),
    [
        ("again", lambda made: made.history[-1].answer),
        ("asked", lambda made: f"You asked: {made.history[-1].question}"),
        ("first_asked", lambda made: f"You asked: {made.history[0].question}"),
        ("sure", lambda made: f"Yes. {made.history[-1].answer}"),
    ],
)
def test_answers_about_the_conversation(train, kind, answer):
    found = [made for made in train if made.kind == kind]
    assert len(found) > 50
    for made in found:
        assert made.answer == answer(made)


def test_names_come_from_where_they_were_told(train, held_out):
    told = Counter()
    for made in train + held_out:
        if made.kind in ("ask_user_name", "system_name"):
            past = " ".join(turn.question for turn in made.history)
            if made.answer == "I am sorry, I don't know that.":
                place = "nowhere"
                assert not [name for name in NAMES if re.search(rf"\b{name}\b", f"{made.system} {past}")], made
            else:
                name = re.fullmatch(r"(?:My|Your) name is (\w+)\.", made.answer)[1]
                place = "system" if re.search(rf"\b{name}\b", made.system) else "history"
                assert re.search(rf"\b{name}\b", f"{made.system} {past}"), made
            told[made.kind, place] += 1
    assert min(told[key] for key in (("ask_user_name", "system"), ("ask_user_name", "history"))) > 20
    assert told["system_name", "system"] == sum(count for (kind, _), count in told.items() if kind == "system_name")


def test_a_name_of_the_system_text_is_not_contradicted(train):
    for made in train:
        assert not any(turn.answer == "My name is Nano." for turn in made.history)
        if made.answer == "My name is Nano.":
            assert made.system in ("", *FORMS["system_plain"], *FURTHER_FORMS["system_plain"])


def test_nothing_held_out_is_trained(train, held_out):
    trained = {made.question for made in train}
    questions = {item.question for item in all_questions("held_out")}
    assert not trained & questions
    for made in train:
        assert not {turn.question for turn in made.history} & questions
    fixed = {text for _, text in forms("held_out") if "{" not in text}
    assert not {made.question.lower() for made in train} & {text.lower() for text in fixed}
    assert {made.question.lower() for made in held_out} & {text.lower() for text in fixed}


def test_names_that_are_asked_for_are_trained(train, held_out):
    """Those of held-out conversations, as a name that training does not have is not copied."""
    spoken = " ".join(f"{made.system} {made.question} {made.answer}" for made in train)
    assert all(re.search(rf"\b{name}\b", spoken) for name in ASKED_NAMES)
    asked = {name for name in NAMES for made in held_out if made.answer == f"My name is {name}."}
    assert asked
    assert asked <= set(ASKED_NAMES)


def test_texts_do_not_change(train, held_out):
    def digest(made: list[Conversation]) -> str:
        return hashlib.sha256(repr([astuple(one) for one in made]).encode()).hexdigest()[:16]

    assert (digest(train), digest(held_out)) == ("8fbd98f87c17618c", "5f46a972bae2ae20")
