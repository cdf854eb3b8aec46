"""Configuration: frozen dataclasses, checked field by field, read from and written to YAML. Imports no JAX."""
