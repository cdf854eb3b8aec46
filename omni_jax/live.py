"""One running batch for everybody who talks at once: any thread may ask, parts come back as they are made.

A thread of its own drives the engine. Whoever asks gets a `Talk` and reads its parts at leisure: nobody waits for
a slow reader, and one who leaves gives the slot back. An answer is the same as `Omni.run` gives, token for token,
whoever is answered beside it.
"""

from __future__ import annotations

import itertools
import logging
import queue
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Literal

from omni_jax.api import Answer, Omni, Part
from omni_jax.codec.snac import StreamDecoder
from omni_jax.inference.engine import FEW_BUCKETS, Engine, Request

Outcome = Literal["done", "cancelled", "expired", "failed"]

log = logging.getLogger(__name__)


class BusyError(RuntimeError):
    """As many requests are waiting as may; try again later."""


class ClosedError(RuntimeError):
    """Nothing is answered any more."""


@dataclass(eq=False)
class Talk:
    """A request that is being answered. Iterate over it for the parts; it ends with the answer, or without one."""

    request: Request
    deadline: float | None
    """On the clock of `time.monotonic`."""
    notify: Callable[[], object] | None
    outcome: Outcome | None = None
    """None while it goes on; set before the last thing that the iteration gives."""
    asked: float = field(default_factory=time.monotonic)
    first_sound: float | None = None
    """Seconds from when it was asked until its first sound was there, waiting included."""
    _parts: queue.SimpleQueue[Part | None] = field(default_factory=queue.SimpleQueue)
    _wish: Callable[[Talk], None] | None = None

    def __iter__(self) -> Iterator[Part]:
        """Parts as they are made; blocks in between."""
        while (part := self._parts.get()) is not None:
            yield part

    def get_nowait(self) -> Part | None:
        """The next part if it is there, None when there are no more.

        Raises:
            queue.Empty: there is nothing yet; `notify` is called, from another thread, when there is.
        """
        return self._parts.get_nowait()

    def cancel(self) -> None:
        """Stop answering; without effect on one that has ended."""
        if self._wish is not None:
            self._wish(self)

    def _put(self, part: Part) -> None:
        if self.first_sound is None and len(part.audio):
            self.first_sound = time.monotonic() - self.asked
        if part.reply is not None:
            self.outcome = "done"
        self._parts.put(part)
        self._tell()

    def _end(self, outcome: Outcome) -> None:
        self.outcome = self.outcome or outcome
        self._parts.put(None)
        self._tell()

    def _tell(self) -> None:
        if self.notify is not None:
            try:
                self.notify()
            except Exception:
                # Whoever wanted to know has gone, which is no reason to let the others down.
                log.debug("a reader could not be told", exc_info=True)


