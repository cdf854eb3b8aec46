"""The gradient of the loss against an independent model: transformers' Qwen2, torch heads, torch's cross entropy.

Ours computes packed rows, scanned layers and the loss in chunks; theirs one example after the other, logits whole.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from flax import nnx
from torch.nn import functional

from omni_jax.audio.features import log_mel
from omni_jax.checkpoint.safetensors_io import LazyTensor, Tensors
from omni_jax.checkpoint.tensors import model_tensors, parameter_shapes
from omni_jax.config.model import ModelConfig
from omni_jax.convert import language_model
from omni_jax.model.omni import OmniModel
from omni_jax.training.stages import combine, partition
from omni_jax.training.step import forward
from omni_jax.vocab import NUM_CODEBOOKS, TEXT_STREAM, Vocab
from tests import models
from tests.training.test_step import CLIPS, LENGTH, ROWS, batch, run_config

LOSS: dict[str, Any] = {"text": 1.5, "audio": (1.0, 0.5, 1.0, 1.0, 2.0, 1.0, 1.0), "chunk_size": 16}


def our_gradient(config: ModelConfig, arrays: dict) -> tuple[float, list[dict[str, np.ndarray]], np.ndarray]:
    """Loss; weights and gradients by name; features of the frozen audio encoder. Scanned layers, remat, packed rows."""
    modules = (
        "adapter",
        "trunk",
        "text_embedding",
        "audio_embedding",
        *(["tts_adapter"] * bool(config.tts_adapter_layers)),
    )
    if not config.trunk.tie_word_embeddings:
        modules = (*modules, "text_head", "audio_head")
    run = run_config(trainable=modules, loss=LOSS, remat="full")
    graph, state = nnx.split(OmniModel(config, stacked=True, dtype=jnp.float32, rngs=nnx.Rngs(1)))
    # Norms and biases away from their initial values.
    rng = np.random.default_rng(2)
    params = jax.tree.map(lambda x: x + 0.1 * rng.standard_normal(x.shape, np.float32), nnx.to_pure_dict(state))
    trainable, frozen = partition(params, modules)
    counts = jnp.asarray(arrays["mask"].sum((0, 2)), jnp.float32)

    @jax.jit
    @jax.value_and_grad
    def compute(trainable):
        return forward(nnx.merge(graph, combine(trainable, frozen)), arrays, counts, run)[0]

    value, gradient = compute(trainable)
    named = [
        {name: tensor.read() for name, tensor in model_tensors(nnx.merge(graph, tree)).items()}
        for tree in (params, combine(gradient, jax.tree.map(jnp.zeros_like, frozen)))
    ]
    return float(value), named, features_of(nnx.merge(graph, params), arrays)


def features_of(model: OmniModel, arrays: dict) -> np.ndarray:
    """Of the audio encoder."""
    sound = arrays["sound"].reshape(ROWS * CLIPS, -1).astype(np.float32) / 32768
    return np.asarray(model.audio_encoder(log_mel(jnp.asarray(sound), model.config.audio_encoder.num_mel_bins)))


def qwen(folder: Path, trunk, rows: int, tensors: dict[str, np.ndarray]) -> transformers.Qwen2ForCausalLM:
    folder.mkdir()
    language_model.write(folder, trunk, rows, {name: LazyTensor.of(array) for name, array in tensors.items()})
    # transformers would otherwise take its own, fused, attention.
    return transformers.Qwen2ForCausalLM.from_pretrained(folder, attn_implementation="eager")


def named_gradients(model: transformers.Qwen2ForCausalLM, trunk, rows: int) -> dict[str, np.ndarray]:
    state: Tensors = {
        name: LazyTensor.of((torch.zeros_like(p) if p.grad is None else p.grad).numpy())
        for name, p in model.named_parameters()
    }
    return {name: tensor.read() for name, tensor in language_model.from_state(state, trunk, rows, "gradients").items()}


def their_gradient(
    config: ModelConfig,
    arrays: dict,
    weights: dict[str, np.ndarray],
    features: np.ndarray,
    folder: Path,
    lora: Path | None = None,
) -> tuple[float, dict[str, np.ndarray]]:
    """Loss, and gradients by our names; of the trunk with a LoRA only those of it, by PEFT's names."""
    trunk, vocab = config.trunk, Vocab(config.vocab)
    of_trunk = {name: x for name, x in weights.items() if name.startswith(("trunk.", "norm.")) or name == "embed.text"}
    if not trunk.tie_word_embeddings:
        of_trunk["head.text"] = weights["head.text"]
    model = qwen(folder / "trunk", trunk, vocab.text_rows, of_trunk)
    free = {
        name: torch.tensor(x, requires_grad=True)
        for name, x in weights.items()
        if name.startswith(("adapter.", "embed.audio", "head.audio", "tts_adapter.head"))
    }
    tts = None
    if config.tts_adapter_layers:
        blocks = replace(trunk, num_layers=config.tts_adapter_layers, tie_word_embeddings=True)
        prefix = "tts_adapter.blocks"
        tensors = {name.replace(prefix, "trunk"): x for name, x in weights.items() if name.startswith(prefix)}
        tensors |= {
            "norm.scale": weights["tts_adapter.norm.scale"],
            "embed.text": np.zeros((1, trunk.hidden_size), np.float32),
        }
        tts = qwen(folder / "tts", blocks, 1, tensors)
    before_norm: list[torch.Tensor] = []
    model.model.norm.register_forward_pre_hook(lambda _, inputs: before_norm.append(inputs[0]))

    adapted = None
    if lora is not None:
        from peft import PeftModel, get_peft_model_state_dict

        # It changes the modules of the model.
        adapted = PeftModel.from_pretrained(model, lora, is_trainable=True)

    speech = torch.tensor(features)
    gate, up, down = (free[f"adapter.map.{name}.weight"] for name in ("gate", "up", "down"))
    speech = functional.linear(functional.silu(functional.linear(speech, gate)) * functional.linear(speech, up), down)
    speech = speech.reshape(ROWS, -1, trunk.hidden_size)

    text_head = model.lm_head.weight
    audio_head = free["tts_adapter.head"] if tts else free.get("head.audio", free["embed.audio"])
    counts = arrays["mask"].sum((0, 2))
    scale = np.array([*LOSS["audio"], LOSS["text"]]) / counts
    total = torch.zeros(())
    for row in range(ROWS):
        for segment in (1, 2):
            where = np.flatnonzero(arrays["segments"][row] == segment)
            tokens = torch.tensor(arrays["tokens"][row][:, where], dtype=torch.long)
            target = torch.tensor(arrays["targets"][row][:, where], dtype=torch.long)
            mask = torch.tensor(arrays["mask"][row][:, where])
            audio = sum(free["embed.audio"][k][tokens[k]] for k in range(NUM_CODEBOOKS))
            index = torch.tensor(arrays["speech_index"][row][where], dtype=torch.long)
            audio = torch.where((index >= 0)[:, None], NUM_CODEBOOKS * speech[row][index.clamp(min=0)], audio)
            x = (audio + model.model.embed_tokens.weight[tokens[TEXT_STREAM]]) / 8
            hidden = model.model(inputs_embeds=x[None], use_cache=False).last_hidden_state[0]
            audio_hidden = hidden
            if tts:
                audio_hidden = tts.model(inputs_embeds=before_norm[-1], use_cache=False).last_hidden_state[0]
            logits = [*(audio_hidden @ audio_head[k].T for k in range(NUM_CODEBOOKS)), hidden @ text_head.T]
            for k, scores in enumerate(logits):
                each = functional.cross_entropy(scores, target[k], reduction="none")
                total = total + scale[k] * each[mask[k]].sum()
    total.backward()
    if adapted is None:
        found = named_gradients(model, trunk, vocab.text_rows)
    else:
        gradients = {name: p.grad for name, p in adapted.named_parameters() if p.grad is not None}
        found = {name: x.numpy() for name, x in get_peft_model_state_dict(adapted, gradients).items()}
    found |= {name: tensor.grad.numpy() for name, tensor in free.items() if tensor.grad is not None}
    if tts:
        of_tts = named_gradients(tts, replace(trunk, num_layers=config.tts_adapter_layers, tie_word_embeddings=True), 1)
        found |= {name.replace("trunk", prefix): x for name, x in of_tts.items() if name.startswith("trunk")}
        found["tts_adapter.norm.scale"] = of_tts["norm.scale"]
    return total.item(), found


