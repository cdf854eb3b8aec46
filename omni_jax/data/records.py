"""Spoken exchanges on disk: the format of a record, and folders of ArrayRecord files that hold many of them.

A record is a header (magic, version, length and CRC-32 of the body) and a body, a msgpack map of the fields. The
question is 16-bit audio at 16 kHz in FLAC, which is lossless; the answer is its codec codes, 14 bytes per frame.

A conversation is written as one or several records, each an exchange with the text of what precedes it; see
`Conversation.to_exchanges`. A record of an exchange alone has no such fields.

A folder has the shards `00000.array_record`, `00001.array_record`, ... and `index.json`, which is written last: it
says what the folder contains and that it is complete. Every file is written under a temporary name and renamed when
it is whole.
"""

from __future__ import annotations

import errno
import io
import json
import re
import struct
import uuid
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import TracebackType
from typing import Any

import msgpack
import numpy as np
import soundfile
from array_record.python.array_record_data_source import ArrayRecordDataSource
from array_record.python.array_record_module import ArrayRecordWriter

from omni_jax.audio import io as audio_io
from omni_jax.errors import RecordError
from omni_jax.input_files import read_json
from omni_jax.tasks import Task
from omni_jax.vocab import NUM_CODEBOOKS

VERSION = 1
"""Format version of records and of the index. A reader accepts no other."""
INDEX = "index.json"
RECORD_SUFFIX = ".array_record"
WRITER_OPTIONS = "group_size:1,uncompressed"
"""Of ArrayRecord: one record per chunk, so that any one is read without its neighbors. FLAC and codes do not compress
further."""

MAX_QUESTION_SAMPLES = 3600 * audio_io.SAMPLE_RATE
"""Longest question: an hour. A header of FLAC may claim years, and memory for them would be allocated."""

_MAGIC = b"OMNI"
_HEADER = struct.Struct("<4sBII")
_TEXT_FIELDS = ("question_text", "answer_text", "source", "voice")
_BINARY_FIELDS = ("question_audio", "answer_codes")


@dataclass(frozen=True)
class PastTurn:
    """A turn before an exchange, as text. Either text may be empty."""

    question: str = ""
    answer: str = ""
    trained: bool = False
    """Whether the text of its answer counts in the loss of the exchange's examples."""


@dataclass(frozen=True, eq=False)
class Exchange:
    """A question and its answer, each as text, as speech, or as both. A missing text is empty, missing speech None."""

    question_text: str = ""
    question_audio: np.ndarray | None = None
    """int16 [samples] at 16 kHz."""
    answer_text: str = ""
    answer_codes: np.ndarray | None = None
    """int [F, 7], codes of each frame in the order of the frame's slots, not delayed."""
    source: str = ""
    """Name of the corpus."""
    voice: str = ""
    """Name of the speaker of the answer."""
    system: str = ""
    """The system text of its conversation."""
    history: tuple[PastTurn, ...] = ()
    """The turns before it, the oldest first. A1T1 and T1A1 take neither this nor the system text."""

    @property
    def in_conversation(self) -> bool:
        """Whether anything precedes it."""
        return bool(self.system or self.history)


@dataclass(frozen=True, eq=False)
class Conversation:
    """Exchanges that follow one another, each with what it has: text, speech, or both."""

    exchanges: tuple[Exchange, ...]
    system: str = ""
    trained: tuple[bool, ...] | None = None
    """Which answers count in the loss, one for each exchange; None: all."""

    def to_exchanges(self, *, every_turn: bool = False) -> list[Exchange]:
        """The conversation as records: exchanges with the text of what precedes them.

        Every answer that is trained counts once. An exchange with speech becomes a record, and so does the last trained
        one; the text of other answers counts in the next record.

        Args:
            every_turn: whether every trained exchange becomes a record, as those that will be spoken must.

        Raises:
            RecordError: `trained` has another length, or an exchange has a history of its own.
        """
        trained = (True,) * len(self.exchanges) if self.trained is None else self.trained
        if len(trained) != len(self.exchanges):
            raise RecordError(f"trained: expected {len(self.exchanges)} entries, found {len(trained)}")
        records: list[Exchange] = []
        past: list[PastTurn] = []
        last = max((index for index, counts in enumerate(trained) if counts), default=-1)
        for index, (exchange, counts) in enumerate(zip(self.exchanges, trained, strict=True)):
            if exchange.in_conversation:
                raise RecordError(f"exchange {index}: expected no history of its own, found one")
            speech = exchange.question_audio is not None or exchange.answer_codes is not None
            own = counts and (speech or every_turn or index == last)
            if own:
                records.append(replace(exchange, system=self.system, history=tuple(past)))
                past = [replace(turn, trained=False) for turn in past]
            past.append(PastTurn(exchange.question_text, exchange.answer_text, counts and not own))
        return records


