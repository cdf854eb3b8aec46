"""Transcripts as subtitles: SubRip (srt) and WebVTT (vtt)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol


class TimedText(Protocol):
    """A piece of a transcript, such as `omni_jax.inference.answer.Segment`."""

    @property
    def start(self) -> float:
        """In seconds."""

    @property
    def end(self) -> float:
        """In seconds."""

    @property
    def text(self) -> str:
        """What is said."""


def srt(segments: Iterable[TimedText]) -> str:
    """A SubRip file: numbered blocks, times with a decimal comma. Segments without text are left out."""
    blocks = enumerate((segment for segment in segments if segment.text), start=1)
    return "\n".join(
        f"{number}\n{_time(segment.start, ',')} --> {_time(segment.end, ',')}\n{segment.text}\n"
        for number, segment in blocks
    )


def vtt(segments: Iterable[TimedText]) -> str:
    """A WebVTT file. Segments without text are left out."""
    return "WEBVTT\n" + "".join(
        f"\n{_time(segment.start, '.')} --> {_time(segment.end, '.')}\n{_escape(segment.text)}\n"
        for segment in segments
        if segment.text
    )


def _time(seconds: float, point: str) -> str:
    milliseconds = round(seconds * 1000)
    hours, rest = divmod(milliseconds, 3_600_000)
    minutes, rest = divmod(rest, 60_000)
    return f"{hours:02}:{minutes:02}:{rest // 1000:02}{point}{rest % 1000:03}"


def _escape(text: str) -> str:
    """Text as a cue of WebVTT, where `<` begins a tag."""
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
