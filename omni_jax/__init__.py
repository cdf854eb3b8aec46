"""omni_jax: a speech-to-speech language model in JAX/Flax.

from omni_jax import Omni
reply = Omni.from_pretrained("nano").reply("question.wav")
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from omni_jax.errors import (
    AudioError,
    BusyError,
    CheckpointError,
    ClosedError,
    ConfigError,
    ConversionError,
    NoSpeechError,
    OmniError,
    UntrainedWarning,
)

if TYPE_CHECKING:
    from omni_jax.api import Omni
    from omni_jax.inference.answer import Chunk, Reply
    from omni_jax.inference.async_engine import AsyncEngine, RequestHandle
    from omni_jax.inference.conversation import Conversation
    from omni_jax.inference.generation import GenerationConfig
    from omni_jax.inference.request import Request, Turn

__all__ = [
    "AsyncEngine",
    "AudioError",
    "BusyError",
    "CheckpointError",
    "Chunk",
    "ClosedError",
    "ConfigError",
    "Conversation",
    "ConversionError",
    "GenerationConfig",
    "NoSpeechError",
    "Omni",
    "OmniError",
    "Reply",
    "Request",
    "RequestHandle",
    "Turn",
    "UntrainedWarning",
]

_LAZY = {
    "AsyncEngine": "omni_jax.inference.async_engine",
    "Chunk": "omni_jax.inference.answer",
    "Conversation": "omni_jax.inference.conversation",
    "GenerationConfig": "omni_jax.inference.generation",
    "Omni": "omni_jax.api",
    "Reply": "omni_jax.inference.answer",
    "Request": "omni_jax.inference.request",
    "RequestHandle": "omni_jax.inference.async_engine",
    "Turn": "omni_jax.inference.request",
}
"""Loaded on first use, so that reading a config or converting weights does not wait for the whole model."""


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
