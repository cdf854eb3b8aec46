"""Streaming decoding: audio that is final as soon as no later frame can change it."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike

from omni_jax.codec.snac import DecodeFn, receptive_field
from omni_jax.config.model import CodecConfig
from omni_jax.vocab import NUM_CODEBOOKS

NEW_FRAMES = (1, 4, 16)
"""Numbers of new frames that a window is compiled for. A larger push is decoded in pieces of the largest; any other is
padded to the next."""


class StreamDecoder:
    """Decodes the codes of one stream as they arrive; its output, joined, is the decode of the whole.

    A sample is returned as soon as no later frame can change it: `receptive_field().right_samples` behind the codes
    received. Only the frames that later samples depend on are kept. Each step decodes a window of frames, padded to one
    of a few lengths so that few programs are compiled. The compiled programs belong to `decode_fn` and are shared by
    all streams that use it.
    """

    def __init__(self, decode_fn: DecodeFn, config: CodecConfig):
        """Start a stream.

        Args:
            decode_fn: from `make_decoder`, or `TorchSnac.decode`.
            config: the codec's.
        """
        self._decode = decode_fn
        self._config = config
        self._field = receptive_field(config)
        context = math.ceil((self._field.left_samples + self._field.right_samples) / config.frame_size)
        # The first audio needs less than a full context: two windows of its own keep its latency low.
        first_window = self._field.right_samples // config.frame_size + 1
        self._windows = sorted({first_window, first_window + 1, *(context + new for new in NEW_FRAMES)})
        self._kept = np.zeros((0, NUM_CODEBOOKS), np.int32)
        self._num_received = 0
        self._num_emitted = 0
        self._ended = False

    def push(self, codes: ArrayLike, last: bool = False) -> np.ndarray:
        """Take the next frames and return the samples that are now final.

        Args:
            codes: int [n, 7] in the order of frame slots, n may be 0.
            last: no frame follows; everything left is returned.

        Returns:
            f32 [samples], perhaps none. Over the whole stream F*2048 for F frames.

        Raises:
            ValueError: codes of another shape, or not below codebook_size.
            RuntimeError: the stream has ended.
        """
        new = np.asarray(codes)
        if new.ndim != 2 or new.shape[1] != NUM_CODEBOOKS:
            raise ValueError(f"codes: expected shape [frames, {NUM_CODEBOOKS}], found {list(new.shape)}")
        if new.size and (new.min() < 0 or new.max() >= self._config.codebook_size):
            raise ValueError(f"codes: expected 0 to {self._config.codebook_size - 1}, found {new.min()} to {new.max()}")
        if self._ended:
            raise RuntimeError("the stream has ended: a push with last=True came before")
        self._ended = last
        size = max(NEW_FRAMES)
        pieces = [new[start : start + size] for start in range(0, len(new), size)] or [new]
        audio = [self._step(piece, last and index == len(pieces) - 1) for index, piece in enumerate(pieces)]
        return np.concatenate(audio)

    def warm_up(self) -> None:
        """Compile every window that a stream can need; once for all streams that share `decode_fn`."""
        for window in self._windows:
            self._run(np.zeros((window, NUM_CODEBOOKS), np.int32))

    def _step(self, new: np.ndarray, last: bool) -> np.ndarray:
        frame = self._config.frame_size
        self._kept = np.concatenate([self._kept, new.astype(np.int32)])
        self._num_received += len(new)
        num_final = self._num_received * frame - (0 if last else self._field.right_samples)
        if num_final <= self._num_emitted:
            return np.zeros(0, np.float32)
        first = self._num_received - len(self._kept)
        audio = self._run(self._kept)[self._num_emitted - first * frame : num_final - first * frame]
        self._num_emitted = num_final
        # The next sample depends on no frame before this one.
        needed = max(0, (num_final - self._field.left_samples) // frame)
        self._kept = self._kept[max(0, needed - first) :]
        return audio

    def _run(self, codes: np.ndarray) -> np.ndarray:
        window = next(window for window in self._windows if window >= len(codes))
        padded = np.pad(codes, ((0, window - len(codes)), (0, 0)))
        return np.asarray(self._decode(padded[None], lengths=np.array([len(codes)], np.int32)))[0]
