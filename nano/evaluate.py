"""Examines a model on what nano is never trained on: held-out questions and sentences, by seen and unseen voices.

    python -m nano.evaluate ask build/nano/packaged         # asks everything, into build/nano/evaluated
    build/listener/bin/python -m nano.listen hear build/nano/evaluated
    python -m nano.evaluate table build/nano/evaluated      # the table, as Markdown

`nano.listen` says how to get a listener, the independent recognizer that judges the sound.
"""

from __future__ import annotations

import json
import random
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import jiwer
import numpy as np
import typer
from tqdm import tqdm

from nano import facts, listen
from omni_jax import Omni
from omni_jax.api import Request
from omni_jax.audio import io as audio_io
from omni_jax.config.model import PRESETS
from omni_jax.data.records import Exchange, Records, from_bytes
from omni_jax.inference.answer import Reply

FOLDER = Path("build/nano/evaluated")
RECORDS = Path("build/nano/records")
ANSWERS = "answers.json"
TIMED = 20
"""Questions that are asked one by one, with a clock."""
BATCH = 64
"""Questions at once, so that their sound need not all be in memory."""

app = typer.Typer(help=__doc__.splitlines()[0], no_args_is_help=True)


@dataclass(frozen=True)
class Examination:
    """One task on one folder of records."""

    task: str
    records: str
    """Folder, seen from that of the records."""
    batch_parallel: bool = True

    @property
    def name(self) -> str:
        """As it stands in the table."""
        return f"{self.task} {Path(self.records).name}" + ("" if self.batch_parallel else " plain")


_HEARD = (("A1A2", "held_out", True), ("A1A2", "held_out", False), ("A1T2", "held_out", True))
_WRITTEN_DOWN = (("A1T1", "held_out", True), ("A1T1", "dictation", True))
EXAMINATIONS = (
    *(
        Examination(task, f"{what}_{voices}", parallel)
        for task, what, parallel in (*_HEARD, *_WRITTEN_DOWN)
        for voices in ("seen", "unseen")
    ),
    Examination("T1A2", "held_out_seen"),
    Examination("T1T2", "../text/held_out"),
    Examination("T1A1", "read_held_out"),
)


def question(exchange: Exchange, task: str) -> Request:
    """What is asked of the model."""
    if task.startswith("A1"):
        return Request(audio=exchange.question_audio, sample_rate=audio_io.SAMPLE_RATE, task=task)
    return Request(text=exchange.answer_text if task == "T1A1" else exchange.question_text, task=task)


def expected(exchange: Exchange, task: str) -> str:
    """What the model should write or, if it only speaks, say."""
    return exchange.question_text if task == "A1T1" else exchange.answer_text


def examine(omni: Omni, records: Path, examination: Examination, count: int, spoken: int, out: Path) -> list[Any]:
    """Ask up to `count` exchanges of a folder; the sound of up to `spoken` answers is written to `out`.

    Returns:
        For each exchange what was asked and what came of it, as JSON can hold it.
    """
    folder = Records(records / examination.records)
    chosen = random.Random(0).sample(range(len(folder)), min(count, len(folder)))
    outcome: list[Any] = []
    task = examination.task
    for first in tqdm(range(0, len(chosen), BATCH), desc=examination.name, unit="batch"):
        exchanges = [
            from_bytes(folder[index], codebook_size=omni.config.vocab.audio) for index in chosen[first : first + BATCH]
        ]
        asks = [question(exchange, task) for exchange in exchanges]
        replies = omni.batch(asks, batch_parallel=examination.batch_parallel)
        for exchange, reply in zip(exchanges, replies, strict=True):
            entry = _entry(exchange, reply, task)
            if reply.audio is not None and len(reply.audio) and len(outcome) < spoken:
                entry["file"] = f"{examination.name.replace(' ', '-')}-{len(outcome):04d}.wav"
                reply.save(out / entry["file"])
            outcome.append(entry)
    return outcome


