"""What `Omni` takes of a recording: all of it in windows, the speech in it, nothing."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import omni_jax
from omni_jax.api import Omni, Request
from omni_jax.audio import io as audio_io
from omni_jax.audio import vad
from omni_jax.config.model import AudioConfig
from omni_jax.errors import AudioTooLongError, NoSpeechError
from tests.inference.reference_decoder import random_model, small_omni

pytestmark = pytest.mark.usefixtures("quickly_compiled")

QUESTIONS = Path(omni_jax.__file__).parent / "assets" / "questions"
MAX_SAMPLES = 20 * 320


@pytest.fixture(scope="module")
def omni() -> Omni:
    return small_omni()


def spoken() -> np.ndarray:
    """5 s of speech; the model takes 0.4 s at once."""
    return np.concatenate([audio_io.read_audio(QUESTIONS / f"{name}.wav") for name in ("day", "name")])


def test_transcribe_any_length(omni: Omni) -> None:
    """Cut in windows, each of which is transcribed as if it were alone; streamed and whole are the same."""
    audio = spoken()
    reply = omni.transcribe(audio, sample_rate=16000, max_steps=200)
    windows = vad.find_windows(audio, MAX_SAMPLES)
    alone = [omni.transcribe(audio[start:end], sample_rate=16000) for start, end in windows]
    assert len(alone) > 5
    expected = np.concatenate([one.tokens for one in alone], axis=1)[:, :200]
    np.testing.assert_array_equal(reply.tokens, expected)
    times = [(start / 16000, end / 16000) for start, end in windows]
    assert [(segment.start, segment.end) for segment in reply.segments] == times[: len(reply.segments)]
    texts = [one.text for one in alone]
    whole = omni.transcribe(audio, sample_rate=16000)
    assert [segment.text for segment in whole.segments] == [text.strip() for text in texts]
    assert whole.text.split() == " ".join(texts).split()
    chunks = list(omni.stream(audio, sample_rate=16000, task="A1T1"))
    assert "".join(chunk.text for chunk in chunks) == whole.text
    assert chunks[-1].reply is not None
    assert chunks[-1].reply.segments == whole.segments


def test_transcribe_truncated(omni: Omni) -> None:
    audio = spoken()
    reply = omni.transcribe(audio, sample_rate=16000, truncate=True)
    beginning = omni.transcribe(audio[:MAX_SAMPLES], sample_rate=16000)
    np.testing.assert_array_equal(reply.tokens, beginning.tokens)
    assert [(segment.start, segment.end) for segment in reply.segments] == [(0, 0.4)]


def test_transcribe_silence_and_noise(omni: Omni) -> None:
    """Without speech nothing is transcribed, whole, streamed or in a batch; there is no answer."""
    silence = np.zeros(MAX_SAMPLES, np.float32)
    noise = (0.1 * np.random.default_rng(0).normal(size=32000)).astype(np.float32)
    for quiet in (silence, noise):
        assert omni.prepare(Request(quiet, task="A1T1", sample_rate=16000)).duration == len(quiet) / 16000
        reply = omni.transcribe(quiet, sample_rate=16000)
        assert (reply.text, reply.finish_reason, reply.segments, reply.tokens.shape) == ("", "stop", (), (8, 0))
        (chunk,) = omni.stream(quiet, sample_rate=16000, task="A1T1")
        assert (chunk.text, chunk.reply is not None) == ("", True)
    hello = Request(text="hello", task="T1T2")
    empty, answer = omni.batch([Request(silence, task="A1T1", sample_rate=16000), hello])
    assert (empty.text, answer.text) == ("", omni.answer(text="hello").text)
    with pytest.raises(NoSpeechError, match="expected sound, found silence"):
        omni.answer(silence, sample_rate=16000)


@pytest.fixture(scope="module")
def trimming(omni: Omni) -> Omni:
    """Takes 2 s at once, and finds the speech in them."""
    config = omni.config
    config = replace(
        config,
        audio_encoder=replace(config.audio_encoder, max_position=100),
        audio=AudioConfig(find_speech=True, level=-20.0),
        trunk=replace(config.trunk, max_position=128),
    )
    return Omni(random_model(config), omni.outputs.codec, omni.tokenizer)


@pytest.mark.parametrize("gain", [1, 0.01])
@pytest.mark.parametrize("room", [0, 1, 30])
def test_silence_and_level_do_not_change_the_speech(trimming: Omni, room: int, gain: float) -> None:
    question = audio_io.read_audio(QUESTIONS / "name.wav")
    start, end = vad.find_speech(question)
    quiet = np.zeros(room * 16000, np.float32)
    audio = np.concatenate([quiet, question * np.float32(gain), quiet])
    request = trimming.prepare(Request(audio, sample_rate=16000))
    (part,) = request.parts
    assert part.speech is not None
    speech = vad.to_level(question[start:end], -20.0)
    # What precedes it may move an edge by some frames.
    offset = part.start - room * 16000
    assert abs(offset - start) <= 2 * vad.FRAME + vad.MARGIN_SECONDS * 16000
    common = slice(max(offset, start, 0), min(offset + len(part.speech), end))
    np.testing.assert_allclose(
        part.speech[common.start - offset : common.stop - offset],
        speech[common.start - start : common.stop - start],
        atol=0.02,
    )
    assert request.duration == len(audio) / 16000


def test_question_too_long_for_the_model(trimming: Omni) -> None:
    audio = spoken()[:40000]
    with pytest.raises(AudioTooLongError, match=r"at most 2\.00 s, found 2\.\d\d s"):
        trimming.prepare(Request(audio, sample_rate=16000))
    (part,) = trimming.prepare(Request(audio, sample_rate=16000, truncate=True)).parts
    assert part.speech is not None
    assert len(part.speech) == 32000
    # Room does not count, up to a minute.
    with pytest.raises(AudioTooLongError, match=r"at most 62\.00 s, found 63\.00 s"):
        trimming.prepare(Request(np.pad(audio, (0, 63 * 16000 - len(audio))), sample_rate=16000))
