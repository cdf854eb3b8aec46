"""The engine against the slow decoder: the same tokens for every task, in any company, in the fewest products."""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
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
from omni_jax.inference.runner import ModelRunner
from omni_jax.prompts import Prompt, text_prompt
from omni_jax.tasks import Task
from omni_jax.vocab import TEXT_STREAM, Vocab
from tests.inference.reference_decoder import CONTEXT, ReferenceDecoder, random_model, random_request, small_config
from tests.models import quick_compile

Answer = tuple[np.ndarray, str]


def mixed_requests(config: ModelConfig) -> list[PreparedRequest]:
    """Every task greedy and sampled, with every setting that changes what is said; short ones and long ones."""

    def ask(task: Task, content: int, length: int | None = None, **settings: Any) -> PreparedRequest:
        return random_request(config, task, content, length, **settings)

    warm: dict[str, Any] = {"temperature": 0.7}
    return [
        *(ask(task, 10 * i) for i, task in enumerate(Task)),
        *(ask(task, 10 * i + 1, **warm, seed=i) for i, task in enumerate(Task)),
        ask(Task.A1A2, 0, batch_parallel=False),
        ask(Task.A1A2, 1, batch_parallel=False, **warm, seed=0),
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
    """A model with its compiled programs, requests, and what the slow decoder answers to them."""

    programs: ModelRunner
    requests: list[PreparedRequest]
    expected: list[Answer]
    slots: int
    slow: ReferenceDecoder


def family(slots: int, *, stacked: bool, seed: int, eot: float = 1.5, **config: Any) -> Family:
    """The seeds are chosen so that what `test_the_interesting_events_occur` lists does occur."""
    model = random_model(small_config(**config), stacked=stacked, seed=seed, eot=eot, eoa=1.5)
    programs = ModelRunner(model)
    requests, slow = mixed_requests(model.config), ReferenceDecoder(model, partial(programs.hear, programs.weights))
    return Family(programs, requests, [slow(request) for request in requests], slots, slow)


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


class Recorder:
    """The programs of a model, noting each chunk: its routing, who sat where, and the steps it took."""

    def __init__(self, programs: ModelRunner):
        self.__dict__.update(vars(programs))
        self.chunked = programs.chunk
        self.chunk = self._noted
        self.engine: Engine | None = None
        self.calls: list[tuple[Routing, list[Any], np.ndarray]] = []

    def _noted(self, weights: Any, state: Any, routing: Routing, steps: Any) -> Any:
        before = np.asarray(state.step)
        seats = [dataclasses.replace(seat) if seat else None for seat in self.engine.seats]
        out = self.chunked(weights, state, routing, steps)
        self.calls.append((routing, seats, np.asarray(out[2][0]) - before))
        return out

    @property
    def sizes(self) -> list[tuple[int, int, int]]:
        return [routing.sizes for routing, _, _ in self.calls]


class Said:
    """What an engine has reported so far."""

    def __init__(self) -> None:
        self.parts: defaultdict[int, list[np.ndarray]] = defaultdict(list)
        self.finish: dict[int, str] = {}

    def hear(self, news: Sequence[Progress]) -> None:
        for progress in news:
            assert progress.key not in self.finish, "nothing follows the end"
            self.parts[progress.key].append(progress.tokens)
            if progress.finish:
                self.finish[progress.key] = progress.finish

    def answers(self, keys: Sequence[int]) -> list[Answer]:
        return [(np.concatenate(self.parts[key], axis=1), self.finish[key]) for key in keys]


def run(programs: Any, requests: Sequence[PreparedRequest], slots: int, steps: int = 64) -> list[Answer]:
    engine = Engine(programs, slots, CONTEXT)
    if isinstance(programs, Recorder):
        programs.engine = engine
    for key, request in enumerate(requests):
        engine.submit(key, request)
    said = Said()
    for progress in engine.run(steps):
        assert progress.tokens.shape[1] <= steps
        said.hear([progress])
    assert not engine.busy
    return said.answers(range(len(requests)))


def assert_same(found: Sequence[Answer], expected: Sequence[Answer]) -> None:
    for (tokens, finish), (right, why) in zip(found, expected, strict=True):
        assert tokens.dtype == np.int32
        np.testing.assert_array_equal(tokens, right)
        assert finish == why


@pytest.mark.parametrize("steps", [1, 3, 64])
def test_tokens_of_a_mixed_batch(tied: Family, steps: int) -> None:
    assert_same(run(tied.programs, tied.requests, tied.slots, steps), tied.expected)


@pytest.mark.parametrize("name", ["untied_with_tts_adapter", "stacked_with_tts_adapter"])
def test_tokens_of_other_models(name: str, request: pytest.FixtureRequest) -> None:
    other: Family = request.getfixturevalue(name)
    # Without the two of unusual length, whose prefill has shapes of its own.
    requests, expected = other.requests[:-2], other.expected[:-2]
    with quick_compile():
        assert_same(run(other.programs, requests, other.slots, 5), expected)


@pytest.mark.parametrize("name", ["tied", "untied_with_tts_adapter", "stacked_with_tts_adapter"])
def test_the_interesting_events_occur(name: str, request: pytest.FixtureRequest) -> None:
    """The comparisons above prove nothing about what never happens in them."""
    it: Family = request.getfixturevalue(name)
    v = Vocab(it.programs.config.vocab)
    seen = set()
    for ask, (tokens, finish) in zip(it.requests, it.expected, strict=True):
        task, steps = ask.prompt.task, tokens.shape[1]
        seen.add(f"finish {finish}")
        ends = np.flatnonzero(tokens[TEXT_STREAM] == v.eot)
        if task.outputs_audio and task.outputs_text:
            if len(ends) and ends[0] < steps - 5:
                seen.add("text ends long before speech")
                if ask.parallel:
                    seen.add("text ends long before speech, batch-parallel")
                assert (tokens[TEXT_STREAM, ends[0] + 1 :] == v.pad_t).all()
            if not len(ends) and finish == "stop":
                seen.add("speech ends before text")
        if task.outputs_audio and finish == "stop" and ask.enforce_delay:
            assert undelay(tokens[:TEXT_STREAM], v).shape[0] == steps - 8
            seen.add("frames" if steps > 8 else "no frames")
        if not ask.enforce_delay and (tokens[0, :1] != v.pad_a).any():
            seen.add("a layer speaks before its turn")
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
        "a layer speaks before its turn",
        "stop of text alone",
        "length of text alone",
        "context of text alone",
    }
    assert expected <= seen


