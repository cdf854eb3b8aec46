"""What works with each family of language models, measured on small random models of transformers.

`python -m tests.convert.families` measures it and writes the table of docs/weights.md.
"""

from __future__ import annotations

import math
import tempfile
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy
from flax import nnx, traverse_util

from omni_jax import sharding
from omni_jax.checkpoint.release import Release, open_release
from omni_jax.config.load import build_config
from omni_jax.config.model import ModelConfig
from omni_jax.config.run import RunConfig
from omni_jax.convert.release import export_transformers, init_release
from omni_jax.inference.runner import quantize_weights
from omni_jax.model.layers import Int8
from omni_jax.model.omni import OmniModel
from omni_jax.model.pages import PageTable
from omni_jax.training.optimizer import adamw
from omni_jax.training.stages import partition
from omni_jax.training.step import TrainState, train_step
from omni_jax.vocab import Vocab
from tests import models

PAGE = Path(__file__).parents[2] / "docs" / "weights.md"
LENGTH, PROMPT = 40, 12
COLUMNS = ("logits", "cached decoding", "int8", "training step")
"""What has a largest error."""
EXPORTED = "exported again"
"""The last column: the same bytes, or `measure` fails."""


@dataclass(frozen=True)
class Case:
    """A small model of a family."""

    title: str
    family: str
    """transformers' `model_type`."""
    tied: bool = False
    changes: dict[str, Any] = field(default_factory=dict)
    """Of its config."""
    rope: str = "default"


LLAMA3 = {
    "rope_type": "llama3",
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 48,
    "rope_theta": 5e4,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 48, "rope_theta": 1e4}
LINEAR = {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}
LOCAL = {"rope_type": "default", "rope_theta": 100.0}
LONGROPE = {
    "rope_type": "longrope",
    "short_factor": [1.0, 1.5, 2.0, 2.5, 3.0, 3.5],
    "long_factor": [4.0, 5.0, 6.0, 7.0, 8.0, 9.0],
    "factor": 4.0,
    "original_max_position_embeddings": 48,
    "rope_theta": 1e4,
    "partial_rotary_factor": 0.75,
}
WINDOW = {"sliding_window": 9}
PATTERN = {**WINDOW, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}

CASES = [
    Case("Qwen2, Qwen2.5", "qwen2", tied=True, changes={"use_sliding_window": True, "max_window_layers": 1, **WINDOW}),
    Case("Qwen3", "qwen3", changes={"head_dim": 16, "rope_parameters": YARN}, rope="yarn"),
    Case("Llama 2", "llama", changes={"attention_bias": True, "mlp_bias": True}),
    Case("Llama 3 to 3.3, SmolLM2", "llama", tied=True, changes={"rope_parameters": LLAMA3}, rope="llama3"),
    Case("Mistral", "mistral", changes=WINDOW),
    Case("SmolLM3", "smollm3", tied=True, changes={"no_rope_layers": [1, 0, 1]}),
    Case("Gemma 2", "gemma2", tied=True, changes={"head_dim": 16, "query_pre_attn_scalar": 24, **WINDOW}),
    Case(
        "Gemma 3",
        "gemma3_text",
        tied=True,
        changes={
            "head_dim": 16,
            "query_pre_attn_scalar": 24,
            "rope_parameters": {"full_attention": LINEAR, "sliding_attention": LOCAL},
            **PATTERN,
        },
        rope="linear",
    ),
    Case(
        "Phi-3, Phi-4",
        "phi3",
        changes={"hidden_size": 64, "rope_parameters": LONGROPE, "original_max_position_embeddings": 48},
        rope="longrope",
    ),
    Case("OLMo 2", "olmo2"),
    Case(
        "Granite",
        "granite",
        changes={
            "embedding_multiplier": 12.0,
            "residual_multiplier": 0.22,
            "logits_scaling": 0.5,
            "attention_multiplier": 0.4,
        },
    ),
]


