"""From tokens to answers: text, audio, timing. One piece of code for streamed and for whole answers."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import tokenizers

from omni_jax.audio.encoding import write_audio
from omni_jax.audio.io import SAMPLE_RATE
from omni_jax.codec.snac import DecodeFn
from omni_jax.codec.stream import StreamDecoder
from omni_jax.config.model import ModelConfig
from omni_jax.delay import fill_invalid_codes, undelay
from omni_jax.errors import ConfigError
from omni_jax.inference.engine import FinishReason, PreparedRequest, Progress, next_power_of_2
from omni_jax.tasks import Task
from omni_jax.text.sentences import ends_sentence
from omni_jax.vocab import TEXT_STREAM, Vocab

MIN_DECODE_FRAMES = 8
"""Frames the codec decodes at least; longer answers are padded to 1, 1.5, 2, 3, 4, ... times as many."""
MAX_STREAM_CHUNK_STEPS = 16
"""Most decode steps between two chunks of a stream."""
SENTENCE_PAUSE = 0.2
"""Seconds between two sentences that are read aloud one after the other, besides the silence at their ends. Between two
parts of a sentence there is only the latter."""


@dataclass(frozen=True)
class Timing:
    """Seconds from the start of decoding, prompt and codec included."""

    first_token: float
    first_audio: float | None
    """None if there is no audio. When the answer was not streamed, all audio comes at the end."""
    total: float
    steps_per_second: float
    real_time_factor: float | None
    """`total` over the duration of the audio: below 1 is faster than speech."""


@dataclass(frozen=True)
class Segment:
    """A piece of a transcript: what is said between two times, in seconds of the recording."""

    start: float
    end: float
    text: str


@dataclass(frozen=True)
class Reply:
    """An answer."""

    task: Task
    text: str
    """What the model wrote; T1A1: what it read aloud."""
    audio: np.ndarray | None
    """float32 [samples]; None for tasks that output text only."""
    sample_rate: int
    """Samples per second of `audio`."""
    tokens: np.ndarray
    """int32 [8, steps], the streams as decoded (delayed), text last; those of several parts one after another."""
    finish_reason: FinishReason
    num_invalid_codes: int
    """Tokens in the place of a code that are none; each was replaced by the code before it."""
    timing: Timing
    segments: tuple[Segment, ...] = ()
    """A1T1: the transcript in pieces, each of which the model has taken at once."""
    question: str | None = None
    """What was asked, as the model transcribes it; None unless `Request.transcribe_question` asks for it."""
    cached_positions: int = 0
    """Of the prompt, those whose keys and values were kept from an earlier turn."""

    @property
    def seconds(self) -> float:
        """Duration of the audio."""
        return 0.0 if self.audio is None else len(self.audio) / self.sample_rate

    def __repr__(self) -> str:
        """Short: the text and the duration, not the samples."""
        audio = "" if self.audio is None else f", {self.seconds:.2f} s of audio"
        return f"<Reply {self.task} {self.text!r}{audio}, {self.finish_reason} after {self.tokens.shape[1]} steps>"

    def save(self, path: str | Path) -> None:
        """Write the audio in the format that the file's suffix names.

        Args:
            path: ends in .wav, .flac, .mp3, .ogg or .opus (both Opus), .aac or .m4a.

        Raises:
            ConfigError: the task outputs text only.
            AudioError: the suffix names none of these formats, or the file cannot be written.
        """
        if self.audio is None:
            raise ConfigError(f"task {self.task} outputs text only: there is no audio to save", field="task")
        write_audio(path, self.audio, self.sample_rate)


@dataclass(frozen=True)
class Chunk:
    """A piece of an answer while it is decoded: new text, new audio, or both."""

    text: str
    audio: np.ndarray
    """float32 [samples], joined over the chunks the whole answer's audio; empty for tasks that output text only."""
    sample_rate: int
    """Samples per second of `audio`."""
    reply: Reply | None = None
    """The whole answer, in the last chunk."""
    question: str = ""
    """New text of the question's transcript, if it was asked for."""

    def __repr__(self) -> str:
        """Short: not the samples."""
        last = ", last" if self.reply is not None else ""
        return f"<Chunk {self.text!r}, {len(self.audio) / self.sample_rate:.2f} s of audio{last}>"


