"""The key/value cache of many rows in one pool of pages, and attention to it.

A page holds a run of `page_len` positions of one row; a row has as many pages as it has positions, anywhere in the
pool. Each page meets the query of its row by itself, and a row's result is put together from those of its pages, as
their scores weigh them (Milakov and Gimelshein, arXiv 1805.02867). So keys and values are read once, in the order in
which they are stored; only queries and results, a hundredth of them, go by the page table.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from omni_jax import sharding
from omni_jax.model.attention import soft_cap

Array = jax.Array
Cache = dict[str, Any]
"""`k` and `v`: stacked [L, R, K / P, S, P * H], or a tuple of L arrays [R, K, S, H]. R rows of S positions, or a pool
of R pages of S positions, P heads side by side."""

PAGE_LEN = 128
"""Positions of a page: what a TPU's matrix unit takes at once. A row wastes half a page in the mean."""
FEWEST_PAGES = 256
"""Of a stacked pool, of which attention reads the part that is in use: 16 rows of 2048 positions."""
ROW_PAGES = 16
"""Results of so many pages of each row are cheaper to put together than to choose fewer."""
UNUSED = 1 << 20
"""For a page that no row has: behind all positions."""
LOWEST = np.finfo(np.float32).min


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class PageTable:
    """Which page of the pool has which positions of which row.

    Rows and pages may be in groups, one for each shard of the batch; a row's pages are in its own group, and pages and
    rows are numbered within the group.
    """

    rows: tuple[Array, ...]
    """int32 [R_i, M]: a row's pages in the order of their positions, any number beyond the pool for none. Several
    arrays together have all rows of `Decoder.decode`; a group has an equal share of each."""
    owner: Array
    """int32 [pages], the row of each page: among the rows of its group, those of the first array before the next."""
    column: Array
    """int32 [pages], which of its row's pages it is; `UNUSED` if it has no row."""
    read: Array
    """int32 []: no row has a page from this one on, in any group."""
    longest: Array
    """int32 []: no row has more pages."""

    @classmethod
    def of(cls, tables: Sequence[np.ndarray], num_pages: int, groups: int = 1) -> PageTable:
        """Make one of the pages of each row.

        Args:
            tables: for `rows`.
            num_pages: of the pool.
            groups: how many groups there are.
        """
        size = num_pages // groups
        owner, column = np.zeros((groups, size), np.int32), np.full((groups, size), UNUSED, np.int32)
        read, longest, rows_before = 1, 1, 0
        for table in tables:
            rows, columns = np.nonzero(table < size)
            per_group = len(table) // groups
            if len(rows):
                group, pages = rows // per_group, table[rows, columns]
                owner[group, pages] = rows_before + rows % per_group
                column[group, pages] = columns
                read, longest = max(read, pages.max() + 1), max(longest, columns.max() + 1)
            rows_before += per_group
        return cls(
            tuple(jnp.asarray(table.astype(np.int32)) for table in tables),
            jnp.asarray(owner.reshape(-1)),
            jnp.asarray(column.reshape(-1)),
            jnp.int32(read),
            jnp.int32(longest),
        )


