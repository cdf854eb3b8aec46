"""What rounding to eight bits does to nano: to its logits, and to its answers.

    python -m nano.rounding build/nano/stage3

Held-out exchanges go through a model as training left it, and through the same with its matrices rounded as `--int8`
rounds them. The first table says per task what becomes of the logits, the second what becomes of the answers.
"""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
import typer
from flax import nnx

from nano import evaluate
from omni_jax import Omni
from omni_jax.config.load import load_config
from omni_jax.config.run import RunConfig
from omni_jax.data import pipeline
from omni_jax.inference.runner import quantize_weights
from omni_jax.training.setup import InitialModel
from omni_jax.training.step import hear
from omni_jax.vocab import TEXT_STREAM

CONFIG = Path("configs/nano_stage3.yaml")
"""Whose held-out exchanges go through the model."""
TASKS = ("A1A2", "T1T2", "T1A1")
ANSWERS = (
    evaluate.Examination("A1A2", "held_out_seen"),
    evaluate.Examination("T1A2", "held_out_seen"),
    evaluate.Examination("T1T2", "../text/held_out"),
)


def compare(graph: nnx.GraphDef, exact: Any, rounded: Any, batch: pipeline.Batch) -> dict[str, jax.Array]:
    """Logits of one model with two sets of weights, summed over the targets of each head.

    Args:
        graph: the model.
        exact: weights, nested.
        rounded: others.
        batch: as the pipeline makes it.

    Returns:
        Float32 [8], layers 0..6, then text: `count` of targets; `exact` and `rounded`, -log p(target) of either;
        `divergence`, of the second's distribution from the first's, in nats; `same`, how often both have the same best;
        `difference` and `spread`, squares of what logits differ by and of how far they are from their mean.
    """

    def logits(weights: Any) -> tuple[jax.Array, jax.Array]:
        model = nnx.merge(graph, weights)
        heard = hear(model, batch["sound"])
        text, audio, _ = model(batch["tokens"], batch["positions"], heard, batch["speech_index"], batch["segments"])
        return model.audio_logits(audio).transpose(0, 2, 1, 3), model.text_logits(text)[:, None]

    columns = []
    for heads, ours, theirs in zip(
        (slice(0, TEXT_STREAM), slice(TEXT_STREAM, None)), logits(exact), logits(rounded), strict=True
    ):
        target, mask = batch["targets"][:, heads, :, None], batch["mask"][:, heads]
        p, q = jax.nn.log_softmax(ours), jax.nn.log_softmax(theirs)
        # What is added to all logits of a position changes nothing.
        ours, theirs = (x - x.mean(-1, keepdims=True) for x in (ours, theirs))
        found = {
            "count": jnp.ones(mask.shape),
            "exact": -jnp.take_along_axis(p, target, -1)[..., 0],
            "rounded": -jnp.take_along_axis(q, target, -1)[..., 0],
            "divergence": (jnp.exp(p) * (p - q)).sum(-1),
            "same": (jnp.argmax(ours, -1) == jnp.argmax(theirs, -1)).astype(jnp.float32),
            "difference": jnp.square(ours - theirs).mean(-1),
            "spread": jnp.square(ours).mean(-1),
        }
        columns.append({name: jnp.where(mask, value, 0.0).sum((0, 2)) for name, value in found.items()})
    return {name: jnp.concatenate([column[name] for column in columns]) for name in columns[0]}


def of_logits(start: InitialModel, config: RunConfig, batches: int) -> dict[str, dict[str, np.ndarray]]:
    """For each of `TASKS` the sums of `compare` over its first held-out batches."""
    graph, state = nnx.split(start.model(stacked=False, dtype=jnp.float32, mesh=None))
    exact = nnx.to_pure_dict(state)
    rounded = quantize_weights(exact)
    compared = jax.jit(lambda *arguments: compare(graph, *arguments))
    found = {}
    for task in TASKS:
        data = dataclasses.replace(config.data, tasks={task: 1.0})
        drawn = itertools.islice(pipeline.held_out(data, start.config, start.tokenizer), batches)
        sums = [jax.device_get(compared(exact, rounded, batch)) for batch in drawn]
        found[task] = {name: sum(entry[name] for entry in sums) for name in sums[0]}
    return found


def logits_table(found: dict[str, dict[str, np.ndarray]]) -> list[str]:
    """What `of_logits` found, as Markdown."""
    lines = [
        "| task | head | targets | loss | rounded | divergence | same best | logits off by |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for task, sums in found.items():
        for head, chosen in (("text", slice(TEXT_STREAM, None)), ("audio", slice(0, TEXT_STREAM))):
            count = sums["count"][chosen].sum()
            if not count:
                continue
            mean = {name: float(value[chosen].sum() / count) for name, value in sums.items()}
            lines.append(
                f"| {task} | {head} | {count:.0f} | {mean['exact']:.4f} | {mean['rounded']:.4f} | "
                f"{mean['divergence']:.5f} | {mean['same']:.2%} | {(mean['difference'] / mean['spread']) ** 0.5:.2%} |"
            )
    return lines


def answers_table(exact: dict[str, list[Any]], rounded: dict[str, list[Any]]) -> list[str]:
    """What both wrote, by examination, as Markdown."""
    lines = ["| examination | questions | right | right, rounded | written the same |", "|---|---|---|---|---|"]
    for name, ours in exact.items():
        right, kept = (evaluate.scores(entries)["exact"] for entries in (ours, rounded[name]))
        same = float(np.mean([a["written"] == b["written"] for a, b in zip(ours, rounded[name], strict=True)]))
        lines.append(f"| {name} | {len(ours)} | {right:.1%} | {kept:.1%} | {same:.1%} |")
    return lines


def main(
    model: Annotated[str, typer.Argument(help="The folder of a finished run, or a release in float32")],
    records: Annotated[Path, typer.Option(help="What nano.records wrote")] = evaluate.RECORDS,
    batches: Annotated[int, typer.Option(help="Held-out batches of each task that go through the model")] = 16,
    count: Annotated[int, typer.Option(help="Questions of each examination, at most")] = 250,
) -> None:
    """Compare a model with itself in eight bits."""
    config = load_config(RunConfig, CONFIG, [f"start={model}"])
    typer.echo("\n".join(logits_table(of_logits(InitialModel.find(model, 0), config, batches))) + "\n")
    answers = []
    for int8 in (False, True):
        omni = Omni.load(model, int8=int8)
        answers.append({e.name: evaluate.examine(omni, records, e, count, 0, records) for e in ANSWERS})
    typer.echo("\n".join(answers_table(*answers)))


if __name__ == "__main__":
    typer.run(main)
