"""Peak numbers of devices, by the names that JAX gives them."""

from __future__ import annotations

import pytest

from omni_jax.hardware import CHIPS, peak_flops


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
