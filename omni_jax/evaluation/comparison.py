"""Paired comparison of two evaluations of the same suite."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

from omni_jax.evaluation import metrics
from omni_jax.evaluation.metrics import Estimate
from omni_jax.evaluation.run import ERROR_RATES, Evaluation, Result

T = TypeVar("T")


@dataclass(frozen=True)
class Difference:
    """A metric of two evaluations over the cases that both have."""

    section: str
    """A task, or a task and group."""
    metric: str
    value: float
    other: float
    difference: Estimate
    """`value - other`, with a paired bootstrap interval."""


def compare(evaluation: Evaluation, other: Evaluation, names: Sequence[str]) -> list[Difference]:
    """How one evaluation differs from another, in each section. Metrics are those of `summarize`.

    Args:
        evaluation: the first.
        other: the second.
        names: of metrics.
    """
    theirs = {(result.id, result.task): result for result in other.results}
    differences = []
    for section, results in evaluation.sections().items():
        shared = [(mine, theirs[mine.id, mine.task]) for mine in results if (mine.id, mine.task) in theirs]
        found = [_compare(section, name, shared) for name in names]
        differences += [difference for difference in found if difference is not None]
    return differences


def _compare(section: str, name: str, shared: Sequence[tuple[Result, Result]]) -> Difference | None:
    """One metric over pairs of results; None if it applies to no pair."""
    if name in ERROR_RATES:
        errors = [pair for mine, theirs in shared if (pair := _pair(mine.errors(name), theirs.errors(name)))]
        if not errors:
            return None
        ours, others = [pair[0] for pair in errors], [pair[1] for pair in errors]
        values = metrics.error_rate(ours).value, metrics.error_rate(others).value
        return Difference(section, name, *values, metrics.error_rate_difference(ours, others))
    scores = [both for mine, theirs in shared if (both := _pair(mine.score(name), theirs.score(name)))]
    if not scores:
        return None
    first, second = [both[0] for both in scores], [both[1] for both in scores]
    values = metrics.mean(first).value, metrics.mean(second).value
    return Difference(section, name, *values, metrics.mean_difference(first, second))


def _pair(mine: T | None, theirs: T | None) -> tuple[T, T] | None:
    """Both; None if one is missing."""
    return None if mine is None or theirs is None else (mine, theirs)
