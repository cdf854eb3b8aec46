"""The safetensors reader and writer; int8 is tested in test_quantize.py."""

import json
import os

import ml_dtypes
import numpy as np
import pytest
import safetensors
import safetensors.numpy

from omni_jax.checkpoint.safetensors_io import SCALE_SUFFIX, LazyTensor, SafetensorsFile, write_safetensors
from omni_jax.errors import CheckpointError


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_write_and_read_agree_with_the_library(tmp_path):
    generator = np.random.default_rng(0)
    tensors = {
        # An odd number of narrow items first: wide ones must still be aligned.
        "half": generator.normal(size=(3,)).astype(np.float16),
        "bf16": generator.normal(size=(5, 3)).astype(ml_dtypes.bfloat16),
        "wide": generator.normal(size=(2, 3, 4)).astype(np.float32),
        "scalar": np.array(7.0, np.float32),
        "empty": np.zeros((0, 3), np.float32),
        "transposed": np.asfortranarray(generator.normal(size=(4, 5)).astype(np.float32)),
    }
    path = tmp_path / "x.safetensors"
    write_safetensors(path, {name: LazyTensor.of(array) for name, array in tensors.items()})
    library = safetensors.numpy.load_file(path)
    ours = SafetensorsFile(path).tensors
    assert set(library) == set(ours) == set(tensors)
    for name, array in tensors.items():
        for found in (library[name], ours[name].read()):
            assert found.dtype == array.dtype
            np.testing.assert_array_equal(found, array)
    assert names(tmp_path) == ["x.safetensors"]


def test_read_slices_of_a_file_of_the_library_and_cast(tmp_path):
    array = np.arange(24, dtype=np.float32).reshape(4, 6).astype(ml_dtypes.bfloat16)
    safetensors.numpy.save_file({"a": array}, tmp_path / "x.safetensors", metadata={"made": "by the library"})
    file = SafetensorsFile(tmp_path / "x.safetensors")
    index = (slice(1, 3), slice(2, 6))
    np.testing.assert_array_equal(file.read("a", index), array[index])
    out = np.empty((2, 6), np.float32)
    file.read_into("a", out, (slice(2, 4),))
    np.testing.assert_array_equal(out, array[2:4].astype(np.float32))


def test_failed_write_keeps_the_old_file(tmp_path):
    path = tmp_path / "x.safetensors"
    write_safetensors(path, {"a": LazyTensor.of(np.ones(3, np.float32))})

    def fail():
        raise RuntimeError("no more")

    tensors = {"a": LazyTensor.of(np.zeros(3, np.float32)), "b": LazyTensor((1,), np.dtype(np.float32), fail)}
    with pytest.raises(RuntimeError, match="no more"):
        write_safetensors(path, tensors)
    np.testing.assert_array_equal(SafetensorsFile(path).read("a"), np.ones(3))
    assert names(tmp_path) == ["x.safetensors"]


def test_write_refuses_a_tensor_that_is_not_as_announced(tmp_path):
    wrong = LazyTensor((2,), np.dtype(np.float32), lambda: np.zeros(3, np.float32))
    with pytest.raises(CheckpointError, match=r"x: announced as float32 \(2,\), read as float32 \(3,\)"):
        write_safetensors(tmp_path / "x.safetensors", {"x": wrong})


@pytest.mark.parametrize("content", [b"", b"short", b"\xff" * 40, (9).to_bytes(8, "little") + b"[1, 2, 3]"])
def test_read_refuses_other_files(tmp_path, content):
    (tmp_path / "x.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"x\.safetensors: expected safetensors"):
        SafetensorsFile(tmp_path / "x.safetensors")


def test_read_refuses_a_truncated_file(tmp_path):
    path = tmp_path / "x.safetensors"
    write_safetensors(path, {"a": LazyTensor.of(np.ones(3, np.float32))})
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match="the file is truncated"):
        SafetensorsFile(path)


def safetensors_file(path, header, num_bytes=8):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(num_bytes))
    return path


def entry(first=0, last=8, shape=(2,), dtype="F32"):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [first, last]}


