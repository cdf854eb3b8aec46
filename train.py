"""Train a stage: `python train.py configs/STAGE.yaml [field=value ...]`.

On a TPU pod start the same command on every host; JAX finds the others by itself. On other machines several
processes are told of each other by --coordinator, --processes and --process.
"""

from __future__ import annotations

import sys
from typing import Annotated

import typer

STOPPED = 75
"""Exit code of a run that was asked to stop before its end and has saved itself: `EX_TEMPFAIL`, try again."""


def main(
    config: Annotated[str, typer.Argument(help="YAML file of the run")],
    overrides: Annotated[list[str] | None, typer.Argument(help="field=value, e.g. optimizer.peak_lr=1e-4")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what the run would do, and stop")] = False,
    profile: Annotated[str | None, typer.Option(help="Folder for a profiler trace of a few steps")] = None,
    coordinator: Annotated[str | None, typer.Option(help="host:port of the first process")] = None,
    processes: Annotated[int | None, typer.Option(help="Processes in all")] = None,
    process: Annotated[int | None, typer.Option(help="Number of this process, from 0")] = None,
) -> None:
    """Train a model, or go on with a run that was interrupted."""
    import jax

    from omni_jax import config as configs
    from omni_jax import sharding
    from omni_jax.errors import CheckpointError, PipelineError
    from omni_jax.training import loop

    try:
        if None in (coordinator, processes, process) and (coordinator, processes, process) != (None, None, None):
            raise configs.ConfigError("expected all of --coordinator, --processes and --process, or none of them")
        run = configs.load(configs.RunConfig, config, overrides or ())
        if coordinator is not None:
            jax.distributed.initialize(coordinator, processes, process)
        elif not dry_run and sharding.on_pod():
            jax.distributed.initialize()
        if dry_run:
            print(loop.describe(run))
            return
        release = loop.train(run, profile=profile)
    except (configs.ConfigError, PipelineError, CheckpointError, loop.TrainingError) as error:
        print(f"train.py: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    if release is None:
        raise SystemExit(STOPPED)
    if jax.process_index() == 0:
        print(f"trained: {release}")


if __name__ == "__main__":
    typer.run(main)
