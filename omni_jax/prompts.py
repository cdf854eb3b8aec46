"""The tasks as eight streams: what a prompt looks like, and what the model should say after it.

This is the only definition. Inference takes `Prompt`s from here; training takes `Example`s, which are the same
prompts followed by the answer, with targets and a loss mask. Streams 0..6 are the audio layers (ids local to a
layer), stream 7 is text.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from omni_jax.delay import delay
from omni_jax.vocab import LAYERS, STREAMS, TEXT, Vocab


class Task(enum.StrEnum):
    """What goes in and what comes out: A1 speech or T1 text in; A2/A1 speech, T2/T1 text out."""

    A1A2 = "A1A2"
    """Speech in, text and speech out."""
    A1T2 = "A1T2"
    """Speech in, text out."""
    A1T1 = "A1T1"
    """Speech in, its transcript out."""
    T1A2 = "T1A2"
    """Text in, text and speech out."""
    T1T2 = "T1T2"
    """Text in, text out."""
    T1A1 = "T1A1"
    """Text in, the same text spoken."""

    @property
    def hears(self) -> bool:
        """Whether the input is speech."""
        return self.value.startswith("A1")

    @property
    def writes(self) -> bool:
        """Whether the answer has text."""
        return self is not Task.T1A1

    @property
    def speaks(self) -> bool:
        """Whether the answer has speech."""
        return self in (Task.A1A2, Task.T1A2, Task.T1A1)


@dataclass(frozen=True)
class Prompt:
    """An input as the trunk sees it, up to the column that asks for the answer."""

    task: Task
    tokens: np.ndarray
    """int32 [8, P]."""
    speech_positions: int
    """Positions 1..speech_positions whose audio embeddings the adapter's output replaces; 0 for text."""

    def __len__(self) -> int:
        return self.tokens.shape[1]


@dataclass(frozen=True)
class Example:
    """A prompt and its answer, as training wants them."""

    tokens: np.ndarray
    """int32 [8, T], the trunk's input: the prompt, then the answer without its last step."""
    targets: np.ndarray
    """int32 [8, T], what to say at each position; padding where `mask` is False."""
    mask: np.ndarray
    """bool [8, T], where the loss counts."""
    speech_positions: int


def speech_positions(samples: int, positions: int, stack: int = 1) -> int:
    """How many trunk positions a recording takes: floor(duration_ms / 20) + 1 ear frames, `stack` to a position.

    Args:
        samples: length at 16 kHz, unpadded.
        positions: frames the ear gives; a full-length recording has no frame after its last.
        stack: ear frames per trunk position.
    """
    return -(-min(samples // 320 + 1, positions) // stack)


def speech_prompt(task: Task, positions: int, vocab: Vocab) -> Prompt:
    """The prompt of a task whose input is speech that takes `positions` positions."""
    if not task.hears:
        raise ValueError(f"task {task} takes text, not speech")
    if positions < 1:
        raise ValueError(f"speech must take at least 1 position, found {positions}")
    tokens = np.full((STREAMS, positions + 3), vocab.pad_a, np.int32)
    tokens[TEXT] = vocab.pad_t
    tokens[:TEXT, 0], tokens[TEXT, 0] = vocab.input_a, vocab.input_t
    tokens[:TEXT, -2], tokens[TEXT, -2] = vocab.eoa, vocab.eot
    tokens[:TEXT, -1] = vocab.answer_a if task.speaks else vocab.pad_a
    tokens[TEXT, -1] = vocab.asr if task is Task.A1T1 else vocab.answer_t
    return Prompt(task, tokens, positions)


def text_prompt(task: Task, text: Sequence[int], vocab: Vocab) -> Prompt:
    """The prompt of a task whose input is the token ids `text`."""
    if task.hears:
        raise ValueError(f"task {task} takes speech, not text")
    if not len(text):
        raise ValueError(f"task {task}: expected some text, found none")
    tokens = np.full((STREAMS, len(text) + 3), vocab.pad_a, np.int32)
    tokens[TEXT] = [vocab.input_t, *text, vocab.eot, vocab.tts if task is Task.T1A1 else vocab.answer_t]
    if task.speaks:
        tokens[:TEXT, -1] = vocab.answer_a
    return Prompt(task, tokens, 0)


def answer(task: Task, text: Sequence[int], codes: np.ndarray | None, vocab: Vocab) -> tuple[np.ndarray, np.ndarray]:
    """The eight streams of an answer, step by step, and where the loss counts.

    Text counts up to and with its end; the padding after it is set by the decoder, never predicted. Audio counts
    at every step, the padding before a layer starts included: the published decoder leaves it to the model.

    Args:
        task: says which streams speak.
        text: token ids of the answer (A1T1: of the transcript); ignored by T1A1.
        codes: int [F, 7] for tasks that speak, else None.
        vocab: the token layout.

    Returns:
        tokens int32 [8, S] and mask bool [8, S].

    Raises:
        ValueError: a task that speaks has no codes, one that does not has some, or the speech ends before the text.
    """
    if task.speaks != (codes is not None):
        raise ValueError(f"task {task}: expected {'codes' if task.speaks else 'no codes'}, found the opposite")
    written = [*text, vocab.eot] if task.writes else []
    if codes is None:
        audio = np.full((LAYERS, len(written)), vocab.pad_a, np.int32)
    else:
        audio = delay(codes, vocab)
        if len(written) > audio.shape[1]:
            raise ValueError(
                f"task {task}: the text takes {len(written)} steps but its speech only {audio.shape[1]}: "
                f"expected speech at least as long as its text"
            )
    steps = audio.shape[1]
    tokens = np.concatenate([audio, np.full((1, steps), vocab.pad_t, np.int32)])
    tokens[TEXT, : len(written)] = written
    mask = np.zeros((STREAMS, steps), bool)
    mask[:TEXT] = task.speaks
    mask[TEXT, : len(written)] = True
    return tokens, mask


def example(prompt: Prompt, text: Sequence[int], codes: np.ndarray | None, vocab: Vocab) -> Example:
    """A prompt with its answer: position P-1 predicts step 0, and every step is the next one's input."""
    said, counts = answer(prompt.task, text, codes, vocab)
    before = len(prompt) - 1
    lead = np.full((STREAMS, before), vocab.pad_a, np.int32)
    lead[TEXT] = vocab.pad_t
    return Example(
        tokens=np.concatenate([prompt.tokens, said[:, :-1]], axis=1),
        targets=np.concatenate([lead, said], axis=1),
        mask=np.concatenate([np.zeros((STREAMS, before), bool), counts], axis=1),
        speech_positions=prompt.speech_positions,
    )
