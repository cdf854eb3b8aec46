"""The model: ear, adapter, trunk, heads."""
