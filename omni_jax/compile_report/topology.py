"""What the chips can do, and how a slice of them is named."""

from __future__ import annotations

import math
import os
import re
from dataclasses import dataclass
from typing import Any

from omni_jax.errors import ConfigError
from omni_jax.hardware import CHIPS, Chip


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
