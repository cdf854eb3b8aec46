"""Turns a corpus into a folder of records, unit by unit: what is done stays done, whatever happens in between.

Each unit of the source becomes a shard and beside it a note of what became of its rows. A shard that has its note is
whole; run again, only units that have none, or whose files have changed, are read. The index comes last.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field, replace
from functools import cached_property
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
from array_record.python.array_record_module import ArrayRecordWriter

from omni_jax.config import PRESETS, CodecConfig, ConfigError
from omni_jax.data.records import INDEX, SUFFIX, WRITER_OPTIONS, RecordError, Tally, serves, to_bytes, write_json
from omni_jax.data.sources import Draft, Rejected, Source, Unit

NOTE = ".note.json"
WINDOW = 64
"""Rows in memory at a time; their answers are sorted by length, so that a batch holds some of like length."""
BATCH = 8
"""Answers encoded at once."""
FRAME_STEP = 32
"""Answers are padded to multiples of this many frames before encoding, so that few programs are compiled."""
EXAMPLES = 5
"""Rejected rows of each reason that a note tells of."""


Job = tuple[int, Unit, str]
"""A unit to be read: its number, itself, and the mark that its note will have."""

Encoder = Callable[..., Any]
"""Audio f32 [B, samples] and `lengths` int32 [B] -> codes int32 [B, F, 7]; see `omni_jax.codec.snac.make_encoder`."""


@dataclass(frozen=True)
class Codec:
    """What answers are encoded by, in whichever process that happens."""

    model: str
    """Whose codec it is: what `Omni.load` takes."""

    # JAX is imported where sound is encoded: a worker that only reads codes starts in half the time.

    @cached_property
    def config(self) -> CodecConfig:
        """Its shape."""
        from omni_jax.api import find_release

        release = find_release(self.model)
        return (PRESETS[self.model] if release is None else release.config).codec

    def encoder(self) -> Encoder:
        """Load it."""
        from flax import nnx

        from omni_jax.api import find_release
        from omni_jax.codec.snac import Snac, make_encoder

        release = find_release(self.model)
        return make_encoder(Snac(self.config, rngs=nnx.Rngs(0)) if release is None else release.load_codec())


@dataclass
class Note(Tally):
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
    def read(cls, path: Path) -> Note | None:
        """A note that was written before; None if there is none that can be read."""
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            counters = {name: Counter(values[name]) for name in ("sources", "tasks", "rejected")}
            return cls(**{**values, **counters})
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def reject(self, place: str, problem: Rejected) -> None:
        """Count a row that is left out."""
        self.rejected[problem.reason] += 1
        examples = self.examples.setdefault(problem.reason, [])
        if len(examples) < EXAMPLES:
            examples.append(f"{place}: {problem}")


@dataclass(frozen=True)
class UnitWriter:
    """Writes the shards and the notes of a corpus's units, in whichever process that happens."""

    source: Source
    folder: Path
    """Of the records."""
    codec: Codec | None
    """See `prepare`."""

    @cached_property
    def encode(self) -> Encoder | None:
        """The codec's encoder, loaded once in a process."""
        return self.codec.encoder() if self.codec is not None else None

    def __call__(self, number: int, unit: Unit, mark: str) -> Note:
        """Write a unit's shard and, when that is whole, its note, which has this mark."""
        note, content = Note(mark=mark, source=self.source.name), hashlib.sha256()
        shard = _shard(self.folder, number)
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
                        note.reject(place, Rejected("not a record", str(error)))
                        continue
                    tasks = serves(draft.exchange)
                    if not tasks:
                        note.reject(place, Rejected("serves no task"))
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
        write_json(_note(self.folder, number), vars(note))
        return note


