"""Whole folders: a release made from published weights, published weights made from a release.

Hub ids are as good as folders everywhere. Tensors go from file to file one by one.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np
from flax import nnx

from omni_jax.checkpoint.hub import fetch
from omni_jax.checkpoint.release import (
    CONFIG,
    TOKENIZER_FILES,
    Release,
    dotted_name,
    is_release,
    new_folder,
    open_release,
    require_files,
    require_free,
    save_release,
)
from omni_jax.checkpoint.safetensors_io import LazyTensor, Tensors
from omni_jax.config.model import AdapterConfig, AudioEncoderConfig, CodecConfig, ModelConfig, VocabConfig
from omni_jax.convert import mini_omni, qwen2, snac, whisper
from omni_jax.errors import ConversionError
from omni_jax.model.omni import Adapter, TTSAdapter
from omni_jax.vocab import NUM_CODEBOOKS, Vocab

_EAR = "audio_encoder."
"""What the names of the ear's tensors begin with in a release."""
_TRANSFORMERS_FILES = ("config.json", "*.safetensors", "*.safetensors.index.json", *TOKENIZER_FILES)
_SNAC_FILES = ("config.json", "model.safetensors", "pytorch_model.bin")
_MINI_OMNI_FILES = (mini_omni.WEIGHTS, mini_omni.CONFIG, *TOKENIZER_FILES)


def import_mini_omni(source: str, out: str | Path, *, whisper_source: str, snac_source: str) -> None:
    """Make a release of a Mini-Omni checkpoint, a Whisper and a SNAC, each tensor of its own type.

    Raises:
        ConversionError: something is not what it should be; lists everything that is wrong with a part.
        CheckpointError: a folder or file is missing, or `out` is in use.
    """
    require_free(out)
    folder = fetch(source, _MINI_OMNI_FILES, "a Mini-Omni checkpoint")
    require_files(folder, _MINI_OMNI_FILES, "a Mini-Omni checkpoint")
    state = mini_omni.read_state(folder)
    ear, ear_tensors, codec, codec_tensors = _ear_and_codec(whisper_source, snac_source)
    config = mini_omni.config_from_yaml(
        mini_omni.read_config(folder),
        ear,
        codec,
        tts_adapter=mini_omni.has_tts_adapter(state),
        source=str(folder / mini_omni.CONFIG),
    )
    tensors = mini_omni.from_state(state, config, str(folder / mini_omni.WEIGHTS))
    save_release(out, config, {**tensors, **ear_tensors}, codec_tensors, _tokenizer_files(folder))


def export_mini_omni(release: Release, out: str | Path) -> None:
    """Write a folder that the published Mini-Omni code loads. Ear and codec have formats of their own.

    Raises:
        ConversionError: the published code has no such model.
        CheckpointError: the release is damaged, or `out` is in use.
    """
    state = mini_omni.to_state(release.model_tensors(), release.config, str(release.folder))
    with new_folder(out) as partial:
        mini_omni.write(partial, release.config, state)
        _copy(release.tokenizer_files(), partial)


def export_transformers(release: Release, out: str | Path) -> None:
    """Write the trunk alone, with its own vocabulary only, as a Qwen2 or Llama folder of transformers.

    Raises:
        CheckpointError: the release is damaged, or `out` is in use.
    """
    rows = release.config.vocab.text

    def cut(tensor: LazyTensor) -> LazyTensor:
        return LazyTensor((rows, *tensor.shape[1:]), tensor.dtype, lambda: tensor.read()[:rows])

    kept = {
        name: cut(tensor) if name in ("embed.text", "head.text") else tensor
        for name, tensor in release.model_tensors().items()
        if name.startswith(("trunk.", "norm.")) or name in ("embed.text", "head.text")
    }
    with new_folder(out) as partial:
        qwen2.write(partial, release.config.trunk, rows, kept)
        _copy(release.tokenizer_files(), partial)


def export_whisper(release: Release, out: str | Path) -> None:
    """Write the ear alone, as a Whisper folder of transformers; see `whisper.write`.

    Raises:
        CheckpointError: the release is damaged, or `out` is in use.
    """
    ear = {name.removeprefix(_EAR): tensor.read() for name, tensor in _ear(release).items()}
    with new_folder(out) as partial:
        whisper.write(partial, release.config.audio_encoder, ear)


def export_snac(release: Release, out: str | Path) -> None:
    """Write the codec alone, as a folder of snac's; see `snac.write`.

    Raises:
        CheckpointError: the release is damaged, or `out` is in use.
        ImportError: torch is not installed.
    """
    codec = {name: tensor.read() for name, tensor in release.codec_tensors().items()}
    with new_folder(out) as partial:
        snac.write(partial, release.config.codec, codec)


