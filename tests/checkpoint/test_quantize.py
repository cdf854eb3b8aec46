"""Int8 tensors with scales in safetensors files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from omni_jax.checkpoint.quantize import quantize_tensors
from omni_jax.checkpoint.safetensors_io import SCALE_SUFFIX, LazyTensor, SafetensorsFile, write_safetensors
from omni_jax.errors import CheckpointError


def matrix(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def quantized(path: Path, **arrays: np.ndarray) -> SafetensorsFile:
    write_safetensors(path, quantize_tensors({name: LazyTensor.of(array) for name, array in arrays.items()}))
    return SafetensorsFile(path)


def test_quantize_error_is_half_a_step_and_size_a_quarter(tmp_path: Path):
    rows = matrix(300, 64) * np.geomspace(1e-3, 1e3, 300, dtype=np.float32)[:, None]
    columns = matrix(64, 5, 60) * np.geomspace(1e-3, 1e3, 60, dtype=np.float32)
    file = quantized(tmp_path / "a", rows=rows, columns=columns, bias=matrix(7), positions=matrix(5, 40))
    assert set(file.tensors) == {"rows", "columns", "bias", "positions"}
    for name, array, step in (
        ("rows", rows, np.abs(rows).max(axis=1, keepdims=True) / 127),
        ("columns", columns, np.abs(columns).max(axis=(0, 1), keepdims=True) / 127),
    ):
        assert file.tensors[name].dtype == np.float32
        assert file.tensors[name].shape == array.shape
        assert (np.abs(file.read(name) - array) <= 0.5001 * step).all(), name
    np.testing.assert_array_equal(file.read("bias"), matrix(7))
    np.testing.assert_array_equal(file.read("positions"), matrix(5, 40))
    assert (tmp_path / "a").stat().st_size < (rows.nbytes + columns.nbytes) * 0.27 + 1000


def test_slices_of_int8_equal_slices_of_the_whole(tmp_path: Path):
    file = quantized(
        tmp_path / "a",
        rows=matrix(30, 36) * np.arange(1, 31)[:, None],
        columns=matrix(36, 30) * np.arange(1, 31),
        heads=matrix(4, 40, 64) * np.arange(1, 41)[:, None],
    )
    for name in ("rows", "columns", "heads"):
        whole = file.read(name)
        for index in ((slice(2, 5),), (slice(1, 4), slice(3, 6)), (slice(0, 6), slice(0, 1))):
            np.testing.assert_array_equal(file.read(name, index), whole[index])
        half = np.empty(whole.shape, np.float16)
        file.read_into(name, half)
        np.testing.assert_array_equal(half, whole.astype(np.float16))


def test_quantize_keeps_zeros(tmp_path: Path):
    np.testing.assert_array_equal(quantized(tmp_path / "a", zero=np.zeros((3, 3), np.float32)).read("zero"), 0)


def test_quantize_shares_scales_where_it_loses_least_and_keeps_biases(tmp_path: Path):
    large = np.ones((4, 40, 64), np.float32)
    large[2, 7] = 1000
    file = quantized(tmp_path / "a", heads=matrix(4, 40, 64) * large, wide=matrix(2000, 3), bias=matrix(4, 64))
    # Each row of each head has a scale of its own, so a large one costs the others nothing.
    step = np.abs(file.read("heads")).max(axis=-1, keepdims=True) / 127
    assert (np.abs(file.read("heads") - matrix(4, 40, 64) * large) <= 0.501 * step).all()
    # Where three numbers would share one, the scales would weigh more than the numbers.
    assert len(np.unique(np.abs(file.read("wide")).max(axis=1))) > 100
    assert (tmp_path / "a").stat().st_size < (large.size + 6000) * 1.1 + 4 * 256 + 1000
    np.testing.assert_array_equal(file.read("bias"), matrix(4, 64))


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"a" + SCALE_SUFFIX: np.ones((1, 3), np.float32)}, "expected float32 scales of a tensor of type I8"),
        (
            {"a": np.ones((2, 3), np.float32), "a" + SCALE_SUFFIX: np.ones((1, 3), np.float32)},
            "expected float32 scales of a tensor of type I8",
        ),
        (
            {"a": np.ones((2, 3), np.int8), "a" + SCALE_SUFFIX: np.ones((1, 2), np.float32)},
            r"a: scales \(1, 2\) do not fit",
        ),
        ({"a": np.ones((2, 3), np.int8), "a" + SCALE_SUFFIX: np.ones(3, np.float32)}, r"a: scales \(3,\) do not fit"),
    ],
)
def test_scales_that_do_not_fit_are_refused(tensors: dict[str, np.ndarray], message: str, tmp_path: Path):
    write_safetensors(tmp_path / "a", {name: LazyTensor.of(array) for name, array in tensors.items()})
    with pytest.raises(CheckpointError, match=message):
        SafetensorsFile(tmp_path / "a")
