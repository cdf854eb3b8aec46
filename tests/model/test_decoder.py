"""The trunk against small random models of transformers, and its cache against its whole-sequence forward."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from flax import nnx

from omni_jax import sharding
from omni_jax.config.model import RopeScaling, TrunkConfig
from omni_jax.model import decoder
from omni_jax.model.decoder import Decoder, DecoderBlock
from omni_jax.model.layers import RMSNorm
from omni_jax.model.pages import Cache, PageTable
from tests.model.randomized import randomized

VOCAB = 50


def qwen2() -> tuple[Any, TrunkConfig]:
    config = transformers.Qwen2Config(  # type: ignore[call-arg]
        vocab_size=VOCAB,
        hidden_size=48,
        num_hidden_layers=3,
        num_attention_heads=6,
        num_key_value_heads=2,
        intermediate_size=80,
        rms_norm_eps=1e-6,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        tie_word_embeddings=True,
        attn_implementation="eager",
    )
    ours = TrunkConfig(
        hidden_size=48,
        num_layers=3,
        num_heads=6,
        num_kv_heads=2,
        head_dim=8,
        intermediate_size=80,
        rope_theta=1e6,
        norm_eps=1e-6,
        max_position=64,
    )
    return transformers.Qwen2ForCausalLM(config), ours


def llama(scaled: bool) -> tuple[Any, TrunkConfig]:
    """No biases, an untied head, another theta, a head_dim that is not hidden_size / num_heads."""
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": 5e3}
    scaling = None
    if scaled:
        numbers = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
        rope |= {"rope_type": "llama3", "original_max_position_embeddings": 24, **numbers}
        scaling = RopeScaling(original_max_position=24, **numbers)
    config = transformers.LlamaConfig(  # type: ignore[call-arg]
        vocab_size=VOCAB,
        hidden_size=40,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=16,
        intermediate_size=56,
        rms_norm_eps=1e-5,
        rope_parameters=rope,
        tie_word_embeddings=False,
        max_position_embeddings=64,
        attn_implementation="eager",
    )
    ours = TrunkConfig(
        hidden_size=40,
        num_layers=2,
        num_heads=4,
        num_kv_heads=4,
        head_dim=16,
        intermediate_size=56,
        rope_theta=5e3,
        rope_scaling=scaling,
        norm_eps=1e-5,
        qkv_bias=False,
        tie_word_embeddings=False,
        max_position=64,
    )
    return transformers.LlamaForCausalLM(config), ours


FAMILIES: dict[str, Callable[[], tuple[Any, TrunkConfig]]] = {
    "qwen2": qwen2,
    "llama": lambda: llama(scaled=False),
    "llama3": lambda: llama(scaled=True),
}


def randomized_torch(model: Any) -> Any:
    """Every parameter random, norms and biases too."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, value in model.named_parameters():
            noise = torch.randn(value.shape, generator=generator)
            value.copy_(1 + 0.2 * noise if "norm" in name else 0.3 * noise if "bias" in name else 0.2 * noise)
    return model.eval()


def layer_weights(state: dict[str, np.ndarray], i: int, config: TrunkConfig) -> dict[str, np.ndarray]:
    """One layer of a transformers state dict under our names."""
    D, N, K, H = config.hidden_size, config.num_heads, config.num_kv_heads, config.head_dim
    of = f"model.layers.{i}."
    weights = {
        "attention_norm.scale": state[of + "input_layernorm.weight"],
        "mlp_norm.scale": state[of + "post_attention_layernorm.weight"],
        "attention.q.weight": state[of + "self_attn.q_proj.weight"].reshape(N, H, D),
        "attention.k.weight": state[of + "self_attn.k_proj.weight"].reshape(K, H, D),
        "attention.v.weight": state[of + "self_attn.v_proj.weight"].reshape(K, H, D),
        "attention.out.weight": state[of + "self_attn.o_proj.weight"].reshape(D, N, H),
        "mlp.gate.weight": state[of + "mlp.gate_proj.weight"],
        "mlp.up.weight": state[of + "mlp.up_proj.weight"],
        "mlp.down.weight": state[of + "mlp.down_proj.weight"],
    }
    if config.qkv_bias:
        weights["attention.q.bias"] = state[of + "self_attn.q_proj.bias"].reshape(N, H)
        weights["attention.k.bias"] = state[of + "self_attn.k_proj.bias"].reshape(K, H)
        weights["attention.v.bias"] = state[of + "self_attn.v_proj.bias"].reshape(K, H)
    return weights