def test_batch_parallel_and_enforced_delay_matter(tied: Family) -> None:
    """The requests that differ in one switch alone get different answers."""
    plain, single, free = tied.expected[0], tied.expected[12], tied.expected[14]
    assert tied.requests[0].parallel
    assert not tied.requests[12].parallel
    assert plain[0].tobytes() != single[0].tobytes()
    assert plain[0].tobytes() != free[0].tobytes()


def test_the_context_is_used_to_its_last_position(tied: Family) -> None:
    for request, (tokens, finish) in zip(tied.requests, tied.expected, strict=True):
        if finish == "context":
            assert len(request.prompt) + tokens.shape[1] == CONTEXT + 1


def test_a_request_answers_the_same_alone_twice_and_in_any_seat(tied: Family) -> None:
    picked = [0, 1, 6, 9, 11, 15]
    requests, expected = [tied.requests[i] for i in picked], [tied.expected[i] for i in picked]
    for request, right in zip(requests, expected, strict=True):
        assert_same(run(tied.programs, [request], tied.slots), [right])
    assert_same(run(tied.programs, requests[::-1], tied.slots, 2), expected[::-1])
    for tokens, _ in run(tied.programs, [requests[2]] * 4, tied.slots):
        assert tokens.tobytes() == expected[2][0].tobytes()


def test_requests_may_arrive_while_others_run(tied: Family) -> None:
    engine = Engine(tied.programs, tied.slots, CONTEXT)
    said = Said()
    waiting = list(enumerate(tied.requests[:12]))
    rounds = 0
    while waiting or engine.busy:
        if waiting and rounds % 3 == 0:
            engine.submit(*waiting.pop(0))
        said.hear(engine.advance(4))
        rounds += 1
    assert_same(said.answers(range(12)), tied.expected[:12])


