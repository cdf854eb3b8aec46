"""Counts the work of a program before it is compiled: matrix products and convolutions."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend import core

PASSES = {jax.lax.Precision.HIGH: 3, jax.lax.Precision.HIGHEST: 6}
"""Products of bfloat16 parts that make one of float32 factors, by precision."""


def count(traced: core.ClosedJaxpr, loop_trips: int = 1, branch: int = -1) -> float:
    """Floating-point operations of a call over all devices together; a multiplication and its addition are two.

    A loop of known length counts as often as it runs. Recomputation in a backward pass counts. A product of float32
    matrices counts as often as a TPU multiplies bfloat16 parts of them: its default rounds the factors, `PASSES` are
    those of other precisions.

    Args:
        traced: the program: `jax.make_jaxpr(function)(*arguments)`, or the `jaxpr` of a jitted function's trace.
        loop_trips: assumed trip count of loops of unknown length.
        branch: which branch counts of conditionals that have more than two; of two, the more expensive counts.
    """
    return _count(traced.jaxpr, loop_trips, branch)


def _count(jaxpr: core.Jaxpr, loop_trips: int, branch: int) -> float:
    return sum(_count_equation(equation, loop_trips, branch) for equation in jaxpr.eqns)


def _count_equation(equation: Any, loop_trips: int, branch: int) -> float:
    name, params = equation.primitive.name, equation.params
    if name == "dot_general":
        (contracted, _), _ = params["dimension_numbers"]
        shape = equation.invars[0].aval.shape
        work = 2.0 * math.prod(equation.outvars[0].aval.shape) * math.prod(shape[axis] for axis in contracted)
        is_float32 = all(factor.aval.dtype == jnp.float32 for factor in equation.invars)
        return work * PASSES.get((params["precision"] or [None])[0], 1) if is_float32 else work
    if name == "conv_general_dilated":
        kernel = equation.invars[1].aval.shape
        outputs = kernel[params["dimension_numbers"].rhs_spec[0]]
        return 2.0 * math.prod(equation.outvars[0].aval.shape) * math.prod(kernel) / outputs
    inner = [_count(jaxpr, loop_trips, branch) for value in params.values() for jaxpr in _jaxprs(value)]
    if name == "scan":
        return sum(inner) * params["length"]
    if name == "while":
        return sum(inner) * loop_trips
    if name == "cond":
        return inner[branch] if len(inner) > 2 else max(inner, default=0.0)
    if name == "shard_map":
        return sum(inner) * params["mesh"].size
    if name == "pallas_call":
        return sum(inner) * math.prod(params["grid_mapping"].grid)
    return sum(inner)


def _jaxprs(value: Any) -> list[core.Jaxpr]:
    """The programs in an equation's parameter."""
    if isinstance(value, core.ClosedJaxpr):
        return [value.jaxpr]
    if isinstance(value, core.Jaxpr):
        return [value]
    if isinstance(value, (tuple, list)):
        return [jaxpr for item in value for jaxpr in _jaxprs(item)]
    return []
