"""The texts of all data sets, and the tokenizer."""

from __future__ import annotations

import hashlib
import json
import random
from pathlib import Path

import pytest
from rapidfuzz.distance import Levenshtein

from omni_jax.checkpoint.release import TOKENIZER_FILES
from recipes.nano import texts, tokenizer
from recipes.nano.questions import KINDS, all_questions
from recipes.nano.sentences import pattern_sentences
from recipes.nano.texts import Row, Sizes

pytestmark = pytest.mark.slow

FINGERPRINTS = {
    "written/numbers": "645da700b1fc91aa",
    "written/products": "55f98b93e8b64908",
    "written/larger_products": "d9963ac85758794f",
    "written/further_counts": "4b9eeec86677c18b",
    "written/knowledge": "643c54fc0fc886b6",
    "written/smalltalk": "7bb10399e6b182a6",
    "written/held_out": "3d49f0756de41b98",
    "written/repeat": "bc763a18d3a5422e",
    "written/unknown": "87ef613c329acb15",
    "written/typos": "4e998327551c5763",
    "written/typos_held_out": "04cbf1b3435032d7",
    "spoken/train": "c8b29946c9b0e51b",
    "spoken/natural_train": "52e93c4644cfe24b",
    "spoken/smalltalk_train": "c66a919924f6422d",
    "spoken/name_train": "369f89594bf1b195",
    "spoken/typed_train": "312ef03d04519cdf",
    "spoken/held_out_seen": "3d49f0756de41b98",
    "spoken/held_out_unseen": "5ebd8b1594d64bbd",
    "spoken/held_out_natural": "2900ca7ee5c99ec0",
    "spoken/read_train": "8684e84fb95576ac",
    "spoken/read_free": "3a940c52f1bf66b7",
    "spoken/read_answer_like": "b83bc75776590daa",
    "spoken/read_held_out": "67f93771a0e641ea",
    "spoken/dictation_train": "172af578d66dd0e8",
    "spoken/dictation_seen": "1249c2d2600e3988",
    "spoken/dictation_unseen": "9bd43a760f0ea769",
    "spoken/noise_train": "0363e88730df5f72",
    "spoken/noise_held_out": "36034321ba7e48d5",
    "spoken/history_held_out": "dc6ddf5ade32626d",
}
"""Of the sorted rows of each set."""


def fingerprint(rows: list[Row]) -> str:
    lines = sorted(f"{row.question_text}\t{row.answer_text}\t{row.source}" for row in rows)
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]


@pytest.fixture(scope="module")
def written() -> dict[str, list[Row]]:
    """The written sets; only `repeat` and `held_out` are smaller than in the recipe."""
    sets = texts.written_sets(Sizes(repeated=50, held_out_text=100))
    return {name: list(rows) for name, rows in sets.items()}


def test_texts_do_not_change() -> None:
    """A model that is said to be of this recipe was trained on these, or on a part of them."""
    sizes = Sizes()
    found = {f"written/{name}": fingerprint(list(rows)) for name, rows in texts.written_sets(sizes).items()}
    found |= {f"spoken/{name}": fingerprint(rows) for name, rows in texts.spoken_sets(sizes).items()}
    assert found == FINGERPRINTS


def test_written_sets_do_not_change(written: dict[str, list[Row]]) -> None:
    full = set(written) - {"repeat", "held_out"}
    assert {name: fingerprint(written[name]) for name in full} == {n: FINGERPRINTS[f"written/{n}"] for n in full}


def test_written_sets_have_every_training_question_once(written: dict[str, list[Row]]) -> None:
    training = {name: written[name] for name in ("numbers", "products", "knowledge", "smalltalk")}
    rows = [row for found in training.values() for row in found]
    asked = {row.question_text: row.answer_text for row in rows}
    assert len(asked) == len(rows)
    assert asked == {item.question: item.answer for item in all_questions("train", further=True)}
    assert len(written["held_out"]) == 100
    assert not {row.question_text for row in written["held_out"]} & set(asked)
    kinds = {name: {row.source.split()[1] for row in found} for name, found in training.items()}
    assert kinds["numbers"] | kinds["products"] == set(texts.NUMBERS)
    assert kinds["products"] == {"product"}
    assert kinds["smalltalk"] == set(texts.SMALLTALK)
    assert "joke" in kinds["smalltalk"]
    assert not kinds["knowledge"] & {*texts.NUMBERS, *texts.SMALLTALK}


def assert_nothing_held_out(found: list[Row], kind: str, **asked: str) -> None:
    """Neither a held-out question, nor one of a kind about `asked` in a held-out phrasing."""
    questions = {row.question_text.lower() for row in found}
    assert not questions & {item.question.lower() for item in all_questions("held_out")}
    phrasings = KINDS[kind].held_out_phrasings
    assert not questions & {phrasing.format(**asked).lower() for phrasing in phrasings}


