"""Mini-Omni's published format: a folder with lit_model.pth, model_config.yaml and the tokenizer.

`lit_model.pth` is a state dict of the litgpt-style module: one table of all tokens, attention with q, k and v in
one matrix, whose rows are grouped by key/value head. It has neither Whisper nor SNAC in it.

Letters: D width, N query heads, K key/value heads, H head size, F ffn width, Vt and Va rows of the text table and
of one audio layer's.
"""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from omni_jax.checkpoint.safetensors_io import DTYPES, LazyTensor, Tensors
from omni_jax.config.load import build_config
from omni_jax.config.model import AudioEncoderConfig, CodecConfig, ModelConfig, TrunkConfig
from omni_jax.convert.table import Entry, Part, check, filled, identical, import_torch, same, to_ours, to_theirs
from omni_jax.errors import ConfigError, ConversionError
from omni_jax.vocab import NUM_CODEBOOKS, Vocab

WEIGHTS = "lit_model.pth"
CONFIG = "model_config.yaml"

TEXT_SPECIALS = 64
"""A constant of the published code, not in its config. A model with another number says so in `hf_config`, the
one field of the config that is free; so does one whose adapter joins ear frames or is narrower than the trunk."""

TABLE, HEAD = "transformer.wte.weight", "lm_head.weight"
_TTS_ADAPTER = "transformer.post_adapter"

_REQUIRED = ("n_layer", "n_head", "n_embd", "intermediate_size", "padded_vocab_size")

_FIXED: dict[str, tuple[Any, Any]] = {
    "scale_embeddings": (False, False),
    "rotary_percentage": (1.0, 0.25),
    "parallel_residual": (False, True),
    "bias": (False, True),
    "lm_head_bias": (False, False),
    "shared_attention_norm": (False, False),
    "norm_class_name": ("RMSNorm", "LayerNorm"),
    "mlp_class_name": ("LLaMAMLP", "GptNeoxMLP"),
    "rope_condense_ratio": (1, 1),
    "n_expert": (0, 0),
    "pos_type": ("rope", "rope"),
}
"""Fields with the only value that our model has, and the value that the published code takes when absent."""

_OPTIONAL: dict[str, Any] = {
    "n_query_groups": None,
    "head_dim": None,
    "add_qkv_bias": None,
    "norm_eps": 1e-5,
    "rope_base": 10000,
    "block_size": 4096,
    "text_vocab_size": 152000,
    "audio_vocab_size": 4160,
    "cat_audio_vocab_size": 29120,
    "whisper_adapter_dim": 768,
    "asr_adapter": "llamamlp",
    "tie_word_embeddings": False,
    "post_adapter": False,
    "post_adapter_layers": 6,
    "hf_config": None,
    "name": "",
}
"""Fields that we read, with the published code's default."""

_WITHOUT_EFFECT = (
    "attn_dropout",
    "force_align",
    "gelu_approximate",
    "n_expert_per_token",
    "padding_multiple",
    "prompt_vocab_size",
    "use_pretrain_phoneme_emb",
    "vocab_size",
)


