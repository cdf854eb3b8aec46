"""From folders of records to batches of packed rows, with Grain.

Every pair of a task and a source that serves it is a stream of its own: its records shuffled anew each epoch, sliced
by process, read, and made into examples by `omni_jax.prompts`. What cannot be used is counted and left out there, so
that the streams can then be mixed in exact shares. Examples are packed into rows, rows stacked into batches, ahead of
time in worker processes.

Letters: B rows, T positions of a row, A speech positions of a full recording.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import absl.flags
import grain
import numpy as np
from tokenizers import Tokenizer

from omni_jax.config.model import ModelConfig
from omni_jax.config.run import DataConfig, SourceConfig
from omni_jax.data.records import Exchange, Records, from_bytes, serves
from omni_jax.errors import PipelineError, RecordError
from omni_jax.prompts import Example, example, speech_positions, speech_prompt, text_prompt
from omni_jax.tasks import Task
from omni_jax.vocab import NUM_STREAMS, TEXT_STREAM, Vocab

Batch = dict[str, np.ndarray]


TASKS = tuple(Task)
"""The order of the tasks in `examples` of a batch."""


REASONS = ("unreadable", "unsuitable", "longer_than_ear", "longer_than_row", "refused")
"""Why a record was left out: its bytes are damaged; it lacks what the task needs, although its source claims to serve
it; its question is longer than the ear hears at once; its example is longer than a row; `omni_jax.prompts` refuses it
(its text is empty, or takes longer than its speech)."""


BINS = 64
"""Rows that are packed at the same time. More waste less; a resumed run packs as many again before its first batch."""


# Reading ahead hides the latency of network disks. There is a stream for each task and source: a few records each.
_READING = grain.ReadOptions(num_threads=2, prefetch_buffer_size=8)


_AHEAD = 2
"""Batches that each worker keeps ready."""


_NO_SOUND = np.zeros(0, np.int16)


def batches(
    config: DataConfig,
    model: ModelConfig,
    tokenizer: Tokenizer,
    *,
    seed: int,
    process_index: int = 0,
    process_count: int = 1,
) -> Batches:
    """Training batches without end.

    Tasks come in exact shares of `config.tasks`, the sources of a task by their weights; each source goes through all
    its records, in a new order, before any comes again. The same arguments give the same batches. Workers are spawned:
    a script that asks for some must be importable without running.

    Args:
        config: sources, shares, rows, workers.
        model: says how sound becomes positions, and the token layout.
        tokenizer: text to ids; special tokens are not added.
        seed: 0 to 2^32 - 1.
        process_index: which of the processes that train together this one is; each reads other records.
        process_count: how many there are; each yields `config.batch_size / process_count` rows.

    Raises:
        PipelineError: a source cannot be opened or has no exchange for a task it should serve, the rows cannot be
            shared out, or the tokenizer has more tokens than the model.
    """
    rows = _share(config, process_count)
    builder = _checked(config, model, tokenizer)
    folders = _opened(config.sources)
    streams: list[grain.IterDataset] = []
    weights: list[float] = []
    for task, share in config.tasks.items():
        serving = [index for index, source in enumerate(config.sources) if task in source.tasks]
        total = sum(config.sources[index].weight for index in serving)
        for index in serving:
            if not folders[index].count(Task(task)):
                raise PipelineError(f"{folders[index].folder}: expected exchanges that can serve {task}, found none")
            # Of its own for each stream and far from the others': Grain adds the epoch's number to it.
            order = np.random.SeedSequence([seed, TASKS.index(Task(task)), index]).generate_state(1)[0]
            records = grain.MapDataset.source(_Draws(folders[index], Task(task), index)).shuffle(int(order)).repeat()
            stream = records[process_index::process_count].to_iter_dataset(_READING)
            streams.append(_Examples(stream, builder, folders, endless=True))
            weights.append(share * config.sources[index].weight / total)
    packed = _pack(_Mixture(streams, weights), config, seed=seed)
    stack = functools.partial(_stack, builder=builder, rows=slice(0, rows), shared=config.num_workers > 0)
    data = packed.batch(rows, drop_remainder=True, batch_fn=stack)
    data = data.mp_prefetch(grain.MultiprocessingOptions(num_workers=config.num_workers, per_worker_buffer_size=_AHEAD))
    if config.num_workers and not absl.flags.FLAGS.is_parsed():
        # Grain's workers read absl flags, which are errors before somebody parses them, and nobody here does.
        absl.flags.FLAGS.mark_as_parsed()
    layout = {
        "process": f"{process_index} of {process_count}",
        "process_index": process_index,
        "process_count": process_count,
        "workers": config.num_workers,
        "seed": seed,
        "bins": BINS,
        "rows": rows,
        "length": config.max_length,
        "clips": config.max_clips,
        "tasks": dict(config.tasks),
        "sources": [
            {"records": len(folder), "weight": source.weight, "tasks": list(source.tasks)}
            for folder, source in zip(folders, config.sources, strict=True)
        ],
    }
    return Batches(iter(data), folders, config.max_corrupt, layout)


def held_out(
    config: DataConfig, model: ModelConfig, tokenizer: Tokenizer, *, process_index: int = 0, process_count: int = 1
) -> Batches:
    """Every example of the held-out sources once, packed in order: task by task, source by source.

    The tasks are those of `config.tasks`, in each source that serves them. The last batch is filled up with rows of
    padding. All processes pack the same rows and take their share of each batch: they have the same number of batches,
    and these don't depend on the number of processes. Arguments and errors are those of `batches`; it reads in the
    calling process.
    """
    rows = _share(config, process_count)
    builder = _checked(config, model, tokenizer)
    folders = _opened(config.held_out)
    draws = [
        grain.MapDataset.source(_Draws(folders[index], Task(task), index))
        for task in config.tasks
        for index, source in enumerate(config.held_out)
        if task in source.tasks and folders[index].count(Task(task))
    ]
    if not draws:
        draws = [grain.MapDataset.source([])]
    stream = grain.MapDataset.concatenate(draws).to_iter_dataset(_READING)
    packed = _pack(_Examples(stream, builder, folders, endless=False), config, seed=None)
    mine = slice(process_index * rows, (process_index + 1) * rows)
    data = packed.batch(config.batch_size, batch_fn=functools.partial(_stack, builder=builder, rows=mine, shared=False))
    return Batches(iter(data), folders, config.max_corrupt, {"held_out": [len(folder) for folder in folders]})


def padding(batch: Batch) -> float:
    """The fraction of a batch's positions that hold nothing."""
    return float(np.mean(batch["segments"] == 0))


