"""Where arrays live: logical axis names to mesh axes. The only file that names a mesh axis.

Every parameter carries logical names for its axes (see `omni_jax.model.layers.param`). `RULES` maps them to the
mesh `data` x `fsdp` x `tensor`; the compiler does the rest. One device is a mesh of one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax
from flax import nnx

# What `jax.distributed.initialize` asks, too; nothing public says whether it would find anybody.
from jax._src.clusters import cloud_tpu_cluster
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from omni_jax.config import ConfigError

AXES = ("data", "fsdp", "tensor")

RULES: dict[str, tuple[str, ...]] = {
    # Rows of a batch share nothing: spread them over every device that does not split a row.
    "batch": ("data", "fsdp"),
    # Rows just looked up in tables that are cut along the width.
    "looked_up": ("data",),
    # The width of the residual stream is what FSDP cuts weights along: gathered layer by layer, just in time.
    "embed": ("fsdp",),
    "ear_embed": ("fsdp",),
    # Megatron's cut: heads and ffn columns are independent up to the product that sums them again.
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "ffn": ("tensor",),
    "ear_heads": ("tensor",),
    "ear_ffn": ("tensor",),
    # Rows of the tables: each device looks up and scores its own share of the vocabulary.
    "vocab": ("tensor",),
    # Stacked layers stay whole on every device: a scan takes them one by one.
    "layers": (),
    "mels": (),
}


def on_pod() -> bool:
    """Whether this host is one of several of TPU slices, which `jax.distributed` then sets up by itself.

    On GKE the hosts are told of each other by environment variables, on Compute Engine by its metadata server.
    """
    clusters = (cloud_tpu_cluster.GkeTpuCluster, cloud_tpu_cluster.GceTpuCluster)
    return any(cluster.is_env_present() and cluster.get_process_count() > 1 for cluster in clusters)


def make_mesh(data: int = 1, fsdp: int = 1, tensor: int = 1, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh over data * fsdp * tensor devices, partitioned automatically.

    Args:
        data: ways to split the batch.
        fsdp: ways to split the batch and the parameters.
        tensor: ways to split every product.
        devices: to take the first of; None: those of this process's backend.

    Several slices, which are connected by a slower network, divide the batch.

    Raises:
        ConfigError: there are not that many devices, or `data` does not divide over the slices.
    """
    sizes = (data, fsdp, tensor)
    devices = jax.devices() if devices is None else devices
    if math.prod(sizes) > len(devices):
        raise ConfigError(
            f"mesh data={data} fsdp={fsdp} tensor={tensor} needs {math.prod(sizes)} devices, found {len(devices)}"
        )
    devices = devices[: math.prod(sizes)]
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    # Eight ways of a torus of 4 x 4 x 4 cut one of its axes in two.
    if slices == 1:
        grid = mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
    elif data % slices:
        raise ConfigError(f"mesh: expected data to be a multiple of the {slices} slices, found {data}")
    else:
        inside, across = (data // slices, fsdp, tensor), (slices, 1, 1)
        grid = mesh_utils.create_hybrid_device_mesh(inside, across, devices, allow_split_physical_axes=True)
    return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def spec(shape: Sequence[int], axes: Sequence[str | None], mesh: Mesh) -> PartitionSpec:
    """How an array with these logical axes lies on a mesh; an axis that does not divide evenly stays whole.

    A parameter of stacked layers has one more axis than names, in front.

    Raises:
        ValueError: the names do not fit the shape, or one has no rule.
    """
    if len(shape) == len(axes) + 1:
        axes = ("layers", *axes)
    if len(shape) != len(axes):
        raise ValueError(f"shape {tuple(shape)} has {len(shape)} axes, expected {len(axes)}: {tuple(axes)}")
    parts: list[tuple[str, ...] | None] = []
    for size, name in zip(shape, axes, strict=True):
        if name is not None and name not in RULES:
            raise ValueError(f"logical axis {name!r} has no rule; expected one of {sorted(RULES)}")
        cut = ways(name, mesh) if name else 1
        parts.append(RULES[name] if name and cut > 1 and size % cut == 0 else None)
    return PartitionSpec(*parts)


def ways(name: str, mesh: Mesh | None) -> int:
    """Into how many parts a mesh, if there is one, cuts a logical axis that divides evenly."""
    return 1 if mesh is None else math.prod(mesh.shape[axis] for axis in RULES[name])


def of_state(state: Any, mesh: Mesh) -> Any:
    """The sharding of every parameter of an abstract or real NNX state, as a plain nested dict."""
    shardings = nnx.map_state(lambda _, v: NamedSharding(mesh, spec(v.shape, v.axes, mesh)), state)
    return nnx.to_pure_dict(shardings)


def of_array(array: jax.Array) -> Mesh:
    """The mesh an array is spread over; of a single device for one that lives on it."""
    place = array.sharding
    if isinstance(place, NamedSharding) and isinstance(place.mesh, Mesh):
        return place.mesh
    return make_mesh(devices=list(place.device_set))


def constrain(array: jax.Array, axes: Sequence[str | None], mesh: Mesh | None) -> jax.Array:
    """Inside a jitted function, settle how an array with these logical axes lies on a mesh, if there is one.

    See `spec`. Left alone, the compiler keeps weights where they are and sends activations around instead, many times
    as many bytes.
    """
    if mesh is None or mesh.size == 1:
        return array
    return jax.lax.with_sharding_constraint(array, NamedSharding(mesh, spec(array.shape, axes, mesh)))


def by_rows(array: jax.Array, mesh: Mesh | None) -> jax.Array:
    """`constrain` for an array whose first axis is the batch, every row whole on its devices."""
    return constrain(array, ("batch", *[None] * (array.ndim - 1)), mesh)


def rows(mesh: Mesh) -> NamedSharding:
    """An array whose first axis is the batch."""
    return NamedSharding(mesh, PartitionSpec(RULES["batch"]))


def replicated(mesh: Mesh) -> NamedSharding:
    """The whole array on every device."""
    return NamedSharding(mesh, PartitionSpec())
