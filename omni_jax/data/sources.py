"""Reads public corpora as they are published, and plain files: each row becomes a draft of a spoken exchange.

A source is cut into units that can be read one without the others, in any order and by any process: a row group of a
parquet file, some lines of a JSON file, the chapters of a speech corpus. What a row lacks or has too much of makes it
a rejected one, with a reason; nothing stops at it and nothing is left out in silence.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from omni_jax.audio import io as audio_io
from omni_jax.data.records import Exchange
from omni_jax.errors import ConfigError
from omni_jax.vocab import NUM_CODEBOOKS

FOLDERS = 16
"""Of a speech corpus, read together: a thousand utterances or so."""
PERSONA = "identity"
"""The split of VoiceAssistant-400K that teaches another model's name and makers."""
LONGEST_QUESTION = 15.0
"""Seconds; what is longer in VoiceAssistant-400K is mostly not a question."""
VOICE_ASSISTANT = ("split_name", "index", "round", "question", "question_audio", "answer", "answer_snac")
"""Columns of VoiceAssistant-400K."""

_FRAME = re.compile(r"#(?:\s+[0-9]{1,18}(?![0-9])){7}\s*")


class RejectedRow(ValueError):  # noqa: N818 - a row's fate, not a fault
    """A row that is left out."""

    def __init__(self, reason: str, detail: str = ""):
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason = reason
        """A few words, the same for all rows of that kind."""


@dataclass(frozen=True)
class SourceShard:
    """A part of a source."""

    name: str
    """Unique in the source."""
    files: tuple[Path, ...]
    part: tuple[int, ...] = ()
    """Which of the file's row groups, or its first and last byte."""

    def mark(self) -> str:
        """Tells whether it is still what it was: names, sizes and times of its files."""
        stats = [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in self.files]
        return hashlib.sha256(repr((self.name, stats, self.part)).encode()).hexdigest()[:16]


@dataclass(frozen=True, eq=False)
class PendingExchange:
    """An exchange whose answer may still have to be encoded."""

    exchange: Exchange
    answer_audio: np.ndarray | None = None
    """f32 [samples] at the codec's rate."""


Row = tuple[str, "Callable[[], PendingExchange]"]
"""Where it stands, and what makes a draft of it or raises `Rejected`."""


class Source(Protocol):
    """A corpus on disk."""

    @property
    def name(self) -> str:
        """What records say they come from."""

    @property
    def license(self) -> str:
        """SPDX, or `unknown`."""

    def units(self) -> list[SourceShard]:
        """Its parts, always in the same order."""

    def rows(self, unit: SourceShard) -> Iterator[Row]:
        """The rows of a part, one after the other."""


@dataclass(frozen=True)
class VoiceAssistant:
    """VoiceAssistant-400K: a folder of parquet files, questions as sound, answers as SNAC codes."""

    folder: Path
    persona: bool = False
    """Whether to keep the rows of `PERSONA`."""
    max_question_seconds: float = LONGEST_QUESTION
    codebook_size: int = 4096
    name: str = "voice_assistant_400k"
    license: str = "Apache-2.0"

    def units(self) -> list[SourceShard]:
        """A row group each."""
        return [
            SourceShard(f"{path.name}:{group}", (path,), (group,))
            for path in corpus_files(self.folder, ".parquet")
            for group in range(parquet(path, VOICE_ASSISTANT).num_row_groups)
        ]

    def rows(self, unit: SourceShard) -> Iterator[Row]:
        """Rows of a row group, a few in memory at a time."""
        file = parquet(unit.files[0], VOICE_ASSISTANT)
        number = 0
        for batch in file.iter_batches(batch_size=16, row_groups=list(unit.part), columns=list(VOICE_ASSISTANT)):
            for row in batch.to_pylist():
                yield f"{unit.name} row {number}", partial(self._draft, row)
                number += 1

    def _draft(self, row: dict[str, Any]) -> PendingExchange:
        if row["split_name"] == PERSONA and not self.persona:
            raise RejectedRow("persona")
        question, answer = _text(row["question"], "question"), _text(row["answer"], "answer")
        sound = row["question_audio"]
        data = sound.get("bytes") if isinstance(sound, dict) else None
        if not data:
            raise RejectedRow("question without sound")
        audio = _sound(io.BytesIO(data), self.max_question_seconds)
        codes = snac_codes(row["answer_snac"], self.codebook_size)
        source = f"{self.name} {row['split_name']}"
        return PendingExchange(Exchange(question, audio, answer, codes, source, self.name))


