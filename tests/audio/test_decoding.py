"""Reading of every kind of recording, of headers that lie, and of files that are damaged."""

from __future__ import annotations

import io
import itertools
import logging
import os
import struct
import subprocess
import sys
import textwrap
import tracemalloc
from pathlib import Path
from types import SimpleNamespace

import av
import numpy as np
import pytest
import soundfile

from omni_jax.audio import decoding
from omni_jax.audio import io as audio_io
from omni_jax.errors import AudioError, AudioTooLongError
from tests.audio.recordings import KINDS, SECONDS, Kind, correlation, encode, source, voice

RECORDINGS = Path(__file__).parents[1] / "assets" / "recordings"


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_read_audio_of_kind(kind: Kind, tmp_path: Path) -> None:
    found = audio_io.read_audio(source(kind, encode(kind), tmp_path))
    seconds = len(found) / 16_000
    assert seconds + kind.padding >= SECONDS - 0.03
    assert seconds <= SECONDS + 0.03 + kind.padding
    lossless = kind.codec.startswith("pcm_s") or kind.codec in ("flac", "alac", "tta")
    assert correlation(found, 16_000, 0.03 + kind.padding) > (0.9999 if lossless else 0.9)


@pytest.mark.parametrize(
    ("container", "subtype"), [("WAV", "GSM610"), ("AU", "G721_32"), ("AIFF", "IMA_ADPCM"), ("WAV", "IMA_ADPCM")]
)
def test_read_audio_of_kind_that_libsndfile_writes(container: str, subtype: str) -> None:
    file = io.BytesIO()
    soundfile.write(file, voice(8000), 8000, format=container, subtype=subtype)
    found = audio_io.read_audio(file.getvalue())
    assert -0.03 < len(found) / 16_000 - SECONDS < 0.13
    assert correlation(found, 16_000, 0.1) > 0.9


