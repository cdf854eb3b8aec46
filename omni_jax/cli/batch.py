"""`omni-jax batch`: many questions, resumable."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from omni_jax.batch import ANSWERS, answer_manifest
from omni_jax.cli.console import echo_err, progress_bar
from omni_jax.cli.loading import load_model
from omni_jax.cli.options import (
    Codec,
    Int8,
    MaxBatchSize,
    Model,
    ShortWindows,
    TaskName,
    Tensor,
    Truncate,
    takes_generation_config,
)
from omni_jax.errors import ConfigError
from omni_jax.inference.generation import GenerationConfig

if TYPE_CHECKING:
    from jax.sharding import Mesh

    from omni_jax.api import Omni


@takes_generation_config
def batch(
    source: Annotated[
        Path,
        typer.Argument(
            metavar="MANIFEST.jsonl|FOLDER",
            help="JSON lines with id, audio or text, and optionally task, truncate, system, history and options such "
            "as max_steps; or a folder of recordings.",
            show_default=False,
        ),
    ],
    out: Annotated[Path, typer.Option(help=f"Folder for {ANSWERS} and the spoken answers.", show_default=False)],
    task: TaskName = None,
    model: Model = "nano",
    codec: Codec = "jax",
    int8: Int8 = False,
    short_windows: ShortWindows = False,
    max_batch_size: MaxBatchSize = 8,
    tensor: Tensor = 1,
    process: Annotated[
        int | None,
        typer.Option(
            min=0, help="Index of this process, below --processes. Hosts of a TPU pod find it.", show_default=False
        ),
    ] = None,
    processes: Annotated[
        int | None,
        typer.Option(min=1, help="Processes that share the rows, each started separately.", show_default=False),
    ] = None,
    *,
    config: GenerationConfig,
    truncate: Truncate = False,
) -> None:
    """Answer a manifest or a folder of recordings; resumable.

    Run the same command again after an interruption: finished rows stay as they are, failed rows are tried again.
    Exit code 0: every row is answered; 1: some failed; 2: the job could not start.
    """
    process_index, num_processes = _process_share(process, processes)

    def load() -> Omni:
        mesh = _local_mesh(tensor, max_batch_size)
        return load_model(model, codec, int8=int8, short_windows=short_windows, mesh=mesh)

    with progress_bar("row") as progress:
        summary = answer_manifest(
            load,
            source,
            out,
            model_id=f"{_fingerprint(model)} {codec}{' int8' * int8}{' short windows' * short_windows}",
            task=task,
            truncate=truncate,
            config=config,
            max_batch_size=max_batch_size,
            process_index=process_index,
            num_processes=num_processes,
            progress=progress,
        )
    echo_err(
        f"{summary.num_rows} rows: {summary.num_answered} answered, {summary.num_kept} from an earlier run, "
        f"{summary.num_failed} failed; see {summary.path}"
    )
    raise typer.Exit(1 if summary.num_failed else 0)


def _fingerprint(model: str) -> str:
    """Identifies weights: a release by its content, because another may take its place in the same folder."""
    from omni_jax.checkpoint.release import find_release

    release = find_release(model)
    return model if release is None else release.fingerprint()


def _process_share(process: int | None, processes: int | None) -> tuple[int, int]:
    """Index and number of the processes: from the options, from the TPU pod, or one alone."""
    if process is not None or processes is not None:
        if process is None or processes is None or process >= processes:
            raise ConfigError(f"expected --process below --processes, found {process} and {processes}")
        return process, processes
    import jax

    from omni_jax.sharding import on_pod

    if not on_pod():
        return 0, 1
    jax.distributed.initialize()
    return jax.process_index(), jax.process_count()


def _local_mesh(tensor: int, max_batch_size: int) -> Mesh | None:
    """The mesh of this process's devices, in groups of `tensor` that share a row; None if there is only one device."""
    import jax

    from omni_jax.sharding import make_mesh

    devices = jax.local_devices()
    groups = len(devices) // tensor
    if groups * tensor != len(devices):
        raise ConfigError(f"--tensor: expected a divisor of the {len(devices)} local devices, found {tensor}")
    if max_batch_size % groups:
        raise ConfigError(
            f"--max-batch-size: expected a multiple of the {groups} groups of local devices, found {max_batch_size}"
        )
    return make_mesh(groups, 1, tensor, devices) if len(devices) > 1 else None
