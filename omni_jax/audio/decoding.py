"""Media files to samples, by FFmpeg (PyAV): containers, codecs, lengths that headers promise, and damage.

A format that promises its length or marks its frames (MP4, WebM, Ogg, FLAC, MP3 with a table, ...) is refused where
something is missing. A plain series of samples or frames (wav, aiff, au, MP3 without a table, AAC without a container)
is read to the end of what is there, whatever its header says; what is missing is a warning in the log.
"""

from __future__ import annotations

import ctypes
import io
import logging
import struct
import time
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, cast

import numpy as np

from omni_jax.errors import AudioError, AudioTooLongError

if TYPE_CHECKING:
    import av
    from av.audio.frame import AudioFrame
    from av.audio.stream import AudioStream
    from av.container import InputContainer

logger = logging.getLogger(__name__)

MAX_CHANNELS = 32
"""Most channels of a recording whose size is limited, and of an array."""
MAX_MISSING_SECONDS = 0.1
"""A promised length may be so much longer than the sound: containers round, and count the padding of encoders."""
MAX_FRAME_SAMPLES = 8192
"""The longest frame of Vorbis, of which a part may be padding. The frames of the others are shorter."""
NEGLIGIBLE_SECONDS = 0.02
"""A wav header may be off by so much without a warning."""
MAX_UNDECODABLE = 50
"""So many packets in a row may be refused by a decoder, where nothing promises that there are none. Where files are
joined one is, between any two."""
MAX_SECONDS = 12 * 3600.0
"""Longest recording that is decoded where the caller sets no limit: 2.8 GB at 16 kHz."""
MAX_DECODE_SECONDS = 60.0
"""A file may take so long to decode, and `MIN_SPEED` adds to it: some make a decoder work without an end and give no
sound."""
MIN_SPEED = 4.0
"""For so many seconds of sound, decoding may take a second more. A processor core decodes hundreds."""
MAX_ALLOCATION = 256 << 20
"""Most bytes that FFmpeg allocates at once. The index of a day of sound, or a picture of a film, is below."""
BLOCK_SAMPLES = 1 << 16
"""Samples of a channel that are converted at once."""

CONTAINERS = (
    "aac ac3 aiff alaw amr amrnb amrwb ape asf au avi avr caf dts eac3 flac flv g722 gsm iff ircam loas matroska mov "
    "mp3 mpc mpc8 mpeg mpegts mulaw nistsphere ogg pvf rm tta voc w64 wav wv"
)
"""FFmpeg's names. Its other demuxers are not for recordings, or open other files and addresses, as playlists do."""
DECODERS = (
    "aac aac_latm ac3 adpcm_g726 adpcm_g726le adpcm_ima_qt adpcm_ima_wav adpcm_ms adpcm_swf adpcm_yamaha alac amrnb "
    "amrwb ape atrac3 cook dca eac3 flac g722 g723_1 g726 g726le g729 gsm gsm_ms ilbc libopencore_amrnb "
    "libopencore_amrwb libopus mp1 mp1float mp2 mp2float mp3 mp3float mpc7 mpc8 nellymoser opus pcm_alaw pcm_f32be "
    "pcm_f32le pcm_f64be pcm_f64le pcm_mulaw pcm_s16be pcm_s16be_planar pcm_s16le pcm_s16le_planar pcm_s24be pcm_s24le "
    "pcm_s24le_planar pcm_s32be pcm_s32le pcm_s32le_planar pcm_s64be pcm_s64le pcm_s8 pcm_s8_planar pcm_u16be "
    "pcm_u16le pcm_u24be pcm_u24le pcm_u32be pcm_u32le pcm_u8 qcelp ra_144 ra_288 real_144 real_288 sipr speex tta "
    "vorbis wavpack wmalossless wmapro wmav1 wmav2 wmavoice"
)
"""FFmpeg's names of the codecs of sound. Pictures are never decoded."""

HEADERLESS = {
    ".al": "al",
    ".alaw": "al",
    ".g722": "g722",
    ".gsm": "gsm",
    ".ul": "ul",
    ".ulaw": "ul",
    ".mulaw": "ul",
}
"""Suffixes of telephone formats that nothing else identifies, and FFmpeg's suffix. They have 8000 samples per second
(G.722: 16,000). All other files are recognized by content."""

