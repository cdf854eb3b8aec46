"""The six tasks. Their names are the paper's."""

from __future__ import annotations

import enum


class Task(enum.StrEnum):
    """What goes in and what comes out: A1 speech or T1 text in; A2/A1 speech, T2/T1 text out."""

    A1A2 = "A1A2"
    """Speech in, text and speech out."""
    A1T2 = "A1T2"
    """Speech in, text out."""
    A1T1 = "A1T1"
    """Speech in, its transcript out."""
    T1A2 = "T1A2"
    """Text in, text and speech out."""
    T1T2 = "T1T2"
    """Text in, text out."""
    T1A1 = "T1A1"
    """Text in, the same text spoken."""

    @classmethod
    def _missing_(cls, value: object) -> Task | None:
        """A name in lower case."""
        return cls.__members__.get(value.upper()) if isinstance(value, str) else None

    @property
    def takes_audio(self) -> bool:
        """Whether the input is speech."""
        return self.value.startswith("A1")

    @property
    def outputs_text(self) -> bool:
        """Whether the answer has text."""
        return self is not Task.T1A1

    @property
    def outputs_audio(self) -> bool:
        """Whether the answer has speech."""
        return self in (Task.A1A2, Task.T1A2, Task.T1A1)
