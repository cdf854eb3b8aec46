"""Import, export, initialize and inspect model weights; the same as `omni-jax convert`."""

from __future__ import annotations

from omni_jax.cli import startup
from omni_jax.convert.commands import app

if __name__ == "__main__":
    startup.silence_libtpu()
    app()
