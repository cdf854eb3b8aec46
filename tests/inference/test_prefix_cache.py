"""Turns of conversations in the engine: the same tokens with and without keys and values that are known already."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import numpy as np
import pytest

from omni_jax.errors import ConfigError
from omni_jax.inference.engine import Engine, PreparedRequest
from omni_jax.inference.generation import GenerationConfig
from omni_jax.inference.prefix_cache import PrefixCache
from omni_jax.inference.runner import ModelRunner
from omni_jax.prompts import History, after_history, make_history, speech_prompt
from omni_jax.tasks import Task
from omni_jax.vocab import Vocab
from tests.inference.reference_decoder import CONTEXT, ReferenceDecoder, random_model, random_request, small_config
from tests.models import compiles_nothing

pytestmark = pytest.mark.usefixtures("quickly_compiled")

SYSTEM = [3, 1, 4]


@pytest.fixture(scope="module", params=["separate", "stacked with TTS adapter"])
def runner(request: pytest.FixtureRequest) -> ModelRunner:
    stacked = request.param != "separate"
    config = small_config(text_specials=7, conversation=True, tts_adapter_layers=int(stacked))
    return ModelRunner(random_model(config, stacked=stacked, seed=1, eot=1.5, eoa=1.5))


def history(runner: ModelRunner, turns: int, room: int = 30) -> History:
    random = np.random.default_rng(5)
    texts = [(random.integers(0, 37, 2).tolist(), random.integers(0, 37, 2).tolist()) for _ in range(turns)]
    return make_history(SYSTEM, texts, room, Vocab(runner.config.vocab))


def turn(runner: ModelRunner, task: Task, number: int, *, length: int = 4, **settings: Any) -> PreparedRequest:
    """The turn after so many others."""
    request = random_request(runner.config, task, number, length, max_steps=12, **settings)
    (part,) = request.parts
    part = dataclasses.replace(part, prompt=after_history(history(runner, number), part.prompt))
    return dataclasses.replace(request, parts=(part,))


def answers(engine: Engine, *requests: PreparedRequest) -> list[list[list[int]]]:
    tokens: list[list[np.ndarray]] = [[] for _ in requests]
    for key, request in enumerate(requests):
        engine.submit(key, request)
    for progress in engine.run(5):
        tokens[progress.key].append(progress.tokens)
    return [np.concatenate(parts, axis=1).tolist() for parts in tokens]


class Counting(ModelRunner):
    """Records the positions of each prefill, and whether it had a prefix."""

    def __init__(self, runner: ModelRunner):
        self.__dict__.update(vars(runner))
        self.prefills: list[tuple[int, bool]] = []
        self.encoded = 0

    def prefill(self, tokens: Any, *args: Any, audio: bool) -> Any:
        self.prefills.append((tokens.shape[2], args[3] is not None))
        return super().prefill(tokens, *args, audio=audio)

    def encode_audio(self, audio: Any) -> Any:
        self.encoded += 1
        return super().encode_audio(audio)


@pytest.mark.parametrize("task", [Task.A1A2, Task.A1T2, Task.T1A2, Task.T1T2])
def test_reuse_and_full_prefill_give_the_same_tokens(runner: ModelRunner, task: Task) -> None:
    """Three turns: one after the other with a cache, each alone without one, and by the reference decoder."""
    slow = ReferenceDecoder(runner.module(), runner.encode_audio)
    counting = Counting(runner)
    engine = Engine(counting, 2, CONTEXT)
    for number in range(3):
        request = turn(runner, task, number, temperature=0.7 * (number == 1), seed=number)
        expected = slow(request)[0].tolist()
        assert answers(Engine(runner, 2, CONTEXT, prefixes=PrefixCache(0)), request) == [expected]
        assert answers(engine, request) == [expected]
    # 9 positions of a turn and 7 of the question, of which the last is not prefilled.
    assert counting.prefills == [(16, False), (16, True), (16, True)]


def test_prefixes_of_one_batch_have_different_lengths(runner: ModelRunner) -> None:
    """Turns of three conversations are prefilled together, among them a first one, which has nothing to reuse."""
    first, second = turn(runner, Task.A1A2, 1), turn(runner, Task.T1A2, 2)
    third = turn(runner, Task.A1A2, 3)
    other = random_request(runner.config, Task.A1A2, 9, 5, max_steps=12)
    alone = [answers(Engine(runner, 1, CONTEXT), request)[0] for request in (first, second, third, other)]
    engine = Engine(runner, 4, CONTEXT)
    answers(engine, turn(runner, Task.T1T2, 0), turn(runner, Task.T1T2, 2))
    assert answers(engine, first, second, third, other) == alone


def test_turns_give_the_same_tokens_when_pages_run_out(runner: ModelRunner) -> None:
    """Conversations with histories in pages of 4 positions, of which there are those of one request alone."""
    tasks = (Task.A1A2, Task.T1A2, Task.A1T2, Task.T1T2)
    first, second = ([turn(runner, task, number) for task in tasks] for number in (1, 2))
    expected = [[answers(Engine(runner, 1, CONTEXT), each)[0] for each in turns] for turns in (first, second)]
    engine = Engine(runner, 4, CONTEXT, num_pages=2 * CONTEXT // 4, page_len=4)
    assert [answers(engine, *turns) for turns in (first, second)] == expected
    assert engine.pages.used == 0
    assert engine.prefixes.find(second[0].prompt.history) is not None


def test_conversations_share_the_system_text(runner: ModelRunner) -> None:
    counting = Counting(runner)
    engine = Engine(counting, 1, CONTEXT)
    answers(engine, turn(runner, Task.T1T2, 0))
    request = random_request(runner.config, Task.T1T2, 8, 4, max_steps=3)
    prompt = after_history(make_history(SYSTEM, [([7], [8])], 30, Vocab(runner.config.vocab)), request.prompt)
    other = dataclasses.replace(request, parts=(dataclasses.replace(request.parts[0], prompt=prompt),))
    answers(engine, other)
    assert [known for _, known in counting.prefills] == [False, True]


def test_truncation_reuses_the_same_beginning_for_several_turns(runner: ModelRunner) -> None:
    """9 positions a turn, of which three fit: the beginning changes once in three turns."""
    counting = Counting(runner)
    engine = Engine(counting, 1, CONTEXT)
    known = []
    for number in range(8):
        request = random_request(runner.config, Task.T1T2, number, 4, max_steps=2)
        past = history(runner, number, room=32)
        before = engine.prefixes.find(past)
        known.append(0 if before is None else before.length)
        prompt = after_history(past, request.prompt)
        answers(engine, dataclasses.replace(request, parts=(dataclasses.replace(request.parts[0], prompt=prompt),)))
    assert known == [0, 5, 13, 21, 5, 13, 21, 5]


def test_sessions_that_do_not_fit_are_prefilled_again(runner: ModelRunner) -> None:
    """Six conversations take turns where the keys and values of one or two fit: the tokens are the same."""
    vocab = Vocab(runner.config.vocab)

    def session(number: int, turns: int) -> PreparedRequest:
        request = random_request(runner.config, Task.T1T2, 10 * number + turns, 4, max_steps=4)
        past = make_history([number], [([number, n], [n]) for n in range(turns)], CONTEXT, vocab)
        part = dataclasses.replace(request.parts[0], prompt=after_history(past, request.prompt))
        return dataclasses.replace(request, parts=(part,))

    longest = session(0, 3).prompt.history
    probe = PrefixCache()
    answers(Engine(runner, 1, CONTEXT, prefixes=probe), session(0, 3))
    engine = Engine(runner, 2, CONTEXT, prefixes=PrefixCache(int(1.2 * probe.nbytes)))
    plain = Engine(runner, 2, CONTEXT, prefixes=PrefixCache(0))
    hits = 0
    for turns in range(1, 4):
        for number in range(6):
            hits += engine.prefixes.find(session(number, turns).prompt.history) is not None
            assert answers(engine, session(number, turns)) == answers(plain, session(number, turns))
            assert engine.prefixes.nbytes <= engine.prefixes.max_bytes
    assert len(longest) == 3 + 3 * 7
    assert hits == 0, "six in turn push one another out"
    answers(engine, session(5, 3))
    assert engine.prefixes.find(session(5, 3).prompt.history) is not None


def test_remembered_history_leaves_only_the_question_to_prefill(runner: ModelRunner) -> None:
    """A turn's text is prefilled before the next turn, after what is queued; and only once."""
    counting = Counting(runner)
    engine = Engine(counting, 1, CONTEXT)
    request = turn(runner, Task.T1T2, 2)
    expected = answers(Engine(runner, 1, CONTEXT, prefixes=PrefixCache(0)), request)
    answers(engine, turn(runner, Task.T1T2, 1))
    engine.submit(0, turn(runner, Task.T1T2, 0))
    engine.remember(request.prompt.history)
    engine.remember(request.prompt.history)
    assert engine.busy
    for _ in engine.run(5):
        pass
    found = engine.prefixes.find(request.prompt.history)
    assert found is not None
    assert found.length == len(request.prompt.history)
    del counting.prefills[:2]
    assert counting.prefills == [(16, True)]
    assert answers(engine, request) == expected
    with pytest.raises(ConfigError, match="takes 65 positions"):
        engine.remember(make_history([1] * (CONTEXT - 1), [], CONTEXT, Vocab(runner.config.vocab)))


