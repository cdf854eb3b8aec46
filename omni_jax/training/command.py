"""The command line of training: `omni-jax train`, and `python train.py` in a checkout.

Whatever imports JAX is imported inside the function, so that `--help` and a mistyped option answer at once.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, NoReturn

import typer

from omni_jax.config.load import load_config
from omni_jax.config.run import RunConfig
from omni_jax.errors import EXTRAS, ConfigError, MissingExtraError, OmniError, PeerLostError, TrainingError
from omni_jax.log import log_to_stderr

EXIT_REFUSED = 2
"""Exit code of a run that cannot be done as configured."""


def train_command(
    config: Annotated[str, typer.Argument(help="YAML file of the run.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="field=value, e.g. optimizer.peak_lr=1e-4.", show_default=False)
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check and describe the run, and stop.")] = False,
    reshuffle: Annotated[
        bool,
        typer.Option("--reshuffle", help="Resume with other sources, tasks or workers: take records in a new order."),
    ] = False,
    profile: Annotated[
        str | None, typer.Option(help="Folder for a profiler trace of a few steps.", show_default=False)
    ] = None,
    coordinator: Annotated[str | None, typer.Option(help="host:port of the first process.", show_default=False)] = None,
    processes: Annotated[int | None, typer.Option(help="Number of processes.", show_default=False)] = None,
    process: Annotated[int | None, typer.Option(help="Index of this process, from 0.", show_default=False)] = None,
    heartbeat_timeout: Annotated[
        int, typer.Option(min=1, help="Seconds after which a process that gives no sign of life counts as lost.")
    ] = 100,
) -> None:
    """Train a model, or resume an interrupted run with the same command.

    On a TPU pod, start the same command on every host; the processes find each other. Elsewhere, several processes
    need --coordinator, --processes and --process.

    Exit codes: 0 finished, 2 the run cannot be done as configured, 75 stopped: the same command resumes it.
    """
    # Before Orbax is imported, which gives the root logger a handler: it would show every line again.
    log_to_stderr()
    try:
        run = load_config(RunConfig, config, overrides or ())
        _initialize_processes(coordinator, processes, process, heartbeat_timeout, on_pod=not dry_run)
        finished = _describe(run, reshuffle=reshuffle) if dry_run else _train(run, profile, reshuffle=reshuffle)
    except OmniError as error:
        typer.echo("\n".join(f"train: {line}" for line in str(error).splitlines()), err=True)
        if isinstance(error, TrainingError):
            _end_now(error)
        raise typer.Exit(EXIT_REFUSED) from None
    if not finished:
        from omni_jax.training.stop_signal import EXIT_STOPPED

        raise typer.Exit(EXIT_STOPPED)


def _initialize_processes(
    coordinator: str | None, processes: int | None, process: int | None, heartbeat_timeout: int, *, on_pod: bool
) -> None:
    """Connect this process to the others, if there are others."""
    given = [value is not None for value in (coordinator, processes, process)]
    if any(given) and not all(given):
        raise ConfigError("expected all of --coordinator, --processes and --process, or none of them")
    import jax

    from omni_jax import sharding

    if all(given):
        jax.distributed.initialize(coordinator, processes, process, heartbeat_timeout_seconds=heartbeat_timeout)
    elif on_pod and sharding.on_pod():
        jax.distributed.initialize(heartbeat_timeout_seconds=heartbeat_timeout)


def _end_now(error: TrainingError) -> NoReturn:
    """End this process, from which the run has closed what it had open.

    The usual end would wait until JAX, too, counts a lost process as lost; and threads of TensorStore would print a
    stack for each array that could not be saved while the interpreter ends.
    """
    from omni_jax.training.stop_signal import EXIT_STOPPED

    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(EXIT_STOPPED if isinstance(error, PeerLostError) else EXIT_REFUSED)


@contextmanager
def _requires_extra() -> Iterator[None]:
    """Turn the missing import of a package of the extra `train` into an error that has the pip command."""
    try:
        yield
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in EXTRAS:
            raise
        raise MissingExtraError(f"training needs the package {error.name}", "train") from None


def _describe(run: RunConfig, *, reshuffle: bool) -> bool:
    """Print the description of a run, what is wrong with it, and its memory."""
    with _requires_extra():
        from omni_jax.training.checks import problems
        from omni_jax.training.describe import compile_abstract_step, describe, memory_line
        from omni_jax.training.setup import TrainingSetup

    setup = TrainingSetup.of(run)
    typer.echo(describe(setup))
    found = problems(setup, Path(run.out).resolve(), reshuffle=reshuffle)
    for line in found:
        typer.echo(f"train: {line}", err=True)
    typer.echo("compiling the train step ...", err=True)
    typer.echo(memory_line(compile_abstract_step(setup)))
    if found:
        raise typer.Exit(EXIT_REFUSED)
    return True


def _show_unraisable(found: sys.UnraisableHookArgs) -> None:
    """Show an exception that cannot be raised, but not those of a save that has failed.

    TensorStore reports the failure of each array to an event loop that Orbax has closed by then.
    """
    if not (found.exc_type is RuntimeError and str(found.exc_value) == "Event loop is closed"):
        sys.__unraisablehook__(found)


def _train(run: RunConfig, profile: str | None, *, reshuffle: bool) -> bool:
    """Whether the run has finished."""
    import jax
    from tqdm.contrib.logging import logging_redirect_tqdm

    # Orbax logs the stack of an error several times before it raises it.
    for name in ("absl", "asyncio"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    sys.unraisablehook = _show_unraisable

    with _requires_extra():
        from omni_jax.training.loop import train

    with logging_redirect_tqdm([log_to_stderr()]):
        release = train(run, profile=profile, reshuffle=reshuffle)
    if release is not None and jax.process_index() == 0:
        typer.echo(f"trained: {release}")
    return release is not None
