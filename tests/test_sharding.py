"""Logical axes on meshes, and the same answers on eight devices as on one."""

from __future__ import annotations

import dataclasses
import logging
import math
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache, partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
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
from omni_jax.errors import ConfigError
from omni_jax.inference.decode import DecodeState, Routing
from omni_jax.inference.engine import Engine, PreparedRequest
from omni_jax.inference.runner import ModelRunner, jitted_functions
from omni_jax.model.omni import OmniModel
from omni_jax.prompts import after_history, make_history
from omni_jax.tasks import Task
from omni_jax.vocab import Vocab
from tests.inference.reference_decoder import CONTEXT, ReferenceDecoder, random_model, random_request, small_config
from tests.models import quick_compile

Answer = tuple[np.ndarray, str]
"""Tokens int32 [8, steps] and the finish reason."""


@pytest.fixture(autouse=True)
def _eight_devices() -> None:
    assert len(jax.devices()) == 8


def test_spec_follows_rules() -> None:
    mesh = sharding.make_mesh(2, 2, 2)
    assert mesh.shape == {"data": 2, "fsdp": 2, "tensor": 2}

    def spec(shape: tuple[int, ...], axes: tuple[str | None, ...]) -> PartitionSpec:
        return sharding.spec(shape, axes, mesh)

    assert spec((8, 6), ("vocab", "embed")) == PartitionSpec(("tensor",), ("fsdp",))
    assert spec((8, 6), ("batch", None)) == PartitionSpec(("data", "fsdp"), None)
    assert spec((3, 8, 6), ("layers", "heads", "embed")) == PartitionSpec(None, ("tensor",), ("fsdp",))
    assert spec((7, 6), ("vocab", "embed")) == PartitionSpec(None, ("fsdp",)), "7 rows do not divide by 2"
    assert spec((6,), (None,)) == PartitionSpec(None)


