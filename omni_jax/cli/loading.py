"""Loading a model, with messages about it."""

from __future__ import annotations

import time
import warnings
from typing import TYPE_CHECKING, Any

import omni_jax
from omni_jax.cli.console import echo_err
from omni_jax.errors import UntrainedWarning

if TYPE_CHECKING:
    from omni_jax.api import CodecName


def load_model(
    model: str, codec: CodecName = "jax", *, int8: bool = False, short_windows: bool = False, mesh: Any = None
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
