"""Reading the files of corpora in slices."""

from __future__ import annotations

import itertools
import os
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from omni_jax.data import readers
from omni_jax.data.readers import byte_ranges, corpus_files, open_parquet, read_arrow, read_lines, read_parquet
from omni_jax.errors import ConfigError, MissingExtraError


@pytest.fixture
def parquet(tmp_path: Path) -> Path:
    pq.write_table(pa.table({"a": range(7), "b": list("abcdefg")}), tmp_path / "x.parquet", row_group_size=3)
    return tmp_path / "x.parquet"


def test_corpus_files_are_sorted(tmp_path: Path) -> None:
    for name in ("b/1.jsonl", "a/2.jsonl", "a/1.arrow", "a/1.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("")
    found = corpus_files(tmp_path, ".jsonl", ".arrow")
    assert [str(path.relative_to(tmp_path)) for path in found] == ["a/1.arrow", "a/2.jsonl", "b/1.jsonl"]
    with pytest.raises(ConfigError, match=r"expected files that end in \.csv, \.tsv, found none"):
        corpus_files(tmp_path, ".csv", ".tsv")


def test_read_parquet_row_groups_and_columns(parquet: Path) -> None:
    assert [row["a"] for row in read_parquet(parquet, [1, 2], batch_size=2)] == [3, 4, 5, 6]
    assert list(read_parquet(parquet, [2], ("b",), batch_size=2)) == [{"b": "g"}]
    with pytest.raises(ConfigError, match="expected the columns a, c, found none named c"):
        next(read_parquet(parquet, [0], ("a", "c"), batch_size=2))


@pytest.mark.parametrize("name", ["parquet", "arrow"])
def test_missing_pyarrow_names_its_extra(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    message = rf"^x: reading {name} files needs pyarrow: pip install 'omni-jax\[data\]'$"
    with pytest.raises(MissingExtraError, match=message) as caught:
        open_parquet(Path("x"), ()) if name == "parquet" else next(read_arrow(Path("x")))
    assert caught.value.extra == "data"


@pytest.mark.parametrize("size", [1, 3, 4, 5, 100])
def test_byte_ranges_have_every_line_once(tmp_path: Path, size: int) -> None:
    (tmp_path / "x").write_bytes(b"one\ntwo\n\n \nthree")
    ranges = byte_ranges(tmp_path / "x", size)
    assert ranges[0][0] == 0
    assert ranges[-1][1] == 16
    assert all(end == begin for (_, end), (begin, _) in itertools.pairwise(ranges))
    lines = [line for begin, end in ranges for line in read_lines(tmp_path / "x", begin, end)]
    assert lines == [b"one\n", b"two\n", b"three"]


def test_read_lines_refuses_a_line_without_an_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readers, "MAX_LINE_BYTES", 10)
    (tmp_path / "x").write_bytes(b"a\n" + b"b" * 10 + b"\n")
    with pytest.raises(ConfigError, match="x: expected lines of at most 10 bytes, found more at 2"):
        list(read_lines(tmp_path / "x", 0, 13))
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ConfigError, match="pipe: expected a file of lines, found a pipe"):
        next(read_lines(tmp_path / "pipe", 0, 1))
    with pytest.raises(ConfigError, match="pipe: expected a file of lines, found a pipe"):
        byte_ranges(tmp_path / "pipe")


def test_read_parquet_of_a_row_that_is_repeated_by_a_dictionary(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file of a few hundred bytes that decodes to 20 GB: one value of 10 MB, in 2000 rows."""
    path = tmp_path / "x.parquet"
    values = pa.DictionaryArray.from_arrays(pa.array([0] * 2000, pa.int32()), pa.array(["x" * 10_000_000]))
    pq.write_table(pa.table({"a": values}), path, compression="zstd", store_schema=False)
    assert path.stat().st_size < 1000
    monkeypatch.setattr(readers, "MAX_BATCH_BYTES", 25_000_000)
    before = pa.total_allocated_bytes()
    rows = read_parquet(path, [0], batch_size=256)
    assert [len(row["a"]) for row in itertools.islice(rows, 3)] == [10_000_000] * 3
    assert pa.total_allocated_bytes() - before < 60_000_000
    monkeypatch.setattr(readers, "MAX_ROW_BYTES", 9_000_000)
    with pytest.raises(ConfigError, match=r"x\.parquet: expected rows of at most 9000000 bytes, found row 0 with 1000"):
        next(read_parquet(path, [0], batch_size=256))


def test_damaged_parquet_and_arrow_are_errors(parquet: Path, tmp_path: Path) -> None:
    """Every byte of a file is changed; whatever the reader says names the file."""
    data = parquet.read_bytes()
    with pa.OSFile(str(tmp_path / "x.arrow"), "wb") as sink:
        table = pa.table({"a": range(7), "b": list("abcdefg")})
        with pa.ipc.new_stream(sink, table.schema) as stream:
            stream.write_table(table)
    arrow = (tmp_path / "x.arrow").read_bytes()
    for path, whole, read in (
        (parquet, data, lambda path: read_parquet(path, [0, 1], batch_size=2)),
        (tmp_path / "x.arrow", arrow, read_arrow),
    ):
        errors = []
        for at in range(0, len(whole), 5):
            path.write_bytes(whole[:at] + bytes([whole[at] ^ 0xFF]) + whole[at + 1 :])
            try:
                list(read(path))
            except ConfigError as error:
                errors.append(str(error))
        assert len(errors) > len(whole) / 50
        assert all(error.startswith(f"{path}: expected ") for error in errors)
