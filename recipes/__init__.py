"""Recipes that make models with the commands and the library of omni_jax."""
