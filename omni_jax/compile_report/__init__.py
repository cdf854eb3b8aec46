"""What the TPU compiler says of our programs, without a TPU: `omni-jax compile`."""