def prepare(
    source: Source,
    out: str | Path,
    *,
    codec: Codec | None = None,
    workers: int = 1,
    beam: Sequence[str] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Read a corpus and write a folder of records.

    Args:
        source: the corpus.
        out: folder to write, or to go on with.
        codec: encodes answers that are sound; None: rows with such answers are left out.
        workers: processes; 1 works in this one.
        beam: options of an Apache Beam pipeline that does the work instead of `workers`.
        progress: told after each unit how many are done, of how many.

    Returns:
        The index, as it is written.

    Raises:
        ConfigError: the source can't be read, `out` holds something else, or Beam's workers wrote elsewhere.
    """
    folder = Path(out)
    units = source.units()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"{folder}: expected a folder to write to, found {error.strerror}") from None
    if (folder / INDEX).exists() and not any(folder.glob(f"*{NOTE}")):
        raise ConfigError(f"{folder}: expected an empty folder or one of `prepare`'s, found records of another making")
    for partial in folder.glob(".*.part"):
        partial.unlink()
    how = f"{source!r} {codec!r} {codec.config if codec else None!r}"
    jobs, notes = [], {}
    for number, unit in enumerate(units):
        mark = hashlib.sha256(f"{unit.mark()} {how}".encode()).hexdigest()[:16]
        note = Note.read(_note(folder, number))
        if note is not None and note.source not in ("", source.name):
            raise ConfigError(f"{folder}: expected an empty folder or one of {source.name}, found one of {note.source}")
        if note is not None and note.mark == mark and (not note.exchanges or _shard(folder, number).is_file()):
            notes[number] = note
        else:
            jobs.append((number, unit, mark))
    if jobs:
        # Until all is done anew, the folder is not whole.
        (folder / INDEX).unlink(missing_ok=True)
    for number in range(len(units), len(units) + sum(1 for _ in folder.glob(f"*{NOTE}"))):
        for stale in (_shard(folder, number), _note(folder, number)):
            stale.unlink(missing_ok=True)
    write = UnitWriter(source, folder, codec)
    for number, note in _run(write, jobs, workers) if beam is None else _beam(write, jobs, beam):
        notes[number] = note
        if progress is not None:
            progress(len(notes), len(units))
    index = _index(source, folder, [notes[number] for number in range(len(units))])
    write_json(folder / INDEX, index)
    return index


def _run(write: UnitWriter, jobs: list[Job], workers: int) -> Iterator[tuple[int, Note]]:
    if workers == 1 or len(jobs) < 2:
        for job in jobs:
            yield job[0], write(*job)
        return
    with ProcessPoolExecutor(workers, get_context("spawn"), _begin, (write,)) as pool:
        waiting = {pool.submit(_work, *job): job[0] for job in jobs}
        try:
            for done in as_completed(waiting):
                yield waiting[done], done.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _beam(write: UnitWriter, jobs: list[Job], options: Sequence[str]) -> Iterator[tuple[int, Note]]:
    try:
        from omni_jax.data import cluster
    except ImportError as error:
        raise ConfigError(f"--runner: expected Apache Beam, found {error}: pip install 'omni-jax[beam]'") from None
    cluster.run(write, jobs, options)
    for number, unit, mark in jobs:
        note = Note.read(_note(write.folder, number))
        if note is None or note.mark != mark:
            raise ConfigError(
                f"{write.folder}: expected what Beam's workers made of {unit.name}, found nothing: it must be a folder "
                "that all of them share"
            )
        yield number, note


_worker: dict[str, UnitWriter] = {}
"""What a worker process was begun with."""


def _begin(write: UnitWriter) -> None:
    _worker["write"] = write


def _work(*job: Any) -> Note:
    return _worker["write"](*job)


def _encoded(window: list[Any], note: Note, codec: Codec | None, encode: Encoder | None) -> Iterator[tuple[Draft, str]]:
    drafts: list[tuple[Draft, str]] = []
    for place, make in window:
        try:
            draft = make()
            if draft.answer_audio is not None and codec is None:
                raise Rejected("answer is sound, and no codec was given")
            drafts.append((draft, place))
        except Rejected as problem:
            note.reject(place, problem)
    answers: list[np.ndarray | None] = [draft.answer_audio for draft, _ in drafts]
    if codec is None or encode is None or all(answer is None for answer in answers):
        yield from drafts
        return
    for (draft, place), codes in zip(drafts, encode_answers(answers, encode, codec.config), strict=True):
        if codes is not None:
            draft = Draft(replace(draft.exchange, answer_codes=codes))
        yield draft, place


def encode_answers(
    answers: Sequence[np.ndarray | None], encode: Encoder, codec: CodecConfig
) -> list[np.ndarray | None]:
    """Codes int [F, 7] of each answer f32 [samples], in batches of one size and few lengths."""
    spoken: list[np.ndarray | None] = [None] * len(answers)
    order = sorted((len(answer), index) for index, answer in enumerate(answers) if answer is not None)
    step = FRAME_STEP * codec.frame
    for start in range(0, len(order), BATCH):
        rows = order[start : start + BATCH]
        audio = np.zeros((BATCH, -(-rows[-1][0] // step) * step), np.float32)
        # Rows that are left over hold a frame of silence: a batch has one size, and one program.
        lengths = np.full(BATCH, codec.frame, np.int32)
        for row, (length, index) in enumerate(rows):
            audio[row, :length] = answers[index]
            lengths[row] = length
        codes = np.asarray(encode(audio, lengths=lengths))
        for row, (length, index) in enumerate(rows):
            spoken[index] = codes[row, : -(-length // codec.frame)]
    return spoken


def _index(source: Source, folder: Path, notes: list[Note]) -> dict[str, Any]:
    total, rejected = Tally(), Counter[str]()
    examples: dict[str, list[str]] = {}
    content = hashlib.sha256()
    for note in notes:
        total.include(note)
        rejected.update(note.rejected)
        content.update(note.content.encode())
        for reason, found in note.examples.items():
            examples[reason] = [*examples.get(reason, []), *found][:EXAMPLES]
    shards = [
        {"file": _shard(folder, number).name, "exchanges": note.exchanges}
        for number, note in enumerate(notes)
        if note.exchanges
    ]
    return {
        **total.index(shards),
        "licences": {source.name: source.licence},
        "rejected": dict(rejected.most_common()),
        "rejected_examples": examples,
        "content": content.hexdigest(),
    }


def _shard(folder: Path, number: int) -> Path:
    return folder / f"{number:05d}{SUFFIX}"


def _note(folder: Path, number: int) -> Path:
    return folder / f"{number:05d}{NOTE}"