@contextmanager
def fake_metadata_server(attributes: dict[str, str]) -> Iterator[str]:
    """Serves attributes of the machine as Compute Engine does; yields the server's address."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            folder, _, name = self.path.rpartition("/")
            found = folder == "/computeMetadata/v1/instance/attributes" and name in attributes
            self.send_response(200 if found and self.headers["Metadata-Flavor"] == "Google" else 404)
            self.end_headers()
            if found:
                self.wfile.write(attributes[name].encode())

        def log_message(self, *_: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


WORKER_1_OF_2 = {"agent-worker-number": "1", "worker-network-endpoints": "x:1:10.0.0.1,x:2:10.0.0.2"}
WORKER_0_OF_1 = {"agent-worker-number": "0", "worker-network-endpoints": "x:1:10.0.0.1"}


@pytest.mark.parametrize(
    ("environ", "attributes", "expected"),
    [
        # Kubernetes Engine sets variables, Compute Engine has a metadata server.
        ({"TPU_WORKER_HOSTNAMES": "a,b", "TPU_WORKER_ID": "1"}, {}, True),
        ({"TPU_WORKER_HOSTNAMES": "localhost", "TPU_WORKER_ID": "0"}, {}, False),
        ({"TPU_WORKER_HOSTNAMES": "a", "TPU_PROCESS_ADDRESSES": "a:1,a:2", "TPU_WORKER_ID": "1"}, {}, True),
        ({"TPU_WORKER_HOSTNAMES": "a", "TPU_WORKER_ID": "0", "MEGASCALE_NUM_SLICES": "2"}, {}, True),
        ({}, WORKER_1_OF_2, True),
        ({}, {**WORKER_1_OF_2, "worker-network-endpoints": "a,b"}, True),
        ({}, WORKER_0_OF_1, False),
        ({"MEGASCALE_NUM_SLICES": "2", "MEGASCALE_SLICE_ID": "0"}, WORKER_0_OF_1, True),
        ({}, {**WORKER_0_OF_1, "tpu-env": "ZONE: 'a'\nMEGASCALE_NUM_SLICES: '2'\nMEGASCALE_SLICE_ID: '0'"}, True),
        ({"TPU_SKIP_MDS_QUERY": "1"}, WORKER_1_OF_2, False),
        ({}, {}, False),
    ],
)
# JAX's own, in Python 3.13.
@pytest.mark.filterwarnings("ignore:'maxsplit' is passed as positional argument:DeprecationWarning")
def test_on_pod(
    environ: dict[str, str],
    attributes: dict[str, str],
    expected: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "accel0").touch()
    with fake_metadata_server(attributes) as server:
        assert sharding.on_pod(environ, tmp_path, server) == expected

    # What `jax.distributed.initialize` would find; only JAX's private code says so without connecting.
    from jax._src.clusters import cloud_tpu_cluster

    for name in ("TPU_SKIP_MDS_QUERY", "TPU_PROCESS_ADDRESSES", "TPU_WORKER_HOSTNAMES"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(cloud_tpu_cluster, "running_in_cloud_tpu_vm", True)
    monkeypatch.setattr(
        cloud_tpu_cluster, "get_metadata", lambda key: (attributes.get(key, ""), 200 if key in attributes else 404)
    )
    clusters = (cloud_tpu_cluster.GkeTpuCluster, cloud_tpu_cluster.GceTpuCluster)
    assert any(cluster.is_env_present() and cluster.get_process_count() > 1 for cluster in clusters) == expected


def test_on_pod_queries_only_where_a_tpu_is(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with fake_metadata_server(WORKER_1_OF_2) as server:
        assert not sharding.on_pod({}, tmp_path, server)
        assert not sharding.on_pod({"TPU_WORKER_HOSTNAMES": "a,b"}, tmp_path, server)
        (tmp_path / "vfio").mkdir()
        assert sharding.on_pod({}, tmp_path, server)
    # The server is gone.
    with caplog.at_level(logging.WARNING):
        assert not sharding.on_pod({}, tmp_path, server)
    assert f"no metadata server at {server}" in caplog.text


def test_make_mesh_of_one_device() -> None:
    mesh = sharding.make_mesh()
    assert mesh.size == 1
    assert sharding.spec((8, 6), ("vocab", "embed"), mesh) == PartitionSpec(None, None)


def test_spec_and_make_mesh_refuse() -> None:
    mesh = sharding.make_mesh(2, 2, 2)
    with pytest.raises(ValueError, match="'embde' has no rule"):
        sharding.spec((8,), ("embde",), mesh)
    with pytest.raises(ValueError, match="has 3 axes, expected 1"):
        sharding.spec((8, 8, 8), ("embed",), mesh)
    with pytest.raises(ConfigError, match="needs 16 devices, found 8"):
        sharding.make_mesh(4, 2, 2)


def test_rows_and_replicated() -> None:
    mesh = sharding.make_mesh(2, 2, 2)
    assert mesh.size == 8
    x = jax.device_put(np.zeros((8, 3)), sharding.rows(mesh))
    assert {shard.data.shape for shard in x.addressable_shards} == {(2, 3)}
    x = jax.device_put(np.zeros((8, 3)), sharding.replicated(mesh))
    assert {shard.data.shape for shard in x.addressable_shards} == {(8, 3)}


def test_mesh_of_array() -> None:
    mesh = sharding.make_mesh(2, 2, 2)
    alone = sharding.make_mesh(devices=jax.devices()[:1])
    assert sharding.mesh_of(jnp.zeros(4)) == alone
    assert sharding.mesh_of(jax.device_put(np.zeros(4), sharding.replicated(alone))) == alone
    assert sharding.mesh_of(jax.device_put(np.zeros(4), sharding.rows(mesh))) == mesh


def test_num_shards_and_platform_of_ambient_mesh() -> None:
    mesh = sharding.make_mesh(2, 2, 2)
    assert (sharding.num_shards("batch"), sharding.num_shards("vocab"), sharding.platform()) == (1, 1, None)
    assert (sharding.num_shards("batch", mesh), sharding.num_shards("vocab", mesh)) == (4, 2)
    with jax.set_mesh(mesh):
        assert (sharding.num_shards("batch"), sharding.num_shards("vocab"), sharding.platform()) == (4, 2, "cpu")


def test_constrain_shards_over_ambient_mesh() -> None:
    x, mesh = jnp.zeros((8, 6)), sharding.make_mesh(2, 2, 2)

    # Functions of their own: a trace is kept with the mesh that it was made in.
    def shards(function: Any) -> set[tuple[int, ...]]:
        return {shard.data.shape for shard in jax.jit(function)(x).addressable_shards}

    assert shards(lambda x: sharding.constrain_rows(x)) == {(8, 6)}
    with jax.set_mesh(mesh):
        assert shards(lambda x: sharding.constrain_rows(x)) == {(2, 6)}
        assert shards(lambda x: sharding.constrain(x, ("vocab", "embed"))) == {(4, 3)}


def shard_model(model: OmniModel, mesh: jax.sharding.Mesh) -> OmniModel:
    graph, state = nnx.split(model)
    return nnx.merge(graph, jax.device_put(nnx.to_pure_dict(state), sharding.of_state(state, mesh)))


def divisible_config(**changes: Any) -> ModelConfig:
    """Heads, kv heads and tables that divide by 8."""
    return small_config(num_heads=8, num_kv_heads=8, head_dim=4, text=42, text_specials=6, audio_specials=12, **changes)


@pytest.mark.parametrize("stacked", [False, True])
def test_of_state_splits_every_matrix(stacked: bool) -> None:
    mesh = sharding.make_mesh(1, 4, 2)
    make = partial(OmniModel, divisible_config(tts_adapter_layers=1), stacked=stacked, dtype=jnp.float32)
    state = nnx.state(nnx.eval_shape(lambda: make(rngs=nnx.Rngs(0))))
    shardings = flatten_dict(sharding.of_state(state, mesh))
    fractions = {}
    for path, leaf in nnx.to_flat_state(state):
        name = ".".join(map(str, path))
        fractions[name] = math.prod(shardings[path].shard_shape(leaf.shape)) / math.prod(leaf.shape)
        if leaf.ndim - (stacked and "layers" in path) >= 2 and path[-1] not in ("bias", "positions"):
            # Whisper's convolutions are small and have no heads or intermediate size to split.
            assert fractions[name] == (1 / 4 if "conv" in name else 1 / 8), name
    assert fractions["embed.text"] == fractions["embed.audio"] == fractions["tts_adapter.head"] == 1 / 8


def num_distinct_shards(array: jax.Array) -> int:
    return len({tuple((part.start, part.stop) for part in shard.index) for shard in array.addressable_shards})


@cache
def case(stacked: bool) -> tuple[OmniModel, list[PreparedRequest], list[Answer]]:
    """A model, requests of several tasks that only their limit ends, and the reference decoder's answers."""
    config = divisible_config(tts_adapter_layers=0 if stacked else 1)
    model = random_model(config, stacked=stacked, seed=1, eot=0, eoa=0)
    settings: list[tuple[Task, dict[str, Any]]] = [
        (Task.A1A2, {"temperature": 1.0, "seed": 3}),
        (Task.A1T2, {"temperature": 0.8, "top_k": 5, "top_p": 0.9}),
        (Task.A1A2, {}),
        (Task.T1A2, {}),
    ]
    requests = [
        random_request(model.config, task, i, max_steps=14, **options) for i, (task, options) in enumerate(settings)
    ]
    with quick_compile():
        runner = ModelRunner(model)
        reference = ReferenceDecoder(model, lambda audio: runner.encode_audio(jnp.asarray(audio)))
        expected = [reference(request) for request in requests]
    assert all(tokens.shape[1] == 14 for tokens, _ in expected)
    return model, requests, expected


