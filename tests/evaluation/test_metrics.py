"""Counted by hand."""

from __future__ import annotations

import numpy as np
import pytest

from omni_jax.evaluation import metrics
from omni_jax.evaluation.metrics import Errors


def test_what_counts_as_the_same() -> None:
    assert metrics.normalize("  Twenty-two COLOURS, please! ") == metrics.normalize("22 colors please")
    assert metrics.word_errors("The color is grey.", "the color is gray") == Errors(0, 4)


def test_errors() -> None:
    assert metrics.word_errors("one cat sat here", "one dog sat") == Errors(2, 4)
    assert metrics.word_errors("cat", "the cat sat") == Errors(2, 1)
    assert metrics.word_errors("cat", "") == Errors(1, 1)
    assert metrics.word_errors("", "two words") == Errors(2, 0)
    assert metrics.letter_errors("cat", "cut") == Errors(1, 3)
    assert Errors(1, 4) + Errors(2, 4) == Errors(3, 8)
    assert (Errors(1, 4).rate, Errors(2, 0).rate, Errors(0, 0).rate) == (0.25, 1.0, 0.0)
    assert metrics.best(["red", "green"], "Green!", metrics.word_errors) == Errors(0, 1)


def test_right_answers() -> None:
    assert metrics.exact(["Paris", "paris france"], "Paris.") == 1
    assert metrics.exact(["Paris"], "It is Paris.") == 0
    assert metrics.contains(["Paris"], "It is Paris.") == 1
    assert metrics.contains(["par"], "It is Paris.") == 0
    assert metrics.contains(["seven"], "It's 7.") == 1
    assert metrics.contains([""], "anything") == 0
    # Two words in common of two and three.
    assert metrics.f1(["the red car"], "A red car drives") == pytest.approx(2 * 2 / (2 + 3))
    assert metrics.f1(["x", "red car"], "red car") == 1
    assert metrics.f1(["red"], "") == 0


def test_intervals() -> None:
    rng = np.random.default_rng(0)
    covered = 0
    for trial in range(200):
        estimate = metrics.mean((rng.random(50) < 0.3).astype(float).tolist(), seed=trial)
        covered += estimate.low <= 0.3 <= estimate.high
    # 95 of 100, as far as a bootstrap of fifty gets there.
    assert 0.88 < covered / 200 < 0.99
    assert metrics.mean([1.0, 1.0]) == metrics.Estimate(1.0, 1.0, 1.0, 2)
    rate = metrics.rate([Errors(1, 10), Errors(0, 1), Errors(9, 9)])
    assert rate.value == 0.5
    assert rate.low < 0.5 < rate.high
    assert metrics.rate([Errors(1, 10), Errors(3, 5)]) == metrics.rate([Errors(1, 10), Errors(3, 5)])
