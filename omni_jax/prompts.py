"""The tasks as eight streams: the prompt of each, and the answer that follows it.

This is the only definition. Inference takes `Prompt`s from here; training takes `Example`s, which are the same prompts
followed by the answer, with targets and a loss mask. Streams 0..6 are audio, one per codebook (ids local to the
codebook); stream 7 is text.

In a conversation the prompt of the present turn follows its `History`: a system text and past turns as text, whatever
they were. A past turn is what T1T2 makes of it, prompt and answer; all of it has audio padding.

    text   system s.. eot | input_t q.. eot answer_t a.. eot | ... | the present turn's prompt
    audio  padding                                                   input_a ...

A text of two seconds takes ten positions or less, its speech a hundred: this keeps histories short.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from omni_jax.config.model import ModelConfig
from omni_jax.delay import delay
from omni_jax.tasks import Task
from omni_jax.vocab import NUM_CODEBOOKS, NUM_STREAMS, TEXT_STREAM, Vocab

Turn = tuple[Sequence[int], Sequence[int]]
"""Token ids of a past question and of its answer. An empty one is left out."""


@dataclass(frozen=True)
class History:
    """What precedes the present turn of a conversation, as positions of the trunk."""

    tokens: np.ndarray
    """int32 [8, H]: audio padding, and text."""
    ends: tuple[int, ...] = ()
    """Where the system text and each turn ends: lengths of prefixes that later histories may share."""
    answers: tuple[tuple[int, int], ...] = ()
    """First position, and the one after the last, of each kept turn's answer with its end of text."""
    first_turn: int = 0
    """Turns before this one are left out."""

    def __len__(self) -> int:
        return self.tokens.shape[1]


NO_HISTORY = History(np.zeros((NUM_STREAMS, 0), np.int32))
"""That of a first turn without a system text: nothing."""


@dataclass(frozen=True)
class Prompt:
    """An input as the trunk takes it, up to the position that asks for the answer."""

    task: Task
    tokens: np.ndarray
    """int32 [8, P], its history included."""
    speech_positions: int
    """The adapter's output replaces the audio embeddings of so many positions after the history and one more; 0 for
    text."""
    history: History = NO_HISTORY
    """What it begins with."""

    def __len__(self) -> int:
        return self.tokens.shape[1]

    @property
    def speech_start(self) -> int:
        """The first position that takes speech."""
        return len(self.history) + 1


@dataclass(frozen=True)
class Example:
    """A prompt and its answer, as training takes them."""

    tokens: np.ndarray
    """int32 [8, T], the trunk's input: the prompt, then the answer without its last step."""
    targets: np.ndarray
    """int32 [8, T], the tokens to predict at each position; padding where `mask` is False."""
    mask: np.ndarray
    """bool [8, T], the tokens that count in the loss."""
    speech_positions: int
    """As in `Prompt`."""
    speech_start: int = 1
    """As in `Prompt`."""


