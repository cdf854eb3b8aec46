"""The whole model: ear -> adapter -> trunk -> text head and seven audio heads, with an optional TTS adapter.

C audio layers and one text stream meet in the embedding: the eight embeddings of a position are averaged. The
published model keeps text and audio rows in one table; here they are two (`embed.text`, `embed.audio`), so that
a step reads only the rows it needs.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from omni_jax import sharding
from omni_jax.audio.features import log_mel
from omni_jax.config import ModelConfig
from omni_jax.model.layers import Array, GatedMLP, Int8, RMSNorm, linear, param
from omni_jax.model.trunk import Blocks, Cache, Remat
from omni_jax.model.whisper import Whisper
from omni_jax.vocab import LAYERS, STREAMS, TEXT, Vocab


class Tables(nnx.Module):
    """One row per token: text [Vt, D] and audio [C, Va, D]. Serves as embedding and, tied or not, as the heads."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        vocab, D = Vocab(config.vocab), config.trunk.width
        self.text = param(rngs, (vocab.text_rows, D), ("vocab", "embed"), D)
        self.audio = param(rngs, (LAYERS, vocab.audio_rows, D), (None, "vocab", "embed"), D)

    def lookup(self, tokens: Array, dtype: Any) -> tuple[Array, Array]:
        """Tokens int32 [..., 8] -> sum of the audio embeddings and text embedding, each [..., D]."""
        audio = self.audio[...][jnp.arange(LAYERS), tokens[..., :TEXT]].astype(dtype).sum(-2)
        return audio, self.text[...][tokens[..., TEXT]].astype(dtype)


class Affine(nnx.Module):
    """The `mlp` adapter of the published configs: one matrix and a bias."""

    def __init__(self, width: int, out: int, rngs: nnx.Rngs):
        self.weight = param(rngs, (out, width), ("embed", "ear_embed"), width)
        self.bias = nnx.Param(jnp.zeros((out,), jnp.float32), axes=(None,))

    def __call__(self, x: Array) -> Array:
        """[..., width] -> [..., out]."""
        return linear(x, self.weight[...]) + self.bias[...].astype(x.dtype)


class Adapter(nnx.Module):
    """Ear features, `stack` neighbours joined, to trunk embeddings."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        self.stack = config.adapter.stack
        width, D = config.ear.width * self.stack, config.trunk.width
        self.map: GatedMLP | Affine
        if config.adapter.kind == "llamamlp":
            self.map = GatedMLP(width, config.adapter.ffn, D, rngs, axes=("ear_embed", "ffn", "embed"))
        else:
            self.map = Affine(width, D, rngs)

    def __call__(self, features: Array) -> Array:
        """[B, positions, ear width] -> [B, ceil(positions / stack), D]."""
        B, T, E = features.shape
        features = jnp.pad(features, ((0, 0), (0, -T % self.stack), (0, 0)))
        return self.map(features.reshape(B, -1, E * self.stack))


class TTSAdapter(nnx.Module):
    """Blocks after the trunk's last, a norm and an audio head, for the audio logits only."""

    def __init__(self, config: ModelConfig, *, stacked: bool, dtype: Any, rngs: nnx.Rngs):
        vocab, D = Vocab(config.vocab), config.trunk.width
        self.blocks = Blocks(config.trunk, config.tts_adapter_layers, stacked=stacked, dtype=dtype, rngs=rngs)
        self.norm = RMSNorm(D, config.trunk.norm_eps)
        self.head = param(rngs, (LAYERS, vocab.audio_rows, D), (None, "vocab", "embed"), D)


