"""The input pipeline: from folders of records to batches of packed rows, with Grain.

Every pair of a task and a source that serves it is a stream: the records of the source, shuffled in each epoch, sliced
by process, read, and made into examples. Records that cannot be used are counted and skipped before the streams are
mixed, so that the shares of the mixture are exact. Examples are packed into rows and rows are stacked into batches,
ahead of time and in worker processes.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import grain
import numpy as np
from tokenizers import Tokenizer

from omni_jax.config.model import ModelConfig
from omni_jax.config.run import DataConfig, SourceConfig
from omni_jax.data import packing
from omni_jax.data.cached_features import CachedFeatures
from omni_jax.data.datasets import ExampleDataset, MixtureDataset, too_many_unreadable
from omni_jax.data.examples import REASONS, TASKS, ExampleBuilder, RecordsOfTask
from omni_jax.data.packing import Batch, pack, stack_rows
from omni_jax.data.records import Records
from omni_jax.data.workers import prepare_workers
from omni_jax.errors import PipelineError, RecordError
from omni_jax.tasks import Task

PREFETCHED_BATCHES = 2
"""Batches that each worker keeps ready."""

# Prefetching hides the latency of network disks. There is one stream per task and source: a few records each.
_READ_OPTIONS = grain.ReadOptions(num_threads=2, prefetch_buffer_size=8)


def batches(
    config: DataConfig,
    model: ModelConfig,
    tokenizer: Tokenizer,
    *,
    seed: int,
    process_index: int = 0,
    process_count: int = 1,
    caches: Sequence[CachedFeatures | None] | None = None,
) -> Batches:
    """Endless training batches.

    Tasks have exactly their shares of `config.tasks`, and the sources of a task are drawn by their weights. A source is
    read completely, in a new order, before any of its records is read again. Equal arguments give equal batches.
    Workers are spawned: a script that uses some must be importable without side effects.

    Args:
        config: sources, shares, size of rows, number of workers.
        model: token layout, and how many positions a recording takes.
        tokenizer: text to ids; special tokens are not added.
        seed: 0 to 2^32 - 1.
        process_index: index of this process among those that train together; each reads other records.
        process_count: their number; each yields `config.batch_size / process_count` rows.
        caches: the features of each source, if `config.cached_features` is set.

    Raises:
        PipelineError: a source cannot be opened or has no exchange for a task that it is configured to serve, the rows
            cannot be divided among the processes, or the tokenizer has more tokens than the model.
    """
    rows = _rows_per_process(config, process_count)
    builder = ExampleBuilder(config, model, tokenizer)
    folders = open_sources(config.sources)
    mixture = _mix_streams(
        config, builder, folders, caches, seed=seed, process_index=process_index, process_count=process_count
    )
    stack = functools.partial(stack_rows, builder=builder, rows=slice(0, rows), shared=config.num_workers > 0)
    data = pack(mixture, config, seed=seed).batch(rows, drop_remainder=True, batch_fn=stack)
    data = data.mp_prefetch(
        grain.MultiprocessingOptions(num_workers=config.num_workers, per_worker_buffer_size=PREFETCHED_BATCHES)
    )
    if config.num_workers:
        prepare_workers()
    layout = data_layout(config, folders, seed=seed, process_index=process_index, process_count=process_count)
    return Batches(iter(data), folders, config.max_corrupt, layout)


def data_layout(
    config: DataConfig, folders: Sequence[Records], *, seed: int, process_index: int, process_count: int
) -> dict[str, Any]:
    """All that the order of the examples depends on; a position in the data is one in this layout only.

    Arguments are those of `batches`; the folders are those of the sources.
    """
    return {
        "process_index": process_index,
        "process_count": process_count,
        "num_workers": config.num_workers,
        "seed": seed,
        "num_bins": packing.NUM_BINS,
        "rows": _rows_per_process(config, process_count),
        "max_length": config.max_length,
        "max_clips": config.max_clips,
        "tasks": dict(config.tasks),
        "versions": config.cached_features.versions if config.cached_features else None,
        "sources": [
            {"records": len(folder), "weight": source.weight, "tasks": list(source.tasks)}
            for folder, source in zip(folders, config.sources, strict=True)
        ],
    }


def layout_difference(expected: dict[str, Any], found: dict[str, Any]) -> str | None:
    """What differs first between the layout of a run and that of a saved position; None if they are the same."""
    for name, value in expected.items():
        if found.get(name) != value:
            return f"{_LAYOUT_FIELDS.get(name, name)}: expected {found.get(name)} as saved, found {value}"
    return None


_LAYOUT_FIELDS = {
    "num_workers": "data.num_workers",
    "rows": "data.batch_size (rows of a process)",
    "max_length": "data.max_length",
    "max_clips": "data.max_clips",
    "tasks": "data.tasks",
    "versions": "data.cached_features.versions",
    "sources": "data.sources",
}
"""The fields of the configuration that parts of the layout come from."""


def held_out(
    config: DataConfig,
    model: ModelConfig,
    tokenizer: Tokenizer,
    *,
    process_index: int = 0,
    process_count: int = 1,
    caches: Sequence[CachedFeatures | None] | None = None,
) -> Batches:
    """Every example of the held-out sources once, packed in order: task by task, source by source.

    The tasks are those of `config.tasks`, in each source that serves them. The last batch is filled up with rows of
    padding. All processes pack the same rows and take their share of each batch: they get the same number of batches,
    and the batches do not depend on the number of processes. Arguments and errors are those of `batches`; without
    caches, questions are recordings in any case. Records are read in the calling process.
    """
    rows = _rows_per_process(config, process_count)
    if caches is None:
        config = replace(config, cached_features=None)
    builder = ExampleBuilder(config, model, tokenizer)
    folders = open_sources(config.held_out)
    drawn = [
        grain.MapDataset.source(RecordsOfTask(folders[index], Task(task), index, caches[index] if caches else None))
        for task in config.tasks
        for index, source in enumerate(config.held_out)
        if task in source.tasks and folders[index].count(Task(task))
    ]
    if not drawn:
        drawn = [grain.MapDataset.source([])]
    stream = grain.MapDataset.concatenate(drawn).to_iter_dataset(_READ_OPTIONS)
    packed = pack(ExampleDataset(stream, builder, folders, endless=False), config, seed=None)
    own = slice(process_index * rows, (process_index + 1) * rows)
    data = packed.batch(
        config.batch_size, batch_fn=functools.partial(stack_rows, builder=builder, rows=own, shared=False)
    )
    return Batches(iter(data), folders, config.max_corrupt, {"held_out": [len(folder) for folder in folders]})


class Batches(grain.DatasetIterator):
    """Batches, with the counts of skipped records.

    A batch has, for each of the B rows of this process (T positions, A speech positions per recording):

        tokens        int32 [B, 8, T]   the trunk's input; padding ids where there is no example
        targets       int32 [B, 8, T]   the token to predict at each position
        mask          bool  [B, 8, T]   where the loss counts
        positions     int32 [B, T]      position in the example, from 0
        segments      int32 [B, T]      number of the example in its row, from 1; 0 where there is none
        speech_index  int32 [B, T]      clip * A + frame of the speech embedding at each position; -1 for none
        sound         int16 [B, clips, samples]   the row's recordings at 16 kHz, padded with zeros; or else
        features      float [B, clips, frames, D]   their cached features
        clips         int32 [B]         number of recordings in the row
        examples      int32 [B, 6]      number of examples of each task in the row, in the order of `TASKS`

    `get_state` returns values that JSON can represent; Orbax saves the iterator as it is. The counts are part of the
    batches, so that they are those of the batches drawn so far, whichever worker made them, and of the state.

    Attributes:
        layout: see `data_layout`.
    """

    def __init__(
        self, parent: grain.DatasetIterator, folders: Sequence[Records], max_corrupt: int, layout: dict[str, Any]
    ):
        super().__init__(parent)
        self._folders = folders
        self._max_corrupt = max_corrupt
        self.layout = layout
        self._skipped = np.zeros(len(REASONS), np.int64)
        self._unreadable: set[tuple[int, int]] = set()

    @property
    def skipped(self) -> dict[str, int]:
        """How often a record was skipped in this process since the start of the run, by reason."""
        return dict(zip(REASONS, self._skipped.tolist(), strict=True))

    @property
    def unreadable(self) -> list[str]:
        """File and number of each record that could not be read."""
        return [self._folders[source].location(record) for source, record in sorted(self._unreadable)]

    def __next__(self) -> Batch:
        """The next batch.

        Raises:
            PipelineError: more records than `max_corrupt` could not be read, or a whole epoch of a source had no
                usable example.
        """
        batch: Batch = next(self._parent)
        self._skipped += batch.pop("skipped")
        # A set: each record is counted once, although it is read in every epoch.
        self._unreadable.update((int(source), int(record)) for source, record in batch.pop("unreadable"))
        if len(self._unreadable) > self._max_corrupt:
            raise too_many_unreadable(self.unreadable, self._max_corrupt)
        return batch

    def get_state(self) -> dict[str, Any]:
        """The position in the data after the last batch drawn, and the counts."""
        return {
            "layout": self.layout,
            "skipped": self._skipped.tolist(),
            "unreadable": sorted(map(list, self._unreadable)),
            "parent": self._parent.get_state(),
        }

    def set_state(self, state: dict[str, Any]) -> None:
        """Go to a position in the data.

        Raises:
            PipelineError: the state has another layout: other sources, tasks, rows, workers or processes.
        """
        if difference := layout_difference(self.layout, state["layout"]):
            raise PipelineError(f"state of the data: {difference}")
        self._skipped = np.array(state["skipped"], np.int64)
        self._unreadable = {(source, record) for source, record in state["unreadable"]}
        self._parent.set_state(state["parent"])


def _mix_streams(
    config: DataConfig,
    builder: ExampleBuilder,
    folders: Sequence[Records],
    caches: Sequence[CachedFeatures | None] | None,
    *,
    seed: int,
    process_index: int,
    process_count: int,
) -> MixtureDataset:
    """An endless stream of examples for each task and source that serves it, mixed by share and weight."""
    streams: list[grain.IterDataset] = []
    weights: list[float] = []
    for task, share in config.tasks.items():
        serving = [index for index, source in enumerate(config.sources) if task in source.tasks]
        total = sum(config.sources[index].weight for index in serving)
        for index in serving:
            if not folders[index].count(Task(task)):
                raise PipelineError(serves_none(folders[index], task))
            # Seeds that differ by one would give the same orders in other epochs: Grain adds the epoch's number.
            order = np.random.SeedSequence([seed, TASKS.index(Task(task)), index]).generate_state(1)[0]
            cache = None if caches is None else caches[index]
            records = grain.MapDataset.source(RecordsOfTask(folders[index], Task(task), index, cache))
            records = records.shuffle(int(order)).repeat()
            stream = records[process_index::process_count].to_iter_dataset(_READ_OPTIONS)
            streams.append(ExampleDataset(stream, builder, folders, endless=True))
            weights.append(share * config.sources[index].weight / total)
    return MixtureDataset(streams, weights)


def serves_none(records: Records, task: str) -> str:
    """The error of a source without an exchange for a task that it is configured to serve."""
    return f"{records.folder}: expected exchanges that can serve {task}, found none"


def _rows_per_process(config: DataConfig, process_count: int) -> int:
    if config.batch_size % process_count:
        raise PipelineError(
            f"batch_size: expected a multiple of the {process_count} processes, found {config.batch_size}"
        )
    return config.batch_size // process_count


def open_sources(sources: Sequence[SourceConfig]) -> list[Records]:
    """The folders of some sources.

    Raises:
        PipelineError: one of them is not a complete folder of records.
    """
    try:
        return [Records(source.path) for source in sources]
    except RecordError as error:
        raise PipelineError(str(error)) from None
