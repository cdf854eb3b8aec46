"""Corpora on disk: public ones in the layout that they are published in, and files of questions and answers.

A `Source` is cut into shards that can be read independently, in any order and by any process: a row group of a
parquet file, a byte range of a file of JSON lines, some folders of a corpus of read speech. Each row of a shard
becomes a `PendingExchange`, or is rejected with a reason that `omni_jax.data.prepare` counts.
"""

from __future__ import annotations

import hashlib
import io
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

from omni_jax.audio import io as audio_io
from omni_jax.data.readers import byte_ranges, corpus_files, open_parquet, read_arrow, read_lines, read_parquet
from omni_jax.data.records import Conversation, Exchange, PastTurn
from omni_jax.errors import AudioError, AudioTooLongError, ConfigError
from omni_jax.inference.messages import from_messages
from omni_jax.input_files import parse_json
from omni_jax.vocab import NUM_CODEBOOKS

VOICE_ASSISTANT_COLUMNS = ("question", "question_audio", "answer", "answer_snac")
"""Columns of VoiceAssistant-400K that are read; of the others only `OPTIONAL_COLUMNS`, where they are there."""
OPTIONAL_COLUMNS = ("split_name", "index", "round")
"""The split, and the conversation and the turn of it that a row is."""
PERSONA_SPLIT = "identity"
"""The split of VoiceAssistant-400K that teaches the name and the makers of another model."""
MAX_QUESTION_SECONDS = 15.0
"""Longest question of VoiceAssistant-400K that is used by default; longer ones are mostly not questions."""
MANIFEST_FIELDS = ("question_text", "question_audio", "answer_text", "answer_audio", "answer_codes", "source", "voice")
"""Fields of a manifest's row, besides those of `CONVERSATION_FIELDS`. All are optional; empty and null mean missing."""
CONVERSATION_FIELDS = ("conversation", "turn", "system")
"""Fields of a manifest's row that is a turn of a conversation: its name, a rising number, and the system text."""
FOLDERS_PER_SHARD = 16
"""Folders of a corpus of read speech in a shard, about a thousand utterances."""
AUDIO_SUFFIXES = (".flac", ".wav", ".opus", ".ogg", ".mp3")

_SNAC_FRAME = re.compile(r"#(?:\s+[0-9]{1,18}(?![0-9])){7}\s*")
_MOSS_TURN = re.compile(r"\[Human\]:\s*(.*?)\s*<eoh>\s*\[MOSS\]:\s*(.*?)\s*<eoa>", re.DOTALL)


class RejectedRow(Exception):  # noqa: N818 - an outcome, not an error
    """A row that cannot be used.

    Attributes:
        reason: a few words, the same for all rows that are rejected for it; the index counts rows by it.
    """

    def __init__(self, reason: str, message: str = ""):
        super().__init__(f"{reason}: {message}" if message else reason)
        self.reason = reason


@dataclass(frozen=True)
class SourceShard:
    """A slice of a source, the unit of work of `omni_jax.data.prepare`."""

    name: str
    """Unique in the source."""
    files: tuple[Path, ...]
    """Files that it is read from; folders, for read speech."""
    part: tuple[int, ...] = ()
    """Which part of the file: the number of a row group, or a byte range. Empty: all of it."""

    def fingerprint(self) -> str:
        """Hash of the names, sizes and modification times of its files: changes when the shard must be read again."""
        stats = [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in self.files]
        return hashlib.sha256(repr((self.name, stats, self.part)).encode()).hexdigest()[:16]


@dataclass(frozen=True, eq=False)
class PendingExchange:
    """An exchange whose answer may still have to be encoded by the codec."""

    exchange: Exchange
    answer_audio: np.ndarray | None = None
    """f32 [samples] at the codec's sample rate; None if there is nothing to encode."""


class Row(NamedTuple):
    """A row of a source that has not been decoded yet."""

    location: str
    """Shard and number, for messages."""
    load: Callable[[], PendingExchange]
    """Decodes the row, or raises `RejectedRow`."""


