"""Reads the files of a corpus in slices: row groups of parquet, record batches of arrow, byte ranges of JSON lines."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from omni_jax.errors import ConfigError, MissingExtraError

RANGE_BYTES = 8 << 20
"""Size of the byte ranges that a file of lines is cut into."""


def corpus_files(folder: Path, *suffixes: str) -> list[Path]:
    """All files below a folder that end in one of the suffixes, sorted.

    Raises:
        ConfigError: there are none.
    """
    found = sorted(path for path in folder.rglob("*") if path.suffix in suffixes)
    if not found:
        raise ConfigError(f"{folder}: expected files that end in {', '.join(suffixes)}, found none")
    return found


def open_parquet(path: Path, columns: Sequence[str]) -> Any:
    """Open a parquet file as a `pyarrow.parquet.ParquetFile`.

    Args:
        path: the file.
        columns: names that it must have; it may have others.

    Raises:
        MissingExtraError: pyarrow is not installed.
        ConfigError: it is not a parquet file, or lacks one of the columns.
    """
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise MissingExtraError(f"{path}: reading parquet files needs pyarrow", "data") from None
    try:
        file = pyarrow.parquet.ParquetFile(path)
    except (OSError, pyarrow.ArrowInvalid) as error:
        raise ConfigError(f"{path}: expected a parquet file, found {error}") from None
    missing = set(columns) - set(file.schema_arrow.names)
    if missing:
        raise ConfigError(f"{path}: expected the columns {', '.join(columns)}, found none named {', '.join(missing)}")
    return file


def read_parquet(
    path: Path, row_groups: Sequence[int], columns: Sequence[str] = (), *, batch_size: int
) -> Iterator[Any]:
    """The rows of some row groups as dictionaries, `batch_size` of them in memory at a time.

    Args:
        path: the file.
        row_groups: their numbers.
        columns: columns to read; empty: all.
        batch_size: rows decoded at once.

    Raises:
        MissingExtraError: see `open_parquet`.
        ConfigError: see `open_parquet`.
    """
    file = open_parquet(path, columns)
    names = list(columns) or None
    for batch in file.iter_batches(batch_size=batch_size, row_groups=list(row_groups), columns=names):
        yield from batch.to_pylist()


def read_arrow(path: Path) -> Iterator[Any]:
    """The rows of an arrow stream, as the `datasets` library saves it, as dictionaries.

    Raises:
        MissingExtraError: pyarrow is not installed.
    """
    try:
        import pyarrow
    except ImportError:
        raise MissingExtraError(f"{path}: reading arrow files needs pyarrow", "data") from None
    with pyarrow.memory_map(str(path)) as file:
        for batch in pyarrow.ipc.open_stream(file):
            yield from batch.to_pylist()


def byte_ranges(path: Path, size: int = RANGE_BYTES) -> list[tuple[int, int]]:
    """Cut a file into ranges [begin, end) of about `size` bytes, for `read_lines`.

    Raises:
        ConfigError: there is no such file.
    """
    try:
        total = path.stat().st_size
    except OSError as error:
        raise ConfigError(f"{path}: expected a file, found {error.strerror}") from None
    return [(begin, min(begin + size, total)) for begin in range(0, total, size)]


def read_lines(path: Path, begin: int, end: int) -> Iterator[bytes]:
    """The lines whose first byte is in [begin, end), without blank ones."""
    with path.open("rb") as file:
        if begin:
            file.seek(begin - 1)
            file.readline()
        while file.tell() < end:
            line = file.readline()
            if not line:
                break
            if line.strip():
                yield line
