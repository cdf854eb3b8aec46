"""Embedding, adapters, heads and the TTS adapter, against plain numpy and transformers."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from flax import nnx

from omni_jax.config.model import AdapterConfig, AudioEncoderConfig, ModelConfig
from omni_jax.model.omni import Adapter, OmniModel
from omni_jax.vocab import Vocab
from tests.inference.reference_decoder import random_model, small_config
from tests.model.randomized import randomized
from tests.model.test_decoder import fill, layer_weights, randomized_torch


def close(ours: Any, theirs: Any, tolerance: float = 1e-5) -> None:
    np.testing.assert_allclose(np.asarray(ours), np.asarray(theirs), atol=tolerance, rtol=0)


def random_tokens(config: ModelConfig, *shape: int, seed: int = 0) -> np.ndarray:
    """int32 [*shape, 8, last of shape]: specials too."""
    random, vocab = np.random.default_rng(seed), Vocab(config.vocab)
    *rows, T = shape
    audio = random.integers(0, vocab.audio_rows, (*rows, 7, T))
    text = random.integers(0, vocab.text_rows, (*rows, 1, T))
    return np.concatenate([audio, text], axis=-2).astype(np.int32)


CONFIG = small_config()
MODEL = random_model(CONFIG)


def averaged(model: OmniModel, tokens: np.ndarray, speech: dict[tuple[int, int], np.ndarray]) -> np.ndarray:
    """[B, 8, T] -> [B, T, D], one position at a time; `speech` replaces the audio embeddings of some."""
    text, audio = np.asarray(model.embed.text[...]), np.asarray(model.embed.audio[...])
    B, _, T = tokens.shape
    out = np.zeros((B, T, text.shape[1]), np.float32)
    for b in range(B):
        for t in range(T):
            streams = [audio[k, tokens[b, k, t]] for k in range(7)]
            if (b, t) in speech:
                streams = [speech[b, t]] * 7
            out[b, t] = np.mean([*streams, text[tokens[b, 7, t]]], axis=0)
    return out


def test_embed_prompt_averages_eight_embeddings() -> None:
    tokens = random_tokens(CONFIG, 2, 5)
    expected = averaged(MODEL, tokens, {})
    close(MODEL.embed_prompt(tokens, None, None), expected)
    close(MODEL.embed_tokens(tokens.swapaxes(1, 2)), expected)


def test_embed_prompt_replaces_only_audio_embeddings_by_speech() -> None:
    tokens = random_tokens(CONFIG, 2, 5)
    speech = np.random.default_rng(1).normal(size=(2, 3, CONFIG.trunk.hidden_size)).astype(np.float32)
    index = np.array([[-1, 0, 1, 2, -1], [-1, -1, 0, -1, -1]])
    speech_at = {(b, t): speech[b, index[b, t]] for b in range(2) for t in range(5) if index[b, t] >= 0}
    close(MODEL.embed_prompt(tokens, speech, index), averaged(MODEL, tokens, speech_at))


@pytest.mark.parametrize("kind", ["llamamlp", "mlp"])
@pytest.mark.parametrize("stack", [1, 3])
def test_adapters(kind: Any, stack: int) -> None:
    config = dataclasses.replace(CONFIG, adapter=AdapterConfig(kind=kind, intermediate_size=11, stack=stack))
    adapter = randomized(lambda: Adapter(config, nnx.Rngs(0)))
    x = np.random.default_rng(0).normal(size=(2, 7, CONFIG.audio_encoder.hidden_size)).astype(np.float32)
    positions = -(-7 // stack)
    joined = np.zeros((2, positions, stack * CONFIG.audio_encoder.hidden_size), np.float32)
    for b in range(2):
        for t in range(7):
            start = t % stack * CONFIG.audio_encoder.hidden_size
            joined[b, t // stack, start : start + CONFIG.audio_encoder.hidden_size] = x[b, t]
    if kind == "mlp":
        affine: Any = adapter.map
        expected = joined @ np.asarray(affine.weight[...]).T + np.asarray(affine.bias[...])
    else:
        gate, up, down = (np.asarray(w.weight[...]) for w in (adapter.map.gate, adapter.map.up, adapter.map.down))
        gated = joined @ gate.T
        expected = (gated / (1 + np.exp(-gated)) * (joined @ up.T)) @ down.T
    assert expected.shape == (2, positions, CONFIG.trunk.hidden_size)
    close(adapter(x), expected, 1e-4)


def test_encode_audio_is_log_mel_encoder_and_adapter() -> None:
    config = dataclasses.replace(
        CONFIG,
        audio_encoder=AudioEncoderConfig(
            num_mel_bins=8, hidden_size=16, num_layers=1, num_heads=2, intermediate_size=20, max_position=7
        ),
        adapter=AdapterConfig(stack=2),
    )
    model = random_model(config)
    sound = np.random.default_rng(0).normal(size=(2, config.audio_encoder.max_samples)).astype(np.float32)
    from omni_jax.audio.features import log_mel

    assert config.audio_encoder.max_samples == 7 * 320
    speech_at = model.encode_audio(sound)
    assert speech_at.shape == (2, 4, config.trunk.hidden_size)
    close(speech_at, model.adapter(model.audio_encoder(log_mel(jnp.asarray(sound), 8))))


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("stacked", [False, True])
def test_text_logits_equal_transformers(tied: bool, stacked: bool) -> None:
    """A Qwen2 that is given the averaged embeddings, with the text table (tied) or the text head for its head."""
    config = small_config(tied=tied)
    model = random_model(config, stacked=stacked)
    trunk, vocab = config.trunk, Vocab(config.vocab)
    theirs = transformers.Qwen2Config(  # type: ignore[call-arg]
        vocab_size=vocab.text_rows,
        hidden_size=trunk.hidden_size,
        num_hidden_layers=trunk.num_layers,
        num_attention_heads=trunk.num_heads,
        num_key_value_heads=trunk.num_kv_heads,
        head_dim=trunk.head_dim,
        intermediate_size=trunk.intermediate_size,
        rms_norm_eps=trunk.norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": trunk.rope_theta},
        tie_word_embeddings=tied,
        attn_implementation="eager",
    )
    reference = randomized_torch(transformers.Qwen2ForCausalLM(theirs))
    state = {name: value.numpy() for name, value in reference.state_dict().items()}
    layers = [layer_weights(state, i, trunk) for i in range(trunk.num_layers)]
    if stacked:
        fill(model.trunk.layers, {name: np.stack([layer[name] for layer in layers]) for name in layers[0]})
    else:
        for block, weights in zip(model.trunk.layers, layers, strict=True):
            fill(block, weights)
    model.norm.scale.set_value(jnp.asarray(state["model.norm.weight"]))
    model.embed.text.set_value(jnp.asarray(state["model.embed_tokens.weight"]))
    if model.head is not None:
        model.head.text.set_value(jnp.asarray(state["lm_head.weight"]))
    assert (model.head is None) == tied

    tokens = random_tokens(config, 2, 12)
    with torch.no_grad():
        expected = reference(inputs_embeds=torch.tensor(averaged(model, tokens, {}))).logits.numpy()
    text_hidden, audio_hidden, _ = forward(model, tokens)
    close(model.text_logits(text_hidden), expected, 1e-4)
    table = np.asarray((model.embed if tied else model.head).audio[...])
    close(model.audio_logits(audio_hidden), np.einsum("btd,kvd->btkv", np.asarray(audio_hidden), table), 1e-4)
    assert np.abs(expected).max() > 0.5


def forward(model: OmniModel, tokens: np.ndarray, **more: Any) -> Any:
    graph, state = nnx.split(model)

    @jax.jit
    def run(state: Any, tokens: Any, positions: Any, more: Any) -> Any:
        return nnx.merge(graph, state)(tokens, positions, **more)

    positions = more.pop("positions", np.broadcast_to(np.arange(tokens.shape[2]), (len(tokens), tokens.shape[2])))
    return run(state, tokens, positions, more)


def test_tts_adapter_serves_the_audio_heads_only() -> None:
    """Its blocks follow the trunk's last, without the trunk's norm between; then its own norm and head."""
    config = small_config(tts_adapter_layers=2)
    model = random_model(config)
    adapter = model.tts_adapter
    assert adapter is not None
    tokens = random_tokens(config, 2, 6)
    positions = jnp.broadcast_to(jnp.arange(6), (2, 6))
    text_hidden, audio_hidden, cache = forward(model, tokens)
    x, _ = model.trunk(model.embed_prompt(tokens, None, None), positions)
    y, _ = adapter.blocks(x, positions)
    close(text_hidden, model.norm(x), 1e-4)
    close(audio_hidden, adapter.norm(y), 1e-4)
    assert len(adapter.blocks.layers) == 2
    assert set(cache) == {"trunk", "tts_adapter"}
    expected = np.einsum("btd,kvd->btkv", np.asarray(audio_hidden), np.asarray(adapter.head[...]))
    close(model.audio_logits(audio_hidden), expected, 1e-4)
    table = np.asarray(model.embed.text[...])
    close(model.text_logits(text_hidden), np.asarray(text_hidden) @ table.T, 1e-4)

    graph, state = nnx.split(model)
    skipped = jax.eval_shape(lambda: nnx.merge(graph, state)(tokens, positions, audio=False))
    assert set(skipped[2]) == {"trunk"}


def test_logits_are_float32_whatever_the_model_computes_in() -> None:
    config = small_config(tts_adapter_layers=1)
    for stacked in (False, True):
        model = nnx.eval_shape(
            lambda stacked=stacked: OmniModel(config, stacked=stacked, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
        )
        graph, state = nnx.split(model)

        def run(state: Any, tokens: Any, positions: Any, sound: Any, graph: Any = graph) -> Any:
            model = nnx.merge(graph, state)
            text, audio, cache = model(tokens, positions, model.encode_audio(sound), positions - 1)
            return text, model.text_logits(text), model.audio_logits(audio), cache

        tokens = jax.ShapeDtypeStruct((2, 8, 12), jnp.int32)
        positions = jax.ShapeDtypeStruct((2, 12), jnp.int32)
        sound = jax.ShapeDtypeStruct((2, config.audio_encoder.max_samples), jnp.float32)
        hidden, text, audio, cache = jax.eval_shape(run, state, tokens, positions, sound)
        assert hidden.dtype == jnp.bfloat16
        assert text.dtype == audio.dtype == jnp.float32
        assert {leaf.dtype for leaf in jax.tree.leaves(cache)} == {jnp.dtype(jnp.bfloat16)}
        assert text.shape == (2, 12, 43)
        assert audio.shape == (2, 12, 7, 17)


@pytest.mark.parametrize("rows", [2, 100])
def test_logits_keep_what_bfloat16_would_round_away(rows: int) -> None:
    """Rows few and many, which take different products."""
    hidden = jnp.asarray(np.random.default_rng(0).normal(size=(rows, CONFIG.trunk.hidden_size)), jnp.bfloat16)
    text, audio = (
        np.asarray(table.astype(jnp.bfloat16), np.float32) for table in (MODEL.embed.text[...], MODEL.embed.audio[...])
    )
    exact = np.asarray(hidden, np.float32)
    close(jax.jit(MODEL.text_logits)(hidden), np.einsum("rd,vd->rv", exact, text))
    close(jax.jit(MODEL.audio_logits)(hidden), np.einsum("rd,cvd->rcv", exact, audio))


def test_packed_examples_equal_separate_examples() -> None:
    """Two examples with speech and padding between them in one row, through trunk and TTS adapter."""
    config = small_config(tts_adapter_layers=1)
    model = random_model(config)
    random = np.random.default_rng(0)
    D = config.trunk.hidden_size
    parts = [(random_tokens(config, 1, n, seed=n), random.normal(size=(1, 4, D)).astype(np.float32)) for n in (9, 6)]
    speech_at = [3, 4]
    T = 20
    starts = [0, 11]

    def pack_examples(which: list[int], at: list[int]) -> Any:
        tokens, positions = np.zeros((1, 8, T), np.int32), np.zeros((1, T), np.int32)
        segments, index = np.zeros((1, T), np.int32), np.full((1, T), -1, np.int32)
        speech = np.zeros((1, 8, D), np.float32)
        for number, start in zip(which, at, strict=True):
            own = parts[number][0]
            n = own.shape[2]
            tokens[:, :, start : start + n] = own
            positions[0, start : start + n] = np.arange(n)
            segments[0, start : start + n] = number + 1
            index[0, start + 1 : start + 1 + speech_at[number]] = 4 * number + np.arange(speech_at[number])
            speech[:, 4 * number : 4 * number + 4] = parts[number][1]
        return forward(model, tokens, positions=positions, speech=speech, speech_index=index, segments=segments)

    packed = pack_examples([0, 1], starts)
    for number in (0, 1):
        alone = pack_examples([number], [0])
        n = parts[number][0].shape[2]
        for ours, theirs in zip(packed[:2], alone[:2], strict=True):
            close(ours[:, starts[number] : starts[number] + n], theirs[:, :n], 1e-4)
