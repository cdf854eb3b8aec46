"""The model: audio encoder, adapter, trunk, heads."""