def serves(exchange: Exchange) -> set[Task]:
    """The tasks that an exchange has everything for."""
    question_audio = exchange.question_audio is not None
    question_text = bool(exchange.question_text.strip())
    answer_audio = exchange.answer_codes is not None
    answer_text = bool(exchange.answer_text.strip())
    available = {
        Task.A1A2: question_audio and answer_text and answer_audio,
        Task.A1T2: question_audio and answer_text,
        Task.A1T1: question_audio and question_text,
        Task.T1A2: question_text and answer_text and answer_audio,
        Task.T1T2: question_text and answer_text,
        Task.T1A1: answer_text and answer_audio,
    }
    return {task for task, complete in available.items() if complete}


def to_bytes(exchange: Exchange) -> bytes:
    """Encode an exchange as a record.

    Raises:
        RecordError: a field has another type, shape or range than `Exchange` says.
    """
    fields: dict[str, Any] = {}
    for name in _TEXT_FIELDS:
        text = getattr(exchange, name)
        if not isinstance(text, str):
            raise RecordError(f"{name}: expected text, found {type(text).__name__}")
        fields[name] = text
    fields["question_audio"] = None if exchange.question_audio is None else _to_flac(exchange.question_audio)
    fields["answer_codes"] = None if exchange.answer_codes is None else _pack_codes(exchange.answer_codes)
    if exchange.in_conversation:
        turns = [[turn.question, turn.answer, turn.trained] for turn in exchange.history]
        fields["conversation"] = {"system": exchange.system, "history": turns}
        _unpack_conversation(fields["conversation"])
    try:
        body = msgpack.packb(fields)
    except UnicodeEncodeError as error:
        raise RecordError(f"expected text that UTF-8 can hold, found {error}") from None
    return _HEADER.pack(_MAGIC, VERSION, len(body), zlib.crc32(body)) + body


def from_bytes(data: bytes, *, codebook_size: int = 4096, audio: bool = True) -> Exchange:
    """Decode a record.

    Args:
        data: from `to_bytes`.
        codebook_size: every code must be below it.
        audio: whether to decode the question's audio, which is most of the work. If not, `question_audio` is None.

    Raises:
        RecordError: the record is truncated, damaged or of another version; a field is missing, unknown or of a
            wrong type; codes have a wrong shape or range; or the audio cannot be decoded.
    """
    fields = _unpack_fields(data)
    conversation = _unpack_conversation(fields.pop("conversation", None))
    if set(fields) != {*_TEXT_FIELDS, *_BINARY_FIELDS}:
        raise RecordError(
            f"expected the fields {', '.join((*_TEXT_FIELDS, *_BINARY_FIELDS))}, found {', '.join(map(str, fields))}"
        )
    for names, types in ((_TEXT_FIELDS, str), (_BINARY_FIELDS, (bytes, type(None)))):
        for name in names:
            if not isinstance(fields[name], types):
                expected = "text" if types is str else "bytes or nothing"
                raise RecordError(f"{name}: expected {expected}, found {type(fields[name]).__name__}")
    flac, packed = fields["question_audio"], fields["answer_codes"]
    fields["question_audio"] = None if flac is None or not audio else _from_flac(flac)
    fields["answer_codes"] = None if packed is None else _unpack_codes(packed, codebook_size)
    return Exchange(**fields, **conversation)


