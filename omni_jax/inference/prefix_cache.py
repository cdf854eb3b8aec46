"""Keys and values of conversations that wait for their next turn, in the host's memory.

A turn's history, its system text and past turns, begins the next turn's history, too. After prefill the keys and values
of a history are kept here, and the next turn computes only what is new. They are found by their tokens:
conversations with the same system text share its keys and values.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax

from omni_jax.prompts import History
from omni_jax.vocab import TEXT_STREAM

DEFAULT_MAX_BYTES = 256 << 20
"""A conversation of 500 positions takes 12 MB in float32 at the published shape."""


@dataclass(frozen=True, eq=False)
class Prefix:
    """The beginning of a history whose keys and values are there."""

    length: int
    """Positions of the history that it covers."""
    caches: Mapping[str, Any]
    """Caches of one row in numpy, of `length` positions or more; named as those of the running batch."""


@dataclass(eq=False)
class _Entry:
    caches: dict[str, Any]
    nbytes: int
    keys: set[bytes]


class PrefixCache:
    """The most recently used histories, as many as fit; any thread may use it.

    An entry is found by each of the prefixes that end with its system text or one of its turns. Of two entries with the
    same prefix the newer one is found; one that no prefix leads to any more is dropped.

    Attributes:
        max_bytes: the least recently used entries are dropped beyond this.
        nbytes: of all entries.
    """

    def __init__(self, max_bytes: int = DEFAULT_MAX_BYTES):
        """An empty one; with `max_bytes` of 0 it stays empty.

        Raises:
            ValueError: `max_bytes` is negative.
        """
        if max_bytes < 0:
            raise ValueError(f"max_bytes: expected 0 or more, found {max_bytes}")
        self.max_bytes, self.nbytes = max_bytes, 0
        self._entries: OrderedDict[_Entry, None] = OrderedDict()
        self._by_prefix: dict[bytes, _Entry] = {}
        self._lock = threading.Lock()

    def __len__(self) -> int:
        """Entries."""
        return len(self._entries)

    def find(self, history: History) -> Prefix | None:
        """The longest beginning of a history that is there; it counts as used."""
        with self._lock:
            for length in reversed(history.ends):
                entry = self._by_prefix.get(_key(history, length))
                if entry is not None:
                    self._entries.move_to_end(entry)
                    return Prefix(length, entry.caches)
        return None

    def keep(self, history: History, caches: Mapping[str, Any], row: int) -> None:
        """Keep a history.

        Args:
            history: what to find it by; nothing is kept if it is empty or takes more than `max_bytes`.
            caches: as prefill returns them, in numpy.
            row: which row of them it is in.
        """
        if not history.ends:
            return
        # Copies, or the caches of a whole prefill would stay in memory.
        own = jax.tree.map(lambda x: x[..., row : row + 1, :, : len(history), :].copy(), dict(caches))
        entry = _Entry(own, sum(x.nbytes for x in jax.tree.leaves(own)), set())
        if entry.nbytes > self.max_bytes:
            return
        with self._lock:
            # An empty turn ends where the one before it does.
            for length in set(history.ends):
                key = _key(history, length)
                if (older := self._by_prefix.get(key)) is not None:
                    older.keys.discard(key)
                    if not older.keys:
                        self._drop(older)
                self._by_prefix[key] = entry
                entry.keys.add(key)
            self._entries[entry] = None
            self.nbytes += entry.nbytes
            while self.nbytes > self.max_bytes:
                self._drop(next(iter(self._entries)))

    def _drop(self, entry: _Entry) -> None:
        del self._entries[entry]
        self.nbytes -= entry.nbytes
        for key in entry.keys:
            del self._by_prefix[key]


def _key(history: History, length: int) -> bytes:
    # A history has padding in all audio streams.
    return history.tokens[TEXT_STREAM, :length].tobytes()
