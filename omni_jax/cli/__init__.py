"""`omni-jax`, the command line: one module per command.

Answers go to stdout and to files. Progress, timings, warnings and errors go to stderr. Exit codes: 0 success, 1 some
rows of a batch failed, or nothing at all could be done, 2 bad input, 130 interrupted, and those of `omni-jax train`.

`--help` and a mistyped option answer without importing JAX: the module of a command is imported when the command is
called, and modules that import JAX are imported in the body of the command.
"""

from omni_jax.cli.app import main

__all__ = ["main"]
