"""What one chip serves, for several models and chips, by the TPU compiler: the table of docs/tpu.md.

`python -m tests.compile_report.serving_table` writes all rows, a few minutes each; with names of rows, such as
`"qwen3_1_7b v6e"`, only those.
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from pathlib import Path

from omni_jax.compile_report.serving import ServingReport, serving_report
from omni_jax.compile_report.topology import Topology

PAGE = Path(__file__).parents[2] / "docs" / "tpu.md"
MARK = "writes it here:\n\n"
"""What the table follows."""
HEADER = (
    "| model, chip | chips a row | encoder, prefill, decoding, codec | speech per second and chip | with "
    "`--short-windows` | conversations by time | by memory | first sound |\n|---|---|---|---|---|---|---|---|\n"
)


@dataclass(frozen=True)
class Case:
    """A row of the table."""

    model: str
    topology: str
    tensor: int = 1

    @property
    def name(self) -> str:
        """Model and chip."""
        return f"{self.model} {self.topology.partition(':')[0]}"

    def measure(self) -> ServingReport:
        """Compile its programs."""
        return serving_report(Topology.parse(self.topology), model=self.model, tensor=self.tensor)


CASES = [
    *(Case("mini_omni", topology) for topology in ("v5e:1x1", "v5p:1x1x1", "v6e:1x1")),
    *(Case("qwen3_1_7b", topology) for topology in ("v5e:1x1", "v5p:1x1x1", "v6e:1x1")),
    # The weights take 16.4 GB.
    Case("qwen3_8b", "v5e:2x2", tensor=4),
    *(Case("qwen3_8b", topology) for topology in ("v5p:1x1x1", "v6e:1x1")),
]


COLUMNS = ("speech", "short windows", "by time", "by memory", "first sound")
"""Figures of a row, at its end."""


def line(case: Case, report: ServingReport) -> str:
    """A row of the table."""
    total = sum(report.seconds.values())
    cells = [
        f"`{case.name}`",
        f"{case.tensor}",
        ", ".join(f"{seconds / total:.0%}" for seconds in report.seconds.values()),
        f"{report.speech_per_second:.0f} s",
        f"{report.speech_per_second_short:.0f} s",
        f"{report.conversations_by_time:.0f}",
        f"{report.conversations_by_memory:.0f}",
        f"{report.first_sound_seconds * 1e3:.0f} ms",
    ]
    return f"| {' | '.join(cells)} |\n"


def figures(row: str) -> dict[str, float]:
    """The figures of a row, in its units."""
    cells = row.strip("| \n").split(" | ")[-len(COLUMNS) :]
    return {name: float(cell.split()[0]) for name, cell in zip(COLUMNS, cells, strict=True)}


def table(rows: dict[str, str]) -> str:
    """The table of those rows, in the order of the cases; empty without any."""
    return HEADER * bool(rows) + "".join(rows[case.name] for case in CASES if case.name in rows)


def stated() -> dict[str, str]:
    """The rows of the page, by the name of the case; none of those that are not there."""
    lines = PAGE.read_text(encoding="utf-8").splitlines(keepends=True)
    return {case.name: found for case in CASES for found in lines if found.startswith(f"| `{case.name}` |")}


def main(names: list[str]) -> None:
    """Measure the cases of these names, or all, and replace their rows."""
    os.environ["JAX_PLATFORMS"] = "cpu"
    if unknown := set(names) - {case.name for case in CASES}:
        sys.exit(f"expected some of {', '.join(case.name for case in CASES)}, found {', '.join(sorted(unknown))}")
    for case in CASES:
        if not names or case.name in names:
            before = stated()
            after = before | {case.name: line(case, case.measure())}
            print(after[case.name], end="", flush=True)
            page = PAGE.read_text(encoding="utf-8")
            start = page.index(MARK) + len(MARK)
            end = start + len(table(before)) + 1 if before else start
            PAGE.write_text(f"{page[:start]}{table(after)}\n{page[end:]}", encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