class OmniModel(nnx.Module):
    """The model as one module; see `omni_jax.Omni` for the face that users talk to.

    Args:
        config: the shape.
        stacked: see `omni_jax.model.trunk`.
        dtype: what matrix products run in.
        rngs: `params` draws the weights.
    """

    def __init__(self, config: ModelConfig, *, stacked: bool, dtype: Any, rngs: nnx.Rngs):
        self.config, self.dtype = config, dtype
        self.mesh: Mesh | None = None
        """What it will run on, where that is known beforehand; see `lay_on`."""
        self.ear = Whisper(config.ear, stacked=stacked, dtype=dtype, rngs=rngs)
        self.adapter = Adapter(config, rngs)
        self.embed = Tables(config, rngs)
        self.trunk = Blocks(config.trunk, config.trunk.layers, stacked=stacked, dtype=dtype, rngs=rngs)
        self.norm = RMSNorm(config.trunk.width, config.trunk.norm_eps)
        self.head = None if config.trunk.tied_head else Tables(config, rngs)
        self.tts_adapter = (
            TTSAdapter(config, stacked=stacked, dtype=dtype, rngs=rngs) if config.tts_adapter_layers else None
        )

    def lay_on(self, mesh: Mesh) -> None:
        """Tell it what it will run on, before it is split: activations and caches are laid out by that."""
        self.mesh = self.ear.mesh = self.trunk.mesh = mesh
        if self.tts_adapter is not None:
            self.tts_adapter.blocks.mesh = mesh

    def hear(self, sound: Array, vary: Callable[[Array], Array] | None = None) -> Array:
        """Recordings f32 [B, samples] at 16 kHz, padded to the ear's length -> [B, ceil(positions/stack), D].

        What `vary` makes of their log-mel features, f32 [B, M, frames], is heard in place of these.
        """
        mels = partial(log_mel, mels=self.config.ear.mels)
        if self.mesh is not None and self.mesh.size > 1:
            # The compiler does not cut Fourier transforms: every chip would hear the whole batch.
            place = sharding.spec(sound.shape, ("batch", None), self.mesh)
            mels = jax.shard_map(mels, mesh=self.mesh, in_specs=place, out_specs=place)
        mel = mels(sound)
        return self.adapter(self.ear(mel if vary is None else vary(mel)).astype(self.dtype))

    def embed_tokens(self, tokens: Array) -> Array:
        """Tokens int32 [..., 8] -> their averaged embedding [..., D]."""
        audio, text = self.embed.lookup(tokens, self.dtype)
        return (audio + text) / STREAMS

    def embed_prompt(self, tokens: Array, speech: Array | None, speech_index: Array | None) -> Array:
        """Average the eight streams, with speech in place of the seven audio embeddings where there is some.

        Args:
            tokens: int32 [B, 8, T].
            speech: [B, A, D] from `hear`, or None if no position hears.
            speech_index: int32 [B, T]: which of the A speech embeddings a position hears, -1 for none.

        Returns:
            [B, T, D]; a speech position is (7 * speech + text) / 8.
        """
        looked_up = self.embed.lookup(tokens.swapaxes(1, 2), self.dtype)
        # Two steps, each an exchange between few chips: at once, the compiler would give the whole batch to all.
        audio, text = (sharding.constrain(x, ("looked_up", None, "embed"), self.mesh) for x in looked_up)
        audio, text = sharding.by_rows(audio, self.mesh), sharding.by_rows(text, self.mesh)
        if speech is not None:
            assert speech_index is not None
            heard = jnp.take_along_axis(speech, jnp.maximum(speech_index, 0)[..., None], axis=1)
            audio = jnp.where((speech_index >= 0)[..., None], LAYERS * heard.astype(self.dtype), audio)
        return (audio + text) / STREAMS

    def __call__(
        self,
        tokens: Array,
        positions: Array,
        speech: Array | None = None,
        speech_index: Array | None = None,
        segments: Array | None = None,
        *,
        audio: bool = True,
        remat: Remat = "none",
    ) -> tuple[Array, Array, Cache]:
        """Whole sequences through trunk and TTS adapter: training and prefill.

        Args:
            tokens: int32 [B, 8, T].
            positions: int32 [B, T].
            speech: see `embed_prompt`.
            speech_index: see `embed_prompt`.
            segments: see `Blocks.__call__`.
            audio: whether the audio heads will be asked; False skips the TTS adapter.
            remat: see `Blocks.__call__`.

        Returns:
            Normed hidden states for the text head and for the audio heads, each [B, T, D] (the same array without
            TTS adapter), and the cache: `trunk`, and `tts_adapter` where it ran.
        """
        x, cache = self.trunk(self.embed_prompt(tokens, speech, speech_index), positions, segments, remat)
        text_hidden = self.norm(x)
        if self.tts_adapter is None or not audio:
            return text_hidden, text_hidden, {"trunk": cache}
        y, tts_cache = self.tts_adapter.blocks(x, positions, segments, remat)
        return text_hidden, self.tts_adapter.norm(y), {"trunk": cache, "tts_adapter": tts_cache}

    def head_tables(self) -> tuple[Array | Int8, Array | Int8]:
        """What the heads score tokens with: text [Vt, D] and audio [C, Va, D]."""
        tables = self.head or self.embed
        return tables.text[...], (tables.audio if self.tts_adapter is None else self.tts_adapter.head)[...]

    def text_logits(self, hidden: Array) -> Array:
        """[..., D] -> float32 [..., Vt], whatever matrix products run in.

        Rounded to bfloat16, 5 % of the best logits of random weights had an equal, and 2 % were not the best any more.
        """
        return linear(hidden, self.head_tables()[0], dtype=jnp.float32)

    def audio_logits(self, hidden: Array) -> Array:
        """[..., D] -> float32 [..., C, Va]."""
        return linear(hidden, self.head_tables()[1], dtype=jnp.float32)
