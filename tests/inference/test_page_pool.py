"""Which pages are free."""

from __future__ import annotations

import pytest

from omni_jax.inference.page_pool import PagePool


def test_the_lowest_pages_are_taken_first() -> None:
    pool = PagePool(1, 6)
    assert pool.take(0, 4) == [0, 1, 2, 3]
    pool.give_back(0, [2, 0])
    assert pool.take(0, 3) == [0, 2, 4]
    assert (pool.used, pool.total, pool.free(0)) == (5, 6, 1)


def test_groups_have_pages_of_their_own() -> None:
    pool = PagePool(2, 3)
    assert pool.take(1, 2) == [0, 1]
    assert (pool.free(0), pool.free(1), pool.used) == (3, 1, 2)
    with pytest.raises(ValueError, match="2 free pages, found 1"):
        pool.take(1, 2)
    assert pool.free(1) == 1
