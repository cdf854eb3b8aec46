"""`python -m omni_jax.cli`."""

from omni_jax.cli import main

main()
