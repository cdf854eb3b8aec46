"""The small model that ships with omni_jax, made from nothing: its texts, its voices, its parts and its lessons."""
