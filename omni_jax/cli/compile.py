"""`omni-jax compile`: the TPU compiler's report on a program."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import Annotated, Literal

import typer

from omni_jax.cli.options import Int8, Json
from omni_jax.config.load import load_config
from omni_jax.config.run import RunConfig
from omni_jax.errors import ConfigError


def compile_(
    program: Annotated[
        Literal["serve", "train", "encode", "prefill", "decode", "batch", "codec"],
        typer.Argument(
            help="serve: all that a question and its answer take. batch: decode with a companion row per request, as "
            "A1A2 does by default."
        ),
    ],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="field=value of the configuration, e.g. mesh.fsdp=256")
    ] = None,
    *,
    topology: Annotated[str, typer.Option(help="A TPU slice: v5e:1x1, v5e:16x16, v5p:4x4x4, v6e:4x4, ...")],
    model: Annotated[str, typer.Option(help="A preset.")] = "mini_omni",
    config: Annotated[
        Path | None, typer.Option(help="Configuration of a training run, for train.", show_default=False)
    ] = None,
    batch: Annotated[
        int | None,
        typer.Option(min=1, help="Batch size over all chips. Default: the configuration's, or one row per group."),
    ] = None,
    tensor: Annotated[
        int, typer.Option(min=1, help="Chips that share a row (tensor parallelism); train: set mesh.tensor instead.")
    ] = 1,
    int8: Int8 = False,
    positions: Annotated[
        int | None,
        typer.Option(help="Positions that each row has, for decode and batch. Default: those of the context."),
    ] = None,
    profile: Annotated[
        Path | None,
        typer.Option(
            help="For serve: YAML with question_seconds, answer_seconds and history_positions. Default: 3, 5 and 300.",
            show_default=False,
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Compile a program for a TPU without having one.

    Reports memory, bytes moved, and the shortest time that the hardware allows.
    """
    if overrides and config is None:
        raise ConfigError(f"expected --config before fields of it, found {' '.join(overrides)}")
    run = None
    if config is not None:
        run = load_config(RunConfig, config, overrides or ())
        if program == "train" and not run.start.startswith("preset:"):
            # Only shapes are needed; the weights of an earlier stage may not be on this machine.
            run = dataclasses.replace(run, start=f"preset:{model}")

    # Nothing runs on a device. A TPU of this machine may be in use by another process, so JAX must not open it.
    os.environ["JAX_PLATFORMS"] = "cpu"
    from omni_jax.compile_report.report import compile_report
    from omni_jax.compile_report.topology import Topology

    if program == "serve":
        from omni_jax.compile_report.serving import ServingProfile, serving_report

        if batch is not None or positions is not None:
            raise ConfigError("serve: expected --profile in place of --batch and --positions")
        mix = load_config(ServingProfile, profile) if profile is not None else ServingProfile()
        served = serving_report(Topology.parse(topology), model=model, profile=mix, tensor=tensor, int8=int8)
        typer.echo(json.dumps(served.to_json()) if as_json else served.table())
        return
    if profile is not None:
        raise ConfigError(f"--profile: expected with serve, found with {program}")
    report = compile_report(
        program,
        Topology.parse(topology),
        model=model,
        config=run,
        batch=batch,
        tensor=tensor,
        int8=int8,
        positions=positions,
    )
    typer.echo(json.dumps(dataclasses.asdict(report)) if as_json else report.table())