class Source(Protocol):
    """A corpus on disk.

    `prepare` recognizes a source by its `repr`, which must contain every option that changes what is read.
    """

    @property
    def name(self) -> str:
        """Name of the corpus, as records have it."""

    @property
    def license(self) -> str:
        """SPDX identifier, or `unknown`."""

    def shards(self) -> list[SourceShard]:
        """All shards, always in the same order."""

    def rows(self, shard: SourceShard) -> Iterator[Row]:
        """The rows of a shard, in order."""


@dataclass(frozen=True)
class VoiceAssistant:
    """VoiceAssistant-400K: a folder of parquet files, with questions as audio and answers as SNAC codes."""

    folder: Path
    keep_persona: bool = False
    """Whether to keep the rows of `PERSONA_SPLIT`."""
    max_question_seconds: float = MAX_QUESTION_SECONDS
    codebook_size: int = 4096
    """Every code must be below it."""
    name: str = "voice_assistant_400k"
    license: str = "Apache-2.0"

    def shards(self) -> list[SourceShard]:
        """One shard per row group."""
        return [
            SourceShard(f"{path.name}:{group}", (path,), (group,))
            for path in corpus_files(self.folder, ".parquet")
            for group in range(open_parquet(path, VOICE_ASSISTANT_COLUMNS).num_row_groups)
        ]

    def rows(self, shard: SourceShard) -> Iterator[Row]:
        """The rows of a row group."""
        # Rows contain recordings: few at a time.
        path = shard.files[0]
        names = open_parquet(path, VOICE_ASSISTANT_COLUMNS).schema_arrow.names
        columns = [*VOICE_ASSISTANT_COLUMNS, *(name for name in OPTIONAL_COLUMNS if name in names)]
        rows = read_parquet(path, shard.part, columns, batch_size=16)
        past: list[PastTurn] = []
        last: tuple[Any, int] | None = None
        for number, row in enumerate(rows):
            turn = _round(row.get("round"))
            name = row.get("split_name"), row.get("index")
            # The next round of the conversation that the row before is of.
            if turn is None or last != (name, turn - 1):
                past = []
            last = None if turn is None else (name, turn)
            yield Row(f"{shard.name} row {number}", partial(self._load, row, tuple(past)))
            past.append(_past_turn(row["question"], row["answer"]))

    def _load(self, row: dict[str, Any], history: tuple[PastTurn, ...]) -> PendingExchange:
        split = row.get("split_name") or ""
        if split == PERSONA_SPLIT and not self.keep_persona:
            raise RejectedRow("persona")
        question, answer = _clean_text(row["question"], "question"), _clean_text(row["answer"], "answer")
        audio = row["question_audio"]
        data = audio.get("bytes") if isinstance(audio, dict) else None
        if not data:
            raise RejectedRow("question without audio")
        samples = _read_pcm16(io.BytesIO(data), self.max_question_seconds)
        codes = parse_codes(row["answer_snac"], self.codebook_size)
        source = f"{self.name} {split}".strip()
        return PendingExchange(Exchange(question, samples, answer, codes, source, self.name, history=history))


def _round(text: Any) -> int | None:
    """The number in the column `round` of VoiceAssistant-400K; None if there is none."""
    digits = re.search(r"\d+", str(text))
    return int(digits[0]) if digits else None


def _past_turn(question: Any, answer: Any) -> PastTurn:
    question, answer = (text.strip() if isinstance(text, str) else "" for text in (question, answer))
    return PastTurn(question, answer)


