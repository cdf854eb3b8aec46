"""What a chip serves: sums of the programs' times, and, marked slow, the programs themselves."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from typer.testing import CliRunner

from omni_jax import sharding
from omni_jax.cli.app import app
from omni_jax.compile_report import serving
from omni_jax.compile_report.programs import bytes_per_chip, decode_program, mean_pages
from omni_jax.compile_report.serving import ServingProfile, ServingReport, _rows, serving_report
from omni_jax.compile_report.topology import Topology
from omni_jax.config.model import PRESETS
from omni_jax.errors import ConfigError
from omni_jax.model.pages import PAGE_LEN, num_pages
from tests.compile_report.serving_table import CASES, MARK, PAGE, Case, figures, line, stated, table

ONE = Topology.parse("v5e:1x1")
SHORT = ServingProfile(question_seconds=0.5, answer_seconds=2.048, history_positions=100)


@pytest.fixture
def batches(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """The batch size of each program; none is compiled, all have a time for the whole batch."""
    found: dict[str, int] = {}
    seconds = {"encode": 0.008, "encode_short": 0.004, "prefill": 0.016, "decode": 0.004, "codec": 0.01024}

    def report(name: str, model: str, topology: Topology, batch: int, *args: Any, **options: Any) -> Any:
        found[name] = batch
        return SimpleNamespace(roofline_seconds=seconds[name], fits=True)

    monkeypatch.setattr(serving, "report_program", report)
    return found


def test_serving_report_adds_up(batches: dict[str, int]) -> None:
    assert PRESETS["tiny"].codec.frame_size == 2048
    report = serving_report(ONE, model="tiny", profile=SHORT)
    rows = report.rows
    assert batches == {"encode": 8, "encode_short": 8, "prefill": 8, "codec": 64, "decode": rows}
    # 24 frames take 32 steps.
    expected = {"encode": 0.001, "prefill": 0.002, "decode": 0.004 / rows * 32, "codec": 24 * 1e-5}
    assert report.seconds == pytest.approx(expected)
    assert report.speech_per_second == pytest.approx(2.048 / sum(expected.values()))
    assert report.speech_per_second_short == pytest.approx(2.048 / (sum(expected.values()) - 0.0005))
    assert report.conversations_by_time == pytest.approx(report.speech_per_second * 2.548 / 2.048)
    assert report.conversations_by_memory == rows
    assert report.conversations == min(report.conversations_by_time, rows)
    # The first audio is final with the second frame, whose last code comes in step 9.
    assert report.first_sound_seconds == pytest.approx(0.008 + 0.016 + 9 * 0.004 + 0.00016)
    for part in ("tiny on v5e:1x1", "0.5 s, answers of 2.048 s", f"limited by {report.limited_by}", "60 ms after"):
        assert part in report.table()


def test_serving_report_is_per_chip(batches: dict[str, int]) -> None:
    alone = serving_report(ONE, model="tiny", profile=SHORT)
    shared = serving_report(Topology.parse("v5e:2x2"), model="tiny", profile=SHORT, tensor=2)
    assert batches["encode"] == 16
    # Each of the two key heads is on a chip of its own: a row takes half of the memory on two chips.
    assert shared.conversations_by_memory == pytest.approx(alone.conversations_by_memory, rel=0.01)
    assert batches["decode"] == 2 * shared.rows
    fewer = shared.seconds | {"decode": alone.seconds["decode"] * alone.rows / shared.rows}
    assert shared.speech_per_second == pytest.approx(2.048 / sum(fewer.values()) / 2)


@pytest.mark.parametrize(
    ("options", "field", "message"),
    [
        ({"model": "huge"}, "model", "model: expected one of"),
        ({"tensor": 2}, "tensor", "tensor: expected a divisor of 1 chips, found 2"),
        (
            {"profile": ServingProfile(history_positions=180)},
            "profile",
            "of 192 positions, found 180 and 67",
        ),
        ({"profile": ServingProfile(9, 1, 10)}, "profile", "question_seconds: expected at most"),
        ({"model": "mini_omni_7b", "profile": None}, "topology", "let more chips share a row"),
    ],
)
def test_serving_report_refuses(options: dict[str, Any], field: str, message: str, batches: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        serving_report(ONE, **{"model": "tiny", "profile": SHORT, **options})
    assert caught.value.field == field


def test_compile_serve_command(batches: dict[str, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ServingReport, "to_json", lambda self: {"rows": self.rows})
    (tmp_path / "mix.yaml").write_text("question_seconds: 0.5\nanswer_seconds: 2.048\nhistory_positions: 100\n")
    command = ["compile", "serve", "--model", "tiny", "--topology", "v5e:1x1"]
    done = CliRunner().invoke(app, [*command, "--profile", str(tmp_path / "mix.yaml")])
    assert "real-time conversations" in done.output
    done = CliRunner().invoke(app, [*command, "--profile", str(tmp_path / "mix.yaml"), "--json"])
    assert json.loads(done.output)["rows"] == batches["decode"]


def test_rows_that_16_gb_hold() -> None:
    """Of 300 positions in the mean three times as many as at full length, with what a step needs besides."""
    config, mesh = PRESETS["mini_omni"], sharding.make_mesh(devices=ONE.devices())
    program = decode_program(config, mesh, 1300, positions=300)
    weights, state, *_ = program.arguments
    assert num_pages(state.caches["trunk"]) * PAGE_LEN == pytest.approx(1300 * (300 + PAGE_LEN / 2), rel=1e-3)
    assert bytes_per_chip(weights) + bytes_per_chip(state) < 0.5 * ONE.chip.hbm_bytes
    assert 1300 < _rows(config, decode_program(config, mesh, 1, positions=300), ONE, 1, mean_pages(config, 300)) < 1500
    assert 440 < _rows(config, decode_program(config, mesh, 1), ONE, 1, 16) < 480


@pytest.mark.slow
def test_serving_report_of_compiled_programs() -> None:
    report = serving_report(ONE, model="tiny", profile=SHORT)
    assert all(seconds > 0 for seconds in report.seconds.values())
    assert all(compiled.fits for compiled in report.reports.values())
    assert json.loads(json.dumps(report.to_json()))["limited_by"] in ("time", "memory")


def test_page_has_rows_of_the_serving_table(batches: dict[str, int]) -> None:
    """In the order of the cases, as the command writes them."""
    assert MARK + table(stated()) in PAGE.read_text(encoding="utf-8")
    case = CASES[0]
    report = serving_report(ONE, model="tiny", profile=SHORT)
    found = figures(line(case, report))
    assert found["speech"] == round(report.speech_per_second)
    assert found["first sound"] == round(report.first_sound_seconds * 1e3)


@pytest.mark.nightly
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_serving_figures_of_the_page(case: Case) -> None:
    assert figures(line(case, case.measure())) == pytest.approx(figures(stated()[case.name]), rel=0.05)