def snac_codes(text: Any, codebook_size: int) -> np.ndarray:
    """The codes of `answer_snac`: `#` before each frame, then seven codes in slot order, not delayed.

    Returns:
        int32 [F, 7].

    Raises:
        Rejected: it is not exactly that, or has no frame.
    """
    if not isinstance(text, str) or not text.strip():
        raise RejectedRow("answer without codes")
    place, text = 0, text.strip()
    while place < len(text):
        match = _FRAME.match(text, place)
        if not match:
            raise RejectedRow(
                "codes in disorder", f"expected '#' and {NUM_CODEBOOKS} codes, found {text[place : place + 40]!r}"
            )
        place = match.end()
    codes = np.array(text.replace("#", " ").split(), np.int64).reshape(-1, NUM_CODEBOOKS)
    if codes.max() >= codebook_size:
        raise RejectedRow("code out of range", f"expected codes below {codebook_size}, found {codes.max()}")
    return codes.astype(np.int32)


@dataclass(frozen=True)
class ReadSpeech:
    """A corpus of read speech: recordings and what is said in them, as questions or as answers."""

    folder: Path
    name: str
    license: str
    # `prepare` knows a source again by what it prints as; a function does so with where in memory it is.
    listing: Callable[[Path], Iterable[tuple[Path, str, str]]] = field(repr=False)
    """Recording, text and speaker of every utterance, always in the same order."""
    as_answer: bool = False
    """Whether they are to be read aloud (T1A1) rather than written down (A1T1)."""
    rate: int = 24_000
    """The codec's, of answers."""
    max_seconds: float = 30.0

    def units(self) -> list[SourceShard]:
        """Some folders of recordings each."""
        found = sorted({path.parent for path in self.folder.rglob("*") if path.suffix.lower() in _SOUNDS})
        if not found:
            raise ConfigError(f"{self.folder}: expected recordings as {self.name} has them, found none")
        starts = range(0, len(found), FOLDERS)
        return [SourceShard(str(found[i].relative_to(self.folder)), tuple(found[i : i + FOLDERS])) for i in starts]

    def rows(self, unit: SourceShard) -> Iterator[Row]:
        """Utterances of some folders."""
        for folder in unit.files:
            for path, text, speaker in self.listing(folder):
                yield str(path.relative_to(self.folder)), partial(self._draft, path, text, speaker)

    def _draft(self, path: Path, text: str, speaker: str) -> PendingExchange:
        text = _text(text, "text")
        if not path.is_file():
            raise RejectedRow("recording is missing")
        if self.as_answer:
            exchange = Exchange(answer_text=text, source=self.name, voice=f"{self.name} {speaker}")
            return PendingExchange(exchange, _read(path, self.rate, self.max_seconds))
        return PendingExchange(Exchange(text, _sound(path, self.max_seconds), source=self.name))


def librispeech(folder: Path) -> Iterator[tuple[Path, str, str]]:
    """`103/1240/103-1240.trans.txt`, lines of an utterance's name and its text, beside `103-1240-0000.flac`."""
    for listing in sorted(folder.glob("*.trans.txt")):
        for line in listing.read_text(encoding="utf-8").splitlines():
            name, _, text = line.partition(" ")
            yield folder / f"{name}.flac", sentence_case(text), name.partition("-")[0]


def libritts(folder: Path) -> Iterator[tuple[Path, str, str]]:
    """`103/1241/103_1241_000000_000001.wav` and its text beside it, normalized."""
    for path in sorted(folder.glob("*.wav")):
        yield path, _beside(path.with_suffix(".normalized.txt")), path.name.partition("_")[0]


def vctk(folder: Path) -> Iterator[tuple[Path, str, str]]:
    """`wav48_silence_trimmed/p225/p225_001_mic1.flac` (or `wav48/p225/p225_001.wav`) and `txt/p225/p225_001.txt`."""
    for path in sorted((*folder.glob("*_mic1.flac"), *folder.glob("p*_*.wav"))):
        name = path.stem.removesuffix("_mic1")
        yield path, _beside(folder.parent.parent / "txt" / folder.name / f"{name}.txt"), folder.name


def mls(folder: Path) -> Iterator[tuple[Path, str, str]]:
    """`train/audio/1/2/1_2_000001.flac` (or .opus) and `train/transcripts.txt`: name, tab, text."""
    wanted = {path.stem: path for path in sorted((*folder.glob("*.flac"), *folder.glob("*.opus")))}
    with (folder.parents[2] / "transcripts.txt").open(encoding="utf-8") as lines:
        texts = {
            name: text for name, _, text in (line.rstrip("\n").partition("\t") for line in lines) if name in wanted
        }
    for name, path in wanted.items():
        yield path, sentence_case(texts.get(name, "")), name.partition("_")[0]


