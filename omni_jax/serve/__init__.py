"""The HTTP server: `omni-jax serve`."""
