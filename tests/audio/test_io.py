import io

import numpy as np
import pytest
import soundfile

from omni_jax.audio import io as audio_io
from omni_jax.errors import AudioError, AudioTooLongError


def sine(rate, seconds=0.5, frequency=440.0, peak=0.5):
    return (peak * np.sin(2 * np.pi * frequency * np.arange(round(rate * seconds)) / rate)).astype(np.float32)


def encode(audio, rate=16_000, **options):
    buffer = io.BytesIO()
    soundfile.write(buffer, audio, rate, **{"format": "WAV", "subtype": "FLOAT", **options})
    return buffer.getvalue()


FORMATS = {  # with the largest difference from the original
    ("WAV", "PCM_U8", ".wav"): 1 / 128,
    ("WAV", "PCM_16", ".wav"): 1 / 16384,
    ("WAV", "PCM_24", ".wav"): 1e-6,
    ("WAV", "FLOAT", ".wav"): 0,
    ("WAV", "DOUBLE", ".wav"): 0,
    ("FLAC", "PCM_16", ".flac"): 1 / 16384,
    ("OGG", "VORBIS", ".ogg"): 0.1,
    ("MP3", "MPEG_LAYER_III", ".mp3"): 0.1,
    ("WAV", "PCM_16", ".misnamed"): 1 / 16384,
}


@pytest.mark.parametrize(("container", "subtype", "suffix"), FORMATS)
def test_read_audio_formats(tmp_path, container, subtype, suffix):
    audio = sine(16_000)
    path = tmp_path / f"clip{suffix}"
    path.write_bytes(encode(audio, format=container, subtype=subtype))
    for source in (path, str(path), io.BytesIO(path.read_bytes())):
        found = audio_io.read_audio(source)
        assert found.dtype == np.float32
        assert found.shape == audio.shape
        # Lossy codecs disturb the edges of a clip that begins and ends at once.
        inner = slice(2000, -2000) if suffix in (".ogg", ".mp3") else slice(None)
        np.testing.assert_allclose(found[inner], audio[inner], atol=FORMATS[container, subtype, suffix], rtol=0)


@pytest.mark.parametrize("rate", [8000, 22_050, 44_100, 48_000])
def test_resampling_keeps_frequency_and_level(rate):
    found = audio_io.read_audio(io.BytesIO(encode(sine(rate, seconds=1.0), rate)))
    assert found.shape == (16_000,)
    inner = slice(1000, -1000)
    np.testing.assert_allclose(found[inner], sine(16_000, seconds=1.0)[inner], atol=1e-3)


def test_resampling_removes_aliases():
    # 10 kHz would alias to 6 kHz at a rate of 16 kHz.
    both = sine(48_000, 1.0) + sine(48_000, 1.0, frequency=10_000.0)
    found = audio_io.to_mono(both, 48_000)
    np.testing.assert_allclose(found[1000:-1000], sine(16_000, 1.0)[1000:-1000], atol=1e-3)


def test_read_audio_at_other_rate():
    np.testing.assert_array_equal(audio_io.read_audio(io.BytesIO(encode(sine(24_000), 24_000)), 24_000), sine(24_000))


def test_read_audio_averages_channels():
    left, right = sine(16_000), sine(16_000, frequency=300.0)
    found = audio_io.read_audio(io.BytesIO(encode(np.stack([left, right], axis=1))))
    np.testing.assert_allclose(found, (left + right) / 2, atol=1e-7)


def broken(audio, value):
    audio = audio.copy()
    audio[100] = value
    return audio


FLAC = encode(sine(16_000), format="FLAC", subtype="PCM_16")
MP3 = encode(sine(16_000), format="MP3", subtype="MPEG_LAYER_III")
VORBIS = encode(sine(16_000, seconds=4.0), format="OGG", subtype="VORBIS")
OPUS = encode(sine(16_000, seconds=4.0), format="OGG", subtype="OPUS")


def damaged(data, fraction):
    """Eight bytes overwritten at this fraction of a file."""
    at = int(len(data) * fraction)
    return data[:at] + b"damaged!" + data[at + 8 :]