_OGG_VORBIS = ("ogg", "vorbis")
_PROMISING = {"mov", "matroska", "flac", "ogg", "asf", "avi", "caf", "ape", "tta", "wv", "mpc", "mpc8", "flv"}
_PLAIN = {"wav", "w64", "aiff", "au"}


def decode(
    file: BinaryIO, name: str, *, max_seconds: float | None = None, truncate: bool = False
) -> Iterator[tuple[np.ndarray, int]]:
    """The sound of a media file: of the stream that a player would choose, if it has several.

    It comes in blocks, so that memory never holds more of it than the caller keeps, and never what a header claims.
    That something is missing is found at the end: what came before an error is not the recording.

    Args:
        file: seekable, at its beginning. A `name` that ends in a suffix of `HEADERLESS` is taken into account.
        name: of the recording, in messages.
        max_seconds: refuse a longer recording, and one of more than `MAX_CHANNELS`. None: `MAX_SECONDS`, and any
            number of channels.
        truncate: decode only the first `max_seconds` of a longer recording, instead of refusing it.

    Yields:
        Blocks of samples f32 [samples, channels] with their rates. The format may change within a file.

    Raises:
        AudioTooLongError: it is longer than `max_seconds`.
        AudioError: it is not audio, it is damaged or ends early, or it takes too long (`MAX_DECODE_SECONDS`).
    """
    import av

    timed = _TimedFile(file, name)
    head = _Head.read(timed)
    options = {"format_whitelist": CONTAINERS.replace(" ", ","), "codec_whitelist": DECODERS.replace(" ", ",")}
    if head.ignore_wav_length:
        options["ignore_length"] = "1"
    if timed.name.endswith((".ul", ".al")):
        options["sample_rate"] = "8000"
    try:
        with _open_container(timed, head, options) as container:
            stream = _audio_stream(container, name)
            num_channels = stream.codec_context.channels
            if max_seconds is not None and num_channels > MAX_CHANNELS:
                raise AudioError(f"{name}: expected at most {MAX_CHANNELS} channels, found {num_channels}")
            limit = MAX_SECONDS if max_seconds is None else max_seconds
            reader = _Reader(name, container, stream, head, timed, limit, truncate)
            yield from reader.read()
    except (av.FFmpegError, MemoryError) as error:
        reason = getattr(error, "strerror", None) or "out of memory"
        raise AudioError(
            f"{name}: expected audio (wav, flac, ogg, mp3, m4a, webm, ...), "
            f"found {head.size} bytes that cannot be decoded ({reason}): another kind of file, or damaged or cut"
        ) from None
    if not reader.truncated:
        if not _is_intact_ogg(timed):
            raise reader.damaged("a page that is incomplete or has the wrong checksum")
        if not _is_whole_matroska(timed, head.size):
            raise reader.damaged(f"an incomplete block after {reader.seconds:.2f} s")


class _TimedFile(io.RawIOBase):
    """A file that cannot be read for longer than a recording may take: whatever reads it ends then."""

    def __init__(self, file: BinaryIO, recording: str):
        self.file = file
        self.recording = recording
        self.name = str(getattr(file, "name", ""))
        """FFmpeg looks at its suffix."""
        self.seconds = 0.0
        """Of sound, decoded so far."""
        self._start = time.monotonic()

    def check(self) -> None:
        """Raises: AudioError: the time is over."""
        if time.monotonic() - self._start > MAX_DECODE_SECONDS + self.seconds / MIN_SPEED:
            raise AudioError(
                f"{self.recording}: expected a recording that is decoded within {MAX_DECODE_SECONDS:g} s, "
                f"found {self.seconds:.2f} s of sound in that time: damaged, or made to keep a decoder busy"
            )

    def read(self, size: int = -1) -> bytes:
        self.check()
        return self.file.read(size)

    def seek(self, offset: int, whence: int = 0) -> int:
        return self.file.seek(offset, whence)

    def tell(self) -> int:
        return self.file.tell()

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True


@cache
def _limit_allocations() -> None:
    """Let FFmpeg allocate at most `MAX_ALLOCATION` at once: it allocates what a header claims, and fills it with zeros.

    PyAV has no function for that. Its wheels have FFmpeg's libraries in a folder of their own, whose one copy in memory
    is the one that is opened here; where FFmpeg comes from elsewhere, nothing is limited.
    """
    import av

    package = Path(av.__file__).parent
    for folder in (package.with_name("av.libs"), package / ".dylibs"):
        for library in folder.glob("libavutil*"):
            ctypes.CDLL(str(library)).av_max_alloc(ctypes.c_size_t(MAX_ALLOCATION))


