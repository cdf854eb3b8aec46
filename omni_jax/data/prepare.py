"""Turns a corpus into a folder of records, unit by unit: what is done stays done, whatever happens in between.

Each unit of the source becomes a shard and beside it a note of what became of its rows. A shard that has its note is
whole; run again, only units that have none, or whose files have changed, are read. The index comes last.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from omni_jax.data.records import INDEX, RecordCounts, write_json
from omni_jax.data.shards import (
    EXAMPLES,
    MANIFEST_SUFFIX,
    CodecSpec,
    Job,
    ShardManifest,
    ShardWriter,
    manifest_path,
    shard_path,
)
from omni_jax.data.sources import Source
from omni_jax.errors import ConfigError


def prepare(
    source: Source,
    out: str | Path,
    *,
    codec: CodecSpec | None = None,
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
    if (folder / INDEX).exists() and not any(folder.glob(f"*{MANIFEST_SUFFIX}")):
        raise ConfigError(f"{folder}: expected an empty folder or one of `prepare`'s, found records of another making")
    for partial in folder.glob(".*.part"):
        partial.unlink()
    how = f"{source!r} {codec!r} {codec.config if codec else None!r}"
    jobs, notes = [], {}
    for number, unit in enumerate(units):
        mark = hashlib.sha256(f"{unit.mark()} {how}".encode()).hexdigest()[:16]
        note = ShardManifest.read(manifest_path(folder, number))
        if note is not None and note.source not in ("", source.name):
            raise ConfigError(f"{folder}: expected an empty folder or one of {source.name}, found one of {note.source}")
        if note is not None and note.mark == mark and (not note.exchanges or shard_path(folder, number).is_file()):
            notes[number] = note
        else:
            jobs.append((number, unit, mark))
    if jobs:
        # Until all is done anew, the folder is not whole.
        (folder / INDEX).unlink(missing_ok=True)
    for number in range(len(units), len(units) + sum(1 for _ in folder.glob(f"*{MANIFEST_SUFFIX}"))):
        for stale in (shard_path(folder, number), manifest_path(folder, number)):
            stale.unlink(missing_ok=True)
    write = ShardWriter(source, folder, codec)
    for number, note in _run(write, jobs, workers) if beam is None else _beam(write, jobs, beam):
        notes[number] = note
        if progress is not None:
            progress(len(notes), len(units))
    index = _index(source, folder, [notes[number] for number in range(len(units))])
    write_json(folder / INDEX, index)
    return index


def _run(write: ShardWriter, jobs: list[Job], workers: int) -> Iterator[tuple[int, ShardManifest]]:
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


def _beam(write: ShardWriter, jobs: list[Job], options: Sequence[str]) -> Iterator[tuple[int, ShardManifest]]:
    try:
        from omni_jax.data import beam
    except ImportError as error:
        raise ConfigError(f"--runner: expected Apache Beam, found {error}: pip install 'omni-jax[beam]'") from None
    beam.run(write, jobs, options)
    for number, unit, mark in jobs:
        note = ShardManifest.read(manifest_path(write.folder, number))
        if note is None or note.mark != mark:
            raise ConfigError(
                f"{write.folder}: expected what Beam's workers made of {unit.name}, found nothing: it must be a folder "
                "that all of them share"
            )
        yield number, note


_worker: dict[str, ShardWriter] = {}
"""What a worker process was begun with."""


def _begin(write: ShardWriter) -> None:
    _worker["write"] = write


def _work(*job: Any) -> ShardManifest:
    return _worker["write"](*job)


def _index(source: Source, folder: Path, notes: list[ShardManifest]) -> dict[str, Any]:
    total, rejected = RecordCounts(), Counter[str]()
    examples: dict[str, list[str]] = {}
    content = hashlib.sha256()
    for note in notes:
        total.include(note)
        rejected.update(note.rejected)
        content.update(note.content.encode())
        for reason, found in note.examples.items():
            examples[reason] = [*examples.get(reason, []), *found][:EXAMPLES]
    shards = [
        {"file": shard_path(folder, number).name, "exchanges": note.exchanges}
        for number, note in enumerate(notes)
        if note.exchanges
    ]
    return {
        **total.index(shards),
        "licenses": {source.name: source.license},
        "rejected": dict(rejected.most_common()),
        "rejected_examples": examples,
        "content": content.hexdigest(),
    }
