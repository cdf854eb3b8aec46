"""Import, export, initialize and inspect model weights."""

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
from omni_jax.errors import OmniError

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False, help=__doc__)

Out = Annotated[Path, typer.Argument(help="new or empty folder")]
Whisper = Annotated[
    str,
    typer.Option(
        help="Whisper folder of transformers or hub id, such as openai/whisper-small; a file of OpenAI's, such as "
        "small.pt; or a release, to take its audio encoder"
    ),
]
Snac = Annotated[
    str,
    typer.Option(help="SNAC folder or hub id, such as hubertsiuzdak/snac_24khz; or a release, to take its codec"),
]


class Format(StrEnum):
    """Formats that a release can be exported to."""

    mini_omni = "mini-omni"
    transformers = "transformers"
    whisper = "whisper"
    openai_whisper = "openai-whisper"
    snac = "snac"


EXPORTS = {
    Format.mini_omni: conversion.export_mini_omni,
    Format.transformers: conversion.export_transformers,
    Format.whisper: conversion.export_whisper,
    Format.openai_whisper: conversion.export_openai_whisper,
    Format.snac: conversion.export_snac,
}


class Adapter(StrEnum):
    """Kinds of the module between audio encoder and trunk."""

    llamamlp = "llamamlp"
    mlp = "mlp"


@contextmanager
def _exit_on_user_error() -> Iterator[None]:
    """Print an error about the input and exit with code 2."""
    try:
        yield
    except OmniError as error:
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
    with _exit_on_user_error():
        conversion.import_mini_omni(source, out, whisper_source=whisper, snac_source=snac)
    typer.echo(f"wrote {out}")


@app.command()
def export(
    release: Annotated[str, typer.Argument(help="release folder, hub id, or nano")],
    out: Out,
    to: Annotated[
        Format,
        typer.Option(
            help="mini-omni: adapter, trunk and heads for the published code; transformers: the trunk alone; whisper: "
            "the audio encoder alone, for transformers; openai-whisper: the same as small.pt, which the published "
            "Mini-Omni loads; snac: the codec alone"
        ),
    ] = Format.mini_omni,
) -> None:
    """Write a release, or a module of it, in a published format; mini-omni, whisper and snac together hold all."""
    with _exit_on_user_error():
        EXPORTS[to](open_release(release), out)
    typer.echo(f"wrote {out}")


@app.command()
def init(
    out: Out,
    lm: Annotated[str, typer.Option(help="language model: folder of transformers, or hub id, such as Qwen/Qwen3-0.6B")],
    whisper: Whisper,
    snac: Snac,
    tts_adapter_layers: Annotated[int, typer.Option(min=0, help="blocks that serve the audio heads only")] = 0,
    adapter: Annotated[Adapter, typer.Option(help="module between audio encoder and trunk")] = Adapter.llamamlp,
    seed: Annotated[int, typer.Option(min=0, help="seed of the new weights")] = 0,
    tied: Annotated[
        bool | None,
        typer.Option("--tied/--untied", help="whether the head is the embedding, where the saved one differs from it"),
    ] = None,
) -> None:
    """Make a release folder, ready for training, of a language model, a Whisper and a SNAC."""
    with _exit_on_user_error():
        conversion.init_release(
            out,
            lm_source=lm,
            whisper_source=whisper,
            snac_source=snac,
            adapter=adapter.value,
            tts_adapter_layers=tts_adapter_layers,
            seed=seed,
            tied=tied,
        )
    typer.echo(f"wrote {out}")


@app.command()
def merge(
    release: Annotated[str, typer.Argument(help="release folder, hub id, or nano")],
    lora: Annotated[Path, typer.Argument(help="folder with adapter_config.json and adapter_model.safetensors")],
    out: Out,
) -> None:
    """Make a release with a LoRA adapter of PEFT in the weights of its trunk."""
    with _exit_on_user_error():
        conversion.merge_lora(open_release(release), lora, out)
    typer.echo(f"wrote {out}")


@app.command()
def inspect(
    source: Annotated[str, typer.Argument(help="release or Mini-Omni folder, hub id, or nano")],
) -> None:
    """List the tensors in a folder: names, shapes, types and parameter counts, by module."""
    with _exit_on_user_error():
        groups = conversion.inspect(source)
    width = max(len(group.name) for group in groups)

    def total(title: str, members: list[conversion.TensorGroup]) -> str:
        parameters = sum(group.num_parameters for group in members)
        return f"{title:<{width}}  {'':5}  {'':22}  {'':9} {parameters:>14,}"

    for module, members in groupby(groups, key=lambda group: group.module):
        in_module = list(members)
        typer.echo(total(module, in_module))
        for group in in_module:
            shape = "x".join(map(str, group.shape))
            count = f"{group.count} x" if group.count > 1 else ""
            typer.echo(f"  {group.name:<{width}}{count:>5}  {shape:<22}  {group.dtype:<9} {group.num_parameters:>14,}")
    typer.echo(total("total", groups))
