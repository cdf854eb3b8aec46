"""Sharding rules: logical axis names to mesh axes. The only file that names a mesh axis.

Every parameter carries logical names for its axes (see `omni_jax.model.layers.param`). `RULES` maps them to the
mesh `data` x `fsdp` x `tensor`; the compiler does the rest. One device is a mesh of one.

The mesh is ambient: programs are traced and run within `jax.set_mesh(mesh)`, and the model asks for it with
`jax.sharding.get_abstract_mesh()`. Without one, nothing is constrained.
"""

from __future__ import annotations

import logging
import math
import os
import re
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from omni_jax.errors import ConfigError

logger = logging.getLogger(__name__)

AXES = ("data", "fsdp", "tensor")

RULES: dict[str, tuple[str, ...]] = {
    # Rows of a batch are independent: split them over every device that does not split a row.
    "batch": ("data", "fsdp"),
    # Rows just looked up in embedding tables, which are split along the hidden dimension.
    "looked_up": ("data",),
    # FSDP splits weights along the hidden dimension and gathers them layer by layer, just in time.
    "embed": ("fsdp",),
    "encoder_embed": ("fsdp",),
    # Megatron's split: heads and MLP columns are independent up to the product that sums them again.
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "mlp": ("tensor",),
    "encoder_heads": ("tensor",),
    "encoder_mlp": ("tensor",),
    # Rows of the embedding and head tables: each device looks up and scores its own share of the vocabulary.
    "vocab": ("tensor",),
    # Stacked layers stay whole on every device: a scan takes them one by one.
    "layers": (),
    "mels": (),
}


def on_pod(
    environ: Mapping[str, str] = os.environ,
    device_folder: Path = Path("/dev"),
    metadata_server: str = "http://metadata.google.internal",
) -> bool:
    """Whether this host is one of several hosts of TPU slices, which `jax.distributed.initialize()` connects by itself.

    Kubernetes Engine lists the hosts in environment variables, Compute Engine on the machine's metadata server
    (https://cloud.google.com/compute/docs/metadata/querying-metadata).

    Args:
        environ: the environment variables.
        device_folder: has device nodes of the TPU chips, if there are any.
        metadata_server: asked only if there are, and no variable lists the hosts.
    """
    if not any(device_folder.glob("accel*")) and not (device_folder / "vfio").exists():
        return False
    hosts = environ.get("TPU_PROCESS_ADDRESSES", environ.get("TPU_WORKER_HOSTNAMES"))
    num_slices = environ.get("MEGASCALE_NUM_SLICES")
    # JAX sets TPU_SKIP_MDS_QUERY where it finds no chip.
    if hosts is None and "TPU_SKIP_MDS_QUERY" not in environ:
        hosts = _instance_attribute(metadata_server, "worker-network-endpoints")
        if hosts is not None and num_slices is None:
            variables = _instance_attribute(metadata_server, "tpu-env") or ""
            found = re.search(r"^MEGASCALE_NUM_SLICES: *'?(\d+)", variables, re.MULTILINE)
            num_slices = found[1] if found else None
    return hosts is not None and len(hosts.split(",")) * int(num_slices or 1) > 1


def _instance_attribute(metadata_server: str, name: str) -> str | None:
    """An attribute of this machine; None if it has none of that name."""
    address = f"{metadata_server}/computeMetadata/v1/instance/attributes/{name}"
    request = urllib.request.Request(address, headers={"Metadata-Flavor": "Google"})
    # The server is on the machine's own network, behind no proxy.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(request, timeout=2) as response:
            text: str = response.read().decode()
            return text
    except urllib.error.HTTPError:
        return None
    except OSError as error:
        logger.warning("no metadata server at %s (%s): assuming a single host", metadata_server, error)
        return None


def default_layout(platform: str | None = None) -> tuple[bool, Any]:
    """How weights are kept on a platform, by default this backend: (stacked layers, dtype). The one place to decide it.

    CPU: one array per layer, float32 (bfloat16 is ten times slower there). Elsewhere: stacked, bfloat16.
    """
    return (False, jnp.float32) if (platform or jax.default_backend()) == "cpu" else (True, jnp.bfloat16)


