"""What the trunk reads: a tokenizer that can write anything, records without anything held out."""

from __future__ import annotations

from pathlib import Path

import pytest
from nano import facts, text

from omni_jax.checkpoint.release import TOKENIZER_FILES
from omni_jax.data.records import INDEX, Exchange, Records, from_bytes
from omni_jax.tasks import Task


@pytest.fixture(scope="module")
def decode_text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("text")
    text.write(folder, sentences=50, held_out=100)
    return folder


def exchanges(folder: Path) -> list[Exchange]:
    records = Records(folder)
    return [from_bytes(records[index]) for index in range(len(records))]


def test_a_tokenizer_can_write_anything_and_is_saved_as_a_release_has_it(tmp_path: Path):
    tokenizer = text.train_tokenizer(["What is seven plus nine?", "Seven plus nine is sixteen."] * 5, 300)
    assert tokenizer.get_vocab_size() <= 300
    for said in ("What is seven plus nine?", "naïve Zürich \N{SNOWMAN}"):
        assert tokenizer.decode(tokenizer.encode(said).ids) == said
    assert len(tokenizer.encode(" plus").ids) == 1
    files = text.save_tokenizer(tokenizer, tmp_path / "new")
    assert [file.name for file in files] == list(TOKENIZER_FILES)
    assert all(file.is_file() for file in files)


def test_every_question_is_in_one_folder_and_nothing_held_out_is_trained_on(decode_text: Path):
    training = {name: exchanges(decode_text / name) for name in ("numbers", "products", "knowledge", "smalltalk")}
    held_out = exchanges(decode_text / "held_out")
    everything = [exchange for found in training.values() for exchange in found]
    asked = {exchange.question_text: exchange.answer_text for exchange in everything}
    assert asked == {item.question: item.answer for item in facts.questions("train", further=True)}
    assert len(asked) == len(everything)
    assert len(held_out) == 100
    assert not {exchange.question_text for exchange in held_out} & set(asked)
    kinds = {name: {exchange.source.split()[1] for exchange in found} for name, found in training.items()}
    assert kinds["numbers"] | kinds["products"] == set(text.NUMBERS)
    assert kinds["products"] == {"product"}
    assert kinds["smalltalk"] == set(text.SMALLTALK)
    assert "joke" in kinds["smalltalk"]
    assert not kinds["knowledge"] & {*text.NUMBERS, *text.SMALLTALK}


def assert_nothing_held_out(found: list[Exchange], kind: str, **asked: str):
    """Neither a held-out question nor one of a kind, for what is asked, in a phrasing that is held out."""
    questions = {exchange.question_text.lower() for exchange in found}
    assert not questions & {item.question.lower() for item in facts.questions("held_out")}
    phrasings = facts.KINDS[kind].held_out_phrasings
    assert not questions & {phrasing.format(**asked).lower() for phrasing in phrasings}


def test_larger_products_have_both_orders_and_no_product_that_is_asked_for(decode_text: Path):
    larger = exchanges(decode_text / "larger_products")
    answers = {exchange.answer_text for exchange in larger}
    assert "Seven times thirty is two hundred ten." in answers
    assert "Thirty times seven is two hundred ten." in answers
    assert len(answers) == 2 * 10 * 90
    asked = {item.answer for split in ("train", "held_out") for item in facts.questions(split, ["product"])}
    assert not answers & asked
    assert_nothing_held_out(larger, "product", a="seven", b="thirty")


def test_further_counts_go_both_ways_and_ask_for_nothing_that_is_asked_for(decode_text: Path):
    larger = exchanges(decode_text / "further_counts")
    answers = {exchange.answer_text for exchange in larger}
    assert {"Forty, forty-one, forty-two.", "Forty-two, forty-one, forty.", "Seven, six.", "Zero, one."} <= answers
    # From each of 101 numbers to its five neighbors on either side, but for those beyond the ends.
    neighbors = 2 * sum(101 - distance for distance in range(1, 6))
    asked = {item.answer for split in ("train", "held_out") for item in facts.questions(split, ["count"])}
    assert len(answers) == neighbors - len(asked)
    assert not answers & asked
    assert_nothing_held_out(larger, "count", a="forty", b="forty-two")


def test_what_is_repeated_was_never_held_out(decode_text: Path):
    held_out = {item.question for item in facts.questions("held_out")} | set(facts.sentences("held_out", 300, 0))
    repeated = exchanges(decode_text / "repeat")
    for exchange in repeated:
        assert exchange.question_text.endswith(f": {exchange.answer_text}")
        assert exchange.answer_text not in held_out
    assert len({exchange.question_text.partition(":")[0] for exchange in repeated}) == len(text.REPEAT)


def test_records_serve_text_only_and_are_written_once(decode_text: Path):
    for name in (
        "numbers",
        "products",
        "larger_products",
        "further_counts",
        "knowledge",
        "smalltalk",
        "repeat",
        "held_out",
    ):
        records = Records(decode_text / name)
        assert [task for task in Task if records.count(task)] == [Task.T1T2]
    assert text.write(decode_text, sentences=50, held_out=100) == {}


def test_other_texts_are_written_anew_and_no_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    few = facts.sample("train", 12, seed=0)
    monkeypatch.setattr(text, "questions", lambda kinds: few[:5])
    monkeypatch.setattr(text, "repeated", lambda sentences: text.exchanges(few[:3]))
    monkeypatch.setattr(facts, "larger_products", lambda: few[:7])
    monkeypatch.setattr(facts, "further_counts", lambda: few[:6])
    first = text.write(tmp_path, held_out=10)
    assert first == {**dict.fromkeys(first, 5), "larger_products": 7, "further_counts": 6, "repeat": 3, "held_out": 10}
    monkeypatch.setattr(facts, "larger_products", lambda: few[5:])
    (tmp_path / "products" / INDEX).unlink()
    assert text.write(tmp_path, held_out=10) == {"products": 5, "larger_products": 7}
    assert {exchange.question_text for exchange in exchanges(tmp_path / "larger_products")} == {
        item.question for item in few[5:]
    }
    assert text.write(tmp_path, held_out=10) == {}
