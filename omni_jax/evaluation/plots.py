"""Plots of a report, by matplotlib."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from omni_jax.errors import MissingExtraError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def spectrogram(audio: np.ndarray, sample_rate: int) -> bytes:
    """The spectrogram of a recording as PNG. See `draw_spectrogram`."""
    figure = _make_figure(6, 1.4)
    draw_spectrogram(figure.subplots(), audio, sample_rate)
    return _to_png(figure)


def histogram(values: Sequence[float], title: str, unit: str) -> bytes:
    """A histogram over cases as PNG; `unit` names the horizontal axis."""
    figure = _make_figure(4, 2)
    axes = figure.subplots()
    axes.hist(values, bins=30)
    axes.set_title(title, fontsize=9)
    axes.set_xlabel(unit)
    axes.set_ylabel("cases")
    return _to_png(figure)


def draw_spectrogram(axes: Axes, audio: np.ndarray, sample_rate: int) -> None:
    """Draw the spectrogram of a recording, up to 8 kHz.

    Args:
        axes: empty axes of matplotlib.
        audio: float32 [samples].
        sample_rate: samples per second.
    """
    with np.errstate(divide="ignore"):
        axes.specgram(audio + 1e-6, NFFT=512, Fs=sample_rate, noverlap=384, cmap="magma", vmin=-120)
    axes.set_ylim(0, min(8000, sample_rate / 2))
    axes.set_xlabel("time in s")
    axes.set_ylabel("Hz")


def _make_figure(width: float, height: float) -> Figure:
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise MissingExtraError("the plots of the report need matplotlib", "evaluation") from None
    return Figure(figsize=(width, height), layout="constrained")


def _to_png(figure: Figure) -> bytes:
    file = io.BytesIO()
    figure.savefig(file, dpi=90)
    return file.getvalue()