def parse_codes(value: Any, codebook_size: int) -> np.ndarray:
    """Parse the codes of an answer, not delayed, seven of each frame in the order of its slots.

    Args:
        value: text, `#` before each frame as in `answer_snac`, or numbers alone, with spaces or commas between them; or
            a list of frames, or of all codes.
        codebook_size: every code must be below it.

    Returns:
        int32 [F, 7], F > 0.

    Raises:
        RejectedRow: it has another form, no frame, or a code that is negative or not below `codebook_size`.
    """
    if isinstance(value, str) and value.strip():
        codes = _parse_code_text(value.strip())
    elif isinstance(value, (list, tuple, np.ndarray)) and len(value):
        codes = _parse_code_list(value)
    else:
        raise RejectedRow("answer without codes")
    if codes.min() < 0 or codes.max() >= codebook_size:
        found = codes.min() if codes.min() < 0 else codes.max()
        raise RejectedRow("code out of range", f"expected codes below {codebook_size}, found {found}")
    return codes.astype(np.int32)


def _parse_code_text(text: str) -> np.ndarray:
    if "#" not in text:
        if not re.fullmatch(r"[0-9]{1,18}(?:[\s,]+[0-9]{1,18})*", text):
            raise RejectedRow("malformed codes", f"expected numbers or '#' before each frame, found {text[:40]!r}")
        return _parse_code_list(re.split(r"[\s,]+", text))
    offset = 0
    while offset < len(text):
        match = _SNAC_FRAME.match(text, offset)
        if not match:
            found = text[offset : offset + 40]
            raise RejectedRow("malformed codes", f"expected '#' and {NUM_CODEBOOKS} codes, found {found!r}")
        offset = match.end()
    return np.array(text.replace("#", " ").split(), np.int64).reshape(-1, NUM_CODEBOOKS)


def _parse_code_list(values: Any) -> np.ndarray:
    try:
        codes = np.array(values)
        # Text of digits is a number; a fraction is none.
        codes = codes.astype(np.int64, casting="unsafe" if codes.dtype.kind == "U" else "same_kind")
        if codes.ndim == 2 and codes.shape[1] != NUM_CODEBOOKS:
            raise ValueError(f"frames of {codes.shape[1]} codes")
        return codes.reshape(-1, NUM_CODEBOOKS)
    except (ValueError, TypeError, OverflowError) as error:
        raise RejectedRow("malformed codes", f"expected frames of {NUM_CODEBOOKS} codes, found {error}") from None


class Utterance(NamedTuple):
    """A recording of read speech."""

    path: Path
    text: str
    speaker: str


@dataclass(frozen=True)
class ReadSpeech:
    """A corpus of read speech, as questions to transcribe (A1T1) or as answers to read aloud (T1A1)."""

    folder: Path
    name: str
    license: str
    # Not in the repr: that of a function contains its address, which differs from process to process.
    list_utterances: Callable[[Path], Iterable[Utterance]] = field(repr=False)
    """Lists the utterances of a folder, always in the same order."""
    as_answer: bool = False
    """Whether the recordings are answers."""
    answer_sample_rate: int = 24_000
    """The codec's sample rate."""
    max_seconds: float = 30.0
    """Longest recording that is used."""

    def shards(self) -> list[SourceShard]:
        """One shard per `FOLDERS_PER_SHARD` folders that contain recordings."""
        folders = sorted({path.parent for path in self.folder.rglob("*") if path.suffix.lower() in AUDIO_SUFFIXES})
        if not folders:
            raise ConfigError(f"{self.folder}: expected recordings in the layout of {self.name}, found none")
        groups = [folders[i : i + FOLDERS_PER_SHARD] for i in range(0, len(folders), FOLDERS_PER_SHARD)]
        return [SourceShard(str(group[0].relative_to(self.folder)), tuple(group)) for group in groups]

    def rows(self, shard: SourceShard) -> Iterator[Row]:
        """The utterances of some folders."""
        for folder in shard.files:
            for utterance in self.list_utterances(folder):
                yield Row(str(utterance.path.relative_to(self.folder)), partial(self._load, utterance))

    def _load(self, utterance: Utterance) -> PendingExchange:
        text = _clean_text(utterance.text, "text")
        if not utterance.path.is_file():
            raise RejectedRow("recording is missing")
        if self.as_answer:
            exchange = Exchange(answer_text=text, source=self.name, voice=f"{self.name} {utterance.speaker}")
            return PendingExchange(exchange, _read_audio(utterance.path, self.answer_sample_rate, self.max_seconds))
        return PendingExchange(Exchange(text, _read_pcm16(utterance.path, self.max_seconds), source=self.name))