@pytest.mark.parametrize("channels", [1, 2, 6])
@pytest.mark.parametrize("rate", [8000, 16_000, 44_100])
@pytest.mark.parametrize(
    ("container", "subtype"),
    [
        *(("WAV", subtype) for subtype in ("PCM_U8", "PCM_16", "PCM_24", "PCM_32", "FLOAT", "DOUBLE", "ULAW", "ALAW")),
        *(("FLAC", subtype) for subtype in ("PCM_S8", "PCM_16", "PCM_24")),
        *(("AIFF", "PCM_16"), ("AU", "PCM_24"), ("CAF", "FLOAT"), ("W64", "PCM_16"), ("RF64", "PCM_16")),
    ],
)
def test_samples_equal_those_of_libsndfile(container: str, subtype: str, rate: int, channels: int) -> None:
    """An independent reader; models answer a wav file as they did when it was the only one."""
    sound = 0.2 * np.random.default_rng(0).standard_normal((rate // 2 + 17, channels))
    file = io.BytesIO()
    soundfile.write(file, sound, rate, format=container, subtype=subtype)
    file.seek(0)
    samples, _ = soundfile.read(file, dtype="float32", always_2d=True)
    np.testing.assert_array_equal(audio_io.read_audio(file.getvalue(), rate), samples.mean(axis=1))


@pytest.mark.parametrize(
    ("name", "seconds"),
    [("chrome.webm", 1.965), ("iphone.m4a", 1.965), ("vbr_noxing.mp3", 2.052), ("mulaw8k.wav", 1.965)],
)
def test_read_audio_of_recordings_as_people_have_them(name: str, seconds: float) -> None:
    for given in (RECORDINGS / name, (RECORDINGS / name).read_bytes()):
        assert len(audio_io.read_audio(given)) / 16_000 == pytest.approx(seconds, abs=0.001)


def wav(size: int | None = None, riff: int | None = None, after: bytes = b"") -> bytes:
    """A wav file whose header gives other sizes than the true ones."""
    data = encode(Kind("wav", "pcm_s16le", 16_000))
    at = data.index(b"data") + 4
    size = int.from_bytes(data[at : at + 4], "little") if size is None else size
    riff = len(data) - 8 if riff is None else riff
    return data[:4] + struct.pack("<I", riff) + data[8:at] + struct.pack("<I", size) + data[at + 4 :] + after


NUM_BYTES = round(SECONDS * 16_000) * 2
CHUNK = b"LIST" + struct.pack("<I", 12) + b"INFOISFT" + bytes(4)


@pytest.mark.parametrize(
    ("data", "warns"),
    [
        (wav(0), False),
        (wav(0, riff=0), False),
        (wav(NUM_BYTES + 8), False),
        (wav(NUM_BYTES - 8), False),
        (wav(NUM_BYTES + 320_000), True),
        (wav(2_000_000_000), False),
        (wav(0x7FFFFFFF), False),
        (wav(0xFFFFFFFF, riff=0xFFFFFFFF), False),
        (wav(0xFFFFFFF0), False),
        # A recorder that is killed leaves the size of an earlier moment.
        (wav(4096), False),
        (wav(NUM_BYTES // 2), False),
        (wav(after=CHUNK), False),
        (wav(after=CHUNK + b"id3 " + struct.pack("<I", 3) + b"abc"), False),
    ],
)
def test_wav_header_that_lies(data: bytes, warns: bool, caplog: pytest.LogCaptureFixture) -> None:
    np.testing.assert_array_equal(audio_io.read_audio(data), audio_io.read_audio(wav()))
    assert [record.levelno for record in caplog.records] == [logging.WARNING] * warns


def test_wav_header_without_sound() -> None:
    data = wav()[: -NUM_BYTES - 4] + bytes(4)
    for following in (b"", CHUNK):
        with pytest.raises(AudioError, match="at least 20 ms"):
            audio_io.read_audio(data + following)


def test_header_that_claims_gigabytes() -> None:
    """libsndfile would allocate 48 GB for this GSM file."""
    file = io.BytesIO()
    soundfile.write(file, voice(8000, 1.0), 8000, format="WAV", subtype="GSM610")
    data = file.getvalue()
    at, fact = data.index(b"data") + 4, data.index(b"fact") + 8
    data = data[:fact] + b"\xff\xff\xff\x7f" + data[fact + 4 : at] + b"\xff\xff\xff\x7f" + data[at + 4 :]
    assert len(audio_io.read_audio(data)) == pytest.approx(16_000, abs=1000)


def test_metadata_that_claims_gigabytes(tmp_path: Path) -> None:
    """FFmpeg would fill 2 GB with zeros for this list with a title, and then find that the file ends."""
    data = wav()
    (tmp_path / "whole.wav").write_bytes(data)
    title = b"LIST" + struct.pack("<I", 0x7FFFFFF0) + b"INFOINAM" + struct.pack("<I", 0x7FFFFFD0)
    (tmp_path / "title.wav").write_bytes(data[:36] + title + data[36:])
    code = """
        import resource
        from omni_jax.audio.io import read_audio
        peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
        read_audio("whole.wav")
        before = peak()
        try:
            read_audio("title.wav")
        except ValueError as error:
            print(peak() - before, error)
    """
    command = [sys.executable, "-c", textwrap.dedent(code)]
    root = str(Path(__file__).parents[2])
    child = subprocess.run(command, cwd=tmp_path, env=os.environ | {"PYTHONPATH": root}, capture_output=True, text=True)
    megabytes, _, message = child.stdout.partition(" ")
    assert int(megabytes) < 100, child.stderr
    assert message.startswith("title.wav: expected audio")


STREAMS = {"mp2", "adts", "ac3", "eac3", "amr", "g722", "mulaw", "alaw", "mpegts", "mpeg", "vob", "voc"}
"""Containers that do not say how long they are."""
WARNED = {"wav", "w64", "aiff", "au", "caf-pcm", "avi-pcm"}
"""Those that are read to the end of what is there."""


@pytest.mark.parametrize("fraction", [0.2, 0.6, 0.95])
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind.container not in (*STREAMS, "flv")], ids=str)
def test_cut_file_is_not_shortened_in_silence(kind: Kind, fraction: float, caplog: pytest.LogCaptureFixture) -> None:
    data = encode(kind)
    data = data[: int(len(data) * fraction)]
    codec = "-pcm" if kind.codec.startswith("pcm") else ""
    if kind.container not in WARNED and kind.container + codec not in WARNED:
        with pytest.raises(AudioError, match="cut"):
            audio_io.read_audio(data)
        return
    found = audio_io.read_audio(data)
    assert "read to the end" in caplog.text
    assert abs(len(found) / 16_000 - SECONDS * fraction) < 0.2 + kind.padding


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind.container in STREAMS], ids=str)
def test_cut_stream_is_read_to_its_end(kind: Kind, tmp_path: Path) -> None:
    data = encode(kind)
    found = audio_io.read_audio(source(kind, data[: int(len(data) * 0.7)], tmp_path))
    assert len(found) / 16_000 == pytest.approx(SECONDS * 0.7, abs=0.3)


