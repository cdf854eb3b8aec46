"""`omni-jax evaluate`: quality and speed of a model on a benchmark."""

from __future__ import annotations

import enum
from pathlib import Path
from typing import Annotated

import typer

from omni_jax.cli.console import echo_err, progress_bar
from omni_jax.cli.loading import load_model
from omni_jax.cli.options import Codec, Int8, MaxBatchSize, Model, ShortWindows, takes_generation_config
from omni_jax.evaluation import report, run, suites
from omni_jax.evaluation.asr_judge import parse_judge
from omni_jax.inference.generation import GenerationConfig


class Suite(enum.StrEnum):
    """Layouts that `evaluate` reads."""

    manifest = "manifest"
    librispeech = "librispeech"
    voicebench = "voicebench"
    uro_bench = "uro_bench"
    open_audio_bench = "open_audio_bench"


@takes_generation_config
def evaluate(
    path: Annotated[Path, typer.Argument(help="A manifest, or the folder of a benchmark.", show_default=False)],
    out: Annotated[
        Path, typer.Option(help="Folder for the results, the report and the spoken answers.", show_default=False)
    ],
    suite: Annotated[Suite, typer.Option(help="Layout of the benchmark.")] = Suite.manifest,
    model: Model = "nano",
    codec: Codec = "jax",
    int8: Int8 = False,
    short_windows: ShortWindows = False,
    asr_judge: Annotated[
        str,
        typer.Option(
            help="Speech recognizer that transcribes the spoken answers: none, faster-whisper=MODEL or "
            "command='PROGRAM {audio}'."
        ),
    ] = "none",
    against: Annotated[
        Path | None, typer.Option(help="Folder of another evaluation, to compare with.", show_default=False)
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Use only the first cases.", show_default=False)] = None,
    max_batch_size: MaxBatchSize = 8,
    *,
    config: GenerationConfig,
) -> None:
    """Measure quality and speed of a model.

    Metrics have confidence intervals. The report is one HTML file with plots and the spoken answers.
    Exit code 0: measured; 1: every case failed; 2: the evaluation could not start.
    """
    cases = suites.read(suite, path)[:limit]
    judge = parse_judge(asr_judge)
    other = None if against is None else run.Evaluation.load(against)
    omni = load_model(model, codec, int8=int8, short_windows=short_windows)
    with progress_bar("case") as progress:
        evaluation = run.evaluate(
            omni,
            cases,
            out,
            model=f"{model}{' int8' * int8}{' short windows' * short_windows}",
            suite=f"{suite} {path.name}",
            judge=judge,
            config=config,
            max_batch_size=max_batch_size,
            progress=progress,
        )
    typer.echo(report.write(evaluation, out, other, cases), nl=False)
    echo_err(f"the report is {out / 'report.html'}")
    if evaluation.all_failed:
        echo_err(f"every case failed; the first: {evaluation.results[0].error}")
        raise typer.Exit(1)