def _open_container(file: _TimedFile, head: _Head, options: dict[str, str]) -> InputContainer:
    import av

    _limit_allocations()
    try:
        return av.open(file, "r", metadata_errors="ignore", options=options)
    except av.InvalidDataError:
        if not head.is_mp3:
            raise
        # FFmpeg does not recognize joined MP3 files of a few frames each.
        file.seek(0)
        return av.open(file, "r", format="mp3", metadata_errors="ignore", options=options)


def _audio_stream(container: InputContainer, name: str) -> AudioStream:
    stream = container.streams.best("audio")
    if stream is None:
        kind = "a video" if container.streams.video else f"a file ({container.format.long_name})"
        found = f"{kind} without a stream of sound: it has none, or it is cut"
        raise AudioError(f"{name}: expected a recording, found {found}")
    codec = stream.codec_context
    if codec is None or codec.name not in DECODERS.split():
        found = "an unknown codec" if codec is None else f"the codec {codec.name}"
        raise AudioError(f"{name}: expected sound in a common codec, found {found}")
    if codec.name == "flac":
        # There is a checksum per frame.
        codec.options = {"err_detect": "crccheck+explode"}
    if (container.format.name, codec.name) in (("caf", "alac"), _OGG_VORBIS):
        # FFmpeg would drop too much of the end: of CAF what the last frame lacks already, of Ogg as much as at the
        # beginning.
        codec.options = {"flags2": "skip_manual"}
    return cast("AudioStream", stream)