def _entry(exchange: Exchange, reply: Reply, task: str) -> dict[str, Any]:
    kind, _, held_out = exchange.source.removeprefix("nano ").partition(" ")
    return {
        "kind": kind,
        "held_out": held_out,
        "question": exchange.question_text,
        "expected": expected(exchange, task),
        "written": reply.text,
        "seconds": round(reply.seconds, 2),
        "finish": reply.finish_reason,
        "num_invalid_codes": reply.num_invalid_codes,
    }


def clock(omni: Omni, records: Path, count: int = TIMED) -> dict[str, float]:
    """Ask spoken questions one by one, streaming: medians of the seconds from the question's end.

    Returns:
        `first_sound` and `total` in seconds, `real_time_factor`: total over the duration of the answer.
    """
    folder = Records(records / "held_out_seen")
    exchanges = [from_bytes(folder[i], codebook_size=omni.config.vocab.audio) for i in range(min(count, len(folder)))]
    times: dict[str, list[float]] = defaultdict(list)
    for turn in range(2):
        # The first turn compiles.
        for exchange in exchanges:
            start, first, samples = time.perf_counter(), 0.0, 0
            for part in omni.stream(exchange.question_audio, sample_rate=audio_io.SAMPLE_RATE):
                if len(part.audio):
                    first = first or time.perf_counter() - start
                    samples += len(part.audio)
            total = time.perf_counter() - start
            if turn and samples:
                times["first_sound"].append(first)
                times["total"].append(total)
                times["real_time_factor"].append(total / (samples / omni.config.codec.sample_rate))
    return {name: round(float(np.median(values)), 3) for name, values in times.items()}


def scores(entries: Sequence[Any]) -> dict[str, Any]:
    """Exact answers and word errors of what was written, overall and by what was held out; nothing of T1A1."""
    if not any(entry["written"] for entry in entries):
        return {"count": len(entries)}
    groups: dict[str, list[bool]] = defaultdict(list)
    for entry in entries:
        right = entry["written"] == entry["expected"]
        for name in ("", entry["held_out"], entry["kind"]):
            groups[name].append(right)
    said, decode_text = ([facts.normalize(entry[key]) for entry in entries] for key in ("expected", "written"))
    exact = {name: round(float(np.mean(rights)), 4) for name, rights in groups.items() if name}
    return {
        "count": len(entries),
        "exact": round(float(np.mean(groups[""])), 4),
        "wer": round(float(jiwer.wer(said, decode_text)), 4),
        "exact_by": exact,
    }


def table(folder: Path) -> str:
    """What was found, as Markdown: what the model wrote, and what the listener heard if it has listened."""
    found = json.loads((folder / ANSWERS).read_text(encoding="utf-8"))
    path = folder / listen.HEARD
    listener = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"summary": {}, "recordings": []}
    lines = ["| examination | questions | exact | WER | spoken answers | WER as heard |", "|---|---|---|---|---|---|"]
    for name, entries in found["examinations"].items():
        score, ears = scores(entries), listener["summary"].get(name, {})
        cells = [name, str(score["count"])]
        cells += [f"{score[key]:.1%}" if key in score else "" for key in ("exact", "wer")]
        cells += [str(ears.get("recordings", "")), f"{ears['wer']:.1%}" if ears else ""]
        lines.append(f"| {' | '.join(cells)} |")
    speed = found["speed"]
    if speed:
        lines += [
            "",
            f"One question at a time: first sound after {speed['first_sound']:.2f} s, the whole answer after "
            f"{speed['total']:.2f} s, {speed['real_time_factor']:.2f}x real time (medians).",
        ]
    decode_text = {name: scores(entries).get("exact_by", {}) for name, entries in found["examinations"].items()}
    chosen = ("A1A2 held_out_seen", "A1T2 held_out_seen", "T1T2 held_out")
    lines += _by_kind("exact", {name: decode_text[name] for name in chosen if name in decode_text})
    return "\n".join(lines + _by_kind("WER as heard", heard_by_kind(found["examinations"], listener["recordings"])))


