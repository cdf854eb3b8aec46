"""When ProfilerTrace starts and stops."""

import jax
import pytest

from omni_jax.training.profiler import ProfilerTrace


def traced(monkeypatch: pytest.MonkeyPatch, first_step: int, last_step: int, log_interval: int) -> list[str | int]:
    """The calls of the profiler and the steps between them."""
    calls: list[str | int] = []
    monkeypatch.setattr(jax.profiler, "start_trace", lambda folder: calls.append(f"start {folder}"))
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: calls.append("stop"))
    with ProfilerTrace("folder", first_step, last_step, log_interval) as trace:
        for step in range(first_step, last_step):
            trace.update(step, None)
            calls.append(step)
        trace.update(last_step, None)
    return calls


@pytest.mark.parametrize(
    ("first_step", "last_step", "log_interval", "expected"),
    [
        (0, 30, 10, range(10, 15)),
        # A resumed run is traced as well.
        (100, 130, 10, range(110, 115)),
        # A short run is traced as late as possible.
        (0, 12, 10, range(7, 12)),
        (0, 3, 10, range(3)),
    ],
)
def test_profiler_trace_covers_five_steps_of_this_process(
    monkeypatch: pytest.MonkeyPatch, first_step: int, last_step: int, log_interval: int, expected: range
):
    calls = traced(monkeypatch, first_step, last_step, log_interval)
    start, stop = calls.index("start folder"), calls.index("stop")
    assert calls[start + 1 : stop] == list(expected)
    assert [call for call in calls if isinstance(call, str)] == ["start folder", "stop"]


def test_profiler_trace_stops_after_an_error(monkeypatch: pytest.MonkeyPatch):
    calls: list[str] = []
    monkeypatch.setattr(jax.profiler, "start_trace", lambda folder: calls.append("start"))
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: calls.append("stop"))

    def run() -> None:
        with ProfilerTrace("folder", 0, 100, 1) as trace:
            trace.update(0, None)
            trace.update(1, None)
            raise RuntimeError

    with pytest.raises(RuntimeError):
        run()
    assert calls == ["start", "stop"]


def test_profiler_trace_without_a_folder_does_nothing(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(jax.profiler, "start_trace", lambda folder: pytest.fail("started"))
    with ProfilerTrace(None, 0, 10, 1) as trace:
        for step in range(11):
            trace.update(step, None)
