"""TPU slices by name, as devices that programs can be compiled for without having them."""

from __future__ import annotations

import importlib.util
import math
import os
import re
from dataclasses import dataclass

import jax
from jax.experimental import topologies

from omni_jax.errors import ConfigError, MissingExtraError
from omni_jax.hardware import CHIPS, ChipSpec


@dataclass(frozen=True)
class Topology:
    """A slice: a type of chip, and how many of them along each axis."""

    name: str
    chip: ChipSpec
    shape: tuple[int, ...]

    @classmethod
    def parse(cls, name: str) -> Topology:
        """Read a name such as `v5e:16x16` or `v5p:4x4x4`.

        Raises:
            ConfigError: the name has another form, or the chip is unknown.
        """
        match = re.fullmatch(r"(\w+):(\d+(?:x\d+){1,2})", name)
        if not match or match[1] not in CHIPS:
            raise ConfigError(
                f"topology: expected CHIP:AxB or CHIP:AxBxC with a chip of {', '.join(CHIPS)}, found {name!r}",
                field="topology",
            )
        shape = tuple(int(size) for size in match[2].split("x"))
        if not all(shape):
            raise ConfigError(f"topology: expected sizes of 1 or more, found {name!r}", field="topology")
        return cls(name, CHIPS[match[1]], shape)

    @property
    def num_chips(self) -> int:
        """Chips of the slice."""
        return math.prod(self.shape)

    def devices(self) -> list[jax.Device]:
        """Abstract devices to compile for. Needs libtpu, but no TPU.

        Sets environment variables of libtpu for this process, where they are not set.

        Raises:
            MissingExtraError: libtpu is not installed.
            ConfigError: there is no such slice.
        """
        if "TPU_LIBRARY_PATH" not in os.environ and importlib.util.find_spec("libtpu") is None:
            raise MissingExtraError("the TPU compiler, which runs on any machine, is not installed", "tpu")
        # libtpu would query the metadata server of a TPU machine otherwise.
        os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
        # By default libtpu lets one process at a time use the chips; compiling uses none.
        os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
        os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-1")
        os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
        full_host = self.chip.chips_per_host
        # A slice smaller than a host has a smaller host.
        host = tuple(min(size, full) for size, full in zip((*self.shape, 1), full_host, strict=False))
        options = {} if host == full_host else {"chips_per_host_bounds": host}
        try:
            description = topologies.get_topology_desc(platform="tpu", topology_name=self.name, **options)
        except Exception as error:
            raise ConfigError(f"topology {self.name}: unknown to the TPU compiler: {error}", field="topology") from None
        return list(description.devices)
