"""Every program lowers for CUDA, without a GPU; see docs/gpu.md for what that says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax._src.cudnn import fused_attention_stablehlo

from omni_jax import sharding
from omni_jax.compile_report.programs import INFERENCE_PROGRAMS, Program, train_program
from omni_jax.config.load import load_config
from omni_jax.config.model import PRESETS
from omni_jax.config.run import RunConfig
from omni_jax.training import setup

ROOT = Path(__file__).parents[2]
CUDNN_VERSION = 91000


@pytest.fixture(autouse=True)
def traced_as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Choices by platform are those of a GPU; the devices of the mesh are those of this machine."""
    monkeypatch.setattr(sharding, "platform", lambda: "gpu")
    monkeypatch.setattr(setup, "default_layout", lambda platform: sharding.default_layout("gpu"))
    # Without a GPU there is no cuDNN whose version JAX could ask for before it lowers.
    monkeypatch.setattr(fused_attention_stablehlo, "check_cudnn_version", lambda: CUDNN_VERSION)


def lower(program: Program) -> str:
    with jax.set_mesh(program.mesh):
        traced: Any = program.function.trace(*program.arguments, **program.keywords)
        return traced.lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.parametrize("name", INFERENCE_PROGRAMS)
def test_inference_program_lowers_for_cuda(name: str) -> None:
    mesh = sharding.make_mesh(2, 1, 1, jax.devices()[:2])
    text = lower(INFERENCE_PROGRAMS[name](PRESETS["tiny"], mesh, 2))
    assert "stablehlo.dot_general" in text or "stablehlo.convolution" in text
    assert "tpu_custom_call" not in text
    assert ("__cudnn$fmhaSoftmax" in text) == (name == "prefill")


@pytest.mark.parametrize("fsdp", [1, 2])
def test_train_step_lowers_for_cuda(fsdp: int, tmp_path: Path) -> None:
    config = load_config(
        RunConfig, ROOT / "configs" / "tiny_stage3.yaml", ["start=preset:tiny", f"mesh.fsdp={fsdp}", "remat=full"]
    )
    program = train_program(config, jax.devices()[:2])
    text = lower(program)
    assert "bf16" in text, "matrix products are bfloat16 on a GPU"
    assert sharding.default_layout("gpu") == (True, jnp.bfloat16)
    assert "tpu_custom_call" not in text
    # Packed rows have a mask, which is a bias to cuDNN.
    assert "__cudnn$fmhaScaleBiasSoftmax" in text
    assert "__cudnn$fmhaScaleBiasSoftmaxBackward" in text