def fill(block: DecoderBlock, weights: dict[str, np.ndarray]) -> None:
    names = {".".join(map(str, path)) for path, _ in nnx.to_flat_state(nnx.state(block))}
    assert names == set(weights)
    for name, value in weights.items():
        node: Any = block
        for part in name.split("."):
            node = getattr(node, part)
        assert node.shape == value.shape
        node.set_value(jnp.asarray(value))


class Ours:
    """Embedding, blocks, norm and head with the weights of a transformers model, as jitted functions."""

    def __init__(self, theirs: Any, config: TrunkConfig, *, stacked: bool):
        state = {name: value.numpy() for name, value in theirs.state_dict().items()}
        layers = [layer_weights(state, i, config) for i in range(config.num_layers)]
        blocks = randomized(
            lambda: Decoder(config, config.num_layers, stacked=stacked, dtype=jnp.float32, rngs=nnx.Rngs(0))
        )
        if stacked:
            fill(blocks.layers, {name: np.stack([layer[name] for layer in layers]) for name in layers[0]})
        else:
            for block, weights in zip(blocks.layers, layers, strict=True):
                fill(block, weights)
        self.blocks = blocks
        self.table = state["model.embed_tokens.weight"]
        head = self.table if config.tie_word_embeddings else state["lm_head.weight"]
        norm = RMSNorm(config.hidden_size, config.norm_eps)
        norm.scale[...] = jnp.asarray(state["model.norm.weight"])
        graph, self.weights = nnx.split(blocks)

        @jax.jit
        def whole(weights: Any, x: Any, positions: Any, segments: Any = None) -> tuple[jax.Array, Cache]:
            y, cache = nnx.merge(graph, weights)(x, positions, segments)
            return norm(y) @ head.T, cache

        @jax.jit
        def step(weights: Any, x: Any, positions: Any, cache: Any, pages: Any) -> tuple[jax.Array, Any]:
            y, cache = nnx.merge(graph, weights).decode(x, positions, cache, pages)
            return norm(y) @ head.T, cache

        self._whole, self._step = whole, step

    def whole(self, tokens: np.ndarray, positions: np.ndarray | None = None, segments: Any = None) -> Any:
        if positions is None:
            positions = np.broadcast_to(np.arange(tokens.shape[1]), tokens.shape)
        return self._whole(self.weights, self.table[tokens], positions, segments)

    def step(self, tokens: np.ndarray, positions: np.ndarray, cache: Cache, pages: PageTable) -> Any:
        return self._step(self.weights, self.table[tokens], positions, cache, pages)


@pytest.fixture(scope="module", params=FAMILIES)
def theirs(request: pytest.FixtureRequest) -> tuple[Any, TrunkConfig]:
    model, config = FAMILIES[request.param]()
    return randomized_torch(model), config


@pytest.fixture(scope="module", params=[False, True], ids=["unstacked", "stacked"])
def ours(request: pytest.FixtureRequest, theirs: tuple[Any, TrunkConfig]) -> Ours:
    return Ours(*theirs, stacked=request.param)


@pytest.fixture(scope="module")
def tokens() -> np.ndarray:
    return np.random.default_rng(0).integers(0, VOCAB, (2, 40))


def test_logits_equal_transformers(theirs: tuple[Any, TrunkConfig], ours: Ours, tokens: np.ndarray) -> None:
    with torch.no_grad():
        expected = theirs[0](torch.tensor(tokens)).logits.numpy()
    logits, _ = ours.whole(tokens)
    assert np.abs(expected).max() > 1, "logits of order 1, or the tolerance means nothing"
    np.testing.assert_allclose(np.asarray(logits), expected, atol=1e-4, rtol=0)


def test_prefill_and_decode_equal_the_whole_sequence(ours: Ours, tokens: np.ndarray) -> None:
    """Three rows of different length in pages of 8 positions anywhere in the pool, with garbage beyond them."""
    expected, _ = ours.whole(tokens)
    _, prefilled = ours.whole(tokens[:, :16])
    tables = [np.array([[7, 2, 4], [9, 0, 5]]), np.array([[1, 8, 3]])]
    pages = PageTable.of(tables, 10)
    rows, at = np.array([0, 1, 1]), np.array([12, 5, 5])

    def placed(pool: jax.Array, prompt: jax.Array) -> jax.Array:
        for row, table in zip(rows, np.concatenate(tables), strict=True):
            for index, page in enumerate(table[:2]):
                pool = pool.at[..., page, :, :, :].set(prompt[..., row, :, 8 * index : 8 * index + 8, :])
        return pool

    cache = jax.tree.map(lambda x: x + 100.0, ours.blocks.init_cache(10, 8))
    cache = jax.tree.map(placed, cache, prefilled)
    for _ in range(9):
        logits, cache = ours.step(tokens[rows, at], at, cache, pages)
        np.testing.assert_allclose(np.asarray(logits), np.asarray(expected)[rows, at], atol=1e-4, rtol=0)
        at = at + 1


