"""Writes the held-out records as suites for `omni-jax evaluate`.

    python -m recipes.nano.suites --records build/nano/records --texts build/nano/text --out build/nano/suites
    omni-jax evaluate build/nano/suites/seen.jsonl --model nano --out build/nano/evaluated/seen

`seen`, `unseen` and `natural` have the questions by voices that training has, by others, and by others that sound like
people: answered (A1A2, A1T2) and written down (A1T1). `natural_noise`, `natural_telephone` and `natural_silence` are
the latter made harder. `noise` has recordings without a question. `dictation` has sentences to write down, `text` and
`typos` questions in writing (T1A2, T1T2), `read` sentences to read aloud (T1A1). Cases are grouped by kind of question,
sentences by voices.

`conversation` and `conversation_text` have last turns of conversations, spoken and in writing, with histories from
text; `conversation_speech` has those of `conversation` with histories from speech: recordings of the past questions.
They are grouped into follow-ups, and new questions, whose answers are the same without what precedes them.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from omni_jax.audio import augment
from omni_jax.audio import io as audio_io
from omni_jax.audio.encoding import write_audio
from omni_jax.audio.io import SAMPLE_RATE
from omni_jax.checkpoint.folders import new_folder
from omni_jax.data.records import Exchange, Records, from_bytes
from omni_jax.tasks import Task
from recipes.nano.texts import NOT_UNDERSTOOD, UNKNOWN, known_answers

ANSWERED = (Task.A1A2, Task.A1T2, Task.A1T1)
FOLLOWED = (Task.A1A2, Task.A1T2)
SUITES: dict[str, tuple[tuple[str, tuple[Task, ...]], ...]] = {
    "seen": (("held_out_seen", ANSWERED),),
    "unseen": (("held_out_unseen", ANSWERED),),
    "natural": (("held_out_natural", ANSWERED),),
    "natural_noise": (("held_out_natural", (Task.A1A2,)),),
    "natural_telephone": (("held_out_natural", (Task.A1A2,)),),
    "natural_silence": (("held_out_natural", (Task.A1A2,)),),
    "noise": (("noise_held_out", (Task.A1A2,)),),
    "dictation": (("dictation_seen", (Task.A1T1,)), ("dictation_unseen", (Task.A1T1,))),
    "text": (("held_out_seen", (Task.T1A2,)), ("held_out", (Task.T1T2,))),
    "typos": (("typos_held_out", (Task.T1T2,)),),
    "conversation": (("conversation_held_out", FOLLOWED),),
    "conversation_speech": (("conversation_held_out", FOLLOWED),),
    "conversation_text": (("conversation_text_held_out", (Task.T1T2,)),),
    "read": (("read_held_out", (Task.T1A1,)),),
}
"""Folders of records and the tasks that they are for, by suite."""
HISTORY = {"conversation_speech": "history_held_out"}
"""Folder of the recordings of past questions, by suite; in others they are text."""
WRITTEN = ("held_out", "typos_held_out", "conversation_text_held_out")
"""Folders of records that are in writing."""
NOISE_DB = 10.0
SILENCE_SECONDS = 2.0


def add_noise(audio: np.ndarray, seed: int) -> np.ndarray:
    """Pink noise 10 dB below the speech."""
    noise = augment.colored_noise(np.random.default_rng(seed), len(audio), SAMPLE_RATE, 1.0)
    loudness = np.sqrt(np.mean(np.square(augment.trim_silence(audio, SAMPLE_RATE))))
    return augment.set_level(audio + noise * loudness * np.float32(10 ** (-NOISE_DB / 20)), -20.0)


def call_by_telephone(audio: np.ndarray, seed: int) -> np.ndarray:
    """G.711, 8 kHz."""
    return augment.through_codec(augment.set_level(audio, -20.0), SAMPLE_RATE, augment.CODECS["telephone"])


def add_silence(audio: np.ndarray, seed: int) -> np.ndarray:
    """Two seconds of it before the question."""
    return np.concatenate([np.zeros(round(SILENCE_SECONDS * SAMPLE_RATE), np.float32), audio])


CHANGES: dict[str, Callable[[np.ndarray, int], np.ndarray]] = {
    "natural_noise": add_noise,
    "natural_telephone": call_by_telephone,
    "natural_silence": add_silence,
}
"""What is done to the recordings of a suite: a function of audio f32 [samples] at 16 kHz and a seed."""


def exchanges(folder: Path, limit: int | None = None) -> Iterator[Exchange]:
    """The first exchanges of a folder of records, at most `limit`."""
    records = Records(folder)
    for index in range(len(records))[:limit]:
        yield from_bytes(records[index])


def group(exchange: Exchange, name: str) -> str:
    """What the metrics of a case are given for: kind of question, voices of a sentence, or place in a conversation."""
    if name.startswith("conversation"):
        alone = (exchange.question_text, exchange.answer_text) in known_answers()
        return "new_question" if alone else "follow_up"
    kind = exchange.source.split()[1]
    return name if kind == "sentence" else kind


def case(
    exchange: Exchange, task: Task, number: int, name: str, audio: str, past: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """A line of a suite: see `omni_jax.evaluation.suites.manifest`.

    Args:
        exchange: a held-out one.
        task: to be done with it.
        number: in its folder of records.
        name: of this folder.
        audio: file of its question, relative to the suite.
        past: files of past questions; None: these are text.
    """
    values: dict[str, Any] = {
        "id": f"{task}-{name}-{number:04d}",
        "task": task.value,
        "group": group(exchange, name),
        "expected": exchange.question_text if task is Task.A1T1 else exchange.answer_text,
    }
    if exchange.in_conversation:
        values["system"] = exchange.system
        values["history"] = [
            {"question": turn.question, "answer": turn.answer}
            | ({} if past is None else {"audio": past[turn.question]})
            for turn in exchange.history
        ]
    if values["group"] == "noise":
        # Either will do.
        values["expected"] = [UNKNOWN, NOT_UNDERSTOOD]
    if task.takes_audio:
        return values | {"audio": audio, "question": exchange.question_text}
    return values | {"text": exchange.answer_text if task is Task.T1A1 else exchange.question_text}


def write_past_questions(records: Path, folder: Path) -> dict[str, str]:
    """Write recordings of past questions; the names of their files, relative to the folder, by text."""
    names = {}
    for number, exchange in enumerate(exchanges(records)):
        assert exchange.question_audio is not None
        names[exchange.question_text] = name = f"audio/{records.name}-{number:04d}.wav"
        write_audio(folder / name, audio_io.from_pcm16(exchange.question_audio), SAMPLE_RATE)
    return names


def main(
    records: Annotated[Path, typer.Option(help="What recipes.nano.speech wrote.")] = Path("build/nano/records"),
    texts: Annotated[Path, typer.Option(help="Folder of the records of written texts.")] = Path("build/nano/text"),
    out: Annotated[Path, typer.Option(help="New folder.")] = Path("build/nano/suites"),
    limit: Annotated[int, typer.Option(min=1, help="At most so many exchanges of a folder.")] = 200,
    only: Annotated[list[str] | None, typer.Option(help="A suite, e.g. seen; may be repeated.")] = None,
) -> None:
    """Write the held-out records as suites for `omni-jax evaluate`."""
    with new_folder(out) as folder:
        (folder / "audio").mkdir()
        for suite in only or SUITES:
            cases = []
            past = write_past_questions(records / HISTORY[suite], folder) if suite in HISTORY else None
            for name, tasks in SUITES[suite]:
                source = texts / name if name in WRITTEN else records / name
                change = CHANGES.get(suite, lambda audio, seed: audio)
                for number, exchange in enumerate(exchanges(source, limit)):
                    audio = f"audio/{suite}-{name}-{number:04d}.wav"
                    if exchange.question_audio is not None:
                        recording = change(audio_io.from_pcm16(exchange.question_audio), number)
                        write_audio(folder / audio, recording, SAMPLE_RATE)
                    cases += [case(exchange, task, number, name, audio, past) for task in tasks]
            lines = [
                json.dumps(values, ensure_ascii=False) for values in sorted(cases, key=lambda values: values["id"])
            ]
            (folder / f"{suite}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
            typer.echo(f"{suite}: {len(lines)} cases")


if __name__ == "__main__":
    typer.run(main)
