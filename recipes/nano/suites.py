"""Writes the held-out records as suites for `omni-jax evaluate`.

    python -m recipes.nano.suites --records build/nano/records --texts build/nano/text --out build/nano/suites
    omni-jax evaluate build/nano/suites/seen.jsonl --model nano --out build/nano/evaluated/seen

`seen` and `unseen` have the questions by voices that training has, and by others: answered (A1A2, A1T2) and written
down (A1T1). `dictation` has sentences to write down, `text` questions in writing (T1A2, T1T2), `read` sentences to read
aloud (T1A1). A case's group is its kind of question; of sentences, the voices.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from omni_jax.audio import io as audio_io
from omni_jax.audio.encoding import write_audio
from omni_jax.checkpoint.folders import new_folder
from omni_jax.data.records import Exchange, Records, from_bytes
from omni_jax.tasks import Task

SUITES: dict[str, tuple[tuple[str, tuple[Task, ...]], ...]] = {
    "seen": (("held_out_seen", (Task.A1A2, Task.A1T2, Task.A1T1)),),
    "unseen": (("held_out_unseen", (Task.A1A2, Task.A1T2, Task.A1T1)),),
    "dictation": (("dictation_seen", (Task.A1T1,)), ("dictation_unseen", (Task.A1T1,))),
    "text": (("held_out_seen", (Task.T1A2,)), ("held_out", (Task.T1T2,))),
    "read": (("read_held_out", (Task.T1A1,)),),
}
"""Folders of records and the tasks that they are for, by suite."""


def exchanges(folder: Path, limit: int | None = None) -> Iterator[Exchange]:
    """The first exchanges of a folder of records."""
    records = Records(folder)
    for index in range(min(len(records), len(records) if limit is None else limit)):
        yield from_bytes(records[index])


def case(exchange: Exchange, task: Task, number: int, name: str, audio: str) -> dict[str, Any]:
    """A line of a suite: see `omni_jax.evaluation.suites.manifest`."""
    kind = exchange.source.split()[1]
    values = {
        "id": f"{task}-{name}-{number:04d}",
        "task": task.value,
        "group": name if kind == "sentence" else kind,
        "expected": exchange.question_text if task is Task.A1T1 else exchange.answer_text,
    }
    if task.takes_audio:
        return values | {"audio": audio, "question": exchange.question_text}
    return values | {"text": exchange.answer_text if task is Task.T1A1 else exchange.question_text}


def main(
    records: Annotated[Path, typer.Option(help="What recipes.nano.speech wrote.")] = Path("build/nano/records"),
    texts: Annotated[Path, typer.Option(help="Folder of the records of written texts.")] = Path("build/nano/text"),
    out: Annotated[Path, typer.Option(help="New folder.")] = Path("build/nano/suites"),
    limit: Annotated[int | None, typer.Option(min=1, help="At most so many cases of each task.")] = None,
) -> None:
    """Write the held-out records as suites for `omni-jax evaluate`."""
    with new_folder(out) as folder:
        (folder / "audio").mkdir()
        for suite, sources in SUITES.items():
            cases = []
            for name, tasks in sources:
                source = texts / name if name == "held_out" else records / name
                for number, exchange in enumerate(exchanges(source, limit)):
                    audio = f"audio/{name}-{number:04d}.wav"
                    if exchange.question_audio is not None:
                        write_audio(folder / audio, audio_io.from_pcm16(exchange.question_audio), audio_io.SAMPLE_RATE)
                    cases += [case(exchange, task, number, name, audio) for task in tasks]
            lines = [
                json.dumps(values, ensure_ascii=False) for values in sorted(cases, key=lambda values: values["id"])
            ]
            (folder / f"{suite}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
            typer.echo(f"{suite}: {len(lines)} cases")


if __name__ == "__main__":
    typer.run(main)
