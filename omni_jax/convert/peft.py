"""LoRA adapters as PEFT has them: adapter_config.json and adapter_model.safetensors. Neither torch nor peft.

PEFT names the tensors after the linear maps of transformers' model of the trunk's family. Where a family has several of
our linear maps as one (Phi-3), so has its adapter: A of all, and of B the rows of each.

Letters: r rank; our linear maps have weights [*out, *in], A is [r, *in], B [*out, r].
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from omni_jax.checkpoint.folders import new_folder
from omni_jax.checkpoint.safetensors_io import LazyTensor, SafetensorsFile, Tensors, write_safetensors
from omni_jax.config.model import MAX_SIZE, TrunkConfig
from omni_jax.config.run import MAX_ALPHA, MIN_ALPHA, LoRAConfig
from omni_jax.convert.files import read_json, refuse_wrong_types, write_json
from omni_jax.convert.language_model import text_tensors, trunk_table
from omni_jax.errors import ConversionError

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
_A, _B = ".lora_A.weight", ".lora_B.weight"
OUR_A, OUR_B = ".lora.a", ".lora.b"
"""What follows the name of a linear map in the names of our tensors."""

_FIXED: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "use_dora": (None, False),
    "use_qalora": (None, False),
    "use_bdlora": (None, False),
    "lora_bias": (None, False),
    "bias": (None, "none"),
    "alora_invocation_tokens": (None,),
    "layer_replication": (None, []),
    # Others change the weights that the adapter belongs to.
    "init_lora_weights": (None, True, False, "gaussian", "eva", "orthogonal"),
}
"""Keys of the config that change what an adapter computes: the values of a plain LoRA."""


@dataclass(frozen=True)
class Adapter:
    """A LoRA of the trunk."""

    rank: int
    alpha: float
    """The change of a linear map is alpha / rank * B A."""
    tensors: dict[str, LazyTensor]
    """`NAME.lora.a` and `NAME.lora.b`, float32, for linear maps `NAME`, such as `trunk.layers.0.attention.q`."""


def read(folder: Path, trunk: TrunkConfig) -> Adapter:
    """Read a folder as PEFT's `save_pretrained` writes it.

    Raises:
        ConversionError: it has more than a plain LoRA of linear maps of this trunk; lists what.
        CheckpointError: a file is missing or damaged.
    """
    values = read_json(folder / CONFIG)
    state: dict[str, LazyTensor] = {}
    wrong = []
    for name, tensor in SafetensorsFile(folder / WEIGHTS).tensors.items():
        if name.startswith(PREFIX):
            state[name.removeprefix(PREFIX)] = tensor
        else:
            wrong.append(f"{name}: unknown, found {tensor.shape}")
    rank, alpha, scale_of = scales_from_json(values, str(folder / CONFIG))
    state, tensors = text_tensors(state), {}
    for theirs, shape, ours in _linear_maps(trunk):
        a, b = state.pop(theirs + _A, None), state.pop(theirs + _B, None)
        if a is None and b is None:
            continue
        if a is None or b is None or (*a.shape[1:], *b.shape) != (shape[1], shape[0], *a.shape[:1]) or not a.shape[0]:
            found = " and ".join("none" if x is None else str(x.shape) for x in (a, b))
            wrong.append(f"{theirs}: expected A (r, {shape[1]}) and B ({shape[0]}, r), found {found}")
            continue
        # One scale for all: that of this one is in its B.
        change = scale_of(theirs, a.shape[0]) / (alpha / rank)
        for name, part_a, part_b in _split(a.read(), b.read(), ours):
            tensors[name + OUR_A] = LazyTensor.of(part_a.astype(np.float32))
            tensors[name + OUR_B] = LazyTensor.of(part_b.astype(np.float32) * np.float32(change))
    wrong += [f"{name}: unknown, found {tensor.shape}" for name, tensor in state.items()]
    if wrong or not tensors:
        raise ConversionError(f"{folder / WEIGHTS}:\n" + "\n".join(wrong or ["no LoRA of this trunk"]))
    return Adapter(rank, alpha, tensors)


def write(folder: str | Path, trunk: TrunkConfig, config: LoRAConfig, tensors: Tensors) -> None:
    """Write a folder that PEFT loads; the inverse of `read`.

    Linear maps that are one in transformers get an A that has the rows of all their As, and a rank as large.

    Args:
        folder: new or empty.
        trunk: whose family names the tensors.
        config: rank, alpha and dropout.
        tensors: as in `Adapter`.

    Raises:
        ConversionError: the trunk's family is unknown.
        CheckpointError: `folder` has something in it.
    """
    state: dict[str, LazyTensor] = {}
    targets, ranks = set(), {}
    for theirs, shape, ours in _linear_maps(trunk):
        if not any(name + OUR_A in tensors for name in ours):
            continue
        module = theirs.rpartition(".")[2]
        targets.add(module)
        a, b = _join(tensors, shape, ours, config.rank)
        if len(a) != config.rank:
            ranks[module] = len(a)
        state[PREFIX + theirs + _A], state[PREFIX + theirs + _B] = LazyTensor.of(a), LazyTensor.of(b)
    values = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": None,
        "inference_mode": True,
        "r": config.rank,
        "lora_alpha": _plain(config.alpha),
        "lora_dropout": config.dropout,
        "target_modules": sorted(targets),
        "rank_pattern": ranks,
        "alpha_pattern": {module: _plain(config.alpha * rank / config.rank) for module, rank in ranks.items()},
        "bias": "none",
        "fan_in_fan_out": False,
        "use_rslora": False,
        "use_dora": False,
        "modules_to_save": None,
        "init_lora_weights": True,
    }
    with new_folder(folder) as partial:
        write_safetensors(partial / WEIGHTS, state)
        write_json(partial / CONFIG, values)


def is_lora(name: str) -> bool:
    """Whether one of our tensors belongs to a LoRA."""
    return name.endswith((OUR_A, OUR_B))


def merge(tensors: Tensors, scale: float) -> dict[str, LazyTensor]:
    """The tensors of a model without those of its LoRA, whose changes are in the weights.

    Args:
        tensors: of the model and of the LoRA, by our names.
        scale: alpha / rank.

    Returns:
        The model's; those that are changed are float32, and computed when they are read.
    """

    def merged(name: str) -> LazyTensor:
        weight, a, b = (tensors[name + suffix] for suffix in (".weight", OUR_A, OUR_B))

        def read() -> np.ndarray:
            return weight.read().astype(np.float32) + np.float32(scale) * np.tensordot(b.read(), a.read(), 1)

        return LazyTensor(weight.shape, np.dtype(np.float32), read)

    changed = [name.removesuffix(OUR_A) for name in tensors if name.endswith(OUR_A)]
    model = {name: tensor for name, tensor in tensors.items() if not is_lora(name)}
    return {**model, **{f"{name}.weight": merged(name) for name in changed}}


def _plain(number: float) -> float:
    """PEFT has whole numbers."""
    return int(number) if number == int(number) else number


def _linear_maps(trunk: TrunkConfig) -> Iterator[tuple[str, tuple[int, ...], dict[str, tuple[int, ...]]]]:
    """Linear maps of the trunk: transformers' name, shape [out, in], and the names and shapes of ours that it has."""
    for entry in trunk_table(trunk, 1):
        ((theirs, shape),) = entry.theirs.items()
        if theirs.startswith("model.layers.") and len(shape) == 2:
            yield (
                theirs.removesuffix(".weight"),
                shape,
                {name.removesuffix(".weight"): ours for name, ours in entry.ours.items()},
            )


