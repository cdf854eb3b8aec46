"""Folders to convert: downloaded from the hub, and named where they are not what they should be."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from omni_jax.checkpoint.folders import require_files
from omni_jax.checkpoint.hub import fetch
from omni_jax.checkpoint.release import TOKENIZER_FILES, is_release
from omni_jax.convert import files, mini_omni, whisper
from omni_jax.errors import ConversionError

WHISPER, SNAC, MINI_OMNI, RELEASE = "a Whisper", "a SNAC", "a Mini-Omni checkpoint", "a release of omni_jax"
LANGUAGE_MODEL = "a language model"

MINI_OMNI_FILES = (mini_omni.WEIGHTS, mini_omni.CONFIG, *TOKENIZER_FILES)


def fetch_mini_omni(source: str) -> Path:
    """The folder of a Mini-Omni checkpoint, from a folder or a hub id.

    Raises:
        ConversionError: the folder is something else.
        CheckpointError: there is neither such a folder nor such a repository within reach, or a file is missing.
    """
    folder = fetch(source, MINI_OMNI_FILES, MINI_OMNI)
    expect(folder, MINI_OMNI)
    require_files(folder, MINI_OMNI_FILES, MINI_OMNI)
    return folder


def fetch_whisper(source: str) -> Path:
    """A Whisper: a folder of transformers, or a file of OpenAI's.

    Args:
        source: one of these, a folder with OpenAI's `small.pt`, such as Mini-Omni's, or the hub id of such a folder.

    Raises:
        ConversionError: it is something else.
        CheckpointError: there is neither such a file or folder nor such a repository within reach.
    """
    path = Path(source)
    if path.suffix == ".pt" and path.is_file():
        return path
    if (path / whisper.OPENAI_FILE).is_file() and kind_of(path) != WHISPER:
        return path / whisper.OPENAI_FILE
    folder = fetch_model(source, WHISPER)
    if (folder / files.CONFIG).is_file():
        return folder
    file = fetch(source, (whisper.OPENAI_FILE,), WHISPER) / whisper.OPENAI_FILE
    if not file.is_file():
        raise ConversionError(
            f"{source}: expected a Whisper: {files.CONFIG} with weights, or {whisper.OPENAI_FILE}, found neither; "
            "a file of OpenAI's with another name is passed by its path"
        )
    return file


def fetch_model(source: str, what: str, others: Sequence[str] = ()) -> Path:
    """A folder with `config.json` and weights; of a hub repository one set of weights, as its index names it.

    Args:
        source: a folder or a hub id.
        what: what it should be: `LANGUAGE_MODEL`, `WHISPER` or `SNAC`.
        others: further files worth downloading.

    Raises:
        ConversionError: the folder is something else.
        CheckpointError: there is neither such a folder nor such a repository within reach.
    """
    folder = fetch(source, (files.CONFIG, files.WEIGHTS, files.INDEX, *others), what)
    expect(folder, what)
    if not (folder / files.WEIGHTS).is_file() and not (folder / files.INDEX).is_file():
        folder = fetch(source, (files.TORCH_WEIGHTS, files.TORCH_INDEX), what)
    if shards := files.shards(folder):
        folder = fetch(source, [shard.name for shard in shards], what)
    return folder


def expect(folder: Path, what: str) -> None:
    """Check what a folder holds, as far as its files tell.

    Raises:
        ConversionError: it is something else.
    """
    found = kind_of(folder)
    if found is not None and found != what:
        raise ConversionError(f"{folder}: expected {what}, found {found}")


def kind_of(folder: Path) -> str | None:
    """What a folder holds, by its files; None if they do not tell."""
    if is_release(folder):
        return RELEASE
    if (folder / mini_omni.WEIGHTS).is_file():
        return MINI_OMNI
    if not (folder / files.CONFIG).is_file():
        return None
    values = files.read_json(folder / files.CONFIG)
    if values.get("model_type") == "whisper":
        return WHISPER
    if "vq_strides" in values or "codebook_size" in values:
        return SNAC
    return LANGUAGE_MODEL if "model_type" in values else None
