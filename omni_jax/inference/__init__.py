"""Decoding: sampling, the jitted delay-pattern loop, the running batch."""
