"""Language models: folders of transformers to and from our trunk. No torch. Their configs are in `families`.

Letters: D hidden, N query heads, K key/value heads, H head dim, F intermediate, V rows of the language model's own
vocabulary.
"""

from __future__ import annotations

import math
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np

from omni_jax.checkpoint.safetensors_io import LazyTensor, Tensors, write_safetensors
from omni_jax.config.model import TrunkConfig
from omni_jax.convert.families import FAMILIES, config_from_json, config_to_json, family_of
from omni_jax.convert.files import CONFIG, WEIGHTS, common_dtype, open_weights, read_json, write_json
from omni_jax.convert.table import (
    Entry,
    rename,
    reshape,
    to_ours,
    to_theirs,
    without_tied_head,
)

_EMBEDDING, _HEAD = "model.embed_tokens.weight", "lm_head.weight"

TEXT_PREFIXES = {
    "language_model.model.": "model.",
    "model.language_model.": "model.",
    "language_model.lm_head.": "lm_head.",
}
"""Prefixes of the language model's tensors in a model that also sees, and those that it has alone."""

IGNORED = ("vision_tower.", "model.vision_tower.", "multi_modal_projector.", "model.multi_modal_projector.")
"""Prefixes of the other tensors of such a model, which are skipped."""


def read(folder: Path, *, tied: bool | None = None) -> tuple[TrunkConfig, int, dict[str, LazyTensor]]:
    """Read a folder as `save_pretrained` writes it.

    Args:
        folder: with `config.json` and the weights.
        tied: whether the head is the embedding, where the file has a head of other values although the config says
            that it is; None: that is an error.

    Returns:
        The trunk's config, the rows of the vocabulary (V), and the tensors by our names, none read yet: those of the
        trunk and the norm, `embed.text` [V, D], and `head.text` [V, D] unless the head is tied.

    Raises:
        ConversionError: lists what is missing, unknown, misshapen or not supported.
        CheckpointError: a file is damaged.
    """
    trunk, rows = config_from_json(read_json(folder / CONFIG), str(folder / CONFIG))
    state = text_tensors(open_weights(folder))
    if tied is not None and trunk.tie_word_embeddings and _HEAD in state:
        trunk = replace(trunk, tie_word_embeddings=tied)
        if tied:
            del state[_HEAD]
    return trunk, rows, from_state(state, trunk, rows, str(folder))


def text_tensors(state: Tensors) -> dict[str, LazyTensor]:
    """A language model's tensors, or others, by the names that they have in a model of its own."""
    tensors = {}
    for name, tensor in state.items():
        # Old files hold the frequencies of rope, which follow from the config.
        if name.startswith(IGNORED) or name.endswith("rotary_emb.inv_freq"):
            continue
        for prefix, alone in TEXT_PREFIXES.items():
            if name.startswith(prefix):
                name = alone + name.removeprefix(prefix)
                break
        tensors[name] = tensor
    if any(name.startswith("model.") for name in tensors):
        return tensors
    # Of a model that was saved without its head.
    return {name if name == _HEAD else f"model.{name}": tensor for name, tensor in tensors.items()}


def write(folder: Path, trunk: TrunkConfig, rows: int, tensors: Tensors) -> None:
    """Write `config.json` and `model.safetensors`; the inverse of `read`.

    Args:
        folder: exists.
        trunk: the config.
        rows: of the vocabulary.
        tensors: by our names, with `rows` rows in the tables.

    Raises:
        ConversionError: lists every tensor that is missing, unknown or misshapen.
    """
    state = to_theirs(trunk_table(trunk, rows), tensors, "trunk")
    values = config_to_json(trunk, rows)
    # transformers 4 reads the second, transformers 5 the first, and takes that of some tensor where there is none.
    values["dtype"] = values["torch_dtype"] = common_dtype(state) or "float32"
    write_safetensors(folder / WEIGHTS, state)
    write_json(folder / CONFIG, values)


def from_state(state: Tensors, trunk: TrunkConfig, rows: int, source: str) -> dict[str, LazyTensor]:
    """A language model's tensors by our names; see `read`.

    Raises:
        ConversionError: lists every tensor that is missing, unknown or misshapen; or a tied head differs from the
            embedding.
    """
    table = trunk_table(trunk, rows)
    if trunk.tie_word_embeddings and _HEAD in state:
        choose = "; choose one with --tied (the embedding) or --untied (a head of its own)"
        state = without_tied_head(table, state, source, head=_HEAD, embedding=_EMBEDDING, advice=choose)
    return to_ours(table, state, source)


def extend(tensor: LazyTensor, name: str, text_rows: int, audio: tuple[int, int], seed: int) -> Tensors:
    """Tables of a speech model from a language model's table; new rows are drawn from N(0, the old rows' deviation).

    Rows as large as the old ones weigh as much as any in the average of eight embeddings, and in a head they start
    with scores like those of other tokens.

    Args:
        tensor: [V, D].
        name: `embed` or `head`.
        text_rows: of the new text table; its first V rows are the old ones.
        audio: codebooks and rows per codebook of the new audio table.
        seed: the same seed draws the same rows.

    Returns:
        `{name}.text` [text_rows, D] and `{name}.audio` [codebooks, rows, D], of the type of `tensor`.
    """
    V, D = tensor.shape
    deviation = _deviation(tensor.read())

    def draw(table: str, shape: tuple[int, ...]) -> np.ndarray:
        generator = np.random.default_rng([seed, zlib.crc32(f"{name}.{table}".encode())])
        array = generator.standard_normal(shape, np.float32)
        array *= np.float32(deviation)
        return array.astype(tensor.dtype, copy=False)

    def text() -> np.ndarray:
        return np.concatenate([tensor.read(), draw("text", (text_rows - V, D))])

    return {
        f"{name}.text": LazyTensor((text_rows, D), tensor.dtype, text),
        f"{name}.audio": LazyTensor((*audio, D), tensor.dtype, lambda: draw("audio", (*audio, D))),
    }


