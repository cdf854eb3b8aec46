"""The prompt and the training example of every task against literal arrays."""

from __future__ import annotations

import numpy as np
import pytest

from omni_jax.config.model import VocabConfig
from omni_jax.prompts import (
    NO_HISTORY,
    after_history,
    answer,
    example,
    first_kept,
    history_room,
    make_history,
    speech_positions,
    speech_prompt,
    text_prompt,
)
from omni_jax.tasks import Task
from omni_jax.vocab import Vocab

V = Vocab(VocabConfig(text=100, text_specials=6, audio=10, audio_specials=5))
# Text specials: end 100, padding 101, input 102, answer 103, asr 104, tts 105.
# Audio specials: end 10, padding 11, input 12, answer 13.


def streams(audio: list[int], text: list[int]) -> np.ndarray:
    return np.array([audio] * 7 + [text])


SPEECH = {
    Task.A1A2: streams([12, 11, 11, 10, 13], [102, 101, 101, 100, 103]),
    Task.A1T2: streams([12, 11, 11, 10, 11], [102, 101, 101, 100, 103]),
    Task.A1T1: streams([12, 11, 11, 10, 11], [102, 101, 101, 100, 104]),
}
TEXT = {
    Task.T1A2: streams([11, 11, 11, 11, 13], [102, 5, 6, 100, 103]),
    Task.T1T2: streams([11, 11, 11, 11, 11], [102, 5, 6, 100, 103]),
    Task.T1A1: streams([11, 11, 11, 11, 13], [102, 5, 6, 100, 105]),
}


def test_task_properties() -> None:
    assert [task.value for task in Task] == ["A1A2", "A1T2", "A1T1", "T1A2", "T1T2", "T1A1"]
    assert [task.takes_audio for task in Task] == [True, True, True, False, False, False]
    assert [task.outputs_text for task in Task] == [True, True, True, True, True, False]
    assert [task.outputs_audio for task in Task] == [True, False, False, True, False, True]


@pytest.mark.parametrize("task", SPEECH)
def test_speech_prompts(task: Task) -> None:
    prompt = speech_prompt(task, 2, V)
    np.testing.assert_array_equal(prompt.tokens, SPEECH[task])
    assert (prompt.task, prompt.tokens.dtype, prompt.speech_positions, len(prompt)) == (task, np.int32, 2, 5)


@pytest.mark.parametrize("task", TEXT)
def test_text_prompts(task: Task) -> None:
    prompt = text_prompt(task, [5, 6], V)
    np.testing.assert_array_equal(prompt.tokens, TEXT[task])
    assert (prompt.task, prompt.tokens.dtype, prompt.speech_positions, len(prompt)) == (task, np.int32, 0, 5)


@pytest.mark.parametrize("task", Task)
def test_prompt_of_wrong_input_is_error(task: Task) -> None:
    with pytest.raises(ValueError, match=str(task)):
        text_prompt(task, [1], V) if task.takes_audio else speech_prompt(task, 1, V)


def test_prompt_of_empty_input_is_error() -> None:
    with pytest.raises(ValueError, match="found none"):
        text_prompt(Task.T1T2, [], V)
    with pytest.raises(ValueError, match="at least 1"):
        speech_prompt(Task.A1A2, 0, V)


def test_speech_positions() -> None:
    """floor(ms / 20) + 1 of the unpadded recording: 20 ms are 320 samples."""
    assert [speech_positions(n, 1500) for n in (1, 319, 320, 639, 640)] == [1, 1, 2, 2, 3]
    assert speech_positions(16000, 1500) == 51
    assert speech_positions(479_999, 1500) == 1500
    assert speech_positions(480_000, 1500) == 1500, "a full-length recording has no frame after its last"
    assert [speech_positions(n, 100, stack=4) for n in (1, 3 * 320, 4 * 320, 32000)] == [1, 1, 2, 25]


CODES = np.array([[1, 2, 3, 4, 5, 6, 7]])
AUDIO = [
    [11, 1, 10, 11, 11, 11, 11, 11, 11],
    [11, 11, 2, 10, 11, 11, 11, 11, 11],
    [11, 11, 11, 3, 10, 11, 11, 11, 11],
    [11, 11, 11, 11, 4, 10, 11, 11, 11],
    [11, 11, 11, 11, 11, 5, 10, 11, 11],
    [11, 11, 11, 11, 11, 11, 6, 10, 11],
    [11, 11, 11, 11, 11, 11, 11, 7, 10],
]
TEXT_OUT = [8, 9, 100, 101, 101, 101, 101, 101, 101]


