"""What a training step sends between devices, as the compiler has cut it for eight of them."""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from omni_jax.config import RunConfig, load
from omni_jax.tpu import hlo, report
from omni_jax.training import loop

ROOT = Path(__file__).parents[2]


def test_weights_travel_and_activations_stay(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Layers stacked, as on a TPU. Left to itself the compiler sent twenty times as much around."""
    monkeypatch.setattr(loop, "default_layout", lambda _: (True, jnp.float32))
    fields = ["data.batch=8", "data.length=128", "start=preset:tiny", "mesh.fsdp=4", "mesh.data=2", "loss.chunk=64"]
    config = load(RunConfig, ROOT / "configs" / "mini_omni_stage3.yaml", fields)
    _, program = report._train(config, jax.devices())
    compiled = program.function.lower(*program.arguments, **program.keywords).compile()
    sent = hlo.parse(compiled.as_text()).cost.collectives
    learning = sum(4 * leaf.size for leaf in jax.tree.leaves(program.arguments[0].learning))
    # Gathered for the forward pass, its repetition and the backward pass; the frozen ear's once a clip, eight in all.
    frozen = sum(4 * leaf.size for leaf in jax.tree.leaves(program.arguments[1]))
    assert sent["all-gather"] < 3 * learning + 8 * frozen
    # The gradients, those of the tables once for each of the four pieces of the loss, and once as embeddings.
    assert sent["all-reduce"] < 5 * learning
    assert "Involuntary full rematerialization" not in capfd.readouterr().err
