"""The delay pattern against literal arrays."""

from __future__ import annotations

import numpy as np
import pytest

from omni_jax.config.model import VocabConfig
from omni_jax.delay import delay, fill_invalid_codes, undelay
from omni_jax.vocab import Vocab

V = Vocab(VocabConfig(text=100, text_specials=6, audio=80, audio_specials=5))
E, P = 80, 81  # end of audio, padding

TWO_FRAMES = np.array([[10, 20, 30, 40, 50, 60, 70], [11, 21, 31, 41, 51, 61, 71]])
TWO_FRAMES_DELAYED = np.array(
    [
        [P, 10, 11, E, P, P, P, P, P, P],
        [P, P, 20, 21, E, P, P, P, P, P],
        [P, P, P, 30, 31, E, P, P, P, P],
        [P, P, P, P, 40, 41, E, P, P, P],
        [P, P, P, P, P, 50, 51, E, P, P],
        [P, P, P, P, P, P, 60, 61, E, P],
        [P, P, P, P, P, P, P, 70, 71, E],
    ]
)


def test_delay_literal() -> None:
    out = delay(TWO_FRAMES, V)
    assert out.dtype == np.int32
    np.testing.assert_array_equal(out, TWO_FRAMES_DELAYED)


def test_undelay_literal() -> None:
    out = undelay(TWO_FRAMES_DELAYED, V)
    assert out.dtype == np.int32
    np.testing.assert_array_equal(out, TWO_FRAMES)


def test_delay_of_no_frames() -> None:
    out = delay(np.zeros((0, 7), np.int32), V)
    expected = np.full((7, 8), P)
    for codebook in range(7):
        expected[codebook, codebook + 1] = E
    np.testing.assert_array_equal(out, expected)
    assert undelay(out, V).shape == (0, 7)


@pytest.mark.parametrize("frames", [0, 1, 2, 7, 8, 30])
def test_delay_undelay_round_trip(frames: int) -> None:
    codes = np.random.default_rng(frames).integers(0, 80, (frames, 7))
    out = delay(codes, V)
    assert out.shape == (7, frames + 8)
    np.testing.assert_array_equal(undelay(out, V), codes)


def test_undelay_of_prefix_gives_complete_frames() -> None:
    """Frame f is complete with the code of codebook 6, at step f + 7."""
    codes = np.random.default_rng(0).integers(0, 80, (5, 7))
    out = delay(codes, V)
    for steps in range(out.shape[1] + 1):
        complete = min(max(steps - 7, 0), 5)
        np.testing.assert_array_equal(undelay(out[:, :steps], V), codes[:complete].reshape(-1, 7))


def test_undelay_ignores_steps_after_end() -> None:
    longer = np.concatenate([TWO_FRAMES_DELAYED, np.full((7, 3), 5)], axis=1)
    np.testing.assert_array_equal(undelay(longer, V), TWO_FRAMES)


def test_undelay_ends_with_last_codebook() -> None:
    uneven = TWO_FRAMES_DELAYED.copy()
    uneven[0, 2] = E
    uneven[3, 4] = E
    frames = undelay(uneven, V)
    np.testing.assert_array_equal(frames, [[10, 20, 30, E, 50, 60, 70], [E, 21, 31, 41, 51, 61, 71]])


def test_undelay_drops_early_end_of_audio() -> None:
    """With the delay not enforced a stream may have any token before its first step; none of them is decoded."""
    tokens = TWO_FRAMES_DELAYED.copy()
    tokens[6, 3] = E
    np.testing.assert_array_equal(undelay(tokens, V), TWO_FRAMES)


def test_fill_invalid_codes_repeats_code_before() -> None:
    frames = np.array(
        [
            [E, 20, 30, 40, 50, 60, 70],
            [11, P, 31, 84, 51, 61, 79],
            [P, E, 32, 42, 52, 62, 80],
            [13, 23, 33, 43, 53, 63, 0],
        ]
    )
    out = fill_invalid_codes(frames, V)
    assert out.dtype == np.int32
    np.testing.assert_array_equal(
        out,
        [
            [0, 20, 30, 40, 50, 60, 70],
            [11, 20, 31, 40, 51, 61, 79],
            [11, 20, 32, 42, 52, 62, 79],
            [13, 23, 33, 43, 53, 63, 0],
        ],
    )


def test_fill_invalid_codes_of_no_frames() -> None:
    assert fill_invalid_codes(np.zeros((0, 7), np.int32), V).shape == (0, 7)


def test_fill_invalid_codes_depends_on_earlier_frames_only() -> None:
    frames = np.random.default_rng(1).integers(60, 85, (20, 7))
    whole = fill_invalid_codes(frames, V)
    for n in range(20):
        np.testing.assert_array_equal(fill_invalid_codes(frames[:n], V), whole[:n])
