"""`AsyncEngine`: many clients share a running batch, and none affects the answer of another."""

from __future__ import annotations

import gc
import queue
import threading
import weakref
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
import pytest

from omni_jax.api import Omni, Request
from omni_jax.errors import BusyError, ClosedError, ConfigError
from omni_jax.inference import async_engine
from omni_jax.inference.answer import AnswerBuilder, Chunk, Reply
from omni_jax.inference.async_engine import AsyncEngine, RequestHandle
from omni_jax.inference.engine import Engine, PreparedRequest, Progress
from omni_jax.inference.generation import GenerationConfig
from tests.inference.reference_decoder import CONTEXT, small_omni

pytestmark = pytest.mark.usefixtures("quickly_compiled")


@pytest.fixture(scope="module")
def omni() -> Omni:
    return small_omni()


@pytest.fixture
def engine(omni: Omni) -> Iterator[AsyncEngine]:
    with AsyncEngine(omni, max_batch_size=4, max_queue_size=20) as engine:
        yield engine
    assert not engine._thread.is_alive()


@pytest.fixture(scope="module")
def requests(omni: Omni) -> list[PreparedRequest]:
    audio = np.random.default_rng(0).normal(size=3000).astype(np.float32) / 10
    return [
        omni.prepare(request)
        for request in (
            Request(audio, sample_rate=16_000),
            Request(text="hello"),
            Request(audio[:2000], sample_rate=16_000, task="A1T1"),
            Request(text="a", task="T1T2"),
            Request(text="read", task="T1A1"),
            Request(text="hm", config=GenerationConfig(temperature=0.8, seed=7)),
        )
    ]


@pytest.fixture(scope="module")
def replies(omni: Omni, requests: list[PreparedRequest]) -> list[Reply]:
    return [omni.run([request])[0] for request in requests]


def assert_same_answer(chunks: list[Chunk], expected: Reply) -> None:
    reply = chunks[-1].reply
    assert reply is not None
    np.testing.assert_array_equal(reply.tokens, expected.tokens)
    assert reply.finish_reason == expected.finish_reason
    assert "".join(chunk.text for chunk in chunks) == expected.text
    audio = np.concatenate([chunk.audio for chunk in chunks])
    if expected.audio is None:
        assert not len(audio)
    else:
        np.testing.assert_allclose(audio, expected.audio, atol=1e-4)


class Stepper:
    """Makes an engine wait before every chunk until `go` is called."""

    def __init__(self, engine: AsyncEngine, monkeypatch: pytest.MonkeyPatch):
        self.gate = threading.Semaphore(0)
        self.reached = threading.Semaphore(0)
        advance = engine._advance

        def wait() -> None:
            self.reached.release()
            assert self.gate.acquire(timeout=60)
            advance()

        monkeypatch.setattr(engine, "_advance", wait)

    def go(self, chunks: int = 10_000) -> None:
        self.gate.release(chunks)


