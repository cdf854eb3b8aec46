"""Peak numbers of TPU chips, from their data sheets."""

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
