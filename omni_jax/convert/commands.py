"""Import, export, initialize and inspect model weights."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from enum import StrEnum
from itertools import groupby
from pathlib import Path
from typing import Annotated

import typer

from omni_jax.checkpoint.release import open_release
from omni_jax.convert import release as conversion
from omni_jax.convert import verify
from omni_jax.errors import OmniError

app = typer.Typer(
    add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False, rich_markup_mode=None, help=__doc__
)

Out = Annotated[Path, typer.Argument(help="new or empty folder")]
Whisper = Annotated[
    str,
    typer.Option(
        help="Whisper folder of transformers or hub id, such as openai/whisper-small; a file of OpenAI's, such as "
        "small.pt, or a folder with small.pt in it; or a release, to take its audio encoder"
    ),
]
Snac = Annotated[
    str,
    typer.Option(help="SNAC folder or hub id, such as hubertsiuzdak/snac_24khz; or a release, to take its codec"),
]


class Dtype(StrEnum):
    """Types of weights."""

    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


DtypeOption = Annotated[
    Dtype | None,
    typer.Option("--dtype", help="type of all weights but the codec's; by default each keeps the type of its file"),
]


Verify = Annotated[
    bool,
    typer.Option(
        "--verify",
        help="compare the result with the original: every tensor, and what PyTorch computes with it; needs "
        "omni-jax[torch]",
    ),
]


class Format(StrEnum):
    """Formats that a release can be exported to."""

    mini_omni = "mini-omni"
    transformers = "transformers"
    whisper = "whisper"
    openai_whisper = "openai-whisper"
    snac = "snac"


EXPORTS = {
    Format.mini_omni: (conversion.export_mini_omni, verify.compare_mini_omni),
    Format.transformers: (conversion.export_transformers, verify.compare_language_model),
    Format.whisper: (conversion.export_whisper, verify.compare_audio_encoder),
    Format.openai_whisper: (conversion.export_openai_whisper, verify.compare_audio_encoder),
    Format.snac: (conversion.export_snac, verify.compare_codec),
}
"""Of each format, what writes it and what compares it with the release."""


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


def _report(out: Path, comparisons: Iterable[verify.Comparison]) -> None:
    """Print what has been compared; a larger error than expected ends the command with exit code 1."""
    failed = []
    for comparison in comparisons:
        typer.echo(comparison)
        if not comparison.is_within_limit:
            failed.append(comparison)
    if failed:
        lines = "\n".join(str(comparison) for comparison in failed)
        typer.echo(f"error: {out} is not what it was made of:\n{lines}", err=True)
        raise typer.Exit(1)


@app.command("import")
def import_(
    source: Annotated[str, typer.Argument(help="Mini-Omni folder or hub id, such as gpt-omni/mini-omni")],
    out: Out,
    whisper: Whisper,
    snac: Snac,
    dtype: DtypeOption = None,
    verified: Verify = False,
) -> None:
    """Make a release folder of a Mini-Omni checkpoint, a Whisper and a SNAC."""
    with _exit_on_user_error():
        if verified:
            verify.require_packages()
        conversion.import_mini_omni(source, out, whisper_source=whisper, snac_source=snac, dtype=dtype)
        typer.echo(f"wrote {out}")
        if verified:
            _report(out, _compare_parts(verify.compare_mini_omni, out, source, whisper, snac, dtype))


@app.command()
def export(
    release: Annotated[str, typer.Argument(help="release folder or hub id, folder of a training run, or nano")],
    out: Out,
    to: Annotated[
        Format,
        typer.Option(
            help="mini-omni: adapter, trunk and heads for the published code; transformers: the language model alone; "
            "whisper: the audio encoder alone, for transformers; openai-whisper: the audio encoder as small.pt, which "
            "the published Mini-Omni loads; snac: the codec alone"
        ),
    ] = Format.mini_omni,
    verified: Verify = False,
) -> None:
    """Write a release, or a module of it, in a published format; mini-omni, whisper and snac together hold all."""
    write, compare = EXPORTS[to]
    with _exit_on_user_error():
        if verified:
            verify.require_packages()
        opened = open_release(release)
        write(opened, out)
        typer.echo(f"wrote {out}")
        if verified:
            _report(out, compare(out, opened))


@app.command()
def init(
    out: Out,
    lm: Annotated[str, typer.Option(help="language model: folder of transformers, or hub id, such as Qwen/Qwen3-0.6B")],
    whisper: Whisper,
    snac: Snac,
    tts_adapter_layers: Annotated[int, typer.Option(min=0, help="blocks that serve the audio heads only")] = 0,
    adapter: Annotated[
        Adapter,
        typer.Option(
            help="module between audio encoder and trunk: llamamlp, the gated MLP of Mini-Omni; mlp, one linear layer"
        ),
    ] = Adapter.llamamlp,
    seed: Annotated[int, typer.Option(min=0, help="seed of the new weights")] = 0,
    tied: Annotated[
        bool | None,
        typer.Option(
            "--tied/--untied",
            help="for a language model that is saved with a head, although its config ties the head to the embedding: "
            "take the embedding, or the head",
        ),
    ] = None,
    dtype: DtypeOption = None,
    verified: Verify = False,
) -> None:
    """Make a release folder, ready for training, of a language model, a Whisper and a SNAC."""
    with _exit_on_user_error():
        if verified:
            verify.require_packages()
        conversion.init_release(
            out,
            lm_source=lm,
            whisper_source=whisper,
            snac_source=snac,
            adapter=adapter.value,
            tts_adapter_layers=tts_adapter_layers,
            seed=seed,
            tied=tied,
            dtype=dtype,
        )
        typer.echo(f"wrote {out}")
        if verified:
            _report(out, _compare_parts(verify.compare_language_model, out, lm, whisper, snac, dtype))


def _compare_parts(
    compare: verify.Compare, out: Path, source: str, whisper: str, snac: str, dtype: str | None
) -> Iterator[verify.Comparison]:
    """A new release and the three sources it is made of; `compare` is for the first."""
    release = open_release(out)
    yield from compare(source, release, dtype=dtype)
    yield from verify.compare_audio_encoder(whisper, release, dtype=dtype)
    yield from verify.compare_codec(snac, release)


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
