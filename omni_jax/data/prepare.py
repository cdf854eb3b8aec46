"""Turns a source into a folder of records, shard by shard, and resumes where an earlier run stopped.

Each shard of the source becomes a shard of records and, when it is complete, a manifest. A later run writes only the
shards that have no manifest, or whose files or options have changed. `index.json` is written last.
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
    MANIFEST_SUFFIX,
    MAX_EXAMPLES,
    CodecSpec,
    Job,
    ShardManifest,
    ShardWriter,
    manifest_path,
    shard_path,
)
from omni_jax.data.sources import Source, SourceShard
from omni_jax.errors import ConfigError, MissingExtraError
from omni_jax.folder_lock import FolderLock


def prepare(
    source: Source,
    out: str | Path,
    *,
    codec: CodecSpec | None = None,
    workers: int = 1,
    beam: Sequence[str] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Read a source and write a folder of records.

    Args:
        source: the corpus.
        out: folder to write, or to resume.
        codec: encodes answer audio; None: rows that have some are rejected.
        workers: number of processes; 1 works in this one.
        beam: options of an Apache Beam pipeline that does the work instead of `workers`.
        progress: called after each shard with the number of shards done, and of all.

    Returns:
        The index, as written to `index.json`.

    Raises:
        ConfigError: the source cannot be read, `out` contains records of another source, or Beam's workers wrote to
            another folder.
        FolderInUseError: another run writes to `out`.
        MissingExtraError: a package that reads the source, or Beam, is not installed.
    """
    folder = Path(out)
    shards = source.shards()
    with FolderLock(folder, "omni-jax prepare") as lock:
        _open_folder(folder)
        options = f"{source!r} {codec!r} {codec.config if codec else None!r}"
        jobs, manifests = _plan(source, shards, folder, options)
        if jobs:
            # The folder is incomplete until all of them are written.
            (folder / INDEX).unlink(missing_ok=True)
        _remove_surplus(folder, len(shards))
        writer = ShardWriter(source, folder, codec)
        for number, manifest in _run_local(writer, jobs, workers) if beam is None else _run_beam(writer, jobs, beam):
            lock.check()
            manifests[number] = manifest
            if progress is not None:
                progress(len(manifests), len(shards))
        index = _make_index(source, folder, [manifests[number] for number in range(len(shards))])
        write_json(folder / INDEX, index)
        return index


def _open_folder(folder: Path) -> None:
    """Check that the folder is new or one of `prepare`, and remove temporary files of a killed run."""
    if (folder / INDEX).exists() and not any(folder.glob(f"*{MANIFEST_SUFFIX}")):
        raise ConfigError(f"{folder}: expected an empty folder or one of `prepare`, found records of another writer")
    for partial in folder.glob(".*.part"):
        partial.unlink()


def _plan(
    source: Source, shards: Sequence[SourceShard], folder: Path, options: str
) -> tuple[list[Job], dict[int, ShardManifest]]:
    """The shards to write, and the manifests of those that are up to date, by number."""
    jobs, manifests = [], {}
    for number, shard in enumerate(shards):
        fingerprint = hashlib.sha256(f"{shard.fingerprint()} {options}".encode()).hexdigest()[:16]
        manifest = ShardManifest.read(manifest_path(folder, number))
        if manifest is not None and manifest.source not in ("", source.name):
            raise ConfigError(
                f"{folder}: expected an empty folder or one of {source.name}, found one of {manifest.source}"
            )
        if (
            manifest is not None
            and manifest.fingerprint == fingerprint
            and (not manifest.exchanges or shard_path(folder, number).is_file())
        ):
            manifests[number] = manifest
        else:
            jobs.append((number, shard, fingerprint))
    return jobs, manifests


def _remove_surplus(folder: Path, count: int) -> None:
    """Remove shards and manifests of numbers from `count`: the source had more shards in an earlier run."""
    for number in range(count, count + sum(1 for _ in folder.glob(f"*{MANIFEST_SUFFIX}"))):
        for path in (shard_path(folder, number), manifest_path(folder, number)):
            path.unlink(missing_ok=True)


def _run_local(writer: ShardWriter, jobs: list[Job], workers: int) -> Iterator[tuple[int, ShardManifest]]:
    """Write shards in this process, or in several; yields number and manifest of each, as they finish."""
    if workers == 1 or len(jobs) < 2:
        for job in jobs:
            yield job[0], writer.write(*job)
        return
    with ProcessPoolExecutor(workers, get_context("spawn"), _init_worker, (writer,)) as pool:
        running = {pool.submit(_write_shard, *job): job[0] for job in jobs}
        try:
            for done in as_completed(running):
                yield running[done], done.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _run_beam(writer: ShardWriter, jobs: list[Job], options: Sequence[str]) -> Iterator[tuple[int, ShardManifest]]:
    """Write shards with Beam; yields number and manifest of each when all are done."""
    try:
        from omni_jax.data import beam
    except ImportError as error:
        raise MissingExtraError(f"--runner: expected Apache Beam, found {error}", "beam") from None
    beam.run(writer, jobs, options)
    for number, shard, fingerprint in jobs:
        manifest = ShardManifest.read(manifest_path(writer.folder, number))
        if manifest is None or manifest.fingerprint != fingerprint:
            raise ConfigError(
                f"{writer.folder}: expected Beam's workers to write shard {shard.name}, found nothing: it must be a "
                "folder that all of them share"
            )
        yield number, manifest


_worker: dict[str, ShardWriter] = {}
"""The `ShardWriter` of a worker process, which loads the codec once."""


def _init_worker(writer: ShardWriter) -> None:
    _worker["writer"] = writer


def _write_shard(*job: Any) -> ShardManifest:
    return _worker["writer"].write(*job)


def _make_index(source: Source, folder: Path, manifests: list[ShardManifest]) -> dict[str, Any]:
    total, rejected = RecordCounts(), Counter[str]()
    examples: dict[str, list[str]] = {}
    content = hashlib.sha256()
    for manifest in manifests:
        total.merge(manifest)
        rejected.update(manifest.rejected)
        content.update(manifest.content.encode())
        for reason, found in manifest.examples.items():
            examples[reason] = [*examples.get(reason, []), *found][:MAX_EXAMPLES]
    shards = [
        {"file": shard_path(folder, number).name, "exchanges": manifest.exchanges}
        for number, manifest in enumerate(manifests)
        if manifest.exchanges
    ]
    return {
        **total.to_index(shards),
        "licenses": {source.name: source.license},
        "rejected": dict(rejected.most_common()),
        "rejected_examples": examples,
        "content": content.hexdigest(),
    }