class Live:
    """A running batch and the thread that drives it; a context manager, which closes it.

    Attributes:
        omni: the model.
        slots: answered at once.
        waiting: how many more may be queued.
        ready: set when everything that was to be compiled beforehand is.
        broken: whether a fault has ended the thread: nothing is answered any more.
    """

    def __init__(
        self, omni: Omni, *, slots: int = 8, waiting: int = 64, length: int | None = None, warm_up: bool = False
    ):
        """Start.

        Args:
            omni: the model.
            slots: how many are answered at once.
            waiting: how many more may be queued; further ones are refused.
            length: positions of each slot's cache; None: the trunk's context.
            warm_up: compile all that any request can need first, so that none waits for it later.
        """
        if slots < 1 or waiting < 0:
            raise ValueError(f"expected at least 1 slot and 0 or more waiting, found {slots} and {waiting}")
        self.omni, self.slots, self.waiting = omni, slots, waiting
        self._length = length or omni.config.trunk.context
        self._keys = itertools.count()
        self._lock = threading.Condition()
        # What other threads want; under the lock.
        self._new: list[tuple[int, Talk]] = []
        self._unwanted: set[Talk] = set()
        self._closing: Literal["finish", "cancel"] | None = None
        # The thread's own; changed under the lock too, so that others can count them.
        self._talks: dict[int, tuple[Talk, Answer]] = {}
        self._engine = Engine(omni.programs, slots, self._length, FEW_BUCKETS)
        self.ready = threading.Event()
        self.broken = False
        self._thread = threading.Thread(target=self._run, args=(warm_up,), name="omni_jax live", daemon=True)
        self._thread.start()

    def __enter__(self) -> Live:
        """Itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close; what runs is cancelled."""
        self.close(finish=False)

    @property
    def alive(self) -> int:
        """Requests that are being answered or wait for it."""
        with self._lock:
            return len(self._new) + len(self._talks)

    @property
    def occupied(self) -> int:
        """Slots in use."""
        return sum(seat is not None for seat in self._engine.seats)

    def ask(
        self, request: Request, *, seconds: float | None = None, notify: Callable[[], object] | None = None
    ) -> Talk:
        """Queue a prepared request (`Omni.prepare`).

        Args:
            request: what to answer.
            seconds: after which it is given up, queued or running; its outcome is `expired` then.
            notify: called from another thread whenever there is something new to read.

        Raises:
            BusyError: the queue is full.
            ClosedError: this is closed or being closed, or broken.
            ConfigError: the request does not fit the slots' caches.
        """
        self._engine.check(request)
        deadline = None if seconds is None else time.monotonic() + seconds
        talk = Talk(request, deadline, notify, _wish=self._cancel)
        with self._lock:
            if self._closing is not None:
                why = "the model has failed" if self.broken else "this is being closed"
                raise ClosedError(f"nothing is answered any more: {why}")
            if self.alive >= self.slots + self.waiting:
                raise BusyError(f"{self.alive} requests are running or waiting, no more may; try again later")
            self._new.append((next(self._keys), talk))
            self._lock.notify()
        return talk

    def close(self, *, finish: bool = True, seconds: float | None = None) -> bool:
        """Answer nothing new, and end.

        Args:
            finish: whether what is queued or running is answered first; otherwise it is cancelled.
            seconds: to wait at most; what has not ended by then is cancelled.

        Returns:
            Whether everything was answered that was to be.
        """
        with self._lock:
            self._closing = "finish" if finish else "cancel"
            self._lock.notify()
        self._thread.join(seconds)
        in_time = not self._thread.is_alive()
        if not in_time:
            with self._lock:
                self._closing = "cancel"
                self._lock.notify()
            self._thread.join()
        return in_time

    def _cancel(self, talk: Talk) -> None:
        with self._lock:
            if talk.outcome is None:
                self._unwanted.add(talk)
                self._lock.notify()

    def _run(self, warm_up: bool) -> None:
        try:
            self._work(warm_up)
        except Exception:
            # Whatever it is that ends the thread: nobody is to wait for it in vain.
            log.exception("the model has failed: nothing is answered any more")
            with self._lock:
                self.broken, self._closing = True, "cancel"
                talks = [talk for _, talk in self._new] + [talk for talk, _ in self._talks.values()]
                self._new.clear()
                self._talks.clear()
            self.ready.clear()
            for talk in talks:
                talk._end("failed")

    def _work(self, warm_up: bool) -> None:
        if warm_up:
            self._engine.warm_up()
            StreamDecoder(self.omni.codec, self.omni.config.codec).warm_up()
        if self._closing != "cancel":
            self.ready.set()
        while self._take_orders():
            try:
                self._advance()
            except Exception:
                # A fault must not end the service. What the batch holds is lost with it, who waits is answered yet.
                log.exception("the running batch failed and is begun anew")
                self._engine.begin_anew()
                waiting = {key for key, _ in self._engine.queue}
                for key in self._talks.keys() - waiting:
                    self._end(key, "failed")

    def _take_orders(self) -> bool:
        """Wait for something to do, take what others want; False when all is done."""
        with self._lock:
            while not (self._new or self._unwanted or self._talks or self._closing):
                self._lock.wait()
            new, self._new = self._new, []
            unwanted, self._unwanted = self._unwanted, set()
            closing = self._closing
            for key, talk in new:
                self._talks[key] = (talk, Answer(self.omni, talk.request))
        for key, talk in new:
            self._engine.submit(key, talk.request)
        now = time.monotonic()
        for key, (talk, _) in list(self._talks.items()):
            if talk in unwanted or closing == "cancel":
                self._end(key, "cancelled")
            elif talk.deadline is not None and talk.deadline <= now:
                self._end(key, "expired")
        return bool(self._talks) or closing is None

    def _advance(self) -> None:
        if not self._engine.busy:
            return
        seated = {seat.key for seat in self._engine.seats if seat is not None}
        # Newcomers are seated before the chunk begins, and want their first sound soon.
        newcomers = self.slots > len(seated) and self._engine.queue
        wishes = [answer.next_steps for key, (_, answer) in self._talks.items() if key in seated or newcomers]
        for progress in self._engine.advance(min(wishes, default=1)):
            talk, answer = self._talks[progress.key]
            try:
                part = answer.hear(progress)
            except Exception:
                log.exception("an answer failed")
                self._end(progress.key, "failed")
                continue
            if part is not None:
                talk._put(part)
            if progress.finish:
                self._end(progress.key, "done")

    def _end(self, key: int, outcome: Outcome) -> None:
        self._engine.cancel(key)
        with self._lock:
            talk, _ = self._talks.pop(key)
        talk._end(outcome)
