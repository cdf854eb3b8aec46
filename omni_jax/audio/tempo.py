"""Faster and slower speech at the same pitch, by FFmpeg's `atempo` (WSOLA)."""

from __future__ import annotations

from fractions import Fraction
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from av.filter import Graph

MIN_SPEED, MAX_SPEED = 0.25, 4.0
"""The limits of OpenAI's API. `atempo` goes down to 0.5: a lower speed takes two of them."""


class TempoStream:
    """Stretches audio in time while it arrives; the pieces joined are the whole."""

    def __init__(self, rate: int, speed: float):
        """Begin.

        Args:
            rate: samples per second.
            speed: 2 is twice as fast; within `MIN_SPEED` to `MAX_SPEED`. 1 changes nothing.
        """
        self._rate, self._position = rate, 0
        self._graph = None if speed == 1 else _graph(rate, speed)

    def push(self, audio: np.ndarray, *, last: bool = False) -> np.ndarray:
        """Take the next samples and give those that are ready.

        Args:
            audio: f32 [samples].
            last: whether nothing follows; all that is left is given then.

        Returns:
            f32 [samples], none if there are too few yet.
        """
        if self._graph is None:
            return audio
        import av

        if len(audio):
            frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(audio, np.float32)[None], "flt", "mono")
            frame.sample_rate, frame.time_base, frame.pts = self._rate, Fraction(1, self._rate), self._position
            self._position += len(audio)
            self._graph.push(frame)
        if last:
            self._graph.push(None)
        pieces = [np.zeros(0, np.float32)]
        while True:
            try:
                pieces.append(self._graph.pull().to_ndarray()[0])
            except (av.BlockingIOError, av.EOFError):
                return np.concatenate(pieces)


def _graph(rate: int, speed: float) -> Graph:
    from av.filter import Graph

    graph = Graph()
    factors = [speed] if speed >= 0.5 else [0.5, speed / 0.5]
    source = graph.add_abuffer(format="flt", sample_rate=rate, layout="mono", time_base=Fraction(1, rate))
    filters = [graph.add("atempo", str(factor)) for factor in factors]
    graph.link_nodes(source, *filters, graph.add("abuffersink")).configure()
    return graph