def librispeech(folder: Path) -> Iterator[Utterance]:
    """`103/1240/103-1240.trans.txt` has lines of name and text, of recordings like `103/1240/103-1240-0000.flac`."""
    for transcripts in sorted(folder.glob("*.trans.txt")):
        for line in transcripts.read_text(encoding="utf-8").splitlines():
            name, _, text = line.partition(" ")
            yield Utterance(folder / f"{name}.flac", sentence_case(text), name.partition("-")[0])


def libritts(folder: Path) -> Iterator[Utterance]:
    """`103/1241/103_1241_000000_000001.wav` has its text in `103/1241/103_1241_000000_000001.normalized.txt`."""
    for path in sorted(folder.glob("*.wav")):
        yield Utterance(path, _read_transcript(path.with_suffix(".normalized.txt")), path.name.partition("_")[0])


def vctk(folder: Path) -> Iterator[Utterance]:
    """`wav48_silence_trimmed/p225/p225_001_mic1.flac` or `wav48/p225/p225_001.wav`, and `txt/p225/p225_001.txt`."""
    for path in sorted((*folder.glob("*_mic1.flac"), *folder.glob("p*_*.wav"))):
        name = path.stem.removesuffix("_mic1")
        transcript = folder.parent.parent / "txt" / folder.name / f"{name}.txt"
        yield Utterance(path, _read_transcript(transcript), folder.name)


def mls(folder: Path) -> Iterator[Utterance]:
    """`train/audio/1/2/1_2_000001.flac` (or .opus), and `train/transcripts.txt` with lines of name, tab, text."""
    recordings = {path.stem: path for path in sorted((*folder.glob("*.flac"), *folder.glob("*.opus")))}
    with (folder.parents[2] / "transcripts.txt").open(encoding="utf-8") as file:
        lines = (line.rstrip("\n").partition("\t") for line in file)
        texts = {name: text for name, _, text in lines if name in recordings}
    for name, path in recordings.items():
        yield Utterance(path, sentence_case(texts.get(name, "")), name.partition("_")[0])


SPEECH_CORPORA: dict[str, tuple[Callable[[Path], Iterable[Utterance]], str]] = {
    "librispeech": (librispeech, "CC-BY-4.0"),
    "libritts": (libritts, "CC-BY-4.0"),
    "vctk": (vctk, "CC-BY-4.0"),
    "mls": (mls, "CC-BY-4.0"),
}
"""Layout and license of each corpus that `ReadSpeech` reads."""


