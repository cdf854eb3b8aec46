"""The tables and notes of a report as text, for Markdown and HTML."""

from __future__ import annotations

from typing import NamedTuple

from omni_jax.evaluation.comparison import compare
from omni_jax.evaluation.metrics import CONFIDENCE, NUM_RESAMPLES, Estimate
from omni_jax.evaluation.run import Evaluation

NAMES = {
    "wer": "WER",
    "cer": "CER",
    "exact": "exact match",
    "contains": "contains-match",
    "f1": "F1",
    "asr_wer": "ASR-WER",
    "failed": "failed",
    "finished": "finished",
    "answer_words": "words",
    "answer_seconds": "seconds",
}
"""Headings of the metrics."""
LEGEND = {
    "wer": "word error rate of transcripts: words substituted, deleted and inserted, over the words of the right "
    "transcripts, of all cases together; lower is better",
    "cer": "the same for characters",
    "exact": "share of answers that equal a right answer, normalized",
    "contains": "share of answers that contain a right answer as whole words",
    "f1": "mean F1 of the words of an answer and of the nearest right answer, as SQuAD computes it",
    "asr_wer": "word error rate of the ASR judge's transcript of the spoken answer against the text of the answer, of "
    "all cases together; lower is better",
    "failed": "share of cases without an answer, which count as wrong; lower is better",
    "finished": "share of answers that ended by themselves, not at a limit",
    "answer_words": "mean number of words of an answer",
    "answer_seconds": "mean duration of a spoken answer",
}
"""What each metric is, and which direction is better where higher is not."""
PERCENT = ("wer", "cer", "exact", "contains", "f1", "asr_wer", "failed", "finished")
"""Metrics that are shown in percent."""


class Table(NamedTuple):
    """A heading for each column, and rows of cells."""

    head: list[str]
    rows: list[list[str]]


def results_table(evaluation: Evaluation) -> Table:
    """A row for each task and group, a column for each metric that applies to any of them."""
    summary = evaluation.summary()
    used = [name for name in NAMES if any(name in estimates for estimates in summary.values())]
    rows = []
    for section, estimates in summary.items():
        cells = [format_estimate(name, estimates[name]) if name in estimates else "" for name in used]
        rows.append([section, str(estimates["failed"].count), *cells])
    return Table(["task", "cases", *(NAMES[name] for name in used)], rows)


def difference_table(evaluation: Evaluation, other: Evaluation) -> Table:
    """A row for each task, group and metric that both evaluations have."""
    rows = []
    for one in compare(evaluation, other, list(NAMES)):
        scale, unit = _scale(one.metric)
        change = one.difference
        signed = (
            f"{scale * (one.value - one.other):+.1f}{unit} ({scale * change.low:+.1f} to {scale * change.high:+.1f})"
        )
        values = [f"{scale * value:.1f}{unit}" for value in (one.value, one.other)]
        rows.append([one.section, NAMES[one.metric], *values, signed])
    return Table(["task", "metric", evaluation.model, other.model, "difference"], rows)


def legend(evaluation: Evaluation) -> dict[str, str]:
    """What the columns of the results are, by their headings."""
    used = {name for estimates in evaluation.summary().values() for name in estimates}
    return {NAMES[name]: LEGEND[name] for name in NAMES if name in used}


def format_estimate(metric: str, estimate: Estimate) -> str:
    """A value with its interval: `12.3 % (10.1 to 14.9)`."""
    scale, unit = _scale(metric)
    value, low, high = (scale * number for number in (estimate.value, estimate.low, estimate.high))
    return f"{value:.1f}{unit} ({low:.1f} to {high:.1f})"


def _scale(metric: str) -> tuple[int, str]:
    return (100, " %") if metric in PERCENT else (1, "")


def notes(evaluation: Evaluation) -> list[str]:
    """What a reader must know to interpret the tables."""
    lines = [
        f"Model {evaluation.model}, suite {evaluation.suite}, {len(evaluation.results)} cases. In parentheses: the "
        f"{CONFIDENCE:.0%} confidence interval from {NUM_RESAMPLES} bootstrap resamples of the cases."
    ]
    if any(" " in section for section in evaluation.sections()):
        lines.append("Rows: each task, and below it the groups of its cases in alphabetical order.")
    if not evaluation.trained:
        lines.append("The model is untrained: its weights are random, and the metrics mean nothing.")
    if evaluation.asr_judge is None:
        lines.append("There was no ASR judge: the spoken answers were not evaluated, only the text of the answers.")
    else:
        lines.append(
            f"ASR judge: {evaluation.asr_judge}. ASR-WER compares its transcript of a spoken answer with the text that "
            "the model output."
        )
    if evaluation.speed:
        speed = evaluation.speed
        lines.append(
            f"One request at a time: first audio after {speed['first_audio']:.2f} s, whole answer after "
            f"{speed['total']:.2f} s, {speed['steps_per_second']:.0f} steps/s, real-time factor "
            f"{speed['real_time_factor']:.2f} (medians, on the machine that ran the evaluation)."
        )
    return lines
