"""The codec: speech to seven codes per frame and back. SNAC in JAX, or the torch one behind a host callback."""
