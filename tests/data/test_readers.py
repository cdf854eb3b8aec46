"""Reading the files of corpora in slices."""

from __future__ import annotations

import itertools
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

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
