"""The token layout against the published numbers."""

from __future__ import annotations

import pytest

from omni_jax.config.model import VocabConfig
from omni_jax.vocab import NUM_CODEBOOKS, NUM_STREAMS, TEXT_STREAM, Vocab

PUBLISHED = Vocab(VocabConfig())


def test_streams() -> None:
    assert (NUM_CODEBOOKS, TEXT_STREAM, NUM_STREAMS) == (7, 7, 8)


def test_published_specials() -> None:
    v = PUBLISHED
    assert [v.eot, v.pad_t, v.input_t, v.answer_t, v.asr, v.tts] == [
        151936,
        151937,
        151938,
        151939,
        151940,
        151941,
    ]
    assert [v.eoa, v.pad_a, v.input_a, v.answer_a, v.split] == [4096, 4097, 4098, 4099, 4100]


def test_small_specials() -> None:
    v = Vocab(VocabConfig(text=100, text_specials=6, audio=10, audio_specials=5))
    assert [v.eot, v.pad_t, v.input_t, v.answer_t, v.asr, v.tts] == [100, 101, 102, 103, 104, 105]
    assert [v.eoa, v.pad_a, v.input_a, v.answer_a, v.split] == [10, 11, 12, 13, 14]
    assert (v.text_rows, v.audio_rows, v.rows) == (106, 15, 106 + 7 * 15)


def test_global_ids() -> None:
    assert PUBLISHED.global_id(0, 0) == 152000
    assert PUBLISHED.global_id(4097, 0) == 156097
    assert PUBLISHED.global_id(5, 3) == 152000 + 3 * 4160 + 5
    assert PUBLISHED.global_id(4159, 6) == 181119


@pytest.mark.parametrize(("token", "layer"), [(-1, 0), (4160, 0), (0, -1), (0, 7)])
def test_global_ids_out_of_range(token: int, layer: int) -> None:
    with pytest.raises(ValueError, match="expected layer"):
        PUBLISHED.global_id(token, layer)