def import_case(case: Case, parts: Path, folder: Path) -> tuple[Any, Release]:
    """The model of transformers, and the release made of its folder `lm`."""
    theirs = models.language_model_folder(folder / "lm", case.family, tied=case.tied, **case.changes)
    sources = {"whisper_source": str(parts / "whisper"), "snac_source": str(parts / "snac")}
    init_release(folder / "release", lm_source=str(folder / "lm"), adapter="mlp", **sources)
    return theirs, open_release(folder / "release")


def measure(case: Case, parts: Path, folder: Path, *, stacked: bool) -> dict[str, float]:
    """The largest error of each of `COLUMNS`; fails where a result has another shape, name or type."""
    import torch

    theirs, release = import_case(case, parts, folder)
    ids = jnp.asarray(np.random.default_rng(0).integers(0, 300, (2, LENGTH)))
    with torch.no_grad():
        expected = theirs(torch.from_numpy(np.array(ids))).logits.numpy()
    assert np.abs(expected).max() > 0.5, "logits of order 1, or the errors mean nothing"
    model = release.load_model(stacked=stacked, dtype=jnp.float32)
    graph, state = nnx.split(model)
    weights = nnx.to_pure_dict(state)

    @jax.jit
    def whole_and_cached(weights: Any) -> tuple[jax.Array, jax.Array]:
        """Logits of whole sequences, and those of the positions after the prompt, decoded one by one."""
        model: OmniModel = nnx.merge(graph, weights)

        def embed(ids: Any) -> jax.Array:
            # Plain text: no average of eight streams.
            return model.embed.text[ids] * model.config.trunk.embedding_multiplier

        def logits(x: jax.Array) -> jax.Array:
            return model.text_logits(model.norm(x))[..., : model.config.vocab.text]

        hidden, cache = model.trunk(embed(ids), jnp.broadcast_to(jnp.arange(LENGTH), ids.shape))
        # What follows the prompt must not be read before it is written.
        cache = jax.tree.map(lambda x: x.at[..., PROMPT:, :].set(100.0), cache)

        # Each row is a page.
        pages = PageTable.of([np.arange(2)[:, None]], 2)

        def step(cache: Any, position: jax.Array) -> tuple[Any, jax.Array]:
            x, cache = model.trunk.decode(embed(ids[:, position]), jnp.full(2, position), cache, pages)
            return cache, logits(x)

        _, decoded = jax.lax.scan(step, cache, jnp.arange(PROMPT, LENGTH))
        return logits(hidden), decoded.swapaxes(0, 1)

    whole, decoded = whole_and_cached(weights)
    rounded = quantize_weights(weights)
    int8, int8_decoded = whole_and_cached(rounded)
    floats, floats_decoded = whole_and_cached(_dequantized(rounded))
    _assert_export_is_exact(theirs, release, folder)
    return {
        "logits": error(whole, expected),
        "cached decoding": error(decoded, whole[:, PROMPT:]),
        "int8": max(error(int8, floats), error(int8_decoded, floats_decoded)),
        "training step": training_error(graph, weights, model.config),
    }


def error(one: Any, other: Any) -> float:
    """The largest difference."""
    assert one.shape == other.shape
    return float(np.abs(np.asarray(one) - np.asarray(other)).max())


def _dequantized(weights: Any) -> Any:
    flat = traverse_util.flatten_dict(weights)
    for path, leaf in flat.items():
        if isinstance(leaf, Int8):
            scale = leaf.scale.reshape(leaf.scale.shape + (1,) * (leaf.values.ndim - leaf.scale.ndim))
            flat[path] = leaf.values * scale
    return traverse_util.unflatten_dict(flat)


def _assert_export_is_exact(theirs: Any, release: Release, folder: Path) -> None:
    from transformers import AutoModelForCausalLM

    export_transformers(release, folder / "back")
    back = AutoModelForCausalLM.from_pretrained(folder / "back")
    assert type(back) is type(theirs)
    before, after = (safetensors.numpy.load_file(folder / name / "model.safetensors") for name in ("lm", "back"))
    assert set(before) == set(after)
    for name, tensor in before.items():
        assert tensor.tobytes() == after[name].tobytes(), name