@refuse_wrong_types
def scales_from_json(values: Mapping[str, Any], source: str) -> tuple[int, float, Callable[[str, int], float]]:
    """Rank, alpha, and what gives the scale of a linear map by its name and rank, from an `adapter_config.json`.

    Args:
        values: the content.
        source: the file's name, for errors.

    Raises:
        ConversionError: lists every key that asks for something else than a plain LoRA.
    """
    wrong = [
        f"{key}: expected {' or '.join(map(str, allowed))}, found {values.get(key)}"
        for key, allowed in _FIXED.items()
        if values.get(key) not in allowed
    ]
    rank, alpha = int(values["r"]), float(values["lora_alpha"])
    if not 1 <= rank <= MAX_SIZE:
        wrong.append(f"r: expected 1 to {MAX_SIZE}, found {rank}")
    alphas = {str(key): float(value) for key, value in (values.get("alpha_pattern") or {}).items()}
    # PEFT takes the names for regular expressions.
    wrong += [f"alpha_pattern: expected names, found {key}" for key in alphas if not re.fullmatch(r"[\w.]+", key)]
    wrong += [
        f"{key}: expected an alpha of {MIN_ALPHA} to {MAX_ALPHA}, found {value}"
        for key, value in {"lora_alpha": alpha, **alphas}.items()
        if not MIN_ALPHA <= value <= MAX_ALPHA
    ]
    if wrong:
        raise ConversionError(f"{source}:\n" + "\n".join(wrong))
    # Rank-stabilized LoRA (arXiv 2312.03732) has another scale and nothing else.
    root = bool(values.get("use_rslora"))

    def scale(name: str, rank: int) -> float:
        own = next((value for key, value in alphas.items() if f".{name}".endswith(f".{key}")), alpha)
        return own / (math.sqrt(rank) if root else rank)

    return rank, alpha * math.sqrt(rank) if root else alpha, scale


