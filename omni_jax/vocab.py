"""The token layout: text ids, audio ids, their specials, and the one table they share when published.

Text ids run 0..text-1, its specials after them. Each of the seven audio layers has codes 0..audio-1 and its own
specials after them. Inside omni_jax an audio token is always local to its layer; only the published checkpoint
format knows global ids.
"""

from __future__ import annotations

from dataclasses import dataclass

from omni_jax.config.model import VocabConfig

NUM_CODEBOOKS = 7
"""Audio layers (C): codes per frame."""
TEXT_STREAM = 7
"""Row of the text stream among the eight streams; rows 0..6 are the audio layers."""
NUM_STREAMS = 8


@dataclass(frozen=True)
class Vocab:
    """Every id of a model's vocabulary, derived from its sizes."""

    config: VocabConfig

    @property
    def text_rows(self) -> int:
        """Rows of the text table: vocabulary and specials."""
        return self.config.text + self.config.text_specials

    @property
    def audio_rows(self) -> int:
        """Rows of one audio layer's table: codes and specials."""
        return self.config.audio + self.config.audio_specials

    @property
    def rows(self) -> int:
        """Rows of the published table: the text rows, then each audio layer's."""
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
    def eoa(self) -> int:
        """End of audio, local to a layer."""
        return self.config.audio

    @property
    def pad_a(self) -> int:
        """Audio padding, local to a layer."""
        return self.config.audio + 1

    @property
    def input_a(self) -> int:
        """Begins an input, audio streams; local to a layer."""
        return self.config.audio + 2

    @property
    def answer_a(self) -> int:
        """Asks for an answer in audio; local to a layer."""
        return self.config.audio + 3

    @property
    def split(self) -> int:
        """Published but unused; local to a layer."""
        return self.config.audio + 4

    def global_id(self, token: int, layer: int) -> int:
        """Row of audio token `token` of layer `layer` in the published table."""
        if not (0 <= layer < NUM_CODEBOOKS and 0 <= token < self.audio_rows):
            raise ValueError(
                f"audio token {token} of layer {layer}: expected layer 0..{NUM_CODEBOOKS - 1}, token 0..{self.audio_rows - 1}"
            )
        return self.text_rows + layer * self.audio_rows + token