def training_error(graph: Any, weights: Any, config: ModelConfig) -> float:
    """Between a training step on eight devices and one on a single device: of the loss and of the gradient's norm."""
    run = build_config(RunConfig, RUN, "run")
    vocab, random = Vocab(config.vocab), np.random.default_rng(1)
    shape = (4, 8, 16)
    tokens = random.integers(0, vocab.audio_rows, shape).astype(np.int32)
    batch = {
        "tokens": tokens,
        "targets": np.roll(tokens, -1, axis=2),
        "mask": np.ones(shape, bool),
        "positions": np.tile(np.arange(16, dtype=np.int32), (4, 1)),
        "segments": np.ones((4, 16), np.int32),
        "speech_index": np.full((4, 16), -1, np.int32),
    }
    trainable, frozen = partition(weights, run.trainable)
    found = []
    for sizes in ((1, 1, 1), (2, 2, 2)):
        mesh = sharding.make_mesh(*sizes)
        shardings = sharding.of_state(nnx.state(nnx.merge(graph, weights)), mesh)
        own, rest = (
            jax.device_put(part, spec)
            for part, spec in zip((trainable, frozen), partition(shardings, run.trainable), strict=True)
        )
        zero = jnp.int32(0)
        state = TrainState(zero, own, adamw(run.optimizer).init(own), zero, zero)
        with jax.set_mesh(mesh):
            on_mesh = jax.device_put(batch, sharding.rows(mesh))
            after, metrics = jax.jit(partial(train_step, graph, run))(state, rest, on_mesh)
        assert after.opt_state.num_updates == 1
        found.append([float(metrics["loss"]), float(metrics["grad_norm"])])
    return float(np.abs(np.array(found[0]) / np.array(found[1]) - 1).max())


RUN: dict[str, Any] = {
    "start": "preset:tiny",
    "out": "unused",
    "trainable": ["trunk", "text_embedding", "audio_embedding"],
    "data": {"tasks": {"T1T2": 1.0}, "sources": [{"path": "unused"}], "max_length": 16, "batch_size": 4},
    "optimizer": {"steps": 50, "peak_lr": 1e-3},
}


def bound(value: float) -> float:
    """A power of ten with room: errors depend on the processor."""
    return 10.0 ** math.ceil(math.log10(max(2 * value, 5e-7)))


def table(errors: dict[str, dict[str, float]]) -> str:
    """The table of docs/weights.md, with bounds of the errors."""
    lines = [
        f"| family | `model_type` | rope | {' | '.join(COLUMNS)} | {EXPORTED} |",
        "|---|---|---|" + "---|" * (len(COLUMNS) + 1),
    ]
    for case in CASES:
        figures = " | ".join(f"{errors[case.title][column]:.0e}" for column in COLUMNS)
        lines.append(f"| {case.title} | `{case.family}` | {case.rope} | {figures} | equal |")
    return "\n".join(lines) + "\n"


def stated() -> dict[str, dict[str, float]]:
    """The bounds that the page states, by the title of the case."""
    rows = [line.strip("| \n").split(" | ") for line in PAGE.read_text(encoding="utf-8").splitlines()]
    titles = {case.title for case in CASES}
    return {row[0]: dict(zip(COLUMNS, map(float, row[3:-1]), strict=True)) for row in rows if row[0] in titles}


def main() -> None:
    """Measure all cases and replace the table of the page."""
    # Eight devices, and programs that are compiled as those of the tests.
    import tests.conftest  # noqa: F401

    jax.config.update("jax_platforms", "cpu")

    config = models.tiny_config()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        models.whisper_folder(folder / "whisper", config.audio_encoder)
        models.snac_folder(folder / "snac", config.codec)
        measured = {}
        for number, case in enumerate(CASES):
            errors = measure(case, folder, folder / str(number), stacked=number % 2 == 0)
            measured[case.title] = {column: bound(value) for column, value in errors.items()}
            print(case.title, {column: f"{value:.1e}" for column, value in errors.items()}, flush=True)
    page = PAGE.read_text(encoding="utf-8")
    start = page.index("| family |")
    end = page.index("\n\n", start) + 1
    PAGE.write_text(page[:start] + table(measured) + page[end:], encoding="utf-8")


if __name__ == "__main__":
    main()
