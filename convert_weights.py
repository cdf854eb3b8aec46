"""Weights in and out: published checkpoints to release folders and back. `python convert_weights.py --help`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum
from itertools import groupby
from pathlib import Path
from typing import Annotated

import typer

from omni_jax.checkpoint.release import open_release
from omni_jax.convert import release as conversion
from omni_jax.errors import CheckpointError, ConfigError, ConversionError

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False, help=__doc__)

Out = Annotated[Path, typer.Argument(help="new or empty folder")]
Whisper = Annotated[
    str, typer.Option(help="transformers folder or hub id, such as openai/whisper-small; or a release, for its ear")
]
Snac = Annotated[
    str, typer.Option(help="folder or hub id, such as hubertsiuzdak/snac_24khz; or a release, for its codec")
]


class Format(StrEnum):
    """What a release can be written as."""

    mini_omni = "mini-omni"
    transformers = "transformers"
    whisper = "whisper"
    snac = "snac"


EXPORTS = {
    Format.mini_omni: conversion.export_mini_omni,
    Format.transformers: conversion.export_transformers,
    Format.whisper: conversion.export_whisper,
    Format.snac: conversion.export_snac,
}


class Adapter(StrEnum):
    """What leads from the ear to the trunk."""

    llamamlp = "llamamlp"
    mlp = "mlp"


@contextmanager
def _plain_errors() -> Iterator[None]:
    """Say what is wrong with the input in words; exit code 2."""
    try:
        yield
    except (CheckpointError, ConfigError, ConversionError, OSError, ImportError) as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(2) from None


@app.command("import")
def import_(
    source: Annotated[str, typer.Argument(help="Mini-Omni folder or hub id, such as gpt-omni/mini-omni")],
    out: Out,
    whisper: Whisper,
    snac: Snac,
) -> None:
    """Make a release folder of a Mini-Omni checkpoint, a Whisper and a SNAC."""
    with _plain_errors():
        conversion.import_mini_omni(source, out, whisper_source=whisper, snac_source=snac)
    typer.echo(f"wrote {out}")


@app.command()
def export(
    release: Annotated[str, typer.Argument(help="release folder, hub id, or nano")],
    out: Out,
    to: Annotated[
        Format,
        typer.Option(
            help="adapter, trunk and heads for the published code; or a part alone: the trunk for transformers, the "
            "ear as a whisper for transformers, the codec for snac"
        ),
    ] = Format.mini_omni,
) -> None:
    """Write a release, or a part of it, in a published format. All of it is mini-omni, whisper and snac together."""
    with _plain_errors():
        EXPORTS[to](open_release(release), out)
    typer.echo(f"wrote {out}")


@app.command()
def init(
    out: Out,
    lm: Annotated[str, typer.Option(help="Qwen2 or Llama folder of transformers, or hub id, such as Qwen/Qwen2-0.5B")],
    whisper: Whisper,
    snac: Snac,
    tts_adapter_layers: Annotated[int, typer.Option(min=0, help="blocks for the audio heads only")] = 0,
    adapter: Annotated[Adapter, typer.Option(help="from the ear to the trunk")] = Adapter.llamamlp,
    seed: Annotated[int, typer.Option(min=0, help="draws the new weights")] = 0,
) -> None:
    """Make a release folder, ready for training, of a language model, a Whisper and a SNAC."""
    with _plain_errors():
        conversion.init_release(
            out,
            lm_source=lm,
            whisper_source=whisper,
            snac_source=snac,
            adapter=adapter.value,
            tts_adapter_layers=tts_adapter_layers,
            seed=seed,
        )
    typer.echo(f"wrote {out}")


@app.command()
def inspect(
    source: Annotated[str, typer.Argument(help="release or Mini-Omni folder, hub id, or nano")],
) -> None:
    """Show what is in a folder: parts, shapes, types and parameter counts."""
    with _plain_errors():
        rows = conversion.inspect(source)
    width = max(len(row.name) for row in rows)
    for part, members in groupby(rows, key=lambda row: row.part):
        group = list(members)
        typer.echo(f"{part:<{width}}  {'':5}  {'':22}  {'':9} {sum(row.parameters for row in group):>14,}")
        for row in group:
            shape = "x".join(map(str, row.shape))
            count = f"{row.count} x" if row.count > 1 else ""
            typer.echo(f"  {row.name:<{width}}{count:>5}  {shape:<22}  {row.dtype:<9} {row.parameters:>14,}")
    typer.echo(f"{'total':<{width}}  {'':5}  {'':22}  {'':9} {sum(row.parameters for row in rows):>14,}")


if __name__ == "__main__":
    app()
