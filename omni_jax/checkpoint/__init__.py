"""Release folders and their files: what a model is saved as and loaded from."""
