"""Paired comparison of two evaluations of the same suite."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from omni_jax.evaluation.metrics import Estimate, mean
from omni_jax.evaluation.run import Evaluation


@dataclass(frozen=True)
class Difference:
    """A metric of two evaluations over the cases that both have."""

    task: str
    metric: str
    value: float
    other: float
    difference: Estimate
    """`value - other`, with the interval of the mean difference per case."""


def compare(evaluation: Evaluation, other: Evaluation, metrics: Sequence[str]) -> list[Difference]:
    """How one evaluation differs from another.

    Args:
        evaluation: the first.
        other: the second.
        metrics: names of scores; for error rates, the rate of each case counts.
    """
    mine, theirs = ({result.id: result for result in one.results} for one in (evaluation, other))
    differences = []
    for task in dict.fromkeys(result.task for result in evaluation.results):
        shared = [key for key in mine if mine[key].task == task and key in theirs and theirs[key].task == task]
        for metric in metrics:
            pairs = [(mine[key].score(metric), theirs[key].score(metric)) for key in shared]
            values = np.array([(a, b) for a, b in pairs if a is not None and b is not None])
            if len(values):
                a, b = values.mean(0)
                change = mean((values[:, 0] - values[:, 1]).tolist())
                differences.append(Difference(task, metric, float(a), float(b), change))
    return differences