def test_mp3_that_begins_and_ends_within_a_frame() -> None:
    """As a recorder of a radio stream writes it."""
    whole = encode(Kind("mp3", "libmp3lame", 44_100, 2), seconds=3.0)
    found = audio_io.read_audio(whole[len(whole) // 3 + 100 : -100])
    assert len(found) / 16_000 == pytest.approx(2.0, abs=0.15)


def test_concatenated_mp3_is_read_whole() -> None:
    first, second = (encode(Kind("mp3", "libmp3lame", 16_000), seconds) for seconds in (1.0, 2.0))
    assert len(audio_io.read_audio(first + second)) / 16_000 == pytest.approx(3.0, abs=0.2)


@pytest.mark.parametrize("seconds", [0.1, 2.0])
def test_many_concatenated_mp3s_are_read_whole(seconds: float) -> None:
    """As a service writes that sends each sentence as a file of its own. Each begins with a frame without sound."""
    one = encode(Kind("mp3", "libmp3lame", 16_000), seconds)
    found = len(audio_io.read_audio(100 * one)) / 16_000
    # The encoder's delay and padding are known of the first one only.
    assert 100 * seconds <= found < 100 * (seconds + 0.12)


def test_mp3_that_is_mostly_undecodable_is_refused() -> None:
    first = encode(Kind("mp3", "libmp3lame", 16_000), 1.0)
    frame = first[-144:]
    with pytest.raises(AudioError, match=r"damaged or cut|cannot be decoded"):
        audio_io.read_audio(first + (frame[:4] + b"\xff" * 140) * 400)


def test_read_audio_holds_the_recording_once() -> None:
    """A stereo recording of a minute at 48 kHz; one at the wanted rate takes a sixth of its samples."""
    seconds = 60
    sound = np.tile(voice(48_000, 1.0), seconds)
    data = encode(Kind("ogg", "libopus", 48_000, 2), sound=sound)
    tracemalloc.start()
    try:
        found = audio_io.read_audio(data)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert len(found) == pytest.approx(16_000 * seconds, abs=100)
    # The buffer grows by an eighth at most; a block of stereo samples takes megabytes.
    assert peak < found.nbytes * 9 / 8 + 8e6


def test_decoding_is_bounded_by_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """At any moment: while the file is opened, while it is decoded, while its pages are checked."""
    data = encode(Kind("ogg", "libopus", 48_000), 5.0)
    clock = itertools.count()
    monkeypatch.setattr(decoding, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    monkeypatch.setattr(decoding, "MIN_SPEED", 1e9)
    monkeypatch.setattr(decoding, "MAX_DECODE_SECONDS", 1e9)
    audio_io.read_audio(data)
    ticks = next(clock) - 1
    for seconds in (0, 0.1 * ticks, 0.5 * ticks, 0.9 * ticks, ticks - 2):
        clock = itertools.count()
        monkeypatch.setattr(decoding, "MAX_DECODE_SECONDS", seconds)
        with pytest.raises(AudioError, match=r"recording: expected a recording that is decoded within \S+ s, found"):
            audio_io.read_audio(data)


def test_read_audio_without_a_limit_has_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoding, "MAX_SECONDS", 1.0)
    with pytest.raises(AudioTooLongError, match=r"at most 1\.00 s, found 1\.70 s"):
        audio_io.read_audio(encode(Kind("flac", "flac", 16_000)))


def test_mpegts_whose_format_changes() -> None:
    """A television recorder crosses the border of two programs."""
    first = encode(Kind("mpegts", "mp2", 48_000, 2), 1.0)
    second = encode(Kind("mpegts", "mp2", 32_000, 1), 1.0)
    assert len(audio_io.read_audio(first + second)) / 16_000 == pytest.approx(2.0, abs=0.15)


def test_webm_with_a_hole_is_refused_or_whole() -> None:
    data = encode(Kind("webm", "libopus", 48_000), 3.0)
    with pytest.raises(AudioError, match="damaged or cut"):
        audio_io.read_audio(data[: len(data) // 2])


def many_streams(*levels: float, video: bool = True) -> bytes:
    """A Matroska file with a stream of sound per level."""
    file = io.BytesIO()
    with av.open(file, "w", format="matroska") as container:
        streams = [container.add_stream("pcm_s16le", rate=16_000, layout="mono") for _ in levels]
        if video:
            pictures = container.add_stream("mpeg4", rate=25)
            pictures.width, pictures.height, pictures.pix_fmt = 64, 48, "yuv420p"
            picture = av.VideoFrame.from_ndarray(np.zeros((72, 64), np.uint8), format="yuv420p")
            container.mux(pictures.encode(picture))
            container.mux(pictures.encode(None))
        for stream, level in zip(streams, levels, strict=True):
            pcm = np.rint(voice(16_000) * level * 32767).astype(np.int16)
            frame = av.AudioFrame.from_ndarray(pcm[None], format="s16", layout="mono")
            frame.sample_rate = 16_000
            container.mux(stream.encode(frame))
    return file.getvalue()


def test_video_without_sound() -> None:
    with pytest.raises(AudioError, match=r"recording: expected a recording, found a video without a stream of sound"):
        audio_io.read_audio(many_streams())


def test_first_of_several_streams() -> None:
    found = audio_io.read_audio(many_streams(1.0, 0.1))
    assert np.abs(found).max() > 0.3
    assert correlation(found, 16_000) > 0.999


@pytest.mark.parametrize(
    "text",
    ["#EXTM3U\n#EXTINF:1,\nfile:///etc/passwd\n", "ffconcat version 1.0\nfile 'a.wav'\n", "v=0\no=- 0 0 IN IP4 1\n"],
)
def test_playlists_are_refused(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """FFmpeg would open the files and addresses in them."""
    monkeypatch.chdir(tmp_path)
    Path("a.wav").write_bytes(wav())
    for name in ("list.m3u8", "list.ffconcat", "list.sdp"):
        Path(name).write_text(text)
        with pytest.raises(AudioError, match="cannot be decoded"):
            audio_io.read_audio(name)


def test_opposite_phase_takes_one_channel() -> None:
    sound = voice(16_000)
    for right in (-sound, -0.9 * sound, -1.1 * sound):
        louder = sound if np.abs(right).max() <= np.abs(sound).max() else right
        np.testing.assert_array_equal(audio_io.to_mono(np.stack([sound, right], axis=1), 16_000), louder)
    for rate in (16_000, 48_000):
        # More than one block at 48 kHz.
        sound = voice(rate)
        found = audio_io.read_audio(encode(Kind("wav", "pcm_s16le", rate, 2), sound=np.stack([sound, -sound])))
        assert correlation(found, 16_000) > 0.9999
    sound = voice(16_000)
    # Different sounds, and sound on one side only, are averaged.
    other = np.random.default_rng(0).standard_normal(len(sound)).astype(np.float32) / 5
    for right in (other, 0 * sound, -0.5 * sound):
        np.testing.assert_allclose(
            audio_io.to_mono(np.stack([sound, right], axis=1), 16_000), (sound + right) / 2, atol=1e-6
        )


def test_read_audio_truncates() -> None:
    kind = Kind("wav", "pcm_s16le", 44_100, 2)
    whole = audio_io.read_audio(encode(kind, 3.0))
    beginning = audio_io.read_audio(encode(kind, 3.0), max_seconds=1.0, truncate=True)
    np.testing.assert_array_equal(beginning, whole[:16_000])
    np.testing.assert_array_equal(audio_io.read_audio(encode(kind, 3.0), max_seconds=4.0, truncate=True), whole)
    # Only the beginning is decoded: the end may be missing.
    opus = encode(Kind("ogg", "libopus", 48_000), 20.0)
    assert len(audio_io.read_audio(opus[:-100], max_seconds=1.0, truncate=True)) == 16_000


@pytest.mark.parametrize("container", ["ogg", "webm", "mp4"])
def test_read_audio_longer_than_max_seconds_of_small_file(container: str) -> None:
    """Silence takes a few bytes per second: 90 minutes must not be decoded to refuse them."""
    data = encode(Kind(container, "libopus", 48_000, bit_rate=6000), sound=np.zeros(48_000 * 300, np.float32))
    assert len(data) < 400_000
    with pytest.raises(AudioTooLongError, match=r"at most 30\.00 s, found 300\.\d\d s: .*\(truncate\)"):
        audio_io.read_audio(data, max_seconds=30.0)


def test_read_audio_refuses_what_is_not_an_ordinary_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.wav")
    for path, found in ((tmp_path / "pipe.wav", "a pipe"), (Path("/dev/zero"), "a device"), (tmp_path, "a folder")):
        with pytest.raises(AudioError, match=f"expected a recording, found {found}$"):
            audio_io.read_audio(path)
    with pytest.raises(AudioError, match="zero byte"):
        audio_io.read_audio("a\0.wav")


def test_read_audio_of_endless_or_text_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(audio_io, "MAX_STREAM_BYTES", 1 << 20)
    with Path("/dev/zero").open("rb") as file, pytest.raises(AudioError, match="at most 1048576 bytes, found more"):
        audio_io.read_audio(file)
    with pytest.raises(AudioError, match="opened in binary mode"):
        audio_io.read_audio(io.StringIO("text"))


def test_read_audio_of_bytes_like_objects() -> None:
    data = wav()
    for given in (data, bytearray(data), memoryview(data), io.BytesIO(data)):
        np.testing.assert_array_equal(audio_io.read_audio(given), audio_io.read_audio(data))


def test_to_mono_scales_integers_and_takes_channels_first() -> None:
    sound = voice(16_000)
    for dtype, scale, zero in ((np.uint8, 127, 128), (np.int16, 32767, 0), (np.int32, 2**31 - 128, 0)):
        found = audio_io.to_mono(np.rint(sound.astype(np.float64) * scale + zero).astype(dtype), 16_000)
        np.testing.assert_allclose(found, sound, atol=0.015 if dtype == np.uint8 else 1e-4)
    for channels in (1, 2, 32):
        array = np.stack([sound] * channels)
        np.testing.assert_allclose(audio_io.to_mono(array, 16_000), sound, atol=1e-6)


def test_importing_audio_io_does_not_import_ffmpeg() -> None:
    """It takes a tenth of a second, which only who reads a file should wait for."""
    code = "import sys, omni_jax.audio.io, omni_jax.audio.encoding; sys.exit('av' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
