"""How an answer is put together while it is decoded."""

from __future__ import annotations

import numpy as np
import pytest

from omni_jax.api import Request
from omni_jax.inference.answer import MAX_STREAM_CHUNK_STEPS, AnswerBuilder
from omni_jax.inference.engine import Progress
from omni_jax.vocab import NUM_STREAMS
from tests.inference.reference_decoder import small_omni

STEPS = 100

pytestmark = pytest.mark.usefixtures("quickly_compiled")


@pytest.mark.parametrize("steps", [1, 2, 5, None])
def test_audio_comes_in_growing_pieces(steps: int | None) -> None:
    """Also if other answers want chunks of few steps: the codec takes as long for a frame as for several."""
    omni = small_omni()
    tokens = np.random.default_rng(0).integers(0, omni.config.vocab.audio, (NUM_STREAMS, STEPS), dtype=np.int32)
    answer = AnswerBuilder(omni.outputs, omni.prepare(Request(text="hello")), streaming=True)
    pieces, start = [], 0
    while start < STEPS:
        end = min(STEPS, start + (steps or answer.next_steps))
        chunk = answer.add(Progress(0, tokens[:, start:end], "length" if end == STEPS else None))
        start = end
        if chunk is not None and len(chunk.audio):
            pieces.append(chunk.audio)
    frames = [len(piece) / omni.config.codec.frame_size for piece in pieces]
    for number, size in enumerate(frames[1:-1]):
        wanted = min(2 * 2**number, MAX_STREAM_CHUNK_STEPS)
        # At least half of it, or what a chunk has.
        assert wanted / 2 <= size < wanted / 2 + max(steps or wanted, wanted / 2)
    (expected,) = omni.outputs.decode_audio([tokens])
    np.testing.assert_allclose(np.concatenate(pieces), expected, atol=1e-5)


def test_answers_that_began_one_after_another_take_long_chunks() -> None:
    """The engine takes the fewest steps that any answer wants."""
    omni = small_omni()
    tokens = np.random.default_rng(0).integers(0, omni.config.vocab.audio, (NUM_STREAMS, 400), dtype=np.int32)
    request = omni.prepare(Request(text="hello"))
    answers = [AnswerBuilder(omni.outputs, request, streaming=True) for _ in range(3)]
    begins, now, chunks = [0, 5, 33], 0, []
    while now < 240:
        running = [(answer, begin) for answer, begin in zip(answers, begins, strict=True) if begin <= now]
        chunks.append(min(answer.next_steps for answer, _ in running))
        for answer, begin in running:
            answer.add(Progress(0, tokens[:, now - begin : now - begin + chunks[-1]], None))
        now += chunks[-1]
    assert chunks[-5:] == [MAX_STREAM_CHUNK_STEPS] * 5
