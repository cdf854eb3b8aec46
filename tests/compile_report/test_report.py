"""What the real TPU compiler says of small programs."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from omni_jax.compile_report.report import Report, examine
from omni_jax.compile_report.topology import Topology
from omni_jax.config.load import load_config
from omni_jax.config.run import RunConfig
from omni_jax.errors import ConfigError
from omni_jax.hardware import CHIPS
from omni_jax.sharding import make_mesh

ROOT = Path(__file__).parents[2]
ONE = "v5e:1x1"


def test_topologies() -> None:
    found = Topology.parse("v5p:4x4x4")
    assert (found.chips, found.chip) == (64, CHIPS["v5p"])
    assert [len(Topology.parse(name).devices()) for name in (ONE, "v5e:2x2", "v5e:4x4", "v6e:4x4")] == [1, 4, 16, 16]
    assert Topology.parse("v5e:4x4").devices()[0].device_kind == CHIPS["v5e"].kind
    assert Topology.parse("v5p:2x2x1").devices()[0].device_kind == CHIPS["v5p"].kind
    for wrong in ("v5e", "v5e:", "v5e:4", "v9:2x2", "v5e:0x1", "v5e:2x2x2x2"):
        with pytest.raises(ConfigError, match="topology: expected"):
            Topology.parse(wrong)
    with pytest.raises(ConfigError, match="does not know it"):
        Topology.parse("v5e:3x7").devices()


def test_a_mesh_may_cut_an_axis_of_the_slice() -> None:
    assert dict(make_mesh(8, 8, 1, Topology.parse("v5p:4x4x4").devices()).shape) == {"data": 8, "fsdp": 8, "tensor": 1}


def sane(report: Report) -> None:
    assert report.fits
    assert 0 < report.memory_per_chip_bytes < report.hbm_bytes
    assert report.flops > 0
    assert report.bytes > 0
    assert report.roofline_seconds > 0
    assert 0 < report.flop_utilisation <= 1
    json.dumps(dataclasses.asdict(report))
    assert report.program in report.table()


def test_decoding_overwrites_its_cache() -> None:
    report = examine("decode", Topology.parse(ONE), model="tiny", batch=8)
    sane(report)
    # Keys and values of 3 layers, 2 heads, 192 positions of 16, padded to tiles; all of the state but its counters.
    assert report.aliased_bytes > 8 * 3 * 2 * 2 * 192 * 16 * 2
    assert report.bound_by == "memory"


@pytest.mark.slow
def test_the_chips_of_a_host_decode_their_rows_apart() -> None:
    """Rows that the routing takes from anywhere are spread again before they are scored."""
    report = examine("decode", Topology.parse("v5e:2x2"), model="mini_omni", batch=256)
    assert report.mesh == {"data": 4, "fsdp": 1, "tensor": 1}
    assert report.bytes_ratio < 1.10
    # The logits of all rows would take 156 MB.
    assert report.temporary_bytes < 0.12 * 2**30
    assert sum(report.collective_bytes.values()) < 2e6


@pytest.mark.slow
@pytest.mark.parametrize("batch", [1, 64])
def test_a_step_of_decoding_reads_weights_and_cache_once(batch: int) -> None:
    """The published model; heads of 64 stand side by side in the cache, or half of it would be padding, and copied."""
    report = examine("decode", Topology.parse(ONE), model="mini_omni", batch=batch)
    assert report.bytes_ratio < 1.10
    cache = batch * 24 * 2 * 2048 * 2 * 64 * 2
    assert cache <= report.aliased_bytes < 1.01 * cache + 2**20
    # At 64 rows a copy of the keys alone would be 800 MB.
    assert report.temporary_bytes < 128 * 2**20 + cache / 10


def test_weights_of_eight_bits_are_half_as_many_bytes() -> None:
    sixteen, eight = (
        examine("decode", Topology.parse(ONE), model="tiny", batch=1, int8=int8) for int8 in (False, True)
    )
    sane(eight)
    assert "in 8 bits" in eight.table()
    assert eight.arguments_bytes < 0.75 * sixteen.arguments_bytes
    assert eight.bytes < 0.8 * sixteen.bytes


def test_prefill_and_a_group_of_chips_that_share_rows() -> None:
    alone = examine("prefill", Topology.parse(ONE), model="tiny", batch=2)
    shared = examine("prefill", Topology.parse("v5e:2x2"), model="tiny", batch=4, tensor=2)
    sane(alone)
    sane(shared)
    assert not alone.collective_bytes
    assert shared.mesh == {"data": 2, "fsdp": 1, "tensor": 2}
    assert shared.collective_bytes.get("all-reduce", 0) > 0
    # Twice the rows on four chips.
    assert shared.flops == pytest.approx(alone.flops / 2)


@pytest.mark.slow
def test_a_training_step_overwrites_its_state() -> None:
    config = load_config(RunConfig, ROOT / "configs" / "nano_stage3.yaml", ["start=preset:tiny", "data.max_length=128"])
    report = examine("train", Topology.parse("v5e:2x2"), config=config, batch=4)
    sane(report)
    assert report.mesh == {"data": 4, "fsdp": 1, "tensor": 1}
    assert report.collective_bytes.get("all-reduce", 0) > 0
    # Parameters and both moments, all float32.
    assert report.aliased_bytes > 0.9 * (report.arguments_bytes - 4 * 6 * 32_000 * 2)


@pytest.mark.slow
def test_training_on_a_pod(capfd: pytest.CaptureFixture[str]) -> None:
    """The published model on 256 chips, a row of 2048 positions on each."""
    config = load_config(RunConfig, ROOT / "configs" / "mini_omni_stage3.yaml", ["start=preset:mini_omni"])
    report = examine("train", Topology.parse("v5e:16x16"), config=config, batch=256)
    assert "Involuntary full rematerialization" not in capfd.readouterr().err
    sane(report)
    assert report.mesh == {"data": 32, "fsdp": 8, "tensor": 1}
    assert report.memory_per_chip_bytes < 5 * 2**30
    assert report.aliased_bytes > 0.9 * report.arguments_bytes
    # With weights that stay and activations that travel, 107 GB of HBM were moved. Gathered for every clip apart, the
    # ear's weights made it 6.3 GB over the links; without the compiler options no gradient went beside other work.
    assert sum(report.collective_bytes.values()) < 5e9
    assert report.beside_bytes > 0.75 * sum(report.collective_bytes.values())
    assert report.collective_bytes["reduce-scatter"] > 1e9
    assert report.bytes < 30e9
    assert report.bound_by == "compute"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("topology", "data", "fsdp", "gibibytes", "moved", "sent"),
    [("v5p:4x4x4", 8, 8, 20, 330e9, 50e9), ("v5e:16x16", 1, 256, 10, 310e9, 72e9)],
)
def test_training_seven_billion_parameters(
    topology: str, data: int, fsdp: int, gibibytes: int, moved: float, sent: float, capfd: pytest.CaptureFixture[str]
) -> None:
    """Every chip holds a row and a share of the weights, gathered a layer at a time."""
    overrides = ["start=preset:mini_omni_7b", f"mesh.data={data}", f"mesh.fsdp={fsdp}"]
    config = load_config(RunConfig, ROOT / "configs" / "mini_omni_stage3.yaml", overrides)
    report = examine("train", Topology.parse(topology), config=config, batch=data * fsdp)
    assert "Involuntary full rematerialization" not in capfd.readouterr().err
    sane(report)
    assert report.memory_per_chip_bytes < gibibytes * 2**30
    assert report.aliased_bytes > 0.9 * report.arguments_bytes
    assert report.bytes < moved
    assert sum(report.collective_bytes.values()) < sent


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"program": "sing"}, "program: expected one of train"),
        ({"model": "huge"}, "model: expected one of mini_omni"),
        ({"program": "codec", "int8": True}, "int8: expected with prefill, decode or batch, found with codec"),
        ({"program": "train"}, "expected --config"),
        ({"batch": 3}, "batch: expected a multiple of 4"),
        ({"tensor": 3}, "tensor: expected a divisor of 4"),
    ],
)
def test_what_does_not_fit(options: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        examine(**{"program": "decode", "topology": Topology.parse("v5e:2x2"), "model": "tiny", **options})  # type: ignore[arg-type]


def test_from_the_shell() -> None:
    command = [Path(sys.executable).with_name("omni-jax"), "compile", "prefill", "--model", "tiny"]
    env = {**os.environ, "XLA_FLAGS": ""}
    done = subprocess.run([*command, "--topology", ONE, "--json"], capture_output=True, text=True, env=env, check=True)
    report = json.loads(done.stdout)
    wanted = """program topology batch compile_seconds memory_per_chip_bytes hbm_bytes fits flops bytes bytes_ideal
        bytes_ratio roofline_seconds bound_by collective_bytes aliased_bytes"""
    assert set(wanted.split()) <= set(report)
    done = subprocess.run([*command, "--topology", "v5e"], capture_output=True, text=True, env=env, check=False)
    assert (done.returncode, "topology: expected" in done.stderr) == (2, True)
