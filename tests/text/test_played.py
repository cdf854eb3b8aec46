"""Which part of an answer's text was played."""

from __future__ import annotations

import pytest

from omni_jax.text.played import CHARACTERS_PER_SECOND, played_text

TEXT = "one two  three."


@pytest.mark.parametrize(
    ("seconds", "played"),
    [
        (-1.0, ""),
        (0.0, ""),
        (2.9, ""),
        (3.0, "one"),
        (4.5, "one"),
        (7.0, "one two"),
        (8.5, "one two"),
        (14.9, "one two"),
        (15.0, TEXT),
        (99.0, TEXT),
    ],
)
def test_played_text_at_the_rate_of_the_whole(seconds: float, played: str) -> None:
    """15 characters take 15 s; a word that was begun is left out."""
    assert played_text(TEXT, seconds, 15.0) == played


def test_played_text_at_the_usual_rate() -> None:
    assert CHARACTERS_PER_SECOND == 15
    assert [played_text(TEXT, seconds) for seconds in (0.1, 0.2, 0.5, 0.99, 1.0)] == [
        "",
        "one",
        "one two",
        "one two",
        TEXT,
    ]


def test_played_text_of_nothing() -> None:
    assert played_text("", 1.0, 2.0) == played_text("", 1.0) == played_text("word", 0.0, 0.5) == ""
    assert played_text("", 0.0, 0.0) == ""