def test_larger_products_have_both_orders_and_none_that_is_asked(written: dict[str, list[Row]]) -> None:
    larger = written["larger_products"]
    answers = {row.answer_text for row in larger}
    assert "Seven times thirty is two hundred ten." in answers
    assert "Thirty times seven is two hundred ten." in answers
    assert len(answers) == 2 * 10 * 90
    asked = {item.answer for split in ("train", "held_out") for item in all_questions(split, ["product"])}
    assert not answers & asked
    assert_nothing_held_out(larger, "product", a="seven", b="thirty")


def test_further_counts_have_both_directions_and_none_that_is_asked(written: dict[str, list[Row]]) -> None:
    further = written["further_counts"]
    answers = {row.answer_text for row in further}
    assert {"Forty, forty-one, forty-two.", "Forty-two, forty-one, forty.", "Seven, six.", "Zero, one."} <= answers
    # From each of 101 numbers to its five neighbors on either side, but for those beyond the ends.
    neighbors = 2 * sum(101 - distance for distance in range(1, 6))
    asked = {item.answer for split in ("train", "held_out") for item in all_questions(split, ["count"])}
    assert len(answers) == neighbors - len(asked)
    assert not answers & asked
    assert_nothing_held_out(further, "count", a="forty", b="forty-two")


def test_misspelled_questions_have_one_wrong_letter(written: dict[str, list[Row]]) -> None:
    answers = {item.answer for item in all_questions("train", further=True)}
    right = {item.question for item in all_questions("train", further=True)}
    assert len(written["typos"]) > 0.95 * Sizes().typos
    changed = [row for row in written["typos"] if row.question_text not in right]
    assert len(changed) == len(written["typos"])
    assert {row.answer_text for row in changed} <= answers
    rng = random.Random(0)
    distances = [Levenshtein.distance(text, texts.misspell(text, rng)) for text in sorted(right)[::1000]]
    # Two if letters are swapped, none if these are equal.
    assert set(distances) == {0, 1, 2}
    assert distances.count(0) < 0.05 * len(distances)
    held_out = {item.question for item in all_questions("held_out")}
    assert not {row.question_text for row in written["typos"]} & held_out
    assert {texts.misspell("tall", random.Random(seed)) for seed in range(300)} >= {"tll", "taall", "tlal", "tabl"}
    assert texts.misspell("Is it me?", random.Random(0)) == "Is it me?"


def test_unknown_questions_are_none_of_the_known(written: dict[str, list[Row]]) -> None:
    known = {item.question for split in ("train", "held_out") for item in all_questions(split, further=True)}
    found = written["unknown"]
    assert {row.answer_text for row in found} == {texts.UNKNOWN}
    assert len({row.question_text for row in found}) == len(found) == 8000
    assert not {row.question_text for row in found} & known


def test_repeat_has_nothing_held_out(written: dict[str, list[Row]]) -> None:
    held_out = {item.question for item in all_questions("held_out")} | set(pattern_sentences("held_out", 300, 0))
    for row in written["repeat"]:
        assert row.question_text.endswith(f": {row.answer_text}")
        assert row.answer_text not in held_out
    assert len({row.question_text.partition(":")[0] for row in written["repeat"]}) == len(texts.REPEAT)


def test_main_writes_limited_manifests(tmp_path: Path) -> None:
    texts.main(tmp_path / "texts", limit=8)
    files = sorted(file for group in ("spoken", "written") for file in (tmp_path / "texts" / group).iterdir())
    assert [str(file.relative_to(tmp_path / "texts").with_suffix("")) for file in files] == sorted(FINGERPRINTS)
    for file in files:
        rows = [Row(**json.loads(line)) for line in file.read_text(encoding="utf-8").splitlines()]
        assert 4 <= len(rows) <= 60
        asked, answered = ({bool(getattr(row, name)) for row in rows} for name in ("question_text", "answer_text"))
        assert asked == {not file.stem.startswith("read_")}
        assert answered == {not file.stem.startswith(("dictation_", "history_"))}, file


def test_past_questions_are_those_of_the_spoken_conversations() -> None:
    sizes = Sizes.limited(8)
    questions = [row.question_text for row in texts.spoken_sets(sizes)["history_held_out"]]
    past = [turn.question for made in texts.conversation_sets(sizes)["conversation_held_out"] for turn in made.history]
    assert set(questions) == set(past)
    assert len(questions) == len(set(questions))


def test_by_answer_groups_rows() -> None:
    rows = texts.by_answer([Row("b", "y"), Row("c", "x"), Row("a", "y")])
    assert [row.question_text for row in rows] == ["c", "a", "b"]


def test_train_tokenizer_encodes_any_text() -> None:
    made = tokenizer.train_tokenizer(["What is seven plus nine?", "Seven plus nine is sixteen."] * 5, 300)
    assert made.get_vocab_size() <= 300
    for text in ("What is seven plus nine?", "naïve Zürich \N{SNOWMAN}"):
        assert made.decode(made.encode(text).ids) == text
    assert len(made.encode(" plus").ids) == 1


def test_tokenizer_main_writes_files_of_a_release(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenizer, "corpus", lambda: ["Seven plus nine is sixteen."])
    tokenizer.main(tmp_path / "new")
    assert sorted(file.name for file in (tmp_path / "new").iterdir()) == sorted(TOKENIZER_FILES)
