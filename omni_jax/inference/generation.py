"""`GenerationConfig`: how to answer. The same options in Python, on the command line, in manifests and over HTTP."""

from __future__ import annotations

import dataclasses
import reprlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any, Self

from omni_jax.errors import ConfigError

MIN_TEMPERATURE = 1e-4
"""Below it decoding is greedy: logits over less would leave the range of float32."""
MAX_TEMPERATURE = 100
"""All tokens are as good as equally probable there."""


@dataclass(frozen=True)
class GenerationConfig:
    """How to answer a request. All options have defaults.

    Raises:
        ConfigError: an option is out of range; names it.
    """

    max_steps: int | None = None
    """Stop after so many steps (finish reason `length`), 1 to 2^31-1; None: when the trunk's context is full."""
    temperature: float = 0.0
    """0 to 100; below `MIN_TEMPERATURE`, as the default of 0 is, it is greedy."""
    top_k: int = 0
    """Sample from the k most probable tokens, up to 2^31-1; 0: from all."""
    top_p: float = 1.0
    """Sample from the fewest tokens that together have this probability, above 0; 1: from all."""
    seed: int = 0
    """0 to 2^32-1. The same request with the same seed gives the same tokens, independent of the rest of the batch."""
    enforce_delay: bool = True
    """Whether a codebook that is not yet due emits padding; False leaves it to the model."""
    batch_parallel: bool = True
    """A1A2 only: take the text from a companion row that answers in text alone."""

    def __post_init__(self) -> None:
        def check(name: str, kind: type, fits: Callable[[Any], bool], expected: str) -> None:
            value = getattr(self, name)
            if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool) or not fits(value):
                raise ConfigError(f"{name}: expected {expected}, found {reprlib.repr(value)}", field=name)

        if self.max_steps is not None:
            check("max_steps", Integral, lambda steps: 1 <= steps < 2**31, "a whole number, 1 to 2^31-1")
        check("temperature", Real, lambda t: 0 <= t <= MAX_TEMPERATURE, f"a number, 0 to {MAX_TEMPERATURE}")
        check("top_k", Integral, lambda k: 0 <= k < 2**31, "a whole number, 0 (all) to 2^31-1")
        check("top_p", Real, lambda p: 0 < p <= 1, "a number above 0 and at most 1")
        check("seed", Integral, lambda seed: 0 <= seed < 2**32, "a whole number, 0..2^32-1")
        for name in ("enforce_delay", "batch_parallel"):
            check(name, bool, lambda _: True, "True or False")

    @property
    def sampling_temperature(self) -> float:
        """The temperature that is computed with; 0 is greedy."""
        return self.temperature if self.temperature >= MIN_TEMPERATURE else 0.0

    @classmethod
    def from_dict(cls, options: Mapping[str, Any]) -> Self:
        """A config of some options by name.

        Raises:
            ConfigError: an option is unknown or out of range.
        """
        return cls().replace(**options)

    def replace(self, **options: Any) -> Self:
        """The same with some options changed.

        Raises:
            ConfigError: an option is unknown or out of range.
        """
        known = [field.name for field in dataclasses.fields(self)]
        if unknown := sorted(map(str, set(options) - set(known))):
            raise ConfigError(
                f"options: expected some of {', '.join(known)}, found {', '.join(unknown)}", field=unknown[0]
            )
        return dataclasses.replace(self, **options)