SPEECH = {
    "librispeech": (librispeech, "CC-BY-4.0"),
    "libritts": (libritts, "CC-BY-4.0"),
    "vctk": (vctk, "CC-BY-4.0"),
    "mls": (mls, "CC-BY-4.0"),
}
"""Layouts of speech corpora, and their licenses."""


@dataclass(frozen=True)
class TextQA:
    """Questions and answers in writing: JSON lines, parquet, or a folder of such or of the datasets library's."""

    path: Path
    name: str = "text"
    license: str = "unknown"
    max_letters: int = 2000
    """Of question and answer each."""

    def units(self) -> list[SourceShard]:
        """Row groups, record batches, or pieces of a file of lines."""
        paths = [self.path] if self.path.is_file() else corpus_files(self.path, ".jsonl", ".parquet", ".arrow")
        units = []
        for path in paths:
            if path.suffix == ".parquet":
                count = parquet(path, ()).num_row_groups
                units += [SourceShard(f"{path.name}:{group}", (path,), (group,)) for group in range(count)]
            elif path.suffix == ".arrow":
                units.append(SourceShard(path.name, (path,)))
            else:
                units += [SourceShard(f"{path.name}:{begin}", (path,), (begin, end)) for begin, end in _pieces(path)]
        return units

    def rows(self, unit: SourceShard) -> Iterator[Row]:
        """Rows of a part."""
        path = unit.files[0]
        if path.suffix == ".parquet":
            rows: Iterable[Any] = (
                row
                for batch in parquet(path, ()).iter_batches(batch_size=256, row_groups=list(unit.part))
                for row in batch.to_pylist()
            )
        elif path.suffix == ".arrow":
            rows = _arrow_rows(path)
        else:
            rows = _lines(path, *unit.part)
        for number, row in enumerate(rows):
            yield f"{unit.name} row {number}", partial(self._draft, row)

    def _draft(self, row: Any) -> PendingExchange:
        question, answer = question_and_answer(_object(row) if isinstance(row, bytes) else row)
        for name, text in (("question", question), ("answer", answer)):
            if len(text) > self.max_letters:
                raise RejectedRow(f"{name} too long", f"expected at most {self.max_letters} letters, found {len(text)}")
        return PendingExchange(Exchange(question, answer_text=answer, source=self.name))


def question_and_answer(row: dict[str, Any]) -> tuple[str, str]:
    """The first question of a row and its answer, in the columns of Open-Orca, Alpaca, Moss, or plain ones.

    Raises:
        Rejected: it has none of these columns, or one of them is empty.
    """
    if "plain_text" in row:
        # Moss: "[Human]: ...<eoh> [MOSS]: ...<eoa>", turn after turn.
        match = re.search(r"\[Human\]:\s*(.*?)\s*<eoh>\s*\[MOSS\]:\s*(.*?)\s*<eoa>", str(row["plain_text"]), re.DOTALL)
        if not match:
            raise RejectedRow("no turn of Moss", "expected [Human]: ...<eoh> [MOSS]: ...<eoa>")
        return _text(match[1], "question"), _text(match[2], "answer")
    if "instruction" in row:
        more = row.get("input") or ""
        return _text(f"{row['instruction'] or ''}\n{more}", "instruction"), _text(row.get("output"), "output")
    for asked, said in (
        ("question", "response"),
        ("question", "answer"),
        ("prompt", "response"),
        ("prompt", "completion"),
    ):
        if asked in row and said in row:
            return _text(row[asked], asked), _text(row[said], said)
    raise RejectedRow("unknown columns", f"found {', '.join(map(str, row))}")


@dataclass(frozen=True)
class Manifest:
    """JSON lines of our own: an object a line with some of `FIELDS`, paths seen from the manifest's folder."""

    path: Path
    rate: int = 24_000
    """The codec's."""
    max_seconds: float = 60.0
    """Of a recording."""
    name: str = "manifest"
    license: str = "unknown"

    def units(self) -> list[SourceShard]:
        """Pieces of the file."""
        return [
            SourceShard(f"{self.path.name}:{begin}", (self.path,), (begin, end)) for begin, end in _pieces(self.path)
        ]

    def rows(self, unit: SourceShard) -> Iterator[Row]:
        """Lines of a piece."""
        for number, line in enumerate(_lines(self.path, *unit.part)):
            yield f"{unit.name} row {number}", partial(self._draft, line)

    def _draft(self, line: bytes) -> PendingExchange:
        row = _object(line)
        if unknown := sorted(set(row) - set(FIELDS)):
            raise RejectedRow("unknown field", f"expected some of {', '.join(FIELDS)}, found {', '.join(unknown)}")
        values = {name: row.get(name) or "" for name in FIELDS}
        for name, value in values.items():
            if not isinstance(value, str):
                raise RejectedRow(f"{name} is no text", f"found {type(value).__name__}")
        question, answer = (self.path.parent / values[name] for name in ("question_audio", "answer_audio"))
        exchange = Exchange(
            question_text=values["question_text"],
            question_audio=_sound(question, self.max_seconds) if values["question_audio"] else None,
            answer_text=values["answer_text"],
            source=values["source"] or self.name,
            voice=values["voice"],
        )
        return PendingExchange(exchange, _read(answer, self.rate, self.max_seconds) if values["answer_audio"] else None)


