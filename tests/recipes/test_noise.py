"""Recordings without a question."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from omni_jax.audio.io import SAMPLE_RATE
from omni_jax.data.sources import Manifest
from omni_jax.data.synthesizers import VoiceSpec
from recipes.nano import noise
from recipes.nano.texts import NOISES, noises

pytestmark = pytest.mark.slow


def test_every_kind_can_be_made() -> None:
    assert set(NOISES) == set(noise.KINDS)
    assert len(noise.LANGUAGES) >= 10


@pytest.mark.parametrize("kind", NOISES)
def test_make_noise_is_the_same_each_time_and_different_for_each_row(kind: str) -> None:
    made = [noise.make_noise(f"{kind} 0 {number}") for number in (1, 1, 2)]
    np.testing.assert_array_equal(made[0], made[1])
    assert not np.array_equal(made[0], made[2])
    for sound in made:
        assert sound.dtype == np.float32
        assert 0.5 < len(sound) / SAMPLE_RATE < 6
        assert 0.001 < np.abs(sound).max() <= 1
        assert np.isfinite(sound).all()


def test_corpus_has_recordings_without_words(tmp_path: Path) -> None:
    rows = noises(10, 0)
    lines = [json.dumps({"question_text": row.question_text, "answer_text": row.answer_text}) for row in rows]
    (tmp_path / "noise.jsonl").write_text("\n".join(lines), encoding="utf-8")
    source = Manifest(tmp_path / "noise.jsonl", name="nano", license="Apache-2.0")
    corpus = noise.NoiseCorpus(source, (), VoiceSpec("espeak", ("en-us",)), 24_000)
    found = [row.load() for shard in corpus.shards() for row in corpus.rows(shard)]
    assert len(found) == 10
    for pending, row in zip(found, rows, strict=True):
        assert pending.exchange.question_text == ""
        assert pending.exchange.question_audio is not None
        assert pending.exchange.answer_text == row.answer_text
        assert pending.answer_audio is not None
    assert {row.answer_text for row in rows} == {"I did not hear that.", "I am sorry, I don't know that."}
