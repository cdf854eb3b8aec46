"""`omni-jax demo`: the recorded questions that come with the package."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer

import omni_jax
from omni_jax.audio.io import SAMPLE_RATE, read_audio
from omni_jax.cli.console import echo_err, printable
from omni_jax.cli.loading import load_model
from omni_jax.cli.options import Model
from omni_jax.errors import ConfigError
from omni_jax.inference.request import Request

QUESTIONS = Path(omni_jax.__file__).parent / "assets" / "questions"
MAX_STEPS = 150
"""Answers of at most twelve seconds."""


def demo(
    out: Annotated[Path, typer.Option(help="Folder for the spoken answers.")] = Path("demo"),
    model: Model = "nano",
) -> None:
    """Answer the recorded questions that come with the package.

    Prints the transcript, the answer and the timings of each, and writes the spoken answers as wav files.
    """
    questions = {path.name: read_audio(path) for path in sorted(QUESTIONS.glob("*.wav"))}
    config = omni_jax.GenerationConfig(max_steps=MAX_STEPS)
    omni = load_model(model)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--out: {out}: expected a folder, found {error.strerror}") from None

    start = time.perf_counter()
    transcripts = {}
    for name, audio in questions.items():
        request = Request(audio, sample_rate=SAMPLE_RATE, config=config)
        transcripts[name] = omni.generate(request, task="A1T1").text
        # Compiles, so that the timings below are those of the model.
        for _ in omni.stream_prepared(omni.prepare(request)):
            pass
    echo_err(f"compiled and warmed up in {time.perf_counter() - start:.1f} s")

    for name, audio in questions.items():
        typer.echo(f"\n{name}, {len(audio) / SAMPLE_RATE:.1f} s of speech")
        typer.echo(f"  transcript: {printable(transcripts[name])}")
        typer.echo("  answer:     ", nl=False)
        for chunk in omni.stream(audio, sample_rate=SAMPLE_RATE, config=config):
            typer.echo(printable(chunk.text), nl=False)
            reply = chunk.reply
        assert reply is not None, "the last chunk of a stream has the reply"
        reply.save(out / name)
        typer.echo(f"\n  audio:      {out / name}, {reply.seconds:.1f} s of speech")
        timing = reply.timing
        if timing.first_audio is not None and timing.real_time_factor is not None:
            typer.echo(
                f"  timing:     first audio after {timing.first_audio:.2f} s, total {timing.total:.2f} s, "
                f"real-time factor {timing.real_time_factor:.2f}"
            )