def test_concurrent_requests_get_the_tokens_of_single_requests(
    engine: AsyncEngine, requests: list[PreparedRequest], replies: list[Reply]
) -> None:
    received: dict[int, list[Chunk]] = {}

    def client(number: int) -> None:
        received[number] = list(engine.submit(requests[number % len(requests)]))

    threads = [threading.Thread(target=client, args=(number,)) for number in range(18)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert sorted(received) == list(range(18))
    for number, chunks in received.items():
        assert_same_answer(chunks, replies[number % len(requests)])
    assert engine.num_requests == engine.num_active == 0


def test_cancel_frees_batch_slot_without_affecting_others(
    engine: AsyncEngine, requests: list[PreparedRequest], replies: list[Reply], monkeypatch: pytest.MonkeyPatch
) -> None:
    stepper = Stepper(engine, monkeypatch)
    handles = [engine.submit(request) for request in requests]
    stepper.go(2)
    for _ in range(3):
        assert stepper.reached.acquire(timeout=60)
    assert engine.num_active >= 1
    active, queued = handles[0], handles[5]
    for handle in (active, queued):
        handle.cancel()
    stepper.go()
    assert all(chunk.reply is None for handle in (active, queued) for chunk in handle)
    assert (active.outcome, queued.outcome) == ("cancelled", "cancelled")
    for handle, expected in list(zip(handles, replies, strict=True))[1:5]:
        assert_same_answer(list(handle), expected)
        assert handle.outcome == "done"
    active.cancel()
    assert active.outcome == "cancelled"
    assert engine.num_requests == 0


def test_full_queue_raises_busy_error_until_there_is_room(
    omni: Omni, requests: list[PreparedRequest], replies: list[Reply], monkeypatch: pytest.MonkeyPatch
) -> None:
    with AsyncEngine(omni, max_batch_size=1, max_queue_size=1) as engine:
        stepper = Stepper(engine, monkeypatch)
        first, second = engine.submit(requests[1]), engine.submit(requests[3])
        with pytest.raises(BusyError, match="2 requests"):
            engine.submit(requests[1])
        stepper.go()
        assert_same_answer(list(first), replies[1])
        assert_same_answer(list(second), replies[3])
        assert_same_answer(list(engine.submit(requests[1])), replies[1])


def test_timeout_expires_active_and_queued_requests(
    omni: Omni, requests: list[PreparedRequest], replies: list[Reply], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [100.0]
    monkeypatch.setattr(async_engine.time, "monotonic", lambda: now[0])
    with AsyncEngine(omni, max_batch_size=1, max_queue_size=5) as engine:
        stepper = Stepper(engine, monkeypatch)
        active, queued = engine.submit(requests[0], timeout=5), engine.submit(requests[1], timeout=5)
        patient = engine.submit(requests[3], timeout=50)
        stepper.go(1)
        for _ in range(2):
            assert stepper.reached.acquire(timeout=60)
        now[0] += 10
        stepper.go()
        assert [list(active)[-1:], list(queued)] == [[], []] or active.outcome == "expired"
        assert (active.outcome, queued.outcome) == ("expired", "expired")
        assert_same_answer(list(patient), replies[3])


def test_exception_in_one_answer_fails_only_that_request(
    engine: AsyncEngine, requests: list[PreparedRequest], replies: list[Reply], monkeypatch: pytest.MonkeyPatch
) -> None:
    add = AnswerBuilder.add

    def fail(self: AnswerBuilder, progress: Progress) -> Any:
        if self._request is requests[1]:
            raise ZeroDivisionError("in one answer")
        return add(self, progress)

    monkeypatch.setattr(AnswerBuilder, "add", fail)
    failing, other = engine.submit(requests[1]), engine.submit(requests[5])
    assert list(failing) == []
    assert_same_answer(list(other), replies[5])
    assert failing.outcome == "failed"
    monkeypatch.setattr(AnswerBuilder, "add", add)


@pytest.mark.parametrize("faults", [1, 2])
def test_exception_in_batch_is_survived_once_by_active_requests_and_always_by_queued_ones(
    faults: int, omni: Omni, requests: list[PreparedRequest], replies: list[Reply], monkeypatch: pytest.MonkeyPatch
) -> None:
    with AsyncEngine(omni, max_batch_size=1, max_queue_size=2) as engine:
        batch = engine._engine
        route, stepper = batch._route, Stepper(engine, monkeypatch)
        left = [True] * faults

        def fail() -> Any:
            if not left:
                return route()
            left.pop()
            # As when a program that was given the state does not return.
            for array in jax.tree.leaves(batch.state):
                array.delete()
            raise ZeroDivisionError("in the batch")

        monkeypatch.setattr(batch, "_route", fail)
        notified = threading.Event()
        failed, queued = engine.submit(requests[0], notify=notified.set), engine.submit(requests[3])
        stepper.go()
        assert notified.wait(60), "the thread ended without a notification"
        if faults == 1:
            assert_same_answer(list(failed), replies[0])
        else:
            assert list(failed) == []
            assert failed.outcome == "failed"
        assert_same_answer(list(queued), replies[3])
        assert_same_answer(list(engine.submit(requests[0])), replies[0])
        assert engine.num_requests == engine.num_active == 0


def test_requests_are_answered_while_the_rest_is_compiled(
    omni: Omni, requests: list[PreparedRequest], replies: list[Reply], monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled = threading.Semaphore(0)

    def compile_rest(engine: Engine) -> Iterator[None]:
        for _ in range(3):
            assert compiled.acquire(timeout=60)
            yield

    monkeypatch.setattr(Engine, "warm_up", lambda self, stop: None)
    monkeypatch.setattr(Engine, "warm_up_rest", compile_rest)
    with AsyncEngine(omni, max_batch_size=4, warm_up=True) as engine:
        assert engine.ready.wait(60)
        assert_same_answer(list(engine.submit(requests[1])), replies[1])
        assert not engine.warmed_up.is_set()
        compiled.release(3)
        assert engine.warmed_up.wait(60)
        assert_same_answer(list(engine.submit(requests[3])), replies[3])


@pytest.mark.parametrize("warm_up", [False, True])
def test_closed_engine_frees_its_memory_at_once(omni: Omni, warm_up: bool) -> None:
    with AsyncEngine(omni, max_batch_size=1, warm_up=warm_up) as engine:
        assert engine.ready.wait(60)
    inner = weakref.ref(engine._engine)
    gc.disable()
    try:
        del engine
        assert inner() is None
    finally:
        gc.enable()


def test_failing_reset_breaks_engine_and_fails_all_requests(
    omni: Omni, requests: list[PreparedRequest], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> Any:
        raise MemoryError("no room")

    with AsyncEngine(omni, max_batch_size=1, max_queue_size=2) as engine:
        stepper = Stepper(engine, monkeypatch)
        monkeypatch.setattr(engine._engine, "_route", fail)
        monkeypatch.setattr(engine._engine, "reset", fail)
        notified = [threading.Event(), threading.Event()]
        handles = [engine.submit(requests[i], notify=event.set) for i, event in zip((0, 3), notified, strict=True)]
        stepper.go()
        assert all(event.wait(60) for event in notified), "the thread ended without a notification"
        assert [list(handle) for handle in handles] == [[], []]
        assert [handle.outcome for handle in handles] == ["failed", "failed"]
        assert engine.broken
        assert not engine.ready.is_set()
        assert engine.num_requests == 0
        with pytest.raises(ClosedError, match="the model has failed"):
            engine.submit(requests[0])


def test_exception_on_submit_fails_only_that_request(
    omni: Omni, requests: list[PreparedRequest], replies: list[Reply], monkeypatch: pytest.MonkeyPatch
) -> None:
    with AsyncEngine(omni, max_batch_size=1, max_queue_size=2) as engine:
        submit = engine._engine.submit

        def fail(key: int, request: PreparedRequest) -> None:
            if key == 0:
                raise MemoryError("no room")
            submit(key, request)

        monkeypatch.setattr(engine._engine, "submit", fail)
        notified = threading.Event()
        handle = engine.submit(requests[0], notify=notified.set)
        assert notified.wait(60), "the thread ended without a notification"
        assert list(handle) == []
        assert handle.outcome == "failed"
        assert not engine.broken
        assert_same_answer(list(engine.submit(requests[1])), replies[1])


def test_slow_reader_and_failing_notify_do_not_block(
    engine: AsyncEngine, requests: list[PreparedRequest], replies: list[Reply]
) -> None:
    calls: list[bool] = []

    def notify() -> None:
        calls.append(True)
        raise RuntimeError("the event loop has been closed")

    unread = engine.submit(requests[0], notify=notify)
    assert_same_answer(list(engine.submit(requests[1])), replies[1])
    assert_same_answer(list(unread), replies[0])
    assert len(calls) > 1
    ended = engine.submit(requests[3])
    chunks = list(ended)
    assert chunks
    with pytest.raises(queue.Empty):
        ended.get_nowait()


def test_close_finishes_or_cancels_requests(omni: Omni, requests: list[PreparedRequest], replies: list[Reply]) -> None:
    engine = AsyncEngine(omni, max_batch_size=1, max_queue_size=5)
    handles = [engine.submit(requests[1]), engine.submit(requests[3])]
    assert engine.close(finish=True, timeout=60)
    for handle, expected in zip(handles, (replies[1], replies[3]), strict=True):
        assert_same_answer(list(handle), expected)
    with pytest.raises(ClosedError):
        engine.submit(requests[1])

    engine = AsyncEngine(omni, max_batch_size=1, max_queue_size=5)
    handles = [engine.submit(requests[0]) for _ in range(5)]
    engine.close(finish=False)
    outcomes = [(list(handle), handle.outcome)[1] for handle in handles]
    assert outcomes[-1] == "cancelled"
    assert set(outcomes) <= {"done", "cancelled"}


def test_close_with_timeout_cancels_unfinished_requests(
    omni: Omni, requests: list[PreparedRequest], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = AsyncEngine(omni, max_batch_size=1)
    stepper = Stepper(engine, monkeypatch)
    handle = engine.submit(requests[0])
    threading.Timer(0.3, stepper.go).start()
    assert not engine.close(finish=True, timeout=0.05)
    list(handle)
    assert handle.outcome in ("cancelled", "done")


def test_cache_bytes_bound_the_memory_of_all_requests(
    omni: Omni, requests: list[PreparedRequest], replies: list[Reply]
) -> None:
    """Six slots share the memory of one request and its companion row."""
    page = omni.runner.page_bytes(CONTEXT)
    with AsyncEngine(omni, max_batch_size=6, cache_bytes=2 * page + 1) as engine:
        assert sum(x.nbytes for x in jax.tree.leaves(engine._engine.state.caches)) == 2 * page
        assert engine.num_pages == 2
        handles = [engine.submit(request) for request in requests]
        for handle, reply in zip(handles, replies, strict=True):
            assert_same_answer(list(handle), reply)
        assert engine.num_used_pages == 0


@pytest.mark.parametrize("value", [0, -1e9, 1000, float("nan"), float("inf")])
def test_cache_bytes_are_enough_for_a_request(omni: Omni, value: float) -> None:
    with pytest.raises(ConfigError, match=r"cache_bytes: expected .* at least 0\.\d+ GB.*found .* GB") as caught:
        AsyncEngine(omni, max_batch_size=6, cache_bytes=value)
    assert caught.value.field == "cache_bytes"


def test_submit_refuses_request_longer_than_cache(omni: Omni, engine: AsyncEngine) -> None:
    with (
        AsyncEngine(omni, max_batch_size=1, max_len=CONTEXT - 1) as small,
        pytest.raises(ConfigError, match="needs a cache of"),
    ):
        small.submit(omni.prepare(Request(text="a" * 30)))
    with pytest.raises(ValueError, match="expected max_batch_size of 1 or more"):
        AsyncEngine(omni, max_batch_size=0)
    assert engine._engine.max_len == CONTEXT


def test_first_audio_is_measured_from_submission(engine: AsyncEngine, requests: list[PreparedRequest]) -> None:
    with_audio, text_only = engine.submit(requests[0]), engine.submit(requests[3])
    chunks = list(with_audio)
    assert isinstance(with_audio, RequestHandle)
    assert with_audio.first_audio is not None
    assert chunks[-1].reply is not None
    assert chunks[-1].reply.timing.first_audio is not None
    assert 0 < chunks[-1].reply.timing.first_audio <= with_audio.first_audio + 0.5
    list(text_only)
    assert text_only.first_audio is None
