"""The layers of a block against literal values and plain numpy."""

from __future__ import annotations

import contextlib
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import Mesh

from omni_jax.config.model import LayerKind, RopeScaling, TrunkConfig
from omni_jax.model.layers import (
    MAX_DECODE_ROWS,
    Attention,
    GatedMLP,
    Linear,
    RMSNorm,
    linear,
    linear_gradients,
    rope,
    rope_frequencies,
    rotate,
)
from omni_jax.sharding import make_mesh
from tests.model.randomized import randomized

RANDOM = np.random.default_rng(0)


def normal(*shape: int) -> np.ndarray:
    return RANDOM.normal(size=shape).astype(np.float32)


def close(ours: object, theirs: object, tolerance: float = 1e-5) -> None:
    np.testing.assert_allclose(np.asarray(ours), np.asarray(theirs), atol=tolerance, rtol=0)


def test_rms_norm_literal() -> None:
    norm = RMSNorm(2, eps=0.0)
    norm.scale[...] = jnp.array([1.0, 10.0])
    # The root mean square of 3 and 4 is sqrt(12.5).
    close(norm(jnp.array([[3.0, 4.0]])), [[3 / math.sqrt(12.5), 40 / math.sqrt(12.5)]])


def test_rms_norm_eps_is_inside_the_root() -> None:
    close(RMSNorm(2, eps=4.0)(jnp.zeros((1, 2))), [[0.0, 0.0]])
    close(RMSNorm(1, eps=3.0)(jnp.ones((1, 1))), [[0.5]])


def test_rms_norm_keeps_the_dtype_and_computes_in_float32() -> None:
    x = jnp.full((1, 4), 3e20, jnp.bfloat16)  # its square overflows bfloat16's sums only if not normed first
    y = RMSNorm(4, 1e-6)(x * 1e-4)
    assert y.dtype == jnp.bfloat16
    close(y.astype(jnp.float32), np.ones((1, 4)), 1e-2)


def test_rope_frequencies_literal() -> None:
    close(rope_frequencies(8, 10000.0, None), [1.0, 0.1, 0.01, 0.001], 1e-7)


def test_llama3_scaling_literal() -> None:
    """Turns within the original context of 2 pi * 100: 100, 10, 1, 0.1; kept above 20, stretched below 5."""
    scaling = RopeScaling(factor=4, low_freq_factor=5, high_freq_factor=20, original_max_position=round(200 * math.pi))
    turns = round(200 * math.pi) / (2 * math.pi) * np.array([1.0, 0.1, 0.01, 0.001])
    kept = (turns[1] - 5) / 15
    expected = [1.0, 0.1 * kept + 0.1 / 4 * (1 - kept), 0.01 / 4, 0.001 / 4]
    close(rope_frequencies(8, 10000.0, scaling), expected, 1e-7)


def test_linear_yarn_and_longrope_scaling_literal() -> None:
    linear = RopeScaling(kind="linear", factor=4)
    close(rope_frequencies(8, 10000.0, linear), [0.25, 0.025, 0.0025, 0.00025], 1e-7)
    divisors = {"short_factor": (1.0, 2.0, 4.0, 5.0), "long_factor": (9.0,) * 4}
    longrope = RopeScaling(kind="longrope", factor=4, original_max_position=8, attention_factor=1.0, **divisors)
    close(rope_frequencies(8, 10000.0, longrope), [1.0, 0.05, 0.0025, 0.0002], 1e-7)
    # In 628 positions the frequencies make 100, 10, 1 and 0.1 turns: the first is kept, the last stretched.
    context = {"original_max_position": 628, "beta_fast": 20.0, "beta_slow": 0.2, "attention_factor": 1.0}
    yarn = RopeScaling(kind="yarn", factor=4, **context)
    close(rope_frequencies(8, 10000.0, yarn), [1.0, 0.1 * (2 / 3 + 1 / 12), 0.01 * (1 / 3 + 2 / 12), 0.00025], 1e-7)


def test_rope_of_a_part_of_the_head_and_of_other_kinds() -> None:
    config = TrunkConfig(head_dim=8, partial_rotary_factor=0.5, rope_theta=100.0, rope_local_theta=9.0)
    positions = jnp.array([[3]])
    cos, sin = rope(positions, config)
    x = jnp.arange(8.0).reshape(1, 1, 1, 8)
    turned = rotate(x, cos, sin)
    close(turned[..., 4:], x[..., 4:])
    close(turned[..., :4], rotate(x[..., :4], *rope(positions, TrunkConfig(head_dim=4, rope_theta=100.0))))
    local = rope(positions, config, LayerKind(rope=True, sliding=True))
    close(local[0], rope(positions, TrunkConfig(head_dim=4, rope_theta=9.0))[0])
    assert (rotate(x, *rope(positions, config, LayerKind(rope=False, sliding=False))) == x).all()


