"""Whisper's encoder: folders of transformers and files of OpenAI to and from our audio encoder.

Our names are the paths of `omni_jax.model.whisper_encoder.WhisperEncoder`, one tensor per layer, such as
`layers.0.q.weight`. Theirs are those of `WhisperForConditionalGeneration` (`model.encoder.*`) or of `WhisperModel`
(`encoder.*`). The position table is a tensor like the others: the published ones are sinusoids that were rounded to
float16, up to 2.9e-4 from exact ones.

Letters: D hidden, N heads, H head dim, F intermediate, M mel bins.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from omni_jax.checkpoint.safetensors_io import LazyTensor, Tensors, write_safetensors
from omni_jax.config.load import build_config
from omni_jax.config.model import AudioEncoderConfig
from omni_jax.convert.files import (
    CONFIG,
    WEIGHTS,
    common_dtype,
    import_torch,
    lazy_state,
    load_torch,
    open_weights,
    read_json,
    refuse_wrong_types,
    to_torch_tensor,
    write_json,
)
from omni_jax.convert.table import (
    Entry,
    rename,
    reshape,
    to_ours,
    to_theirs,
    transpose,
)
from omni_jax.errors import ConfigError, ConversionError

PREFIXES = ("model.encoder.", "encoder.")
"""Prefixes of the encoder's tensors; the first is used when writing."""

IGNORED = ("model.decoder.", "decoder.", "proj_out.")
"""Prefixes of the other tensors of a Whisper, which are skipped."""

OPENAI_FILE = "small.pt"
"""The file that the published inference script of Mini-Omni loads, whatever its size."""

_OPENAI_PREFIX = "encoder."
_OPENAI_NAMES = {
    "positional_embedding": "embed_positions.weight",
    "ln_post.": "layer_norm.",
    "blocks": "layers",
    "attn.query.": "self_attn.q_proj.",
    "attn.key.": "self_attn.k_proj.",
    "attn.value.": "self_attn.v_proj.",
    "attn.out.": "self_attn.out_proj.",
    "attn_ln.": "self_attn_layer_norm.",
    "mlp.0.": "fc1.",
    "mlp.2.": "fc2.",
    "mlp_ln.": "final_layer_norm.",
}
"""Beginnings of OpenAI's names, and of those of transformers."""

_DIMS = {
    "num_mel_bins": "n_mels",
    "hidden_size": "n_audio_state",
    "num_layers": "n_audio_layer",
    "num_heads": "n_audio_head",
    "max_position": "n_audio_ctx",
}
"""Fields of AudioEncoderConfig and their names in OpenAI's dims."""

_FIELDS = {
    "num_mel_bins": "num_mel_bins",
    "hidden_size": "d_model",
    "num_layers": "encoder_layers",
    "num_heads": "encoder_attention_heads",
    "intermediate_size": "encoder_ffn_dim",
    "max_position": "max_source_positions",
}
"""Fields of AudioEncoderConfig and their names in transformers' config.json."""


def from_transformers(
    tensors: Tensors, config: AudioEncoderConfig, source: str = "Whisper's tensors"
) -> dict[str, LazyTensor]:
    """Transformers' tensors in our layout, each of its own type.

    Args:
        tensors: by their names; the decoder and its head are ignored.
        config: the encoder's config.
        source: where the tensors come from, for errors.

    Raises:
        ConversionError: lists every tensor that is missing, unknown, misshapen or of another type.
    """
    return to_ours(_table(config), _encoder(tensors), source)


def to_transformers(tensors: Tensors, config: AudioEncoderConfig) -> dict[str, LazyTensor]:
    """Our tensors in transformers' layout, as `model.encoder.*`; the inverse of `from_transformers`.

    Raises:
        ConversionError: lists every tensor that is missing, unknown, misshapen or of another type.
    """
    state = to_theirs(_table(config), tensors, "Whisper encoder to transformers")
    return {PREFIXES[0] + name: tensor for name, tensor in state.items()}


