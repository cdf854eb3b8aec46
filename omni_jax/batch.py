"""A resumable job: answers every row of a manifest, or every recording of a folder.

The source is a file of JSON lines, one row per line:

    {"id": "q1", "audio": "q1.wav"}
    {"id": "q2", "text": "What is the capital of France?", "task": "T1T2", "seed": 7}
    {"id": "q3", "text": "And of Italy?", "history": [{"question": "...", "answer": "..."}], "system": "Be brief."}

`id` and one of `audio` (relative to the manifest) and `text` are required; `task`, `truncate` and the fields of
`GenerationConfig` are optional and override the job's; `system` and `history` are those of `Request`. Or it is a folder
of recordings.

The output is a folder with `answers.jsonl`, one line per row in the order of the source, and one wav file per spoken
answer. A line has `id`, `task`, `text`, `audio` (name of the wav file), `seconds`, `finish_reason`,
`num_invalid_codes` and `request` (a fingerprint of the question, the options and the model), or `id` and `error`.

An interrupted job is run again with the same arguments. A row is answered again if it failed, or if its question, its
options or the model have changed.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pydantic
from pydantic import ConfigDict, Field, StrictBool, StrictStr

from omni_jax.audio.decoding import HEADERLESS
from omni_jax.config.load import build_config
from omni_jax.errors import ConfigError, OmniError
from omni_jax.file_names import safe_file_name
from omni_jax.folder_lock import FolderLock
from omni_jax.inference.generation import GenerationConfig
from omni_jax.inference.messages import to_messages
from omni_jax.inference.request import Request
from omni_jax.input_files import parse_json, read_file
from omni_jax.tasks import Task

if TYPE_CHECKING:
    from omni_jax.api import Omni
    from omni_jax.inference.answer import Reply
    from omni_jax.inference.engine import PreparedRequest

log = logging.getLogger(__name__)

ANSWERS = "answers.jsonl"
"""The output file. Of several processes, each writes one of its own, such as `answers-00000-of-00002.jsonl`."""
_SUFFIXES = (
    "3g2 3gp aac aif aiff amr ape au avi caf flac flv m4a m4b m4v mka mkv mov mp2 mp3 mp4 mpeg mpg oga ogg "
    "ogv opus spx ts w64 wav webm wma wmv wv"
)
RECORDING_SUFFIXES = (*(f".{suffix}" for suffix in _SUFFIXES.split()), *HEADERLESS)
"""Files of a folder that are recordings, or videos with sound. A manifest may name files of any suffix."""
WINDOW = 8
"""Rows in memory, and rows that a kill loses at most, per row of the running batch."""


@dataclass(frozen=True)
class BatchSummary:
    """What a job did."""

    path: Path
    """The file of answers."""
    num_rows: int
    num_answered: int
    num_kept: int
    """Answered by an earlier run."""
    num_failed: int


def answer_manifest(
    load: Callable[[], Omni],
    source: str | Path,
    out: str | Path,
    *,
    model_id: str,
    task: Task | str | None = None,
    truncate: bool = False,
    config: GenerationConfig | None = None,
    max_batch_size: int = 8,
    process_index: int = 0,
    num_processes: int = 1,
    progress: Callable[[int, int], object] | None = None,
) -> BatchSummary:
    """Answer the rows that have no answer yet.

    Args:
        load: loads the model; not called if no row needs it.
        source: a manifest of JSON lines, or a folder of recordings.
        out: the folder to write to; made if it is not there.
        model_id: identifies the weights and the codec, such as `Release.fingerprint()`.
        task: of rows that have none; None: A1A2 or T1A2.
        truncate: use only the beginning of recordings that are too long, unless the row says otherwise.
        config: options of rows that have none.
        max_batch_size: rows that are decoded together.
        process_index: of `num_processes` processes that share the rows.
        num_processes: see `process_index`.
        progress: called with how many rows are done, and of how many.

    Returns:
        How many rows were answered and failed. A row that fails does not stop the others.

    Raises:
        ConfigError: the source or the output folder cannot be used.
        FolderInUseError: another job writes these answers.
    """
    output = AnswerFolder(Path(out), process_index, num_processes)
    defaults = Request(task=task, truncate=truncate, config=config or GenerationConfig())
    rows = read_rows(Path(source), output.folder, defaults)[process_index::num_processes]
    with FolderLock(output.folder, "omni-jax batch", f".{output.path.name}.lock") as lock:
        output.open()
        fingerprints = [row.fingerprint(model_id) for row in rows]
        records = [output.find_answer(row.id, fingerprint) for row, fingerprint in zip(rows, fingerprints, strict=True)]
        todo = [index for index, record in enumerate(records) if record is None]
        omni = load() if any(rows[index].request for index in todo) else None
        # Answers to other requests are dropped now, not before it is certain that this run can start.
        output.write_all([record for record in records if record is not None])
        num_failed = 0
        report = progress or (lambda done, total: None)
        for start in range(0, len(todo), WINDOW * max_batch_size):
            report(len(rows) - len(todo) + start, len(rows))
            window = todo[start : start + WINDOW * max_batch_size]
            answers = _answer(omni, [rows[index] for index in window], max_batch_size)
            lock.check()
            for index, answer in zip(window, answers, strict=True):
                records[index] = record = _to_record(rows[index], answer, fingerprints[index])
                output.append(record, answer)
                num_failed += "error" in record
        report(len(rows), len(rows))
        # A row that failed earlier and was tried again is at the end so far.
        output.write_all([record for record in records if record is not None])
        return BatchSummary(output.path, len(rows), len(todo) - num_failed, len(rows) - len(todo), num_failed)


def _answer(omni: Omni | None, rows: Sequence[Row], max_batch_size: int) -> list[Reply | str]:
    """The reply to each row, or why there is none."""
    answers: list[Reply | str] = [row.error for row in rows]
    requests: dict[int, PreparedRequest] = {}
    for index, row in enumerate(rows):
        if row.request is None:
            continue
        assert omni is not None, "the model is loaded if a row can be asked"
        try:
            requests[index] = omni.prepare(row.request)
        except OmniError as error:
            answers[index] = str(error)
        except Exception as error:
            log.exception("%s could not be prepared", row.place)
            answers[index] = f"{row.place}: could not be prepared: {_describe(error)}"
    if omni is not None:
        for index, answer in zip(requests, _run(omni, list(requests.values()), max_batch_size), strict=True):
            answers[index] = answer
    return answers


def _run(omni: Omni, requests: list[PreparedRequest], max_batch_size: int) -> Sequence[Reply | str]:
    """The replies; where answering fails, each request by itself, so that only those have none that fail alone."""
    try:
        return omni.run(requests, max_batch_size)
    except Exception as error:
        if len(requests) == 1:
            log.exception("a row could not be answered")
            return [f"could not be answered: {_describe(error)}"]
    return [answer for request in requests for answer in _run(omni, [request], max_batch_size)]


def _describe(error: Exception) -> str:
    """The kind of an error and the first line of its message, which may be long."""
    line = (str(error).splitlines() or [""])[0][:200]
    return f"{type(error).__name__}: {line}"


def _to_record(row: Row, reply: Reply | str, fingerprint: str | None) -> dict[str, Any]:
    if isinstance(reply, str):
        return {"id": row.id, "error": reply}
    has_audio = reply.audio is not None
    return {
        "id": row.id,
        "task": str(reply.task),
        "text": reply.text,
        "audio": row.wav if has_audio else None,
        "seconds": round(reply.seconds, 4) if has_audio else None,
        "finish_reason": reply.finish_reason,
        "num_invalid_codes": reply.num_invalid_codes,
        "request": fingerprint,
    }


@dataclass(frozen=True)
class Row:
    """One row of a job: a request, or why it is none."""

    id: str | None
    place: str
    """File and line, for messages."""
    request: Request | None = None
    """None if there is an error."""
    wav: str = ""
    """File name of its spoken answer."""
    error: str = ""

    def with_error(self, error: str) -> Row:
        """The same row, not to be asked."""
        return dataclasses.replace(self, request=None, wav="", error=error)

    @property
    def audio(self) -> Path | None:
        """The recording that it asks."""
        audio = None if self.request is None else self.request.audio
        return audio if isinstance(audio, Path) else None

    def fingerprint(self, model_id: str) -> str | None:
        """16 hexadecimal digits that identify the content of the question, the options and the model."""
        if self.request is None:
            return None
        assert self.request.config is not None
        try:
            audio = _hash_file(self.audio) if self.audio else None
        except OSError:
            audio = None
        request: dict[str, Any] = {
            "audio": audio,
            "text": self.request.text,
            "task": str(self.request.resolve_task()),
            "truncate": self.request.truncate,
            "config": dataclasses.asdict(self.request.config),
            "model": model_id,
        }
        if messages := to_messages(self.request.system or "", self.request.history):
            request["messages"] = messages
        return hashlib.sha256(json.dumps(request, sort_keys=True).encode()).hexdigest()[:16]


def _hash_file(path: Path) -> str | None:
    """The SHA-256 of a file; None if it is a pipe or a device, which may have no end."""
    if not path.is_file():
        return None
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@pydantic.dataclasses.dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class ManifestRow:
    """One line of a manifest, without the fields of `GenerationConfig`."""

    id: StrictStr = Field(min_length=1)
    """Unique in the manifest."""
    audio: StrictStr | None = None
    """A recording, relative to the manifest."""
    text: StrictStr | None = None
    task: StrictStr | None = None
    truncate: StrictBool | None = None
    system: StrictStr | None = None
    history: Any = None
    """Past turns, as `Request` takes them."""


def read_rows(source: Path, out: Path, defaults: Request) -> list[Row]:
    """The rows of a manifest or folder.

    Args:
        source: the manifest or folder.
        out: the output folder, whose wav files must not replace a recording.
        defaults: task, truncate and config of rows that have none.

    Raises:
        ConfigError: the source cannot be used as a whole.
    """
    rows = _read_folder(source, out, defaults) if source.is_dir() else _read_manifest(source, defaults)
    return _refuse_overwriting(_name_wavs(rows), out)


def _read_folder(folder: Path, out: Path, defaults: Request) -> list[Row]:
    """One row per recording, sorted by name.

    The id is the file's name without its suffix, or with it where two files would have the same id.

    Raises:
        ConfigError: there are no recordings, or `out` is the same folder.
    """
    if folder.resolve() == out.resolve():
        raise ConfigError(f"{out}: expected another output folder than that of the questions")
    files = sorted(path for path in folder.iterdir() if path.suffix.lower() in RECORDING_SUFFIXES and path.is_file())
    if not files:
        raise ConfigError(f"{folder}: expected recordings ({', '.join(RECORDING_SUFFIXES)}), found none")
    stems = Counter(path.stem for path in files)
    ids = [path.name if stems[path.stem] > 1 else path.stem for path in files]
    return [_to_row(id, path.name, path, None, defaults) for id, path in zip(ids, files, strict=True)]


def _read_manifest(path: Path, defaults: Request) -> list[Row]:
    """One row per line that is not blank; a line that cannot be used becomes a row with an error.

    Raises:
        ConfigError: the file cannot be read or is empty.
    """
    lines = read_file(path, ConfigError, "a manifest or a folder").removeprefix(b"\xef\xbb\xbf").split(b"\n")
    rows = [_read_row(path, number, line, defaults) for number, line in enumerate(lines, 1) if line.strip()]
    if not rows:
        raise ConfigError(f"{path}: expected a manifest of JSON lines, found an empty file")
    return rows


def _read_row(path: Path, number: int, line: bytes, defaults: Request) -> Row:
    place = f"{path.name} line {number}"
    try:
        values = parse_json(line)
    except ValueError as error:
        return Row(None, place, error=f"{place}: expected a JSON object, found {error}")
    if not isinstance(values, dict):
        return Row(None, place, error=f"{place}: expected a JSON object, found {type(values).__name__}")
    id = values.get("id") if isinstance(values.get("id"), str) else None
    names = {field.name for field in dataclasses.fields(GenerationConfig)}
    options = {name: values.pop(name) for name in names & values.keys()}
    assert defaults.config is not None
    errors = []
    try:
        config = defaults.config.replace(**{name: value for name, value in options.items() if value is not None})
    except ConfigError as error:
        errors.append(str(error.prefixed(place)))
    try:
        row = build_config(ManifestRow, values, place)
    except ConfigError as error:
        errors += str(error).splitlines()
    if errors:
        return Row(id, place, error="; ".join(errors))
    truncate = defaults.truncate if row.truncate is None else row.truncate
    task, history = row.task or defaults.task, () if row.history is None else row.history
    try:
        given = Request(task=task, truncate=truncate, config=config, system=row.system, history=history)
    except ConfigError as error:
        return Row(id, place, error=str(error.prefixed(place)))
    audio = None if row.audio is None else path.parent / row.audio
    try:
        if audio is not None:
            audio.resolve()
    except (OSError, ValueError) as error:
        message = f"{place}: audio: expected the path of a file, found {row.audio!r}: {error}"
        return Row(id, place, error=message)
    return _to_row(row.id, place, audio, row.text, given)


def _to_row(id: str, place: str, audio: Path | None, text: str | None, defaults: Request) -> Row:
    request = dataclasses.replace(defaults, audio=audio, text=text)
    try:
        request.resolve_task()
    except ConfigError as error:
        return Row(id, place, error=str(error.prefixed(place)))
    return Row(id, place, request)


def _name_wavs(rows: Sequence[Row]) -> list[Row]:
    """Give each row the name of a wav file; a second row with the same id becomes an error.

    No two names differ only in case, because some file systems ignore it.
    """
    places: dict[str, str] = {}
    names: set[str] = set()
    result = []
    for row in rows:
        if row.id is None or row.error:
            result.append(row)
            continue
        if row.id in places:
            result.append(row.with_error(f"{row.place}: id {row.id!r} was used before, by {places[row.id]}"))
            continue
        places[row.id] = row.place
        name = safe_file_name(row.id)
        if name.casefold() in names:
            name = safe_file_name(row.id, force_hash=True)
        names.add(name.casefold())
        result.append(dataclasses.replace(row, wav=f"{name}.wav"))
    return result


def _refuse_overwriting(rows: Sequence[Row], folder: Path) -> list[Row]:
    """Refuse rows whose spoken answer would replace a recording of some row."""
    questions = {row.audio.resolve(): row.audio for row in rows if row.audio}
    result = []
    for row in rows:
        question = questions.get((folder / row.wav).resolve()) if row.wav else None
        if question is not None:
            row = row.with_error(
                f"{row.place}: its answer would replace the recording {question}: choose another output folder or id"
            )
        result.append(row)
    return result


class AnswerFolder:
    """The output folder of a job.

    A row's wav file is complete before its line is written. A half-written line, as a kill leaves it, is dropped. Each
    of several processes has its own file of lines.

    Attributes:
        folder: the folder.
        path: the file of lines of this process.
    """

    def __init__(self, folder: Path, process_index: int = 0, num_processes: int = 1):
        self.folder = folder
        self.path = folder / _answers_name(process_index, num_processes)
        self._num_processes = num_processes
        self._earlier: dict[str, dict[str, Any]] = {}

    def open(self) -> None:
        """Make the folder and read the answers of earlier runs.

        Raises:
            ConfigError: it cannot be written to, or has answers of another number of processes.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._refuse_other_processes()
            if self._num_processes == 1:
                # A kill while a wav file is written leaves these.
                for left_over in self.folder.glob(".*.wav.????????.part"):
                    left_over.unlink()
            lines = read_file(self.path, ConfigError, "earlier answers").split(b"\n") if self.path.exists() else []
        except OSError as error:
            raise ConfigError(f"{error.filename}: expected a folder to write to, found {error.strerror}") from None
        for line in lines:
            try:
                record = parse_json(line)
                if "error" not in record:
                    self._earlier[record["id"]] = record
            except (ValueError, KeyError, TypeError):
                continue

    def _refuse_other_processes(self) -> None:
        found = {path.name for path in self.folder.glob(f"{Path(ANSWERS).stem}*.jsonl")}
        found -= {_answers_name(index, self._num_processes) for index in range(self._num_processes)}
        if found:
            raise ConfigError(
                f"{self.folder}: expected answers of {self._num_processes} processes or none, found {min(found)}: "
                "resume with as many processes as before, or choose another output folder"
            )

    def find_answer(self, id: str | None, fingerprint: str | None) -> dict[str, Any] | None:
        """The record of an earlier run for the same request, if its wav file is there."""
        record = self._earlier.get(id or "")
        if record is None or fingerprint is None or record.get("request") != fingerprint:
            return None
        audio = record.get("audio")
        return record if audio is None or (isinstance(audio, str) and (self.folder / audio).is_file()) else None

    def write_all(self, records: Sequence[dict[str, Any]]) -> None:
        """Replace the file of lines, whole or not at all."""
        partial = self.path.with_name(f".{self.path.name}.part")
        partial.write_bytes(b"".join(_to_line(record) for record in records))
        partial.replace(self.path)

    def append(self, record: dict[str, Any], reply: Reply | str) -> None:
        """Write the audio of a reply, then add a line; it has left the process when this returns."""
        if not isinstance(reply, str) and reply.audio is not None:
            reply.save(self.folder / record["audio"])
        with self.path.open("ab") as file:
            file.write(_to_line(record))


def _answers_name(process_index: int, num_processes: int) -> str:
    if num_processes == 1:
        return ANSWERS
    return f"{Path(ANSWERS).stem}-{process_index:05d}-of-{num_processes:05d}.jsonl"


def _to_line(record: dict[str, Any]) -> bytes:
    # Ids from JSON may hold lone surrogates, which only ASCII escapes can carry.
    text = json.dumps(record, ensure_ascii=False)
    try:
        return text.encode() + b"\n"
    except UnicodeEncodeError:
        return json.dumps(record).encode() + b"\n"
