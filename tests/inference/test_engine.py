"""The engine against the reference decoder: the same tokens for every task, in any batch, with the fewest products."""

from __future__ import annotations

import dataclasses
import itertools
import re
import reprlib
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from omni_jax.config.model import ModelConfig
from omni_jax.delay import undelay
from omni_jax.errors import ConfigError
from omni_jax.inference.decode import Routing
from omni_jax.inference.engine import Engine, PreparedRequest, Progress
from omni_jax.inference.generation import GenerationConfig
from omni_jax.inference.runner import ModelRunner, jitted_functions
from omni_jax.prompts import Prompt, speech_prompt, text_prompt
from omni_jax.tasks import Task
from omni_jax.vocab import TEXT_STREAM, Vocab
from tests.inference.reference_decoder import CONTEXT, ReferenceDecoder, random_model, random_request, small_config
from tests.models import compiles_nothing, quick_compile

Answer = tuple[np.ndarray, str]


def mixed_requests(config: ModelConfig) -> list[PreparedRequest]:
    """Every task greedy and sampled, with every setting that changes what is output; short ones and long ones."""

    def ask(task: Task, content: int, length: int | None = None, **settings: Any) -> PreparedRequest:
        return random_request(config, task, content, length, **settings)

    warm: dict[str, Any] = {"temperature": 0.7}
    return [
        *(ask(task, 10 * i) for i, task in enumerate(Task)),
        *(ask(task, 10 * i + 1, **warm, seed=i) for i, task in enumerate(Task)),
        ask(Task.A1A2, 0, batch_parallel=False),
        ask(Task.A1A2, 1, batch_parallel=False, **warm, seed=10),
        ask(Task.A1A2, 0, enforce_delay=False),
        ask(Task.T1A2, 31, enforce_delay=False, **warm, seed=5),
        ask(Task.T1A1, 50, enforce_delay=False),
        ask(Task.A1A2, 3, temperature=1.5, top_k=4, seed=2**32 - 1),
        ask(Task.T1A2, 33, temperature=1.5, top_p=0.7, seed=9),
        ask(Task.A1T2, 11, temperature=1.5, top_k=6, top_p=0.8),
        ask(Task.A1A2, 4, max_steps=1),
        ask(Task.T1A2, 30, max_steps=9),
        ask(Task.T1T2, 41, max_steps=5),
        ask(Task.A1T1, 25, max_steps=1000),
        ask(Task.A1A2, 5, length=config.audio_encoder.max_position),
        ask(Task.T1T2, 46, length=CONTEXT - 3),  # a prompt that fills the context: one step
    ]


@dataclass
class Family:
    """A model with its compiled programs, requests, and what the reference decoder answers to them."""

    runner: ModelRunner
    requests: list[PreparedRequest]
    expected: list[Answer]
    slots: int
    slow: ReferenceDecoder


def family(
    slots: int, *, stacked: bool, seed: int, eot: float = 1.5, encoder: dict[str, bool] | None = None, **config: Any
) -> Family:
    """The seeds are chosen so that what `test_the_interesting_events_occur` lists does occur."""
    # The number of compilations is counted.
    jitted_functions.cache_clear()
    shape = small_config(**config)
    shape = dataclasses.replace(shape, audio_encoder=dataclasses.replace(shape.audio_encoder, **(encoder or {})))
    model = random_model(shape, stacked=stacked, seed=seed, eot=eot, eoa=1.5)
    runner = ModelRunner(model)
    requests, slow = mixed_requests(model.config), ReferenceDecoder(model, runner.encode_audio)
    return Family(runner, requests, [slow(request) for request in requests], slots, slow)


@pytest.fixture(scope="module")
def tied() -> Family:
    return family(3, stacked=False, seed=1)


@pytest.fixture(scope="module")
def untied_with_tts_adapter() -> Family:
    with quick_compile():
        return family(1, stacked=False, seed=2, eot=2.5, tied=False, tts_adapter_layers=1, qkv_bias=False)


@pytest.fixture(scope="module")
def stacked_with_tts_adapter() -> Family:
    with quick_compile():
        return family(2, stacked=True, seed=0, tied=False, tts_adapter_layers=1)


@pytest.fixture(scope="module")
def masked() -> Family:
    """Recordings are encoded in windows of 5, 10 or 20 positions, by the reference always in 20."""
    with quick_compile():
        return family(3, stacked=False, seed=1, encoder={"mask_padding": True})


@pytest.fixture(scope="module")
def short_windows() -> Family:
    """The same windows without a mask: each recording has its own, whatever is encoded with it."""
    with quick_compile():
        return family(3, stacked=False, seed=1, encoder={"short_windows": True})