class Batches(grain.DatasetIterator):
    """Batches, with the counts of what was left out.

    A batch holds, for each of the B rows of this process:

        tokens        int32 [B, 8, T]   the trunk's input; padding ids beyond the examples
        targets       int32 [B, 8, T]   what to say at each position
        mask          bool  [B, 8, T]   where the loss counts
        positions     int32 [B, T]      from 0 in each example
        segments      int32 [B, T]      1, 2, ... for the examples of a row, 0 where there is none
        speech_index  int32 [B, T]      clip * A + frame: which of the row's speech positions is heard; -1 for none
        sound         int16 [B, clips, samples]   the row's recordings, zeros after each and where there is none
        clips         int32 [B]         recordings in the row
        examples      int32 [B, 6]      examples of each task in the row, in the order of `TASKS`

    `get_state` gives what JSON can hold, and Orbax saves the iterator as it is. Counts travel with the batches: they
    are those of the batches drawn so far, whichever worker made them, and belong to the state.
    """

    def __init__(
        self, parent: grain.DatasetIterator, folders: Sequence[Records], max_corrupt: int, layout: dict[str, Any]
    ):
        super().__init__(parent)
        self._folders = folders
        self._most_corrupt = max_corrupt
        self._layout = layout
        self._skipped = np.zeros(len(REASONS), np.int64)
        self._unreadable: set[tuple[int, int]] = set()

    @property
    def skipped(self) -> dict[str, int]:
        """How many times a record of this process was left out, by reason, since the run began."""
        return dict(zip(REASONS, self._skipped.tolist(), strict=True))

    @property
    def unreadable(self) -> list[str]:
        """File and number of each record that could not be read."""
        return [self._folders[source].name(record) for source, record in sorted(self._unreadable)]

    def __next__(self) -> Batch:
        """The next batch.

        Raises:
            PipelineError: more records than `max_corrupt` could not be read, or a whole epoch of a source had no
                usable example.
        """
        batch: Batch = next(self._parent)
        self._skipped += batch.pop("skipped")
        # Each is counted once, however often its turn comes.
        self._unreadable.update((int(source), int(record)) for source, record in batch.pop("unreadable"))
        if len(self._unreadable) > self._most_corrupt:
            raise _too_many(self.unreadable, self._most_corrupt)
        return batch

    def get_state(self) -> dict[str, Any]:
        """The place in the data after the last batch drawn, and the counts."""
        return {
            "layout": self._layout,
            "skipped": self._skipped.tolist(),
            "unreadable": sorted(map(list, self._unreadable)),
            "parent": self._parent.get_state(),
        }

    def set_state(self, state: dict[str, Any]) -> None:
        """Go to a place in the data.

        Raises:
            PipelineError: the state is of another layout: of other sources, tasks, rows, workers or processes.
        """
        for name, expected in self._layout.items():
            found = state["layout"].get(name)
            if found != expected:
                raise PipelineError(f"state of the data: {name}: expected {expected}, found {found}")
        self._skipped = np.array(state["skipped"], np.int64)
        self._unreadable = {(source, record) for source, record in state["unreadable"]}
        self._parent.set_state(state["parent"])


