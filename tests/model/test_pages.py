"""Attention to a pool of pages, against attention to whole rows."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from omni_jax.model.attention import attend
from omni_jax.model.pages import (
    FEWEST_PAGES,
    UNUSED,
    Cache,
    PageTable,
    attend_pages,
    pages_for,
    read_sizes,
    write_pages,
)

RANDOM = np.random.default_rng(0)
ROWS, QUERY_HEADS, HEADS, HEAD_DIM, PAGE = 5, 8, 4, 4, 4
LENGTHS = (1, 4, 5, 15, 29)
"""Positions of each row; the last has as many pages as all others together."""


def normal(*shape: int) -> np.ndarray:
    return RANDOM.standard_normal(shape).astype(np.float32)


class Case:
    """Rows of keys and values, and a pool with pages of them in random order among others; those behind are NaN."""

    def __init__(self, *, stacked: bool, num_pages: int = 40, in_use: int = 24):
        self.query = jnp.asarray(normal(ROWS, QUERY_HEADS, HEAD_DIM))
        self.keys, self.values = (normal(ROWS, max(LENGTHS), HEADS, HEAD_DIM) for _ in "kv")
        self.positions = jnp.array(LENGTHS) - 1
        columns = 8
        self.table = np.full((ROWS, columns), num_pages)
        numbers = iter(RANDOM.permutation(in_use))
        pools = [np.full((num_pages, HEADS, PAGE, HEAD_DIM), np.nan, np.float32) for _ in "kv"]
        for pool in pools:
            pool[:in_use] = 1e3
        for row, length in enumerate(LENGTHS):
            for column in range(pages_for(length, PAGE)):
                self.table[row, column] = page = next(numbers)
                span = slice(column * PAGE, min(length, (column + 1) * PAGE))
                for pool, rows in zip(pools, (self.keys, self.values), strict=True):
                    pool[page, :, : span.stop - span.start] = rows[row, span].swapaxes(0, 1)
        self.layer = jnp.int32(1) if stacked else 1
        self.cache = self.as_cache(pools, stacked=stacked)
        self.pages = PageTable.of([self.table[:3], self.table[3:]], num_pages)

    @staticmethod
    def as_cache(pools: list[np.ndarray], *, stacked: bool) -> Cache:
        two = {name: (np.full_like(pool, np.nan), pool) for name, pool in zip("kv", pools, strict=True)}
        return {name: jnp.stack(pools) if stacked else tuple(map(jnp.asarray, pools)) for name, pools in two.items()}

    def expected(self, window: int | None = None, **options: Any) -> jax.Array:
        seen = np.arange(max(LENGTHS)) <= self.positions[:, None]
        if window is not None:
            seen &= np.arange(max(LENGTHS)) > self.positions[:, None] - window
        return attend(self.query[:, None], self.keys, self.values, seen[:, None], **options)[:, 0]


def close(found: jax.Array, expected: jax.Array) -> None:
    np.testing.assert_allclose(np.asarray(found), np.asarray(expected), atol=2e-6, rtol=0)


@pytest.mark.parametrize(("stacked", "num_pages"), [(False, 40), (False, 64), (True, 40), (True, FEWEST_PAGES)])
def test_attend_pages_equals_attention_to_whole_rows(stacked: bool, num_pages: int) -> None:
    case = Case(stacked=stacked, num_pages=num_pages)
    found = jax.jit(lambda query, cache, pages: attend_pages(query, cache, case.layer, case.positions, pages))(
        case.query, case.cache, case.pages
    )
    close(found, case.expected())


@pytest.mark.parametrize("traced", [False, True])
def test_attend_pages_with_window_scale_and_softcap(traced: bool) -> None:
    case = Case(stacked=False)
    options = {"scale": 1.7, "softcap": 2.0}
    for window in (1, 3, 4, 6):
        given = jnp.int32(window) if traced else window
        found = attend_pages(case.query, case.cache, 1, case.positions, case.pages, given, **options)
        close(found, case.expected(window, **options))


@pytest.mark.parametrize("side_by_side", [2, 4])
def test_attend_pages_of_packed_heads_equals_separate_heads(side_by_side: int) -> None:
    case = Case(stacked=False)

    def pack(pool: jax.Array) -> jax.Array:
        grouped = pool.reshape(-1, HEADS // side_by_side, side_by_side, PAGE, HEAD_DIM).swapaxes(2, 3)
        return grouped.reshape(-1, HEADS // side_by_side, PAGE, side_by_side * HEAD_DIM)

    packed = jax.tree.map(pack, case.cache)
    close(attend_pages(case.query, packed, 1, case.positions, case.pages), case.expected())


def test_attend_pages_does_not_depend_on_where_pages_are() -> None:
    found = []
    for in_use in (20, 24, 33):
        RANDOM.bit_generator.state = np.random.default_rng(1).bit_generator.state
        case = Case(stacked=False, in_use=in_use)
        # The same rows, whatever the permutation took.
        found.append(attend_pages(case.query, case.cache, 1, case.positions, case.pages))
        np.testing.assert_array_equal(found[0], found[-1])


def test_attend_pages_of_a_row_without_pages_is_zero() -> None:
    case = Case(stacked=False)
    case.table[1] = 1000
    found = attend_pages(case.query, case.cache, 1, case.positions, PageTable.of([case.table], 40))
    expected = case.expected().at[1].set(0)
    close(found, expected)


@pytest.mark.parametrize("stacked", [False, True])
def test_write_pages_writes_one_position_of_each_row(stacked: bool) -> None:
    case = Case(stacked=stacked)
    case.table[2, 1] = 1000  # of position 4
    pages = PageTable.of([case.table], 40)
    key, value = normal(ROWS, HEADS, HEAD_DIM), normal(ROWS, HEADS, HEAD_DIM)
    after = write_pages(case.cache, case.layer, case.positions, pages, key, value)
    for name, new in (("k", key), ("v", value)):
        before, found = np.array(case.cache[name][1]), np.asarray(after[name][1])
        for row, position in enumerate(case.positions.tolist()):
            if row != 2:
                before[case.table[row, position // PAGE], :, position % PAGE] = new[row]
        np.testing.assert_array_equal(found, before)
        np.testing.assert_array_equal(after[name][0], case.cache[name][0])


def test_page_table_of_two_groups() -> None:
    """Four rows and two companion rows; each group has half of them, and pages of its own."""
    slots = np.array([[1, 9], [9, 9], [0, 2], [9, 9]])
    pages = PageTable.of([slots, np.array([[0, 9], [1, 9]])], 8, groups=2)
    assert pages.owner.tolist() == [2, 0, 0, 0, 0, 2, 0, 0]
    assert pages.column.tolist() == [0, 0, UNUSED, UNUSED, 0, 0, 1, UNUSED]
    assert (int(pages.read), int(pages.longest)) == (3, 2)
    idle = PageTable.of([np.full((4, 2), 9)], 8, groups=2)
    assert set(idle.column.tolist()) == {UNUSED}


def test_sizes_that_attention_chooses_from() -> None:
    assert read_sizes(16, 8, stacked=False) == ((2, 2), (6, 6), (16, 8))
    assert read_sizes(4096, 16, stacked=True) == tuple((part * 128, 16) for part in (1, 3, 7, 13, 21, 32))
    assert read_sizes(256, 256, stacked=True) == ((64, 16), (64, 64), (128, 16), (128, 128), (256, 16), (256, 256))
    for count in (1, FEWEST_PAGES - 1):
        assert read_sizes(count, 4, stacked=True) == ((count, min(4, count)),)
    assert [pages_for(count) for count in (1, 128, 129, 300)] == [1, 1, 2, 3]
