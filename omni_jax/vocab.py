"""The token layout: text ids, audio ids, and their special tokens.

Text ids run 0..text-1, followed by the text specials. Each of the seven codebooks has codes 0..audio-1, followed by its
own specials. Inside omni_jax an audio id is always local to its codebook. The published checkpoint has one table for
all: the text rows, then the rows of each codebook; see `omni_jax.convert.mini_omni`. Its fifth audio special, `split`
(audio + 4), is used by no task.

SNAC itself has three codebooks, with one, two and four codes per frame. The model treats each of these seven places in
a frame as a codebook with a stream of its own, and so does everything outside `omni_jax.codec`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from omni_jax.config.model import VocabConfig

NUM_CODEBOOKS = 7
"""Codebooks (C), one per audio stream: codes per frame."""
TEXT_STREAM = 7
"""Row of the text stream among the eight streams; rows 0..6 are the audio streams."""
NUM_STREAMS = 8
"""Seven audio streams and the text stream."""


@dataclass(frozen=True)
class Vocab:
    """The ids of a model's special tokens, derived from the sizes of its vocabulary."""

    config: VocabConfig

    @property
    def text_rows(self) -> int:
        """Rows of the text table: vocabulary and specials."""
        return self.config.text + self.config.text_specials

    @property
    def audio_rows(self) -> int:
        """Rows of one codebook's table: codes and specials."""
        return self.config.audio + self.config.audio_specials

    @property
    def rows(self) -> int:
        """Rows of the published table: the text rows, then those of each codebook."""
        return self.text_rows + NUM_CODEBOOKS * self.audio_rows

    @property
    def eot(self) -> int:
        """End of text."""
        return self.config.text

    @property
    def pad_t(self) -> int:
        """Text padding."""
        return self.config.text + 1

    @property
    def input_t(self) -> int:
        """Begins an input, text stream."""
        return self.config.text + 2

    @property
    def answer_t(self) -> int:
        """Asks for an answer in text."""
        return self.config.text + 3

    @property
    def asr(self) -> int:
        """Asks for a transcript."""
        return self.config.text + 4

    @property
    def tts(self) -> int:
        """Asks for the text to be read aloud."""
        return self.config.text + 5

    @property
    def system(self) -> int:
        """Begins the system text of a conversation."""
        return self.config.text + 6

    @property
    def eoa(self) -> int:
        """End of audio, local to a codebook."""
        return self.config.audio

    @property
    def pad_a(self) -> int:
        """Audio padding, local to a codebook."""
        return self.config.audio + 1

    @property
    def padding(self) -> np.ndarray:
        """A position of padding in every stream, int32 [8]."""
        return np.array([self.pad_a] * NUM_CODEBOOKS + [self.pad_t], np.int32)

    @property
    def input_a(self) -> int:
        """Begins an input, audio streams; local to a codebook."""
        return self.config.audio + 2

    @property
    def answer_a(self) -> int:
        """Asks for an answer in audio; local to a codebook."""
        return self.config.audio + 3