def init_release(
    out: str | Path,
    *,
    lm_source: str,
    whisper_source: str,
    snac_source: str,
    adapter: Literal["llamamlp", "mlp"] = "llamamlp",
    tts_adapter_layers: int = 0,
    seed: int = 0,
) -> None:
    """Make a release ready for training out of a language model, a Whisper and a SNAC.

    Rows for the new tokens are drawn as `qwen2.extend` says, adapters as the model draws its own weights.

    Args:
        out: new or empty folder.
        lm_source: Qwen2 or Llama family, as transformers saves it.
        whisper_source: a Whisper, as transformers saves it.
        snac_source: a SNAC with seven codes a frame.
        adapter: what leads from the ear to the trunk.
        tts_adapter_layers: blocks for the audio heads only.
        seed: the same seed gives the same release.

    Raises:
        ConversionError: something is not what it should be; lists everything that is wrong with a part.
        CheckpointError: a folder or file is missing, or `out` is in use.
    """
    require_free(out)
    folder = fetch(lm_source, _TRANSFORMERS_FILES, "a language model")
    require_files(folder, (qwen2.CONFIG, *TOKENIZER_FILES), "a language model")
    trunk, rows, lm = qwen2.read(folder)
    ear, ear_tensors, codec, codec_tensors = _ear_and_codec(whisper_source, snac_source)
    config = ModelConfig(
        audio_encoder=ear,
        adapter=AdapterConfig(kind=adapter, intermediate_size=trunk.intermediate_size),
        trunk=trunk,
        vocab=replace(VocabConfig(), text=rows, audio=codec.codebook_size),
        codec=codec,
        tts_adapter_layers=tts_adapter_layers,
    )
    vocab = Vocab(config.vocab)
    tables: dict[str, LazyTensor] = {}
    for name in ("embed",) if trunk.tie_word_embeddings else ("embed", "head"):
        table = lm.pop(f"{name}.text")
        tables.update(qwen2.extend(table, name, vocab.text_rows, (NUM_CODEBOOKS, vocab.audio_rows), seed))
    tensors = {**ear_tensors, **_new_parts(config, seed), **lm, **tables}
    save_release(out, config, tensors, codec_tensors, _tokenizer_files(folder))


@dataclass(frozen=True)
class Row:
    """Tensors of a folder that differ in nothing but their layer."""

    part: str
    name: str
    """Layer numbers are `*`."""
    count: int
    shape: tuple[int, ...]
    dtype: str

    @property
    def parameters(self) -> int:
        """Of all of them together."""
        return self.count * int(np.prod(self.shape, dtype=np.int64))


def inspect(source: str) -> list[Row]:
    """What is in a release, a finished training run or a Mini-Omni checkpoint.

    Weights are not read, and a tied head counts once.

    Raises:
        ConversionError: it is neither.
        CheckpointError: it is not there, or damaged.
    """
    files = (CONFIG, *_MINI_OMNI_FILES, "*.safetensors")
    folder = Path(source) if is_release(source) else fetch(source, files, "a release or a Mini-Omni checkpoint")
    if is_release(folder):
        tensors = open_release(folder).inspect()
    elif (folder / mini_omni.WEIGHTS).is_file():
        tensors = mini_omni.read_state(folder)
        if mini_omni.read_config(folder).get("tie_word_embeddings"):
            tensors.pop(mini_omni.HEAD, None)
    else:
        raise ConversionError(
            f"{folder}: expected a release with {CONFIG} or a Mini-Omni checkpoint with {mini_omni.WEIGHTS}, "
            "found neither"
        )
    return list(_rows(tensors))


def _rows(tensors: Tensors) -> Iterator[Row]:
    counts: dict[tuple[str, tuple[int, ...], str], int] = {}
    for name, tensor in tensors.items():
        key = (re.sub(r"(?<=\.)\d+(?=\.)", "*", name), tensor.shape, str(tensor.kept_as or tensor.dtype))
        counts[key] = counts.get(key, 0) + 1
    for (name, shape, dtype), count in sorted(counts.items()):
        part = name.removeprefix("transformer.").split(".")[0]
        yield Row(part, name, count, shape, dtype)


def _ear_and_codec(
    whisper_source: str, snac_source: str
) -> tuple[AudioEncoderConfig, dict[str, LazyTensor], CodecConfig, dict[str, LazyTensor]]:
    """A release may stand in for either: its ear, its codec."""
    if release := _release(whisper_source):
        ear = release.config.audio_encoder
        ear_tensors = _ear(release)
    else:
        ear, arrays = whisper.read(fetch(whisper_source, _TRANSFORMERS_FILES, "a Whisper"))
        ear_tensors = {_EAR + name: LazyTensor.of(array) for name, array in arrays.items()}
    if release := _release(snac_source):
        return ear, ear_tensors, release.config.codec, dict(release.codec_tensors())
    codec, arrays = snac.read(fetch(snac_source, _SNAC_FILES, "a SNAC"))
    return ear, ear_tensors, codec, {name: LazyTensor.of(array) for name, array in arrays.items()}


def _ear(release: Release) -> dict[str, LazyTensor]:
    return {name: tensor for name, tensor in release.model_tensors().items() if name.startswith(_EAR)}


def _release(source: str) -> Release | None:
    return open_release(source) if is_release(source) else None


def _new_parts(config: ModelConfig, seed: int) -> dict[str, LazyTensor]:
    """Adapters with random weights."""
    rngs = nnx.Rngs(seed)
    parts: dict[str, Any] = {"adapter": Adapter(config, rngs)}
    if config.tts_adapter_layers:
        parts["tts_adapter"] = TTSAdapter(config, stacked=False, dtype=jnp.float32, rngs=rngs)
    return {
        f"{name}.{dotted_name(path)}": LazyTensor.of(np.asarray(variable[...]))
        for name, part in parts.items()
        for path, variable in nnx.to_flat_state(nnx.state(part))
    }


def _tokenizer_files(folder: Path) -> list[Path]:
    return [folder / name for name in TOKENIZER_FILES]


def _copy(files: list[Path], folder: Path) -> None:
    for file in files:
        shutil.copyfile(file, folder / file.name)
