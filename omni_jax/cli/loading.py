"""Loading a model, with messages about it."""

from __future__ import annotations

import time
import warnings
from typing import TYPE_CHECKING

import omni_jax
from omni_jax.cli.console import echo_err
from omni_jax.errors import ConfigError, UntrainedWarning

if TYPE_CHECKING:
    from jax.sharding import Mesh

    from omni_jax.api import CodecName


def load_model(
    model: str, codec: CodecName = "jax", *, int8: bool = False, short_windows: bool = False, mesh: Mesh | None = None
) -> omni_jax.Omni:
    """Load a model; report how long it took, and if it is untrained.

    Raises:
        ConfigError, CheckpointError: there is no such model, or a file of it cannot be used.
    """
    echo_err(f"loading {model} ...")
    start = time.perf_counter()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UntrainedWarning)
        omni = omni_jax.Omni.from_pretrained(model, codec=codec, int8=int8, short_windows=short_windows, mesh=mesh)
    for warning in caught:
        echo_err(f"note: {warning.message}")
    echo_err(f"loaded in {time.perf_counter() - start:.1f} s")
    return omni


def tensor_mesh(tensor: int) -> Mesh | None:
    """The mesh of the first `tensor` devices, which share every row; None: the first device alone.

    Raises:
        ConfigError: there are not that many devices.
    """
    if tensor == 1:
        return None
    import jax

    from omni_jax.sharding import make_mesh

    devices = jax.local_devices()
    if tensor > len(devices):
        raise ConfigError(f"--tensor: expected at most the {len(devices)} local devices, found {tensor}")
    return make_mesh(tensor=tensor, devices=devices)
