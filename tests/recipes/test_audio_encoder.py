"""The training of the audio encoder, with a tiny configuration."""

from __future__ import annotations

from pathlib import Path

import jax
import numpy as np
import pytest

from omni_jax.checkpoint.release import parameter_shapes
from omni_jax.checkpoint.safetensors_io import SafetensorsFile
from omni_jax.config.model import AudioEncoderConfig, ModelConfig
from omni_jax.data.records import Exchange, RecordWriter
from recipes.nano import audio_encoder as encoders
from recipes.nano import training

pytestmark = pytest.mark.slow

TINY = AudioEncoderConfig(
    num_mel_bins=16, hidden_size=16, num_layers=1, num_heads=2, intermediate_size=32, max_position=40
)


@pytest.fixture(scope="module")
def clips() -> list[encoders.Clip]:
    """Two letters each, every letter a tone."""
    found = []
    for number in range(20):
        text = "abcd"[number % 4] + "abcd"[number // 4 % 4]
        pitches = np.repeat([200 + 400 * "abcd".index(letter) for letter in text], 3200)
        tone = 0.3 * np.sin(2 * np.pi * np.cumsum(pitches) / 16_000)
        found.append(encoders.Clip((tone * 32767).astype(np.int16), text))
    return found


def test_read_clips_normalizes_texts_and_skips_text_only(tmp_path: Path) -> None:
    audio = np.arange(-800, 800, dtype=np.int16)
    with RecordWriter(tmp_path / "records") as writer:
        writer.write(Exchange("Forty-seven?", audio, "Yes."))
        writer.write(Exchange("Two?", None, "Yes."))
    (clip,) = encoders.read_clips(tmp_path / "records")
    assert clip.text == "forty seven"
    np.testing.assert_array_equal(clip.audio, audio)


def test_labels_round_trip():
    labels, padding = encoders.encode_labels(["it's", ""])
    assert labels[0, :5].tolist() == [encoders.LETTERS.index(letter) + 1 for letter in "it's"] + [0]
    assert padding.sum(1).tolist() == [encoders.MAX_LETTERS - 4, encoders.MAX_LETTERS]
    # A blank between two of the same letter keeps both.
    a, b = encoders.LETTERS.index("a") + 1, encoders.LETTERS.index("b") + 1
    path = np.array([[0, a, a, 0, a, b, b, 0]])
    assert encoders.decode_greedy(np.eye(len(encoders.LETTERS) + 1)[path]) == ["aab"]


@pytest.mark.parametrize("text", ["a" * (encoders.MAX_LETTERS + 1), "3"])
def test_encode_labels_rejects_other_letters_and_long_texts(text: str):
    with pytest.raises(ValueError, match="expected at most"):
        encoders.encode_labels([text])


def test_group_by_length():
    clips = [encoders.Clip(np.zeros(length, np.int16), "a") for length in (3000, 9000, 4000, 6000, 4001)]
    groups = encoders.group_by_length(clips, [2000, 4000, 8000])
    assert [(length, [len(clip.audio) for clip in group]) for length, group in groups] == [
        (4000, [3000, 4000]),
        (8000, [6000, 4001]),
    ]


def test_make_batch_depends_on_seed_and_fits():
    rng = np.random.default_rng(0)
    clips = [encoders.Clip(rng.integers(-9, 9, length).astype(np.int16), "a") for length in (4000, 5000)]
    audio, lengths, labels, padding = encoders.make_batch(clips, 5000, 6, [1, 2])
    again, *_ = encoders.make_batch(clips, 5000, 6, [1, 2])
    other, *_ = encoders.make_batch(clips, 5000, 6, [1, 3])
    np.testing.assert_array_equal(audio, again)
    assert not np.array_equal(audio, other)
    assert audio.shape == (6, 5000)
    assert labels.shape == padding.shape == (6, encoders.MAX_LETTERS)
    for row, length in zip(audio, lengths, strict=True):
        assert length - 9 < np.flatnonzero(row)[-1] < length
    assert 4000 / 1.15 - 9 < min(lengths) < max(lengths) <= 5000


def test_even_alignment():
    labels, padding = encoders.encode_labels(["abcd", "a"])
    # 0.2 s of silence, 0.4 s of speech, 0.2 s of silence; then nothing more.
    lengths = np.array([12_800, 12_800])
    spread = np.asarray(encoders.even_alignment(lengths, labels, padding, 50))
    a, b, c, d = (encoders.LETTERS.index(letter) + 1 for letter in "abcd")
    assert spread[0].tolist() == [0] * 10 + [a] * 5 + [b] * 5 + [c] * 5 + [d] * 5 + [0] * 20
    assert spread[1].tolist() == [0] * 10 + [a] * 20 + [0] * 20


def test_init_local_attention_peaks_at_offsets():
    """The attention of every head peaks at its offset, with noise added to the positions."""
    from omni_jax.model.whisper_encoder import sinusoids

    config = encoders.CONFIG
    params = encoders.Trainer(config, 10, 0).init().params
    block = params["audio_encoder"]["layers"][0]
    noise = 0.3 * np.asarray(jax.random.normal(jax.random.key(1), (60, config.hidden_size)))
    x = np.asarray(sinusoids(60, config.hidden_size)) + noise
    x = (x - x.mean(-1, keepdims=True)) / x.std(-1, keepdims=True)
    q, k = (np.einsum("td,nhd->nth", x, np.asarray(block[name]["weight"])) for name in "qk")
    scores = np.einsum("nth,nsh->nts", q, k) / np.sqrt(config.hidden_size // config.num_heads)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    middle = np.arange(10, 50)
    for head, offset in enumerate(encoders.OFFSETS):
        assert abs(np.median(weights[head].argmax(-1)[middle] - middle) - offset) <= 1


def test_muon_axes_are_inputs_and_outputs() -> None:
    params = encoders.Trainer(TINY, 10, 0).init().params
    axes = encoders.muon_axes(params)
    encoder, block = axes["audio_encoder"], axes["audio_encoder"]["layers"][0]
    found = {name: block[name]["weight"] for name in ("q", "out", "up", "down")} | {"conv2": encoder["conv2"]["weight"]}
    assert {name: tuple(axis) for name, axis in found.items()} == {
        "q": ((2,), (0, 1)),
        "out": ((1, 2), (0,)),
        "up": ((1,), (0,)),
        "down": ((1,), (0,)),
        "conv2": ((0, 1), (2,)),
    }
    assert axes["head"] == {"weight": None, "bias": None}
    assert block["q"]["bias"] is None
    assert encoder["norm"] == {"scale": None, "bias": None}


@pytest.mark.nightly
def test_train_reduces_loss_resumes_and_exports(
    clips: list[encoders.Clip], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(encoders, "BATCH_SIZE", 4)
    monkeypatch.setattr(encoders, "PEAK_LR", 1e-2)
    intervals = training.Intervals(log_steps=2, eval_steps=6, save_seconds=0)

    def train(out: Path) -> None:
        encoders.train(clips, {"held_out_seen": clips}, out, config=TINY, steps=12, intervals=intervals)

    train(tmp_path / "whole")
    entries = training.read_metrics(tmp_path / "whole")
    losses = [entry["loss"] for entry in entries if "loss" in entry]
    # Later steps are padded to the full length: more silence, another loss.
    assert losses[3] < losses[0]
    assert [entry["step"] for entry in entries if "held_out_seen_exact" in entry] == [6, 12]

    make = encoders.make_batch

    def interrupted(some: list[encoders.Clip], samples: int, size: int, seed: list[int]) -> object:
        if seed == [0, 7]:
            raise KeyboardInterrupt
        return make(some, samples, size, seed)

    with monkeypatch.context() as patch:
        patch.setattr(encoders, "make_batch", interrupted)
        with pytest.raises(KeyboardInterrupt):
            train(tmp_path / "resumed")
    train(tmp_path / "resumed")
    whole, resumed = ((tmp_path / name / encoders.AUDIO_ENCODER).read_bytes() for name in ("whole", "resumed"))
    assert whole == resumed

    tensors = SafetensorsFile(tmp_path / "whole" / encoders.AUDIO_ENCODER).tensors
    release = parameter_shapes(ModelConfig(audio_encoder=TINY))
    expected = {name: shape for name, shape in release.items() if name.startswith("audio_encoder.")}
    assert {name: tensor.shape for name, tensor in tensors.items()} == expected


def test_transcribe_takes_any_length():
    trainer = encoders.Trainer(TINY, 10, 0)
    params = trainer.init().params
    audio = np.random.default_rng(0).standard_normal((1, TINY.max_samples)).astype(np.float32)
    assert trainer.transcribe(params, audio).shape == (1, 40, len(encoders.LETTERS) + 1)
    assert trainer.transcribe(params, audio[:, : 24 * 320]).shape == (1, 24, len(encoders.LETTERS) + 1)