@dataclass(frozen=True)
class OutputDecoder:
    """What turns a model's tokens into text and audio."""

    config: ModelConfig
    tokenizer: tokenizers.Tokenizer
    codec: DecodeFn

    @property
    def vocab(self) -> Vocab:
        """The token layout."""
        return Vocab(self.config.vocab)

    @property
    def sample_rate(self) -> int:
        """Samples per second of the audio."""
        return self.config.codec.sample_rate

    def decode_text(self, tokens: np.ndarray) -> str:
        """The text of a text stream int [steps], up to its end; special tokens are dropped."""
        ends = np.flatnonzero(tokens == self.vocab.eot)
        ids = tokens[: ends[0]] if len(ends) else tokens
        return self.tokenizer.decode([int(i) for i in ids if i < self.config.vocab.text], skip_special_tokens=False)

    def frames(self, tokens: np.ndarray) -> np.ndarray:
        """The complete frames int32 [F, 7] of streams int [8, steps], tokens as they are."""
        return undelay(tokens[:TEXT_STREAM], self.vocab)

    def decode_audio(self, tokens: Sequence[np.ndarray]) -> Iterator[np.ndarray]:
        """The audio of each of several answers int [8, steps], float32 [F * frame_size], in one call of the codec."""
        frames = [fill_invalid_codes(self.frames(t), self.vocab) for t in tokens]
        longest = max((len(f) for f in frames), default=0)
        if not longest:
            return iter([np.zeros(0, np.float32)] * len(frames))
        rows, size = next_power_of_2(len(frames)), _decode_size(longest)
        codes = np.zeros((rows, size, TEXT_STREAM), np.int32)
        lengths = np.zeros(rows, np.int32)
        for row, f in enumerate(frames):
            codes[row, : len(f)], lengths[row] = f, len(f)
        audio = np.asarray(self.codec(codes, lengths=lengths))
        return iter([audio[row, : len(f) * self.config.codec.frame_size] for row, f in enumerate(frames)])


def _decode_size(frames: int) -> int:
    """Frames that the codec is run on: `MIN_DECODE_FRAMES` times 1, 1.5, 2, 3, 4, 6, ..., few sizes to compile."""
    size = MIN_DECODE_FRAMES
    while size < frames:
        power_of_2 = size & (size - 1) == 0
        size = size * 3 // 2 if power_of_2 else size // 3 * 4
    return size


