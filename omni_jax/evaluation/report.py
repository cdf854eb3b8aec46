"""The report of an evaluation, in Markdown and HTML."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from omni_jax.evaluation.html_report import html_page
from omni_jax.evaluation.run import Evaluation
from omni_jax.evaluation.suites import Case
from omni_jax.evaluation.tables import Table, difference_table, legend, notes, results_table


def write(evaluation: Evaluation, folder: Path, other: Evaluation | None = None, cases: Sequence[Case] = ()) -> str:
    """Write `report.md` and `report.html`.

    Args:
        evaluation: the results.
        folder: where the spoken answers are, and the reports go.
        other: another evaluation of the same suite, to compare with.
        cases: of the suite, whose recordings the HTML plays.

    Returns:
        The report as Markdown.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    text = markdown(evaluation, other)
    (folder / "report.md").write_text(text, encoding="utf-8")
    (folder / "report.html").write_text(html_page(evaluation, folder, other, cases), encoding="utf-8")
    return text


def markdown(evaluation: Evaluation, other: Evaluation | None = None) -> str:
    """The report as Markdown."""
    lines = ["# Evaluation", "", *notes(evaluation), "", *_markdown_table(results_table(evaluation)), ""]
    lines += [f"- {name}: {meaning}" for name, meaning in legend(evaluation).items()]
    if other is not None:
        lines += ["", f"## Against {other.model}", "", *_markdown_table(difference_table(evaluation, other))]
    return "\n".join(lines) + "\n"


def _markdown_table(table: Table) -> list[str]:
    def line(cells: list[str]) -> str:
        return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"

    return [line(table.head), "|---" * len(table.head) + "|", *map(line, table.rows)]