FIELDS = ("question_text", "question_audio", "answer_text", "answer_audio", "source", "voice")
"""Of a manifest's row; all may be left out, empty or null."""


def sentence_case(text: str) -> str:
    """Text that is all in capitals, or has none, as one writes it: the first letter large, and a full stop."""
    text = " ".join(text.split())
    if not text or (text.upper() != text and text.lower() != text):
        return text
    text = re.sub(r"\bi\b", "I", text.lower())
    return text[:1].upper() + text[1:] + ("" if text[-1] in ".?!" else ".")


_SOUNDS = (".flac", ".wav", ".opus", ".ogg", ".mp3")


def _object(line: bytes) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise RejectedRow("not JSON", str(error)) from None
    if not isinstance(row, dict):
        raise RejectedRow("not an object", f"found {type(row).__name__}")
    return row


def _beside(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return ""


def _text(value: Any, name: str) -> str:
    text = value.strip() if isinstance(value, str) else ""
    if not text:
        raise RejectedRow(f"{name} is empty")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise RejectedRow(f"{name} is no text", "half a character") from None
    return text


def _read(source: Path | io.BytesIO, rate: int, max_seconds: float) -> np.ndarray:
    """F32 [samples]."""
    try:
        return audio_io.read_audio(source, rate, max_seconds=max_seconds)
    except audio_io.AudioError as error:
        reason = "recording too long" if "at most" in str(error) and " s, found" in str(error) else "recording unusable"
        raise RejectedRow(reason, str(error)) from None


def _sound(source: Path | io.BytesIO, max_seconds: float) -> np.ndarray:
    """int16 [samples] at 16 kHz."""
    return audio_io.to_pcm16(_read(source, audio_io.SAMPLE_RATE, max_seconds))


def corpus_files(folder: Path, *suffixes: str) -> list[Path]:
    """All files below a folder that end in one of these, sorted.

    Raises:
        ConfigError: there are none.
    """
    found = sorted(path for path in folder.rglob("*") if path.suffix in suffixes)
    if not found:
        raise ConfigError(f"{folder}: expected files that end in {', '.join(suffixes)}, found none")
    return found


def parquet(path: Path, columns: Sequence[str]) -> Any:
    """A parquet file, opened (`pyarrow.parquet.ParquetFile`).

    Raises:
        ConfigError: pyarrow is not installed, it is no such file, or lacks one of the columns.
    """
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise ConfigError(f"{path}: parquet takes pyarrow: pip install 'omni-jax[data]'") from None
    try:
        file = pyarrow.parquet.ParquetFile(path)
    except (OSError, pyarrow.ArrowInvalid) as error:
        raise ConfigError(f"{path}: expected a parquet file, found {error}") from None
    missing = set(columns) - set(file.schema_arrow.names)
    if missing:
        raise ConfigError(f"{path}: expected the columns {', '.join(columns)}, found none named {', '.join(missing)}")
    return file


def _arrow_rows(path: Path) -> Iterator[Any]:
    try:
        import pyarrow
    except ImportError:
        raise ConfigError(f"{path}: arrow files take pyarrow: pip install 'omni-jax[data]'") from None
    with pyarrow.memory_map(str(path)) as file:
        for batch in pyarrow.ipc.open_stream(file):
            yield from batch.to_pylist()


def _pieces(path: Path, size: int = 8 << 20) -> list[tuple[int, int]]:
    """A file of lines in pieces of about `size` bytes; a line belongs to the piece that it begins in."""
    try:
        total = path.stat().st_size
    except OSError as error:
        raise ConfigError(f"{path}: expected a file, found {error.strerror}") from None
    return [(begin, min(begin + size, total)) for begin in range(0, total, size)]


def _lines(path: Path, begin: int, end: int) -> Iterator[bytes]:
    """The lines that begin between two bytes, blank ones left out."""
    with path.open("rb") as file:
        if begin:
            file.seek(begin - 1)
            file.readline()
        while file.tell() < end:
            line = file.readline()
            if not line:
                break
            if line.strip():
                yield line
