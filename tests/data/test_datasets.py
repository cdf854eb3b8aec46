"""Mixing streams in exact shares."""

from __future__ import annotations

import grain
import numpy as np

from omni_jax.data.datasets import MixtureDataset, too_many_unreadable


def mixture() -> MixtureDataset:
    streams = [grain.MapDataset.source([name] * 3).repeat().to_iter_dataset() for name in "abc"]
    return MixtureDataset(streams, [2.0, 1.0, 1.0])


def test_mixture_is_within_a_draw_of_its_shares() -> None:
    iterator = iter(mixture())
    counts = {"a": 0, "b": 0, "c": 0}
    for n in range(1, 101):
        counts[next(iterator)] += 1
        np.testing.assert_allclose([counts[name] for name in "abc"], [n / 2, n / 4, n / 4], atol=1)


def test_mixture_resumes_from_its_state() -> None:
    iterator = iter(mixture())
    for _ in range(5):
        next(iterator)
    state = iterator.get_state()
    rest = [next(iterator) for _ in range(20)]
    again = iter(mixture())
    again.set_state(state)
    assert [next(again) for _ in range(20)] == rest


def test_too_many_unreadable_lists_the_last_records() -> None:
    error = too_many_unreadable([f"record {n}" for n in range(5)], 4)
    assert str(error).splitlines() == [
        "expected at most 4 records that cannot be read (max_corrupt), found 5, among them:",
        "record 2",
        "record 3",
        "record 4",
    ]
