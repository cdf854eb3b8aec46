"""Grain datasets of the input pipeline: drawn records made into examples, and streams mixed in exact shares."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import grain
import numpy as np

from omni_jax.data.examples import REASONS, DrawnRecord, ExampleBuilder, SkippedRecord
from omni_jax.data.records import Records
from omni_jax.errors import PipelineError


class ExampleDataset(grain.IterDataset):
    """Drawn records made into examples.

    Each example carries the counts of the records that were skipped since the example before it: `skipped` int64
    [reasons] and `unreadable` int64 [n, 2], source and index of the records that could not be read.
    """

    def __init__(
        self, parent: grain.IterDataset, builder: ExampleBuilder, folders: Sequence[Records], *, endless: bool
    ):
        """Wrap a dataset of drawn records.

        Args:
            parent: dataset of `DrawnRecord`.
            builder: makes the examples.
            folders: the sources, by their index.
            endless: whether the parent repeats its records endlessly. If so, as many skipped records in a row as its
                source has are an error.
        """
        super().__init__(parent)
        self._builder = builder
        self._folders = folders
        self._endless = endless

    def __iter__(self) -> grain.DatasetIterator:
        return _ExampleIterator(self._parent.__iter__(), self._builder, self._folders, self._endless)


class _ExampleIterator(grain.DatasetIterator):
    def __init__(
        self, parent: grain.DatasetIterator, builder: ExampleBuilder, folders: Sequence[Records], endless: bool
    ):
        super().__init__(parent)
        self._builder = builder
        self._folders = folders
        self._endless = endless

    def __next__(self) -> dict[str, Any]:
        """The next example.

        Raises:
            PipelineError: more records than `max_corrupt` in a row could not be read, or a whole epoch of the source
                was skipped.
        """
        skipped = np.zeros(len(REASONS), np.int64)
        unreadable: dict[tuple[int, int], str] = {}
        while True:
            try:
                drawn: DrawnRecord = next(self._parent)
            except StopIteration:
                if skipped.any():
                    return self._builder.empty() | _counts(skipped, unreadable)
                raise
            try:
                return self._builder.build(drawn) | _counts(skipped, unreadable)
            except SkippedRecord as skip:
                skipped[REASONS.index(skip.reason)] += 1
                folder = self._folders[drawn.source]
                location = folder.location(drawn.record)
                if skip.reason == "unreadable":
                    unreadable[drawn.source, drawn.record] = f"{location}: {skip}"
                if len(unreadable) > self._builder.data.max_corrupt:
                    # `Batches` counts all of them, but only in batches, and none may ever be complete.
                    raise too_many_unreadable(list(unreadable.values()), self._builder.data.max_corrupt) from None
                if self._endless and skipped.sum() >= len(folder):
                    counts = ", ".join(f"{n} {reason}" for n, reason in zip(skipped, REASONS, strict=True) if n)
                    raise PipelineError(
                        f"{folder.folder}: expected examples of {drawn.task}, found none in {len(folder)} records: "
                        f"{counts}; the last one, {location}: {skip}"
                    ) from None

    def get_state(self) -> dict[str, Any]:
        # The counts are empty between two examples.
        return self._parent.get_state()

    def set_state(self, state: dict[str, Any]) -> None:
        self._parent.set_state(state)


class MixtureDataset(grain.IterDataset):
    """Streams mixed in proportion to their weights: after n draws, each is within a few draws of its share of n.

    Grain's own mixture rounds the weights to hundredths of the smallest one, an error of up to 1 % that never averages
    out.
    """

    def __init__(self, parents: Sequence[grain.IterDataset], weights: Sequence[float]):
        super().__init__(parents)
        self._weights = np.array(weights) / sum(weights)

    def __iter__(self) -> grain.DatasetIterator:
        return _MixtureIterator([parent.__iter__() for parent in self._parents], self._weights)


class _MixtureIterator(grain.DatasetIterator):
    def __init__(self, parents: Sequence[grain.DatasetIterator], weights: np.ndarray):
        super().__init__(parents)
        self._weights = weights
        self._drawn = np.zeros(len(weights), np.int64)

    def __next__(self) -> dict[str, Any]:
        # From the stream that is furthest behind its share.
        stream = int(np.argmax(self._weights * (self._drawn.sum() + 1) - self._drawn))
        element = next(self._parents[stream])
        self._drawn[stream] += 1
        return element

    def get_state(self) -> dict[str, Any]:
        return {"parents": [parent.get_state() for parent in self._parents], "drawn": self._drawn.tolist()}

    def set_state(self, state: dict[str, Any]) -> None:
        for parent, parent_state in zip(self._parents, state["parents"], strict=True):
            parent.set_state(parent_state)
        self._drawn = np.array(state["drawn"], np.int64)


def too_many_unreadable(records: Sequence[str], max_corrupt: int) -> PipelineError:
    """The error of a run in which more than `max_corrupt` records could not be read, and the last of these."""
    return PipelineError(
        f"expected at most {max_corrupt} records that cannot be read (max_corrupt), found {len(records)}, among them:\n"
        + "\n".join(records[-3:])
    )


def _counts(skipped: np.ndarray, unreadable: dict[tuple[int, int], str]) -> dict[str, Any]:
    return {"skipped": skipped, "unreadable": np.array(list(unreadable), np.int64).reshape(-1, 2)}
