"""The whole model: audio encoder -> adapter -> trunk -> text head and seven audio heads, optionally a TTS adapter.

Seven audio streams and one text stream meet in the embedding: the eight embeddings of a position are averaged. The
published model keeps text and audio tokens in one table; here they are two (`embed.text`, `embed.audio`), so that a
step reads only the rows it needs.

Letters: B batch, T positions, A speech positions, D hidden, C codebooks, Vt and Va rows of the text table and of one
codebook's.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from omni_jax import sharding
from omni_jax.audio.features import log_mel
from omni_jax.config.model import ModelConfig, TrunkConfig
from omni_jax.model.attention import soft_cap
from omni_jax.model.decoder import Decoder, Remat
from omni_jax.model.layers import Array, GatedMLP, Int8, Linear, linear, param, trunk_norm
from omni_jax.model.pages import Cache
from omni_jax.model.whisper_encoder import WhisperEncoder, recording_frames
from omni_jax.prompts import max_speech_positions
from omni_jax.vocab import NUM_CODEBOOKS, NUM_STREAMS, TEXT_STREAM, Vocab


class TokenTables(nnx.Module):
    """One row per token: text [Vt, D] and audio [C, Va, D]. Serves as embedding and, tied or not, as the heads."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        vocab, D = Vocab(config.vocab), config.trunk.hidden_size
        self.multiplier = config.trunk.embedding_multiplier
        self.text = param(rngs, (vocab.text_rows, D), ("vocab", "embed"), D)
        self.audio = param(rngs, (NUM_CODEBOOKS, vocab.audio_rows, D), (None, "vocab", "embed"), D)

    def lookup(self, tokens: Array, dtype: Any) -> tuple[Array, Array]:
        """Tokens int32 [..., 8] -> sum of the audio embeddings and text embedding, each [..., D]."""
        audio = self.audio[...][jnp.arange(NUM_CODEBOOKS), tokens[..., :TEXT_STREAM]].astype(dtype).sum(-2)
        text = self.text[...][tokens[..., TEXT_STREAM]].astype(dtype)
        return (audio, text) if self.multiplier == 1 else (audio * self.multiplier, text * self.multiplier)


class Adapter(nnx.Module):
    """Features of the audio encoder, `stack` consecutive frames stacked, to trunk embeddings."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        self.stack = config.adapter.stack
        inputs, D = config.audio_encoder.hidden_size * self.stack, config.trunk.hidden_size
        self.map: GatedMLP | Linear
        if config.adapter.kind == "llamamlp":
            axes = ("encoder_embed", "mlp", "embed")
            self.map = GatedMLP(inputs, config.adapter.intermediate_size, D, rngs, axes=axes)
        else:
            # A mesh axis splits one axis of an array: `encoder_embed` would be the second on the same.
            self.map = Linear((inputs,), (D,), axes=("embed", None), bias=True, rngs=rngs)

    def __call__(self, features: Array) -> Array:
        """[B, frames, encoder hidden] -> [B, ceil(frames / stack), D]."""
        B, T, E = features.shape
        features = jnp.pad(features, ((0, 0), (0, -T % self.stack), (0, 0)))
        return self.map(features.reshape(B, -1, E * self.stack))


def tts_config(config: ModelConfig) -> TrunkConfig:
    """Of the TTS adapter's blocks: those of the trunk, all with rope and without a window."""
    return replace(config.trunk, num_layers=config.tts_adapter_layers, no_rope_layers=(), sliding_layers=())


class TTSAdapter(nnx.Module):
    """Blocks after the trunk's last, a norm and an audio head, for the audio logits only."""

    def __init__(self, config: ModelConfig, *, stacked: bool, dtype: Any, rngs: nnx.Rngs):
        vocab, D = Vocab(config.vocab), config.trunk.hidden_size
        self.blocks = Decoder(tts_config(config), config.tts_adapter_layers, stacked=stacked, dtype=dtype, rngs=rngs)
        self.norm = trunk_norm(config.trunk)
        self.head = param(rngs, (NUM_CODEBOOKS, vocab.audio_rows, D), (None, "vocab", "embed"), D)


