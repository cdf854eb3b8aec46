"""The ear's training, at a size of seconds."""

from __future__ import annotations

import json
from pathlib import Path

import jax
import numpy as np
import pytest
import soundfile

from nano import ear as ears
from nano import run
from omni_jax.checkpoint.release import parameter_shapes
from omni_jax.checkpoint.safetensors_io import SafetensorsFile
from omni_jax.config.model import AudioEncoderConfig, ModelConfig
from omni_jax.errors import CheckpointError

TINY = AudioEncoderConfig(
    num_mel_bins=16, hidden_size=16, num_layers=1, num_heads=2, intermediate_size=32, max_position=40
)


@pytest.fixture
def voices(tmp_path: Path) -> Path:
    """Shards as nano.synthesize writes them; every letter is a tone."""
    folder = tmp_path / "made"
    (folder / "questions").mkdir(parents=True)
    for part in ("questions/train", "questions/held_out_seen"):
        pieces, lines, start = [], [], 0
        for number in range(20):
            text = "abcd"[number % 4] + "abcd"[number // 4 % 4]
            pitches = np.repeat([200 + 400 * "abcd".index(letter) for letter in text], 3200)
            sound = 0.3 * np.sin(2 * np.pi * np.cumsum(pitches) / 16_000)
            entry = {"text": text.upper() + ".", "kind": "tone", "engine": "none", "voice": "tone"}
            lines.append(json.dumps({**entry, "start": start, "samples": len(sound), "varied": {}}))
            pieces.append((sound * 32767).astype(np.int16))
            start += len(sound)
        soundfile.write(folder / f"{part}-00000.flac", np.concatenate(pieces), 16_000, subtype="PCM_16")
        (folder / f"{part}-00000.jsonl").write_text("\n".join(lines))
    return folder


def test_letters_and_back():
    labels, padding = ears.numbers(["it's", ""])
    assert labels[0, :5].tolist() == [ears.LETTERS.index(letter) + 1 for letter in "it's"] + [0]
    assert padding.sum(1).tolist() == [ears.LONGEST_TEXT - 4, ears.LONGEST_TEXT]
    # A blank between two of the same letter keeps both.
    a, b = ears.LETTERS.index("a") + 1, ears.LETTERS.index("b") + 1
    path = np.array([[0, a, a, 0, a, b, b, 0]])
    assert ears.decode_text(np.eye(len(ears.LETTERS) + 1)[path]) == ["aab"]


@pytest.mark.parametrize("text", ["a" * (ears.LONGEST_TEXT + 1), "3"])
def test_a_text_that_cannot_be_written_is_refused(text: str):
    with pytest.raises(ValueError, match="expected at most"):
        ears.numbers([text])


def test_recordings_of_about_the_same_length_are_heard_together():
    clips = [ears.Clip(np.zeros(length, np.int16), "a") for length in (3000, 9000, 4000, 6000, 4001)]
    groups = ears.by_length(clips, [2000, 4000, 8000])
    assert [(length, [len(clip.audio) for clip in group]) for length, group in groups] == [
        (4000, [3000, 4000]),
        (8000, [6000, 4001]),
    ]


def test_a_batch_is_drawn_from_its_seed_and_fits():
    rng = np.random.default_rng(0)
    clips = [ears.Clip(rng.integers(-9, 9, length).astype(np.int16), "a") for length in (4000, 5000)]
    audio, lengths, labels, padding = ears.batch(clips, 5000, 6, [1, 2])
    again, *_ = ears.batch(clips, 5000, 6, [1, 2])
    other, *_ = ears.batch(clips, 5000, 6, [1, 3])
    np.testing.assert_array_equal(audio, again)
    assert not np.array_equal(audio, other)
    assert audio.shape == (6, 5000)
    assert labels.shape == padding.shape == (6, ears.LONGEST_TEXT)
    for row, length in zip(audio, lengths, strict=True):
        assert length - 9 < np.flatnonzero(row)[-1] < length
    assert 4000 / 1.15 - 9 < min(lengths) < max(lengths) <= 5000


def test_letters_are_spread_evenly_over_what_is_said():
    labels, padding = ears.numbers(["abcd", "a"])
    # 0.2 s of silence, 0.4 s of speech, 0.2 s of silence; then nothing more.
    lengths = np.array([12_800, 12_800])
    spread = np.asarray(ears.spread(lengths, labels, padding, 50))
    a, b, c, d = (ears.LETTERS.index(letter) + 1 for letter in "abcd")
    assert spread[0].tolist() == [0] * 10 + [a] * 5 + [b] * 5 + [c] * 5 + [d] * 5 + [0] * 20
    assert spread[1].tolist() == [0] * 10 + [a] * 20 + [0] * 20


def test_heads_begin_by_looking_beside_themselves():
    """The attention of every head peaks at its offset, amid what is heard."""
    from omni_jax.model.whisper_encoder import sinusoids

    config = ears.CONFIG
    params = ears.Trainer(config, 10, 0).start().params
    block = params["audio_encoder"]["layers"][0]
    heard = 0.3 * np.asarray(jax.random.normal(jax.random.key(1), (60, config.hidden_size)))
    x = np.asarray(sinusoids(60, config.hidden_size)) + heard
    x = (x - x.mean(-1, keepdims=True)) / x.std(-1, keepdims=True)
    q, k = (np.einsum("td,dnh->nth", x, np.asarray(block[name]["kernel"])) for name in "qk")
    scores = np.einsum("nth,nsh->nts", q, k) / np.sqrt(config.hidden_size // config.num_heads)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    middle = np.arange(10, 50)
    for head, offset in enumerate(ears.OFFSETS):
        assert abs(np.median(weights[head].argmax(-1)[middle] - middle) - offset) <= 1


def test_training_learns_resumes_and_exports(voices: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(ears, "BATCH", 4)
    monkeypatch.setattr(ears, "PEAK", 1e-2)
    options = {"config": TINY, "steps": 12, "log_every": 2, "validate_every": 6, "save_seconds": 0}
    ears.train(voices, tmp_path / "whole", **options)
    entries = run.metrics(tmp_path / "whole")
    losses = [entry["loss"] for entry in entries if "loss" in entry]
    # Up to there the length is the same; more silence is more to be lost.
    assert losses[3] < losses[0]
    assert [entry["step"] for entry in entries if "held_out_seen_exact" in entry] == [6, 12]

    saves = []
    save = run.save

    def save_and_stop(folder: Path, state: ears.State) -> None:
        save(folder, state)
        saves.append(int(state.step))
        if len(saves) == 5:
            raise KeyboardInterrupt

    monkeypatch.setattr(run, "save", save_and_stop)
    with pytest.raises(KeyboardInterrupt):
        ears.train(voices, tmp_path / "parts", **options)
    ears.train(voices, tmp_path / "parts", **options)
    assert saves == list(range(1, 13))
    whole, parts = ((tmp_path / name / run.STATE).read_bytes() for name in ("whole", "parts"))
    assert whole == parts

    named = {
        name: tensor.shape
        for name, tensor in SafetensorsFile(tmp_path / "whole" / "audio_encoder.safetensors").tensors.items()
    }
    release = parameter_shapes(ModelConfig(audio_encoder=TINY))
    assert named == {name: shape for name, shape in release.items() if name.startswith("audio_encoder.")}


def test_an_ear_taught_before_is_taught_further(tmp_path: Path):
    before, after = ears.Trainer(TINY, 10, 0).start(), ears.Trainer(TINY, 10, 1).start()
    run.export(tmp_path / "audio_encoder.safetensors", {"audio_encoder": before.params["audio_encoder"]})
    begun = ears.begin_with(after, tmp_path / "audio_encoder.safetensors")
    for params in (begun.params, begun.average):
        jax.tree.map(
            lambda new, old: np.testing.assert_array_equal(new, np.asarray(old, np.float16)),
            params["audio_encoder"],
            before.params["audio_encoder"],
        )
        jax.tree.map(np.testing.assert_array_equal, params["head"], after.params["head"])
    trainers = (ears.Trainer(TINY, 10, 0, takes_audio=takes_audio) for takes_audio in (False, True))
    first, further = (max(float(trainer.rate(step)) for step in range(10)) for trainer in trainers)
    assert further == pytest.approx(first / 2), "it is taught gently"
    with pytest.raises(CheckpointError, match="another ear"):
        ears.begin_with(ears.Trainer(ears.CONFIG, 10, 0).start(), tmp_path / "audio_encoder.safetensors")


def test_parameters_listen_for_any_length():
    trainer = ears.Trainer(TINY, 10, 0)
    params = trainer.start().params
    audio = np.random.default_rng(0).standard_normal((1, TINY.samples)).astype(np.float32)
    assert trainer.listen(params, audio).shape == (1, 40, len(ears.LETTERS) + 1)
    assert trainer.listen(params, audio[:, : 24 * 320]).shape == (1, 24, len(ears.LETTERS) + 1)