BAD = {
    "empty": (b"", r"found an empty file \(0 bytes\)"),
    "no samples": (encode(np.zeros(0, np.float32)), "at least 20 ms of sound, found no samples"),
    "text": (
        b"certainly not sound\n" * 50,
        r"expected audio .* found 1000 bytes that cannot be decoded .*another kind of file",
    ),
    "zeros": (bytes(1000), "cannot be decoded"),
    "cut in the header": (encode(sine(16_000))[:30], "cannot be decoded"),
    "flac cut in the data": (FLAC[: len(FLAC) // 2], "damaged or cut"),
    "flac with a hole": (damaged(FLAC, 0.5), "damaged or cut"),
    "mp3 cut in the data": (MP3[: len(MP3) // 2], r"found \d+ of 16 frames \(damaged or cut\)"),
    "vorbis cut within a page": (VORBIS[:-100], "damaged or cut"),
    "vorbis cut in a page's header": (VORBIS[: VORBIS.rindex(b"OggS") + 20], "damaged or cut"),
    "opus cut within a page": (OPUS[:-100], "damaged or cut"),
    "vorbis with a hole": (damaged(VORBIS, 0.5), "damaged or cut"),
    "opus with a hole in its last page": (damaged(OPUS, 0.99), "damaged or cut"),
    "1 Hz": (encode(sine(16_000), 1), "sample rate of 1000 to 1000000 Hz, found 1"),
    "NaN": (encode(broken(sine(16_000), np.nan)), "expected finite samples, found NaN or infinity"),
    "infinity": (encode(broken(sine(16_000), -np.inf)), "expected finite samples, found NaN or infinity"),
    "zero signal": (encode(np.zeros(16_000, np.float32)), "expected sound, found silence"),
    "nearly silent": (encode(sine(16_000, peak=0.9e-4)), "expected sound, found silence"),
    "silent below 8 kHz": (
        encode(sine(48_000, frequency=15_000.0) * np.hanning(24_000), 48_000),
        "expected sound, found silence",
    ),
    "too short": (
        encode(sine(48_000, peak=0.5)[:959], 48_000),
        r"at least 20 ms of sound, found 19\.98 ms \(959",
    ),
    "three samples": (encode(sine(16_000)[1:4]), r"found 0\.1875 ms \(3 samples at 16000 Hz\)"),
    "not scaled": (encode(30_000 * sine(16_000)), "within -1..1, found a peak of 15000"),
}


@pytest.mark.parametrize("name", BAD)
def test_read_audio_rejects_bad_recordings(tmp_path, name):
    data, message = BAD[name]
    path = tmp_path / "clip.wav"
    path.write_bytes(data)
    with pytest.raises(AudioError, match=message) as info:
        audio_io.read_audio(path)
    assert str(info.value).startswith(f"{path}: expected ")
    assert "\n" not in str(info.value)
    with pytest.raises(AudioError, match=message) as info:
        audio_io.read_audio(io.BytesIO(data))
    assert str(info.value).startswith("recording: expected ")


def test_read_audio_of_missing_or_unreadable_file(tmp_path):
    with pytest.raises(AudioError, match=r"absent\.wav: expected a recording, found no such file"):
        audio_io.read_audio(tmp_path / "absent.wav")
    with pytest.raises(AudioError, match="found a folder"):
        audio_io.read_audio(tmp_path)
    (tmp_path / "file").write_bytes(b"x")
    with pytest.raises(AudioError, match="expected a recording, found a file that cannot be read: Not a directory"):
        audio_io.read_audio(tmp_path / "file" / "clip.wav")


def test_to_mono_takes_shortest_and_faintest_recordings():
    assert audio_io.to_mono(sine(16_000)[:320], 16_000).shape == (320,)
    assert audio_io.to_mono(sine(16_000, peak=1.1e-4), 16_000).shape == (8000,)
    assert np.abs(audio_io.to_mono(sine(16_000, peak=2.0), 16_000)).max() > 1.99


def test_read_wav_of_unknown_length():
    data = encode(sine(16_000), subtype="PCM_16")
    at = data.index(b"data") + 4
    for size in (b"\xff\xff\xff\xff", b"\x00\xf0\xff\x7f"):
        assert audio_io.read_audio(io.BytesIO(data[:at] + size + data[at + 4 :])).shape == (8000,)


def test_read_mp3_without_xing_table():
    """Without the first frame, which has the table, libsndfile estimates the length from the first bitrate."""
    # Silence, which takes few bits, then noise, which takes many: the estimate from the first frame is far off.
    sound = 0.1 * np.random.default_rng(0).standard_normal(64_000).astype(np.float32) * (np.arange(64_000) > 8_000)
    whole = encode(sound, format="MP3", subtype="MPEG_LAYER_III")
    bare = whole[288:]  # a frame of 64 kbit/s and 576 samples at 16 kHz
    assert whole[288:290] == whole[:2]
    assert b"Xing" in whole
    assert b"Xing" not in bare
    with soundfile.SoundFile(io.BytesIO(bare)) as file:
        assert file.frames > len(file.read()), "the estimate must be wrong for this test"
    assert len(audio_io.read_audio(io.BytesIO(bare))) >= len(sound)
    # A tag in front changes nothing; in a file with a table, the length is exact.
    tag = b"ID3\4\0\0" + bytes([0, 0, 2, 3]) + b"Xing".ljust(2 * 128 + 3, b"\0")
    assert len(audio_io.read_audio(io.BytesIO(tag + bare))) >= len(sound)
    assert len(audio_io.read_audio(io.BytesIO(tag + whole))) == len(sound)
    with pytest.raises(AudioError, match="damaged or cut"):
        audio_io.read_audio(io.BytesIO(tag + whole[: len(whole) // 2]))


@pytest.mark.parametrize(("dtype", "scale"), [("i2", 1e4), ("i4", 1e9), ("f4", 0.5), ("f8", 0.5)])
def test_to_mono_takes_big_endian_arrays(dtype, scale):
    native = (sine(16_000) * scale).astype(dtype)
    samples = native.astype(f">{dtype}")
    np.testing.assert_array_equal(audio_io.to_mono(samples, 16_000), audio_io.to_mono(native, 16_000))


def test_to_mono_takes_arrays_and_lists():
    audio = sine(16_000)
    np.testing.assert_array_equal(audio_io.to_mono(audio, 16_000), audio)
    np.testing.assert_array_equal(audio_io.to_mono(audio[:, None], 16_000), audio)
    np.testing.assert_array_equal(audio_io.to_mono(list(audio), 16_000), audio)
    np.testing.assert_allclose(audio_io.to_mono(audio.astype(np.float64), 16_000), audio)
    pcm = audio_io.to_pcm16(audio)
    np.testing.assert_array_equal(audio_io.to_mono(pcm, 16_000), pcm / 32768.0)
    np.testing.assert_array_equal(audio_io.to_pcm16(audio_io.to_mono(pcm, 16_000)), pcm)
    np.testing.assert_allclose(audio_io.to_mono(np.stack([pcm, pcm], axis=1), 16_000), audio, atol=1 / 32768)
    assert audio_io.to_mono(sine(48_000), 48_000).shape == (8000,)


@pytest.mark.parametrize(
    ("array", "rate", "message"),
    [
        (
            sine(16_000).reshape(2, 2, -1),
            16_000,
            r"expected \[samples\] or \[samples, channels\], found shape",
        ),
        (np.float32(0.5), 16_000, r"expected \[samples\] or \[samples, channels\], found shape \(\)"),
        (np.ones((33, 8000), np.float32), 16_000, r"at most 32 channels, found shape \(33, 8000\)"),
        (np.ones(8000, np.int64), 16_000, "expected floating point, uint8, int16 or int32 samples, found int64"),
        (np.ones(8000, bool), 16_000, "found bool"),
        (np.ones(8000, np.complex64), 16_000, "found complex64"),
        (sine(16_000), 0, "expected a sample rate of 1000 to 1000000 Hz, found 0"),
        (sine(16_000), 2**31 - 1, "expected a sample rate of 1000 to 1000000 Hz, found 2147483647"),
        (sine(16_000), 999, "expected a sample rate of 1000 to 1000000 Hz, found 999"),
        (np.zeros((0, 2), np.float32), 16_000, "found no samples"),
        (np.zeros(8000, np.int16), 16_000, "found silence"),
        (broken(sine(16_000), np.nan), 16_000, "found NaN or infinity"),
        (sine(16_000)[:319], 16_000, "at least 20 ms"),
    ],
)
def test_to_mono_rejects(array, rate, message):
    with pytest.raises(AudioError, match=message):
        audio_io.to_mono(array, rate)


def test_check_duration():
    audio = sine(16_000, seconds=2.0)
    assert audio_io.check_duration(audio, 32_000, truncate=False) is audio
    with pytest.raises(AudioTooLongError, match=r"^array: .* at most 1\.50 s, found 2\.00 s: .*truncate") as error:
        audio_io.check_duration(audio, 24_000, truncate=False)
    assert error.value.max_seconds == 1.5
    np.testing.assert_array_equal(audio_io.check_duration(audio, 24_000, truncate=True), audio[:24_000])


def test_to_pcm16_clips_and_rounds():
    audio = np.array([0.0, 1.0, -1.0, 1.5, -7.0, 0.5, 1.4 / 32768, 1.6 / 32768, -1.6 / 32768], np.float32)
    pcm = audio_io.to_pcm16(audio)
    assert pcm.dtype == np.int16
    assert pcm.tolist() == [0, 32767, -32768, 32767, -32768, 16384, 1, 2, -2]
    with pytest.raises(AudioError, match="found NaN or infinity"):
        audio_io.to_pcm16(np.array([np.nan], np.float32))


def encoded(seconds: float, format: str, subtype: str | None = None, channels: int = 1) -> io.BytesIO:
    file = io.BytesIO()
    sound = 0.1 * np.sin(np.arange(int(seconds * 16_000)) / 9)
    soundfile.write(file, np.repeat(sound[:, None], channels, 1), 16_000, format=format, subtype=subtype)
    file.seek(0)
    return file


@pytest.mark.parametrize("format", ["WAV", "FLAC", "MP3", "OGG"])
def test_read_audio_longer_than_max_seconds(format):
    # MP3 has a little silence before and after.
    assert len(audio_io.read_audio(encoded(1.0, format), max_seconds=1.2)) >= 16_000
    with pytest.raises(
        AudioTooLongError, match=r"expected a recording of at most 0\.90 s, found (1\.\d\d s|more)"
    ) as error:
        audio_io.read_audio(encoded(1.0, format), max_seconds=0.9)
    assert error.value.max_seconds == 0.9


def test_read_audio_with_too_many_channels():
    wide = encoded(0.1, "WAV", channels=33)
    assert len(audio_io.read_audio(wide)) == 1600
    wide.seek(0)
    with pytest.raises(AudioError, match="expected at most 32 channels, found 33"):
        audio_io.read_audio(wide, max_seconds=1.0)
