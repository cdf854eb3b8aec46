"""Conversions compared with the original: every tensor, and what PyTorch computes with it on a small input.

Each function takes what is in the foreign format and the release, whichever of them was made of the other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx, traverse_util

from omni_jax.checkpoint.release import AUDIO_ENCODER_PREFIX, Release, is_release, open_release
from omni_jax.checkpoint.safetensors_io import LazyTensor, Tensors
from omni_jax.checkpoint.tensors import tensor_name
from omni_jax.codec.snac import make_decoder
from omni_jax.codec.torch_snac import TorchSnac, import_snac
from omni_jax.config.model import AudioEncoderConfig
from omni_jax.convert import files, language_model, mini_omni, snac, whisper
from omni_jax.convert.release import text_tensors
from omni_jax.convert.sources import LANGUAGE_MODEL, SNAC, fetch_mini_omni, fetch_model, fetch_whisper
from omni_jax.convert.table import cast, check
from omni_jax.errors import ConversionError, MissingExtraError
from omni_jax.model.omni import OmniModel
from omni_jax.model.whisper_encoder import WhisperEncoder
from omni_jax.vocab import NUM_STREAMS, TEXT_STREAM, Vocab

OUTPUT_LIMIT = 1e-4
"""Largest error of outputs: both are float32, summed in another order."""
CODEC_LIMIT = 1e-6
"""Largest error of the codec's weights, which are a product in one format and its factors in the other."""

NUM_TOKENS, NUM_SPEECH, NUM_FRAMES = 32, 8, 4
"""Positions of the tokens, adapter's positions, and frames of the codec that outputs are computed of."""


@dataclass(frozen=True)
class Comparison:
    """One thing that has been compared."""

    what: str
    error: float
    """The largest difference, as a share of the original's largest value."""
    limit: float | None
    """None: the error is that of the type that was chosen, and may be anything."""

    @property
    def is_within_limit(self) -> bool:
        """Whether the error is as small as it should be; NaN is not."""
        return self.limit is None or self.error <= self.limit

    def __str__(self) -> str:
        if self.error == 0:
            return f"{self.what}: equal"
        limit = "" if self.limit is None else f", at most {self.limit:.0e} expected"
        return f"{self.what}: largest error {self.error:.1e} of the largest value{limit}"


class Compare(Protocol):
    """Compares a source, or what was exported, with a release."""

    def __call__(self, source: str | Path, release: Release, *, dtype: str | None = None) -> Iterator[Comparison]:
        """See `compare_mini_omni`."""


def require_packages() -> None:
    """Check that PyTorch and the packages of the originals are installed.

    Raises:
        MissingExtraError: one is not.
    """
    try:
        import torch  # noqa: F401
        import transformers
    except ImportError as error:
        raise MissingExtraError(f"verification needs PyTorch and transformers ({error})", "torch") from None
    import_snac()
    transformers.utils.logging.disable_progress_bar()


def compare_mini_omni(source: str | Path, release: Release, *, dtype: str | None = None) -> Iterator[Comparison]:
    """A Mini-Omni checkpoint and the release: all tensors but the audio encoder's, and the logits of all eight heads.

    Args:
        source: the checkpoint's folder, or a hub id.
        release: made of it, or what it was made of.
        dtype: what the release's weights were rounded to; None: to nothing.
    """
    import torch

    from omni_jax.convert.torch_mini_omni import MiniOmni

    folder, config = fetch_mini_omni(str(source)), release.config
    state, values = mini_omni.read_state(folder), mini_omni.read_config(folder)
    has_tts_adapter = mini_omni.has_tts_adapter(state)
    theirs = mini_omni.config_from_yaml(
        values, config.audio_encoder, config.codec, tts_adapter=has_tts_adapter, source=str(folder / mini_omni.CONFIG)
    )
    expected = cast(mini_omni.from_state(state, theirs, str(folder / mini_omni.WEIGHTS)), dtype, str(folder))
    ours = {name: t for name, t in release.model_tensors().items() if not name.startswith(AUDIO_ENCODER_PREFIX)}
    yield compare_tensors("adapter, trunk and heads", expected, ours)

    vocab, stack, generator = Vocab(config.vocab), config.adapter.stack, np.random.default_rng(0)
    tokens = generator.integers(0, vocab.audio_rows, (1, NUM_STREAMS, NUM_TOKENS))
    tokens[:, TEXT_STREAM] = generator.integers(0, vocab.text_rows, (1, NUM_TOKENS))
    size = config.audio_encoder.hidden_size
    features = generator.standard_normal((1, NUM_SPEECH * stack, size), np.float32)
    with torch.device("meta"):
        module = MiniOmni({**mini_omni.with_defaults(values), "post_adapter": has_tts_adapter})
    floats = {name: files.to_torch_tensor(tensor, torch).float() for name, tensor in state.items()}
    module.load_state_dict(floats, strict=True, assign=True)

    def run_theirs() -> np.ndarray:
        stacked = torch.from_numpy(features.reshape(1, NUM_SPEECH, stack * size))
        text, audio = module(torch.from_numpy(tokens), stacked)
        return np.concatenate([text.flatten(2), audio.flatten(2)], axis=-1)

    def run_ours(model: OmniModel) -> jax.Array:
        index = np.full((1, NUM_TOKENS), -1)
        index[:, 1 : 1 + NUM_SPEECH] = np.arange(NUM_SPEECH)
        positions = jnp.arange(NUM_TOKENS)[None]
        text, audio, _ = model(jnp.asarray(tokens), positions, model.adapter(jnp.asarray(features)), jnp.asarray(index))
        logits = model.audio_logits(audio)
        return jnp.concatenate([model.text_logits(text), logits.reshape(*logits.shape[:2], -1)], axis=-1)

    what = f"logits of all heads, {NUM_TOKENS} positions, {NUM_SPEECH} of them speech"
    yield from _compare_outputs(what, module, run_theirs, lambda: _run_model(release, run_ours), dtype)