def heard_by_kind(examinations: dict[str, Any], recordings: Sequence[Any]) -> dict[str, dict[str, float]]:
    """Word error rate of spoken answers to each kind of question, for examinations that have kinds and were heard.

    Args:
        examinations: as `ask` keeps them, by name.
        recordings: as the listener keeps them.
    """
    kinds = {entry["file"]: entry["kind"] for entries in examinations.values() for entry in entries if "file" in entry}
    said: dict[str, dict[str, list[Any]]] = defaultdict(lambda: defaultdict(list))
    for entry in recordings:
        if kinds[entry["file"]] in facts.KINDS:
            said[entry["group"]][kinds[entry["file"]]].append(entry)
    return {name: {kind: listen.wer(entries) for kind, entries in by.items()} for name, by in said.items()}


def _by_kind(title: str, columns: dict[str, dict[str, float]]) -> list[str]:
    """Lines of a table with a row for each kind of question; none without columns."""
    if not columns:
        return []
    lines = ["", f"| {title} | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
    for kind in sorted({kind for column in columns.values() for kind in column}):
        cells = [f"{column[kind]:.0%}" if kind in column else "" for column in columns.values()]
        lines.append(f"| {kind} | {' | '.join(cells)} |")
    return lines


@app.command()
def ask(
    model: Annotated[str, typer.Argument(help="nano, a release folder, or the folder of a finished run")],
    out: Annotated[Path, typer.Option(help="Folder to write")] = FOLDER,
    records: Annotated[Path, typer.Option(help="What nano.records wrote")] = RECORDS,
    count: Annotated[int, typer.Option(help="Questions of each examination, at most")] = 1000,
    spoken: Annotated[int, typer.Option(help="Spoken answers of each that are kept for the listener")] = 60,
    only: Annotated[list[str] | None, typer.Option(help="A task, e.g. A1T1; may be repeated")] = None,
) -> None:
    """Ask everything, keep what was written and said."""
    tasks = {examination.task for examination in EXAMINATIONS}
    if unknown := set(only or ()) - tasks:
        raise typer.BadParameter(
            f"--only: expected some of {', '.join(sorted(tasks))}, found {', '.join(sorted(unknown))}"
        )
    omni = Omni.load(model)
    if omni.config.vocab != PRESETS["nano"].vocab:
        raise typer.BadParameter(f"{model}: expected a model with nano's vocabulary")
    out.mkdir(parents=True, exist_ok=True)
    # What was heard of another model.
    (out / listen.HEARD).unlink(missing_ok=True)
    found = {
        examination.name: examine(omni, records, examination, count, spoken, out)
        for examination in EXAMINATIONS
        if not only or examination.task in only
    }
    speed = clock(omni, records) if not only or "A1A2" in only else {}
    text = json.dumps({"model": model, "speed": speed, "examinations": found}, ensure_ascii=False, indent=1)
    (out / ANSWERS).write_text(text + "\n", encoding="utf-8")
    # The listener compares the sound with what the model wrote; where it writes nothing, with what it was to read.
    listen.write_texts(
        out,
        [
            {"file": entry["file"], "text": entry["written"] or entry["expected"], "group": name}
            for name, entries in found.items()
            for entry in entries
            if "file" in entry
        ],
    )
    typer.echo(table(out))


@app.command("table")
def table_command(
    folder: Annotated[Path, typer.Argument(help="What `ask` wrote")] = FOLDER,
    wrong: Annotated[int, typer.Option(help="Wrong answers to show of each examination")] = 0,
) -> None:
    """Print what was found."""
    typer.echo(table(folder))
    found = json.loads((folder / ANSWERS).read_text(encoding="utf-8"))["examinations"]
    for name, entries in found.items():
        read_aloud = name.startswith("T1A1")  # nothing is written then
        misses = [entry for entry in entries if entry["written"] != entry["expected"] and not read_aloud][:wrong]
        if misses:
            typer.echo(f"\n{name}:")
        for entry in misses:
            typer.echo(f"    {entry['question']}  {entry['expected']}  ->  {entry['written']}")


if __name__ == "__main__":
    app()
