"""Logical axes on meshes, and the same answers on eight devices as on one."""

from __future__ import annotations

import math
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from flax.traverse_util import flatten_dict
from jax.sharding import PartitionSpec

from omni_jax import sharding
from omni_jax.config.model import ModelConfig
from omni_jax.inference.engine import PreparedRequest
from omni_jax.inference.runner import ModelRunner
from omni_jax.model.omni import OmniModel
from omni_jax.tasks import Task
from tests.inference.reference_decoder import ReferenceDecoder, random_model, random_request, small_config
from tests.inference.test_engine import Answer, Recorder, assert_same, run
from tests.models import quick_compile


@pytest.fixture(autouse=True)
def _eight_devices() -> None:
    assert len(jax.devices()) == 8


def test_specs_follow_the_rules() -> None:
    mesh = sharding.make_mesh(2, 2, 2)
    assert mesh.shape == {"data": 2, "fsdp": 2, "tensor": 2}

    def spec(shape: tuple[int, ...], axes: tuple[str | None, ...]) -> PartitionSpec:
        return sharding.spec(shape, axes, mesh)

    assert spec((8, 6), ("vocab", "embed")) == PartitionSpec(("tensor",), ("fsdp",))
    assert spec((8, 6), ("batch", None)) == PartitionSpec(("data", "fsdp"), None)
    assert spec((3, 8, 6), ("heads", "embed")) == PartitionSpec(None, ("tensor",), ("fsdp",)), "stacked layers"
    assert spec((7, 6), ("vocab", "embed")) == PartitionSpec(None, ("fsdp",)), "7 rows do not divide by 2"
    assert spec((6,), (None,)) == PartitionSpec(None)