@dataclass(frozen=True)
class _Draw:
    """A record as read, and what it was drawn for."""

    task: Task
    source: int
    record: int
    data: bytes | RecordError


class _Draws:
    """A source's records, drawn for a task. A record that cannot be read is not an exception here: Grain would end."""

    def __init__(self, records: Records, task: Task, source: int):
        self.records = records
        self.task = task
        self.source = source

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> _Draw:
        data: bytes | RecordError
        try:
            data = self.records[index]
        except RecordError as error:
            data = error
        return _Draw(self.task, self.source, index, data)


class _Skip(Exception):  # noqa: N818 - not an error but an outcome
    """A record that is left out."""

    def __init__(self, reason: str, why: str):
        super().__init__(why)
        self.reason = reason


@dataclass(frozen=True)
class _Builder:
    """What turns a drawn record into an example."""

    data: DataConfig
    model: ModelConfig
    tokenizer: Tokenizer

    @functools.cached_property
    def vocab(self) -> Vocab:
        return Vocab(self.model.vocab)

    @property
    def speech(self) -> int:
        """Speech positions of a full recording (A)."""
        return -(-self.model.audio_encoder.max_position // self.model.adapter.stack)

    def __call__(self, draw: _Draw) -> dict[str, Any]:
        """The features that are packed: each with its own length, or a value per example.

        Raises:
            _Skip: the record cannot be used.
        """
        if isinstance(draw.data, RecordError):
            raise _Skip("unreadable", str(draw.data))
        task = draw.task
        try:
            exchange = from_bytes(draw.data, codebook_size=self.model.vocab.audio, audio=task.takes_audio)
        except RecordError as error:
            raise _Skip("unreadable", str(error)) from None
        if task not in serves(exchange):
            raise _Skip("unsuitable", f"it cannot serve {task}")
        sound = _NO_SOUND if exchange.question_audio is None else exchange.question_audio
        if len(sound) > self.model.audio_encoder.max_samples:
            raise _Skip("longer_than_ear", f"its question has {len(sound)} samples")
        made = self._example(task, exchange, len(sound))
        length, most = made.tokens.shape[1], self.data.max_length
        if length > most:
            raise _Skip("longer_than_row", f"its example takes {length} positions of {most}")
        heard = np.full(length, -1, np.int32)
        heard[1 : 1 + made.speech_positions] = np.arange(made.speech_positions)
        return {
            "tokens": made.tokens.T,
            "targets": made.targets.T,
            "mask": made.mask.T,
            "heard": heard,
            "clip": np.ones(int(task.takes_audio), np.int8),
            "task": TASKS.index(task),
            "sound": sound,
        }

    def nothing(self) -> dict[str, Any]:
        """An example without positions: what was left out at the very end can travel with it."""
        none = np.zeros((0, NUM_STREAMS), np.int32)
        heard, clip = np.zeros(0, np.int32), np.zeros(0, np.int8)
        features = {"tokens": none, "targets": none, "mask": none.astype(bool), "heard": heard, "clip": clip}
        return features | {"task": -1, "sound": _NO_SOUND}

    def _example(self, task: Task, exchange: Exchange, samples: int) -> Example:
        ear, stack = self.model.audio_encoder, self.model.adapter.stack
        try:
            if task.takes_audio:
                prompt = speech_prompt(task, speech_positions(samples, ear.max_position, stack), self.vocab)
            else:
                asked = exchange.answer_text if task is Task.T1A1 else exchange.question_text
                prompt = text_prompt(task, self._ids(asked), self.vocab)
            said = exchange.question_text if task is Task.A1T1 else exchange.answer_text
            text = self._ids(said) if task.outputs_text else []
            return example(prompt, text, exchange.answer_codes if task.outputs_audio else None, self.vocab)
        except ValueError as error:
            raise _Skip("refused", str(error)) from None

    def _ids(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False).ids


class _Examples(grain.IterDataset):
    """Draws made into examples; each carries what was left out since the one before it."""

    def __init__(self, parent: grain.IterDataset, builder: _Builder, folders: Sequence[Records], *, endless: bool):
        super().__init__(parent)
        self._builder = builder
        self._folders = folders
        self._endless = endless

    def __iter__(self) -> grain.DatasetIterator:
        return _ExamplesIterator(self._parent.__iter__(), self._builder, self._folders, self._endless)


class _ExamplesIterator(grain.DatasetIterator):
    def __init__(self, parent: grain.DatasetIterator, builder: _Builder, folders: Sequence[Records], endless: bool):
        super().__init__(parent)
        self._builder = builder
        self._folders = folders
        self._endless = endless

    def __next__(self) -> dict[str, Any]:
        skipped = np.zeros(len(REASONS), np.int64)
        unreadable: dict[tuple[int, int], str] = {}
        while True:
            try:
                draw: _Draw = next(self._parent)
            except StopIteration:
                if skipped.any():
                    return self._builder.nothing() | _counts(skipped, unreadable)
                raise
            try:
                return self._builder(draw) | _counts(skipped, unreadable)
            except _Skip as skip:
                skipped[REASONS.index(skip.reason)] += 1
                folder = self._folders[draw.source]
                name = folder.name(draw.record)
                if skip.reason == "unreadable":
                    unreadable[draw.source, draw.record] = f"{name}: {skip}"
                if len(unreadable) > self._builder.data.max_corrupt:
                    # Batches counts them all, but may never get a batch to count.
                    raise _too_many(list(unreadable.values()), self._builder.data.max_corrupt) from None
                if self._endless and skipped.sum() >= len(folder):
                    counts = ", ".join(f"{n} {reason}" for n, reason in zip(skipped, REASONS, strict=True) if n)
                    raise PipelineError(
                        f"{folder.folder}: expected examples of {draw.task}, found none in {len(folder)} records: "
                        f"{counts}; at last {name}: {skip}"
                    ) from None

    def get_state(self) -> dict[str, Any]:
        # Nothing is pending between two examples.
        return self._parent.get_state()

    def set_state(self, state: dict[str, Any]) -> None:
        self._parent.set_state(state)


class _Mixture(grain.IterDataset):
    """Streams drawn from in proportion to their weights: after n draws each is within a few of its share of n.

    Grain's own mixture rounds the weights to hundredths of the smallest, which is off by up to 1 % for good.
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
        # The stream that is furthest behind its share.
        behind = int(np.argmax(self._weights * (self._drawn.sum() + 1) - self._drawn))
        element = next(self._parents[behind])
        self._drawn[behind] += 1
        return element

    def get_state(self) -> dict[str, Any]:
        return {"parents": [parent.get_state() for parent in self._parents], "drawn": self._drawn.tolist()}

    def set_state(self, state: dict[str, Any]) -> None:
        for parent, of_parent in zip(self._parents, state["parents"], strict=True):
            parent.set_state(of_parent)
        self._drawn = np.array(state["drawn"], np.int64)


def _counts(skipped: np.ndarray, unreadable: dict[tuple[int, int], str]) -> dict[str, Any]:
    return {"skipped": skipped, "unreadable": np.array(list(unreadable), np.int64).reshape(-1, 2)}


def _pack(examples: grain.IterDataset, config: DataConfig, *, seed: int | None) -> grain.IterDataset:
    """Examples packed into rows; the rows of one packing in random order, without a seed in the order of packing."""
    return grain.experimental.BestFitPackIterDataset(
        examples,
        # A recording is one of `clips` units, whatever its length: the packer never copies sound.
        length_struct={
            **dict.fromkeys(("tokens", "targets", "mask", "heard"), config.max_length),
            "clip": config.max_clips,
        },
        num_packing_bins=BINS,
        seed=seed or 0,
        shuffle_bins=seed is not None,
        meta_features=("task", "sound", "skipped", "unreadable"),
    )


def _stack(packed: Sequence[dict[str, Any]], *, builder: _Builder, rows: slice, shared: bool) -> Batch:
    """A batch, as `Batches` describes it, of some of the packed rows; those that aren't there are padding.

    Besides, int64 `skipped` [reasons] and `unreadable` [n, 2], the sources and numbers of records, of all the rows.
    """
    # Sound is by far the most of a batch, and most of it silence: never touched, it costs nothing. In a worker it is
    # written where the training process will read it.
    zeros = grain.multiprocessing.SharedMemoryArray if shared else np.zeros
    vocab, B, T = builder.vocab, rows.stop - rows.start, builder.data.max_length
    pads = np.full((NUM_STREAMS, 1), vocab.pad_a, np.int32)
    pads[TEXT_STREAM] = vocab.pad_t
    batch = {
        "tokens": np.tile(pads, (B, 1, T)),
        "targets": np.tile(pads, (B, 1, T)),
        "mask": np.zeros((B, NUM_STREAMS, T), bool),
        "positions": np.zeros((B, T), np.int32),
        "segments": np.zeros((B, T), np.int32),
        "speech_index": np.full((B, T), -1, np.int32),
        "sound": zeros((B, builder.data.max_clips, builder.model.audio_encoder.max_samples), np.int16),
        "clips": np.zeros(B, np.int32),
        "examples": np.zeros((B, len(TASKS)), np.int32),
        "skipped": np.sum([skipped for row in packed for skipped in row["skipped"]], axis=0),
        "unreadable": np.concatenate([records for row in packed for records in row["unreadable"]]),
    }
    for at, row in enumerate(packed[rows]):
        segments = row["tokens_segment_ids"]
        used = segments > 0
        for name in ("tokens", "targets", "mask"):
            np.copyto(batch[name][at], row[name].T, where=used)
        batch["positions"][at] = row["tokens_positions"]
        batch["segments"][at] = segments
        # The clips of a row come in the order of its examples; text examples have none.
        owners = row["clip_segment_ids"]
        clip_of = np.zeros(segments.max(initial=0) + 1, np.int32)
        clips = np.flatnonzero(owners)
        clip_of[owners[clips]] = clips
        heard = used & (row["heard"] >= 0)
        batch["speech_index"][at, heard] = clip_of[segments[heard]] * builder.speech + row["heard"][heard]
        sounds = [sound for sound in row["sound"] if len(sound)]
        for clip, sound in enumerate(sounds):
            batch["sound"][at, clip, : len(sound)] = sound
        batch["clips"][at] = len(sounds)
        batch["examples"][at] = np.bincount([task for task in row["task"] if task >= 0], minlength=len(TASKS))
    return batch


def _share(config: DataConfig, process_count: int) -> int:
    """Rows of this process."""
    if config.batch_size % process_count:
        raise PipelineError(f"batch: expected a multiple of the {process_count} processes, found {config.batch_size}")
    return config.batch_size // process_count


def _checked(config: DataConfig, model: ModelConfig, tokenizer: Tokenizer) -> _Builder:
    size = tokenizer.get_vocab_size()
    if size > model.vocab.text:
        raise PipelineError(f"tokenizer: expected at most the model's {model.vocab.text} tokens, found {size}")
    return _Builder(config, model, tokenizer)


def _opened(sources: Sequence[SourceConfig]) -> list[Records]:
    try:
        return [Records(source.path) for source in sources]
    except RecordError as error:
        raise PipelineError(str(error)) from None


def _too_many(unreadable: Sequence[str], most: int) -> PipelineError:
    return PipelineError(
        f"expected at most {most} records that cannot be read (max_corrupt), found {len(unreadable)}, among them:\n"
        + "\n".join(unreadable[-3:])
    )
