"""Peak numbers of TPU chips and NVIDIA GPUs, from their data sheets."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ChipSpec:
    """What one chip can do at most."""

    flops: float
    """bfloat16 floating-point operations per second; a multiplication and its addition are two."""
    hbm_bytes: int
    """Size of its memory."""
    hbm_bandwidth: float
    """Bytes per second between memory and chip."""
    ici_bandwidth: float
    """Bytes per second over all of its links to other chips (ICI) together, in one direction."""
    device_kind: str
    """`jax.Device.device_kind`."""
    chips_per_host: tuple[int, int, int]
    """Chips of a full host along each axis of a slice."""


CHIPS = {
    # https://cloud.google.com/tpu/docs/v4, .../v5e, .../v5p, .../v6e: peak bfloat16, HBM, ICI in bits per chip.
    "v4": ChipSpec(275e12, 32 << 30, 1228e9, 2400e9 / 8, "TPU v4", (2, 2, 1)),
    "v5e": ChipSpec(197e12, 16 << 30, 819e9, 1600e9 / 8, "TPU v5 lite", (2, 2, 1)),
    "v5p": ChipSpec(459e12, 95 << 30, 2765e9, 4800e9 / 8, "TPU v5", (2, 2, 1)),
    "v6e": ChipSpec(918e12, 32 << 30, 1640e9, 3584e9 / 8, "TPU v6 lite", (2, 2, 1)),
}
"""Chips by the name that a topology begins with."""

GPU_FLOPS = {
    # https://www.nvidia.com/en-us/data-center/: bfloat16 on tensor cores, dense matrices, half of what data sheets give
    # for sparse ones. GeForce: the architecture's white paper, with float32 accumulation.
    "NVIDIA A10": 125e12,
    "NVIDIA A10G": 70e12,
    "NVIDIA A30": 165e12,
    "NVIDIA A100": 312e12,
    "NVIDIA A800": 312e12,
    "NVIDIA L4": 121e12,
    "NVIDIA L40": 181e12,
    "NVIDIA L40S": 362e12,
    "NVIDIA H100": 989e12,
    "NVIDIA H100 NVL": 835e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H200": 989e12,
    "NVIDIA B200": 2250e12,
    "NVIDIA GeForce RTX 3090": 71e12,
    "NVIDIA GeForce RTX 4090": 165e12,
}
"""Peak bfloat16 floating-point operations per second of GPUs, by the beginning of `jax.Device.device_kind`."""


def peak_flops(device_kind: str) -> float | None:
    """Peak bfloat16 floating-point operations per second of a device; None if it is not known."""
    for chip in CHIPS.values():
        # A v5p names itself with and without its letter.
        if device_kind in (chip.device_kind, f"{chip.device_kind}p"):
            return chip.flops
    words = device_kind.replace("-", " ").split()
    known = [name for name in GPU_FLOPS if words[: len(name.split())] == name.split()]
    return GPU_FLOPS[max(known, key=len)] if known else None