class AnswerBuilder:
    """Collects what the engine reports of one request.

    Streaming, text and audio are decoded as they become complete. Otherwise the caller decodes the audio of several
    answers together (`OutputDecoder.decode_audio`), whenever a part has ended, and passes it to `add_audio`.

    Attributes:
        part_tokens: int32 [8, steps], the streams of the part being answered. All of them, unless a text is read aloud
            sentence by sentence or a long recording is transcribed.
        next_steps: how many steps the next chunk should take for this answer: few until its first audio is out, which
            is latency, then more and more, which is cheaper.
    """

    def __init__(self, outputs: OutputDecoder, request: PreparedRequest, *, streaming: bool):
        self._outputs, self._request = outputs, request
        self.next_steps = 2
        self._clock = _Clock()
        self._streaming = streaming
        self._text = ""
        self._audio: list[np.ndarray] = []
        self._ended: list[np.ndarray] = []
        self._ended_texts: list[str] = []
        self._num_invalid_codes = self._cached = 0
        self._finish: FinishReason | None = None
        self._part_ended = False
        self._question_tokens = np.zeros(0, np.int32)
        self._question = ""
        self._begin_part()

    def _begin_part(self) -> None:
        outputs = self._outputs
        self.part_tokens = np.zeros((TEXT_STREAM + 1, 0), np.int32)
        self._num_frames = 0
        audio = self._streaming and self._request.task.outputs_audio
        self._stream = StreamDecoder(outputs.codec, outputs.config.codec) if audio else None

    def add(self, progress: Progress) -> Chunk | None:
        """Take new tokens; streaming, the new text and audio, or None if there is none yet."""
        if progress.of_question:
            return self._add_question(progress)
        if self._part_ended:
            self._ended_texts.append(self._part_text())
            self._ended.append(self.part_tokens)
            self._begin_part()
        if self._stream is None:
            self._grow_chunks()
        self._clock.mark_tokens(progress.tokens)
        self.part_tokens = np.concatenate([self.part_tokens, progress.tokens], axis=1)
        end = progress.finish or progress.part_finish
        self._part_ended = end is not None
        self._cached = progress.cached
        # Of several parts, one that did not end by itself is what the caller should know of.
        self._finish = end if self._finish in (None, "stop") else self._finish
        if not self._streaming:
            return None
        text = self._text_so_far()
        # An unfinished character decodes to U+FFFD: hold it back until its last byte is there.
        ready = text if progress.finish else text.rstrip("\ufffd")
        new_text, self._text = ready[len(self._text) :], ready
        audio = self._push_frames() if self._stream is not None else np.zeros(0, np.float32)
        reply = self.reply() if progress.done else None
        if not (new_text or len(audio) or reply):
            return None
        return Chunk(new_text, audio, self._outputs.sample_rate, reply)

    def _add_question(self, progress: Progress) -> Chunk | None:
        self._question_tokens = np.concatenate([self._question_tokens, progress.tokens[TEXT_STREAM]])
        text = self._outputs.decode_text(self._question_tokens).lstrip()
        # An unfinished character is held back, and spaces, which are dropped if nothing follows.
        text = text.rstrip() if progress.finish else text.rstrip("\ufffd").rstrip()
        new_text, self._question = text[len(self._question) :], text
        reply = self.reply() if self._streaming and progress.done else None
        if not self._streaming or not (new_text or reply):
            return None
        return Chunk("", np.zeros(0, np.float32), self._outputs.sample_rate, reply, new_text)

    def add_audio(self, audio: np.ndarray) -> np.ndarray:
        """Take new audio of the part, float32 [samples]; after a sentence the pause before the next one is added."""
        number = len(self._ended)
        if self._part_ended:
            frames = self._outputs.frames(self.part_tokens)
            self._num_invalid_codes += int((frames >= self._outputs.config.vocab.audio).sum())
            if number < len(self._request.parts) - 1 and ends_sentence(self._request.parts[number].text):
                audio = np.concatenate([audio, np.zeros(int(SENTENCE_PAUSE * self._outputs.sample_rate), np.float32)])
        self._clock.mark_audio(audio)
        self._audio.append(audio)
        return audio

    def _text_so_far(self) -> str:
        text = ""
        for part in (*self._ended_texts, self._part_text()):
            # Some tokenizers begin a text with a space.
            text += " " + part.lstrip() if text and part and not text[-1].isspace() else part
        return text

    def _part_text(self) -> str:
        if self._request.task.outputs_text:
            return self._outputs.decode_text(self.part_tokens[TEXT_STREAM])
        parts = self._request.parts
        return parts[len(self._ended)].text if parts else ""

    def _segments(self) -> tuple[Segment, ...]:
        if self._request.task is not Task.A1T1:
            return ()
        texts = [*self._ended_texts, self._part_text()]
        return tuple(
            Segment(part.start / SAMPLE_RATE, (part.start + len(part.speech)) / SAMPLE_RATE, text.strip())
            for part, text in zip(self._request.parts, texts, strict=False)
            if part.speech is not None
        )

    def _push_frames(self) -> np.ndarray:
        assert self._stream is not None
        frames = self._outputs.frames(self.part_tokens)
        begun = self._clock.first_audio is not None
        if begun and len(frames) - self._num_frames < self.next_steps / 2 and not self._part_ended:
            # Other answers may have chunks of few steps, while the codec takes as long for two frames as for four.
            # Half of what is wanted will do: the chunk before this one was half as long.
            return np.zeros(0, np.float32)
        codes = fill_invalid_codes(frames, self._outputs.vocab)
        audio = self.add_audio(self._stream.push(codes[self._num_frames :], last=self._part_ended))
        self._num_frames = len(codes)
        if begun:
            self._grow_chunks()
        return audio

    def _grow_chunks(self) -> None:
        self.next_steps = min(self.next_steps * 2, MAX_STREAM_CHUNK_STEPS)

    def reply(self) -> Reply:
        """The whole answer, once it has finished."""
        assert self._finish is not None, "the answer has not finished"
        tokens = np.concatenate([*self._ended, self.part_tokens], axis=1)
        audio = np.concatenate(self._audio) if self._request.task.outputs_audio else None
        return Reply(
            task=self._request.task,
            text=self._text_so_far(),
            audio=audio,
            sample_rate=self._outputs.sample_rate,
            tokens=tokens,
            finish_reason=self._finish,
            num_invalid_codes=self._num_invalid_codes,
            timing=self._clock.timing(tokens.shape[1], audio, self._outputs.sample_rate),
            segments=self._segments(),
            question=None if self._request.transcription is None else self._question,
            cached_positions=self._cached,
        )


@dataclass
class _Clock:
    start: float = field(default_factory=time.perf_counter)
    first_token: float | None = None
    first_audio: float | None = None

    def _now(self) -> float:
        return time.perf_counter() - self.start

    def mark_tokens(self, tokens: np.ndarray) -> None:
        if self.first_token is None and tokens.shape[1]:
            self.first_token = self._now()

    def mark_audio(self, audio: np.ndarray | None) -> None:
        if self.first_audio is None and audio is not None and len(audio):
            self.first_audio = self._now()

    def timing(self, steps: int, audio: np.ndarray | None, rate: int) -> Timing:
        total = self._now()
        seconds = len(audio) / rate if audio is not None else 0.0
        return Timing(
            first_token=self.first_token or total,
            first_audio=self.first_audio,
            total=total,
            steps_per_second=steps / total,
            real_time_factor=total / seconds if seconds else None,
        )
