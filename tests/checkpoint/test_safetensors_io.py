"""The safetensors reader and writer; int8 is tested in test_quantize.py."""

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from omni_jax.checkpoint.safetensors_io import LazyTensor, SafetensorsFile, write_safetensors
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
