"""Peak numbers of TPU chips and NVIDIA GPUs, from their data sheets; memory of the devices that are there."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

import jax

from omni_jax.errors import ConfigError


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
    clock: float
    """Cycles per second of the matrix units: `flops` over twice their multipliers."""


CHIPS = {
    # https://cloud.google.com/tpu/docs/v4, .../v5e, .../v5p, .../v6e: peak bfloat16, HBM, ICI in bits per chip.
    "v4": ChipSpec(275e12, 32 << 30, 1228e9, 2400e9 / 8, "TPU v4", (2, 2, 1), 1.05e9),
    "v5e": ChipSpec(197e12, 16 << 30, 819e9, 1600e9 / 8, "TPU v5 lite", (2, 2, 1), 1.5e9),
    "v5p": ChipSpec(459e12, 95 << 30, 2765e9, 4800e9 / 8, "TPU v5", (2, 2, 1), 1.75e9),
    "v6e": ChipSpec(918e12, 32 << 30, 1640e9, 3584e9 / 8, "TPU v6 lite", (2, 2, 1), 1.75e9),
}
"""Chips by the name that a topology begins with."""


def require_memory(num_bytes: int, what: str, devices: Sequence[jax.Device]) -> None:
    """Check that arrays fit into devices that they are spread over, before any of them is made.

    Args:
        num_bytes: of all arrays together.
        what: what they are, with the numbers that they follow from, for the message.
        devices: the devices, also those of other processes; of CPU devices the memory of the host counts.

    Raises:
        ConfigError: they do not fit.
    """
    local = [device for device in devices if device.process_index == jax.process_index()]
    if not local:
        return
    if local[0].platform == "cpu":
        capacity = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    else:
        capacity = sum((device.memory_stats() or {}).get("bytes_limit", num_bytes) for device in local)
    needed = num_bytes * len(local) // len(devices)
    if needed > capacity:
        raise ConfigError(
            f"{what}: expected at most {capacity / 1e9:.1f} GB, the memory of the devices ({local[0].platform}), "
            f"found {needed / 1e9:.1f} GB"
        )


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


def tpu_name(device_kind: str) -> str | None:
    """The name in `CHIPS` of a TPU by its `jax.Device.device_kind`; None if it is none of them."""
    # A v5p names itself with and without its letter.
    kinds = {kind: name for name, chip in CHIPS.items() for kind in (chip.device_kind, f"{chip.device_kind}p")}
    return kinds.get(device_kind)


def peak_flops(device_kind: str) -> float | None:
    """Peak bfloat16 floating-point operations per second of a device; None if it is not known."""
    if (name := tpu_name(device_kind)) is not None:
        return CHIPS[name].flops
    words = device_kind.replace("-", " ").split()
    known = [name for name in GPU_FLOPS if words[: len(name.split())] == name.split()]
    return GPU_FLOPS[max(known, key=len)] if known else None