class RecordingRunner(ModelRunner):
    """Keeps the routing sizes of each chunk."""

    def __init__(self, model: OmniModel):
        super().__init__(model)
        self.sizes: list[tuple[int, int, int]] = []

    def decode_chunk(
        self, state: DecodeState, routing: Routing, steps: jax.Array
    ) -> tuple[DecodeState, jax.Array, jax.Array]:
        self.sizes.append(routing.sizes)
        return super().decode_chunk(state, routing, steps)


def run(engine: Engine, requests: list[PreparedRequest], steps: int) -> list[Answer]:
    for key, request in enumerate(requests):
        engine.submit(key, request)
    tokens: list[list[np.ndarray]] = [[] for _ in requests]
    finish: dict[int, str] = {}
    while engine.busy:
        for progress in engine.advance(steps):
            tokens[progress.key].append(progress.tokens)
            if progress.finish:
                finish[progress.key] = progress.finish
    return [(np.concatenate(parts, axis=1), finish[key]) for key, parts in enumerate(tokens)]


@pytest.mark.parametrize(
    ("sizes", "stacked"),
    [
        pytest.param((2, 2, 2), False, marks=pytest.mark.slow),
        pytest.param((8, 1, 1), False, marks=pytest.mark.slow),
        ((1, 4, 2), True),
        pytest.param((1, 1, 8), True, marks=pytest.mark.slow),
    ],
)
def test_engine_on_mesh_gives_the_same_tokens(sizes: tuple[int, int, int], stacked: bool) -> None:
    """A mixed batch on eight devices, against the reference decoder on one."""
    model, requests, expected = case(stacked)
    jitted_functions.cache_clear()
    runner = RecordingRunner(shard_model(model, sharding.make_mesh(*sizes)))
    if sizes[0] != 2:
        requests, expected = requests[:3], expected[:3]
    with quick_compile():
        engine = Engine(runner, 8 if sizes[0] == 8 else 4, CONTEXT)
        engine.warm_up()
        answers = run(engine, requests, 5)
    for (tokens, finish), (expected_tokens, expected_finish) in zip(answers, expected, strict=True):
        assert tokens.dtype == np.int32
        np.testing.assert_array_equal(tokens, expected_tokens)
        assert finish == expected_finish
    # A chunk returns its state sharded as it got it, or the next one would be compiled again.
    assert runner.jitted.decode_chunk._cache_size() == len(set(runner.sizes))

    assert num_distinct_shards(runner.weights["embed"]["text"]) == sizes[1] * sizes[2]
    state, rows, heads = engine.state, sizes[0] * sizes[1], sizes[2]
    assert set(state.caches) == ({"trunk"} if stacked else {"trunk", "tts_adapter"})
    for leaf in jax.tree.leaves(state.caches):
        assert num_distinct_shards(leaf) == rows * heads
        assert leaf.addressable_shards[0].data.size * rows * heads == leaf.size
    assert num_distinct_shards(state.tokens) == num_distinct_shards(state.positions) == rows


