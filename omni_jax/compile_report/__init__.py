"""Compiles programs for TPU slices without a TPU and reports memory, work and traffic: `omni-jax compile`."""
