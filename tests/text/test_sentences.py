"""Texts divided into what a model reads at once."""

from __future__ import annotations

import pytest

from omni_jax.text.sentences import ends_sentence, split_sentences


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("One sentence", ["One sentence"]),
        ("First one. Is it? Yes!", ["First one.", "Is it?", "Yes!"]),
        ('"Go." She left. (Late.) Fine.', ['"Go."', "She left.", "(Late.)", "Fine."]),
        ("One two three, four five, six.", ["One two three, four five,", "six."]),
        ("One two three four and five six.", ["One two three four", "and five six."]),
        ("One two three, four five six because seven.", ["One two three,", "four five six because seven."]),
    ],
)
def test_split_sentences(text: str, expected: list[str]) -> None:
    assert split_sentences(text, 5) == expected


@pytest.mark.parametrize("count", [1, 8, 200])
def test_split_sentences_loses_nothing(count: int) -> None:
    text = " ".join(f"This is {index}, and that is {index + 1}, or so it seems." for index in range(count))
    pieces = split_sentences(text, 6)
    assert " ".join(pieces) == text
    assert max(len(piece.split()) for piece in pieces) <= 6
    assert sum(map(ends_sentence, pieces)) == count


def test_long_clause_is_divided_evenly() -> None:
    assert split_sentences("Fine. Zero, one two three four", 3) == ["Fine.", "Zero, one two", "three four"]
    words = [f"w{number}" for number in range(29)]
    pieces = split_sentences(" ".join(words) + ".", 14)
    assert [len(piece.split()) for piece in pieces] == [10, 9, 10]
    assert " ".join(pieces) == " ".join(words) + "."
