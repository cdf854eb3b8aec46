"""TODO: omni_jax/codec/stream.py"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from omni_jax.codec.ops import TAPS
from omni_jax.codec.snac import DILATIONS, Array, DecodeFn
from omni_jax.config.model import CodecConfig


class ReceptiveField(NamedTuple):
    """How far a code is heard: frame f touches samples [f*frame - right, (f+1)*frame + left), no others."""

    left_frames: int
    """Frames before a frame that some of its samples depend on."""
    right_frames: int
    """Frames after a frame that some of its samples depend on."""
    left_samples: int
    right_samples: int
    """Samples at the end of what has been decoded so far that the next frame still changes."""


def receptive_field(config: CodecConfig) -> ReceptiveField:
    """How far the decoder carries one frame's codes, followed through its layers. Exact, not a bound."""
    # Positions [start, end) that one frame touches, at the rate of the layer at hand.
    start, end = 0, config.vq_strides[0]
    reach = TAPS // 2
    start, end = start - reach, end + reach
    for rate in config.decoder_rates:
        # Position t of a transposed convolution makes outputs [t*s, (t+2)*s), moved by the crop.
        crop = math.ceil(rate / 2)
        start, end = start * rate - crop, (end + 1) * rate - crop
        for dilation in DILATIONS:
            start, end = start - reach * dilation, end + reach * dilation
    left, right = end + reach - config.frame_size, reach - start
    return ReceptiveField(math.ceil(left / config.frame_size), math.ceil(right / config.frame_size), left, right)


class StreamDecoder:
    """Decodes codes as they come; what it returns, joined, is the decode of the whole.

    A sample is returned as soon as no later frame can change it, which is `receptive_field().right_samples`
    behind the codes received; only the frames that samples still to come depend on are kept. Each step
    decodes a window of frames, padded to one of a few lengths so that few programs are compiled. One object
    serves one stream; the compiled programs belong to `decode_fn` and are shared.
    """

    def __init__(
        self,
        decode_fn: DecodeFn,
        config: CodecConfig,
        *,
        noise_key: Array | None = None,
        chunks: Sequence[int] = (1, 4, 16),
    ):
        """Start a stream.

        Args:
            decode_fn: from `make_decoder`, or `TorchSnac.decode`.
            config: the codec's.
            noise_key: one key, see `Snac.decode`.
            chunks: numbers of new frames to have a window for. Larger pushes are decoded in pieces of the
                largest, others are padded to the next.
        """
        self._decode = decode_fn
        self._config = config
        self._noise_key = noise_key
        self._field = receptive_field(config)
        self._piece = max(chunks)
        context = math.ceil((self._field.left_samples + self._field.right_samples) / config.frame_size)
        # The first sound needs less than a full context: two windows for it, so that it isn't late.
        soonest = self._field.right_samples // config.frame_size + 1
        self._windows = sorted({soonest, soonest + 1, *(context + chunk for chunk in chunks)})
        self._kept = np.zeros((0, 7), np.int32)
        self._received = 0
        self._emitted = 0
        self._ended = False

    def push(self, codes: ArrayLike, last: bool = False) -> np.ndarray:
        """Take the next frames, give the samples that are now final.

        Args:
            codes: int [n, 7] in slot order, n may be 0.
            last: no frame follows; everything left is returned.

        Returns:
            f32 [samples], perhaps none. Over the whole stream F*2048 for F frames.

        Raises:
            ValueError: codes of another shape, or not below codebook_size.
            RuntimeError: the stream has ended.
        """
        new = np.asarray(codes)
        if new.ndim != 2 or new.shape[1] != 7:
            raise ValueError(f"codes: expected shape [frames, 7], found {list(new.shape)}")
        if new.size and (new.min() < 0 or new.max() >= self._config.codebook_size):
            raise ValueError(f"codes: expected 0 to {self._config.codebook_size - 1}, found {new.min()} to {new.max()}")
        if self._ended:
            raise RuntimeError("the stream has ended: a push with last=True came before")
        self._ended = last
        pieces = [new[at : at + self._piece] for at in range(0, len(new), self._piece)] or [new]
        audio = [self._step(piece, last and index == len(pieces) - 1) for index, piece in enumerate(pieces)]
        return np.concatenate(audio)

    def warm_up(self) -> None:
        """Compile every window a stream can need; once for all that share `decode_fn` and `chunks`."""
        for window in self._windows:
            self._run(np.zeros((window, 7), np.int32), 0)

    def _step(self, new: np.ndarray, last: bool) -> np.ndarray:
        frame = self._config.frame_size
        self._kept = np.concatenate([self._kept, new.astype(np.int32)])
        self._received += len(new)
        settled = self._received * frame - (0 if last else self._field.right_samples)
        if settled <= self._emitted:
            return np.zeros(0, np.float32)
        first = self._received - len(self._kept)
        audio = self._run(self._kept, first)[self._emitted - first * frame : settled - first * frame]
        self._emitted = settled
        # The next sample depends on no frame before this one.
        needed = max(0, (settled - self._field.left_samples) // frame)
        self._kept = self._kept[max(0, needed - first) :]
        return audio

    def _run(self, codes: np.ndarray, first: int) -> np.ndarray:
        window = next(window for window in self._windows if window >= len(codes))
        padded = np.pad(codes, ((0, window - len(codes)), (0, 0)))
        audio = self._decode(
            padded[None],
            lengths=np.array([len(codes)], np.int32),
            noise_key=self._noise_key,
            first_frame=np.array([first], np.int32),
        )
        return np.asarray(audio)[0]