def test_rms_norm_with_an_offset() -> None:
    norm = RMSNorm(2, eps=0.0, offset=1)
    x = jnp.array([[3.0, 4.0]])
    close(norm(x), RMSNorm(2, eps=0.0)(x))
    norm.scale[...] = jnp.array([1.0, 0.0])
    close(norm(x)[0, 0], 2 * RMSNorm(2, eps=0.0)(x)[0, 0])


def test_rope_and_rotation_literal() -> None:
    config = TrunkConfig(head_dim=4, rope_theta=100.0)
    cos, sin = rope(jnp.array([[0, 3]]), config)
    assert cos.shape == sin.shape == (1, 2, 1, 2)
    x = jnp.array([[[[1.0, 2.0, 3.0, 4.0]], [[1.0, 2.0, 3.0, 4.0]]]])
    turned = rotate(x, cos, sin)
    # Halves, not neighbors: (1, 3) turn by 3 radians, (2, 4) by 0.3.
    pairs = [
        complex(1, 3) * complex(math.cos(3), math.sin(3)),
        complex(2, 4) * complex(math.cos(0.3), math.sin(0.3)),
    ]
    close(turned[0, 0, 0], [1, 2, 3, 4])
    close(turned[0, 1, 0], [pairs[0].real, pairs[1].real, pairs[0].imag, pairs[1].imag])


@pytest.mark.parametrize("rows", [1, 2, MAX_DECODE_ROWS, MAX_DECODE_ROWS + 1])
def test_linear(rows: int) -> None:
    x, weight = normal(rows, 5), normal(3, 5)
    close(jax.jit(linear)(x, weight), x @ weight.T)


@pytest.mark.parametrize("shape", [(3, 2), (40, 1), (7, 9)])
def test_linear_of_several_axes(shape: tuple[int, int]) -> None:
    x, weight = normal(*shape, 5), normal(4, 6, 5)
    close(jax.jit(linear)(x, weight), np.einsum("abi,nhi->abnh", x, weight))
    x, weight = normal(*shape, 4, 6), normal(5, 4, 6)
    close(linear(x, weight, contract=2), np.einsum("abnh,onh->abo", x, weight))


@pytest.mark.parametrize("rows", [2, 100])
def test_linear_computes_in_the_dtype_of_its_input(rows: int) -> None:
    y = linear(jnp.ones((rows, 4), jnp.bfloat16), jnp.ones((3, 4), jnp.float32))
    assert y.dtype == jnp.bfloat16


@pytest.mark.parametrize("rows", [2, 100])
def test_linear_has_gradients(rows: int) -> None:
    x, weight = normal(rows, 5), normal(3, 5)
    gradients = jax.grad(lambda x, w: linear(x, w).sum(), argnums=(0, 1))(x, weight)
    close(gradients[0], np.broadcast_to(weight.sum(0), x.shape))
    close(gradients[1], np.broadcast_to(x.sum(0), weight.shape), 1e-4)


def test_linear_of_bfloat16_within_a_mesh_of_one_cpu() -> None:
    """Forward, and back to both factors: as exact as rounded factors let them be, and each in the fast form."""
    x, weight = normal(3, 40, 4, 6), normal(5, 7, 4, 6)
    pull = normal(3, 40, 5, 7)
    rounded_x, rounded_weight, rounded_pull = (y.astype(jnp.bfloat16).astype(np.float32) for y in (x, weight, pull))

    def back(x: jax.Array, weight: jax.Array, pull: jax.Array) -> tuple[jax.Array, ...]:
        y, gradients = jax.vjp(lambda x, w: linear(x, w, contract=2, dtype=jnp.float32), x, weight)
        return y, *gradients(pull)

    with jax.set_mesh(make_mesh()):
        program = jax.jit(back).lower(jnp.asarray(x, jnp.bfloat16), weight, pull).compile()
        y, of_x, of_weight = program(jnp.asarray(x, jnp.bfloat16), weight, pull)
    assert (y.dtype, of_x.dtype, of_weight.dtype) == (jnp.float32, jnp.bfloat16, jnp.float32)
    close(y, np.einsum("abnh,oqnh->aboq", rounded_x, rounded_weight), 1e-5)
    close(of_weight, np.einsum("aboq,abnh->oqnh", rounded_pull, rounded_x), 1e-4)
    np.testing.assert_allclose(
        of_x.astype(jnp.float32), np.einsum("aboq,oqnh->abnh", rounded_pull, rounded_weight), rtol=2**-8, atol=1e-5
    )
    # The compiler would have split other forms into conversions and a product of float32.
    factors = re.findall(
        r"^%fused_computation\S* \(\S+: (\w+)\[[\d,]+\], \S+: (\w+)\[[\d,]+\]\)", program.as_text(), re.M
    )
    assert factors == [("bf16", "bf16")] * 3