def test_prefix_programs_are_compiled_once_per_shape(runner: ModelRunner) -> None:
    engine = Engine(runner, 1, CONTEXT)
    for number in range(3):
        answers(engine, turn(runner, Task.T1T2, number))
    before = runner.jitted.prefill._cache_size()
    other = Engine(runner, 1, CONTEXT)
    for number in range(3):
        for length in (3, 4, 5):
            answers(other, turn(runner, Task.T1T2, number, length=length))
    assert runner.jitted.prefill._cache_size() == before


def test_warm_up_compiles_turns_of_conversations(caplog: pytest.LogCaptureFixture) -> None:
    config = small_config(text_specials=7, conversation=True, max_position=32)
    runner = ModelRunner(random_model(config, seed=1))
    engine = Engine(runner, 1, 32)
    engine.warm_up()
    list(engine.warm_up_rest())
    with compiles_nothing(caplog):
        for number in range(3):
            for task in (Task.A1A2, Task.T1T2):
                answers(engine, turn(runner, task, number, length=2))


def test_turns_give_the_same_tokens_by_programs_that_fit_any(
    runner: ModelRunner, caplog: pytest.LogCaptureFixture
) -> None:
    """Those that are compiled before all others: for the longest prompt, one request after another."""
    tasks = (Task.A1A2, Task.T1A2, Task.A1T2, Task.T1T2)
    turns = [[turn(runner, task, number) for task in tasks] for number in (0, 1, 2)]
    expected = [[answers(Engine(runner, 1, CONTEXT), each)[0] for each in requests] for requests in turns]
    engine = Engine(runner, 4, CONTEXT)
    engine.warm_up()
    list(itertools.islice(engine.warm_up_rest(), len({*engine._general_programs()} - {*engine._first_programs()})))
    with compiles_nothing(caplog):
        assert [answers(engine, *requests) for requests in turns] == expected