@pytest.mark.parametrize(
    ("environment", "metadata", "pod"),
    [
        # GKE says it in variables, Compute Engine in the metadata of the machine.
        ({"TPU_WORKER_HOSTNAMES": "a,b", "TPU_WORKER_ID": "1"}, {}, True),
        ({"TPU_WORKER_HOSTNAMES": "localhost", "TPU_WORKER_ID": "0"}, {}, False),
        ({}, {"agent-worker-number": "1", "worker-network-endpoints": "x:1:10.0.0.1,x:2:10.0.0.2"}, True),
        ({}, {"agent-worker-number": "0", "worker-network-endpoints": "x:1:10.0.0.1"}, False),
        (
            {"MEGASCALE_NUM_SLICES": "2", "MEGASCALE_SLICE_ID": "0"},
            {"agent-worker-number": "0", "worker-network-endpoints": "x:1:10.0.0.1"},
            True,
        ),
        ({}, {}, False),
    ],
)
def test_a_host_knows_whether_there_are_others(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], metadata: dict[str, str], pod: bool
) -> None:
    from jax._src.clusters import cloud_tpu_cluster

    for name in ("TPU_SKIP_MDS_QUERY", "TPU_PROCESS_ADDRESSES"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(cloud_tpu_cluster, "running_in_cloud_tpu_vm", True)
    monkeypatch.setattr(
        cloud_tpu_cluster, "get_metadata", lambda key: (metadata.get(key, ""), 200 if key in metadata else 404)
    )
    assert sharding.on_pod() == pod


def test_one_device_is_a_mesh_of_one() -> None:
    mesh = sharding.make_mesh()
    assert mesh.size == 1
    assert sharding.spec((8, 6), ("vocab", "embed"), mesh) == PartitionSpec(None, None)


def test_wrong_axes_are_named() -> None:
    mesh = sharding.make_mesh(2, 2, 2)
    with pytest.raises(ValueError, match="'embde' has no rule"):
        sharding.spec((8,), ("embde",), mesh)
    with pytest.raises(ValueError, match="has 3 axes, expected 1"):
        sharding.spec((8, 8, 8), ("embed",), mesh)
    with pytest.raises(ValueError, match="needs 16 devices, found 8"):
        sharding.make_mesh(4, 2, 2)


def test_rows_and_replicas() -> None:
    mesh = sharding.make_mesh(2, 2, 2)
    assert mesh.size == 8
    x = jax.device_put(np.zeros((8, 3)), sharding.rows(mesh))
    assert {shard.data.shape for shard in x.addressable_shards} == {(2, 3)}
    x = jax.device_put(np.zeros((8, 3)), sharding.replicated(mesh))
    assert {shard.data.shape for shard in x.addressable_shards} == {(8, 3)}


def test_where_an_array_lives() -> None:
    mesh = sharding.make_mesh(2, 2, 2)
    alone = sharding.make_mesh(devices=jax.devices()[:1])
    assert sharding.of_array(jnp.zeros(4)) == alone
    assert sharding.of_array(jax.device_put(np.zeros(4), sharding.replicated(alone))) == alone
    assert sharding.of_array(jax.device_put(np.zeros(4), sharding.rows(mesh))) == mesh


def placed(model: OmniModel, mesh: jax.sharding.Mesh) -> OmniModel:
    graph, state = nnx.split(model)
    return nnx.merge(graph, jax.device_put(nnx.to_pure_dict(state), sharding.of_state(state, mesh)))


def config(**more: Any) -> ModelConfig:
    """Heads, kv heads and tables that divide by 8."""
    return small_config(num_heads=8, num_kv_heads=8, head_dim=4, text=42, text_specials=6, audio_specials=12, **more)


@pytest.mark.parametrize("stacked", [False, True])
def test_every_matrix_is_cut(stacked: bool) -> None:
    mesh = sharding.make_mesh(1, 4, 2)
    make = partial(OmniModel, config(tts_adapter_layers=1), stacked=stacked, dtype=jnp.float32)
    state = nnx.state(nnx.eval_shape(lambda: make(rngs=nnx.Rngs(0))))
    places = flatten_dict(sharding.of_state(state, mesh))
    shares = {}
    for path, leaf in nnx.to_flat_state(state):
        name = ".".join(map(str, path))
        shares[name] = math.prod(places[path].shard_shape(leaf.shape)) / math.prod(leaf.shape)
        if leaf.ndim - (stacked and "layers" in path) >= 2 and "bias" not in name:
            # Whisper's convolutions are small and have no heads or ffn to cut.
            assert shares[name] == 1 / 4 if "conv" in name else shares[name] == 1 / 8, name
    assert shares["embed.text"] == shares["embed.audio"] == shares["tts_adapter.head"] == 1 / 8


def spread_over(array: jax.Array) -> int:
    """Into how many different parts an array is cut."""
    return len({tuple((part.start, part.stop) for part in shard.index) for shard in array.addressable_shards})


@cache
def case(stacked: bool) -> tuple[OmniModel, list[PreparedRequest], list[Answer]]:
    """A model, requests of several kinds that nothing but their limit ends, and the slow decoder's answers."""
    model = random_model(config(tts_adapter_layers=0 if stacked else 1), stacked=stacked, seed=1, eot=0, eoa=0)
    asks: list[tuple[Task, dict[str, Any]]] = [
        (Task.A1A2, {"temperature": 1.0, "seed": 3}),
        (Task.A1T2, {"temperature": 0.8, "top_k": 5, "top_p": 0.9}),
        (Task.A1A2, {}),
        (Task.T1A2, {}),
    ]
    requests = [
        random_request(model.config, task, i, max_steps=14, **settings) for i, (task, settings) in enumerate(asks)
    ]
    with quick_compile():
        alone = ModelRunner(model)
        slow = ReferenceDecoder(model, partial(alone.hear, alone.weights))
        expected = [slow(request) for request in requests]
    assert all(tokens.shape[1] == 14 for tokens, _ in expected)
    return model, requests, expected


@pytest.mark.parametrize(
    ("sizes", "stacked"),
    [
        pytest.param((2, 2, 2), False, marks=pytest.mark.slow),
        ((8, 1, 1), False),
        ((1, 4, 2), True),
        ((1, 1, 8), True),
    ],
)
def test_a_mesh_gives_the_same_tokens(sizes: tuple[int, int, int], stacked: bool) -> None:
    """A mixed batch on eight devices, against the slow decoder on one."""
    model, requests, expected = case(stacked)
    programs = Recorder(ModelRunner(placed(model, sharding.make_mesh(*sizes))))
    slots = 8 if sizes[0] == 8 else 4
    if sizes[0] != 2:
        requests, expected = requests[:3], expected[:3]
    with quick_compile():
        assert_same(run(programs, requests, slots, 5), expected)
    # What comes back from a chunk lies as what went in, or the next one would be compiled anew.
    assert programs.chunked._cache_size() == len(set(programs.sizes))

    assert spread_over(programs.weights["embed"]["text"]) == sizes[1] * sizes[2]
    state, rows, heads = programs.engine.state, sizes[0] * sizes[1], sizes[2]
    assert set(state.caches) == ({"trunk"} if stacked else {"trunk", "tts_adapter"})
    for leaf in jax.tree.leaves(state.caches):
        assert spread_over(leaf) == rows * heads
        assert leaf.addressable_shards[0].data.size * rows * heads == leaf.size
    assert spread_over(state.tokens) == spread_over(state.positions) == rows
