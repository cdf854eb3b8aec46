"""Questions and sentences: correct answers, nothing held out in training, and texts that do not change."""

from __future__ import annotations

import hashlib
import re
from collections import Counter, defaultdict
from collections.abc import Iterable

import pytest

from recipes.nano.questions import (
    KINDS,
    Item,
    all_questions,
    further_counts,
    larger_products,
    normalize,
    read_facts,
    sample,
    words,
)
from recipes.nano.sentences import free_sentences, pattern_sentences, slots

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def train() -> list[Item]:
    return all_questions("train")


@pytest.fixture(scope="module")
def further() -> list[Item]:
    return all_questions("train", further=True)


@pytest.fixture(scope="module")
def held_out() -> list[Item]:
    return all_questions("held_out")


NUMBERS = {words(number): number for number in range(1001)}


def numbers(text: str) -> list[int]:
    """The numbers in a text: the longest runs of words that name one."""
    parts = re.findall(r"[a-z-]+", text.lower())
    found, start = [], 0
    while start < len(parts):
        for end in range(min(start + 4, len(parts)), start, -1):
            if (number := NUMBERS.get(" ".join(parts[start:end]))) is not None:
                found.append(number)
                start = end
                break
        else:
            start += 1
    return found


@pytest.mark.parametrize(
    ("number", "expected"),
    [
        (0, "zero"),
        (13, "thirteen"),
        (20, "twenty"),
        (47, "forty-seven"),
        (100, "one hundred"),
        (120, "one hundred twenty"),
        (365, "three hundred sixty-five"),
        (1000, "one thousand"),
    ],
)
def test_words(number: int, expected: str):
    assert words(number) == expected


@pytest.mark.parametrize("number", [-1, 1001])
def test_words_out_of_range(number: int):
    with pytest.raises(ValueError, match=f"expected a number from 0 to 1000, found {number}"):
        words(number)


@pytest.mark.parametrize(
    ("question", "answer"),
    [
        ("What is seven plus five?", "Seven plus five is twelve."),
        ("Add sixty-four to thirty-six.", "Sixty-four plus thirty-six is one hundred."),
        ("Take five from twelve.", "Twelve minus five is seven."),
        ("What is the difference between nine and nine?", "Nine minus nine is zero."),
        ("Multiply ten by ten.", "Ten times ten is one hundred."),
        ("Count from three to seven.", "Three, four, five, six, seven."),
        ("Count from nine to seven.", "Nine, eight, seven."),
        ("What comes after ninety-nine?", "After ninety-nine comes one hundred."),
        ("What day comes after Sunday?", "After Sunday comes Monday."),
        ("Which month comes before January?", "Before January comes December."),
        ("What is the opposite of hot?", "The opposite of hot is cold."),
        ("What is the opposite of cold?", "The opposite of cold is hot."),
        ("What color is grass?", "Grass is green."),
        ("What does a cow say?", "A cow says moo."),
        ("Which animal says moo?", "A cow says moo."),
        ("What is the capital of France?", "The capital of France is Paris."),
        ("Paris is the capital of which country?", "Paris is the capital of France."),
        ("How many minutes are in an hour?", "There are sixty minutes in an hour."),
        ("What is your name?", "My name is Nano."),
        ("How is the weather?", "I can't look outside, so I don't know."),
        ("Good evening.", "Good evening. How can I help you?"),
        ("Thank you.", "You are welcome."),
        ("Who is the president of France?", "I am sorry, I don't know that."),
    ],
)
def test_examples(train: list[Item], held_out: list[Item], question: str, answer: str):
    assert {item.answer for item in train + held_out if item.question == question} == {answer}