@refuse_wrong_types
def config_from_json(values: Mapping[str, Any], source: str = "config.json") -> AudioEncoderConfig:
    """The encoder's config from the content of transformers' Whisper `config.json`; `source` is its name, for errors.

    Raises:
        ConversionError: lists every field that is missing or that asks for something our encoder does not support.
    """
    wrong = [f"{name}: missing" for name in _FIELDS.values() if name not in values]
    for name, expected in (
        ("model_type", "whisper"),
        ("activation_function", "gelu"),
        ("scale_embedding", False),
    ):
        if values.get(name, expected) != expected:
            wrong.append(f"{name}: expected {expected!r}, found {values[name]!r}")
    if not wrong:
        try:
            return build_config(
                AudioEncoderConfig, {ours: values[theirs] for ours, theirs in _FIELDS.items()}, "encoder"
            )
        except ConfigError as error:
            wrong.append(str(error))
    raise ConversionError(f"{source}, expected to be a Whisper's:\n" + "\n".join(wrong))


def config_to_json(config: AudioEncoderConfig) -> dict[str, Any]:
    """The content of transformers' `config.json` for a Whisper with this encoder and a decoder without layers."""
    return {
        "architectures": ["WhisperModel"],
        "model_type": "whisper",
        **{theirs: getattr(config, ours) for ours, theirs in _FIELDS.items()},
        "decoder_layers": 0,
        "decoder_attention_heads": config.num_heads,
        "decoder_ffn_dim": config.intermediate_size,
    }


def open_encoder(path: Path) -> tuple[AudioEncoderConfig, dict[str, LazyTensor]]:
    """The encoder of a folder as `save_pretrained` writes it, or of a file of OpenAI's `whisper`, such as `small.pt`.

    Returns:
        The encoder's config, and its tensors by transformers' names without a prefix; none is read yet.

    Raises:
        ConversionError: a file is missing, or its content is not a Whisper.
        CheckpointError: a file of weights is damaged.
        MissingExtraError: a file needs torch, which is not installed.
    """
    if path.is_file():
        return _open_openai(path)
    config = config_from_json(read_json(path / CONFIG), str(path / CONFIG))
    return config, _encoder(open_weights(path))


def read(path: str | Path) -> tuple[AudioEncoderConfig, dict[str, LazyTensor]]:
    """Read the encoder of a folder or a file; see `open_encoder`.

    Returns:
        The encoder's config and the tensors by our names; none is read yet.

    Raises:
        ConversionError: also lists every tensor that is missing, unknown, misshapen or of another type.
    """
    config, state = open_encoder(Path(path))
    return config, to_ours(_table(config), state, str(path))


def write(folder: Path, config: AudioEncoderConfig, tensors: Tensors) -> None:
    """Write `config.json` and `model.safetensors` of a Whisper without layers in its decoder.

    transformers' `WhisperModel.from_pretrained` reads it and draws the decoder's embeddings and norm.

    Args:
        folder: exists.
        config: the encoder's config.
        tensors: by our names; each is written in its own type.

    Raises:
        ConversionError: lists every tensor that is missing, unknown, misshapen or of another type.
    """
    values = config_to_json(config)
    # Where it is not stated, transformers takes that of the first tensor, which may be the smallest.
    values["dtype"] = values["torch_dtype"] = common_dtype(tensors) or "float32"
    write_safetensors(folder / WEIGHTS, to_transformers(tensors, config))
    write_json(folder / CONFIG, values)


def write_openai(file: Path, config: AudioEncoderConfig, tensors: Tensors) -> None:
    """Write a file that OpenAI's `whisper.load_model` reads: the encoder, and a decoder without layers.

    Args:
        file: its path.
        config: the encoder's config.
        tensors: by our names; each is written in its own type.

    Raises:
        ConversionError: lists every tensor that is missing, unknown, misshapen or of another type; or the MLPs are not
            four times as wide as the hidden states.
        MissingExtraError: torch is not installed.
    """
    D = config.hidden_size
    if config.intermediate_size != 4 * D:
        raise ConversionError(
            f"OpenAI's whisper has no such encoder: audio_encoder.intermediate_size: expected {4 * D}, "
            f"found {config.intermediate_size}"
        )
    torch = import_torch(file)
    names = {theirs: openai for openai, theirs in _OPENAI_NAMES.items()}
    state = {
        _OPENAI_PREFIX + _rename(name, names): to_torch_tensor(tensor, torch)
        for name, tensor in to_theirs(_table(config), tensors, "Whisper encoder to OpenAI's").items()
    }
    decoder = {"token_embedding.weight": (1, D), "positional_embedding": (1, D), "ln.weight": (D,), "ln.bias": (D,)}
    state |= {f"decoder.{name}": torch.zeros(shape) for name, shape in decoder.items()}
    dims = {theirs: getattr(config, ours) for ours, theirs in _DIMS.items()}
    text = {"n_vocab": 1, "n_text_ctx": 1, "n_text_state": D, "n_text_head": config.num_heads, "n_text_layer": 0}
    torch.save({"dims": {**dims, **text}, "model_state_dict": state}, file)


