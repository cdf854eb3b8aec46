"""What `prepare` and `synthesize` share: the options of the runner, and writing the records."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from omni_jax.cli.console import echo_err, progress_bar
from omni_jax.data.prepare import prepare
from omni_jax.data.shards import CodecSpec
from omni_jax.data.sources import Source
from omni_jax.errors import ConfigError

Out = Annotated[
    Path, typer.Option(help="Folder of records to write; one that is there is continued.", show_default=False)
]
Runner = Annotated[
    str | None,
    typer.Option(
        help="Run as an Apache Beam pipeline on this runner: DirectRunner (this machine, --workers processes), "
        "DataflowRunner, FlinkRunner, SparkRunner. Corpus and records must be on a file system that all workers share.",
        show_default=False,
    ),
]
RunnerOptions = Annotated[
    list[str] | None,
    typer.Argument(help="After --: options of the runner, e.g. -- --project=P --region=R.", show_default=False),
]


def beam_options(runner: str | None, workers: int, options: list[str] | None) -> list[str] | None:
    """The command line of a Beam pipeline; None without a runner.

    Raises:
        ConfigError: there are options of a runner, but no runner.
    """
    if runner is None:
        if options:
            raise ConfigError(f"expected --runner before options for it, found {' '.join(options)}")
        return None
    direct = []
    if runner == "DirectRunner":
        direct = [f"--direct_num_workers={workers}"]
        if workers > 1:
            direct += ["--direct_running_mode=multi_processing", "--default_sdk_harness_log_level=ERROR"]
    return [f"--runner={runner}", *direct, *(options or ())]


def write_records(source: Source, out: Path, *, codec: CodecSpec | None, workers: int, beam: list[str] | None) -> None:
    """Write the records, and report how many there are and which rows were rejected; exit code 1 if none are left.

    Raises:
        ConfigError: the source cannot be read, or `out` holds something else.
    """
    with progress_bar("shard") as progress:
        index = prepare(source, out, codec=codec, workers=workers, beam=beam, progress=progress)
    echo_err(f"{out}: {index['exchanges']} exchanges, {index['question_hours']} h of questions")
    for reason, count in index["rejected"].items():
        echo_err(f"rejected, {reason}: {count}; for example {index['rejected_examples'][reason][0]}")
    if not index["exchanges"]:
        echo_err(f"{out}: no row could be used")
        raise typer.Exit(1)
