"""`examples/microphone.py` with a fake sounddevice module."""

from __future__ import annotations

import importlib.util
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from omni_jax.api import Omni
from omni_jax.audio import io as audio_io
from tests.inference.reference_decoder import small_omni

pytestmark = pytest.mark.usefixtures("quickly_compiled")

EXAMPLE = Path(__file__).parents[1] / "examples" / "microphone.py"


@pytest.fixture
def microphone() -> types.ModuleType:
    spec = importlib.util.spec_from_file_location("microphone", EXAMPLE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class FakeSoundDevice(types.ModuleType):
    """Records given blocks and keeps what is played."""

    def __init__(self, recordings: list[np.ndarray]):
        super().__init__("sounddevice")
        self.recordings, self.played, self.rates = recordings, [], []
        sounddevice = self

        class Stream:
            def __enter__(self) -> Any:
                return self

            def __exit__(self, *_: object) -> None:
                pass

        class InputStream(Stream):
            def __init__(self, *, samplerate: int, channels: int, dtype: str, callback: Callable[..., None]):
                assert (samplerate, channels, dtype) == (16_000, 1, "float32")
                for block in np.array_split(sounddevice.recordings.pop(0), 3):
                    callback(block[:, None], len(block), None, None)

        class OutputStream(Stream):
            def __init__(self, *, samplerate: int, channels: int, dtype: str):
                assert (channels, dtype) == (1, "float32")
                sounddevice.rates.append(samplerate)
                sounddevice.played.append([])

            def write(self, samples: np.ndarray) -> None:
                assert samples.shape[1:] == (1,)
                sounddevice.played[-1].append(samples[:, 0])

        self.InputStream, self.OutputStream = InputStream, OutputStream


@pytest.mark.slow
def test_microphone_example_plays_the_answer(
    microphone: types.ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    omni = small_omni()
    question = np.random.default_rng(0).normal(size=3000).astype(np.float32) / 10
    too_long = np.resize(question, omni.config.audio_encoder.max_samples + 500)
    fake = FakeSoundDevice([question, question[:100], too_long])
    pressed = iter([""] * 6)

    def press_enter(prompt: str) -> str:
        try:
            return next(pressed)
        except StopIteration:
            raise KeyboardInterrupt from None

    monkeypatch.setitem(sys.modules, "sounddevice", fake)
    monkeypatch.setattr("builtins.input", press_enter)
    monkeypatch.setattr(Omni, "from_pretrained", lambda name: omni)
    monkeypatch.setattr(omni, "warm_up", lambda: None)
    microphone.main(["--model", "small"])
    printed = capsys.readouterr()
    assert fake.rates == [omni.sample_rate] * 2
    for played, audio in zip(fake.played, (question, too_long[: omni.config.audio_encoder.max_samples]), strict=True):
        expected = omni.reply(audio, sample_rate=audio_io.SAMPLE_RATE)
        assert expected.audio is not None
        np.testing.assert_allclose(np.concatenate(played), expected.audio, atol=1e-4)
        assert expected.text in printed.out
    assert "recording: expected at least 20 ms" in printed.err


def test_microphone_example_without_sounddevice(microphone: types.ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sounddevice", None)
    with pytest.raises(SystemExit, match="pip install sounddevice"):
        microphone.main([])