class Recorder(ModelRunner):
    """A runner that records each chunk: its routing, the requests in its slots, and the steps it took."""

    def __init__(self, runner: ModelRunner):
        self.__dict__.update(vars(runner))
        self.engine: Engine | None = None
        self.calls: list[tuple[Routing, list[Any], np.ndarray]] = []

    def decode_chunk(self, state: Any, routing: Routing, steps: Any) -> Any:
        before = np.asarray(state.step)
        active = [dataclasses.replace(request) if request else None for request in self.engine.active]
        out = super().decode_chunk(state, routing, steps)
        self.calls.append((routing, active, np.asarray(out[2][0]) - before))
        return out

    @property
    def sizes(self) -> list[tuple[int, int, int]]:
        return [routing.sizes for routing, _, _ in self.calls]


class Collected:
    """What an engine has reported so far."""

    def __init__(self) -> None:
        self.parts: defaultdict[int, list[np.ndarray]] = defaultdict(list)
        self.finish: dict[int, str] = {}

    def add(self, news: Sequence[Progress]) -> None:
        for progress in news:
            assert progress.key not in self.finish, "no progress follows the end"
            self.parts[progress.key].append(progress.tokens)
            if progress.finish:
                self.finish[progress.key] = progress.finish

    def answers(self, keys: Sequence[int]) -> list[Answer]:
        return [(np.concatenate(self.parts[key], axis=1), self.finish[key]) for key in keys]


def run(runner: ModelRunner, requests: Sequence[PreparedRequest], slots: int, steps: int = 64) -> list[Answer]:
    engine = Engine(runner, slots, CONTEXT)
    if isinstance(runner, Recorder):
        runner.engine = engine
    return run_on(engine, requests, steps)


def run_on(engine: Engine, requests: Sequence[PreparedRequest], steps: int) -> list[Answer]:
    for key, request in enumerate(requests):
        engine.submit(key, request)
    collected = Collected()
    for progress in engine.run(steps):
        assert progress.tokens.shape[1] <= steps
        collected.add([progress])
    assert not engine.busy
    return collected.answers(range(len(requests)))


def assert_same(found: Sequence[Answer], expected: Sequence[Answer]) -> None:
    for (tokens, finish), (right, why) in zip(found, expected, strict=True):
        assert tokens.dtype == np.int32
        np.testing.assert_array_equal(tokens, right)
        assert finish == why


@pytest.mark.parametrize("steps", [1, 3, 64])
def test_engine_tokens_of_a_mixed_batch_equal_the_reference(tied: Family, steps: int) -> None:
    assert_same(run(tied.runner, tied.requests, tied.slots, steps), tied.expected)


@pytest.mark.parametrize(
    "name",
    [
        pytest.param("masked", marks=pytest.mark.slow),
        pytest.param("short_windows", marks=pytest.mark.slow),
        pytest.param("stacked_with_tts_adapter", marks=pytest.mark.slow),
        pytest.param("untied_with_tts_adapter", marks=pytest.mark.nightly),
    ],
)
def test_engine_tokens_of_other_models_equal_the_reference(name: str, request: pytest.FixtureRequest) -> None:
    other: Family = request.getfixturevalue(name)
    # Without the two of unusual length, whose prefill has shapes of its own.
    requests, expected = other.requests[:-2], other.expected[:-2]
    with quick_compile():
        assert_same(run(other.runner, requests, other.slots, 5), expected)


@pytest.mark.parametrize(
    "name",
    [
        "tied",
        pytest.param("untied_with_tts_adapter", marks=pytest.mark.slow),
        pytest.param("stacked_with_tts_adapter", marks=pytest.mark.slow),
    ],
)
def test_reference_answers_contain_every_event_of_interest(name: str, request: pytest.FixtureRequest) -> None:
    """The comparisons above prove nothing about events that never occur in them."""
    it: Family = request.getfixturevalue(name)
    v = Vocab(it.runner.config.vocab)
    seen = set()
    for ask, (tokens, finish) in zip(it.requests, it.expected, strict=True):
        task, steps = ask.prompt.task, tokens.shape[1]
        seen.add(f"finish {finish}")
        ends = np.flatnonzero(tokens[TEXT_STREAM] == v.eot)
        if task.outputs_audio and task.outputs_text:
            if len(ends) and ends[0] < steps - 5:
                seen.add("text ends long before speech")
                if ask.has_companion:
                    seen.add("text ends long before speech, batch-parallel")
                assert (tokens[TEXT_STREAM, ends[0] + 1 :] == v.pad_t).all()
            if not len(ends) and finish == "stop":
                seen.add("speech ends before text")
        if task.outputs_audio and finish == "stop" and ask.config.enforce_delay:
            assert undelay(tokens[:TEXT_STREAM], v).shape[0] == steps - 8
            seen.add("frames" if steps > 8 else "no frames")
        if not ask.config.enforce_delay and (tokens[0, :1] != v.pad_a).any():
            seen.add("a codebook outputs codes before it is due")
        if task is Task.T1A1:
            assert (tokens[TEXT_STREAM] == v.pad_t).all()
        if not task.outputs_audio:
            assert (tokens[:TEXT_STREAM] == v.pad_a).all()
            seen.add(f"{finish} of text alone")
        if len(ask.prompt) == CONTEXT:
            assert steps == 1
    expected = {
        "finish stop",
        "finish length",
        "finish context",
        "text ends long before speech",
        "text ends long before speech, batch-parallel",
        "speech ends before text",
        "frames",
        "a codebook outputs codes before it is due",
        "stop of text alone",
        "length of text alone",
        "context of text alone",
    }
    assert expected <= seen