@dataclass
class _Reader:
    """Decodes one stream; knows how much it promised and how much there was."""

    name: str
    container: InputContainer
    stream: AudioStream
    head: _Head
    file: _TimedFile
    max_seconds: float
    truncate: bool
    truncated: bool = False
    end: float = 0.0
    """The latest time stamp of any packet, in seconds."""
    num_decoded: int = 0
    """Packets that were decoded."""
    num_undecodable: int = 0
    num_in_a_row: int = 0
    """The last ones of them, with none between that could be decoded."""
    reason: str = ""
    """Why the last of them could not be decoded."""
    last_is_cut: bool = False

    @property
    def format(self) -> str:
        """The first of FFmpeg's names of the container."""
        return self.container.format.name.partition(",")[0]

    @property
    def is_plain(self) -> bool:
        """Whether the sound is read to its end, whatever the header says."""
        return self.format in _PLAIN or self.stream.codec_context.name.startswith("pcm_")

    def damaged(self, found: str) -> AudioError:
        """The error for a file of which something is missing."""
        return AudioError(f"{self.name}: expected all the sound its header promises, found {found} (damaged or cut)")

    @property
    def seconds(self) -> float:
        """Decoded so far."""
        return self.file.seconds

    def read(self) -> Iterator[tuple[np.ndarray, int]]:
        """All blocks; see `decode`."""
        collected: _Block | None = None
        num_formats = 0
        for frame in map(_packed_if_wide, self._frames()):
            form = (frame.sample_rate, frame.layout.nb_channels, frame.format.is_planar)
            if collected is None or collected.form != form:
                if collected is not None:
                    yield from collected.take()
                collected = _Block(form)
                num_formats += 1
            collected.append(frame.to_ndarray())
            excess = self._count_excess(frame.samples, frame.sample_rate)
            if excess > 0:
                collected.drop(excess)
                self.truncated = True
                break
            if collected.num_samples >= BLOCK_SAMPLES + MAX_FRAME_SAMPLES:
                # The last ones may be padding.
                yield from collected.take(keep=MAX_FRAME_SAMPLES)
        else:
            self._check_complete()
            if num_formats == 1 and collected is not None:
                self._drop_padding(collected)
        if collected is not None:
            yield from collected.take()

    def _drop_padding(self, collected: _Block) -> None:
        """Drop what an encoder added to its last frame, by the length that MP4 and Ogg give; FFmpeg leaves some."""
        promised = self._promised_seconds() if self.format in ("mov", "ogg") else None
        num_samples = 0 if promised is None else round((self.seconds - promised) * collected.form[0])
        if 0 < num_samples <= MAX_FRAME_SAMPLES:
            collected.drop(num_samples)

    def _count_excess(self, num_samples: int, rate: int) -> int:
        """How many of the samples so far are beyond the limit, after so many more. Raises: AudioTooLongError."""
        self.file.seconds += num_samples / rate
        excess = round((self.seconds - self.max_seconds) * rate)
        if excess < 1 or self.truncate:
            return excess
        promised = self._promised_seconds()
        found = f"{promised:.2f} s" if promised is not None and promised > self.max_seconds else "more"
        raise too_long(self.name, self.max_seconds, found)

    def _frames(self) -> Iterator[AudioFrame]:
        import av

        time_bases = {stream.index: float(stream.time_base or 0) for stream in self.container.streams}
        for packet in self.container.demux():
            self.file.check()
            if packet.pts is not None:
                end = (packet.pts + (packet.duration or 0)) * time_bases.get(packet.stream_index, 0)
                self.end = max(self.end, end)
            if packet.stream_index != self.stream.index:
                continue
            self.last_is_cut = packet.is_corrupt or (self.last_is_cut and not packet.size)
            try:
                frames = packet.decode()
            except av.FFmpegError as error:
                self._count_undecodable(error)
                continue
            if packet.size:
                self.num_decoded += 1
                self.num_in_a_row = 0
                if self.num_decoded == 1 and (self.format, self.stream.codec_context.name) == _OGG_VORBIS:
                    # The first half of an overlap, which is no sound.
                    continue
            yield from frames  # type: ignore[misc]

    def _count_undecodable(self, error: av.FFmpegError) -> None:
        """Allow some in a series of frames without a length: its recorder begins and ends anywhere, or joins pieces."""
        self.num_undecodable += 1
        self.num_in_a_row += 1
        self.reason = error.strerror or "unknown error"
        if self.num_in_a_row > MAX_UNDECODABLE:
            found = f"more than {MAX_UNDECODABLE} packets in a row that cannot be decoded: {self.reason}"
            raise self.damaged(found)

    def _check_complete(self) -> None:
        """Compare what the header promised with what there was."""
        if self.num_undecodable and not self.num_decoded:
            raise self.damaged(f"no packet that can be decoded: {self.reason}")
        size = self.head.size
        missing = (self.head.promised_bytes or 0) - size
        promised_seconds = self._promised_seconds()
        if self.is_plain:
            if self.head.promised_bytes is not None:
                promised_seconds = self.seconds * (1 + missing / size)
            if promised_seconds is not None and promised_seconds - self.seconds > NEGLIGIBLE_SECONDS:
                logger.warning(
                    "%s: its header promises %.2f s, found %.2f s: read to the end",
                    *(self.name, promised_seconds, self.seconds),
                )
            return
        if self.format == "mp3":
            # Some encoders count the frame that has the table.
            frames = self.head.mp3_frames or 0
            if self.num_decoded < frames - 1 or (self.num_decoded < frames and missing > 0):
                raise self.damaged(f"{self.num_decoded} of {frames} frames")
            if missing > 0:
                logger.warning("%s: its table promises %d more bytes: read to the end", self.name, missing)
        elif missing > 0:
            raise self.damaged(f"{size} of {self.head.promised_bytes} bytes")
        if promised_seconds is not None:
            found = max(self.seconds, self.end)
            if self.last_is_cut or self.num_undecodable or found < promised_seconds - MAX_MISSING_SECONDS:
                raise self.damaged(f"{self.seconds:.2f} of {promised_seconds:.2f} s")
        elif self.last_is_cut or self.num_undecodable:
            logger.warning(
                "%s: %d packets cannot be decoded: read to the end without them, %.2f s",
                *(self.name, self.num_undecodable or 1, self.seconds),
            )

    def _promised_seconds(self) -> float | None:
        """The length in the header; None if there is none, or FFmpeg has estimated it."""
        if self.format not in _PROMISING | _PLAIN or (self.format == "matroska" and not self.head.has_duration):
            return None
        if self.stream.duration is not None and self.stream.time_base is not None:
            return float(self.stream.duration * self.stream.time_base)
        return None if self.container.duration is None else self.container.duration / 1e6


def too_long(name: str, max_seconds: float, found: str) -> AudioTooLongError:
    """The error for a recording that is longer than a limit."""
    message = f"{name}: expected a recording of at most {max_seconds:.2f} s, found {found}: "
    return AudioTooLongError(message + "shorten it, or use its beginning only (truncate)", max_seconds=max_seconds)


