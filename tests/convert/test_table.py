"""The conversion table: its kinds of entries, laziness, types and errors, with literal arrays."""

import ml_dtypes
import numpy as np
import pytest

from omni_jax.checkpoint.safetensors_io import LazyTensor
from omni_jax.convert.table import Entry, cast, is_identical, pad, rename, reshape, to_ours, to_theirs, transpose
from omni_jax.errors import ConversionError
from tests.lazy import read_all, recorded, to_lazy


def numbers(*shape, dtype=np.float32):
    return np.arange(np.prod(shape)).reshape(shape).astype(dtype)


def apply(table, arrays):
    return read_all(to_ours(table, to_lazy(arrays), "source"))


def revert(table, arrays):
    return read_all(to_theirs(table, to_lazy(arrays), "source"))


@pytest.mark.parametrize(
    ("entry", "theirs", "ours"),
    [
        (rename("a", "b", (3,)), [1, 2, 3], [1, 2, 3]),
        (reshape("a", "b", (4, 1), (2, 2)), [[1], [2], [3], [4]], [[1, 2], [3, 4]]),
        (transpose("a", "b", (2, 1, 2), (2, 1, 0)), [[[1, 2]], [[3, 4]]], [[[1, 3]], [[2, 4]]]),
        (transpose("a", "b", (2, 1, 3), (1, 2, 0)), [[[1, 2, 3]], [[4, 5, 6]]], [[[1, 4], [2, 5], [3, 6]]]),
        (pad("a", "b", (2, 3), (1, 2)), [[1, 2, 0], [0, 0, 0]], [[1, 2]]),
        (pad("a", "b", (2,), (2,)), [1, 2], [1, 2]),
    ],
)
def test_entries_both_ways(entry, theirs, ours):
    theirs, ours = np.array(theirs, np.float32), np.array(ours, np.float32)
    np.testing.assert_array_equal(apply([entry], {"a": theirs})["b"], ours)
    np.testing.assert_array_equal(revert([entry], {"b": ours})["a"], theirs)


def test_reshape_refuses_another_number_of_elements():
    with pytest.raises(ValueError, match=r"a \(2, 3\) cannot be b \(5,\)"):
        reshape("a", "b", (2, 3), (5,))


SPLIT = Entry(
    {"fused": (4, 2)},
    {"first": (1, 2), "rest": (3, 2)},
    lambda fused: (fused[:1], fused[1:]),
    lambda first, rest: (np.concatenate([first, rest]),),
)
PRODUCT = Entry(
    {"scale": (1,), "sign": (3,)},
    {"weight": (3,)},
    lambda scale, sign: (scale * sign,),
    lambda weight: (np.abs(weight[:1]), np.sign(weight)),
)


def test_entry_of_one_to_two():
    fused = numbers(4, 2)
    ours = apply([SPLIT], {"fused": fused})
    np.testing.assert_array_equal(ours["first"], [[0, 1]])
    np.testing.assert_array_equal(ours["rest"], fused[1:])
    np.testing.assert_array_equal(revert([SPLIT], ours)["fused"], fused)


def test_entry_of_two_to_one():
    theirs = {"scale": np.array([2], np.float32), "sign": np.array([1, -1, 1], np.float32)}
    ours = apply([PRODUCT], theirs)
    np.testing.assert_array_equal(ours["weight"], [2, -2, 2])
    back = revert([PRODUCT], ours)
    assert {name: array.tolist() for name, array in back.items()} == {"scale": [2], "sign": [1, -1, 1]}


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_results_have_the_type_of_their_source(dtype):
    table = [SPLIT, rename("a", "b", (3,))]
    ours = apply(table, {"fused": numbers(4, 2, dtype=dtype), "a": numbers(3)})
    assert {name: array.dtype for name, array in ours.items()} == {"first": dtype, "rest": dtype, "b": np.float32}
    assert revert(table, ours)["fused"].dtype == dtype


def test_results_of_mixed_sources_are_float32():
    fused = revert([SPLIT], {"first": numbers(1, 2, dtype=np.float16), "rest": numbers(3, 2, dtype=ml_dtypes.bfloat16)})
    assert fused["fused"].dtype == np.float32
    np.testing.assert_array_equal(fused["fused"], [[0, 1], [0, 1], [2, 3], [4, 5]])


def test_nothing_is_read_before_it_is_asked_for():
    reads = []
    theirs = {"fused": numbers(4, 2), "scale": numbers(1), "sign": numbers(3)}
    ours = to_ours([SPLIT, PRODUCT], recorded(to_lazy(theirs), reads), "source")
    assert reads == []
    ours["rest"].read()
    assert reads == ["fused"]
    ours["weight"].read()
    assert reads == ["fused", "scale", "sign"]


def test_error_lists_every_tensor_both_ways():
    table = [rename("a", "ours.a", (3,)), rename("b", "ours.b", (2,)), rename("c", "ours.c", (1,)), SPLIT]
    theirs = {
        "b": numbers(3),
        "c": np.zeros(1, np.int32),
        "fused": np.zeros((4, 2), np.float64),
        "strange": numbers(5),
    }
    with pytest.raises(ConversionError) as error:
        to_ours(table, to_lazy(theirs), "the file")
    assert str(error.value).splitlines() == [
        "the file:",
        "a: missing, expected (3,)",
        "b: expected (2,), found (3,)",
        "strange: unknown, found (5,)",
        "c: expected float32, bfloat16, float16, found int32",
        "fused: expected float32, bfloat16, float16, found float64",
    ]
    with pytest.raises(ConversionError) as error:
        to_theirs([SPLIT], to_lazy({"first": numbers(1, 2), "last": numbers(3, 2)}), "the model")
    assert str(error.value).splitlines() == [
        "the model:",
        "rest: missing, expected (3, 2)",
        "last: unknown, found (3, 2)",
    ]


def test_is_identical_compares_bytes():
    table = numbers(5000, 2)
    other = table.copy()
    assert is_identical(LazyTensor.of(table), LazyTensor.of(table))
    assert is_identical(LazyTensor.of(table), LazyTensor.of(other))
    assert not is_identical(LazyTensor.of(table), LazyTensor.of(table.astype(np.float16)))
    other[-1, -1] += 1
    assert not is_identical(LazyTensor.of(table), LazyTensor.of(other))


def test_cast_rounds_to_the_nearest_and_refuses_what_does_not_fit():
    values = np.array([1 + 2**-9, 1 + 3 * 2**-9, 70000.0], np.float32)
    reads: list[str] = []
    found = cast(recorded(to_lazy({"a": values}), reads), "bfloat16", "source")["a"]
    assert (found.dtype, found.shape, reads) == (np.dtype(ml_dtypes.bfloat16), (3,), [])
    np.testing.assert_array_equal(found.read().astype(np.float32), [1.0, 1.0078125, 70144.0])
    with pytest.raises(ConversionError, match=r"source: a: expected values that float16 holds, found larger ones"):
        cast(to_lazy({"a": values}), "float16", "source")["a"].read()
    assert cast(to_lazy({"a": values}), None, "source")["a"].dtype == np.float32
