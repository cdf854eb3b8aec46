"""Reads the files of a corpus in slices: row groups of parquet, record batches of arrow, byte ranges of JSON lines."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from omni_jax.errors import ConfigError, MissingExtraError
from omni_jax.input_files import open_file

RANGE_BYTES = 8 << 20
"""Size of the byte ranges that a file of lines is cut into."""
MAX_LINE_BYTES = 16 << 20
"""Longest line of a file of lines."""
MAX_ROW_BYTES = 256 << 20
"""Largest row of a parquet or arrow file, decoded."""
MAX_BATCH_BYTES = 1 << 30
"""Most bytes of rows that are decoded at once."""


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
    open_file(path, ConfigError, "a parquet file").close()
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
        ConfigError: see `open_parquet`; or a row is damaged or larger than `MAX_ROW_BYTES`.
    """
    file = open_parquet(path, columns)
    names = list(columns) or None
    for group in row_groups:
        size = min(batch_size, MAX_BATCH_BYTES // max(1, _largest_value(file.metadata.row_group(group))))
        batches = file.iter_batches(batch_size=max(1, size), row_groups=[group], columns=names)
        yield from _rows(batches, path)


def _largest_value(group: Any) -> int:
    """Bytes that one value of a row group may have at most, where a page may hold it once for many rows."""
    columns = [group.column(number) for number in range(group.num_columns)]
    dictionaries = [column for column in columns if any("DICTIONARY" in encoding for encoding in column.encodings)]
    return sum(column.total_uncompressed_size for column in dictionaries)


def _rows(batches: Iterator[Any], path: Path) -> Iterator[Any]:
    """The rows of Arrow's record batches as dictionaries.

    Raises:
        ConfigError: one is damaged or larger than `MAX_ROW_BYTES`.
    """
    import pyarrow

    number = 0
    while True:
        try:
            batch = next(batches, None)
            if batch is None:
                return
            # Arrow maps offsets and texts as they are in the file.
            batch.validate(full=True)
        except (OSError, pyarrow.ArrowException) as error:
            reason = " ".join(str(error).split())[:300]
            raise ConfigError(f"{path}: expected rows that can be decoded, found after {number}: {reason}") from None
        for row in range(batch.num_rows):
            one = batch.slice(row, 1)
            if batch.nbytes > MAX_ROW_BYTES and one.nbytes > MAX_ROW_BYTES:
                found = f"row {number} with {one.nbytes}"
                raise ConfigError(f"{path}: expected rows of at most {MAX_ROW_BYTES} bytes, found {found}")
            number += 1
            yield one.to_pylist()[0]


def read_arrow(path: Path) -> Iterator[Any]:
    """The rows of an arrow stream, as the `datasets` library saves it, as dictionaries.

    Raises:
        MissingExtraError: pyarrow is not installed.
        ConfigError: it is not an arrow stream, or a row is damaged or larger than `MAX_ROW_BYTES`.
    """
    try:
        import pyarrow
    except ImportError:
        raise MissingExtraError(f"{path}: reading arrow files needs pyarrow", "data") from None
    open_file(path, ConfigError, "an arrow stream").close()
    with pyarrow.memory_map(str(path)) as file:
        try:
            stream = pyarrow.ipc.open_stream(file)
        except (OSError, pyarrow.ArrowException) as error:
            raise ConfigError(f"{path}: expected an arrow stream, found {error}") from None
        yield from _rows(iter(stream), path)


def byte_ranges(path: Path, size: int = RANGE_BYTES) -> list[tuple[int, int]]:
    """Cut a file into ranges [begin, end) of about `size` bytes, for `read_lines`.

    Raises:
        ConfigError: there is no such file, or it is a folder, a pipe or a device.
    """
    with open_file(path, ConfigError, "a file of lines") as file:
        total = os.fstat(file.fileno()).st_size
    return [(begin, min(begin + size, total)) for begin in range(0, total, size)]


def read_lines(path: Path, begin: int, end: int) -> Iterator[bytes]:
    """The lines whose first byte is in [begin, end), without blank ones.

    Raises:
        ConfigError: one is longer than `MAX_LINE_BYTES`.
    """
    with open_file(path, ConfigError, "a file of lines") as file:
        if begin:
            file.seek(begin - 1)
            while (piece := file.readline(RANGE_BYTES)) and not piece.endswith(b"\n"):
                pass
        while (start := file.tell()) < end:
            line = file.readline(MAX_LINE_BYTES + 1)
            if not line:
                break
            if len(line) > MAX_LINE_BYTES:
                raise ConfigError(f"{path}: expected lines of at most {MAX_LINE_BYTES} bytes, found more at {start}")
            if line.strip():
                yield line
