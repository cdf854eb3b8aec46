"""The token layout against the published numbers."""

from __future__ import annotations

from omni_jax.config.model import VocabConfig
from omni_jax.vocab import NUM_CODEBOOKS, NUM_STREAMS, TEXT_STREAM, Vocab

PUBLISHED = Vocab(VocabConfig())


def test_stream_numbers() -> None:
    assert (NUM_CODEBOOKS, TEXT_STREAM, NUM_STREAMS) == (7, 7, 8)


def test_published_special_ids() -> None:
    v = PUBLISHED
    assert [v.eot, v.pad_t, v.input_t, v.answer_t, v.asr, v.tts] == [
        151936,
        151937,
        151938,
        151939,
        151940,
        151941,
    ]
    assert [v.eoa, v.pad_a, v.input_a, v.answer_a] == [4096, 4097, 4098, 4099]


def test_published_rows() -> None:
    """The text rows come first, then those of each codebook."""
    assert (PUBLISHED.text_rows, PUBLISHED.audio_rows, PUBLISHED.rows) == (152000, 4160, 181120)


def test_special_ids_follow_sizes() -> None:
    v = Vocab(VocabConfig(text=100, text_specials=6, audio=10, audio_specials=5))
    assert [v.eot, v.pad_t, v.input_t, v.answer_t, v.asr, v.tts] == [100, 101, 102, 103, 104, 105]
    assert [v.eoa, v.pad_a, v.input_a, v.answer_a] == [10, 11, 12, 13]
    assert (v.text_rows, v.audio_rows, v.rows) == (106, 15, 106 + 7 * 15)
