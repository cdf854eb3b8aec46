"""Writes one shard of a source as a shard of records, and the manifest that says what became of its rows.

A shard of records has its manifest only when it is complete. The manifest's fingerprint says which files, read in
which way, it was made of: `omni_jax.data.prepare` skips the shards whose fingerprint has not changed.
"""

from __future__ import annotations

import hashlib
import itertools
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
from omni_jax.data.records import RECORD_SUFFIX, WRITER_OPTIONS, RecordCounts, serves, to_bytes, write_json, writing
from omni_jax.data.sources import PendingExchange, RejectedRow, Row, Source, SourceShard
from omni_jax.errors import RecordError
from omni_jax.input_files import read_json

MANIFEST_SUFFIX = ".manifest.json"
WINDOW_ROWS = 64
"""Rows in memory at a time. Their answers are sorted by length, so that those of a batch have similar lengths."""
BATCH_SIZE = 8
"""Answers encoded at once."""
FRAME_STEP = 16
"""Answers are padded to a multiple of this many frames before encoding, so that few shapes are compiled."""
MAX_EXAMPLES = 5
"""Rejected rows of each reason that a manifest and the index list."""

Job = tuple[int, SourceShard, str]
"""A shard to write: its number, the shard of the source, and the fingerprint that its manifest will have."""

Encoder = Callable[..., Any]
"""Audio f32 [B, samples] and `lengths` int32 [B] -> codes int32 [B, F, 7]; see `omni_jax.codec.snac.make_encoder`."""


@dataclass(frozen=True)
class CodecSpec:
    """Names the codec that encodes answers; each process loads its own."""

    model: str
    """Model whose codec it is, as `Omni.from_pretrained` takes it."""

    # `find_release` and the codec import JAX. Workers that read codes, and encode nothing, start in half the time
    # without it.

    @cached_property
    def config(self) -> CodecConfig:
        """The codec's shape.

        Raises:
            CheckpointError: there is no such model.
        """
        from omni_jax.checkpoint.release import find_release

        release = find_release(self.model)
        return (PRESETS[self.model] if release is None else release.config).codec

    def load_encoder(self) -> Encoder:
        """Load the codec.

        Raises:
            CheckpointError: there is no such model, or its files cannot be used.
        """
        from flax import nnx

        from omni_jax.checkpoint.release import find_release
        from omni_jax.codec.snac import Snac, make_encoder

        release = find_release(self.model)
        return make_encoder(Snac(self.config, rngs=nnx.Rngs(0)) if release is None else release.load_codec())


@dataclass
class ShardManifest(RecordCounts):
    """What became of the rows of a shard."""

    fingerprint: str = ""
    """Hash of the files of the source's shard, and of how they were read."""
    source: str = ""
    """Name of the source."""
    rejected: Counter[str] = field(default_factory=Counter)
    """Rejected rows by reason."""
    examples: dict[str, list[str]] = field(default_factory=dict)
    """Locations and messages of up to `MAX_EXAMPLES` rejected rows of each reason."""
    content: str = ""
    """Hash of the records."""

    @classmethod
    def read(cls, path: Path) -> ShardManifest | None:
        """Read a manifest; None if there is none, or it is damaged."""
        try:
            values = read_json(path, RecordError)
            counters = {name: Counter(values[name]) for name in ("sources", "tasks", "rejected")}
            return cls(**{**values, **counters})
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def reject(self, location: str, row: RejectedRow) -> None:
        """Count a row that is left out."""
        self.rejected[row.reason] += 1
        examples = self.examples.setdefault(row.reason, [])
        if len(examples) < MAX_EXAMPLES:
            examples.append(f"{location}: {row}")