def make_mesh(data: int = 1, fsdp: int = 1, tensor: int = 1, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh over data * fsdp * tensor devices, partitioned automatically.

    Several slices, which are connected by a slower network, divide the batch.

    Args:
        data: ways to split the batch.
        fsdp: ways to split the batch and the parameters.
        tensor: ways to split every product.
        devices: to take the first of; None: those of this process's backend.

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
    # Eight ways of a torus of 4 x 4 x 4 split one of its axes in two.
    if slices == 1:
        grid = mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
    elif data % slices:
        raise ConfigError(f"mesh: expected data to be a multiple of the {slices} slices, found {data}")
    else:
        inside, across = (data // slices, fsdp, tensor), (slices, 1, 1)
        grid = mesh_utils.create_hybrid_device_mesh(inside, across, devices, allow_split_physical_axes=True)
    return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def spec(shape: Sequence[int], axes: Sequence[str | None], mesh: Mesh | AbstractMesh) -> PartitionSpec:
    """The partition of an array with these logical axes; an axis that does not divide evenly stays whole.

    Raises:
        ValueError: the names do not fit the shape, or one has no rule.
    """
    if len(shape) != len(axes):
        raise ValueError(f"shape {tuple(shape)} has {len(shape)} axes, expected {len(axes)}: {tuple(axes)}")
    parts: list[tuple[str, ...] | None] = []
    for size, name in zip(shape, axes, strict=True):
        if name is not None and name not in RULES:
            raise ValueError(f"logical axis {name!r} has no rule; expected one of {sorted(RULES)}")
        shards = num_shards(name, mesh) if name else 1
        parts.append(RULES[name] if name and shards > 1 and size % shards == 0 else None)
    return PartitionSpec(*parts)


def num_shards(name: str, mesh: Mesh | AbstractMesh | None = None) -> int:
    """Into how many shards a mesh, by default the ambient one, splits a logical axis that divides evenly."""
    mesh = jax.sharding.get_abstract_mesh() if mesh is None else mesh
    return 1 if mesh.empty else math.prod(mesh.shape[axis] for axis in RULES[name])


def of_state(state: Any, mesh: Mesh) -> Any:
    """The sharding of every parameter of an abstract or real NNX state, as a plain nested dict."""
    shardings = nnx.map_state(lambda _, v: NamedSharding(mesh, spec(v.shape, v.axes, mesh)), state)
    return nnx.to_pure_dict(shardings)


def abstract(shapes: Any, shardings: Any) -> Any:
    """A tree of `jax.ShapeDtypeStruct` with the shapes and dtypes of one tree and the shardings of another."""
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings)


def mesh_of(array: jax.Array) -> Mesh:
    """The mesh an array is sharded over; a mesh of one device for an array that lives on one."""
    sharding = array.sharding
    if isinstance(sharding, NamedSharding) and isinstance(sharding.mesh, Mesh):
        return sharding.mesh
    return make_mesh(devices=list(sharding.device_set))


def platform() -> str | None:
    """`cpu`, `tpu` or `gpu`: what the ambient mesh is made of; None without one."""
    mesh = jax.sharding.get_abstract_mesh()
    return None if mesh.empty else mesh.abstract_device.platform


def constrain(array: jax.Array, axes: Sequence[str | None]) -> jax.Array:
    """Inside a jitted function, fix how an array with these logical axes is sharded over the ambient mesh, if any.

    Without constraints the compiler keeps weights where they are and sends activations around instead, many times
    as many bytes.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.size <= 1:
        return array
    return jax.lax.with_sharding_constraint(array, spec(array.shape, axes, mesh))


def constrain_rows(array: jax.Array) -> jax.Array:
    """`constrain` for an array whose first axis is the batch, every row whole on its devices."""
    return constrain(array, ("batch", *[None] * (array.ndim - 1)))


def rows(mesh: Mesh) -> NamedSharding:
    """The sharding of an array whose first axis is the batch."""
    return NamedSharding(mesh, PartitionSpec(RULES["batch"]))


def replicated(mesh: Mesh) -> NamedSharding:
    """The whole array on every device."""
    return NamedSharding(mesh, PartitionSpec())