def speech_positions(samples: int, max_position: int, stack: int = 1) -> int:
    """Trunk positions that a recording takes.

    The audio encoder makes floor(duration_ms / 20) + 1 frames of a recording, as in Mini-Omni; the adapter stacks
    `stack` frames into one position.

    Args:
        samples: length at 16 kHz, unpadded.
        max_position: frames that the audio encoder makes of a recording of full length, which has no extra frame at
            its end.
        stack: encoder frames per trunk position.
    """
    frames = min(samples // 320 + 1, max_position)
    return -(-frames // stack)


def max_speech_positions(config: ModelConfig) -> int:
    """Speech positions of a recording of the greatest length."""
    encoder = config.audio_encoder
    return speech_positions(encoder.max_samples, encoder.max_position, config.adapter.stack)


def speech_prompt(task: Task, positions: int, vocab: Vocab) -> Prompt:
    """The prompt of a task with speech as input, which takes `positions` positions.

    Raises:
        ValueError: the task takes text, or `positions` is not positive.
    """
    if not task.takes_audio:
        raise ValueError(f"task {task} takes text, not speech")
    if positions < 1:
        raise ValueError(f"speech must take at least 1 position, found {positions}")
    tokens = np.tile(vocab.padding[:, None], (1, positions + 3))
    tokens[:TEXT_STREAM, 0], tokens[TEXT_STREAM, 0] = vocab.input_a, vocab.input_t
    tokens[:TEXT_STREAM, -2], tokens[TEXT_STREAM, -2] = vocab.eoa, vocab.eot
    tokens[:TEXT_STREAM, -1] = vocab.answer_a if task.outputs_audio else vocab.pad_a
    tokens[TEXT_STREAM, -1] = vocab.asr if task is Task.A1T1 else vocab.answer_t
    return Prompt(task, tokens, positions)


def text_prompt(task: Task, text: Sequence[int], vocab: Vocab) -> Prompt:
    """The prompt of a task with text as input, the token ids `text`.

    Raises:
        ValueError: the task takes speech, or there are no ids.
    """
    if task.takes_audio:
        raise ValueError(f"task {task} takes speech, not text")
    if not len(text):
        raise ValueError(f"task {task}: expected some text, found none")
    tokens = np.full((NUM_STREAMS, len(text) + 3), vocab.pad_a, np.int32)
    tokens[TEXT_STREAM] = [vocab.input_t, *text, vocab.eot, vocab.tts if task is Task.T1A1 else vocab.answer_t]
    if task.outputs_audio:
        tokens[:TEXT_STREAM, -1] = vocab.answer_a
    return Prompt(task, tokens, 0)


def first_kept(lengths: Sequence[int], room: int) -> int:
    """Which turns are kept of those that take `lengths` positions: the number of the first one.

    As turns are added, none is left out until they take more than `room`. Then the oldest are left out, so many that
    the others take at most half of it; the newest one is kept if it fits the room at all. Leaving out many at once
    keeps the beginning the same for several turns, whose keys and values need not be computed again.
    """
    first = total = 0
    for number, length in enumerate(lengths):
        total += length
        if total <= room:
            continue
        while first <= number and total > room // 2 and (first < number or total > room):
            total -= lengths[first]
            first += 1
    return first


def history_room(context: int, present: int) -> int:
    """Positions for the history before a prompt of `present` positions.

    Half of the context, or less if the prompt is so long that a quarter of the context would not be left for the
    answer.
    """
    return max(0, min(context // 2, context - present - context // 4))


def make_history(system: Sequence[int], turns: Sequence[Turn], room: int, vocab: Vocab) -> History:
    """A system text and past turns, the oldest of which are left out by the rule of `first_kept`.

    Args:
        system: token ids of the system text, which is always kept; there may be none.
        turns: from the oldest to the newest.
        room: positions that system text and turns may take together; see `history_room`.
        vocab: the token layout.
    """
    text = [vocab.system, *system, vocab.eot] if len(system) else []
    questions = [[vocab.input_t, *question, vocab.eot] if len(question) else [] for question, _ in turns]
    answered = [[vocab.answer_t, *answer, vocab.eot] if len(answer) else [] for _, answer in turns]
    lengths = [len(q) + len(a) for q, a in zip(questions, answered, strict=True)]
    first = first_kept(lengths, max(0, room - len(text)))
    ends = [len(text)] if text else []
    answers = []
    for asked, said in zip(questions[first:], answered[first:], strict=True):
        text += asked + said
        ends.append(len(text))
        answers.append((len(text) - max(0, len(said) - 1), len(text)))
    tokens = np.full((NUM_STREAMS, len(text)), vocab.pad_a, np.int32)
    tokens[TEXT_STREAM] = text
    return History(tokens, tuple(ends), tuple(answers), first)


def after_history(history: History, prompt: Prompt) -> Prompt:
    """The prompt of a turn that follows a history.

    Raises:
        ValueError: its task takes none: transcripts and reading aloud depend on nothing that was said before.
    """
    if prompt.task in (Task.A1T1, Task.T1A1) and len(history):
        raise ValueError(f"task {prompt.task} takes no history")
    return replace(prompt, tokens=np.concatenate([history.tokens, prompt.tokens], axis=1), history=history)


def answer(task: Task, text: Sequence[int], codes: np.ndarray | None, vocab: Vocab) -> tuple[np.ndarray, np.ndarray]:
    """The eight streams of an answer, step by step, and their loss mask.

    Text counts in the loss up to and including its end; the decoder sets the padding after it, which is never
    predicted. Audio counts at every step, including the padding before a stream starts: the published decoder leaves
    it to the model.

    Args:
        task: decides which streams have content.
        text: token ids of the answer (A1T1: of the transcript); ignored by T1A1.
        codes: int [F, 7] for tasks that output audio, else None.
        vocab: the token layout.

    Returns:
        tokens int32 [8, S] and mask bool [8, S].

    Raises:
        ValueError: codes are missing for a task that outputs audio or given for one that does not, or the speech ends
            before the text.
    """
    if task.outputs_audio != (codes is not None):
        raise ValueError(f"task {task}: expected {'codes' if task.outputs_audio else 'no codes'}, found the opposite")
    text_tokens = [*text, vocab.eot] if task.outputs_text else []
    if codes is None:
        audio = np.full((NUM_CODEBOOKS, len(text_tokens)), vocab.pad_a, np.int32)
    else:
        audio = delay(codes, vocab)
        if len(text_tokens) > audio.shape[1]:
            raise ValueError(
                f"task {task}: the text takes {len(text_tokens)} steps but its speech only {audio.shape[1]}: "
                f"expected speech at least as long as its text"
            )
    steps = audio.shape[1]
    tokens = np.concatenate([audio, np.full((1, steps), vocab.pad_t, np.int32)])
    tokens[TEXT_STREAM, : len(text_tokens)] = text_tokens
    mask = np.zeros((NUM_STREAMS, steps), bool)
    mask[:TEXT_STREAM] = task.outputs_audio
    mask[TEXT_STREAM, : len(text_tokens)] = True
    return tokens, mask


def example(
    prompt: Prompt, text: Sequence[int], codes: np.ndarray | None, vocab: Vocab, trained: Sequence[bool] = ()
) -> Example:
    """A prompt with its answer; arguments and errors as of `answer`.

    The prompt's last position predicts step 0, and each step is the input of the next.

    Args:
        prompt: what precedes the answer.
        text: see `answer`.
        codes: see `answer`.
        vocab: see `answer`.
        trained: of each turn of the conversation before the present one, whether the text of its answer counts in the
            loss, too. Empty: of none.
    """
    answer_tokens, answer_mask = answer(prompt.task, text, codes, vocab)
    before = len(prompt) - 1
    targets = np.concatenate([np.tile(vocab.padding[:, None], (1, before)), answer_tokens], axis=1)
    mask = np.concatenate([np.zeros((NUM_STREAMS, before), bool), answer_mask], axis=1)
    for (begin, end), counts in zip(prompt.history.answers, trained[prompt.history.first_turn :], strict=False):
        if counts:
            targets[TEXT_STREAM, begin - 1 : end - 1] = prompt.tokens[TEXT_STREAM, begin:end]
            mask[TEXT_STREAM, begin - 1 : end - 1] = True
    return Example(
        tokens=np.concatenate([prompt.tokens, answer_tokens[:, :-1]], axis=1),
        targets=targets,
        mask=mask,
        speech_positions=prompt.speech_positions,
        speech_start=prompt.speech_start,
    )
