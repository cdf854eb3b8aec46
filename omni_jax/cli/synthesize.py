"""`omni-jax synthesize`: written questions and answers as spoken records."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from omni_jax.cli.options import Workers
from omni_jax.cli.records import Out, Runner, RunnerOptions, beam_options, write_records
from omni_jax.data import sources
from omni_jax.data.shards import CodecSpec
from omni_jax.data.spoken_corpus import SpokenCorpus
from omni_jax.data.synthesizers import VoiceSpec
from omni_jax.errors import ConfigError


def synthesize(
    text: Annotated[
        Path, typer.Argument(help="Questions and answers in writing, as `prepare text` reads them.", show_default=False)
    ],
    out: Out,
    codec: Annotated[str, typer.Option(help="The model whose codec encodes the answers.", show_default=False)],
    questions: Annotated[
        list[str] | None,
        typer.Option(
            help="Voices of the questions; may be repeated, one is drawn for each question: espeak, flite, hibari, "
            "kokoro or pico, optionally with =VOICE,...; command='PROGRAM {text} {out}'; openai='URL MODEL', the last "
            "two optionally with ' @VOICE,...'. Default: espeak and flite.",
            show_default=False,
        ),
    ] = None,
    answer: Annotated[
        str, typer.Option(help="Voice of the answers, in the same form; the first voice is taken.")
    ] = "hibari=heart",
    seed: Annotated[int, typer.Option(help="Seed of voices, pace, pitch, rooms and noise.")] = 0,
    clean: Annotated[bool, typer.Option("--clean", help="Do not add room acoustics and noise to questions.")] = False,
    max_seconds: Annotated[float, typer.Option(min=0.1, help="Longest question.")] = 30.0,
    license: Annotated[str, typer.Option(help="License of the text, for the index.")] = "unknown",
    workers: Workers = 1,
    runner: Runner = None,
    runner_options: RunnerOptions = None,
) -> None:
    """Turn text into spoken records; resumable.

    Run the same command again after an interruption: shards that are finished stay as they are.
    """
    encoder = CodecSpec(codec)
    question_voices = tuple(VoiceSpec.parse(name) for name in questions or ["espeak", "flite"])
    answer_voice = VoiceSpec.parse(answer)
    for voices in (*question_voices, answer_voice):
        _check_voices(voices)
    corpus = SpokenCorpus(
        sources.TextQA(text, license=license, every_turn=True),
        question_voices,
        answer_voice,
        encoder.config.sample_rate,
        seed,
        augment_questions=not clean,
        max_question_seconds=max_seconds,
    )
    beam = beam_options(runner, workers, runner_options)
    write_records(corpus, out, codec=encoder, workers=workers, beam=beam)


def _check_voices(voices: VoiceSpec) -> None:
    """Refuse a synthesizer that is not installed or lacks a voice now, instead of rejecting every row."""
    unknown = set(voices.voices) - set(voices.open().voices())
    if unknown:
        raise ConfigError(f"{voices.synthesizer}: expected voices that it has, found {', '.join(sorted(unknown))}")