OFFSETS = "expected data_offsets of two integers of 0 or more"
SHAPE = "expected a shape of at most 32 integers from 0 to "
BAD_HEADERS = {
    "no object": ([1], "a header that is no JSON object"),
    "depth": (b"[" * 100_000, "found a header with more than 64 levels"),
    "digits": (b'{"a": {"dtype": "F32", "shape": [' + b"9" * 100_000 + b"]}}", "a number of 100000 digits"),
    "infinity": (
        b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, Infinity]}}',
        "found a header with Infinity",
    ),
    "large float": (b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 1e999]}}', "which no float holds"),
    "duplicate key": (b'{"a": {}, "a": {}}', "the key 'a' twice"),
    "not UTF-8": (b'{"\xff": 1}', "can't decode"),
    "metadata": ({"__metadata__": {"a": 1}, "a": entry()}, "__metadata__: expected texts by name"),
    "entry": ({"a": 1}, "'a': expected dtype, shape and data_offsets, found 1"),
    "no offsets": ({"a": {"dtype": "F32", "shape": [2]}}, "'a': expected dtype, shape and data_offsets"),
    "dtype": ({"a": entry(dtype="F8_E4M3")}, "'a': expected a dtype of F64, .* found 'F8_E4M3'"),
    "dtype is a list": ({"a": entry(dtype=[])}, r"'a': expected a dtype of F64, .* found \[\]"),
    "float offset": ({"a": entry(0, 8.0)}, OFFSETS),
    "text offset": ({"a": entry(0, "8")}, OFFSETS),
    "true as an offset": ({"a": entry(True, 9)}, OFFSETS),
    "negative offset": ({"a": entry(-8, 0)}, OFFSETS),
    "one offset": ({"a": entry() | {"data_offsets": [8]}}, OFFSETS),
    "offsets are an object": ({"a": entry() | {"data_offsets": {}}}, OFFSETS),
    "text shape": ({"a": entry() | {"shape": "2"}}, SHAPE),
    "float shape": ({"a": entry(shape=(2.0,))}, SHAPE),
    "negative shape": ({"a": entry(shape=(-1, -2))}, SHAPE),
    "axes": ({"a": entry(shape=(1,) * 33 + (2,))}, SHAPE),
    "shape and offsets": ({"a": entry(shape=(3,))}, r"'a': expected data_offsets 12 bytes apart, .* found \[0, 8\]"),
    "huge": ({"a": entry(0, 4 * 10**18, shape=(10**9, 10**9))}, "expected 4000000000000000.* bytes, found .*truncated"),
    "overlap": (
        {"a": entry(), "b": entry(4, 8, (1,))},
        "expected a tensor at byte 8 of the data, found b at 4: an overlap",
    ),
    "gap": ({"a": entry(0, 4, (1,)), "b": entry(6, 8, (1,), "F16")}, "at byte 4 of the data, found b at 6: a gap"),
    "gap at the start": ({"a": entry(4, 8, (1,))}, "at byte 0 of the data, found a at 4: a gap"),
    "more than the tensors": ({"a": entry(0, 4, (1,))}, "more than its tensors"),
    "truncated": ({"a": entry(0, 12, (3,))}, "the file is truncated"),
}


@pytest.mark.parametrize("name", BAD_HEADERS)
def test_read_refuses_a_header_that_is_not_as_the_format_says(tmp_path, name):
    header, message = BAD_HEADERS[name]
    path = safetensors_file(tmp_path / "x.safetensors", header)
    with pytest.raises(CheckpointError, match=message) as info:
        SafetensorsFile(path)
    assert str(info.value).startswith(f"{path}: ")
    assert len(str(info.value)) < len(str(path)) + 400
    assert "\n" not in str(info.value)
    if name != "axes":
        with pytest.raises(safetensors.SafetensorError):
            safetensors.numpy.load_file(path)


def test_read_refuses_a_pipe(tmp_path):
    os.mkfifo(tmp_path / "x.safetensors")
    with pytest.raises(CheckpointError, match="expected a safetensors file, found a pipe"):
        SafetensorsFile(tmp_path / "x.safetensors")


@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_read_refuses_values_that_are_not_finite(tmp_path, dtype, value):
    array = np.ones((3, 5), dtype)
    array[1, 2] = np.finfo(np.float16).max
    array[1, 3] = -np.finfo(np.float16).max
    write_safetensors(tmp_path / "x.safetensors", {"a": LazyTensor.of(array)})
    np.testing.assert_array_equal(SafetensorsFile(tmp_path / "x.safetensors").read("a"), array)
    array[2, 4] = value
    write_safetensors(tmp_path / "x.safetensors", {"a": LazyTensor.of(array)})
    file = SafetensorsFile(tmp_path / "x.safetensors")
    with pytest.raises(CheckpointError, match=r"x\.safetensors: a: expected finite values, found NaN or infinity"):
        file.read("a")
    np.testing.assert_array_equal(file.read("a", (slice(0, 2),)), array[:2])


def test_values_that_become_infinite_when_they_are_read_are_named(tmp_path):
    big = {"x": np.array([[127]], np.int8), f"x{SCALE_SUFFIX}": np.array([[3e38]], np.float32), "y": np.array([1e300])}
    write_safetensors(tmp_path / "a.safetensors", {name: LazyTensor.of(array) for name, array in big.items()})
    file = SafetensorsFile(tmp_path / "a.safetensors")
    with pytest.raises(CheckpointError, match="x: expected scales that give finite values"):
        file.read("x")
    with pytest.raises(CheckpointError, match="y: expected values that float32 holds"):
        file.read_into("y", np.zeros(1, np.float32))


def test_an_axis_that_no_array_has_is_refused_although_it_takes_no_byte(tmp_path):
    header = json.dumps({"x": {"dtype": "F32", "shape": [0, 10**31], "data_offsets": [0, 0]}}).encode()
    (tmp_path / "a.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    with pytest.raises(CheckpointError, match="expected a shape of at most 32 integers from 0 to"):
        SafetensorsFile(tmp_path / "a.safetensors")
