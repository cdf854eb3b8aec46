"""Comparing the names and shapes of tensors with those expected."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol


class HasShape(Protocol):
    """A `LazyTensor`, or an array of any library."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Length of each axis."""


def shape_mismatches(found: Mapping[str, HasShape], expected: Mapping[str, tuple[int, ...]]) -> list[str]:
    """One line per tensor that is missing, misshapen or unknown."""
    missing = [f"{name}: missing, expected {shape}" for name, shape in expected.items() if name not in found]
    wrong = [
        f"{name}: expected {shape}, found {found[name].shape}"
        for name, shape in expected.items()
        if name in found and found[name].shape != shape
    ]
    unknown = [f"{name}: unknown, found {tensor.shape}" for name, tensor in found.items() if name not in expected]
    return missing + wrong + unknown
