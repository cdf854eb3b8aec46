"""What the chips can do, and how a slice of them is named."""

from __future__ import annotations

import math
import os
import re
from dataclasses import dataclass
from typing import Any

from omni_jax.config import ConfigError


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


@dataclass(frozen=True)
class Topology:
    """A slice: a kind of chip and how many of them along each axis."""

    name: str
    chip: Chip
    shape: tuple[int, ...]

    @classmethod
    def parse(cls, name: str) -> Topology:
        """Read `v5e:16x16`.

        Raises:
            ConfigError: it is not of that form, or the chip is not known.
        """
        match = re.fullmatch(r"(\w+):(\d+(?:x\d+){1,2})", name)
        if not match or match[1] not in CHIPS:
            raise ConfigError(
                f"topology: expected CHIP:AxB or CHIP:AxBxC with a chip of {', '.join(CHIPS)}, found {name!r}"
            )
        shape = tuple(int(size) for size in match[2].split("x"))
        if not all(shape):
            raise ConfigError(f"topology: expected sizes of 1 or more, found {name!r}")
        return cls(name, CHIPS[match[1]], shape)

    @property
    def chips(self) -> int:
        """How many."""
        return math.prod(self.shape)

    def devices(self) -> list[Any]:
        """The chips as the compiler knows them; none need be there.

        Raises:
            ConfigError: libtpu is not installed, or there is no such slice.
        """
        # Without these the compiler's library looks for a machine with chips in it.
        os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
        # And it lets one process use the chips; here none does.
        os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
        os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-1")
        os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
        from jax.experimental import topologies

        host = tuple(min(size, whole) for size, whole in zip((*self.shape, 1), self.chip.host, strict=False))
        try:
            bounds = {} if host == self.chip.host else {"chips_per_host_bounds": host}
            found = topologies.get_topology_desc(platform="tpu", topology_name=self.name, **bounds)
        except Exception as error:
            if "libtpu" in str(error) or isinstance(error, ImportError):
                raise ConfigError(
                    "the TPU compiler is not installed: pip install 'omni-jax[tpu]', on any machine"
                ) from None
            raise ConfigError(f"topology {self.name}: the compiler does not know it: {error}") from None
        return list(found.devices)
