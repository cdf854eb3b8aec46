"""TODO: omni_jax/hardware.py"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Chip:
    """One chip, from its data sheet."""

    flops: float
    """bfloat16 products and sums a second."""
    hbm_bytes: int
    hbm_bandwidth: float
    """Bytes a second."""
    ici_bandwidth: float
    """Bytes a second over all of its links to other chips, one way."""
    kind: str
    """JAX's `device_kind`."""
    host: tuple[int, int, int]
    """Chips of a full host, by axis."""


CHIPS = {
    # https://cloud.google.com/tpu/docs/v4, .../v5e, .../v5p, .../v6e: peak bfloat16, HBM, ICI in bits per chip.
    "v4": Chip(275e12, 32 << 30, 1228e9, 2400e9 / 8, "TPU v4", (2, 2, 1)),
    "v5e": Chip(197e12, 16 << 30, 819e9, 1600e9 / 8, "TPU v5 lite", (2, 2, 1)),
    "v5p": Chip(459e12, 95 << 30, 2765e9, 4800e9 / 8, "TPU v5", (2, 2, 1)),
    "v6e": Chip(918e12, 32 << 30, 1640e9, 3584e9 / 8, "TPU v6 lite", (2, 2, 1)),
}