@dataclass(frozen=True)
class TextQA:
    """Questions and answers as text: a file of JSON lines, parquet or arrow, or a folder of them."""

    path: Path
    name: str = "text"
    license: str = "unknown"
    max_characters: int = 2000
    """Longest question, and longest answer, that is used."""
    every_turn: bool = False
    """Whether every answer of a conversation becomes a record, as those that will be spoken must. Otherwise a
    conversation is one record, in which all its answers are trained."""
    range_bytes: int | None = None
    """Bytes of a file of JSON lines per shard; None: the default. See `Manifest.range_bytes`."""

    def shards(self) -> list[SourceShard]:
        """One shard per row group, per arrow file, or per byte range of a file of JSON lines."""
        paths = [self.path] if self.path.is_file() else corpus_files(self.path, ".jsonl", ".parquet", ".arrow")
        shards = []
        for path in paths:
            if path.suffix == ".parquet":
                groups = range(open_parquet(path, ()).num_row_groups)
                shards += [SourceShard(f"{path.name}:{group}", (path,), (group,)) for group in groups]
            elif path.suffix == ".arrow":
                shards.append(SourceShard(path.name, (path,)))
            else:
                shards += line_shards(path, self.range_bytes)
        return shards

    def rows(self, shard: SourceShard) -> Iterator[Row]:
        """The rows of a shard."""
        path = shard.files[0]
        rows: Iterable[Any]
        if path.suffix == ".parquet":
            rows = read_parquet(path, shard.part, batch_size=256)
        elif path.suffix == ".arrow":
            rows = read_arrow(path)
        else:
            rows = read_lines(path, *shard.part)
        for number, row in enumerate(rows):
            location = f"{shard.name} row {number}"
            try:
                exchanges = self._exchanges(_parse_object(row) if isinstance(row, bytes) else row)
            except RejectedRow as rejected:
                yield Row(location, partial(_reject, rejected))
                continue
            for turn, exchange in enumerate(exchanges):
                place = location if len(exchanges) == 1 else f"{location} turn {turn}"
                yield Row(place, partial(PendingExchange, exchange))

    def _exchanges(self, row: dict[str, Any]) -> list[Exchange]:
        if row.get("messages") is not None:
            exchanges = exchanges_of_messages(row["messages"], self.name, every_turn=self.every_turn)
        else:
            question, answer = question_and_answer(row)
            exchanges = [Exchange(question, answer_text=answer, source=self.name)]
        for exchange in exchanges:
            turns = [*exchange.history, PastTurn(exchange.question_text, exchange.answer_text)]
            for name in ("question", "answer"):
                if (longest := max(len(getattr(turn, name)) for turn in turns)) > self.max_characters:
                    found = f"expected at most {self.max_characters} characters, found {longest}"
                    raise RejectedRow(f"{name} too long", found)
        return exchanges


def _reject(row: RejectedRow) -> PendingExchange:
    raise row


def exchanges_of_messages(messages: Any, source: str, *, every_turn: bool) -> list[Exchange]:
    """The records of a conversation in the form of chat completions.

    Raises:
        RejectedRow: it has another form, or no answer to a question that is trained.
    """
    try:
        system, turns, weights = from_messages(messages)
    except ConfigError as error:
        raise RejectedRow("malformed messages", str(error)) from None
    for text in (system, *(text for turn in turns for text in (turn.question, turn.answer))):
        if text:
            _clean_text(text, "message")
    exchanges = tuple(Exchange(turn.question, answer_text=turn.answer, source=source) for turn in turns)
    # An answer to nothing, such as a greeting, is part of the history only.
    trained = tuple(bool(turn.question and turn.answer) and on for turn, on in zip(turns, weights, strict=True))
    if not any(trained):
        raise RejectedRow("messages without an answer")
    return Conversation(exchanges, system, trained).to_exchanges(every_turn=every_turn)


def question_and_answer(row: dict[str, Any]) -> tuple[str, str]:
    """The first question of a row and its answer, from the columns of Open-Orca, Alpaca, Moss or plain pairs.

    Raises:
        RejectedRow: it has none of these columns, or one of them is empty.
    """
    if "plain_text" in row:
        # Moss: "[Human]: ...<eoh> [MOSS]: ...<eoa>", once per turn.
        match = _MOSS_TURN.search(str(row["plain_text"]))
        if not match:
            raise RejectedRow("not in Moss format", "expected [Human]: ...<eoh> [MOSS]: ...<eoa>")
        return _clean_text(match[1], "question"), _clean_text(match[2], "answer")
    if "instruction" in row:
        prompt = f"{row['instruction'] or ''}\n{row.get('input') or ''}"
        return _clean_text(prompt, "instruction"), _clean_text(row.get("output"), "output")
    for question, answer in (
        ("question", "response"),
        ("question", "answer"),
        ("prompt", "response"),
        ("prompt", "completion"),
    ):
        if question in row and answer in row:
            return _clean_text(row[question], question), _clean_text(row[answer], answer)
    raise RejectedRow("unknown columns", f"found {', '.join(map(str, row))}")