@pytest.mark.parametrize("rounds", [0, 1, 2, 5])
def test_a_cancelled_request_gives_its_slot_to_the_next_and_disturbs_nobody(tied: Family, rounds: int) -> None:
    engine = Engine(tied.programs, tied.slots, CONTEXT)
    for key, request in enumerate(tied.requests[:12]):
        engine.submit(key, request)
    said = Said()
    for _ in range(rounds):
        said.hear(engine.advance(2))
    seated = [seat.key for seat in engine.seats if seat is not None]
    chosen = [*seated[:2], 11]
    for key in chosen:
        assert engine.cancel(key)
        assert not engine.cancel(key)
    assert not [seat for seat in engine.seats if seat is not None and seat.key in chosen]
    if seated:
        assert engine.seats.count(None) >= 2
    before = {key: len(said.parts[key]) for key in chosen}
    while engine.busy:
        said.hear(engine.advance(2))
    assert before == {key: len(said.parts[key]) for key in chosen}
    left = [key for key in range(12) if key not in chosen]
    assert_same(said.answers(left), [tied.expected[key] for key in left])
    assert not engine.cancel(left[0])
    assert engine.seats == [None] * tied.slots


def test_those_who_run_wait_for_one_prefill_at_most(tied: Family, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine(tied.programs, tied.slots, CONTEXT)
    prefills: list[int] = []
    prefill = engine._prefill
    monkeypatch.setattr(engine, "_prefill", lambda *args: (prefills.append(len(args[2])), prefill(*args)))
    engine.submit(0, tied.requests[0])
    engine.advance(1)
    assert prefills == [1]
    for key in range(1, 8):  # of several lengths, with speech and without
        engine.submit(key, tied.requests[key])
    said = Said()
    while engine.busy:
        others = any(seat is not None for seat in engine.seats)
        prefills.clear()
        said.hear(engine.advance(1))
        assert len(prefills) <= 1 or not others
    assert_same(said.answers(range(8)), tied.expected[:8])


def test_an_idle_engine_has_nothing_to_say(tied: Family) -> None:
    engine = Engine(tied.programs, tied.slots, CONTEXT)
    assert not engine.busy
    assert engine.advance() == []


def test_a_chunk_computes_only_what_somebody_reads(tied: Family) -> None:
    recorder = Recorder(tied.programs)
    assert_same(run(recorder, tied.requests, tied.slots, 4), tied.expected)
    for routing, seats, _ in recorder.calls:
        live = {slot: seat for slot, seat in enumerate(seats) if seat is not None and seat.running}
        writers = {slot for slot, seat in live.items() if seat.writing}
        speakers = {slot for slot, seat in live.items() if seat.request.prompt.task.outputs_audio}
        pairs = {slot for slot in writers if live[slot].request.parallel}
        shadows, texts, audios = (
            [slot for slot in np.asarray(x).tolist() if slot < tied.slots]
            for x in (routing.shadow_slot, routing.text_slot, routing.audio_slot)
        )
        assert sorted(shadows) == sorted(pairs)
        assert sorted(texts) == sorted(writers)
        assert sorted(audios) == sorted(speakers)
        assert [size > 0 for size in routing.sizes] == [bool(pairs), bool(writers), bool(speakers)]
        for slot in pairs:
            assert seats[slot].request.prompt.task is Task.A1A2
            assert seats[slot].request.batch_parallel
        rows = np.asarray(routing.text_row).tolist()[: len(texts)]
        for slot, row in zip(texts, rows, strict=True):
            shadow = np.asarray(routing.shadow_slot).tolist()[row - tied.slots] if row >= tied.slots else None
            assert (row, shadow) == ((slot, None) if slot not in pairs else (row, slot))
    assert {(3, 3, 3), (0, 3, 3), (0, 0, 3)} <= set(recorder.sizes)


def test_text_tasks_never_compute_audio(tied: Family) -> None:
    chosen = [i for i, request in enumerate(tied.requests) if not request.prompt.task.outputs_audio]
    recorder = Recorder(tied.programs)
    answers = run(recorder, [tied.requests[i] for i in chosen], tied.slots, 8)
    assert_same(answers, [tied.expected[i] for i in chosen])
    assert set(recorder.sizes) == {(0, 3, 0)}


def test_reading_aloud_never_computes_text(tied: Family) -> None:
    chosen = [i for i, request in enumerate(tied.requests) if request.prompt.task is Task.T1A1]
    recorder = Recorder(tied.programs)
    run(recorder, [tied.requests[i] for i in chosen], tied.slots)
    assert set(recorder.sizes) == {(0, 0, 3)}


def test_once_text_has_ended_its_head_and_second_row_rest(tied: Family) -> None:
    """To the step: text and second row are computed up to the end of text, then never again."""
    v = Vocab(tied.programs.config.vocab)
    tried = 0
    for request, (tokens, finish) in zip(tied.requests, tied.expected, strict=True):
        ends = np.flatnonzero(tokens[TEXT_STREAM] == v.eot)
        if not (request.parallel and len(ends) and ends[0] < tokens.shape[1] - 5):
            continue
        tried += 1
        for steps in (4, 64):
            recorder = Recorder(tied.programs)
            assert_same(run(recorder, [request], tied.slots, steps), [(tokens, finish)])
            both = sum(int(ran[0]) for routing, _, ran in recorder.calls if routing.sizes == (3, 3, 3))
            audio = sum(int(ran[0]) for routing, _, ran in recorder.calls if routing.sizes == (0, 0, 3))
            assert (both, audio) == (ends[0] + 1, tokens.shape[1] - ends[0] - 1)
            assert set(recorder.sizes) == {(3, 3, 3), (0, 0, 3)}
    assert tried >= 2


def test_finished_requests_cost_no_further_steps(tied: Family) -> None:
    recorder = Recorder(tied.programs)
    answers = run(recorder, tied.requests[:3], tied.slots, 64)
    assert sum(int(ran.max()) for _, _, ran in recorder.calls) == max(tokens.shape[1] for tokens, _ in answers)


def test_nothing_is_compiled_twice(tied: Family) -> None:
    names = ("hear", "prefill", "chunk", "join", "empty", "shadows", "keep_shadows")
    run(tied.programs, tied.requests, tied.slots, 3)
    before = {name: getattr(tied.programs, name)._cache_size() for name in names}
    for steps in (3, 64, 7):
        run(tied.programs, tied.requests, tied.slots, steps)
    after = {name: getattr(tied.programs, name)._cache_size() for name in names}
    # Other chunk sizes seat requests at other times, in groups of other sizes; chunks themselves have four shapes.
    assert after["chunk"] == before["chunk"] == 4
    assert after["empty"] == after["shadows"] == 1
    run(tied.programs, tied.requests, tied.slots, 7)
    assert {name: getattr(tied.programs, name)._cache_size() for name in names} == after


def test_the_running_batch_is_donated(tied: Family) -> None:
    engine = Engine(tied.programs, tied.slots, CONTEXT)
    for key in (0, 3):
        engine.submit(key, tied.requests[key])
    first = jax.tree.leaves(engine.state.caches)
    engine.advance(2)
    assert all(leaf.is_deleted() for leaf in first)
    second = jax.tree.leaves((engine.state.caches, engine.state.shadows))
    engine.advance(2)
    assert all(leaf.is_deleted() for leaf in second)


def test_second_rows_grow_shrink_and_move(tied: Family) -> None:
    """Four slots have no, one or four second rows: taken together when others end, spread when some arrive."""
    config = tied.programs.config
    # Two that write to their end, so that the number of second rows follows who is there.
    lasting = [random_request(config, Task.A1A2, content, temperature=1.0) for content in (21, 10)]
    answers = [tied.slow(request) for request in lasting]
    assert [len(np.flatnonzero(tokens[TEXT_STREAM] == tied.slow.vocab.eot)) for tokens, _ in answers] == [0, 1]
    assert [tokens.shape[1] for tokens, _ in answers] == [29, 18]

    def cut(which: int, steps: int) -> tuple[PreparedRequest, Answer]:
        return dataclasses.replace(lasting[which], max_steps=steps), (answers[which][0][:, :steps], "length")

    first = [cut(0, 2), cut(1, 3), cut(1, 2), (lasting[0], answers[0])]
    then = [(lasting[1], answers[1]), cut(0, 5), cut(1, 4)]
    recorder = Recorder(tied.programs)
    recorder.engine = engine = Engine(recorder, 4, CONTEXT)
    said: list[list[np.ndarray]] = [[] for _ in first + then]
    finish = [""] * len(said)
    with quick_compile():
        for key, (request, _) in enumerate(first):
            engine.submit(key, request)
        rounds = 0
        while engine.busy:
            if rounds == 4:
                for key, (request, _) in enumerate(then, start=len(first)):
                    engine.submit(key, request)
            for progress in engine.advance(3):
                said[progress.key].append(progress.tokens)
                finish[progress.key] = progress.finish or ""
            rounds += 1
    found = [(np.concatenate(parts, axis=1), why) for parts, why in zip(said, finish, strict=True)]
    assert_same(found, [answer for _, answer in first + then])
    pairs = [size[0] for size in recorder.sizes]
    assert {(4, 1), (1, 4)} <= set(pairwise(pairs))


def request_of(config: ModelConfig, **settings: Any) -> PreparedRequest:
    return PreparedRequest(text_prompt(Task.T1T2, [1, 2], Vocab(config.vocab)), **settings)


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("max_steps", 0),
        ("max_steps", -1),
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("temperature", float("inf")),
        ("top_k", -1),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("top_p", float("nan")),
        ("seed", -1),
        ("seed", 2**32),
    ],
)
def test_a_setting_out_of_range_is_named(setting: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=rf"^{setting}: expected .*, found {value}"):
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
def test_a_setting_of_another_type_is_named(setting: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=rf"^{setting}: expected"):
        request_of(small_config(), **{setting: value})


