"""Features of a frozen audio encoder on disk: computed once, read in every epoch.

A folder of features belongs to a folder of records. Its entries are, for each record in order, the features of each
version of its question: version 0 is the recording as it is, the others are augmented. An entry is a msgpack map of the
recording's length and of the features; None where the record has no recording. Shards and index are written as those
of records are.
"""

from __future__ import annotations

import itertools
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeVar

import msgpack
import numpy as np
from array_record.python.array_record_data_source import ArrayRecordDataSource
from array_record.python.array_record_module import ArrayRecordWriter

from omni_jax.audio.augment import Augmentation, augment
from omni_jax.audio.io import SAMPLE_RATE, from_pcm16, to_pcm16
from omni_jax.data.records import INDEX, RECORD_SUFFIX, WRITER_OPTIONS, Records, from_bytes, write_json
from omni_jax.errors import PipelineError, RecordError
from omni_jax.input_files import read_json

SHARD_RECORDS = 512
"""Records of a shard, and what is computed again if a run is interrupted."""
BATCH_SIZE = 16
"""Recordings encoded at once."""

T = TypeVar("T")
FeatureDtype = Literal["float32", "float16", "int8"]

Encode = Callable[[np.ndarray], np.ndarray]
"""Audio f32 [B, samples], padded to a window of the audio encoder, to features f32 [B, samples / 320, D]."""


@dataclass(frozen=True)
class StoredFeatures:
    """The features of a recording; none that the adapter needs is missing."""

    samples: int
    """Length of the recording at 16 kHz."""
    features: np.ndarray
    """[frames, D]; float16, or float32 where they are stored so."""


def pack_features(samples: int, features: np.ndarray, dtype: FeatureDtype) -> bytes:
    """Encode an entry.

    Args:
        samples: length of the recording at 16 kHz.
        features: f32 [frames, D].
        dtype: int8 has a scale for each frame: half a step, 1/254 of the largest feature of the frame, is the error.
    """
    scale = None
    if dtype == "int8":
        scale = np.maximum(np.abs(features).max(axis=1, keepdims=True), 1e-12) / 127
        features = np.rint(features / scale)
        scale = scale.astype("<f4").tobytes()
    values = features.astype(np.dtype(dtype).newbyteorder("<"))
    entry = {"samples": samples, "shape": values.shape, "dtype": dtype, "values": values.tobytes(), "scale": scale}
    return bytes(msgpack.packb(entry))


def unpack_features(data: bytes) -> StoredFeatures | None:
    """Decode an entry; None if the record has no recording.

    Raises:
        RecordError: it is damaged.
    """
    try:
        entry = msgpack.unpackb(data)
        if entry is None:
            return None
        values = np.frombuffer(entry["values"], np.dtype(entry["dtype"]).newbyteorder("<")).reshape(entry["shape"])
        if entry["scale"] is not None:
            scale = np.frombuffer(entry["scale"], "<f4")[:, None]
            values = (values * scale).astype(np.float16)
        return StoredFeatures(int(entry["samples"]), values)
    except (ValueError, TypeError, KeyError, msgpack.UnpackException) as error:
        raise RecordError(f"features: expected an entry, found {error!r}") from None


class CachedFeatures:
    """Random access to a complete folder of features; can be pickled."""

    def __init__(self, folder: Path):
        """Open a folder.

        Raises:
            PipelineError: it is not complete.
        """
        index = read_json(folder / INDEX, PipelineError, "cached features")
        self.folder = folder
        self.versions: int = index["versions"]
        shards = [f"{folder / shard['file']}[0:{shard['entries']}]" for shard in index["shards"]]
        self._data = ArrayRecordDataSource(shards)

    def read(self, record: int, version: int) -> StoredFeatures | None:
        """The features of a version of a record; None if the record has no recording.

        Raises:
            RecordError: the file is damaged there.
        """
        try:
            data = self._data[record * self.versions + version]
        except RuntimeError as error:
            raise RecordError(str(error)) from None
        return unpack_features(data)