@dataclass(frozen=True)
class ShardWriter:
    """Writes the shards of a source, in any process."""

    source: Source
    folder: Path
    """Folder of the records."""
    codec: CodecSpec | None
    """Encodes answer audio; None: rows that have some are rejected."""

    @cached_property
    def encode(self) -> Encoder | None:
        """The codec's encoder, loaded once per process."""
        return self.codec.load_encoder() if self.codec is not None else None

    def write(self, number: int, shard: SourceShard, fingerprint: str) -> ShardManifest:
        """Write a shard of records and then its manifest, which has this fingerprint.

        Raises:
            ConfigError: the files of the source's shard cannot be read.
            RecordError: there is no space left, or the like.
        """
        path = shard_path(self.folder, number)
        # A cluster may write the same shard twice at once; the last one that is complete stays.
        partial = path.with_name(f".{path.name}.{uuid.uuid4().hex}.part")
        try:
            with writing(self.folder):
                return self._write(number, shard, fingerprint, path, partial)
        finally:
            partial.unlink(missing_ok=True)

    def _write(self, number: int, shard: SourceShard, fingerprint: str, path: Path, partial: Path) -> ShardManifest:
        manifest, content = ShardManifest(fingerprint=fingerprint, source=self.source.name), hashlib.sha256()
        writer = ArrayRecordWriter(str(partial), WRITER_OPTIONS)
        try:
            rows = self.source.rows(shard)
            while window := list(itertools.islice(rows, WINDOW_ROWS)):
                for location, pending in self._load_window(window, manifest):
                    exchange = pending.exchange
                    try:
                        data = to_bytes(exchange)
                    except RecordError as error:
                        manifest.reject(location, RejectedRow("invalid record", str(error)))
                        continue
                    tasks = serves(exchange)
                    if not tasks:
                        manifest.reject(location, RejectedRow("serves no task"))
                        continue
                    writer.write(data)
                    content.update(data)
                    manifest.add(exchange, tasks)
        finally:
            writer.close()
        if manifest.exchanges:
            partial.replace(path)
        else:
            # ArrayRecord cannot read a file without records.
            path.unlink(missing_ok=True)
        manifest.content = content.hexdigest()
        write_json(manifest_path(self.folder, number), vars(manifest))
        return manifest

    def _load_window(self, window: list[Row], manifest: ShardManifest) -> Iterator[tuple[str, PendingExchange]]:
        """Location and exchange, with encoded answer, of each row that can be used; counts the others."""
        loaded: list[tuple[str, PendingExchange]] = []
        for location, load in window:
            try:
                pending = load()
                if pending.answer_audio is not None and self.codec is None:
                    raise RejectedRow("answer audio without a codec")
                loaded.append((location, pending))
            except RejectedRow as row:
                manifest.reject(location, row)
        answers = [pending.answer_audio for _, pending in loaded]
        if self.codec is None or all(answer is None for answer in answers):
            yield from loaded
            return
        assert self.encode is not None
        for (location, pending), codes in zip(
            loaded, encode_answers(answers, self.encode, self.codec.config), strict=True
        ):
            if codes is not None:
                pending = PendingExchange(replace(pending.exchange, answer_codes=codes))
            yield location, pending


def encode_answers(
    answers: Sequence[np.ndarray | None], encode: Encoder, codec: CodecConfig
) -> list[np.ndarray | None]:
    """Encode answers in batches of one size and few lengths.

    Args:
        answers: f32 [samples] each, at the codec's sample rate; None stays None.
        encode: the codec's encoder.
        codec: its shape.

    Returns:
        Codes int32 [F, 7] of each answer, the same as if it were encoded alone.
    """
    encoded: list[np.ndarray | None] = [None] * len(answers)
    order = sorted((len(answer), index) for index, answer in enumerate(answers) if answer is not None)
    step = FRAME_STEP * codec.frame_size
    for start in range(0, len(order), BATCH_SIZE):
        rows = order[start : start + BATCH_SIZE]
        longest, _ = rows[-1]
        audio = np.zeros((BATCH_SIZE, -(-longest // step) * step), np.float32)
        # Unused rows contain one frame of silence: the batch size stays the same, and so does the program.
        lengths = np.full(BATCH_SIZE, codec.frame_size, np.int32)
        for row, (length, index) in enumerate(rows):
            audio[row, :length] = answers[index]
            lengths[row] = length
        codes = np.asarray(encode(audio, lengths=lengths))
        for row, (length, index) in enumerate(rows):
            encoded[index] = codes[row, : -(-length // codec.frame_size)]
    return encoded


def shard_path(folder: Path, number: int) -> Path:
    """File of the records of a shard."""
    return folder / f"{number:05d}{RECORD_SUFFIX}"


def manifest_path(folder: Path, number: int) -> Path:
    """File of the manifest of a shard."""
    return folder / f"{number:05d}{MANIFEST_SUFFIX}"