def test_speech_exactly_when_the_task_hears() -> None:
    v = Vocab(small_config().vocab)
    with pytest.raises(ConfigError, match="T1T2"):
        PreparedRequest(text_prompt(Task.T1T2, [1], v), np.zeros(320, np.float32))
    with pytest.raises(ConfigError, match="A1T2"):
        PreparedRequest(Prompt(Task.A1T2, np.zeros((8, 5), np.int32), 2))


def test_limits_and_cache_lengths() -> None:
    """With 2048 positions a prompt of 5 leaves 2044 steps: the last one's tokens are never an input."""
    config = small_config()
    assert request_of(config).limit(2048) == 2044
    assert request_of(config).cache_length(2048) == 2048
    short = request_of(config, max_steps=100)
    assert (short.limit(2048), short.cache_length(2048)) == (100, 256)
    assert request_of(config, max_steps=252).cache_length(2048) == 256
    assert request_of(config, max_steps=253).cache_length(2048) == 512
    assert request_of(config, max_steps=9999).limit(2048) == 2044
    assert request_of(config, max_steps=100).cache_length(192) == 192


def test_a_request_that_does_not_fit_is_refused_at_the_door(tied: Family) -> None:
    engine = Engine(tied.programs, 1, 32)
    with pytest.raises(ConfigError, match="64 positions, this batch has 32"):
        engine.submit(0, request_of(tied.programs.config))
    v = Vocab(tied.programs.config.vocab)
    with pytest.raises(ConfigError, match=r"65 positions.*context of 64"):
        engine.submit(0, PreparedRequest(text_prompt(Task.T1T2, [1] * 62, v)))
    assert not engine.busy


def test_a_chunk_has_at_least_one_step(tied: Family) -> None:
    engine = Engine(tied.programs, tied.slots, CONTEXT)
    engine.submit(0, tied.requests[0])
    with pytest.raises(ValueError, match="steps"):
        engine.advance(0)
    assert jnp.size(engine.state.step) == tied.slots