def pages_for(positions: int, page_len: int = PAGE_LEN) -> int:
    """Pages that so many positions of a row take."""
    return -(-positions // page_len)


def page_len(cache: Cache) -> int:
    """Positions of a page of a pool, or of a row of any other cache (S)."""
    return jax.tree.leaves(cache)[0].shape[-2]


def num_pages(cache: Cache) -> int:
    """Pages of a pool, or rows of any other cache (R)."""
    return jax.tree.leaves(cache)[0].shape[-4]


def read_sizes(num_pages: int, columns: int, *, stacked: bool) -> tuple[tuple[int, int], ...]:
    """What attention can read: (pages from the first on, pages of a row that are among them); at last, all.

    Each is compiled, six at most, and only three where layers are compiled one by one, as they are not stacked. A
    stacked pool of few pages is read whole: it is small next to the weights, and the TPU compiler reads these more than
    once where it has to choose.

    Args:
        num_pages: of the pool, in one group.
        columns: pages that a row may have.
        stacked: whether layers are stacked.
    """
    of_row: tuple[int, ...] = (columns,)
    if not stacked:
        parts: tuple[int, ...] = (4, 12, 32)
    elif num_pages < FEWEST_PAGES:
        parts = (32,)
    elif columns <= ROW_PAGES:
        parts = (1, 3, 7, 13, 21, 32)
    else:
        parts, of_row = (8, 16, 32), (ROW_PAGES, columns)
    counts = {math.ceil(num_pages * part / 32) for part in parts}
    # No row has more pages than are read.
    return tuple(sorted({(count, min(most, count)) for count in counts for most in of_row}))


def attend_pages(
    query: Array,
    cache: Cache,
    layer: Any,
    positions: Array,
    pages: PageTable,
    window: int | Array | None = None,
    *,
    scale: float | None = None,
    softcap: float | None = None,
) -> Array:
    """Attention of one position per row to positions 0..position of the row, within one group of rows and pages.

    Heads that stand side by side in the cache's last axis, P of them, are read as one: a query attends to its own part
    of it because it is zero in the others. That is P times the work of products that wait for memory anyway.

    Args:
        query: [R, N, H].
        cache: the pool.
        layer: which layer; a traced index if the cache is stacked.
        positions: int32 [R].
        pages: of these R rows.
        window: how many positions are attended to at most, the row's own and those before it; None: all.
        scale: what products are multiplied with; None: 1 / sqrt(H).
        softcap: bound of the scores s, which become softcap * tanh(s / softcap); None: unbounded.

    Returns:
        [R, N, H]; zeros for a row without pages.
    """
    R, N, H = query.shape
    stacked = not isinstance(cache["k"], tuple)
    size, S = num_pages(cache), page_len(cache)
    groups, W = jax.tree.leaves(cache)[0].shape[-3], jax.tree.leaves(cache)[0].shape[-1]
    P = W // H
    own = jnp.eye(P, dtype=query.dtype)[:, None, :, None]
    query = query.reshape(R, groups, P, -1, 1, H)
    query = (query * own if P > 1 else query).reshape(R, groups, -1, W)
    table = jnp.concatenate(pages.rows)

    def read(count: int, columns: int) -> Callable[[], Array]:
        def attend() -> Array:
            if stacked:
                start, shape = (layer, 0, 0, 0, 0), (1, count, groups, S, W)
                keys, values = (jax.lax.dynamic_slice(cache[name], start, shape)[0] for name in "kv")
            else:
                keys, values = (cache[name][layer][:count] for name in "kv")
            owner = pages.owner[:count]
            products = jnp.einsum("nkgh,nksh->nkgs", query[owner], keys, preferred_element_type=jnp.float32)
            scores = soft_cap(products / math.sqrt(H) if scale is None else products * scale, softcap)
            distance = positions[owner][:, None] - pages.column[:count, None] * S - jnp.arange(S)
            seen = (distance >= 0) if window is None else (distance >= 0) & (distance < window)
            scores = jnp.where(seen[:, None, None], scores, LOWEST)
            best = scores.max(axis=-1, keepdims=True)
            weights = jnp.exp(scores - best)
            total = weights.sum(axis=-1, keepdims=True)
            weights = (weights / total).astype(values.dtype)
            mixed = jnp.einsum("nkgs,nksh->nkgh", weights, values).reshape(count, groups, P, -1, P, H)
            if P > 1:
                mixed = (mixed * own.astype(mixed.dtype)).sum(axis=4)
            # The weight of a page among all of its row.
            of_page = (best + jnp.log(total)).reshape(count, N)
            return together(of_page, mixed.reshape(count, N, H), table[:, :columns])

        return attend

    def together(of_page: Array, mixed: Array, table: Array) -> Array:
        logits = of_page.at[table].get(mode="fill", fill_value=-jnp.inf)
        parts = mixed.at[table].get(mode="fill", fill_value=0)
        best = jnp.maximum(logits.max(axis=1, keepdims=True), LOWEST)
        weights = jnp.exp(logits - best)
        weights = weights / jnp.maximum(weights.sum(axis=1, keepdims=True), jnp.finfo(jnp.float32).tiny)
        return jnp.einsum("rmn,rmnh->rnh", weights, parts.astype(jnp.float32)).astype(parts.dtype)

    sizes = read_sizes(size, table.shape[1], stacked=stacked)
    if len(sizes) == 1:
        return read(*sizes[0])()
    # The first that is enough.
    enough = (jnp.stack([pages.read, pages.longest]) <= jnp.array(sizes)).all(axis=1)
    return jax.lax.switch(jnp.argmax(enough), [read(*each) for each in sizes])


def write_pages(cache: Cache, layer: Any, positions: Array, pages: PageTable, key: Array, value: Array) -> Cache:
    """Put one position of every row into a layer, in place when the pool is donated; see `attend_pages`.

    Args:
        cache: the pool.
        layer: which layer; a traced index if the cache is stacked.
        positions: int32 [R]; what a row writes where it has no page is dropped.
        pages: of these R rows.
        key: [R, K / P, P * H].
        value: [R, K / P, P * H].

    Returns:
        The pool.
    """
    R, K, H = key.shape
    S, table = page_len(cache), jnp.concatenate(pages.rows)
    page, at = table[jnp.arange(R), positions // S], positions % S
    if isinstance(cache["k"], tuple):
        # Pages and heads are written as one axis: for a single row XLA:CPU would otherwise turn the scatter into
        # an update that it fuses twice, and copy the whole cache at every layer.
        where = ((page[:, None] * K + jnp.arange(K)).reshape(-1), jnp.repeat(at, K))
        new = {}
        for name, item in (("k", key), ("v", value)):
            old = cache[name][layer]
            flat = old.reshape(-1, S, H).at[where].set(item.reshape(R * K, H), mode="drop")
            new[name] = (*cache[name][:layer], flat.reshape(old.shape), *cache[name][layer + 1 :])
        return new
    places = (layer, page[:, None], jnp.arange(K), at[:, None])
    return {
        "k": cache["k"].at[places].set(key, mode="drop"),
        "v": cache["v"].at[places].set(value, mode="drop"),
    }


def attend_and_write(
    query: Array,
    key: Array,
    value: Array,
    cache: Cache,
    layer: Any,
    positions: Array,
    pages: PageTable,
    window: int | Array | None = None,
    **score_options: float | None,
) -> tuple[Array, Cache]:
    """Write one position of every row into a layer, then attend to it and those before; each group on its own devices.

    Args:
        query: [R, N, H].
        key: [R, K / P, P * H].
        value: [R, K / P, P * H].
        cache: the pool.
        layer: which layer; a traced index if the cache is stacked.
        positions: int32 [R].
        pages: of all groups.
        window: see `attend_pages`.
        score_options: see `attend_pages`.

    Returns:
        Heads [R, N, H] and the pool.
    """

    def local(
        query: Sequence[Array],
        key: Sequence[Array],
        value: Sequence[Array],
        positions: Sequence[Array],
        cache: Cache,
        pages: PageTable,
        layer: Any,
        window: Any,
    ) -> tuple[tuple[Array, ...], Cache]:
        counts = [len(rows) for rows in query]
        at = jnp.concatenate(positions)
        cache = write_pages(cache, layer, at, pages, jnp.concatenate(key), jnp.concatenate(value))
        heads = attend_pages(jnp.concatenate(query), cache, layer, at, pages, window, **score_options)
        return tuple(jnp.split(heads, np.cumsum(counts)[:-1])), cache

    mesh = jax.sharding.get_abstract_mesh()
    ends = np.cumsum([len(table) for table in pages.rows])[:-1]
    rows = [jnp.split(x, ends) for x in (query, key, value, positions)]
    if mesh.empty or mesh.size == 1:
        heads, cache = local(rows[0], rows[1], rows[2], rows[3], cache, pages, layer, window)
        return jnp.concatenate(heads), cache

    groups = row_groups(len(pages.rows[0]), mesh)
    batch = sharding.RULES["batch"] if groups > 1 else None
    # Query heads stay with the keys of their group, so both are split as the cache is.
    packed = key.shape[1]
    split = sharding.spec((packed,), ("kv_heads",), mesh)[0]
    by_head, by_row = PartitionSpec(batch, split, None), PartitionSpec(batch)
    stacked = not isinstance(cache["k"], tuple)
    pool = PartitionSpec(*[None] * stacked, batch, split, None, None)
    table = dataclasses.replace(jax.tree.map(lambda _: by_row, pages), read=PartitionSpec(), longest=PartitionSpec())
    traced = [x if isinstance(x, Array) else None for x in (layer, window)]
    specs = [None if x is None else PartitionSpec() for x in traced]

    def on_shard(*args: Any) -> tuple[tuple[Array, ...], Cache]:
        *others, of_layer, of_window = args
        last = [layer if of_layer is None else of_layer, window if of_window is None else of_window]
        return local(*[*others, *last])

    heads, cache = jax.shard_map(
        on_shard,
        in_specs=(by_head, by_head, by_head, by_row, pool, table, *specs),
        out_specs=(by_head, pool),
        check_vma=False,
    )(*rows, cache, pages, *traced)
    return jnp.concatenate(heads), cache


def row_groups(rows: int, mesh: Any) -> int:
    """Into how many groups rows and pages are divided: the shards of the batch, if the rows divide evenly."""
    groups = sharding.num_shards("batch", mesh)
    return groups if rows % groups == 0 else 1