def config_from_yaml(
    values: Mapping[str, Any], ear: AudioEncoderConfig, codec: CodecConfig, *, tts_adapter: bool, source: str
) -> ModelConfig:
    """A model's shape from the content of `model_config.yaml`.

    Args:
        values: the content.
        ear: Whisper's shape, which the file does not hold.
        codec: the codec's.
        tts_adapter: whether the weights have a TTS adapter. A config may announce one that the weights lack:
            the published code switches it off.
        source: the file's name, for errors.

    Raises:
        ConversionError: names every field that is missing, unknown, of a value that our model does not have, or
            in contradiction to another.
    """
    wrong = [f"{name}: missing" for name in _REQUIRED if name not in values]
    known = {*_REQUIRED, *_FIXED, *_OPTIONAL, *_WITHOUT_EFFECT}
    wrong += [f"{name}: unknown field" for name in values if name not in known]
    for name, (only, default) in _FIXED.items():
        if (found := values.get(name, default)) != only:
            wrong.append(f"{name}: expected {only!r}, found {found!r}" + ("" if name in values else " (default)"))
    field = {**_OPTIONAL, **values}
    if "Gemma" in str(field["name"]):
        wrong.append(f"name: expected no Gemma, whose norms add one to their scale, found {field['name']!r}")
    if wrong:
        raise ConversionError(f"{source}:\n" + "\n".join(wrong))

    sizes = ("text_vocab_size", "audio_vocab_size", "cat_audio_vocab_size", "padded_vocab_size", "n_embd", "n_head")
    if wrong := [f"{name}: expected a number, found {field[name]!r}" for name in sizes if type(field[name]) is not int]:
        raise ConversionError(f"{source}:\n" + "\n".join(wrong))
    text, audio, all_audio = (field[name] for name in sizes[:3])
    ours = field["hf_config"] or {}
    stack = ours.get("adapter_stack", 1)
    for name, expected in (
        ("cat_audio_vocab_size", NUM_CODEBOOKS * audio),
        ("padded_vocab_size", text + all_audio),
        ("whisper_adapter_dim", ear.hidden_size * stack),
    ):
        if field[name] != expected:
            wrong.append(f"{name}: expected {expected}, found {field[name]!r}")
    if wrong:
        raise ConversionError(f"{source}:\n" + "\n".join(wrong))

    text_specials = ours.get("text_specials", TEXT_SPECIALS)
    intermediate_size = ours.get("adapter_ffn", field["intermediate_size"])
    trunk = {
        "width": field["n_embd"],
        "layers": field["n_layer"],
        "heads": field["n_head"],
        "num_kv_heads": field["n_query_groups"] or field["n_head"],
        "head_dim": field["head_dim"] or field["n_embd"] // field["n_head"],
        "ffn": field["intermediate_size"],
        "rope_theta": field["rope_base"],
        "norm_eps": field["norm_eps"],
        "qkv_bias": field["add_qkv_bias"] or False,
        "tie_word_embeddings": field["tie_word_embeddings"],
        "context": field["block_size"],
    }
    values = {
        "audio_encoder": ear,
        "adapter": {"kind": field["asr_adapter"], "ffn": intermediate_size, "stack": stack},
        "trunk": trunk,
        "vocab": {
            "text": text - text_specials,
            "text_specials": text_specials,
            "audio": codec.codebook_size,
            "audio_specials": audio - codec.codebook_size,
        },
        "codec": codec,
        "tts_adapter_layers": field["post_adapter_layers"] if field["post_adapter"] and tts_adapter else 0,
    }
    try:
        return build_config(ModelConfig, values, source)
    except ConfigError as error:
        raise ConversionError(str(error)) from None


def config_to_yaml(config: ModelConfig) -> dict[str, Any]:
    """The content of `model_config.yaml` for a model; the inverse of `config_from_yaml`.

    What the published code doesn't know of is in `hf_config`, and it computes the same: an adapter that joins ear
    frames is one of a wider ear, to be given joined frames; one that is narrower than the trunk's MLPs is filled up
    with zeros.

    Raises:
        ConversionError: names everything about the model that the published code cannot do.
    """
    trunk, vocab = config.trunk, Vocab(config.vocab)
    wrong = []
    gated = config.adapter.kind == "llamamlp"
    if gated and config.adapter.intermediate_size > trunk.intermediate_size:
        wrong.append(
            f"adapter.intermediate_size: expected at most trunk.intermediate_size, which is {trunk.intermediate_size}, found {config.adapter.intermediate_size}"
        )
    if trunk.rope_scaling is not None:
        wrong.append(f"trunk.rope_scaling: expected none, found {trunk.rope_scaling}")
    if wrong:
        raise ConversionError("the published Mini-Omni code has no such model:\n" + "\n".join(wrong))
    hf_config: dict[str, Any] = {}
    if config.vocab.text_specials != TEXT_SPECIALS:
        hf_config["text_specials"] = config.vocab.text_specials
    if config.adapter.stack != 1:
        hf_config["adapter_stack"] = config.adapter.stack
    if gated and config.adapter.intermediate_size != trunk.intermediate_size:
        hf_config["adapter_ffn"] = config.adapter.intermediate_size
    theta = trunk.rope_theta
    return {
        "name": "mini-omni",
        "hf_config": hf_config,
        "block_size": trunk.max_position,
        "vocab_size": config.vocab.text,
        "padded_vocab_size": vocab.rows,
        "n_layer": trunk.num_layers,
        "n_head": trunk.num_heads,
        "n_query_groups": trunk.num_kv_heads,
        "n_embd": trunk.hidden_size,
        "head_dim": trunk.head_dim,
        "intermediate_size": trunk.intermediate_size,
        "add_qkv_bias": trunk.qkv_bias,
        "norm_eps": trunk.norm_eps,
        "rope_base": int(theta) if theta == int(theta) else theta,
        **{name: only for name, (only, _) in _FIXED.items()},
        "text_vocab_size": vocab.text_rows,
        "audio_vocab_size": vocab.audio_rows,
        "cat_audio_vocab_size": NUM_CODEBOOKS * vocab.audio_rows,
        "whisper_adapter_dim": config.audio_encoder.hidden_size * config.adapter.stack,
        "asr_adapter": config.adapter.kind,
        "tie_word_embeddings": trunk.tie_word_embeddings,
        "post_adapter": config.tts_adapter_layers > 0,
        "post_adapter_layers": config.tts_adapter_layers or _OPTIONAL["post_adapter_layers"],
    }


