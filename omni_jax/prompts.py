"""The tasks as eight streams: the prompt of each, and the answer that follows it.

This is the only definition. Inference takes `Prompt`s from here; training takes `Example`s, which are the same prompts
followed by the answer, with targets and a loss mask. Streams 0..6 are audio, one per codebook (ids local to the
codebook); stream 7 is text.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from omni_jax.config.model import ModelConfig
from omni_jax.delay import delay
from omni_jax.tasks import Task
from omni_jax.vocab import NUM_CODEBOOKS, NUM_STREAMS, TEXT_STREAM, Vocab


@dataclass(frozen=True)
class Prompt:
    """An input as the trunk takes it, up to the position that asks for the answer."""

    task: Task
    tokens: np.ndarray
    """int32 [8, P]."""
    speech_positions: int
    """The adapter's output replaces the audio embeddings of positions 1..speech_positions; 0 for text."""

    def __len__(self) -> int:
        return self.tokens.shape[1]


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


def example(prompt: Prompt, text: Sequence[int], codes: np.ndarray | None, vocab: Vocab) -> Example:
    """A prompt with its answer; arguments and errors as of `answer`.

    The prompt's last position predicts step 0, and each step is the input of the next.
    """
    answer_tokens, answer_mask = answer(prompt.task, text, codes, vocab)
    before = len(prompt) - 1
    padding = np.tile(vocab.padding[:, None], (1, before))
    return Example(
        tokens=np.concatenate([prompt.tokens, answer_tokens[:, :-1]], axis=1),
        targets=np.concatenate([padding, answer_tokens], axis=1),
        mask=np.concatenate([np.zeros((NUM_STREAMS, before), bool), answer_mask], axis=1),
        speech_positions=prompt.speech_positions,
    )