def num_shards(records: Records) -> int:
    """Shards of the features of a folder of records."""
    return -(-len(records) // SHARD_RECORDS)


def write_features(
    records: Records,
    folder: Path,
    shards: Iterable[int],
    encode: Encode,
    *,
    max_samples: int,
    window: Callable[[int], int],
    num_frames: Callable[[int], int],
    versions: int,
    dtype: FeatureDtype,
    progress: Callable[[], object] = lambda: None,
) -> None:
    """Write the shards that are not there yet.

    Args:
        records: whose recordings are encoded. One that cannot be read or is too long has no features.
        folder: created if it does not exist.
        shards: their numbers.
        encode: the audio encoder.
        max_samples: that it takes.
        window: the samples that a recording of so many is padded to at least.
        num_frames: the frames that are needed of a recording of so many samples.
        versions: of each recording.
        dtype: see `pack_features`.
        progress: called after each shard.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for shard in shards:
        path = folder / f"{shard:05d}{RECORD_SUFFIX}"
        if not path.exists():
            # Another run that shares the features may write the same shard.
            partial = folder / f".{path.name}.{uuid.uuid4().hex}.part"
            writer = ArrayRecordWriter(str(partial), WRITER_OPTIONS)
            first = shard * SHARD_RECORDS
            numbers = range(first, min(first + SHARD_RECORDS, len(records)))
            sounds = [
                sound
                for number in numbers
                for sound in recordings(records, number, versions, max_seconds=max_samples / SAMPLE_RATE)
            ]
            entries = [msgpack.packb(None)] * len(sounds)
            for place, length, features in _encoded(sounds, encode, max_samples, window):
                entries[place] = pack_features(length, features[: num_frames(length)], dtype)
            for entry in entries:
                writer.write(entry)
            writer.close()
            try:
                partial.replace(path)
            except FileNotFoundError:
                # The other run has finished the folder, and removed what was not.
                if not path.exists():
                    raise
        progress()


def finish_features(records: Records, folder: Path, versions: int) -> None:
    """Write the index, once all shards are there."""
    counts = [min(SHARD_RECORDS, len(records) - first) for first in range(0, len(records), SHARD_RECORDS)]
    shards = [
        {"file": f"{shard:05d}{RECORD_SUFFIX}", "entries": count * versions} for shard, count in enumerate(counts)
    ]
    write_json(folder / INDEX, {"versions": versions, "shards": shards})
    for partial in folder.glob(f".*{RECORD_SUFFIX}.*.part"):
        partial.unlink(missing_ok=True)


def recordings(records: Records, number: int, versions: int, *, max_seconds: float) -> list[np.ndarray | None]:
    """The versions of a record's question, int16 [samples] each; None where there is none that can be read.

    Augmentation adds silence up to `max_seconds`.
    """
    try:
        clean = from_bytes(records[number]).question_audio
    except RecordError:
        clean = None
    if clean is None:
        return [None] * versions
    if not clean.any():
        return [clean] * versions
    seeds = [[number, version] for version in range(1, versions)]
    settings = Augmentation(max_seconds=max_seconds)
    return [clean, *(to_pcm16(augment(from_pcm16(clean), SAMPLE_RATE, seed, settings)[0]) for seed in seeds)]


def _encoded(
    sounds: Sequence[np.ndarray | None], encode: Encode, max_samples: int, window: Callable[[int], int]
) -> Iterator[tuple[int, int, np.ndarray]]:
    """Index, length and features of each recording, similar lengths together; no frames of one that is too long."""
    recordings = [(index, sound) for index, sound in enumerate(sounds) if sound is not None]
    for some in batched(sorted(recordings, key=lambda item: len(item[1])), BATCH_SIZE):
        fitting = [sound for _, sound in some if len(sound) <= max_samples]
        features = np.zeros((len(some), 0, 0), np.float32)
        if fitting:
            batch = np.zeros((BATCH_SIZE, window(len(fitting[-1]))), np.float32)
            for row, sound in enumerate(fitting):
                batch[row, : len(sound)] = from_pcm16(sound)
            features = encode(batch)
        for row, (index, sound) in enumerate(some):
            yield index, len(sound), features[row, : None if row < len(fitting) else 0]


def batched(items: Iterable[T], size: int) -> Iterator[list[T]]:
    """Lists of `size`, the last one shorter."""
    iterator = iter(items)
    while some := list(itertools.islice(iterator, size)):
        yield some