def _deviation(table: np.ndarray) -> float:
    """Root mean square of a table, a few rows at a time: in float32 a table may be a quarter of the model."""
    total = sum(
        float(np.square(table[row : row + 4096].astype(np.float32)).sum(dtype=np.float64))
        for row in range(0, len(table), 4096)
    )
    return (total / table.size) ** 0.5


def trunk_table(trunk: TrunkConfig, rows: int) -> list[Entry]:
    """An entry for every tensor of a language model except a tied head; `rows` is that of the vocabulary."""
    D, H = trunk.hidden_size, trunk.head_dim
    heads = {"q": trunk.num_heads, "k": trunk.num_kv_heads, "v": trunk.num_kv_heads}
    fused = FAMILIES[family_of(trunk)].fused
    table = [rename(_EMBEDDING, "embed.text", (rows, D)), rename("model.norm.weight", "norm.scale", (D,))]
    if not trunk.tie_word_embeddings:
        table.append(rename(_HEAD, "head.text", (rows, D)))
    for layer in range(trunk.num_layers):
        theirs, ours = f"model.layers.{layer}", f"trunk.layers.{layer}"
        table += [rename(f"{theirs}.{name}.weight", f"{ours}.{norm}.scale", (D,)) for norm, name in _norms(trunk)]
        attention = f"{theirs}.self_attn"
        if fused:
            table.append(_fused(f"{attention}.qkv_proj.weight", f"{ours}.attention", heads, (H,), D))
        else:
            for name, N in heads.items():
                projection, linear = f"{attention}.{name}_proj", f"{ours}.attention.{name}"
                table.append(reshape(f"{projection}.weight", f"{linear}.weight", (N * H, D), (N, H, D)))
                if trunk.qkv_bias:
                    table.append(reshape(f"{projection}.bias", f"{linear}.bias", (N * H,), (N, H)))
        if trunk.qk_norm is not None:
            for name in "qk":
                size = H if trunk.qk_norm == "head" else heads[name] * H
                table.append(rename(f"{attention}.{name}_norm.weight", f"{ours}.attention.{name}_norm.scale", (size,)))
        N = trunk.num_heads
        table.append(reshape(f"{attention}.o_proj.weight", f"{ours}.attention.out.weight", (D, N * H), (D, N, H)))
        if trunk.out_bias:
            table.append(rename(f"{attention}.o_proj.bias", f"{ours}.attention.out.bias", (D,)))
        table += _mlp(f"{theirs}.mlp", f"{ours}.mlp", trunk, fused=fused)
    return table


def _norms(trunk: TrunkConfig) -> list[tuple[str, str]]:
    """The norms of a block and their names in transformers, which depend on what else is normed."""
    if not trunk.norms_after:
        return [("attention_norm", "input_layernorm"), ("mlp_norm", "post_attention_layernorm")]
    before = [("attention_norm", "input_layernorm"), ("mlp_norm", "pre_feedforward_layernorm")]
    after = [("attention_post_norm", "post_attention_layernorm"), ("mlp_post_norm", "post_feedforward_layernorm")]
    return before * trunk.norms_before + after


def _mlp(theirs: str, ours: str, trunk: TrunkConfig, *, fused: bool) -> list[Entry]:
    D, F = trunk.hidden_size, trunk.intermediate_size
    table = [rename(f"{theirs}.down_proj.weight", f"{ours}.down.weight", (D, F))]
    if fused:
        return [*table, _fused(f"{theirs}.gate_up_proj.weight", ours, {"gate": F, "up": F}, (), D)]
    table += [rename(f"{theirs}.{name}_proj.weight", f"{ours}.{name}.weight", (F, D)) for name in ("gate", "up")]
    if trunk.mlp_bias:
        sizes = {"gate": F, "up": F, "down": D}
        table += [rename(f"{theirs}.{name}_proj.bias", f"{ours}.{name}.bias", (size,)) for name, size in sizes.items()]
    return table


def _fused(theirs: str, ours: str, rows: dict[str, int], head: tuple[int, ...], D: int) -> Entry:
    """One tensor that has the rows of several of ours, one after the other; a row is a head where there are heads."""
    shapes = {name: (count, *head, D) for name, count in rows.items()}
    sizes = [math.prod(shape[:-1]) for shape in shapes.values()]
    return Entry(
        {theirs: (sum(sizes), D)},
        {f"{ours}.{name}.weight": shape for name, shape in shapes.items()},
        lambda fused: tuple(
            part.reshape(shape)
            for part, shape in zip(np.split(fused, np.cumsum(sizes)[:-1]), shapes.values(), strict=True)
        ),
        lambda *parts: (np.concatenate([part.reshape(-1, D) for part in parts]),),
    )
