"""Small random models, and decoding as the paper describes it: slow, obvious, without a cache.

Every step runs the whole sequence through the whole model again, one request at a time.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from omni_jax.api import Omni
from omni_jax.codec.snac import Snac, make_decoder
from omni_jax.config.model import AdapterConfig, AudioEncoderConfig, CodecConfig, ModelConfig, TrunkConfig, VocabConfig
from omni_jax.inference.engine import PreparedRequest
from omni_jax.inference.generation import GenerationConfig
from omni_jax.inference.sampling import Sampling, sample
from omni_jax.model.omni import OmniModel
from omni_jax.prompts import speech_positions, speech_prompt, text_prompt
from omni_jax.tasks import Task
from omni_jax.tokenizer import byte_tokenizer
from omni_jax.vocab import Vocab
from tests.model.randomized import randomized

CONTEXT = 64


def small_config(
    *,
    tied: bool = True,
    tts_adapter_layers: int = 0,
    text: int = 37,
    text_specials: int = 6,
    audio_specials: int = 5,
    conversation: bool = False,
    **trunk: Any,
) -> ModelConfig:
    """Sizes that all differ, so that a mixed-up axis shows."""
    sizes: dict[str, Any] = {
        "hidden_size": 32,
        "num_layers": 2,
        "num_heads": 4,
        "num_kv_heads": 2,
        "head_dim": 6,
        "intermediate_size": 40,
        "rope_theta": 1e4,
        "max_position": CONTEXT,
    }
    return ModelConfig(
        audio_encoder=AudioEncoderConfig(
            num_mel_bins=8, hidden_size=16, num_layers=1, num_heads=2, intermediate_size=20, max_position=20
        ),
        adapter=AdapterConfig(intermediate_size=24),
        trunk=TrunkConfig(**sizes | trunk, tie_word_embeddings=tied),
        vocab=VocabConfig(text=text, text_specials=text_specials, audio=12, audio_specials=audio_specials),
        codec=CodecConfig(encoder_dim=4, encoder_rates=(4, 4), decoder_dim=8, decoder_rates=(4, 4), codebook_size=12),
        tts_adapter_layers=tts_adapter_layers,
        conversation=conversation,
    )


def random_model(
    config: ModelConfig, *, stacked: bool = False, seed: int = 0, eot: float = 1.0, eoa: float = 1.0
) -> OmniModel:
    """A model whose every parameter is random, biases and norms too.

    Args:
        config: its shape.
        stacked: whether its layers are.
        seed: of the weights.
        eot: what the end of text's row of the head is multiplied with: a larger row wins more often.
        eoa: the same for the last layer's end of audio.
    """
    vocab, table = Vocab(config.vocab), "embed" if config.trunk.tie_word_embeddings else "head"
    voice = ("tts_adapter", "head") if config.tts_adapter_layers else (table, "audio")

    def favor_the_ends(path: tuple[Any, ...], values: np.ndarray) -> None:
        if path == (table, "text"):
            values[vocab.eot] *= eot
        if path == voice:
            values[6, vocab.eoa] *= eoa

    def make() -> OmniModel:
        return OmniModel(config, stacked=stacked, dtype=jnp.float32, rngs=nnx.Rngs(0))

    return randomized(make, seed, favor_the_ends)


def small_omni(**config_options: Any) -> Omni:
    """A small model with everything around it, whose tokens are bytes; most of its answers come to their end."""
    config = small_config(text=260, **config_options)
    codec = make_decoder(randomized(lambda: Snac(config.codec, rngs=nnx.Rngs(0))))
    return Omni(random_model(config, seed=3, eot=2.5, eoa=1.5), codec, byte_tokenizer())


def random_request(
    config: ModelConfig, task: Task, content: int, length: int | None = None, **settings: Any
) -> PreparedRequest:
    """A request whose input is random, from the seed `content`.

    Args:
        config: of the model to ask.
        task: what to ask.
        content: seed of the input.
        length: positions of speech or tokens of text; by default random, of at most 12.
        **settings: of the request.
    """
    random, vocab = np.random.default_rng(content), Vocab(config.vocab)
    length = length or int(random.integers(1, 13))
    if task.takes_audio:
        # Any number of samples that takes so many positions; a full-length recording has no frame after its last.
        least = (length - 1) * 320
        samples = (
            config.audio_encoder.max_samples
            if length == config.audio_encoder.max_position
            else least + int(random.integers(1, 320))
        )
        sound = (0.1 * random.normal(size=samples)).astype(np.float32)
        assert speech_positions(samples, config.audio_encoder.max_position) == length
        return PreparedRequest.of(speech_prompt(task, length, vocab), sound, GenerationConfig(**settings))
    text = random.integers(0, config.vocab.text, length).tolist()
    return PreparedRequest.of(text_prompt(task, text, vocab), config=GenerationConfig(**settings))


class ReferenceDecoder:
    """Decodes one request at a time from a model's whole-sequence forward."""

    def __init__(self, model: OmniModel, encode_audio: Callable[[np.ndarray], jax.Array]):
        """Take a model, and its audio encoder and adapter as a compiled function."""
        graph, weights = nnx.split(model)
        self.config, self.vocab, self.encode_audio = model.config, Vocab(model.config.vocab), encode_audio

        @jax.jit
        def logits(weights: Any, rows: Any, speech: Any, index: Any, at: Any) -> tuple[jax.Array, jax.Array]:
            """Of the position `at` of rows [2, 8, CONTEXT]; what stands after it can't be seen from there."""
            model = nnx.merge(graph, weights)
            positions = jnp.broadcast_to(jnp.arange(rows.shape[2]), (2, rows.shape[2]))
            text, audio, _ = model(rows, positions, speech, index)
            return model.text_logits(text[:, at]), model.audio_logits(audio[:, at])

        self.logits = partial(logits, weights)
        self.sample = jax.jit(sample)

    def __call__(self, request: PreparedRequest) -> tuple[np.ndarray, str]:
        """int32 [8, steps], the streams as decoded, and why it ended."""
        v, task, context = self.vocab, request.prompt.task, self.config.trunk.max_position
        # Two rows: the request's own, and the one that gives the text of a batch-parallel request.
        rows = np.zeros((2, 8, context), np.int32)
        length = len(request.prompt)
        rows[:, :, :length] = request.prompt.tokens
        parallel = request.has_companion
        if parallel:
            rows[1, :, length - 1] = [v.pad_a] * 7 + [v.answer_t]
        speech, index = self._speech(request)
        steps: list[list[int]] = []
        text_ended = task is Task.T1A1
        while True:
            step = len(steps)
            text_logits, audio_logits = self.logits(rows, speech, index, length - 1)
            if text_ended:
                text = v.pad_t
            else:
                text = self._choose(text_logits[int(parallel)][None], request, step, [7])[0]
                text_ended = text == v.eot
            if task.outputs_audio:
                audio = self._choose(audio_logits[0], request, step, list(range(7)))
                if request.config.enforce_delay:
                    audio = [token if step >= codebook + 1 else v.pad_a for codebook, token in enumerate(audio)]
            else:
                audio = [v.pad_a] * 7
            steps.append([*audio, text])
            if (audio[6] == v.eoa) if task.outputs_audio else (text == v.eot):
                return np.array(steps, np.int32).T, "stop"
            if len(steps) == request.config.max_steps:
                return np.array(steps, np.int32).T, "length"
            if length == context:
                return np.array(steps, np.int32).T, "context"
            rows[0, :, length] = [*audio, text]
            rows[1, :, length] = [*[v.pad_a] * 7, text]
            length += 1

    def _speech(self, request: PreparedRequest) -> tuple[jax.Array, np.ndarray]:
        config = self.config
        index = np.full((2, config.trunk.max_position), -1, np.int32)
        if request.parts[0].speech is None:
            return jnp.zeros(
                (2, -(-config.audio_encoder.max_position // config.adapter.stack), config.trunk.hidden_size)
            ), index
        encoder, speech = config.audio_encoder, request.parts[0].speech
        window = encoder.window(len(speech)) if encoder.short_windows else encoder.max_position
        sound = np.zeros((1, 320 * window), np.float32)
        sound[0, : len(speech)] = speech
        positions = request.prompt.speech_positions
        start = request.prompt.speech_start
        index[:, start : start + positions] = np.arange(positions)
        return jnp.repeat(self.encode_audio(sound), 2, axis=0), index

    def _choose(self, logits: Any, request: PreparedRequest, step: int, streams: list[int]) -> list[int]:
        n = len(streams)
        sampling = Sampling(
            temperature=np.full(n, request.config.temperature, np.float32),
            top_k=np.full(n, request.config.top_k, np.int32),
            top_p=np.full(n, request.config.top_p, np.float32),
            seed=np.full(n, request.config.seed, np.uint32),
        )
        tokens = self.sample(logits, sampling, np.full(n, step, np.int32), np.array(streams, np.int32))
        return [int(token) for token in tokens]