@dataclass
class RecordCounts:
    """Totals over exchanges, as the index states them."""

    exchanges: int = 0
    samples: int = 0
    """Samples of question audio at 16 kHz."""
    frames: int = 0
    """Frames of answer codes."""
    sources: Counter[str] = field(default_factory=Counter)
    """Exchanges by `Exchange.source`."""
    tasks: Counter[str] = field(default_factory=Counter)
    """Exchanges that can serve each task; one exchange can serve several."""
    conversations: int = 0
    """Exchanges that a system text or other turns precede."""

    def add(self, exchange: Exchange, tasks: Iterable[Task]) -> None:
        """Count an exchange, and the tasks that it `serves`."""
        self.exchanges += 1
        self.samples += 0 if exchange.question_audio is None else len(exchange.question_audio)
        self.frames += 0 if exchange.answer_codes is None else len(exchange.answer_codes)
        self.sources[exchange.source] += 1
        self.tasks.update(task.value for task in tasks)
        self.conversations += exchange.in_conversation

    def merge(self, other: RecordCounts) -> None:
        """Add the totals of another."""
        self.exchanges += other.exchanges
        self.samples += other.samples
        self.frames += other.frames
        self.sources.update(other.sources)
        self.tasks.update(other.tasks)
        self.conversations += other.conversations

    def to_index(self, shards: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """The contents of `index.json`, as `Records` reads it.

        Args:
            shards: `{"file": NAME, "exchanges": COUNT}` of each shard, in order.
        """
        return {
            "version": VERSION,
            "exchanges": self.exchanges,
            "conversations": self.conversations,
            "question_hours": round(self.samples / audio_io.SAMPLE_RATE / 3600, 4),
            "answer_frames": self.frames,
            "sources": dict(sorted(self.sources.items())),
            "tasks": {task.value: self.tasks[task.value] for task in Task},
            "shards": list(shards),
        }


def write_json(path: Path, values: Any) -> None:
    """Write a JSON file atomically."""
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex}.part")
    partial.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
    partial.replace(path)


_CANNOT_WRITE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)


@contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Turn a failure of the disk into an error that says so. ArrayRecord raises RuntimeError, with a text.

    Raises:
        RecordError: the folder cannot be written to, for want of space or the like.
    """
    try:
        yield
    except (OSError, RuntimeError) as error:
        failed = re.search(r"\w+\(\) failed: ([^;]*)", str(error))
        reason = error.strerror if isinstance(error, OSError) else failed and failed[1]
        if not reason or (isinstance(error, OSError) and error.errno not in _CANNOT_WRITE):
            raise
        raise RecordError(
            f"{folder}: the records could not be written: {reason}; once they can, the same command continues"
        ) from error


class RecordWriter:
    """Writes a new folder of exchanges; a context manager.

    A shard is written under a temporary name and renamed when it is complete. `index.json` is written last, and only
    if the `with` block ends without an exception.
    """

    def __init__(self, folder: str | Path, *, shard_size: int = 2048):
        """Start a folder.

        Args:
            folder: created if it does not exist. Temporary files of a killed writer are removed from it.
            shard_size: exchanges per file, of about 100 kB each.

        Raises:
            RecordError: the folder contains records already, or cannot be written to.
        """
        self.folder = Path(folder)
        self.shard_size = shard_size
        self._shards: list[dict[str, Any]] = []
        self._counts = RecordCounts()
        self._current: tuple[Path, ArrayRecordWriter] | None = None
        self._shard_length = 0
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            for partial in self.folder.glob(".*.part"):
                partial.unlink()
        except OSError as error:
            raise RecordError(f"{self.folder}: expected a folder to write to, found {error.strerror}") from None
        if any(self.folder.glob(f"*{RECORD_SUFFIX}")) or (self.folder / INDEX).exists():
            raise RecordError(
                f"{self.folder}: expected a folder without records, found some: choose another or empty it"
            )

    def write(self, exchange: Exchange) -> None:
        """Append an exchange.

        Raises:
            RecordError: see `to_bytes`. Nothing is written then, and the folder can still be written to.
        """
        data = to_bytes(exchange)
        if self._current is None:
            partial = self.folder / f".{len(self._shards):05d}{RECORD_SUFFIX}.part"
            self._current = partial, ArrayRecordWriter(str(partial), WRITER_OPTIONS)
        self._current[1].write(data)
        self._shard_length += 1
        self._counts.add(exchange, serves(exchange))
        if self._shard_length == self.shard_size:
            self._finish_shard()

    def close(self) -> None:
        """Finish the last shard and write the index."""
        self._finish_shard()
        write_json(self.folder / INDEX, self._counts.to_index(self._shards))

    def __enter__(self) -> RecordWriter:
        return self

    def __exit__(
        self, error_type: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if error_type is None:
            self.close()
        elif self._current is not None:
            partial, writer = self._current
            self._current = None
            writer.close()
            partial.unlink(missing_ok=True)

    def _finish_shard(self) -> None:
        if self._current is None:
            return
        partial, writer = self._current
        writer.close()
        name = f"{len(self._shards):05d}{RECORD_SUFFIX}"
        partial.replace(self.folder / name)
        self._shards.append({"file": name, "exchanges": self._shard_length})
        self._current, self._shard_length = None, 0


class Records:
    """Random access to the records of a complete folder; can be pickled.

    Attributes:
        folder: path of the folder.
        index: contents of `index.json`.
    """

    def __init__(self, folder: str | Path):
        """Open a folder.

        Raises:
            RecordError: there is no such folder, it has no index because its writer has not finished, a shard is
                missing, its version is another, or it is empty.
        """
        self.folder = Path(folder)
        path = self.folder / INDEX
        if not self.folder.is_dir():
            raise RecordError(f"{self.folder}: expected a folder of records, found no such folder")
        if not path.exists():
            raise RecordError(f"{self.folder}: expected a folder of records, found no {INDEX}, which is written last")
        self.index: dict[str, Any] = read_json(path, RecordError, "the index of a folder of records")
        try:
            version = self.index["version"]
            shards = [(str(shard["file"]), int(shard["exchanges"])) for shard in self.index["shards"]]
            self._tasks = {task: int(self.index["tasks"][task.value]) for task in Task}
        except (ValueError, KeyError, TypeError) as error:
            raise RecordError(f"{path}: expected the index of a folder of records, found {error!r}") from None
        if version != VERSION:
            raise RecordError(f"{path}: version: expected {VERSION}, found {version!r}")
        missing = [name for name, _ in shards if not (self.folder / name).is_file()]
        if missing:
            raise RecordError(f"{self.folder}: expected {len(shards)} shards, found {', '.join(missing)} missing")
        for name, count in shards:
            # A record has a header at least.
            if Path(name).name != name or not 0 <= count <= (self.folder / name).stat().st_size // _HEADER.size:
                raise RecordError(
                    f"{path}: expected a file of the folder and the number of its records, found {name!r} and {count}"
                )
        if not shards:
            raise RecordError(f"{self.folder}: expected at least one exchange, found none")
        self._shards = shards
        # Without the range, the data source opens every shard to count its records.
        self._data = ArrayRecordDataSource([f"{self.folder / name}[0:{count}]" for name, count in shards])

    def __len__(self) -> int:
        return len(self._data)

    def __getitem__(self, index: int) -> bytes:
        """The bytes of a record.

        Raises:
            RecordError: the file is damaged there.
        """
        try:
            return self._data[index]
        except RuntimeError as error:
            raise RecordError(str(error)) from None

    def location(self, index: int) -> str:
        """File and number of a record, for messages."""
        for file, count in self._shards:
            if index < count:
                return f"{self.folder / file}, record {index}"
            index -= count
        raise IndexError(index)

    def count(self, task: Task) -> int:
        """The number of exchanges that can serve a task, according to the index."""
        return self._tasks[task]


def has_conversations(folder: str | Path) -> bool:
    """Whether exchanges of a folder have a history or a system text, according to its index; False without one."""
    try:
        index = json.loads((Path(folder) / INDEX).read_text(encoding="utf-8"))
        # Folders of version 0.2 and before do not count them.
        return bool(index.get("conversations"))
    except (OSError, ValueError, AttributeError):
        return False


def _unpack_conversation(fields: Any) -> dict[str, Any]:
    """The fields of an `Exchange` that say what precedes it."""
    if fields is None:
        return {}
    try:
        system, turns = fields["system"], [PastTurn(*turn) for turn in fields["history"]]
    except (KeyError, TypeError):
        raise RecordError(f"conversation: expected a system text and a history, found {fields!r}") from None
    texts = [system, *(text for turn in turns for text in (turn.question, turn.answer))]
    if not all(isinstance(text, str) for text in texts) or not all(isinstance(turn.trained, bool) for turn in turns):
        raise RecordError(f"conversation: expected texts, and whether answers are trained, found {fields!r}")
    return {"system": system, "history": tuple(turns)}


def _unpack_fields(data: bytes) -> dict[str, Any]:
    """The fields of a record, after checking its header."""
    if len(data) < _HEADER.size:
        raise RecordError(f"truncated: expected at least {_HEADER.size} bytes, found {len(data)}")
    magic, version, length, crc = _HEADER.unpack_from(data)
    if magic != _MAGIC:
        raise RecordError(f"expected a record that begins with {_MAGIC!r}, found {magic!r}")
    if version != VERSION:
        raise RecordError(f"version: expected {VERSION}, found {version}")
    body = data[_HEADER.size :]
    if len(body) != length:
        what = "truncated" if len(body) < length else "too long"
        raise RecordError(f"{what}: expected {length} bytes after the header, found {len(body)}")
    if zlib.crc32(body) != crc:
        raise RecordError(f"damaged: expected CRC-32 {crc:08x}, found {zlib.crc32(body):08x}")
    try:
        fields = msgpack.unpackb(body)
    except (ValueError, msgpack.UnpackException) as error:
        raise RecordError(f"expected a msgpack map of fields, found {error!r}") from None
    if not isinstance(fields, dict):
        raise RecordError(f"expected a map of fields, found {type(fields).__name__}")
    return fields


def _to_flac(audio: np.ndarray) -> bytes:
    audio = np.asarray(audio)
    if audio.dtype != np.int16 or audio.ndim != 1 or not len(audio):
        raise RecordError(
            f"question_audio: expected int16 [samples], at least one, found {audio.dtype} {list(audio.shape)}"
        )
    file = io.BytesIO()
    soundfile.write(file, audio, audio_io.SAMPLE_RATE, format="FLAC", subtype="PCM_16")
    return file.getvalue()


def _from_flac(flac: bytes) -> np.ndarray:
    try:
        with soundfile.SoundFile(io.BytesIO(flac)) as file:
            encoding = (file.format, file.subtype, file.channels, file.samplerate)
            declared = file.frames
            if encoding[2:] != (1, audio_io.SAMPLE_RATE) or declared > MAX_QUESTION_SAMPLES:
                # Not what `to_bytes` writes: memory for it is not allocated.
                audio = np.zeros(0, np.int16)
            else:
                audio = file.read(dtype="int16")
    except soundfile.LibsndfileError as error:
        raise RecordError(
            f"question_audio: expected FLAC, found {len(flac)} bytes that cannot be decoded: {error.error_string}"
        ) from None
    if encoding != ("FLAC", "PCM_16", 1, audio_io.SAMPLE_RATE):
        raise RecordError(
            f"question_audio: expected FLAC of 16 bits, one channel, {audio_io.SAMPLE_RATE} Hz, found {encoding}"
        )
    if declared > MAX_QUESTION_SAMPLES:
        raise RecordError(f"question_audio: expected at most {MAX_QUESTION_SAMPLES} samples, found {declared}")
    if len(audio) != declared or not declared:
        raise RecordError(f"question_audio: expected {declared} samples, at least one, found {len(audio)}")
    return audio


def _pack_codes(codes: np.ndarray) -> bytes:
    codes = np.asarray(codes)
    if (
        not np.issubdtype(codes.dtype, np.integer)
        or codes.ndim != 2
        or codes.shape[1] != NUM_CODEBOOKS
        or not len(codes)
    ):
        raise RecordError(
            f"answer_codes: expected integers [F, {NUM_CODEBOOKS}], at least one frame, "
            f"found {codes.dtype} {list(codes.shape)}"
        )
    if codes.min() < 0 or codes.max() > 65535:
        raise RecordError(f"answer_codes: expected codes of 0 to 65535, found {codes.min()} to {codes.max()}")
    return codes.astype("<u2").tobytes()


def _unpack_codes(packed: bytes, codebook_size: int) -> np.ndarray:
    if not packed or len(packed) % (2 * NUM_CODEBOOKS):
        raise RecordError(
            f"answer_codes: expected frames of {NUM_CODEBOOKS} codes, {2 * NUM_CODEBOOKS} bytes each, "
            f"found {len(packed)} bytes"
        )
    codes = np.frombuffer(packed, "<u2").reshape(-1, NUM_CODEBOOKS).astype(np.int32)
    if codes.max() >= codebook_size:
        raise RecordError(f"answer_codes: expected codes below {codebook_size}, found {codes.max()}")
    return codes