@dataclass(frozen=True)
class Manifest:
    """JSON lines: one object per line with some of `MANIFEST_FIELDS`; paths are relative to the manifest's folder.

    Lines with the same `conversation`, one after the other, are its turns.
    """

    path: Path
    answer_sample_rate: int = 24_000
    """The codec's sample rate."""
    max_seconds: float = 60.0
    """Longest recording that is used."""
    codebook_size: int = 4096
    """Every code must be below it."""
    name: str = "manifest"
    license: str = "unknown"
    range_bytes: int | None = None
    """Bytes of the file per shard; None: the default. A small range suits rows that take long, as synthesis does."""

    def shards(self) -> list[SourceShard]:
        """One shard per byte range of the file; ranges end between conversations."""
        shards = line_shards(self.path, self.range_bytes)
        begins = sorted({self._between_conversations(shard.part[0]) for shard in shards})
        ends = [*begins[1:], shards[-1].part[1]] if shards else []
        return [
            SourceShard(f"{self.path.name}:{begin}", (self.path,), (begin, end))
            for begin, end in zip(begins, ends, strict=False)
            if begin < end
        ]

    def _between_conversations(self, begin: int) -> int:
        """The given place in the file, or the first line after it that belongs to no earlier conversation."""
        if begin == 0:
            return 0
        with self.path.open("rb") as file:
            file.seek(begin - 1)
            file.readline()
            name = _conversation_name(file.readline())
            while name is not None:
                begin = file.tell()
                found = _conversation_name(file.readline())
                if found != name:
                    break
        return begin

    def rows(self, shard: SourceShard) -> Iterator[Row]:
        """The lines of a byte range."""
        talk = _ManifestTalk()
        for number, line in enumerate(read_lines(self.path, *shard.part)):
            try:
                before = talk.add(line)
            except RejectedRow as rejected:
                yield Row(f"{shard.name} row {number}", partial(_reject, rejected))
                continue
            yield Row(f"{shard.name} row {number}", partial(self._load, line, before))

    def _load(self, line: bytes, before: tuple[str, tuple[PastTurn, ...]]) -> PendingExchange:
        row = _parse_object(line)
        if unknown := sorted(set(row) - set(MANIFEST_FIELDS) - set(CONVERSATION_FIELDS)):
            known = (*MANIFEST_FIELDS, *CONVERSATION_FIELDS)
            raise RejectedRow("unknown field", f"expected some of {', '.join(known)}, found {', '.join(unknown)}")
        codes = row.pop("answer_codes", None) or None
        if codes is not None:
            if row.get("answer_audio"):
                raise RejectedRow("two answers", "expected answer_audio or answer_codes, found both")
            codes = parse_codes(codes, self.codebook_size)
        values = {name: row.get(name) or "" for name in MANIFEST_FIELDS}
        for name, value in values.items():
            if not isinstance(value, str):
                raise RejectedRow(f"{name} is not text", f"found {type(value).__name__}")
        folder, question, answer = self.path.parent, values["question_audio"], values["answer_audio"]
        exchange = Exchange(
            question_text=values["question_text"],
            question_audio=_read_pcm16(folder / question, self.max_seconds) if question else None,
            answer_text=values["answer_text"],
            answer_codes=codes,
            source=values["source"] or self.name,
            voice=values["voice"],
            system=before[0],
            history=before[1],
        )
        audio = _read_audio(folder / answer, self.answer_sample_rate, self.max_seconds) if answer else None
        return PendingExchange(exchange, audio)


def _conversation_name(line: bytes) -> str | None:
    """The conversation that a line of a manifest is a turn of, if any."""
    try:
        name = _parse_object(line).get("conversation")
    except RejectedRow:
        return None
    return name if isinstance(name, str) and name else None