def test_decode_writes_only_its_cache_position(ours: Ours, tokens: np.ndarray) -> None:
    """The third row has no page for its position."""
    cache = jax.tree.map(lambda x: x + 7.0, ours.blocks.init_cache(3, 4))
    pages = PageTable.of([np.array([[2, 3], [3, 0], [1, 3]])], 3)
    _, after = ours.step(tokens[0, :3], np.array([3, 6, 5]), cache, pages)
    for name in "kv":
        leaves = after[name] if isinstance(after[name], tuple) else tuple(after[name])
        for layer in leaves:
            changed = (np.asarray(layer) != 7.0).any(axis=(1, 3))
            np.testing.assert_array_equal(changed, [np.arange(4) == 2, np.zeros(4, bool), np.arange(4) == 3])


def test_packed_sequences_do_not_attend_to_each_other(ours: Ours, tokens: np.ndarray) -> None:
    """Lengths 15, 9 and 10 in one row of 40, positions counted from 0 in each, six of padding."""
    parts = [slice(0, 15), slice(15, 24), slice(24, 34)]
    segments, positions = np.zeros((1, 40), np.int32), np.zeros((1, 40), np.int32)
    for number, part in enumerate(parts, start=1):
        segments[0, part] = number
        positions[0, part] = np.arange(part.stop - part.start)
    packed, _ = ours.whole(tokens[:1], positions, segments)
    for part in parts:
        alone, _ = ours.whole(np.pad(tokens[:1, part], ((0, 0), (0, 40 - (part.stop - part.start)))))
        np.testing.assert_allclose(packed[0, part], alone[0, : part.stop - part.start], atol=1e-4, rtol=0)


@pytest.mark.parametrize(("kernel", "options"), [("splash", {"interpret": True}), ("cudnn", {"implementation": "xla"})])
def test_layers_of_several_kinds_use_a_kernel(
    kernel: str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Scanned layers, some with a window and some without rope, by a TPU's or a GPU's kernel and without it."""
    sizes = {"hidden_size": 16, "num_heads": 2, "num_kv_heads": 1, "head_dim": 8, "intermediate_size": 24}
    config = TrunkConfig(**sizes, num_layers=4, sliding_window=40, sliding_layers=(0, 3), no_rope_layers=(1,))
    blocks = randomized(lambda: Decoder(config, 4, stacked=True, dtype=jnp.float32, rngs=nnx.Rngs(0)))
    assert blocks.kind_of_layer == [0, 1, 2, 0]
    x = np.random.default_rng(1).standard_normal((1, 128, 16)).astype(np.float32)
    plain, _ = blocks(x, jnp.arange(128)[None])
    attend = partial(getattr(decoder, f"attend_{kernel}"), **options)
    used = []
    monkeypatch.setattr(decoder, f"can_use_{kernel}", lambda *_: True)
    monkeypatch.setattr(
        decoder, f"attend_{kernel}", lambda *qkv, **given: used.append(given["window"]) or attend(*qkv, **given)
    )
    with jax.set_mesh(sharding.make_mesh()):
        found, _ = jax.jit(lambda x: blocks(x, jnp.arange(128)[None], remat="full"))(x)
    assert set(used) == {None, 40}
    np.testing.assert_allclose(found, plain, atol=1e-4, rtol=1e-4)


def test_make_layers_draws_the_same_weights_stacked_or_not(monkeypatch: pytest.MonkeyPatch) -> None:
    # What the draws are drawn from, without compiling a normal distribution per shape.
    def key_alone(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
        return jnp.broadcast_to(jax.random.key_data(key)[..., -1].astype(dtype), shape)

    monkeypatch.setattr(jax.random, "normal", key_alone)
    config = TrunkConfig(hidden_size=8, num_layers=3, num_heads=2, num_kv_heads=1, head_dim=4, intermediate_size=12)

    def weights(stacked: bool) -> Any:
        blocks = Decoder(config, 3, stacked=stacked, dtype=jnp.float32, rngs=nnx.Rngs(5))
        return nnx.to_pure_dict(nnx.state(blocks.layers))

    together, one_by_one = weights(True), weights(False)
    for i in range(3):
        jax.tree.map(lambda whole, alone, i=i: np.testing.assert_array_equal(whole[i], alone), together, one_by_one[i])
    draws = {
        float(layer["mlp"][name]["weight"].ravel()[0])
        for layer in one_by_one.values()
        for name in ("gate", "up", "down")
    }
    assert len(draws) == 9
