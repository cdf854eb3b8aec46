"""The errors of the package: everything a caller may want to catch is an `OmniError`.

An error is raised at the edge, before compute starts. Its message is a sentence that names the file or field, what
was expected and what was found; what a program needs to decide is in typed attributes, never in the message.
"""

from __future__ import annotations

import copy
from typing import Any, Self


class OmniError(Exception):
    """Base of all errors about input that cannot be used. Anything else that is raised is a bug."""

    def prefixed(self, prefix: str) -> Self:
        """The same error with `prefix: ` in front of its message."""
        error = copy.copy(self)
        error.args = (f"{prefix}: {self}",)
        return error

    def __reduce__(self) -> tuple[Any, ...]:
        # Exceptions are copied and pickled by calling the class with `args`, which is the message alone.
        return _restore, (type(self), self.args), self.__dict__


def _restore(error_type: type[OmniError], args: tuple[Any, ...]) -> OmniError:
    error = error_type.__new__(error_type)
    error.args = args
    return error


class ConfigError(OmniError, ValueError):
    """A configuration or option that cannot be used.

    Attributes:
        field: dotted name of the field, where the error is about a single one.
    """

    def __init__(self, message: str, *, field: str | None = None):
        super().__init__(message)
        self.field = field


class AudioError(OmniError, ValueError):
    """A recording that cannot be used."""


class AudioTooLongError(AudioError):
    """A recording that is longer than the limit.

    Attributes:
        max_seconds: the limit.
    """

    def __init__(self, message: str, *, max_seconds: float):
        super().__init__(message)
        self.max_seconds = max_seconds


class NoSpeechError(AudioError):
    """A recording without speech.

    Attributes:
        seconds: the length of the recording.
    """

    def __init__(self, message: str, *, seconds: float):
        super().__init__(message)
        self.seconds = seconds


class CheckpointError(OmniError, ValueError):
    """A release, checkpoint or weight file that cannot be used."""


class ConversionError(OmniError, ValueError):
    """Weights that cannot be converted: one line per tensor that is missing, unknown or misshapen."""


class RecordError(OmniError, ValueError):
    """A record, or a folder of records, that cannot be used."""


class PipelineError(OmniError, ValueError):
    """Data that a training run cannot use."""


class SynthesisError(OmniError, RuntimeError):
    """Text that a speech synthesizer could not speak."""


class TrainingError(OmniError, RuntimeError):
    """A training run that cannot go on: says at which step and why."""


class PeerLostError(TrainingError):
    """Another process of a training run ended, or cannot be reached; started again, the run continues."""


class FolderInUseError(OmniError, RuntimeError):
    """Another run writes to the folder: says who holds it."""


class BusyError(OmniError, RuntimeError):
    """The request queue is full; try again later."""


class ClosedError(OmniError, RuntimeError):
    """The engine is closed and takes no more requests."""


EXTRAS = {
    "PIL": "train",
    "absl": "train",
    "apache_beam": "beam",
    "array_record": "data",
    "fastapi": "serve",
    "grain": "train",
    "jiwer": "evaluation",
    "matplotlib": "evaluation",
    "msgpack": "data",
    "multipart": "serve",
    "optax": "train",
    "orbax": "train",
    "prometheus_client": "serve",
    "pyarrow": "data",
    "starlette": "serve",
    "tensorboardX": "train",
    "uvicorn": "serve",
    "websockets": "serve",
    "whisper_normalizer": "evaluation",
}
"""Packages that the core does not install, and the extra that does."""


class MissingExtraError(OmniError, ImportError):
    """An optional package is not installed; the message has the command that installs it.

    Attributes:
        extra: the extra of omni-jax that has the package; None if it belongs to no extra.
    """

    def __init__(self, purpose: str, extra: str | None = None, *, package: str = ""):
        requirement = package if extra is None else f"'omni-jax[{extra}]'"
        super().__init__(f"{purpose}: pip install {requirement}")
        self.extra = extra


class UntrainedWarning(UserWarning):
    """The model's weights are random: its answers mean nothing."""
