"""What nano is asked: enough of it, rightly answered, and nothing held out ever trained on."""

from __future__ import annotations

import re
from collections import Counter, defaultdict

import pytest

from nano import facts
from nano.facts import KINDS, Item


@pytest.fixture(scope="module")
def train() -> list[Item]:
    return facts.questions("train")


@pytest.fixture(scope="module")
def held_out() -> list[Item]:
    return facts.questions("held_out")


NUMBERS = {facts.words(number): number for number in range(1001)}


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
    assert facts.words(number) == expected


@pytest.mark.parametrize("number", [-1, 1001])
def test_words_beyond_its_range(number: int):
    with pytest.raises(ValueError, match=f"expected a number from 0 to 1000, found {number}"):
        facts.words(number)


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


def test_there_is_as_much_as_promised(train: list[Item], held_out: list[Item]):
    calculated = {"sum", "difference", "product", "count"}
    assert sum(len(kind.facts) for kind in KINDS.values()) > 10_000
    assert len({fact.answer for kind in KINDS.values() if kind.name not in calculated for fact in kind.facts}) >= 300
    for kind in KINDS.values():
        assert len(set(kind.phrasings)) == len(kind.phrasings) >= 15, kind.name
        assert len({fact.key for fact in kind.facts}) == len(kind.facts), kind.name
    assert {item.kind for item in train} == {item.kind for item in held_out} == set(KINDS)


def test_arithmetic_is_right(train: list[Item], held_out: list[Item]):
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


def test_counting_goes_from_the_first_number_to_the_second(train: list[Item], held_out: list[Item]):
    for item in train + held_out:
        if item.kind == "count":
            first, last = numbers(item.question)
            expected = range(first, last + 1) if first < last else range(first, last - 1, -1)
            assert numbers(item.answer) == list(expected), item


def test_neighbours_are_one_apart(train: list[Item], held_out: list[Item]):
    for item in train + held_out:
        if item.kind in ("after", "before") and (found := numbers(item.answer)):
            assert found[1] - found[0] == (1 if item.kind == "after" else -1), item


def test_a_question_has_one_answer(train: list[Item], held_out: list[Item]):
    answers: dict[str, set[str]] = defaultdict(set)
    for item in train + held_out:
        answers[facts.normalize(item.question)].add(item.answer)
    assert {question: found for question, found in answers.items() if len(found) > 1} == {}


def test_answers_are_short_sentences(train: list[Item], held_out: list[Item]):
    for answer in {item.answer for item in train + held_out}:
        assert len(answer.split()) <= 10
        assert re.fullmatch(r"[A-Z][A-Za-z' ,.?-]*[.?]", answer), answer


def test_held_out_is_never_trained_on(train: list[Item], held_out: list[Item]):
    trained = {facts.normalize(item.question) for item in train}
    assert not trained & {facts.normalize(item.question) for item in held_out}
    assert all(not item.held_out for item in train)
    assert {item.held_out for item in held_out} == {"pair", "phrasing", "both"}


def test_a_tenth_of_the_pairs_is_held_out_in_either_order(train: list[Item], held_out: list[Item]):
    for kind in ("sum", "count"):
        trained = {tuple(sorted(map(int, item.fact.split()[1:]))) for item in train if item.kind == kind}
        kept = {
            tuple(sorted(map(int, item.fact.split()[1:])))
            for item in held_out
            if item.kind == kind and item.held_out in ("pair", "both")
        }
        assert not trained & kept
        assert 0.1 <= len(kept) / len(trained | kept) < 0.12, kind


def test_a_tenth_of_the_products_is_held_out_and_known_the_other_way_round(train: list[Item], held_out: list[Item]):
    trained = {item.fact for item in train if item.kind == "product"}
    kept = {item.fact for item in held_out if item.kind == "product" and item.held_out in ("pair", "both")}
    assert not trained & kept
    assert len(trained | kept) == 100
    assert len(kept) == 10
    for fact in kept:
        _, a, b = fact.split()
        assert f"product {b} {a}" in trained


def test_a_fifth_of_the_phrasings_is_held_out_but_never_the_plainest():
    for kind in KINDS.values():
        assert 0.2 <= len(kind.held_out_phrasings) / len(kind.phrasings) < 0.27, kind.name
        assert kind.phrasings[0] not in kind.held_out_phrasings


def test_held_out_questions_use_known_words(train: list[Item], held_out: list[Item]):
    known = {word for item in train for word in facts.normalize(item.question).split()}
    assert {word for item in held_out for word in facts.normalize(item.question).split()} <= known
    assert len(known) < 700


def test_the_sample_is_the_same_every_time_and_follows_the_shares():
    sample = facts.sample("train", 2000, seed=1)
    assert sample == facts.sample("train", 2000, seed=1)
    assert sample != facts.sample("train", 2000, seed=2)
    assert len(sample) == 2000
    assert all(not item.held_out for item in sample)
    counts, total = Counter(item.kind for item in sample), sum(kind.share for kind in KINDS.values())
    for kind in KINDS.values():
        assert abs(counts[kind.name] - 2000 * kind.share / total) <= 1
    some = Counter(item.kind for item in facts.sample("train", 40, seed=1, shares={"capital": 3, "joke": 1}))
    assert some == {"capital": 30, "joke": 10}
    # No fact twice while another has not been asked at all.
    sums = [item.fact for item in sample if item.kind == "sum"]
    assert len(set(sums)) == len(sums)