@pytest.mark.parametrize("task", [Task.A1A2, Task.T1A2])
def test_example_with_text_and_audio(task: Task) -> None:
    prompt = speech_prompt(task, 2, V) if task.takes_audio else text_prompt(task, [5, 6], V)
    out = example(prompt, [8, 9], CODES, V)
    answered = np.array([*AUDIO, TEXT_OUT])
    prompt_tokens = (SPEECH | TEXT)[task]
    np.testing.assert_array_equal(out.tokens, np.concatenate([prompt_tokens, answered[:, :-1]], axis=1))
    np.testing.assert_array_equal(
        out.targets, np.concatenate([streams([11, 11, 11, 11], [101, 101, 101, 101]), answered], axis=1)
    )
    no, yes = [False] * 4, [True] * 9
    expected = [no + yes] * 7 + [[*no, True, True, True, False, False, False, False, False, False]]
    np.testing.assert_array_equal(out.mask, expected)
    assert out.mask.dtype == bool
    assert out.tokens.shape == out.targets.shape == out.mask.shape == (8, 13)
    assert out.speech_positions == (2 if task.takes_audio else 0)


@pytest.mark.parametrize("task", [Task.A1T2, Task.A1T1, Task.T1T2])
def test_example_with_text_only(task: Task) -> None:
    prompt = speech_prompt(task, 2, V) if task.takes_audio else text_prompt(task, [5, 6], V)
    out = example(prompt, [8, 9], None, V)
    prompt_tokens = (SPEECH | TEXT)[task]
    np.testing.assert_array_equal(out.tokens, np.concatenate([prompt_tokens, streams([11, 11], [8, 9])], axis=1))
    np.testing.assert_array_equal(out.targets, streams([11] * 7, [101, 101, 101, 101, 8, 9, 100]))
    expected = [[False] * 7] * 7 + [[False, False, False, False, True, True, True]]
    np.testing.assert_array_equal(out.mask, expected)


def test_example_with_audio_only() -> None:
    """Only audio counts in the loss; the text stream is padding throughout."""
    out = example(text_prompt(Task.T1A1, [5, 6], V), [5, 6], CODES, V)
    np.testing.assert_array_equal(out.tokens[:7, 5:], np.array(AUDIO)[:, :-1])
    np.testing.assert_array_equal(out.tokens[:, :5], TEXT[Task.T1A1])
    np.testing.assert_array_equal(out.tokens[7, 5:], [101] * 8)
    np.testing.assert_array_equal(out.targets[:7], np.concatenate([np.full((7, 4), 11), AUDIO], axis=1))
    np.testing.assert_array_equal(out.targets[7], [101] * 13)
    np.testing.assert_array_equal(out.mask, [[False] * 4 + [True] * 9] * 7 + [[False] * 13])


def test_example_with_empty_text() -> None:
    out = example(text_prompt(Task.T1T2, [5], V), [], None, V)
    np.testing.assert_array_equal(out.tokens, streams([11] * 4, [102, 5, 100, 103]))
    np.testing.assert_array_equal(out.targets[7], [101, 101, 101, 100])
    np.testing.assert_array_equal(out.mask[7], [False, False, False, True])


def test_answer_without_frames() -> None:
    tokens, mask = answer(Task.T1A1, [], np.zeros((0, 7), np.int32), V)
    assert tokens.shape == mask.shape == (8, 8)
    assert [tokens[k, k + 1] for k in range(7)] == [10] * 7


def test_answer_takes_codes_only_if_task_outputs_audio() -> None:
    with pytest.raises(ValueError, match="expected codes"):
        answer(Task.A1A2, [1], None, V)
    with pytest.raises(ValueError, match="expected no codes"):
        answer(Task.A1T2, [1], CODES, V)


def test_answer_text_longer_than_speech_is_error() -> None:
    tokens, mask = answer(Task.A1A2, [1] * 8, CODES, V)
    np.testing.assert_array_equal(tokens[7], [1] * 8 + [100])
    assert mask[7].all()
    with pytest.raises(ValueError, match="10 steps but its speech only 9"):
        answer(Task.A1A2, [1] * 9, CODES, V)


TALK = Vocab(VocabConfig(text=100, text_specials=7, audio=10, audio_specials=5))
# The seventh text special begins a system text: 106.
TURNS = [([1], [2, 3]), ([4], []), ([], [5])]
HISTORY_TEXT = [106, 9, 100, 102, 1, 100, 103, 2, 3, 100, 102, 4, 100, 103, 5, 100]


def test_history_is_system_text_and_turns_as_text() -> None:
    """A turn is T1T2's prompt and answer; an empty half is left out."""
    history = make_history([9], TURNS, 50, TALK)
    np.testing.assert_array_equal(history.tokens, streams([11] * 16, HISTORY_TEXT))
    assert (history.tokens.dtype, len(history), history.first_turn) == (np.int32, 16, 0)
    assert history.ends == (3, 10, 13, 16)
    assert history.answers == ((7, 10), (13, 13), (14, 16))
    turn = example(text_prompt(Task.T1T2, [1], TALK), [2, 3], None, TALK)
    np.testing.assert_array_equal(history.tokens[:, 3:9], turn.tokens)