def test_pages_are_divided_over_devices_as_the_batch_slots_are() -> None:
    """Eight pages divide by four; three batch slots do not."""
    model, *_ = case(stacked=True)
    runner = ModelRunner(shard_model(model, sharding.make_mesh(1, 4, 2)))
    for slots, groups in ((4, 4), (3, 1)):
        assert runner.row_groups(slots) == groups
        state = runner.init_state(slots, 8, CONTEXT)
        assert {num_distinct_shards(leaf) for leaf in jax.tree.leaves(state.caches)} == {groups * 2}
        assert num_distinct_shards(state.positions) == groups


@pytest.mark.slow
@pytest.mark.parametrize("stacked", [False, True])
def test_histories_are_reused_on_a_mesh(stacked: bool) -> None:
    """The second turn attends to keys and values that are split over eight devices again."""
    model, requests, _ = case(stacked)
    vocab = Vocab(model.config.vocab)
    turns = [([1, 2], [3]), ([4], [5, 6])]

    def turn(number: int) -> PreparedRequest:
        (part,) = requests[number].parts
        prompt = after_history(make_history([], turns[: number + 1], CONTEXT, vocab), part.prompt)
        return dataclasses.replace(requests[number], parts=(dataclasses.replace(part, prompt=prompt),))

    with quick_compile():
        single = ModelRunner(model)
        expected = [run(Engine(single, 1, CONTEXT), [turn(number)], 5) for number in range(2)]
        engine = Engine(ModelRunner(shard_model(model, sharding.make_mesh(1, 4, 2))), 4, CONTEXT)
        for number in range(2):
            found = engine.prefixes.find(turn(number).prompt.history)
            assert (found is not None) == (number == 1)
            ((tokens, finish),) = run(engine, [turn(number)], 5)
            np.testing.assert_array_equal(tokens, expected[number][0][0])
            assert finish == expected[number][0][1]