def test_batch_parallel_and_enforced_delay_matter(tied: Family) -> None:
    """Requests that differ in one option alone get different answers."""
    plain, single, free = tied.expected[0], tied.expected[12], tied.expected[14]
    assert tied.requests[0].has_companion
    assert not tied.requests[12].has_companion
    assert plain[0].tobytes() != single[0].tobytes()
    assert plain[0].tobytes() != free[0].tobytes()


def test_decoding_uses_the_context_to_its_last_position(tied: Family) -> None:
    for request, (tokens, finish) in zip(tied.requests, tied.expected, strict=True):
        if finish == "context":
            assert len(request.prompt) + tokens.shape[1] == CONTEXT + 1


def test_tokens_do_not_depend_on_batch_composition_or_slot(tied: Family) -> None:
    picked = [0, 1, 6, 9, 11, 15]
    requests, expected = [tied.requests[i] for i in picked], [tied.expected[i] for i in picked]
    for request, right in zip(requests, expected, strict=True):
        assert_same(run(tied.runner, [request], tied.slots), [right])
    assert_same(run(tied.runner, requests[::-1], tied.slots, 2), expected[::-1])
    for tokens, _ in run(tied.runner, [requests[2]] * 4, tied.slots):
        assert tokens.tobytes() == expected[2][0].tobytes()


def test_submit_while_others_run(tied: Family) -> None:
    engine = Engine(tied.runner, tied.slots, CONTEXT)
    collected = Collected()
    waiting = list(enumerate(tied.requests[:12]))
    rounds = 0
    while waiting or engine.busy:
        if waiting and rounds % 3 == 0:
            engine.submit(*waiting.pop(0))
        collected.add(engine.advance(4))
        rounds += 1
    assert_same(collected.answers(range(12)), tied.expected[:12])


@pytest.mark.parametrize("rounds", [0, 1, 2, 5])
def test_cancel_frees_batch_slot_without_affecting_others(tied: Family, rounds: int) -> None:
    engine = Engine(tied.runner, tied.slots, CONTEXT)
    for key, request in enumerate(tied.requests[:12]):
        engine.submit(key, request)
    collected = Collected()
    for _ in range(rounds):
        collected.add(engine.advance(2))
    in_slots = [active.key for active in engine.active if active is not None]
    chosen = [*in_slots[:2], 11]
    for key in chosen:
        assert engine.cancel(key)
        assert not engine.cancel(key)
    assert not [active for active in engine.active if active is not None and active.key in chosen]
    if in_slots:
        assert engine.active.count(None) >= 2
    before = {key: len(collected.parts[key]) for key in chosen}
    while engine.busy:
        collected.add(engine.advance(2))
    assert before == {key: len(collected.parts[key]) for key in chosen}
    left = [key for key in range(12) if key not in chosen]
    assert_same(collected.answers(left), [tied.expected[key] for key in left])
    assert not engine.cancel(left[0])
    assert engine.active == [None] * tied.slots