def test_number_of_facts_and_phrasings(train: list[Item], held_out: list[Item]):
    calculated = {"sum", "difference", "product", "count"}
    assert sum(len(kind.facts) for kind in KINDS.values()) > 10_000
    assert len({fact.answer for kind in KINDS.values() if kind.name not in calculated for fact in kind.facts}) >= 300
    for kind in KINDS.values():
        assert len(set(kind.phrasings)) == len(kind.phrasings) >= 15, kind.name
        assert len({fact.key for fact in kind.facts}) == len(kind.facts), kind.name
    assert {item.kind for item in train} == {item.kind for item in held_out} == set(KINDS)


def test_arithmetic_answers_are_right(train: list[Item], held_out: list[Item]):
    calculate = {"sum": int.__add__, "difference": int.__sub__, "product": int.__mul__}
    seen: dict[str, set[tuple[int, int]]] = defaultdict(set)
    for kind in calculate:
        for fact in KINDS[kind].facts:
            a, b, result = numbers(fact.answer)
            assert result == calculate[kind](a, b), fact
            assert [NUMBERS[fact.fields["a"]], NUMBERS[fact.fields["b"]]] == [a, b], fact
            seen[kind].add((a, b))
    assert seen["sum"] == {(a, b) for a in range(1, 100) for b in range(1, 100) if a + b <= 100}
    assert seen["difference"] == {(a, b) for a in range(1, 101) for b in range(1, a + 1)}
    assert seen["product"] == {(a, b) for a in range(1, 11) for b in range(1, 11)}
    # Every phrasing asks for the two numbers that its answer begins with.
    for item in (train + held_out)[::31]:
        if item.kind in calculate and "one hundred" not in item.question:
            assert sorted(numbers(item.question)) == sorted(numbers(item.answer)[:2]), item


def test_count_answers_go_from_first_to_last(train: list[Item], held_out: list[Item]):
    for item in train + held_out:
        if item.kind == "count":
            first, last = numbers(item.question)
            expected = range(first, last + 1) if first < last else range(first, last - 1, -1)
            assert numbers(item.answer) == list(expected), item


def test_before_and_after_are_one_apart(train: list[Item], held_out: list[Item]):
    for item in train + held_out:
        if item.kind in ("after", "before") and (found := numbers(item.answer)):
            assert found[1] - found[0] == (1 if item.kind == "after" else -1), item


def test_each_question_has_one_answer(train: list[Item], held_out: list[Item]):
    answers: dict[str, set[str]] = defaultdict(set)
    for item in train + held_out:
        answers[normalize(item.question)].add(item.answer)
    assert {question: found for question, found in answers.items() if len(found) > 1} == {}


def test_answers_are_short_sentences(train: list[Item], held_out: list[Item]):
    for answer in {item.answer for item in train + held_out}:
        assert len(answer.split()) <= 10
        assert re.fullmatch(r"[A-Z][A-Za-z' ,.?-]*[.?]", answer), answer


def test_held_out_questions_are_not_in_training(train: list[Item], held_out: list[Item]):
    trained = {normalize(item.question) for item in train}
    assert not trained & {normalize(item.question) for item in held_out}
    assert all(not item.held_out for item in train)
    assert {item.held_out for item in held_out} == {"pair", "phrasing", "both"}


def test_held_out_pairs_are_a_tenth_in_both_orders(train: list[Item], held_out: list[Item]):
    for kind in ("sum", "count"):
        trained = {tuple(sorted(map(int, item.fact.split()[1:]))) for item in train if item.kind == kind}
        kept = {
            tuple(sorted(map(int, item.fact.split()[1:])))
            for item in held_out
            if item.kind == kind and item.held_out in ("pair", "both")
        }
        assert not trained & kept
        assert 0.1 <= len(kept) / len(trained | kept) < 0.12, kind


def test_held_out_products_are_a_tenth_in_one_order(train: list[Item], held_out: list[Item]):
    trained = {item.fact for item in train if item.kind == "product"}
    kept = {item.fact for item in held_out if item.kind == "product" and item.held_out in ("pair", "both")}
    assert not trained & kept
    assert len(trained | kept) == 100
    assert len(kept) == 10
    for fact in kept:
        _, a, b = fact.split()
        assert f"product {b} {a}" in trained


