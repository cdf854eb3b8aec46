"""Peak numbers of devices, by the names that JAX gives them."""

from __future__ import annotations

import pytest

from omni_jax.hardware import CHIPS, peak_flops, tpu_name


@pytest.mark.parametrize(
    ("device_kind", "flops"),
    [
        ("TPU v5 lite", CHIPS["v5e"].flops),
        ("TPU v5", CHIPS["v5p"].flops),
        ("TPU v5p", CHIPS["v5p"].flops),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA L4", 121e12),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA GeForce RTX 4090", 165e12),
        ("NVIDIA GeForce RTX 409", None),
        ("Tesla T4", None),
        ("cpu", None),
    ],
)
def test_peak_flops(device_kind: str, flops: float | None) -> None:
    assert peak_flops(device_kind) == flops


def test_tpu_name() -> None:
    kinds = ("TPU v5 lite", "TPU v5", "TPU v5p", "TPU v6 lite", "TPU v7", "cpu")
    assert [tpu_name(kind) for kind in kinds] == ["v5e", "v5p", "v5p", "v6e", None, None]
