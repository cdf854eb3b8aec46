"""What rounding does is counted rightly."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from nano import rounding
from omni_jax.checkpoint import release as checkpoint
from omni_jax.config.model import PRESETS
from omni_jax.inference.runner import quantize_weights

B, T, CLIPS = 2, 6, 2


@pytest.fixture(scope="module")
def model() -> Any:
    return checkpoint.init_model(PRESETS["tiny"], stacked=False, dtype=jnp.float32, seed=0)


@pytest.fixture(scope="module")
def batch() -> dict[str, np.ndarray]:
    vocab = PRESETS["tiny"].vocab
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, vocab.audio, (B, 8, T)).astype(np.int32)
    return {
        "tokens": tokens,
        "targets": tokens,
        "mask": rng.random((B, 8, T)) < 0.5,
        "positions": np.tile(np.arange(T, dtype=np.int32), (B, 1)),
        "segments": np.ones((B, T), np.int32),
        "speech_index": np.full((B, T), -1, np.int32),
        "sound": np.zeros((B, CLIPS, PRESETS["tiny"].audio_encoder.max_samples), np.int16),
    }


def test_the_same_weights_say_the_same(model: Any, batch: dict[str, np.ndarray]):
    graph, state = nnx.split(model)
    weights = nnx.to_pure_dict(state)
    found = rounding.compare(graph, weights, weights, batch)
    np.testing.assert_array_equal(found["count"], batch["mask"].sum((0, 2)))
    np.testing.assert_array_equal(found["same"], found["count"])
    np.testing.assert_array_equal(found["exact"], found["rounded"])
    assert not np.any(found["divergence"])
    assert not np.any(found["difference"])


def test_divergence_and_difference_are_those_of_the_logits(model: Any, batch: dict[str, np.ndarray]):
    graph, state = nnx.split(model)
    weights = nnx.to_pure_dict(state)
    rounded = quantize_weights(weights)
    found = rounding.compare(graph, weights, rounded, batch)

    divergence, difference, loss = np.zeros(8), np.zeros(8), np.zeros(8)
    sides = []
    for side in (weights, rounded):
        spoken = nnx.merge(graph, side)
        text, audio, _ = spoken(batch["tokens"], batch["positions"], None, None, batch["segments"])
        sides.append((np.asarray(spoken.audio_logits(audio)), np.asarray(spoken.text_logits(text))))
    for row, stream, position in np.argwhere(batch["mask"]):
        ours, theirs = (
            (text[row, position] if stream == 7 else audio[row, position, stream]).astype(np.float64)
            for audio, text in sides
        )
        p, q = (np.exp(x - x.max()) / np.exp(x - x.max()).sum() for x in (ours, theirs))
        divergence[stream] += (p * np.log(p / q)).sum()
        difference[stream] += np.var(ours - theirs)
        loss[stream] -= np.log(q[batch["targets"][row, stream, position]])
    np.testing.assert_allclose(found["divergence"], divergence, rtol=0.02, atol=1e-6)
    np.testing.assert_allclose(found["difference"], difference, rtol=1e-3)
    np.testing.assert_allclose(found["rounded"], loss, rtol=1e-4)
    assert (difference > 0).all()


def test_tables_say_what_was_found():
    sums = {name: np.ones(8) for name in ("exact", "rounded", "divergence", "same", "difference", "spread")}
    count = np.array([1, 1, 1, 1, 1, 1, 1, 0])
    lines = rounding.logits_table({"T1A1": {**sums, "count": count}})
    # Nothing is written in this task, so the text head has no row.
    assert lines[2:] == ["| T1A1 | audio | 7 | 1.0000 | 1.0000 | 1.00000 | 100.00% | 100.00% |"]

    def entries(*decode_text: str) -> list[dict[str, str]]:
        return [{"written": text, "expected": "four", "kind": "sum", "held_out": "pair"} for text in decode_text]

    lines = rounding.answers_table({"A": entries("four", "four")}, {"A": entries("four", "five")})
    assert lines[2:] == ["| A | 2 | 100.0% | 50.0% | 50.0% |"]
