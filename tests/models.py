"""Small folders of every kind we read, with random weights. Torch is imported when first needed."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest
import yaml
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from omni_jax.config.model import PRESETS, AudioEncoderConfig, CodecConfig, ModelConfig

QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
"""Compiler options for programs that run once."""

SENTENCES = ["What is your name?", "The weather is fine today.", "I can hear and talk."]


@contextmanager
def quick_compile() -> Iterator[None]:
    """Half the time to compile, for shapes beyond those that show how the compiler optimizes."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@contextmanager
def compiles_nothing(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """Checks that nothing is compiled: neither a program of ours nor an operation by itself."""
    with jax.log_compiles():
        yield
    assert not [record for record in caplog.records if "Finished XLA compilation" in record.getMessage()]


def tiny_config(**changes) -> ModelConfig:
    return replace(PRESETS["tiny"], **changes)


def tokenizer_files(folder: Path, size: int = 280) -> list[Path]:
    """A byte-level BPE tokenizer of `size` tokens, the last of which is <|endoftext|>."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=size - 1, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(SENTENCES * 4, trainer)
    tokenizer.add_special_tokens(["<|endoftext|>"])
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|endoftext|>"})
    )
    return [folder / "tokenizer.json", folder / "tokenizer_config.json"]


def perturb(module, scale: float = 0.1) -> None:
    """Move every parameter: norms start at one and biases at zero, and none shall be forgotten unseen."""
    import torch

    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if "embed_positions" not in name:
                parameter.add_(scale * torch.randn_like(parameter))


def whisper_config(encoder: AudioEncoderConfig):
    """Whisper's config with this encoder and a small decoder."""
    from transformers import WhisperConfig

    return WhisperConfig(
        vocab_size=40,
        num_mel_bins=encoder.num_mel_bins,
        d_model=encoder.hidden_size,
        encoder_layers=encoder.num_layers,
        encoder_attention_heads=encoder.num_heads,
        encoder_ffn_dim=encoder.intermediate_size,
        decoder_layers=1,
        decoder_attention_heads=encoder.num_heads,
        decoder_ffn_dim=16,
        max_source_positions=encoder.max_position,
        max_target_positions=8,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=3,
    )


def whisper_folder(folder: Path, encoder: AudioEncoderConfig) -> None:
    import torch
    from transformers import WhisperModel

    torch.manual_seed(1)
    model = WhisperModel(whisper_config(encoder))
    perturb(model)
    model.save_pretrained(folder)


def torch_snac(codec: CodecConfig):
    import torch

    from omni_jax.codec.torch_snac import import_snac
    from omni_jax.convert.snac import config_to_json

    torch.manual_seed(2)
    return import_snac().SNAC(**config_to_json(codec))


def snac_folder(folder: Path, codec: CodecConfig) -> None:
    import torch

    from omni_jax.convert.snac import config_to_json

    folder.mkdir(parents=True)
    torch.save(torch_snac(codec).state_dict(), folder / "pytorch_model.bin")
    (folder / "config.json").write_text(json.dumps(config_to_json(codec)))


def mini_omni_folder(folder: Path, config: ModelConfig, dtype: str = "float32") -> None:
    import torch

    from omni_jax.convert.mini_omni import config_to_yaml
    from omni_jax.convert.torch_mini_omni import MiniOmni

    values = config_to_yaml(config)
    torch.manual_seed(3)
    model = MiniOmni(values)
    perturb(model)
    tokenizer_files(folder)
    state = model.to(getattr(torch, dtype)).state_dict()
    torch.save(state, folder / "lit_model.pth")
    (folder / "model_config.yaml").write_text(yaml.safe_dump(values))


def language_model_config(family: str, *, tied: bool, **changes):
    """Of a small transformers model of 300 tokens; `family` is its `model_type`."""
    from transformers import AutoConfig

    sizes = {
        "vocab_size": 300,
        "hidden_size": 48,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 192,
        "pad_token_id": 0,
    }
    return AutoConfig.for_model(family, **{**sizes, "tie_word_embeddings": tied, **changes})


def language_model(family: str, *, tied: bool, **changes):
    """A small transformers model with random weights; see `language_model_config`."""
    import torch
    from transformers import AutoModelForCausalLM

    config = language_model_config(family, tied=tied, **changes)
    torch.manual_seed(4)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    perturb(model)
    return model


def language_model_folder(folder: Path, family: str, *, tied: bool, **changes):
    model = language_model(family, tied=tied, **changes)
    model.save_pretrained(folder)
    tokenizer_files(folder)
    return model


def weights(config: ModelConfig, seed: int = 0) -> dict[str, np.ndarray]:
    """Random float32 weights by our names, all norms and biases moved. Quicker than the model's own, which compile."""
    from omni_jax.checkpoint.tensors import parameter_shapes

    generator = np.random.default_rng(seed)

    def draw(name: str, shape: tuple[int, ...]) -> np.ndarray:
        noise = generator.standard_normal(shape, np.float32)
        if name.endswith("scale"):
            return 1 + 0.1 * noise
        if "bias" in name:
            return 0.1 * noise
        return noise / np.float32(np.sqrt(np.prod(shape) / max(shape)))

    return {name: draw(name, shape) for name, shape in parameter_shapes(config).items()}


def release_folder(folder: Path, config: ModelConfig, seed: int = 0) -> None:
    from omni_jax.checkpoint.release import save_release
    from omni_jax.checkpoint.safetensors_io import LazyTensor
    from omni_jax.convert.snac import from_torch

    state = {name: tensor.numpy() for name, tensor in torch_snac(config.codec).state_dict().items()}
    model, codec = (
        {name: LazyTensor.of(array) for name, array in arrays.items()}
        for arrays in (weights(config, seed), from_torch(state, config.codec))
    )
    save_release(folder, config, model, codec, tokenizer_files(folder.parent / f"{folder.name}-tokenizer"))


def sound(encoder: AudioEncoderConfig, rows: int) -> np.ndarray:
    """Noise of the audio encoder's length, float32 [rows, samples] at 16 kHz."""
    return np.random.default_rng(5).uniform(-1, 1, (rows, encoder.max_samples)).astype(np.float32)
