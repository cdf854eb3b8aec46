"""One ruler for every model: `omni-jax evaluate`."""
