"""Metrics, against values computed by hand."""

from __future__ import annotations

import numpy as np
import pytest

from omni_jax.evaluation import metrics
from omni_jax.evaluation.metrics import ErrorCount


def test_normalize() -> None:
    assert metrics.normalize("  Twenty-two COLOURS, please! ") == metrics.normalize("22 colors please")
    assert metrics.word_errors("The color is grey.", "the color is gray") == ErrorCount(0, 4)


def test_word_and_char_errors() -> None:
    assert metrics.word_errors("one cat sat here", "one dog sat") == ErrorCount(2, 4)
    assert metrics.word_errors("cat", "the cat sat") == ErrorCount(2, 1)
    assert metrics.word_errors("cat", "") == ErrorCount(1, 1)
    assert metrics.word_errors("", "two words") == ErrorCount(2, 0)
    assert metrics.char_errors("cat", "cut") == ErrorCount(1, 3)
    assert ErrorCount(1, 4) + ErrorCount(2, 4) == ErrorCount(3, 8)
    assert (ErrorCount(1, 4).rate, ErrorCount(2, 0).rate, ErrorCount(0, 0).rate) == (0.25, 1.0, 0.0)
    assert metrics.fewest_errors(["red", "green"], "Green!", metrics.word_errors) == ErrorCount(0, 1)


def test_matches_and_f1() -> None:
    assert metrics.exact_match(["Paris", "paris france"], "Paris.") == 1
    assert metrics.exact_match(["Paris"], "It is Paris.") == 0
    assert metrics.contains_match(["Paris"], "It is Paris.") == 1
    assert metrics.contains_match(["par"], "It is Paris.") == 0
    assert metrics.contains_match(["seven"], "It's 7.") == 1
    assert metrics.contains_match([""], "anything") == 0
    # Two words in common of two and three.
    assert metrics.f1(["the red car"], "A red car drives") == pytest.approx(2 * 2 / (2 + 3))
    assert metrics.f1(["x", "red car"], "red car") == 1
    assert metrics.f1(["red"], "") == 0


def test_bootstrap_intervals() -> None:
    rng = np.random.default_rng(0)
    covered = 0
    for trial in range(200):
        estimate = metrics.mean((rng.random(50) < 0.3).astype(float).tolist(), seed=trial)
        covered += estimate.low <= 0.3 <= estimate.high
    # 95 of 100, as far as a bootstrap of fifty gets there.
    assert 0.88 < covered / 200 < 0.99
    assert metrics.mean([1.0, 1.0]) == metrics.Estimate(1.0, 1.0, 1.0, 2)
    rate = metrics.error_rate([ErrorCount(1, 10), ErrorCount(0, 1), ErrorCount(9, 9)])
    assert rate.value == 0.5
    assert rate.low < 0.5 < rate.high
    errors = [ErrorCount(1, 10), ErrorCount(3, 5)]
    assert metrics.error_rate(errors) == metrics.error_rate(errors)


def test_differences_are_of_pooled_rates_and_paired() -> None:
    mine = [ErrorCount(1, 10), ErrorCount(0, 1), ErrorCount(9, 9)]
    theirs = [ErrorCount(0, 10), ErrorCount(1, 1), ErrorCount(0, 9)]
    difference = metrics.error_rate_difference(mine, theirs)
    # The means of the rates of each case would differ by 0.033.
    assert difference.value == pytest.approx((10 - 1) / 20)
    assert difference.low < difference.value < difference.high
    assert metrics.error_rate_difference(mine, mine) == metrics.Estimate(0.0, 0.0, 0.0, 3)
    change = metrics.mean_difference([1.0, 0.0], [0.0, 0.0])
    assert (change.value, change.count) == (0.5, 2)