@pytest.mark.parametrize("shape", [(7,), (3, 7)])
def test_linear_gradients(shape: tuple[int, ...]) -> None:
    x, table, error = normal(40, 6), normal(*shape, 6), normal(40, *shape)
    _, expected = jax.vjp(linear, x, table)
    for ours, theirs in zip(linear_gradients(x, table, error), expected(error), strict=True):
        close(ours, theirs)
    halved = jnp.asarray(error, jnp.bfloat16)

    with jax.set_mesh(make_mesh()):
        of_x, of_table = jax.jit(linear_gradients)(jnp.asarray(x, jnp.bfloat16), table, halved)
    assert (of_x.dtype, of_table.dtype) == (jnp.bfloat16, jnp.float32)
    for ours, theirs in zip((of_x, of_table), linear_gradients(x, table, error), strict=True):
        close(ours.astype(jnp.float32), theirs, 0.02 * float(jnp.abs(theirs).max()))


def test_use_bfloat16_dot_only_within_a_mesh_of_one_cpu() -> None:
    def traced(mesh: Mesh | None, dtype: str, rows: int) -> str:
        with contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh):
            return str(jax.make_jaxpr(linear)(jnp.ones((rows, 4), dtype), jnp.ones((3, 4))))

    assert "custom_vjp" in traced(make_mesh(), "bfloat16", 64)
    for mesh, dtype, rows in (
        (None, "bfloat16", 64),
        (make_mesh(data=2), "bfloat16", 64),
        (make_mesh(), "float32", 64),
        (make_mesh(), "bfloat16", MAX_DECODE_ROWS),
    ):
        assert "custom_vjp" not in traced(mesh, dtype, rows)


def test_gated_mlp() -> None:
    mlp = randomized(lambda: GatedMLP(4, 7, 3, nnx.Rngs(0)))
    gate, up, down = (np.asarray(linear.weight[...]) for linear in (mlp.gate, mlp.up, mlp.down))
    assert (gate.shape, up.shape, down.shape) == ((7, 4), (7, 4), (3, 7))
    x = normal(2, 5, 4)
    gated = x @ gate.T
    close(mlp(x), (gated / (1 + np.exp(-gated)) * (x @ up.T)) @ down.T)


def test_attention_projects_adds_biases_and_rotates() -> None:
    config = TrunkConfig(hidden_size=8, num_heads=4, num_kv_heads=2, head_dim=6, rope_theta=100.0)
    layer = randomized(lambda: Attention(config, nnx.Rngs(0)))
    x, positions = normal(2, 3, 8), jnp.array([[0, 1, 2], [5, 6, 9]])
    cos, sin = rope(positions, config)
    query, key, value = layer.project(x, cos, sin)

    def projected(linear: Linear) -> np.ndarray:
        assert linear.bias is not None
        return np.einsum("btd,nhd->btnh", x, np.asarray(linear.weight[...])) + np.asarray(linear.bias[...])

    close(value, projected(layer.v))
    close(query, rotate(jnp.asarray(projected(layer.q)), cos, sin))
    close(key, rotate(jnp.asarray(projected(layer.k)), cos, sin))
    close(layer.out(query), np.einsum("btnh,dnh->btd", np.asarray(query), np.asarray(layer.out.weight[...])))


def test_attention_without_biases_has_none() -> None:
    config = TrunkConfig(hidden_size=8, num_heads=2, num_kv_heads=1, head_dim=4, qkv_bias=False)
    layer = nnx.eval_shape(lambda: Attention(config, nnx.Rngs(0)))
    assert not any("bias" in "".join(map(str, path)) for path, _ in nnx.to_flat_state(nnx.state(layer)))