def _split(
    a: np.ndarray, b: np.ndarray, ours: Mapping[str, tuple[int, ...]]
) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
    """Our linear maps of one of theirs with their A and B, from A [r, in] and B [out, r]."""
    # All have the same inputs: what comes before in a shape, flattened, are the outputs.
    outs = {name: _outs(shape, a.shape[1]) for name, shape in ours.items()}
    parts = np.split(b, np.cumsum([math.prod(out) for out in outs.values()])[:-1])
    count = len(ours)
    columns = np.split(np.arange(len(a)), count) if len(a) % count == 0 else []
    # As `_join` makes them: each has its own rows of A, and B is 0 elsewhere.
    separate = bool(columns) and not any(
        np.delete(part, own, axis=1).any() for part, own in zip(parts, columns, strict=True)
    )
    for index, (name, shape) in enumerate(ours.items()):
        own_a, own_b = (a[columns[index]], parts[index][:, columns[index]]) if separate else (a, parts[index])
        if count == 1 or own_a.any():
            yield name, own_a.reshape(-1, *shape[len(outs[name]) :]), own_b.reshape(*outs[name], -1)


def _join(
    tensors: Tensors, shape: tuple[int, ...], ours: Mapping[str, tuple[int, ...]], rank: int
) -> tuple[np.ndarray, np.ndarray]:
    """A [r, in] and B [out, r] of one of their linear maps; the inverse of `_split`."""
    a = np.zeros((rank * len(ours), shape[1]), np.float32)
    b = np.zeros((shape[0], len(a)), np.float32)
    row = 0
    for index, (name, own) in enumerate(ours.items()):
        size = math.prod(_outs(own, shape[1]))
        if name + OUR_A in tensors:
            columns = slice(index * rank, (index + 1) * rank)
            a[columns] = tensors[name + OUR_A].read().reshape(rank, -1)
            b[row : row + size, columns] = tensors[name + OUR_B].read().reshape(size, rank)
        row += size
    return a, b


def _outs(shape: tuple[int, ...], inputs: int) -> tuple[int, ...]:
    """The axes of a weight [*out, *in] that are its outputs."""
    return next(shape[:axis] for axis in range(1, len(shape)) if math.prod(shape[axis:]) == inputs)