@pytest.mark.parametrize(
    ("tts_adapter_layers", "tied"),
    [
        (0, True),
        (2, False),
        pytest.param(0, False, marks=pytest.mark.nightly),
        pytest.param(2, True, marks=pytest.mark.nightly),
    ],
)
def test_forward_gradient_equals_torch(tied: bool, tts_adapter_layers: int, tmp_path: Path):
    config = models.tiny_config(tts_adapter_layers=tts_adapter_layers)
    config = replace(config, trunk=replace(config.trunk, num_layers=2, tie_word_embeddings=tied))
    arrays = batch()
    assert arrays["tokens"].shape == (ROWS, 8, LENGTH)
    value, (weights, mine), features = our_gradient(config, arrays)
    expected, theirs = their_gradient(config, arrays, weights, features, tmp_path)
    assert abs(value - expected) < 1e-4
    # A head that is not used because of the TTS adapter's has no gradient in theirs, zeros in ours.
    unused = {"head.audio"} if tts_adapter_layers and not tied else set()
    assert set(theirs) | unused == {name for name in parameter_shapes(config) if not name.startswith("audio_encoder.")}
    assert not any(mine[name].any() for name in unused)
    for name, gradient in theirs.items():
        # The gradient of a key's bias is only rounding: adding the same to all scores does not change a softmax.
        assert np.abs(gradient).max() > 1e-4 or name.endswith("k.bias"), name
        np.testing.assert_allclose(mine[name], gradient, atol=1e-4, err_msg=name)
