"""omni_jax: a speech-to-speech language model in JAX/Flax.

from omni_jax import Omni
reply = Omni.load().reply("question.wav")
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from omni_jax.api import Ask, Omni, Part, Reply

__all__ = ["Ask", "Omni", "Part", "Reply"]


def __getattr__(name: str) -> Any:
    # Loaded on first use, so that reading a config or converting weights does not wait for the whole model.
    if name in __all__:
        from omni_jax import api

        return getattr(api, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
