"""The codec between speech and codes, seven a frame: SNAC in JAX, or the torch one behind a callback."""
