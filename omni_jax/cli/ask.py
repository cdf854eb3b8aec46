"""`omni-jax ask`: one question, answered while it is decoded."""

from __future__ import annotations

import contextlib
import gc
import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

import omni_jax
from omni_jax.audio.encoding import FILE_FORMATS, file_format
from omni_jax.audio.io import SAMPLE_RATE, read_audio
from omni_jax.cli.console import echo_err, printable
from omni_jax.cli.loading import load_model
from omni_jax.cli.options import Codec, Json, Model, TaskName, Truncate, takes_generation_config
from omni_jax.errors import AudioError, ConfigError
from omni_jax.inference.generation import GenerationConfig
from omni_jax.inference.request import Request
from omni_jax.tasks import Task

FINISH_REASONS = {
    "stop": "finished",
    "length": "stopped at --max-steps",
    "context": "stopped because the context is full",
}


@takes_generation_config
def ask(
    question: Annotated[
        Path | None,
        typer.Argument(help="A recording or video in any common format; - reads standard input.", show_default=False),
    ] = None,
    text: Annotated[str | None, typer.Option(help="Ask this instead of a recording.", show_default=False)] = None,
    task: TaskName = None,
    out: Annotated[
        Path | None,
        typer.Option(
            help=f"File for the spoken answer: {', '.join(FILE_FORMATS)}. Default: answer.wav.", show_default=False
        ),
    ] = None,
    model: Model = "nano",
    codec: Codec = "jax",
    *,
    config: GenerationConfig,
    truncate: Truncate = False,
    as_json: Json = False,
) -> None:
    """Answer one recording or text.

    The text is printed while it is decoded; the audio is written to a file in the format of its suffix.
    """
    request = Request(question, text, task, truncate=truncate, config=config)
    out = _check_out(out, request.resolve_task(), question)
    if question is not None:
        # Read before the model is loaded, so that a bad file is reported at once.
        audio = _read_question(question)
        request = replace(request, audio=audio, sample_rate=SAMPLE_RATE, name=str(question))
    question_seconds = None if question is None else len(audio) / SAMPLE_RATE

    with garbage_collection_off():
        omni = load_model(model, codec)
        for chunk in omni.stream_prepared(omni.prepare(request)):
            if chunk.text and not as_json:
                typer.echo(printable(chunk.text), nl=False)
            reply = chunk.reply
    assert reply is not None, "the last chunk of a stream has the reply"
    if reply.task.outputs_text and not as_json:
        typer.echo()
    if out is not None:
        reply.save(out)
    if as_json:
        values = _to_json(reply, question_seconds, out) | {"model": model, "trained": omni.trained}
        typer.echo(json.dumps(values, ensure_ascii=False))
    else:
        echo_err(_summary(reply, question_seconds, out))


@contextlib.contextmanager
def garbage_collection_off() -> Iterator[None]:
    """For one answer: loading and tracing leave many objects behind but little garbage to find among them."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def _read_question(question: Path) -> np.ndarray:
    """The recording at a path, or on standard input."""
    if str(question) != "-":
        return read_audio(question)
    if sys.stdin.isatty():
        raise ConfigError("question -: expected a recording on standard input, found a terminal")
    return read_audio(sys.stdin.buffer)


def _check_out(out: Path | None, task: Task, question: Path | None) -> Path | None:
    """The file to write to, which is refused before the answer is decoded if it cannot be written."""
    if not task.outputs_audio:
        if out is not None:
            raise ConfigError(f"--out: task {task} answers in text only, there is no audio to write")
        return None
    out = out or Path("answer.wav")
    if out.is_dir():
        raise ConfigError(f"--out {out}: expected a file to write to, found a folder")
    try:
        file_format(out)
    except AudioError as error:
        raise ConfigError(f"--out {error}") from None
    if not out.parent.is_dir():
        raise ConfigError(f"--out {out}: expected a file in an existing folder, found no folder {out.parent}")
    if question is not None and out.exists() and question.exists() and out.samefile(question):
        raise ConfigError(f"--out {out}: expected another file than the question")
    return out


def _to_json(reply: omni_jax.Reply, question_seconds: float | None, out: Path | None) -> dict[str, Any]:
    timing = reply.timing
    return {
        "text": reply.text,
        "task": str(reply.task),
        "finish_reason": reply.finish_reason,
        "steps": reply.tokens.shape[1],
        "num_invalid_codes": reply.num_invalid_codes,
        "question_seconds": question_seconds,
        "answer_seconds": None if reply.audio is None else reply.seconds,
        "out": None if out is None else str(out),
        "first_token_seconds": timing.first_token,
        "first_audio_seconds": timing.first_audio,
        "total_seconds": timing.total,
        "steps_per_second": timing.steps_per_second,
        "real_time_factor": timing.real_time_factor,
        "tokens": reply.tokens.tolist(),
    }


def _summary(reply: omni_jax.Reply, question_seconds: float | None, out: Path | None) -> str:
    timing = reply.timing
    question = "text" if question_seconds is None else f"{question_seconds:.2f} s of speech"
    speed = f"first token after {timing.first_token:.2f} s"
    if timing.first_audio is not None:
        speed += f", first audio after {timing.first_audio:.2f} s"
    speed += f", total {timing.total:.2f} s ({timing.steps_per_second:.1f} steps/s"
    if timing.real_time_factor is not None:
        speed += f", real-time factor {timing.real_time_factor:.2f}"
    lines = [
        f"{reply.task}: {question} in, {reply.tokens.shape[1]} steps; the answer {FINISH_REASONS[reply.finish_reason]}",
        f"{speed})",
    ]
    if reply.audio is not None:
        lines.append(f"{reply.seconds:.2f} s of audio in {out}")
    if reply.num_invalid_codes:
        lines.append(f"{reply.num_invalid_codes} invalid audio tokens were replaced by the code before them")
    return "\n".join(lines)