def compare_language_model(source: str | Path, release: Release, *, dtype: str | None = None) -> Iterator[Comparison]:
    """A language model of transformers and the trunk of a release: all tensors, and the logits of a text.

    Args:
        source: the language model's folder, or a hub id.
        release: made of it, or what it was made of.
        dtype: see `compare_mini_omni`.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    folder = fetch_model(str(source), LANGUAGE_MODEL)
    trunk, rows, tensors = language_model.read(folder, tied=release.config.trunk.tie_word_embeddings)
    yield compare_tensors("trunk", cast(tensors, dtype, str(folder)), text_tensors(release, rows))

    config = AutoConfig.from_pretrained(folder)
    config.tie_word_embeddings = trunk.tie_word_embeddings
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        folder, config=config, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    module, found = loaded
    if missing := sorted(found["missing_keys"]):
        raise ConversionError(f"{folder}: expected all tensors of transformers' model, found no {', '.join(missing)}")
    if trunk.tie_word_embeddings:
        # transformers takes a head that is in the file, although the config ties it.
        module.get_output_embeddings().weight = module.get_input_embeddings().weight
    ids = np.random.default_rng(0).integers(0, rows, (1, NUM_TOKENS))

    def run_ours(model: OmniModel) -> jax.Array:
        # Plain text: no average of eight streams.
        x = model.embed.text[ids] * trunk.embedding_multiplier
        hidden, _ = model.trunk(x, jnp.arange(NUM_TOKENS)[None])
        return model.text_logits(model.norm(hidden))[..., :rows]

    yield from _compare_outputs(
        f"logits of a text of {NUM_TOKENS} tokens",
        module,
        lambda: module(torch.from_numpy(ids)).logits.numpy()[..., :rows],
        lambda: _run_model(release, run_ours),
        dtype,
    )


def compare_audio_encoder(source: str | Path, release: Release, *, dtype: str | None = None) -> Iterator[Comparison]:
    """A Whisper and the audio encoder of a release: all tensors, and the features of noise of full length.

    Args:
        source: a Whisper, see `sources.fetch_whisper`; or a release: then the tensors alone.
        release: made of it, or what it was made of.
        dtype: see `compare_mini_omni`.
    """
    ours, config = release.audio_encoder_tensors(), release.config.audio_encoder
    if is_release(source):
        expected = open_release(source).audio_encoder_tensors()
        yield compare_tensors("audio encoder", cast(expected, dtype, str(source)), ours)
        return
    path = fetch_whisper(str(source))
    yield compare_tensors("audio encoder", cast(whisper.read(path)[1], dtype, str(path)), ours)

    import torch
    from transformers import WhisperConfig
    from transformers.models.whisper import modeling_whisper

    module = modeling_whisper.WhisperEncoder(WhisperConfig(**whisper.config_to_json(config))).eval()
    _, state = whisper.open_encoder(path)
    module.load_state_dict({name: files.to_torch_tensor(tensor, torch) for name, tensor in state.items()}, strict=True)
    shape = (1, config.num_mel_bins, 2 * config.max_position)
    mel = np.random.default_rng(0).standard_normal(shape, np.float32)
    yield from _compare_outputs(
        f"features of {config.max_position} positions",
        module,
        lambda: module(torch.from_numpy(mel)).last_hidden_state.numpy(),
        lambda: _run_encoder(config, ours, mel),
        dtype,
    )


def compare_codec(source: str | Path, release: Release, *, dtype: str | None = None) -> Iterator[Comparison]:
    """A SNAC and the codec of a release: all tensors, and the sound of random codes.

    Args:
        source: a SNAC folder or a hub id; or a release: then the tensors alone.
        release: made of it, or what it was made of.
        dtype: has no effect; the codec is never rounded.
    """
    ours, config = release.codec_tensors(), release.config.codec
    if is_release(source):
        yield compare_tensors("codec", open_release(source).codec_tensors(), ours, CODEC_LIMIT)
        return
    folder = fetch_model(str(source), SNAC)
    yield compare_tensors("codec", snac.read(folder)[1], ours, CODEC_LIMIT)

    import torch

    module = import_snac().SNAC(**snac.config_to_json(config))
    state = files.open_weights(folder)
    module.load_state_dict({name: files.to_torch_tensor(tensor, torch) for name, tensor in state.items()}, strict=True)
    codes = np.random.default_rng(0).integers(0, config.codebook_size, (1, NUM_FRAMES, 7)).astype(np.int32)
    theirs = TorchSnac(module, config)
    yield from _compare_outputs(
        f"sound of {NUM_FRAMES} frames",
        module,
        lambda: np.asarray(theirs.decode(codes)),
        lambda: np.asarray(make_decoder(release.load_codec())(codes)),
        None,
    )


def compare_tensors(what: str, theirs: Tensors, ours: Tensors, limit: float = 0.0) -> Comparison:
    """The values of all tensors, which have the same names and shapes; types may differ only where values may.

    Raises:
        ConversionError: names, shapes or types differ.
    """
    check(ours, {name: tensor.shape for name, tensor in theirs.items()}, f"the converted {what}")
    largest = 0.0
    for name, tensor in theirs.items():
        if not limit and ours[name].dtype != tensor.dtype:
            raise ConversionError(f"the converted {what}: {name}: expected {tensor.dtype}, found {ours[name].dtype}")
        largest = np.fmax(largest, error(tensor.read(), ours[name].read()))
    return Comparison(f"{what}, {len(theirs)} tensors", float(largest), limit)


def error(theirs: Any, ours: Any) -> float:
    """The largest difference of two arrays as a share of the largest value of the first; infinite if one is NaN."""
    theirs, ours = np.asarray(theirs, np.float32), np.asarray(ours, np.float32)
    if np.array_equal(theirs, ours):
        return 0.0
    difference = float(np.abs(theirs - ours).max())
    largest = float(np.abs(theirs).max())
    return difference / largest if largest and np.isfinite(difference) else float("inf")


def _compare_outputs(
    what: str, module: Any, run_theirs: Callable[[], Any], run_ours: Callable[[], Any], dtype: str | None
) -> Iterator[Comparison]:
    """What PyTorch's module computes, in float32 with weights rounded to `dtype`, and what we compute."""
    import torch

    with torch.no_grad():
        theirs = run_theirs()
        if dtype is not None:
            original = theirs
            for parameter in module.parameters():
                parameter.data = parameter.to(getattr(torch, dtype)).float()
            theirs = run_theirs()
            yield Comparison(f"{what}: weights in {dtype} and as they were", error(original, theirs), None)
    yield Comparison(f"{what}: PyTorch and JAX", error(theirs, run_ours()), OUTPUT_LIMIT)


def _run_model(release: Release, function: Callable[[OmniModel], jax.Array]) -> np.ndarray:
    """What a function computes with the whole model, in float32."""
    graph, state = nnx.split(release.load_model(stacked=True, dtype=jnp.float32))
    with jax.default_matmul_precision("highest"):
        return np.asarray(jax.jit(lambda state: function(nnx.merge(graph, state)))(state))


def _run_encoder(config: AudioEncoderConfig, tensors: Mapping[str, LazyTensor], mel: np.ndarray) -> np.ndarray:
    """Features of the audio encoder with these tensors, in float32."""
    graph, state = nnx.split(nnx.eval_shape(lambda: WhisperEncoder(config, stacked=False, rngs=nnx.Rngs(0))))
    arrays = {path: jnp.asarray(tensors[tensor_name(path)].read(), jnp.float32) for path, _ in nnx.to_flat_state(state)}
    weights = traverse_util.unflatten_dict(arrays)
    frames = jnp.array([config.max_position])
    with jax.default_matmul_precision("highest"):
        return np.asarray(jax.jit(lambda weights: nnx.merge(graph, weights)(jnp.asarray(mel), frames))(weights))