def _open_openai(file: Path) -> tuple[AudioEncoderConfig, dict[str, LazyTensor]]:
    content = load_torch(file)
    dims, state = content.get("dims"), content.get("model_state_dict")
    if not isinstance(dims, Mapping) or not isinstance(state, Mapping) or set(_DIMS.values()) - set(dims):
        raise ConversionError(f"{file}: expected a Whisper of OpenAI with dims and model_state_dict, found none")
    sizes = {ours: dims[theirs] for ours, theirs in _DIMS.items()}
    try:
        values = {**sizes, "intermediate_size": 4 * sizes["hidden_size"]}
        config = build_config(AudioEncoderConfig, values, f"{file}: dims")
    except ConfigError as error:
        raise ConversionError(str(error)) from None
    return config, {
        _rename(name.removeprefix(_OPENAI_PREFIX), _OPENAI_NAMES): tensor
        for name, tensor in lazy_state(state, file).items()
        if name.startswith(_OPENAI_PREFIX)
    }


def _rename(name: str, names: Mapping[str, str]) -> str:
    """A tensor's name with one of `names` replaced: whole, or after its layer's number."""

    def renamed(name: str) -> str:
        return next((new + name.removeprefix(old) for old, new in names.items() if name.startswith(old)), name)

    block, number, rest = (*name.split(".", 2), "", "")[:3]
    return f"{renamed(block)}.{number}.{renamed(rest)}" if number.isdigit() and rest else renamed(name)


def _encoder(tensors: Tensors) -> dict[str, LazyTensor]:
    """The encoder's tensors, without the prefix; unknown ones keep their whole name."""
    encoder = {}
    tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith(IGNORED)}
    if not any(name.startswith(PREFIXES) for name in tensors):
        # Of an encoder that was saved alone.
        return tensors
    for name, tensor in tensors.items():
        prefix = next((prefix for prefix in PREFIXES if name.startswith(prefix)), "")
        encoder[name[len(prefix) :] if prefix else f"(outside the encoder) {name}"] = tensor
    return encoder


def _table(config: AudioEncoderConfig) -> list[Entry]:
    """Every tensor of the encoder."""
    D, N, F = config.hidden_size, config.num_heads, config.intermediate_size
    H = D // N
    table = [
        transpose("conv1.weight", "conv1.weight", (D, config.num_mel_bins, 3), (2, 1, 0)),
        rename("conv1.bias", "conv1.bias", (D,)),
        transpose("conv2.weight", "conv2.weight", (D, D, 3), (2, 1, 0)),
        rename("conv2.bias", "conv2.bias", (D,)),
        rename("embed_positions.weight", "positions", (config.max_position, D)),
    ]
    for layer in range(config.num_layers):
        block = f"layers.{layer}"
        attention = f"{block}.self_attn"
        table += _norm(f"{block}.self_attn_layer_norm", f"{block}.attention_norm", D)
        for name in "qkv":
            table.append(reshape(f"{attention}.{name}_proj.weight", f"{block}.{name}.weight", (D, D), (N, H, D)))
            if name != "k":
                table.append(reshape(f"{attention}.{name}_proj.bias", f"{block}.{name}.bias", (D,), (N, H)))
        table += [
            reshape(f"{attention}.out_proj.weight", f"{block}.out.weight", (D, D), (D, N, H)),
            rename(f"{attention}.out_proj.bias", f"{block}.out.bias", (D,)),
            *_norm(f"{block}.final_layer_norm", f"{block}.mlp_norm", D),
            rename(f"{block}.fc1.weight", f"{block}.up.weight", (F, D)),
            rename(f"{block}.fc1.bias", f"{block}.up.bias", (F,)),
            rename(f"{block}.fc2.weight", f"{block}.down.weight", (D, F)),
            rename(f"{block}.fc2.bias", f"{block}.down.bias", (D,)),
        ]
    return table + _norm("layer_norm", "norm", D)


def _norm(theirs: str, ours: str, D: int) -> list[Entry]:
    return [rename(f"{theirs}.weight", f"{ours}.scale", (D,)), rename(f"{theirs}.bias", f"{ours}.bias", (D,))]