def from_state(state: Tensors, config: ModelConfig, source: str) -> dict[str, LazyTensor]:
    """The tensors of a state dict in our layout, each of its own type; the ear is not among them.

    Raises:
        ConversionError: names every tensor that is missing, unknown or misshapen; or the head is said to be tied
            to the embedding and differs from it.
    """
    table = _table(config)
    if config.trunk.tie_word_embeddings:
        expected = {entry.theirs: entry.shape for entry in table}
        check(state, {**expected, HEAD: expected[TABLE]}, source)
        if not identical(state[TABLE], state[HEAD]):
            raise ConversionError(
                f"{source}: {HEAD}: expected the values of {TABLE}, as tie_word_embeddings says, found others"
            )
        state = {name: tensor for name, tensor in state.items() if name != HEAD}
    return to_ours(table, state, source)


def to_state(tensors: Tensors, config: ModelConfig, source: str) -> dict[str, LazyTensor]:
    """A model's tensors as the published state dict; the inverse of `from_state`. The ear is left out.

    A tied head is in the result under both names, as one and the same object.

    Raises:
        ConversionError: names every tensor that is missing, unknown or misshapen.
    """
    tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith("audio_encoder.")}
    state = to_theirs(_table(config), tensors, source)
    if config.trunk.tie_word_embeddings:
        state[HEAD] = state[TABLE]
    return state


def has_tts_adapter(state: Tensors) -> bool:
    """Whether a state dict has a TTS adapter."""
    return any(name.startswith(_TTS_ADAPTER) for name in state)


def read_config(folder: Path) -> dict[str, Any]:
    """The content of `model_config.yaml`.

    Raises:
        ConversionError: it is not YAML with named fields.
    """
    file = folder / CONFIG
    try:
        values = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError, OSError) as error:
        raise ConversionError(f"{file}: expected YAML, found {error}") from None
    if not isinstance(values, dict):
        raise ConversionError(f"{file}: expected fields and values, found {type(values).__name__}")
    return values


def read_state(folder: Path) -> dict[str, LazyTensor]:
    """The tensors of `lit_model.pth`, mapped from the file: memory holds what is being read.

    Raises:
        ConversionError: the file is not a state dict, or has more in it than tensors.
        ImportError: torch is not installed.
    """
    file = folder / WEIGHTS
    torch = import_torch(file)
    try:
        state = torch.load(file, map_location="cpu", mmap=True, weights_only=True)
    except (OSError, RuntimeError, ValueError, EOFError, pickle.UnpicklingError) as error:
        reason = next(iter(str(error).splitlines()), "")
        raise ConversionError(f"{file}: expected a state dict with tensors only, found {reason}") from None
    if not isinstance(state, dict):
        raise ConversionError(f"{file}: expected a state dict, found {type(state).__name__}")
    strange = [name for name, value in state.items() if not isinstance(value, torch.Tensor)]
    if strange:
        raise ConversionError(f"{file}: expected tensors only, found something else in {', '.join(strange)}")
    types = {getattr(torch, str(dtype)): dtype for dtype in DTYPES.values()}

    def lazy(tensor: Any) -> LazyTensor:
        dtype = types.get(tensor.dtype, np.dtype(object))

        def read() -> np.ndarray:
            # numpy knows bfloat16 only by its bytes.
            return tensor.detach().contiguous().view(torch.uint8).numpy().view(dtype).reshape(tensor.shape)

        return LazyTensor(tuple(tensor.shape), dtype, read)

    return {name: lazy(tensor) for name, tensor in state.items()}


def write(folder: Path, config: ModelConfig, state: Tensors) -> None:
    """Write `lit_model.pth` and `model_config.yaml`. torch wants the whole state in memory, once.

    Raises:
        ConversionError: the published code has no such model.
        ImportError: torch is not installed.
    """
    torch = import_torch(folder / WEIGHTS)
    values = config_to_yaml(config)

    def tensor(lazy: LazyTensor) -> Any:
        array = np.require(lazy.read(), requirements=["C", "W"]).reshape(-1)
        return torch.from_numpy(array.view(np.uint8)).view(getattr(torch, str(lazy.dtype))).reshape(lazy.shape)

    made: dict[int, Any] = {}
    for lazy in state.values():
        if id(lazy) not in made:
            made[id(lazy)] = tensor(lazy)
    torch.save({name: made[id(lazy)] for name, lazy in state.items()}, folder / WEIGHTS)
    (folder / CONFIG).write_text(yaml.safe_dump(values, sort_keys=False), encoding="utf-8")