def test_active_requests_wait_for_at_most_one_prefill(tied: Family, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine(tied.runner, tied.slots, CONTEXT)
    prefills: list[int] = []
    prefill = engine._prefill
    monkeypatch.setattr(engine, "_prefill", lambda *args: (prefills.append(len(args[-1])), prefill(*args)))
    engine.submit(0, tied.requests[0])
    engine.advance(1)
    assert prefills == [1]
    for key in range(1, 8):  # of several lengths, with speech and without
        engine.submit(key, tied.requests[key])
    collected = Collected()
    while engine.busy:
        others = any(active is not None for active in engine.active)
        prefills.clear()
        collected.add(engine.advance(1))
        assert len(prefills) <= 1 or not others
    assert_same(collected.answers(range(8)), tied.expected[:8])


def test_waiting_questions_are_encoded_together_between_two_chunks(tied: Family) -> None:
    """Questions of one window in one call; others wait for a chunk of those that are being answered."""
    encoder = dataclasses.replace(tied.runner.config.audio_encoder, short_windows=True)
    events: list[Any] = []

    class Encoder(Recorder):
        def encode_audio(self, audio: Any) -> Any:
            events.append((audio.shape[0], audio.shape[1] // 320))
            return super().encode_audio(jnp.pad(audio, ((0, 0), (0, encoder.max_samples - audio.shape[1]))))

        def decode_chunk(self, *args: Any) -> Any:
            events.append("chunk")
            return super().decode_chunk(*args)

    runner = Encoder(tied.runner)
    runner.config = dataclasses.replace(tied.runner.config, audio_encoder=encoder)
    runner.engine = engine = Engine(runner, tied.slots, CONTEXT)
    engine.submit(0, next(request for request in tied.requests if not request.task.takes_audio))
    engine.advance(1)
    random = np.random.default_rng(0)
    for key, positions in enumerate((3, 12, 3), 1):
        sound = random.normal(size=320 * positions - 1).astype(np.float32)
        config = GenerationConfig(max_steps=2)
        engine.submit(key, PreparedRequest.of(speech_prompt(Task.A1A2, positions, engine.vocab), sound, config))
    for _ in range(8):
        engine.advance(1)
    chunks = [index for index, event in enumerate(events) if event == "chunk"]
    assert [event for event in events if event != "chunk"] == [(2, encoder.windows[0]), (1, encoder.windows[2])]
    assert max(after - before for before, after in pairwise(chunks)) == 2


def test_advance_of_an_idle_engine_returns_nothing(tied: Family) -> None:
    engine = Engine(tied.runner, tied.slots, CONTEXT)
    assert not engine.busy
    assert engine.advance() == []


def test_routing_has_only_rows_whose_result_is_read(tied: Family) -> None:
    recorder = Recorder(tied.runner)
    assert_same(run(recorder, tied.requests, tied.slots, 4), tied.expected)
    for routing, active, _ in recorder.calls:
        live = {slot: active for slot, active in enumerate(active) if active is not None and active.running}
        text_slots = {slot for slot, active in live.items() if active.text_pending}
        audio_slots = {slot for slot, active in live.items() if active.request.prompt.task.outputs_audio}
        pairs = {slot for slot in text_slots if live[slot].request.has_companion}
        companions, texts, audios = (
            [slot for slot in np.asarray(x).tolist() if slot < tied.slots]
            for x in (routing.companion_slot, routing.text_slot, routing.audio_slot)
        )
        assert sorted(companions) == sorted(pairs)
        assert sorted(texts) == sorted(text_slots)
        assert sorted(audios) == sorted(audio_slots)
        assert [size > 0 for size in routing.sizes] == [bool(pairs), bool(text_slots), bool(audio_slots)]
        for slot in pairs:
            assert active[slot].request.prompt.task is Task.A1A2
            assert active[slot].request.config.batch_parallel
        rows = np.asarray(routing.text_row).tolist()[: len(texts)]
        for slot, row in zip(texts, rows, strict=True):
            companion = np.asarray(routing.companion_slot).tolist()[row - tied.slots] if row >= tied.slots else None
            assert (row, companion) == ((slot, None) if slot not in pairs else (row, slot))
    assert {(3, 3, 3), (0, 3, 3), (0, 0, 3)} <= set(recorder.sizes)


def test_routing_of_text_tasks_has_no_audio_rows(tied: Family) -> None:
    chosen = [i for i, request in enumerate(tied.requests) if not request.prompt.task.outputs_audio]
    recorder = Recorder(tied.runner)
    answers = run(recorder, [tied.requests[i] for i in chosen], tied.slots, 8)
    assert_same(answers, [tied.expected[i] for i in chosen])
    assert set(recorder.sizes) == {(0, 3, 0)}


def test_routing_of_read_aloud_has_no_text_rows(tied: Family) -> None:
    chosen = [i for i, request in enumerate(tied.requests) if request.prompt.task is Task.T1A1]
    recorder = Recorder(tied.runner)
    run(recorder, [tied.requests[i] for i in chosen], tied.slots)
    assert set(recorder.sizes) == {(0, 0, 3)}


def test_text_head_and_companion_row_stop_when_text_ends(tied: Family) -> None:
    """To the step: text and companion row are computed up to the end of text, then never again."""
    v = Vocab(tied.runner.config.vocab)
    tried = 0
    for request, (tokens, finish) in zip(tied.requests, tied.expected, strict=True):
        ends = np.flatnonzero(tokens[TEXT_STREAM] == v.eot)
        if not (request.has_companion and len(ends) and ends[0] < tokens.shape[1] - 5):
            continue
        tried += 1
        for steps in (4, 64):
            recorder = Recorder(tied.runner)
            assert_same(run(recorder, [request], tied.slots, steps), [(tokens, finish)])
            both = sum(int(ran[0]) for routing, _, ran in recorder.calls if routing.sizes == (3, 3, 3))
            audio = sum(int(ran[0]) for routing, _, ran in recorder.calls if routing.sizes == (0, 0, 3))
            assert (both, audio) == (ends[0] + 1, tokens.shape[1] - ends[0] - 1)
            assert set(recorder.sizes) == {(3, 3, 3), (0, 0, 3)}
    assert tried >= 2


def test_finished_requests_take_no_further_steps(tied: Family) -> None:
    recorder = Recorder(tied.runner)
    answers = run(recorder, tied.requests[:3], tied.slots, 64)
    assert sum(int(ran.max()) for _, _, ran in recorder.calls) == max(tokens.shape[1] for tokens, _ in answers)


def test_programs_are_compiled_once_per_shape(tied: Family) -> None:
    names = ("encode_audio", "prefill", "decode_chunk", "insert", "init_state")
    run(tied.runner, tied.requests, tied.slots, 3)
    before = {name: getattr(tied.runner.jitted, name)._cache_size() for name in names}
    for steps in (3, 64, 7):
        run(tied.runner, tied.requests, tied.slots, steps)
    after = {name: getattr(tied.runner.jitted, name)._cache_size() for name in names}
    # Other chunk sizes admit requests at other times, in groups of other sizes; chunks themselves have four shapes.
    assert after["decode_chunk"] == before["decode_chunk"] == 4
    assert after["init_state"] == 1
    run(tied.runner, tied.requests, tied.slots, 7)
    assert {name: getattr(tied.runner.jitted, name)._cache_size() for name in names} == after


def test_running_batch_is_donated(tied: Family) -> None:
    engine = Engine(tied.runner, tied.slots, CONTEXT)
    for key in (0, 3):
        engine.submit(key, tied.requests[key])
    first = jax.tree.leaves(engine.state.caches)
    engine.advance(2)
    assert all(leaf.is_deleted() for leaf in first)
    second = jax.tree.leaves(engine.state.caches)
    engine.advance(2)
    assert all(leaf.is_deleted() for leaf in second)


def test_number_of_companion_rows_follows_the_requests(tied: Family) -> None:
    """Four slots have no, one or four companion rows."""
    config = tied.runner.config
    # Two whose text lasts to their end, so that the number of companion rows follows the requests in the batch.
    lasting = [random_request(config, Task.A1A2, content, temperature=1.0) for content in (21, 10)]
    answers = [tied.slow(request) for request in lasting]
    assert [len(np.flatnonzero(tokens[TEXT_STREAM] == tied.slow.vocab.eot)) for tokens, _ in answers] == [0, 1]
    assert [tokens.shape[1] for tokens, _ in answers] == [29, 18]

    def cut(which: int, steps: int) -> tuple[PreparedRequest, Answer]:
        return dataclasses.replace(lasting[which], config=lasting[which].config.replace(max_steps=steps)), (
            answers[which][0][:, :steps],
            "length",
        )

    first = [cut(0, 2), cut(1, 3), cut(1, 2), (lasting[0], answers[0])]
    then = [(lasting[1], answers[1]), cut(0, 5), cut(1, 4)]
    recorder = Recorder(tied.runner)
    recorder.engine = engine = Engine(recorder, 4, CONTEXT)
    tokens_out: list[list[np.ndarray]] = [[] for _ in first + then]
    finish = [""] * len(tokens_out)
    with quick_compile():
        for key, (request, _) in enumerate(first):
            engine.submit(key, request)
        rounds = 0
        while engine.busy:
            if rounds == 4:
                for key, (request, _) in enumerate(then, start=len(first)):
                    engine.submit(key, request)
            for progress in engine.advance(3):
                tokens_out[progress.key].append(progress.tokens)
                finish[progress.key] = progress.finish or ""
            rounds += 1
    found = [(np.concatenate(parts, axis=1), why) for parts, why in zip(tokens_out, finish, strict=True)]
    assert_same(found, [answer for _, answer in first + then])
    pairs = [size[0] for size in recorder.sizes]
    assert {(4, 1), (1, 4)} <= set(pairwise(pairs))


PAGE = 8
FEWEST_PAGES = 2 * CONTEXT // PAGE
"""Of one request with its companion row."""


class FewPages(Engine):
    """An engine with pages of 8 positions, as few as there may be, that counts requests which go back to the queue."""

    pauses = 0

    def __init__(self, family: Family, num_pages: int = FEWEST_PAGES):
        super().__init__(family.runner, family.slots, CONTEXT, num_pages=num_pages, page_len=PAGE)

    def _pause(self, *args: Any) -> None:
        self.pauses += 1
        super()._pause(*args)


@pytest.mark.parametrize("name", ["tied", "stacked_with_tts_adapter"])
def test_same_tokens_when_pages_run_out(name: str, request: pytest.FixtureRequest) -> None:
    """Rows that all grow share the pages of one; every task, companion rows and sampling."""
    family: Family = request.getfixturevalue(name)
    with quick_compile():
        engine = FewPages(family)
        collected, most_active = Collected(), 0
        for key, each in enumerate(family.requests):
            engine.submit(key, each)
        while engine.busy:
            collected.add(engine.advance(5))
            most_active = max(most_active, family.slots - engine.active.count(None))
            held = [page for a in engine.active if a for page in (*a.pages, *a.companion_pages)]
            assert len(held) == len(set(held)) == engine.pages.used <= FEWEST_PAGES
        assert_same(collected.answers(range(len(family.requests))), family.expected)
    assert most_active > 1
    assert engine.pages.used == 0
    assert engine.pauses > 0


def test_requests_are_admitted_by_free_pages_in_order(tied: Family) -> None:
    """Slots are free, but the pages are those of two of these prompts, or of one with its companion row."""
    config = tied.runner.config
    requests = [random_request(config, Task.T1T2, content, length=CONTEXT - 9) for content in range(40, 45)]
    short = random_request(config, Task.T1T2, 45, length=4)
    with quick_compile():
        engine = FewPages(tied)
        for key, each in enumerate([*requests, short]):
            engine.submit(key, each)
        order: list[int] = []
        while engine.busy:
            engine.advance(4)
            order += [active.key for active in engine.active if active and active.key not in order]
            running = [active for active in engine.active if active]
            if not engine.queue:
                assert not engine.has_room
            elif engine.has_room:
                # It came after the requests of this chunk were admitted, or waits for another prefill.
                assert None in engine.active
            assert sum(active.key < len(requests) for active in running) <= 2
    assert order == sorted(order)
    assert engine.pauses == 0


def test_cancel_frees_pages(tied: Family) -> None:
    with quick_compile():
        engine = FewPages(tied)
        for key, each in enumerate(tied.requests):
            engine.submit(key, each)
        for _ in range(4):
            engine.advance(3)
        assert engine.pages.used > 0
        for key in range(1, len(tied.requests)):
            engine.cancel(key)
        assert [active for active in engine.active if active is not None and active.key] == []
        engine.cancel(0)
        assert engine.pages.used == 0
        # The freed pages hold another request.
        engine.submit(99, tied.requests[0])
        collected = Collected()
        for progress in engine.run():
            collected.add([progress])
    assert_same(collected.answers([99]), tied.expected[:1])


def test_memory_follows_what_is_used(tied: Family) -> None:
    """A request holds the pages of its positions and of one chunk, its companion row as many until its text ends."""
    with quick_compile():
        engine = FewPages(tied)
        index = next(i for i, r in enumerate(tied.requests) if r.has_companion and r.config.max_steps is None)
        request, (tokens, _) = tied.requests[index], tied.expected[index]
        text_steps = int(np.flatnonzero(tokens[TEXT_STREAM] == tied.slow.vocab.eot)[0]) + 1
        engine.submit(0, request)
        seen = []
        while engine.busy:
            engine.advance(2)
            active = engine.active[0]
            if active is not None:
                most = len(request.prompt) - 1 + min(active.step + 4, request.max_steps(CONTEXT))
                assert len(active.pages) <= -(-most // PAGE)
                assert len(active.companion_pages) in (0, len(active.pages))
                assert bool(active.companion_pages) == (active.step < text_steps)
                seen.append(bool(active.companion_pages))
    assert {True, False} <= set(seen)


def test_pages_are_kept_for_steps_that_are_repeated(tied: Family) -> None:
    """No newcomer gets what a request that is answered again had, nor the next page of a row."""
    with quick_compile():
        engine = FewPages(tied, 2 * FEWEST_PAGES)
        request = next(r for r in tied.requests if r.has_companion and r.config.max_steps is None)
        engine._reported[0, False] = 24
        engine.submit(0, request)
        engine.advance(2)
        active = engine.active[0]
        assert active is not None
        kept = 2 * active.pages_needed(24 + 16 + PAGE, PAGE, CONTEXT)
        assert len(active.pages) + len(active.companion_pages) < kept
        assert engine._room(16)[1] == [2 * FEWEST_PAGES - kept]


def test_no_more_pages_are_allocated_than_all_rows_can_take(tied: Family) -> None:
    most = tied.slots * FEWEST_PAGES
    assert FewPages(tied, most - 1).pages.total == most - 1
    assert FewPages(tied, 10 * most).pages.total == most


def test_too_few_pages_for_one_request_are_refused(tied: Family) -> None:
    with pytest.raises(ConfigError, match=f"has {FEWEST_PAGES - 1} pages.*at least {FEWEST_PAGES}"):
        FewPages(tied, FEWEST_PAGES - 1)


class FailingRunner(ModelRunner):
    """A runner of which one program raises, if what it is given looks like that of one request."""

    def __init__(self, runner: ModelRunner, program: str, marked: np.ndarray):
        self.__dict__.update(vars(runner))
        self.program, self.marked = program, marked

    def prefill(self, tokens: Any, *args: Any, **kwargs: Any) -> Any:
        length = self.marked.shape[1]
        padding = Vocab(self.config.vocab).padding[:, None]
        has_marked = any(
            np.array_equal(row[:, :length], self.marked) and (row[:, length:] == padding).all()
            for row in np.asarray(tokens)
        )
        if has_marked and self.program == "prefill":
            raise MemoryError("no room for it")
        self.inserts_marked = has_marked
        return super().prefill(tokens, *args, **kwargs)

    def insert(self, state: Any, *args: Any) -> Any:
        if self.inserts_marked and self.program == "insert":
            raise OverflowError("an option does not fit")
        return super().insert(state, *args)


@pytest.mark.parametrize("program", ["prefill", "insert", "read"])
@pytest.mark.parametrize("marked", [0, 3])
def test_exception_in_one_request_fails_only_that_request(
    tied: Family, program: str, marked: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    runner = FailingRunner(tied.runner, program, tied.requests[marked].prompt.tokens[:, :-1])
    engine = Engine(runner, tied.slots, CONTEXT)
    if program == "read":
        finish_reason = engine._finish_reason

        def fail(active: Any, new: np.ndarray) -> Any:
            if active.key == marked:
                raise ZeroDivisionError("while it is read")
            return finish_reason(active, new)

        monkeypatch.setattr(engine, "_finish_reason", fail)
    for key, request in enumerate(tied.requests):
        engine.submit(key, request)
    collected, errors = Collected(), {}
    for progress in engine.run(3):
        if progress.error is not None:
            errors[progress.key] = progress.error
        else:
            collected.add([progress])
    prompt = tied.requests[marked].prompt.tokens[:, :-1]
    alike = [key for key, request in enumerate(tied.requests) if np.array_equal(request.prompt.tokens[:, :-1], prompt)]
    assert sorted(errors) == ([marked] if program == "read" else alike)
    others = [key for key in range(len(tied.requests)) if key not in errors]
    assert len(others) > 5
    assert_same(collected.answers(others), [tied.expected[key] for key in others])


def test_reset_answers_again_without_reporting_twice(tied: Family) -> None:
    engine = Engine(tied.runner, tied.slots, CONTEXT)
    for key, request in enumerate(tied.requests):
        engine.submit(key, request)
    collected = Collected()
    for _ in range(3):
        collected.add(engine.advance(3))
    assert sum(parts[0].shape[1] for parts in collected.parts.values()) > 0
    active = [request.key for request in engine.active if request is not None]
    # As when a program that was given the state does not return.
    for array in jax.tree.leaves(engine.state):
        array.delete()
    assert engine.reset() == []
    for progress in engine.run(3):
        collected.add([progress])
    assert_same(collected.answers(range(len(tied.requests))), tied.expected)
    assert active

    for key, request in enumerate(tied.requests):
        engine.submit(key, request)
    engine.advance(3)
    active = [request.key for request in engine.active if request is not None]
    assert engine.reset() == []
    engine.advance(3)
    assert engine.reset() == active
    assert sorted(progress.key for progress in engine.run() if progress.finish) == [
        key for key in range(len(tied.requests)) if key not in active
    ]


def test_request_that_ends_sooner_when_it_is_answered_again(tied: Family) -> None:
    """As rounding may have it: it ends as its last tokens say, which are not reported."""
    engine = Engine(tied.runner, tied.slots, CONTEXT)
    engine.submit(0, tied.requests[0])
    tokens, finish = tied.expected[0]
    engine._reported[0, False] = tokens.shape[1] + 1
    progress = list(engine.run(64))
    assert {each.tokens.shape for each in progress} == {(8, 0)}
    assert [each.finish for each in progress if each.finish] == [finish]
    assert not engine._reported


def test_reset_drops_a_queued_request_that_causes_faults(tied: Family) -> None:
    engine = Engine(tied.runner, tied.slots, CONTEXT)
    engine.submit(7, tied.requests[0])
    assert engine.reset() == [7]
    assert not engine.busy


@pytest.mark.parametrize(
    "name",
    [
        "tied",
        pytest.param("masked", marks=pytest.mark.slow),
        pytest.param("stacked_with_tts_adapter", marks=pytest.mark.slow),
    ],
)
def test_few_programs_answer_any_requests(
    name: str, request: pytest.FixtureRequest, caplog: pytest.LogCaptureFixture
) -> None:
    """The same tokens by programs for the longest prompt and all rows, one request after another, in every window."""
    family: Family = request.getfixturevalue(name)
    # Without what tests before have compiled.
    jitted_functions.cache_clear()
    engine = Engine(ModelRunner(family.runner.module()), family.slots, CONTEXT)
    with quick_compile():
        engine.warm_up()
        list(itertools.islice(engine.warm_up_rest(), len({*engine._general_programs()} - {*engine._first_programs()})))
        with compiles_nothing(caplog):
            answers = run_on(engine, family.requests, 5)
    assert_same(answers, family.expected)


def test_one_prefill_for_several_requests_if_it_is_compiled(tied: Family) -> None:
    engine = Engine(tied.runner, 8, CONTEXT)
    shape, longest = (Task.A1A2, 16, 0, False), engine._lengths(Task.A1A2)[-1]
    counts = range(1, 9)
    assert [engine._prefill_sizes(shape, count)[1] for count in counts] == [1, 2, 4, 4, 8, 8, 8, 8]
    engine._compiled.update(engine._general_programs())
    assert {engine._prefill_sizes(shape, count) for count in counts} == {((Task.A1A2, longest, 0, False), 1)}
    engine._compiled.update(engine._other_programs())
    assert [engine._prefill_sizes(shape, count) for count in counts] == [
        (shape, rows) for rows in (1, 2, 4, 4, 8, 8, 8, 8)
    ]


def test_program_that_cannot_be_compiled_is_left_out(tied: Family, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine(tied.runner, 1, CONTEXT)

    def fail(*_: object) -> None:
        raise MemoryError("too large")

    monkeypatch.setattr(Engine, "_compile_decode", fail)
    programs = len(list(engine.warm_up_rest()))
    # The first are compiled by `warm_up`.
    assert programs == len({*engine._other_programs()} - {*engine._first_programs()})
    left = {*engine._other_programs()} - engine._compiled
    assert left
    assert {kind for kind, _ in left} == {"decode"}


def test_warm_up_stops_when_asked(tied: Family) -> None:
    asked: list[bool] = []

    def stop() -> bool:
        asked.append(True)
        return len(asked) == 3

    Engine(tied.runner, tied.slots, CONTEXT).warm_up(stop)
    assert len(asked) == 3


def request_of(config: ModelConfig, **settings: Any) -> PreparedRequest:
    return PreparedRequest.of(text_prompt(Task.T1T2, [1, 2], Vocab(config.vocab)), config=GenerationConfig(**settings))


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("max_steps", 0),
        ("max_steps", -1),
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("temperature", float("inf")),
        ("temperature", 101),
        ("temperature", 10**400),
        ("max_steps", 2**31),
        ("top_k", 10**12),
        ("top_k", -1),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("top_p", float("nan")),
        ("seed", -1),
        ("seed", 2**32),
    ],
)
def test_generation_config_names_an_option_out_of_range(setting: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=rf"^{setting}: expected .*, found {re.escape(reprlib.repr(value))}"):
        request_of(small_config(), **{setting: value})


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("max_steps", "5"),
        ("temperature", "hot"),
        ("top_k", 2.5),
        ("top_p", None),
        ("seed", 1.5),
        ("seed", "x"),
        ("enforce_delay", "no"),
        ("batch_parallel", 0),
    ],
)
def test_generation_config_names_an_option_of_another_type(setting: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=rf"^{setting}: expected"):
        request_of(small_config(), **{setting: value})


def test_temperatures_beyond_float32_are_greedy() -> None:
    assert GenerationConfig(temperature=1e-300).sampling_temperature == 0
    assert GenerationConfig(temperature=0.01).sampling_temperature == 0.01


def test_prepared_request_has_speech_exactly_when_the_task_takes_audio() -> None:
    v = Vocab(small_config().vocab)
    with pytest.raises(ConfigError, match="T1T2"):
        PreparedRequest.of(text_prompt(Task.T1T2, [1], v), np.zeros(320, np.float32))
    with pytest.raises(ConfigError, match="A1T2"):
        PreparedRequest.of(Prompt(Task.A1T2, np.zeros((8, 5), np.int32), 2))


def test_max_steps_and_cache_len() -> None:
    """With 2048 positions a prompt of 5 leaves 2044 steps: the last one's tokens are never an input."""
    config = small_config()
    assert request_of(config).max_steps(2048) == 2044
    assert request_of(config).cache_len(2048) == 2048
    short = request_of(config, max_steps=100)
    assert (short.max_steps(2048), short.cache_len(2048)) == (100, 256)
    assert request_of(config, max_steps=252).cache_len(2048) == 256
    assert request_of(config, max_steps=253).cache_len(2048) == 512
    assert request_of(config, max_steps=9999).max_steps(2048) == 2044
    assert request_of(config, max_steps=100).cache_len(192) == 192


def test_submit_refuses_a_request_that_does_not_fit(tied: Family) -> None:
    engine = Engine(tied.runner, 1, 32)
    with pytest.raises(ConfigError, match="64 positions, this batch has 32"):
        engine.submit(0, request_of(tied.runner.config))
    v = Vocab(tied.runner.config.vocab)
    with pytest.raises(ConfigError, match=r"65 positions.*context of 64"):
        engine.submit(0, PreparedRequest.of(text_prompt(Task.T1T2, [1] * 62, v)))
    assert not engine.busy


def test_advance_takes_at_least_one_step(tied: Family) -> None:
    engine = Engine(tied.runner, tied.slots, CONTEXT)
    engine.submit(0, tied.requests[0])
    with pytest.raises(ValueError, match="steps"):
        engine.advance(0)
    assert jnp.size(engine.state.step) == tied.slots