class _ManifestTalk:
    """What precedes each line of a manifest in its conversation."""

    def __init__(self) -> None:
        self._name: str | None = None
        self._turn = 0
        self._system = ""
        self._past: list[PastTurn] = []

    def add(self, line: bytes) -> tuple[str, tuple[PastTurn, ...]]:
        """The system text and the turns before a line.

        Raises:
            RejectedRow: its fields of a conversation have other types, or its turn has not a higher number than the one
                before.
        """
        try:
            row = _parse_object(line)
        except RejectedRow:
            # The row is rejected when it is loaded.
            row = {}
        name, turn, system = (row.get(field) for field in CONVERSATION_FIELDS)
        if not name:
            self._name = None
            if turn is not None or system:
                raise RejectedRow("turn without a conversation", f"expected `conversation`, found {sorted(row)}")
            return "", ()
        if not isinstance(name, str) or type(turn) is not int or not isinstance(system or "", str):
            found = ", ".join(f"{field}: {row.get(field)!r}" for field in CONVERSATION_FIELDS)
            raise RejectedRow("malformed turn", f"expected a name, a whole number and perhaps a text, found {found}")
        if name != self._name:
            self._name, self._system, self._past = name, "", []
        elif turn <= self._turn:
            raise RejectedRow("turn out of order", f"expected a turn above {self._turn}, found {turn}")
        self._turn, self._system = turn, system or self._system
        before = self._system, tuple(self._past)
        self._past.append(_past_turn(row.get("question_text"), row.get("answer_text")))
        return before


def line_shards(path: Path, range_bytes: int | None = None) -> list[SourceShard]:
    """One shard per byte range of a file of lines.

    Args:
        path: the file.
        range_bytes: size of the ranges; None: the default.

    Raises:
        ConfigError: there is no such file.
    """
    ranges = byte_ranges(path) if range_bytes is None else byte_ranges(path, range_bytes)
    return [SourceShard(f"{path.name}:{begin}", (path,), (begin, end)) for begin, end in ranges]


def sentence_case(text: str) -> str:
    """Capitalize the first letter and end with a full stop, if the text is all upper case or all lower case."""
    text = " ".join(text.split())
    if not text or (text.upper() != text and text.lower() != text):
        return text
    text = re.sub(r"\bi\b", "I", text.lower())
    return text[:1].upper() + text[1:] + ("" if text[-1] in ".?!" else ".")


def _parse_object(line: bytes) -> dict[str, Any]:
    try:
        row = parse_json(line)
    except ValueError as error:
        raise RejectedRow("not JSON", str(error)) from None
    if not isinstance(row, dict):
        raise RejectedRow("not an object", f"found {type(row).__name__}")
    return row


def _clean_text(value: Any, name: str) -> str:
    """Text without white space around it; rejects what is empty or cannot be encoded."""
    text = value.strip() if isinstance(value, str) else ""
    if not text:
        raise RejectedRow(f"{name} is empty")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise RejectedRow(f"{name} is not text", str(error)) from None
    return text


def _read_transcript(path: Path) -> str:
    """The text of a file; empty, which is rejected later, if it cannot be read."""
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return ""


def _read_audio(source: Path | io.BytesIO, sample_rate: int, max_seconds: float) -> np.ndarray:
    """A recording as f32 [samples]."""
    try:
        return audio_io.read_audio(source, sample_rate, max_seconds=max_seconds)
    except AudioTooLongError as error:
        raise RejectedRow("recording too long", str(error)) from None
    except AudioError as error:
        raise RejectedRow("recording unusable", str(error)) from None


def _read_pcm16(source: Path | io.BytesIO, max_seconds: float) -> np.ndarray:
    """A recording as int16 [samples] at 16 kHz."""
    return audio_io.to_pcm16(_read_audio(source, audio_io.SAMPLE_RATE, max_seconds))