def _packed_if_wide(frame: AudioFrame) -> AudioFrame:
    """The same frame, its channels interleaved if there are eight or more.

    PyAV 18 looks for a null pointer behind the planes, which is not there after eight: it reads what is not memory.
    """
    if not frame.format.is_planar or frame.layout.nb_channels < 8:
        return frame
    import av

    return av.AudioResampler(format=frame.format.packed.name).resample(frame)[0]


@dataclass
class _Block:
    """Samples of one format, collected: many frames are converted at once, which is faster."""

    form: tuple[int, int, bool]
    """Samples per second, channels, and whether each channel is separate in a frame."""
    frames: list[np.ndarray] = field(default_factory=list)
    """As they were decoded: [channels, samples] or [1, samples * channels]."""
    num_samples: int = 0
    """Of each channel."""

    @property
    def _columns(self) -> int:
        """Columns of a frame per sample."""
        return 1 if self.form[2] else self.form[1]

    def append(self, frame: np.ndarray) -> None:
        """Add a frame."""
        self.frames.append(frame)
        self.num_samples += frame.shape[1] // self._columns

    def drop(self, num_samples: int) -> None:
        """Drop the last samples."""
        self._split(self.num_samples - num_samples)

    def take(self, keep: int = 0) -> Iterator[tuple[np.ndarray, int]]:
        """Remove all but the last `keep` samples: f32 [samples, channels] and their rate, or nothing."""
        if self.num_samples > keep:
            rest = self._split(self.num_samples - keep)
            rate, channels, is_planar = self.form
            samples = scale(self.frames[0])
            self.frames, self.num_samples = [rest], keep
            yield (samples.T if is_planar else samples.reshape(-1, channels)), rate

    def _split(self, at: int) -> np.ndarray:
        """Make one frame of the first samples; return the others."""
        whole = np.concatenate(self.frames, axis=1)
        at = max(0, at)
        self.frames, self.num_samples = [whole[:, : at * self._columns]], at
        return whole[:, at * self._columns :].copy()


def scale(samples: np.ndarray) -> np.ndarray:
    """Samples as f32 of the same shape: integers to -1..1 by their type, uint8 around 128; floats as they are."""
    if samples.dtype == np.uint8:
        return (samples.astype(np.float32) - 128.0) / 128.0
    if np.issubdtype(samples.dtype, np.signedinteger):
        return samples.astype(np.float32) / np.float32(2.0 ** (8 * samples.dtype.itemsize - 1))
    return samples.astype(np.float32)


_ASF_HEADER = bytes.fromhex("3026b2758e66cf11a6d900aa0062ce6c")
_ASF_FILE_PROPERTIES = bytes.fromhex("a1dcab8c47a9cf118ee400c00c205365")
_PLACEHOLDER = 2_000_000_000
"""A program that does not know the size writes this number or a greater one."""


@dataclass(frozen=True)
class _Head:
    """What the first bytes of a file say about its length, where FFmpeg does not report it."""

    size: int
    """Of the file, in bytes."""
    promised_bytes: int | None = None
    """Where the file would end according to its header; None if it does not say."""
    ignore_wav_length: bool = False
    """Whether sound follows where a wav header says that it has ended."""
    mp3_frames: int | None = None
    """Frames according to the Xing table of an MP3 file (called Info where the bitrate is constant)."""
    has_duration: bool = False
    """Whether a Matroska file has the element Duration."""
    is_mp3: bool = False
    """Whether it begins with the header of a frame of MP3, or with a tag as MP3 files have it."""

    @classmethod
    def read(cls, file: _TimedFile) -> _Head:
        """From a file at its beginning, where it is left again."""
        size = file.seek(0, 2)
        file.seek(0)
        head = file.read(4096)
        promised, ignore, mp3_frames = None, False, None
        if head[:4] == b"RIFF" and head[8:12] == b"WAVE":
            promised, ignore = _wav_end(file, size)
        elif head[:3] == b"ID3" or head[:1] == b"\xff":
            mp3_frames, promised = _xing_table(file, head)
        else:
            promised = _promised_size(head)
        if promised is not None and promised >= _PLACEHOLDER:
            promised = None
        file.seek(0)
        # Eleven bits that are set, then any version but a reserved one, and layer 3.
        is_mp3 = head[:3] == b"ID3" or (head[:1] == b"\xff" and len(head) > 1 and head[1] & 0xE6 == 0xE2)
        return cls(size, promised, ignore, mp3_frames, b"\x44\x89" in head, is_mp3)