def test_held_out_phrasings_are_a_fifth_without_the_first():
    for kind in KINDS.values():
        assert 0.2 <= len(kind.held_out_phrasings) / len(kind.phrasings) < 0.27, kind.name
        assert kind.phrasings[0] not in kind.held_out_phrasings


def test_held_out_questions_use_known_words(train: list[Item], held_out: list[Item]):
    known = {word for item in train for word in normalize(item.question).split()}
    assert {word for item in held_out for word in normalize(item.question).split()} <= known
    assert len(known) < 700


def test_sample_is_deterministic_and_follows_shares():
    drawn = sample("train", 2000, seed=1)
    assert drawn == sample("train", 2000, seed=1)
    assert drawn != sample("train", 2000, seed=2)
    assert len(drawn) == 2000
    assert all(not item.held_out for item in drawn)
    counts, total = Counter(item.kind for item in drawn), sum(kind.share for kind in KINDS.values())
    for kind in KINDS.values():
        assert abs(counts[kind.name] - 2000 * kind.share / total) <= 1
    some = Counter(item.kind for item in sample("train", 40, seed=1, shares={"capital": 3, "joke": 1}))
    assert some == {"capital": 30, "joke": 10}
    # No fact twice while another has not been asked at all.
    sums = [item.fact for item in drawn if item.kind == "sum"]
    assert len(set(sums)) == len(sums)


def test_further_phrasings_are_distinct_and_not_held_out(train: list[Item], further: list[Item], held_out: list[Item]):
    assert further != train
    assert {item.question for item in train} < {item.question for item in further}
    secret = {normalize(item.question) for item in held_out}
    assert not {normalize(item.question) for item in further} & secret
    assert {item.fact for item in further} == {item.fact for item in train}
    answers = defaultdict(set)
    for item in further:
        answers[normalize(item.question)].add(item.answer)
    assert all(len(found) == 1 for found in answers.values()), "no question has two answers"
    for kind in KINDS.values():
        assert len(kind.further_phrasings) >= 12
        assert not set(kind.further_phrasings) & set(kind.phrasings)


def test_sample_of_further_phrasings():
    drawn = sample("train", 500, seed=3, further=True)
    assert len(drawn) == 500
    for item in drawn:
        kind = KINDS[item.kind]
        fact = next(fact for fact in kind.facts if fact.key == item.fact)
        assert item in [kind.item(fact, phrasing) for phrasing in kind.further_phrasings]


def test_sample_held_out_pairs_are_half():
    sums = [item.held_out for item in sample("held_out", 1000, seed=0) if item.kind == "sum"]
    assert abs(sum(reason != "phrasing" for reason in sums) - len(sums) / 2) <= 1


def test_pattern_sentences_are_distinct_and_in_known_words():
    train, held_out = pattern_sentences("train", 3000, seed=0), pattern_sentences("held_out", 300, seed=0)
    assert len(set(train)) == 3000
    assert len(set(held_out)) == 300
    assert not set(train) & set(held_out)
    assert train == pattern_sentences("train", 3000, seed=0)
    assert not set(pattern_sentences("train", 500, seed=5)) & set(held_out)
    asked = [text for kind in KINDS.values() for text in kind.phrasings]
    answered = [fact.answer for kind in KINDS.values() for fact in kind.facts]
    known = {word for text in train + asked + answered for word in normalize(text).split()}
    assert {word for text in held_out for word in normalize(text).split()} <= known
    for text in train + held_out:
        assert re.fullmatch(r"[A-Z][A-Za-z' ,-]*[.?]", text), text
        assert not re.search(r"\b[Aa] [aeiou]", text), text


