"""The running batch behind a thread: the same answers for everybody, and nobody's misfortune is another's."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
import pytest

from omni_jax.api import Omni, Request
from omni_jax.errors import BusyError, ClosedError, ConfigError
from omni_jax.inference.answer import Answer, Chunk, Reply
from omni_jax.inference.async_engine import AsyncEngine, RequestHandle
from omni_jax.inference.engine import PreparedRequest, Progress
from tests.inference.reference_decoder import CONTEXT, small_omni

pytestmark = pytest.mark.usefixtures("quickly_compiled")


@pytest.fixture(scope="module")
def omni() -> Omni:
    return small_omni()


@pytest.fixture
def live(omni: Omni) -> Iterator[AsyncEngine]:
    with AsyncEngine(omni, slots=4, waiting=20) as live:
        yield live
    assert not live._thread.is_alive()


@pytest.fixture(scope="module")
def requests(omni: Omni) -> list[PreparedRequest]:
    sound = np.random.default_rng(0).normal(size=3000).astype(np.float32) / 10
    return [
        omni.prepare(ask)
        for ask in (
            Request(sound, sample_rate=16_000),
            Request(text="hello"),
            Request(sound[:2000], sample_rate=16_000, task="A1T1"),
            Request(text="a", task="T1T2"),
            Request(text="read", task="T1A1"),
            Request(text="hm", options={"temperature": 0.8, "seed": 7}),
        )
    ]


@pytest.fixture(scope="module")
def answers(omni: Omni, requests: list[PreparedRequest]) -> list[Reply]:
    return [omni.run([request])[0] for request in requests]


def same(parts: list[Chunk], expected: Reply) -> None:
    reply = parts[-1].reply
    assert reply is not None
    np.testing.assert_array_equal(reply.tokens, expected.tokens)
    assert reply.finish_reason == expected.finish_reason
    assert "".join(part.text for part in parts) == expected.text
    sound = np.concatenate([part.audio for part in parts])
    if expected.audio is None:
        assert not len(sound)
    else:
        np.testing.assert_allclose(sound, expected.audio, atol=1e-4)


class Slowly:
    """Makes a live batch wait before every chunk until it is told to go on."""

    def __init__(self, live: AsyncEngine, monkeypatch: pytest.MonkeyPatch):
        self.gate = threading.Semaphore(0)
        self.reached = threading.Semaphore(0)
        advance = live._advance

        def wait() -> None:
            self.reached.release()
            assert self.gate.acquire(timeout=60)
            advance()

        monkeypatch.setattr(live, "_advance", wait)

    def go(self, chunks: int = 10_000) -> None:
        self.gate.release(chunks)


def test_everybody_hears_what_they_would_hear_alone(
    live: AsyncEngine, requests: list[PreparedRequest], answers: list[Reply]
) -> None:
    heard: dict[int, list[Chunk]] = {}

    def talk(number: int) -> None:
        heard[number] = list(live.ask(requests[number % len(requests)]))

    threads = [threading.Thread(target=talk, args=(number,)) for number in range(18)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert sorted(heard) == list(range(18))
    for number, parts in heard.items():
        same(parts, answers[number % len(requests)])
    assert live.alive == live.occupied == 0


def test_who_leaves_makes_room_and_the_others_notice_nothing(
    live: AsyncEngine, requests: list[PreparedRequest], answers: list[Reply], monkeypatch: pytest.MonkeyPatch
) -> None:
    slowly = Slowly(live, monkeypatch)
    talks = [live.ask(request) for request in requests]
    slowly.go(2)
    for _ in range(3):
        assert slowly.reached.acquire(timeout=60)
    assert live.occupied >= 1
    seated, queued = talks[0], talks[5]
    for talk in (seated, queued):
        talk.cancel()
    slowly.go()
    assert all(part.reply is None for talk in (seated, queued) for part in talk)
    assert (seated.outcome, queued.outcome) == ("cancelled", "cancelled")
    for talk, expected in list(zip(talks, answers, strict=True))[1:5]:
        same(list(talk), expected)
        assert talk.outcome == "done"
    seated.cancel()
    assert seated.outcome == "cancelled"
    assert live.alive == 0


def test_more_than_may_wait_are_refused_and_come_in_later(
    omni: Omni, requests: list[PreparedRequest], answers: list[Reply], monkeypatch: pytest.MonkeyPatch
) -> None:
    with AsyncEngine(omni, slots=1, waiting=1) as live:
        slowly = Slowly(live, monkeypatch)
        first, second = live.ask(requests[1]), live.ask(requests[3])
        with pytest.raises(BusyError, match="2 requests"):
            live.ask(requests[1])
        slowly.go()
        same(list(first), answers[1])
        same(list(second), answers[3])
        same(list(live.ask(requests[1])), answers[1])


def test_deadlines_end_what_waits_and_what_runs(
    omni: Omni, requests: list[PreparedRequest], answers: list[Reply], monkeypatch: pytest.MonkeyPatch
) -> None:
    import omni_jax.inference.async_engine as module

    now = [100.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    with AsyncEngine(omni, slots=1, waiting=5) as live:
        slowly = Slowly(live, monkeypatch)
        running, waiting = live.ask(requests[0], seconds=5), live.ask(requests[1], seconds=5)
        patient = live.ask(requests[3], seconds=50)
        slowly.go(1)
        for _ in range(2):
            assert slowly.reached.acquire(timeout=60)
        now[0] += 10
        slowly.go()
        assert [list(running)[-1:], list(waiting)] == [[], []] or running.outcome == "expired"
        assert (running.outcome, waiting.outcome) == ("expired", "expired")
        same(list(patient), answers[3])


def test_a_fault_in_one_answer_ends_that_one(
    live: AsyncEngine, requests: list[PreparedRequest], answers: list[Reply], monkeypatch: pytest.MonkeyPatch
) -> None:
    hear = Answer.hear

    def fail(self: Answer, progress: Progress) -> Any:
        if self.request is requests[1]:
            raise ZeroDivisionError("in one answer")
        return hear(self, progress)

    monkeypatch.setattr(Answer, "hear", fail)
    failing, fine = live.ask(requests[1]), live.ask(requests[5])
    assert list(failing) == []
    same(list(fine), answers[5])
    assert failing.outcome == "failed"
    monkeypatch.setattr(Answer, "hear", hear)


def test_a_fault_of_the_batch_ends_what_runs_and_who_waits_is_answered(
    omni: Omni, requests: list[PreparedRequest], answers: list[Reply], monkeypatch: pytest.MonkeyPatch
) -> None:
    with AsyncEngine(omni, slots=1, waiting=2) as live:
        engine = live._engine
        route, slowly = engine._route, Slowly(live, monkeypatch)

        def fail() -> Any:
            # As when a program that was given the state does not return.
            for array in jax.tree.leaves(engine.state):
                array.delete()
            monkeypatch.setattr(engine, "_route", route)
            raise ZeroDivisionError("in the batch")

        monkeypatch.setattr(engine, "_route", fail)
        told = threading.Event()
        lost, waiting = live.ask(requests[0], notify=told.set), live.ask(requests[3])
        slowly.go()
        assert told.wait(60), "the thread has died and nobody hears of it"
        assert list(lost) == []
        assert lost.outcome == "failed"
        same(list(waiting), answers[3])
        same(list(live.ask(requests[0])), answers[0])
        assert live.alive == live.occupied == 0


def test_a_batch_that_cannot_begin_anew_tells_everybody_and_answers_nothing_more(
    omni: Omni, requests: list[PreparedRequest], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> Any:
        raise MemoryError("no room")

    with AsyncEngine(omni, slots=1, waiting=2) as live:
        slowly = Slowly(live, monkeypatch)
        monkeypatch.setattr(live._engine, "_route", fail)
        monkeypatch.setattr(live._engine, "begin_anew", fail)
        told = [threading.Event(), threading.Event()]
        talks = [live.ask(requests[index], notify=event.set) for index, event in zip((0, 3), told, strict=True)]
        slowly.go()
        assert all(event.wait(60) for event in told), "the thread has died and nobody hears of it"
        assert [list(talk) for talk in talks] == [[], []]
        assert [talk.outcome for talk in talks] == ["failed", "failed"]
        assert live.broken
        assert not live.ready.is_set()
        assert live.alive == 0
        with pytest.raises(ClosedError, match="the model has failed"):
            live.ask(requests[0])


def test_whatever_ends_the_thread_is_told(
    omni: Omni, requests: list[PreparedRequest], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> Any:
        raise MemoryError("no room")

    with AsyncEngine(omni, slots=1, waiting=2) as live:
        monkeypatch.setattr(live._engine, "submit", fail)
        told = threading.Event()
        talk = live.ask(requests[0], notify=told.set)
        assert told.wait(60), "the thread has died and nobody hears of it"
        assert list(talk) == []
        assert talk.outcome == "failed"
        assert live.broken


def test_a_reader_may_be_slow_or_gone(live: AsyncEngine, requests: list[PreparedRequest], answers: list[Reply]) -> None:
    calls: list[bool] = []

    def gone() -> None:
        calls.append(True)
        raise RuntimeError("the event loop has been closed")

    unread = live.ask(requests[0], notify=gone)
    same(list(live.ask(requests[1])), answers[1])
    same(list(unread), answers[0])
    assert len(calls) > 1
    ended = live.ask(requests[3])
    parts = list(ended)
    assert parts
    with pytest.raises(queue.Empty):
        ended.get_nowait()


def test_closing_finishes_or_cancels_what_runs(
    omni: Omni, requests: list[PreparedRequest], answers: list[Reply]
) -> None:
    live = AsyncEngine(omni, slots=1, waiting=5)
    talks = [live.ask(requests[1]), live.ask(requests[3])]
    assert live.close(finish=True, seconds=60)
    for talk, expected in zip(talks, (answers[1], answers[3]), strict=True):
        same(list(talk), expected)
    with pytest.raises(ClosedError):
        live.ask(requests[1])

    live = AsyncEngine(omni, slots=1, waiting=5)
    talks = [live.ask(requests[0]) for _ in range(5)]
    live.close(finish=False)
    outcomes = [(list(talk), talk.outcome)[1] for talk in talks]
    assert outcomes[-1] == "cancelled"
    assert set(outcomes) <= {"done", "cancelled"}


def test_closing_in_time_cancels_what_takes_longer(
    omni: Omni, requests: list[PreparedRequest], monkeypatch: pytest.MonkeyPatch
) -> None:
    live = AsyncEngine(omni, slots=1)
    slowly = Slowly(live, monkeypatch)
    talk = live.ask(requests[0])
    threading.Timer(0.3, slowly.go).start()
    assert not live.close(finish=True, seconds=0.05)
    list(talk)
    assert talk.outcome in ("cancelled", "done")


def test_what_cannot_be_answered_is_refused_at_the_door(omni: Omni, live: AsyncEngine) -> None:
    with AsyncEngine(omni, slots=1, length=CONTEXT - 1) as small, pytest.raises(ConfigError, match="needs a cache of"):
        small.ask(omni.prepare(Request(text="a" * 30)))
    with pytest.raises(ValueError, match="at least 1 slot"):
        AsyncEngine(omni, slots=0)
    assert live._length == CONTEXT


def test_the_first_sound_is_timed_from_the_asking(live: AsyncEngine, requests: list[PreparedRequest]) -> None:
    speaking, writing = live.ask(requests[0]), live.ask(requests[3])
    parts = list(speaking)
    assert isinstance(speaking, RequestHandle)
    assert speaking.first_sound is not None
    assert parts[-1].reply is not None
    assert parts[-1].reply.timing.first_sound is not None
    assert 0 < parts[-1].reply.timing.first_sound <= speaking.first_sound + 0.5
    list(writing)
    assert writing.first_sound is None