def _promised_size(head: bytes) -> int | None:
    """Where a file ends according to its header, for containers of which FFmpeg shortens the length in silence."""
    if head[:4] == b"RIFF":
        return 8 + int.from_bytes(head[4:8], "little")
    if head[:4] == b"riff":
        return int.from_bytes(head[16:24], "little")
    if head[:4] == b"caff" and (at := head.find(b"data")) >= 0:
        return at + 12 + int.from_bytes(head[at + 4 : at + 12], "big")
    if head[:16] == _ASF_HEADER and (at := head.find(_ASF_FILE_PROPERTIES)) >= 0:
        return int.from_bytes(head[at + 40 : at + 48], "little")
    return None


def _wav_end(file: _TimedFile, size: int) -> tuple[int | None, bool]:
    """Where the data chunk of a wav file ends by its header, and whether what follows is sound, not chunks.

    A recorder that is killed leaves the size of an earlier moment.
    """
    chunk, end = 12, None
    while chunk + 8 <= size:
        file.seek(chunk)
        header = file.read(8)
        length = int.from_bytes(header[4:], "little")
        if end is not None and not (header[:4].isascii() and header[:4].decode().isprintable()):
            return end, True
        following = chunk + 8 + length
        if header[:4] == b"data":
            end = following
        elif end is not None and following > size + 1:
            return end, True
        chunk = following + length % 2
    return end, False


def _xing_table(file: _TimedFile, head: bytes) -> tuple[int | None, int | None]:
    """The number of frames of an MP3 file, and where it ends, by the table in its first frame, if there is one.

    It is called Xing, or Info where the bitrate is constant. A tag of names and pictures may come first.
    """
    start = 0
    if head[:3] == b"ID3":
        # The tag's size is stored with seven bits per byte.
        start = 10 + sum((byte & 127) << 7 * index for index, byte in enumerate(reversed(head[6:10])))
        file.seek(start)
        head = file.read(256)
    at = max(head.find(b"Xing", 0, 256), head.find(b"Info", 0, 256))
    if at < 0 or head[:1] != b"\xff" or head[at + 7] & 3 != 3:
        return None, None
    frames, size = struct.unpack(">II", head[at + 8 : at + 16])
    return frames, start + size


_MIRRORED = bytes(int(f"{byte:08b}"[::-1], 2) for byte in range(256))


def _is_intact_ogg(file: _TimedFile) -> bool:
    """Whether every page of an Ogg file is complete and has the right checksum; FFmpeg skips those that do not.

    True for other files. The layout and the checksum of a page: RFC 3533, section 6.
    """
    file.seek(0)
    header = file.read(27)
    if header[:4] != b"OggS":
        return True
    while header:
        lengths = file.read(header[26]) if len(header) == 27 else b""
        body = file.read(sum(lengths))
        if header[:4] != b"OggS" or len(header) < 27 or len(lengths) < header[26] or len(body) < sum(lengths):
            return False
        whole = header[:22] + bytes(4) + header[26:] + lengths + body
        # Ogg's CRC takes the bits of each byte in the opposite order of zlib's, and inverts neither start nor end.
        crc = zlib.crc32(whole.translate(_MIRRORED), 0xFFFFFFFF) ^ 0xFFFFFFFF
        if int(f"{crc:032b}"[::-1], 2) != int.from_bytes(header[22:26], "little"):
            return False
        header = file.read(27)
    return True


def _is_whole_matroska(file: _TimedFile, size: int) -> bool:
    """Whether no element of a Matroska or WebM file continues behind its end; FFmpeg drops one that does.

    True for other files. The layout of an element (number, size with a length marker, content): RFC 8794.
    """
    file.seek(0)
    if file.read(4) != b"\x1a\x45\xdf\xa3":
        return True
    at = 0
    while at < size:
        file.seek(at)
        head = file.read(12)
        id_length = 9 - head[0].bit_length()
        number = head[:id_length]
        field = head[id_length : id_length + 8]
        if id_length > 4 or not field or not field[0]:
            # Not an element: the file has a hole, which is not found here.
            return True
        length = 9 - field[0].bit_length()
        content = int.from_bytes(field[:length], "big") & ((1 << 7 * length) - 1)
        is_unknown = content == (1 << 7 * length) - 1
        at += id_length + length
        # The elements that all others are in: the segment and its clusters.
        if not is_unknown and number not in (b"\x18\x53\x80\x67", b"\x1f\x43\xb6\x75"):
            at += content
    return at <= size
