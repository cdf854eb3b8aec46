"""Makes releases of modules that were trained separately.

python -m recipes.nano.assemble untrained build/nano/untrained      random weights, a codec and a tokenizer
python -m recipes.nano.assemble start build/nano/start --audio-encoder FILE     trained trunk, random adapter
python -m recipes.nano.assemble package build/nano/conversation build/nano/packaged --audio-encoder FILE  in eight bits
"""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import jax.numpy as jnp
import numpy as np
import typer

from omni_jax import Omni
from omni_jax.checkpoint.folders import new_folder
from omni_jax.checkpoint.release import (
    AUDIO_ENCODER,
    TOKENIZER_FILES,
    Release,
    open_release,
    save_release,
)
from omni_jax.checkpoint.safetensors_io import SafetensorsFile, Tensors
from omni_jax.checkpoint.tensors import init_model, model_tensors
from omni_jax.config.model import PRESETS, AudioConfig, ModelConfig, TextConfig
from omni_jax.errors import CheckpointError
from recipes.nano.questions import TABLES
from recipes.nano.sentences import MAX_FREE_WORDS

PRESET = "nano"
SHIPPED = "nano"
"""The release whose codec, tokenizer and trunk are used where none is given."""
TRUNK = ("embed.", "trunk.", "norm.")
"""Prefixes of the tensors of a trunk with its tables of tokens."""
MAX_BYTES = 36_000_000
"""Of a packaged release."""

app = typer.Typer(help="Make releases of modules that were trained separately.", no_args_is_help=True)


def assemble_untrained(
    out: Path, *, codec: Path | None = None, tokenizer: Path | None = None, preset: str = PRESET, seed: int = 0
) -> None:
    """Write a release with random weights.

    Args:
        out: new folder.
        codec: `codec.safetensors`; None: that of `SHIPPED`.
        tokenizer: folder of the tokenizer's files; None: that of `SHIPPED`.
        preset: the shape.
        seed: of the weights.

    Raises:
        CheckpointError: `out` is in use, or a file is missing.
    """
    shipped = open_release(SHIPPED)
    codec_tensors = shipped.codec_tensors() if codec is None else SafetensorsFile(codec).tensors
    files = shipped.tokenizer_files() if tokenizer is None else [tokenizer / name for name in TOKENIZER_FILES]
    save_release(out, _config(preset), _random_tensors(preset, seed), codec_tensors, files)


def assemble_start(trunk: Release, out: Path, audio_encoder: Path, *, preset: str = PRESET, seed: int = 0) -> None:
    """Write the release that stage 1 starts from; its adapter, and TTS adapter if any, is random.

    Args:
        trunk: has the trunk, the codec and the tokenizer.
        out: new folder.
        audio_encoder: what `recipes.nano.audio_encoder` wrote.
        preset: the shape.
        seed: of what is random.

    Raises:
        CheckpointError: `out` is in use, a file is missing, or the tensors do not fit the shape.
    """
    tensors = dict(_random_tensors(preset, seed))
    tensors |= SafetensorsFile(audio_encoder).tensors
    tensors |= {name: tensor for name, tensor in trunk.model_tensors().items() if name.startswith(TRUNK)}
    tensors = {name: tensor.cast(np.float32) for name, tensor in tensors.items()}
    save_release(out, _config(preset), tensors, trunk.codec_tensors(), trunk.tokenizer_files())


def package(model: str | Path, out: Path, audio_encoder: Path) -> int:
    """Write a model in eight bits, with the file of its frozen audio encoder as it is.

    Args:
        model: a release, or a finished run.
        out: new folder.
        audio_encoder: what `recipes.nano.audio_encoder` wrote.

    Returns:
        Bytes of all its files.

    Raises:
        CheckpointError: `out` is in use, the model has another audio encoder, or the files have more than `MAX_BYTES`.
    """
    with new_folder(out) as folder:
        Omni.from_pretrained(model, dtype=jnp.float32).save_pretrained(folder, int8=True)
        packaged, given = SafetensorsFile(folder / AUDIO_ENCODER), SafetensorsFile(audio_encoder)
        for name, tensor in given.tensors.items():
            if not np.array_equal(packaged.read(name), tensor.read()):
                raise CheckpointError(f"{model}: {name}: expected the values of {audio_encoder}, found others")
        shutil.copyfile(audio_encoder, folder / AUDIO_ENCODER)
        size = sum(file.stat().st_size for file in folder.iterdir())
        if size > MAX_BYTES:
            raise CheckpointError(f"{out}: expected at most {MAX_BYTES} bytes, found {size}")
    return size


AUDIO = AudioConfig(find_speech=True, level=-20.0)
"""How the model needs recordings. It was trained on silence, too; without it, it answers sooner."""


def text_config() -> TextConfig:
    """How the model needs the text of requests: it is trained on words, names in capitals, and single sentences."""
    capitals = TABLES["capitals"]
    names = {name.removeprefix("the ") for name in (*capitals, *capitals.values(), "Nano")}
    # In lower case it is the bird.
    names.discard("Turkey")
    return TextConfig(spoken_english=True, names=tuple(sorted(names)), max_words=MAX_FREE_WORDS)


def _config(preset: str) -> ModelConfig:
    return replace(PRESETS[preset], audio=AUDIO, text=text_config())


def _random_tensors(preset: str, seed: int) -> Tensors:
    return model_tensors(init_model(PRESETS[preset], stacked=False, dtype=jnp.float32, seed=seed))


@app.command("untrained")
def untrained_command(
    out: Annotated[Path, typer.Argument(help="New folder.")],
    codec: Annotated[Path | None, typer.Option(help="What recipes.nano.codec wrote; default: the shipped one.")] = None,
    tokenizer: Annotated[
        Path | None, typer.Option(help="What recipes.nano.tokenizer wrote; default: the shipped one.")
    ] = None,
    preset: Annotated[str, typer.Option(help="The shape.")] = PRESET,
    seed: Annotated[int, typer.Option(help="Of the weights.")] = 0,
) -> None:
    """Random weights, a codec and a tokenizer: where the text stage starts."""
    assemble_untrained(out, codec=codec, tokenizer=tokenizer, preset=preset, seed=seed)


@app.command("start")
def start_command(
    out: Annotated[Path, typer.Argument(help="New folder.")],
    audio_encoder: Annotated[Path, typer.Option(help="What recipes.nano.audio_encoder wrote.")],
    trunk: Annotated[str, typer.Option(help="Release or run that has it, such as the text stage's.")] = SHIPPED,
    preset: Annotated[str, typer.Option(help="The shape.")] = PRESET,
    seed: Annotated[int, typer.Option(help="Of what is random.")] = 0,
) -> None:
    """A trained trunk and audio encoder, a random adapter: where stage 1 starts."""
    assemble_start(open_release(trunk), out, audio_encoder, preset=preset, seed=seed)


@app.command("package")
def package_command(
    model: Annotated[Path, typer.Argument(help="A release, or a finished run.")],
    out: Annotated[Path, typer.Argument(help="New folder.")],
    audio_encoder: Annotated[Path, typer.Option(help="What recipes.nano.audio_encoder wrote.")],
) -> None:
    """The model in eight bits."""
    typer.echo(f"{out}: {package(model, out, audio_encoder) / 1e6:.1f} MB")


if __name__ == "__main__":
    app()