def test_further_phrasings_are_others_and_ask_for_nothing_held_out(train: list[Item], held_out: list[Item]):
    further = facts.questions("train", further=True)
    assert further != train
    assert {item.question for item in train} < {item.question for item in further}
    secret = {facts.normalize(item.question) for item in held_out}
    assert not {facts.normalize(item.question) for item in further} & secret
    assert {item.fact for item in further} == {item.fact for item in train}
    answers = defaultdict(set)
    for item in further:
        answers[facts.normalize(item.question)].add(item.answer)
    assert all(len(found) == 1 for found in answers.values()), "no question has two answers"
    for kind in KINDS.values():
        assert len(kind.further_phrasings) >= 12
        assert not set(kind.further_phrasings) & set(kind.phrasings)


def test_a_sample_of_further_phrasings_has_no_others():
    sample = facts.sample("train", 500, seed=3, further=True)
    assert len(sample) == 500
    for item in sample:
        kind = KINDS[item.kind]
        fact = next(fact for fact in kind.facts if fact.key == item.fact)
        assert item in list(kind.items(fact, kind.further_phrasings))


def test_half_of_the_held_out_sums_are_of_held_out_pairs():
    sums = [item.held_out for item in facts.sample("held_out", 1000, seed=0) if item.kind == "sum"]
    assert abs(sum(reason != "phrasing" for reason in sums) - len(sums) / 2) <= 1


def test_sentences_are_new_and_in_known_words():
    train, held_out = facts.sentences("train", 3000, seed=0), facts.sentences("held_out", 300, seed=0)
    assert len(set(train)) == 3000
    assert len(set(held_out)) == 300
    assert not set(train) & set(held_out)
    assert train == facts.sentences("train", 3000, seed=0)
    assert not set(facts.sentences("train", 500, seed=5)) & set(held_out)
    asked = [text for kind in KINDS.values() for text in kind.phrasings]
    answered = [fact.answer for kind in KINDS.values() for fact in kind.facts]
    known = {word for text in train + asked + answered for word in facts.normalize(text).split()}
    assert {word for text in held_out for word in facts.normalize(text).split()} <= known
    for text in train + held_out:
        assert re.fullmatch(r"[A-Z][A-Za-z' ,-]*[.?]", text), text
        assert not re.search(r"\b[Aa] [aeiou]", text), text


def test_free_sentences_have_many_forms_and_nothing_held_out():
    free, held_out = facts.free_sentences(3000, seed=0), facts.sentences("held_out", 300, seed=0)
    adjective = "|".join(facts._slots()["adj"])
    assert len(set(free)) == 3000
    assert free == facts.free_sentences(4000, seed=0)[:3000]
    assert not set(free) & set(held_out)
    for text in free:
        assert re.fullmatch(r"[A-Z][A-Za-z' ,-]*[.?]", text), text
        assert not re.search(r"\b[Aa] [aeiou]", text), text
        assert len(text.split()) <= 14
        # Two of the patterns that are held out, also as parts of a sentence.
        assert not re.search(rf"\bthe ({adjective}) \w+ likes the ({adjective}) ", text, re.IGNORECASE), text
        assert not re.search(r"my favorite (cow|dog|cat|pig|sheep|lion|bear) is", text, re.IGNORECASE), text
    # The words of those patterns have to be learned elsewhere.
    words = {word for text in free for word in facts.normalize(text).split()}
    assert {"likes", "my", "favorite", "above", "below", "do", "you", "know", "from", "live", "in"} <= words
    openings = {tuple(text.split()[:2]) for text in free}
    assert len(openings) > 1000, "no two dozen patterns"


def test_answer_like_sentences_say_often_what_answers_seldom_have():
    sentences = facts.free_sentences(6000, 0, "answer")
    assert len(set(sentences)) == 6000
    said = Counter(word for text in sentences for word in facts.normalize(text).split())
    seldom = ("capital", "country", "opposite", "sound", "color")
    answers = Counter(word for item in facts.sample("train", 6000, 0) for word in facts.normalize(item.answer).split())
    for kind in seldom:
        for fact in facts.KINDS[kind].facts:
            for word in facts.normalize(fact.answer).split():
                assert said[word] >= 5, word
    assert said["brussels"] > 5 * answers["brussels"]
    assert any(re.fullmatch(r"The capital of [A-Z].* is [A-Z].*\.", text) for text in sentences)


def test_named_sentences_say_the_name_in_many_places():
    sentences = facts.free_sentences(2000, 0, "named")
    places = Counter(facts.normalize(text).split().index("nano") for text in sentences)
    assert len(set(sentences)) == 2000
    assert min(places[place] for place in range(6)) > 50
    assert "My name is Nano." not in sentences, "the answer is recorded anyway"


def test_normalise():
    assert facts.normalize("Forty-seven, isn't IT?  No.") == "forty seven isn't it no"


def test_the_command_writes_the_training_answers(tmp_path, capsys: pytest.CaptureFixture[str]):
    facts.main(tmp_path / "new" / "answers.txt")
    lines = (tmp_path / "new" / "answers.txt").read_text().splitlines()
    assert "Seven plus five is twelve." in lines or "Five plus seven is twelve." in lines
    assert lines == sorted(set(lines))
    assert "capital" in capsys.readouterr().out