class OmniModel(nnx.Module):
    """The model as one module; `omni_jax.Omni` is the interface around it.

    Args:
        config: the shape.
        stacked: see `omni_jax.model.decoder`.
        dtype: of matrix products.
        rngs: `params` draws the weights.
    """

    def __init__(self, config: ModelConfig, *, stacked: bool, dtype: Any, rngs: nnx.Rngs):
        self.config, self.dtype = config, dtype
        self.audio_encoder = WhisperEncoder(config.audio_encoder, stacked=stacked, dtype=dtype, rngs=rngs)
        self.adapter = Adapter(config, rngs)
        self.embed = TokenTables(config, rngs)
        self.trunk = Decoder(config.trunk, config.trunk.num_layers, stacked=stacked, dtype=dtype, rngs=rngs)
        self.norm = trunk_norm(config.trunk)
        self.head = None if config.trunk.tie_word_embeddings else TokenTables(config, rngs)
        self.tts_adapter = (
            TTSAdapter(config, stacked=stacked, dtype=dtype, rngs=rngs) if config.tts_adapter_layers else None
        )

    def encode_audio(self, audio: Array, augment: Callable[[Array], Array] | None = None) -> Array:
        """Recordings to speech embeddings.

        Args:
            audio: f32 [B, samples] at 16 kHz, padded with zeros to the audio encoder's length, or to a window that
                `AudioEncoderConfig.window` allows.
            augment: applied to the log-mel features f32 [B, M, frames], which it returns changed.

        Returns:
            [B, A, D], A = ceil(max_position / stack).
        """
        to_mel = partial(log_mel, mels=self.config.audio_encoder.num_mel_bins)
        mesh = jax.sharding.get_abstract_mesh()
        if mesh.size > 1:
            # The compiler does not partition Fourier transforms: every chip would compute the whole batch.
            rows = sharding.spec(audio.shape, ("batch", None), mesh)
            to_mel = jax.shard_map(to_mel, in_specs=rows, out_specs=rows)
        mel = to_mel(audio)
        features = self.audio_encoder(mel if augment is None else augment(mel), recording_frames(audio))
        speech = self.adapter(features.astype(self.dtype))
        # Of one length, whatever the window: prefill is compiled for it.
        return jnp.pad(speech, ((0, 0), (0, max_speech_positions(self.config) - speech.shape[1]), (0, 0)))

    def embed_tokens(self, tokens: Array) -> Array:
        """Tokens int32 [..., 8] -> their averaged embedding [..., D]."""
        audio, text = self.embed.lookup(tokens, self.dtype)
        return (audio + text) / NUM_STREAMS

    def embed_prompt(self, tokens: Array, speech: Array | None, speech_index: Array | None) -> Array:
        """Average the eight streams, with speech in place of the seven audio embeddings where there is some.

        Args:
            tokens: int32 [B, 8, T].
            speech: [B, A, D] from `encode_audio`, or None if no position has speech.
            speech_index: int32 [B, T]: which of the A speech embeddings a position takes, -1 for none.

        Returns:
            [B, T, D]; a speech position is (7 * speech + text) / 8.
        """
        looked_up = self.embed.lookup(tokens.swapaxes(1, 2), self.dtype)
        # Two steps, each an exchange between few chips: at once, the compiler would give the whole batch to all.
        audio, text = (sharding.constrain(x, ("looked_up", None, "embed")) for x in looked_up)
        audio, text = sharding.constrain_rows(audio), sharding.constrain_rows(text)
        if speech is not None:
            assert speech_index is not None
            taken = jnp.take_along_axis(speech, jnp.maximum(speech_index, 0)[..., None], axis=1)
            audio = jnp.where((speech_index >= 0)[..., None], NUM_CODEBOOKS * taken.astype(self.dtype), audio)
        return (audio + text) / NUM_STREAMS

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
        prefix: dict[str, Cache] | None = None,
    ) -> tuple[Array, Array, Cache]:
        """Whole sequences through trunk and TTS adapter: training and prefill.

        Args:
            tokens: int32 [B, 8, T].
            positions: int32 [B, T].
            speech: see `embed_prompt`.
            speech_index: see `embed_prompt`.
            segments: see `Decoder.__call__`.
            audio: whether the audio heads will be used; False skips the TTS adapter.
            remat: see `Decoder.__call__`.
            prefix: caches of the positions before these, named as those returned; see `Decoder.__call__`.

        Returns:
            Normed hidden states for the text head and for the audio heads, each [B, T, D] (the same array without
            TTS adapter), and the cache: `trunk`, and `tts_adapter` where it ran.
        """
        before = prefix or {}
        embedded = self.embed_prompt(tokens, speech, speech_index)
        x, cache = self.trunk(embedded, positions, segments, remat, before.get("trunk"))
        text_hidden = self.norm(x)
        if self.tts_adapter is None or not audio:
            return text_hidden, text_hidden, {"trunk": cache}
        y, tts_cache = self.tts_adapter.blocks(x, positions, segments, remat, before.get("tts_adapter"))
        return text_hidden, self.tts_adapter.norm(y), {"trunk": cache, "tts_adapter": tts_cache}

    def head_tables(self) -> tuple[Array | Int8, Array | Int8]:
        """What the heads score tokens with: text [Vt, D] and audio [C, Va, D]."""
        tables = self.head or self.embed
        return tables.text[...], (tables.audio if self.tts_adapter is None else self.tts_adapter.head)[...]

    def text_logits(self, hidden: Array) -> Array:
        """[..., D] -> float32 [..., Vt], whatever matrix products run in.

        Rounded to bfloat16, 5 % of the best logits of random weights had an equal, and 2 % were no longer the best.
        """
        return scale_logits(linear(hidden, self.head_tables()[0], dtype=jnp.float32), self.config.trunk)

    def audio_logits(self, hidden: Array) -> Array:
        """[..., D] -> float32 [..., C, Va]."""
        return scale_logits(linear(hidden, self.head_tables()[1], dtype=jnp.float32), self.config.trunk)


def scale_logits(products: Array, trunk: TrunkConfig) -> Array:
    """Logits of the products of hidden states and a head's table, float32 of any shape."""
    scaled = products if trunk.logits_scaling == 1 else products / trunk.logits_scaling
    return soft_cap(scaled, trunk.logits_softcap)
