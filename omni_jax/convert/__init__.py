"""Weights and configs from and to other formats: two-way tables of names and shapes."""
