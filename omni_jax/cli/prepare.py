"""`omni-jax prepare`: a corpus as records."""

from __future__ import annotations

import enum
from pathlib import Path
from typing import Annotated

import typer

from omni_jax.cli.options import Workers
from omni_jax.cli.records import Out, Runner, RunnerOptions, beam_options, write_records
from omni_jax.data import sources
from omni_jax.data.shards import CodecSpec
from omni_jax.errors import ConfigError


class Corpus(enum.StrEnum):
    """Corpora that `prepare` reads."""

    voice_assistant = "voice_assistant"
    librispeech = "librispeech"
    libritts = "libritts"
    vctk = "vctk"
    mls = "mls"
    text = "text"
    manifest = "manifest"


def prepare(
    corpus: Annotated[
        Corpus,
        typer.Argument(
            help="voice_assistant: parquet of VoiceAssistant-400K; librispeech, libritts, vctk, mls: as unpacked; "
            "text: questions and answers in JSON lines, parquet or a datasets folder, with the columns of Open-Orca, "
            "Alpaca or Moss, or question and answer; manifest: JSON lines, see docs/data.md."
        ),
    ],
    path: Annotated[Path, typer.Argument(help="Folder or file of the corpus.", show_default=False)],
    out: Out,
    codec: Annotated[
        str | None, typer.Option(help="The model whose codec encodes answers that are audio.", show_default=False)
    ] = None,
    as_answer: Annotated[
        bool, typer.Option("--as-answer", help="Use read speech for T1A1 instead of A1T1; needs --codec.")
    ] = False,
    persona: Annotated[
        bool, typer.Option("--persona", help="Keep the rows of VoiceAssistant-400K in which the assistant is named.")
    ] = False,
    max_seconds: Annotated[
        float | None,
        typer.Option(min=0.1, help="Longest recording. Default: 15 s for VoiceAssistant-400K, 30 s for read speech."),
    ] = None,
    license: Annotated[
        str | None, typer.Option(help="License of a text or manifest, for the index.", show_default=False)
    ] = None,
    workers: Workers = 1,
    runner: Runner = None,
    runner_options: RunnerOptions = None,
) -> None:
    """Turn a corpus into training records; resumable.

    Run the same command again after an interruption: shards that are finished stay as they are.
    """
    if as_answer and codec is None:
        raise ConfigError("--as-answer: expected --codec, to encode the answers with")
    encoder = None if codec is None else CodecSpec(codec)
    rate = encoder.config.sample_rate if encoder else 24_000
    source: sources.Source
    size = encoder.config.codebook_size if encoder else 4096
    if corpus is Corpus.voice_assistant:
        source = sources.VoiceAssistant(path, persona, max_seconds or sources.MAX_QUESTION_SECONDS, size)
    elif corpus is Corpus.text:
        source = sources.TextQA(path, license=license or "unknown")
    elif corpus is Corpus.manifest:
        source = sources.Manifest(path, rate, max_seconds or 60.0, size, license=license or "unknown")
    else:
        listing, known = sources.SPEECH_CORPORA[corpus]
        source = sources.ReadSpeech(path, str(corpus), known, listing, as_answer, rate, max_seconds or 30.0)
    beam = beam_options(runner, workers, runner_options)
    write_records(source, out, codec=encoder, workers=workers, beam=beam)