def kept(tokens: list[int], cache: PrefixCache, turns: list[tuple[list[int], list[int]]]) -> History:
    """Keeps a history whose keys are numbered by position: 4 bytes each, and as many for values."""
    past = make_history(tokens, turns, 100, Vocab(small_config(text_specials=7).vocab))
    array = np.arange(64, dtype=np.float32)[None, None, :, None]
    cache.keep(past, {"trunk": {"k": (array,), "v": (array,)}}, 0)
    return past


def test_prefix_cache_drops_the_least_recently_used() -> None:
    cache = PrefixCache(100)
    one = kept([1], cache, [])  # three positions, 24 bytes
    two, three, four = (kept([n], cache, []) for n in (2, 3, 4))
    assert (len(cache), cache.nbytes) == (4, 96)
    assert cache.find(one) is not None
    kept([5], cache, [])
    assert [cache.find(past) is not None for past in (one, two, three, four)] == [True, False, True, True]
    assert (len(cache), cache.nbytes) == (4, 96)
    kept([0] * 30, cache, [])  # more than it may hold
    assert (len(cache), cache.nbytes) == (4, 96)


def test_longer_history_replaces_its_beginnings() -> None:
    cache = PrefixCache(10_000)
    past = [kept([1], cache, [([2], [3])] * n) for n in range(4)]
    assert len(cache) == 1
    for history in past:
        found = cache.find(history)
        assert found is not None
        assert found.length == len(history)
        assert found.caches["trunk"]["k"][0][0, 0, : found.length, 0].tolist() == list(range(found.length))
    other = make_history([1], [([2], [3]), ([4], [5])], 100, Vocab(small_config(text_specials=7).vocab))
    found = cache.find(other)
    assert found is not None
    assert found.length == len(past[1])


def test_prefix_cache_of_nothing_keeps_nothing() -> None:
    cache = PrefixCache(0)
    assert cache.find(kept([1], cache, [])) is None
    assert cache.find(make_history([], [], 9, Vocab(small_config().vocab))) is None
    with pytest.raises(ValueError, match="-1"):
        PrefixCache(-1)


@pytest.mark.parametrize("slots", [1, 2, 4])
def test_question_is_transcribed_next_to_its_answer(runner: ModelRunner, slots: int) -> None:
    request = turn(runner, Task.A1A2, 2)
    (part,) = request.parts
    transcript = PreparedRequest(
        Task.A1T1,
        (dataclasses.replace(part, prompt=speech_prompt(Task.A1T1, 4, Vocab(runner.config.vocab))),),
        GenerationConfig(),
    )
    expected = [answers(Engine(runner, 1, CONTEXT), each)[0] for each in (request, transcript)]
    both = dataclasses.replace(request, transcription=dataclasses.replace(transcript, of_question=True))
    counting = Counting(runner)
    engine = Engine(counting, slots, CONTEXT)
    engine.submit(7, both)
    found: dict[bool, list[np.ndarray]] = {False: [], True: []}
    done = []
    for progress in engine.run(3):
        assert progress.key == 7
        found[progress.of_question].append(progress.tokens)
        done.append(progress.done)
    assert [np.concatenate(found[which], axis=1).tolist() for which in (False, True)] == expected
    assert done == [False] * (len(done) - 1) + [True]
    assert counting.encoded == 1, "the recording is encoded once"
    engine.submit(8, both)
    engine.advance(1)
    assert engine.cancel(8)
    assert not engine.busy or not engine.advance(1)
    assert not engine.busy


def test_prefix_cache_keeps_a_history_with_an_empty_turn() -> None:
    """Such as one whose answer was interrupted before anything of it was played."""
    cache = PrefixCache()
    past = kept([], cache, [([2], [3]), ([], [])])
    found = cache.find(past)
    assert found is not None
    assert (found.length, len(cache)) == (len(past), 1)
