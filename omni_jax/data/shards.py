"""TODO: omni_jax/data/shards.py"""

from __future__ import annotations

import hashlib
import itertools
import json
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from array_record.python.array_record_module import ArrayRecordWriter

from omni_jax.config.model import PRESETS, CodecConfig
from omni_jax.data.records import SUFFIX, WRITER_OPTIONS, RecordCounts, serves, to_bytes, write_json
from omni_jax.data.sources import PendingExchange, RejectedRow, Source, SourceShard
from omni_jax.errors import RecordError

MANIFEST_SUFFIX = ".note.json"


WINDOW = 64
"""Rows in memory at a time; their answers are sorted by length, so that a batch holds some of like length."""


BATCH = 8
"""Answers encoded at once."""


FRAME_STEP = 32
"""Answers are padded to multiples of this many frames before encoding, so that few programs are compiled."""


EXAMPLES = 5
"""Rejected rows of each reason that a note tells of."""


Job = tuple[int, SourceShard, str]
"""A unit to be read: its number, itself, and the mark that its note will have."""


Encoder = Callable[..., Any]
"""Audio f32 [B, samples] and `lengths` int32 [B] -> codes int32 [B, F, 7]; see `omni_jax.codec.snac.make_encoder`."""


@dataclass(frozen=True)
class CodecSpec:
    """What answers are encoded by, in whichever process that happens."""

    model: str
    """Whose codec it is: what `Omni.load` takes."""

    # JAX is imported where sound is encoded: a worker that only reads codes starts in half the time.

    @cached_property
    def config(self) -> CodecConfig:
        """Its shape."""
        from omni_jax.checkpoint.release import find_release

        release = find_release(self.model)
        return (PRESETS[self.model] if release is None else release.config).codec

    def encoder(self) -> Encoder:
        """Load it."""
        from flax import nnx

        from omni_jax.checkpoint.release import find_release
        from omni_jax.codec.snac import Snac, make_encoder

        release = find_release(self.model)
        return make_encoder(Snac(self.config, rngs=nnx.Rngs(0)) if release is None else release.load_codec())


@dataclass
class ShardManifest(RecordCounts):
    """What became of a unit's rows."""

    mark: str = ""
    """Of the unit, and of how it was read."""
    source: str = ""
    """Its name."""
    rejected: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[str]] = field(default_factory=dict)
    """Of rejected rows: where they stand, and what is wrong."""
    content: str = ""
    """Hash of the records."""

    @classmethod
    def read(cls, path: Path) -> ShardManifest | None:
        """A note that was written before; None if there is none that can be read."""
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            counters = {name: Counter(values[name]) for name in ("sources", "tasks", "rejected")}
            return cls(**{**values, **counters})
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def reject(self, place: str, problem: RejectedRow) -> None:
        """Count a row that is left out."""
        self.rejected[problem.reason] += 1
        examples = self.examples.setdefault(problem.reason, [])
        if len(examples) < EXAMPLES:
            examples.append(f"{place}: {problem}")


@dataclass(frozen=True)
class ShardWriter:
    """Writes the shards and the notes of a corpus's units, in whichever process that happens."""

    source: Source
    folder: Path
    """Of the records."""
    codec: CodecSpec | None
    """See `prepare`."""

    @cached_property
    def encode(self) -> Encoder | None:
        """The codec's encoder, loaded once in a process."""
        return self.codec.encoder() if self.codec is not None else None

    def __call__(self, number: int, unit: SourceShard, mark: str) -> ShardManifest:
        """Write a unit's shard and, when that is whole, its note, which has this mark."""
        note, content = ShardManifest(mark=mark, source=self.source.name), hashlib.sha256()
        shard = shard_path(self.folder, number)
        # A cluster may begin the same unit twice; the last one whole counts.
        partial = shard.with_name(f".{shard.name}.{uuid.uuid4().hex}.part")
        writer = ArrayRecordWriter(str(partial), WRITER_OPTIONS)
        try:
            rows = self.source.rows(unit)
            while window := list(itertools.islice(rows, WINDOW)):
                for draft, place in _encoded(window, note, self.codec, self.encode):
                    try:
                        data = to_bytes(draft.exchange)
                    except RecordError as error:
                        note.reject(place, RejectedRow("not a record", str(error)))
                        continue
                    tasks = serves(draft.exchange)
                    if not tasks:
                        note.reject(place, RejectedRow("serves no task"))
                        continue
                    writer.write(data)
                    content.update(data)
                    note.add(draft.exchange, tasks)
        finally:
            writer.close()
        if note.exchanges:
            partial.replace(shard)
        else:
            # An empty file of records can't be read again.
            partial.unlink()
            shard.unlink(missing_ok=True)
        note.content = content.hexdigest()
        write_json(manifest_path(self.folder, number), vars(note))
        return note


def _encoded(
    window: list[Any], note: ShardManifest, codec: CodecSpec | None, encode: Encoder | None
) -> Iterator[tuple[PendingExchange, str]]:
    drafts: list[tuple[PendingExchange, str]] = []
    for place, make in window:
        try:
            draft = make()
            if draft.answer_audio is not None and codec is None:
                raise RejectedRow("answer is sound, and no codec was given")
            drafts.append((draft, place))
        except RejectedRow as problem:
            note.reject(place, problem)
    answers: list[np.ndarray | None] = [draft.answer_audio for draft, _ in drafts]
    if codec is None or encode is None or all(answer is None for answer in answers):
        yield from drafts
        return
    for (draft, place), codes in zip(drafts, encode_answers(answers, encode, codec.config), strict=True):
        if codes is not None:
            draft = PendingExchange(replace(draft.exchange, answer_codes=codes))
        yield draft, place


def encode_answers(
    answers: Sequence[np.ndarray | None], encode: Encoder, codec: CodecConfig
) -> list[np.ndarray | None]:
    """Codes int [F, 7] of each answer f32 [samples], in batches of one size and few lengths."""
    spoken: list[np.ndarray | None] = [None] * len(answers)
    order = sorted((len(answer), index) for index, answer in enumerate(answers) if answer is not None)
    step = FRAME_STEP * codec.frame_size
    for start in range(0, len(order), BATCH):
        rows = order[start : start + BATCH]
        audio = np.zeros((BATCH, -(-rows[-1][0] // step) * step), np.float32)
        # Rows that are left over hold a frame of silence: a batch has one size, and one program.
        lengths = np.full(BATCH, codec.frame_size, np.int32)
        for row, (length, index) in enumerate(rows):
            audio[row, :length] = answers[index]
            lengths[row] = length
        codes = np.asarray(encode(audio, lengths=lengths))
        for row, (length, index) in enumerate(rows):
            spoken[index] = codes[row, : -(-length // codec.frame_size)]
    return spoken


def shard_path(folder: Path, number: int) -> Path:
    return folder / f"{number:05d}{SUFFIX}"


def manifest_path(folder: Path, number: int) -> Path:
    return folder / f"{number:05d}{MANIFEST_SUFFIX}"