def _table(config: ModelConfig) -> list[Entry]:
    """Every tensor but Whisper's and a tied head."""
    trunk, vocab = config.trunk, Vocab(config.vocab)
    D, Vt, Va = trunk.hidden_size, vocab.text_rows, vocab.audio_rows

    def rows(theirs: str, ours: str) -> Entry:
        return Entry(
            theirs,
            (vocab.rows, D),
            (
                Part(f"{ours}.text", (Vt, D), lambda array: array[:Vt]),
                Part(f"{ours}.audio", (NUM_CODEBOOKS, Va, D), lambda array: array[Vt:].reshape(NUM_CODEBOOKS, Va, D)),
            ),
            lambda text, audio: np.concatenate([text, audio.reshape(-1, D)]),
        )

    table = [rows(TABLE, "embed"), same("transformer.ln_f.weight", "norm.scale", (D,))]
    if not trunk.tie_word_embeddings:
        table.append(rows(HEAD, "head"))
    E, F = config.audio_encoder.hidden_size * config.adapter.stack, config.adapter.intermediate_size
    if config.adapter.kind == "llamamlp":
        table += _gated_mlp("whisper_adapter", "adapter.map", E, F, D, their_ffn=trunk.intermediate_size)
    else:
        table.append(same("whisper_adapter.weight", "adapter.map.weight", (D, E)))
        table.append(same("whisper_adapter.bias", "adapter.map.bias", (D,)))
    for layer in range(trunk.num_layers):
        table += _block(f"transformer.h.{layer}", f"trunk.layers.{layer}", trunk)
    for layer in range(config.tts_adapter_layers):
        table += _block(f"{_TTS_ADAPTER}.{layer}", f"tts_adapter.blocks.layers.{layer}", trunk)
    if config.tts_adapter_layers:
        table.append(same(f"{_TTS_ADAPTER}_audio_ln.weight", "tts_adapter.norm.scale", (D,)))
        head = (NUM_CODEBOOKS * Va, D)
        table.append(same(f"{_TTS_ADAPTER}_audio_lm_head.weight", "tts_adapter.head", head, (NUM_CODEBOOKS, Va, D)))
    return table


def _block(theirs: str, ours: str, trunk: TrunkConfig) -> list[Entry]:
    D, N, H = trunk.hidden_size, trunk.num_heads, trunk.head_dim
    return [
        same(f"{theirs}.norm_1.weight", f"{ours}.attention_norm.scale", (D,)),
        _fused(f"{theirs}.attn.attn.weight", f"{ours}.attention", "", trunk, (D,)),
        *([_fused(f"{theirs}.attn.attn.bias", f"{ours}.attention", "_bias", trunk, ())] if trunk.qkv_bias else []),
        same(f"{theirs}.attn.proj.weight", f"{ours}.attention.out", (D, N * H), (D, N, H)),
        same(f"{theirs}.norm_2.weight", f"{ours}.mlp_norm.scale", (D,)),
        *_gated_mlp(f"{theirs}.mlp", f"{ours}.mlp", D, trunk.intermediate_size, D),
    ]


def _fused(theirs: str, ours: str, suffix: str, trunk: TrunkConfig, inputs: tuple[int, ...]) -> Entry:
    """Rows [(K, N/K + 2, H)]: of each key/value head its query heads, its key, its value."""
    N, K, H = trunk.num_heads, trunk.num_kv_heads, trunk.head_dim
    G = N // K
    grouped = (K, G + 2, H, *inputs)

    def join(query: np.ndarray, key: np.ndarray, value: np.ndarray) -> np.ndarray:
        query = query.reshape(K, G, H, *inputs)
        return np.concatenate([query, key[:, None], value[:, None]], axis=1).reshape(-1, *inputs)

    return Entry(
        theirs,
        ((N + 2 * K) * H, *inputs),
        (
            Part(f"{ours}.q{suffix}", (N, H, *inputs), lambda a: a.reshape(grouped)[:, :G].reshape(N, H, *inputs)),
            Part(f"{ours}.k{suffix}", (K, H, *inputs), lambda a: a.reshape(grouped)[:, G]),
            Part(f"{ours}.v{suffix}", (K, H, *inputs), lambda a: a.reshape(grouped)[:, G + 1]),
        ),
        join,
    )


def _gated_mlp(
    theirs: str, ours: str, width: int, intermediate_size: int, out: int, their_ffn: int | None = None
) -> list[Entry]:
    wide = their_ffn or intermediate_size
    return [
        filled(f"{theirs}.fc_1.weight", f"{ours}.gate", (wide, width), (intermediate_size, width)),
        filled(f"{theirs}.fc_2.weight", f"{ours}.up", (wide, width), (intermediate_size, width)),
        filled(f"{theirs}.proj.weight", f"{ours}.down", (out, wide), (out, intermediate_size)),
    ]