def test_history_without_anything_is_empty() -> None:
    history = make_history([], [], 50, TALK)
    assert (len(history), history.ends) == (0, ())
    prompt = speech_prompt(Task.A1A2, 2, TALK)
    np.testing.assert_array_equal(after_history(history, prompt).tokens, prompt.tokens)
    assert len(NO_HISTORY) == 0
    assert prompt.speech_start == 1


@pytest.mark.parametrize("task", [Task.A1A2, Task.A1T2, Task.T1A2, Task.T1T2])
def test_prompt_after_history(task: Task) -> None:
    present = speech_prompt(task, 2, TALK) if task.takes_audio else text_prompt(task, [5, 6], TALK)
    prompt = after_history(make_history([9], TURNS, 50, TALK), present)
    np.testing.assert_array_equal(prompt.tokens[:, :16], streams([11] * 16, HISTORY_TEXT))
    np.testing.assert_array_equal(prompt.tokens[:, 16:], present.tokens)
    assert (prompt.speech_start, prompt.speech_positions) == (17, present.speech_positions)
    out = example(prompt, [8, 9], CODES if task.outputs_audio else None, TALK)
    assert not out.mask[:, : len(prompt) - 1].any()
    assert (out.speech_start, out.speech_positions) == (17, present.speech_positions)


@pytest.mark.parametrize("task", [Task.A1T1, Task.T1A1])
def test_transcribing_and_reading_aloud_take_no_history(task: Task) -> None:
    present = speech_prompt(task, 2, TALK) if task.takes_audio else text_prompt(task, [5, 6], TALK)
    with pytest.raises(ValueError, match=f"{task} takes no history"):
        after_history(make_history([9], [], 50, TALK), present)
    assert len(after_history(make_history([], [], 50, TALK), present)) == len(present)


def test_trained_answers_of_the_history_count_in_the_loss() -> None:
    prompt = after_history(make_history([9], TURNS, 50, TALK), text_prompt(Task.T1T2, [6], TALK))
    out = example(prompt, [7], None, TALK, [True, True, False])
    # The answer_t at position 6 predicts the first token, position 8 the end of text.
    assert np.flatnonzero(out.mask[7]).tolist() == [6, 7, 8, 19, 20]
    assert out.targets[7, out.mask[7]].tolist() == [2, 3, 100, 7, 100]
    assert not out.mask[:7].any()
    alone = example(prompt, [7], None, TALK, [False, False, True])
    assert np.flatnonzero(alone.mask[7]).tolist() == [13, 14, 19, 20]
    assert alone.targets[7, alone.mask[7]].tolist() == [5, 100, 7, 100]


def test_oldest_turns_are_left_out_many_at_once() -> None:
    assert [first_kept([10] * n, 40) for n in range(10)] == [0, 0, 0, 0, 0, 3, 3, 3, 6, 6]
    assert first_kept([5, 35], 40) == 0
    assert first_kept([6, 35], 40) == 1, "the newest turn is kept if it fits"
    assert first_kept([10, 41], 40) == 2
    assert first_kept([10, 41, 3], 40) == 2
    assert first_kept([1, 1], 0) == 2
    assert first_kept([], 0) == 0


def test_first_kept_follows_its_rule_for_any_turns() -> None:
    random = np.random.default_rng(0)
    for _ in range(300):
        room = int(random.integers(1, 60))
        lengths = random.integers(1, 30, 20).tolist()
        kept = [first_kept(lengths[:n], room) for n in range(21)]
        assert kept == sorted(kept), "what was left out does not come back"
        for n, first in enumerate(kept):
            assert sum(lengths[first:n]) <= room
            if n and first == kept[n - 1]:
                continue
            assert first == n or first == n - 1 or sum(lengths[first:n]) <= room // 2
            if n and first:
                assert sum(lengths[kept[n - 1] : n]) > room, "nothing is left out without need"


def test_truncated_history_keeps_the_system_text() -> None:
    history = make_history([9], TURNS, 9, TALK)
    assert history.tokens[7].tolist() == [106, 9, 100, 102, 4, 100, 103, 5, 100]
    assert (history.first_turn, history.ends) == (1, (3, 6, 9))
    prompt = after_history(history, text_prompt(Task.T1T2, [6], TALK))
    out = example(prompt, [7], None, TALK, [True, False, True])
    assert out.targets[7, out.mask[7]].tolist() == [5, 100, 7, 100]
    assert make_history([9, 9], TURNS, 0, TALK).tokens[7].tolist() == [106, 9, 9, 100]


def test_history_room_leaves_a_quarter_of_the_context_for_the_answer() -> None:
    assert [history_room(2048, present) for present in (20, 512, 513, 1503, 1600)] == [1024, 1024, 1023, 33, 0]
