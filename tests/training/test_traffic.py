"""What a training step sends between devices, as the compiler has cut it for eight of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from omni_jax.compile_report import hlo, report
from omni_jax.config.load import load_config
from omni_jax.config.run import RunConfig
from omni_jax.model.omni import OmniModel
from omni_jax.training import loop

ROOT = Path(__file__).parents[2]


def sent() -> tuple[dict[str, float], report.Program]:
    """Bytes by kind of collective, and the program they were counted in."""
    fields = [
        "data.batch_size=8",
        "data.max_length=128",
        "start=preset:tiny",
        "mesh.fsdp=4",
        "mesh.data=2",
        "loss.chunk_size=64",
    ]
    config = load_config(RunConfig, ROOT / "configs" / "mini_omni_stage3.yaml", fields)
    _, program = report._train(config, jax.devices())
    compiled = program.function.lower(*program.arguments, **program.keywords).compile()
    return hlo.parse(compiled.as_text()).cost.collectives, program


def test_weights_travel_and_activations_stay(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Layers stacked, as on a TPU. A model that is not told what it runs on has its activations sent around."""
    monkeypatch.setattr(loop, "default_layout", lambda _: (True, jnp.float32))
    told, program = sent()
    assert "Involuntary full rematerialization" not in capfd.readouterr().err
    learning, frozen = (sum(4 * leaf.size for leaf in jax.tree.leaves(part)) for part in weights(program))
    # Gathered for the forward pass, its repetition and the backward pass; the frozen ear's once a clip, eight in all.
    assert told["all-gather"] < 3 * learning + 8 * frozen
    # The gradients, those of the tables once for each of the two pieces of the loss, and once as embeddings.
    assert told["all-reduce"] < 5 * learning
    monkeypatch.setattr(OmniModel, "lay_on", lambda *_: None)
    untold, _ = sent()
    print(f"a step sends {sum(told.values()) / 1e6:.1f} MB, not told {sum(untold.values()) / 1e6:.1f} MB")
    assert sum(told.values()) < sum(untold.values()) / 8


def weights(program: report.Program) -> tuple[Any, Any]:
    """Those that learn, and those that don't."""
    state, frozen, _ = program.arguments
    return state.learning, frozen