def test_free_sentences_have_many_forms_and_no_held_out_pattern():
    free, held_out = free_sentences(3000, seed=0), pattern_sentences("held_out", 300, seed=0)
    adjective = "|".join(slots()["adj"])
    assert len(set(free)) == 3000
    assert free == free_sentences(4000, seed=0)[:3000]
    assert not set(free) & set(held_out)
    for text in free:
        assert re.fullmatch(r"[A-Z][A-Za-z' ,-]*[.?]", text), text
        assert not re.search(r"\b[Aa] [aeiou]", text), text
        assert len(text.split()) <= 14
        # Two of the patterns that are held out, also as parts of a sentence.
        assert not re.search(rf"\bthe ({adjective}) \w+ likes the ({adjective}) ", text, re.IGNORECASE), text
        assert not re.search(r"my favorite (cow|dog|cat|pig|sheep|lion|bear) is", text, re.IGNORECASE), text
    # The words of those patterns have to be learned elsewhere.
    words = {word for text in free for word in normalize(text).split()}
    assert {"likes", "my", "favorite", "above", "below", "do", "you", "know", "from", "live", "in"} <= words
    openings = {tuple(text.split()[:2]) for text in free}
    assert len(openings) > 1000, "no two dozen patterns"


def test_answer_like_sentences_have_words_that_are_rare_in_answers():
    sentences = free_sentences(6000, 0, "answer")
    assert len(set(sentences)) == 6000
    counts = Counter(word for text in sentences for word in normalize(text).split())
    seldom = ("capital", "country", "opposite", "sound", "color")
    answers = Counter(word for item in sample("train", 6000, 0) for word in normalize(item.answer).split())
    for kind in seldom:
        for fact in KINDS[kind].facts:
            for word in normalize(fact.answer).split():
                assert counts[word] >= 5, word
    assert counts["brussels"] > 5 * answers["brussels"]
    assert any(re.fullmatch(r"The capital of [A-Z].* is [A-Z].*\.", text) for text in sentences)


def test_named_sentences_have_the_name_in_many_places():
    sentences = free_sentences(2000, 0, "named")
    positions = Counter(normalize(text).split().index("nano") for text in sentences)
    assert len(set(sentences)) == 2000
    assert min(positions[position] for position in range(6)) > 50
    assert "My name is Nano." not in sentences, "the answer is recorded anyway"


def test_normalize():
    assert normalize("Forty-seven, isn't IT?  No.") == "forty seven isn't it no"


def test_read_facts_keeps_words_that_yaml_takes_for_values() -> None:
    assert read_facts("tables.yaml")["opposites"]["yes"] == "no"
    assert ["days", "a year", "365"] in read_facts("tables.yaml")["units"]


def fingerprint(rows: Iterable[str]) -> str:
    return hashlib.sha256("\n".join(rows).encode()).hexdigest()[:16]


def lines(items: Iterable[Item]) -> list[str]:
    return ["\t".join((item.kind, item.question, item.answer, item.fact, item.held_out)) for item in items]


def test_questions_do_not_change(train: list[Item], further: list[Item], held_out: list[Item]) -> None:
    """The shipped model was trained on these."""
    assert fingerprint(lines(train)) == "8d718f26b886b490"
    assert fingerprint(lines(held_out)) == "6460a77d41aa364c"
    assert fingerprint(lines(further)) == "7d517efcd862fe0d"
    assert fingerprint(lines(larger_products())) == "10bd54ac7c38d7eb"
    assert fingerprint(lines(further_counts())) == "4263ebe88cd393c7"


def test_sentences_do_not_change() -> None:
    """The shipped model was trained on these."""
    assert fingerprint(pattern_sentences("train", 3000, 0)) == "36c57a3adc56d523"
    assert fingerprint(pattern_sentences("held_out", 300, 0)) == "8242f7f52ddf29a7"
    assert fingerprint(free_sentences(3000, 0)) == "27fa2b7fb192176f"
    assert fingerprint(free_sentences(2000, 0, "answer")) == "7aca5711c5de55f9"
    assert fingerprint(free_sentences(2000, 0, "named")) == "f1c71cd9de1fba65"
