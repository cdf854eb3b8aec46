import io

import numpy as np
import pytest
import soundfile

from omni_jax.audio import encoding
from omni_jax.audio import io as audio_io
from omni_jax.errors import AudioError
from tests.audio.test_io import sine


def test_write_audio_and_read_back(tmp_path):
    path = tmp_path / "out.wav"
    path.write_bytes(b"previous content")
    encoding.write_audio(path, sine(24_000, peak=1.5), 24_000)
    assert soundfile.info(path).subtype == "PCM_16"
    assert soundfile.info(path).samplerate == 24_000
    np.testing.assert_allclose(
        audio_io.read_audio(path, 24_000), np.clip(sine(24_000, peak=1.5), -1, 32767 / 32768), atol=1e-4
    )
    assert [file.name for file in tmp_path.iterdir()] == ["out.wav"]


def test_interrupted_write_audio_leaves_nothing(tmp_path, monkeypatch):
    path = tmp_path / "out.wav"
    path.write_bytes(b"previous content")

    def interrupted(self, data):
        with self.open("wb") as file:
            file.write(data[:100])
        raise KeyboardInterrupt

    monkeypatch.setattr(type(path), "write_bytes", interrupted)
    with pytest.raises(KeyboardInterrupt):
        encoding.write_audio(path, sine(24_000), 24_000)
    assert [file.name for file in tmp_path.iterdir()] == ["out.wav"]
    assert path.read_bytes() == b"previous content"


def test_write_audio_rejects(tmp_path):
    with pytest.raises(AudioError, match="expected a writable path, found No such file or directory"):
        encoding.write_audio(tmp_path / "absent" / "out.wav", sine(24_000), 24_000)
    with pytest.raises(AudioError, match=r"as \[samples\], found shape \(2, 3\)"):
        encoding.write_audio(tmp_path / "out.wav", np.zeros((2, 3), np.float32), 24_000)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("format", encoding.MEDIA_TYPES)
def test_encode(format):
    audio = sine(24_000, seconds=1.0)
    data = encoding.encode(audio, 24_000, format)
    if format in ("pcm", "pcm16"):
        assert data == audio_io.pcm_bytes(audio)
        np.testing.assert_array_equal(np.frombuffer(data, "<i2"), audio_io.to_pcm16(audio))
        return
    assert len(data) > 100
    if format in ("wav", "flac", "mp3", "ogg", "opus"):
        assert soundfile.info(io.BytesIO(data)).duration == pytest.approx(1.0, abs=0.02)
    found = audio_io.read_audio(data, 24_000)
    if format == "aac":
        # The container has no place for the delay of the encoder.
        assert len(found) - len(audio) <= 3 * 1024
        found = found[1024:]
    lossy = format not in ("wav", "flac")
    assert len(found) >= len(audio) if lossy else len(found) == len(audio)
    np.testing.assert_allclose(found[2000:20_000], audio[2000:20_000], atol=0.1 if lossy else 1 / 32768, rtol=0)


@pytest.mark.parametrize("rate", [7000, 17_000, 96_000])
@pytest.mark.parametrize("format", ["mp3", "opus", "m4a"])
def test_encode_at_rates_that_the_format_lacks(format, rate):
    found = audio_io.read_audio(encoding.encode(sine(rate, seconds=1.0), rate, format), 16_000)
    np.testing.assert_allclose(found[2000:14_000], sine(16_000, seconds=1.0)[2000:14_000], atol=0.15, rtol=0)


@pytest.mark.parametrize("format", encoding.FILE_FORMATS)
def test_encode_nothing(format):
    data = encoding.encode(np.zeros(0, np.float32), 24_000, format)
    if format == "aac":
        assert data == b""
    else:
        assert len(data) > 20


def test_encode_wav_has_its_length_in_its_header():
    data = encoding.encode(sine(24_000), 24_000, "wav")
    assert int.from_bytes(data[4:8], "little") == len(data) - 8
    assert int.from_bytes(data[40:44], "little") == len(data) - 44 == 2 * 12_000


def test_encode_rejects():
    with pytest.raises(AudioError, match=r"format: expected one of wav, .*, m4a, found 'midi'"):
        encoding.encode(sine(24_000), 24_000, "midi")
    with pytest.raises(AudioError, match="found NaN or infinity"):
        encoding.encode(np.full(100, np.nan, np.float32), 24_000, "mp3")


@pytest.mark.parametrize("format", encoding.FILE_FORMATS)
def test_write_audio_by_suffix(tmp_path, format):
    path = tmp_path / f"a.{format.upper()}"
    encoding.write_audio(path, sine(24_000), 24_000)
    heads = {"wav": b"RIFF", "flac": b"fLaC", "ogg": b"OggS", "opus": b"OggS", "m4a": b"ftyp", "aac": b"\xff\xf1"}
    assert heads.get(format, b"Info") in path.read_bytes()[:300]
    assert len(audio_io.read_audio(path, 24_000)) >= 12_000


@pytest.mark.parametrize("name", ["a.txt", "a", "a.pcm", ".wav"])
def test_write_audio_refuses_other_suffixes(tmp_path, name):
    with pytest.raises(AudioError, match=r"ends in \.wav, \.flac, \.mp3, \.ogg, \.opus, \.aac, \.m4a, found"):
        encoding.write_audio(tmp_path / name, sine(24_000), 24_000)


def test_streaming_wav_header():
    pcm = audio_io.pcm_bytes(sine(24_000))
    data = encoding.streaming_wav_header(24_000) + pcm
    np.testing.assert_array_equal(
        audio_io.to_pcm16(audio_io.read_audio(io.BytesIO(data), 24_000)), np.frombuffer(pcm, "<i2")
    )
