"""`Omni`: every task, arrays and files, whole and streamed, errors, loading and saving."""

from __future__ import annotations

import io
import shutil
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import huggingface_hub
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import soundfile
from flax import nnx

import omni_jax
from omni_jax import sharding
from omni_jax.api import Omni, Request
from omni_jax.checkpoint import tensors
from omni_jax.checkpoint.release import MODEL, open_release
from omni_jax.codec.snac import DecodeFn, Snac, make_decoder
from omni_jax.config.model import TextConfig
from omni_jax.delay import delay, fill_invalid_codes, undelay
from omni_jax.errors import AudioError, AudioTooLongError, CheckpointError, ConfigError, UntrainedWarning
from omni_jax.inference.answer import SENTENCE_PAUSE, Chunk, Reply
from omni_jax.inference.engine import Engine, PreparedRequest, Progress
from omni_jax.inference.generation import GenerationConfig
from omni_jax.prompts import speech_positions, speech_prompt, text_prompt
from omni_jax.tasks import Task
from omni_jax.tokenizer import byte_tokenizer
from omni_jax.vocab import Vocab
from tests.inference.reference_decoder import ReferenceDecoder, random_model, small_config
from tests.model.randomized import randomized
from tests.models import compiles_nothing

pytestmark = pytest.mark.usefixtures("quickly_compiled")

CONFIG = small_config(text=260)
SEED, EOT = 3, 2.5
"""Chosen so that the answers differ as `test_reference_answers_differ_in_kind` requires."""
FRAME = 64
VOCAB = Vocab(CONFIG.vocab)
MAX_SAMPLES = 20 * 320


@pytest.fixture(scope="module")
def codec() -> DecodeFn:
    return make_decoder(randomized(lambda: Snac(CONFIG.codec, rngs=nnx.Rngs(0))))


@pytest.fixture(scope="module")
def omni(codec: DecodeFn) -> Omni:
    return Omni(random_model(CONFIG, seed=SEED, eot=EOT, eoa=1.5), codec, byte_tokenizer())


@pytest.fixture(scope="module")
def reference(omni: Omni) -> ReferenceDecoder:
    model = random_model(CONFIG, seed=SEED, eot=EOT, eoa=1.5)
    return ReferenceDecoder(model, omni.runner.encode_audio)


def recording(content: int = 0, samples: int = 3000) -> np.ndarray:
    return (0.1 * np.random.default_rng(content).normal(size=samples)).astype(np.float32)


def check(reply: Reply, codec: DecodeFn, expected: tuple[np.ndarray, str], task: Task) -> None:
    """Everything in a reply, derived from the streams of the reference decoder."""
    tokens, finish = expected
    np.testing.assert_array_equal(reply.tokens, tokens)
    assert reply.tokens.dtype == np.int32
    assert (reply.task, reply.finish_reason, reply.sample_rate) == (task, finish, 24000)
    text = tokens[7].tolist()
    text = text[: text.index(260)] if 260 in text else text
    as_bytes = "".join(alphabet()[token] for token in text if token < 256)
    if task is not Task.T1A1:
        assert reply.text == byte_tokenizer().decoder.decode([as_bytes] if as_bytes else [])
    assert 0 < reply.timing.first_token <= reply.timing.total
    assert reply.timing.steps_per_second == pytest.approx(tokens.shape[1] / reply.timing.total)
    if not task.outputs_audio:
        assert reply.audio is None
        assert (reply.tokens[:7] == 13).all()
        assert (reply.seconds, reply.num_invalid_codes, reply.timing.first_audio) == (0.0, 0, None)
        assert reply.timing.real_time_factor is None
        return
    frames = undelay(tokens[:7], VOCAB)
    assert reply.audio is not None
    assert (reply.audio.dtype, reply.audio.shape) == (np.float32, (len(frames) * FRAME,))
    assert reply.num_invalid_codes == (frames >= 12).sum()
    assert reply.seconds == len(frames) * FRAME / 24000
    if len(frames):
        expected_audio = decoded(codec, fill_invalid_codes(frames, VOCAB))
        np.testing.assert_allclose(reply.audio, expected_audio, atol=1e-5, rtol=0)
        assert reply.timing.first_audio is not None
        assert reply.timing.first_token <= reply.timing.first_audio <= reply.timing.total
        assert reply.timing.real_time_factor == pytest.approx(reply.timing.total / reply.seconds)


def decoded(codec: DecodeFn, frames: np.ndarray) -> np.ndarray:
    """The audio of an answer's frames, decoded as a whole; padded to 64 frames, to compile once."""
    codes = np.zeros((1, 64, 7), np.int32)
    codes[0, : len(frames)] = frames
    return np.asarray(codec(codes, lengths=np.array([len(frames)], np.int32)))[0, : len(frames) * FRAME]


def alphabet() -> list[str]:
    vocab = byte_tokenizer().get_vocab()
    return sorted(vocab, key=vocab.__getitem__)


def speech_request(task: Task, audio: np.ndarray, **options: Any) -> PreparedRequest:
    prompt = speech_prompt(task, speech_positions(len(audio), 20), VOCAB)
    return PreparedRequest.of(prompt, audio, GenerationConfig(**options))


def text_request(task: Task, text: str, **options: Any) -> PreparedRequest:
    words = byte_tokenizer().pre_tokenizer.pre_tokenize_str(text)
    ids = [alphabet().index(c) for word, _ in words for c in word]
    return PreparedRequest.of(text_prompt(task, ids, VOCAB), config=GenerationConfig(**options))


ANSWERS: dict[str, tuple[Task, Callable[[Omni], Reply], Callable[[], PreparedRequest]]] = {
    "reply": (
        Task.A1A2,
        lambda omni: omni.reply(recording(1), sample_rate=16000),
        lambda: speech_request(Task.A1A2, recording(1)),
    ),
    "reply, sampled, one row": (
        Task.A1A2,
        lambda omni: omni.reply(recording(2), sample_rate=16000, temperature=0.9, seed=7, batch_parallel=False),
        lambda: speech_request(Task.A1A2, recording(2), temperature=0.9, seed=7, batch_parallel=False),
    ),
    "reply to text": (
        Task.T1A2,
        lambda omni: omni.reply(text="Hello", top_k=3, temperature=0.5, enforce_delay=False),
        lambda: text_request(Task.T1A2, "Hello", top_k=3, temperature=0.5, enforce_delay=False),
    ),
    "answer": (
        Task.A1T2,
        lambda omni: omni.answer(recording(3), sample_rate=16000, max_steps=9),
        lambda: speech_request(Task.A1T2, recording(3), max_steps=9),
    ),
    "answer to text": (
        Task.T1T2,
        lambda omni: omni.answer(text="Why", top_p=0.9, temperature=1.0, seed=3),
        lambda: text_request(Task.T1T2, "Why", top_p=0.9, temperature=1.0, seed=3),
    ),
    "transcribe": (
        Task.A1T1,
        lambda omni: omni.transcribe(recording(4), sample_rate=16000),
        lambda: speech_request(Task.A1T1, recording(4)),
    ),
    "read aloud": (
        Task.T1A1,
        lambda omni: omni.read_aloud("Hi there", max_steps=30),
        lambda: text_request(Task.T1A1, "Hi there", max_steps=30),
    ),
}


@pytest.mark.parametrize("name", ANSWERS)
def test_every_method_gives_tokens_of_reference_decoder(
    name: str, omni: Omni, reference: ReferenceDecoder, codec: DecodeFn
) -> None:
    task, ask, request = ANSWERS[name]
    check(ask(omni), codec, reference(request()), task)


def test_reference_answers_differ_in_kind(reference: ReferenceDecoder) -> None:
    """All finish reasons occur, some answers have more audio than others, text ends before audio and after."""
    answers = {name: reference(request()) for name, (_, _, request) in ANSWERS.items()}
    assert {finish for _, finish in answers.values()} == {"stop", "length", "context"}
    frames = [len(undelay(tokens[:7], VOCAB)) for tokens, _ in answers.values()]
    assert max(frames) > 16
    assert any((tokens[7] == 260).any() for tokens, _ in answers.values())


def test_batch_gives_tokens_of_single_requests(
    omni: Omni, reference: ReferenceDecoder, codec: DecodeFn, tmp_path: Path
) -> None:
    path = tmp_path / "question.wav"
    soundfile.write(path, recording(1), 16000, subtype="FLOAT")
    replies = omni.batch(
        [
            path,
            {"text": "Why", "task": "T1T2", "config": {"temperature": 1.0, "top_p": 0.9}},
            Request(recording(4), task=Task.A1T1, sample_rate=16000, config=GenerationConfig(seed=5)),
            Request(text="Hi there", task="T1A1"),
        ],
        config=GenerationConfig(seed=3),
        max_steps=30,
    )
    expected = [
        speech_request(Task.A1A2, recording(1), seed=3, max_steps=30),
        text_request(Task.T1T2, "Why", temperature=1.0, top_p=0.9, max_steps=30),
        speech_request(Task.A1T1, recording(4), seed=5, max_steps=30),
        text_request(Task.T1A1, "Hi there", seed=3, max_steps=30),
    ]
    for reply, request in zip(replies, expected, strict=True):
        check(reply, codec, reference(request), request.prompt.task)
    assert omni.batch([]) == []


def test_memory_of_companion_rows_is_taken_only_where_there_are_any(omni: Omni) -> None:
    text, speech = Request(text="Hi", task="T1T2"), Request(recording(1), sample_rate=16000)

    def pages(*requests: Request, slots: int) -> int:
        engine = omni._engine([omni.prepare(request, max_steps=5) for request in requests], slots)
        assert engine.columns == 1
        return engine.pages.total

    assert pages(text, slots=1) == pages(speech, slots=1) == 2
    assert pages(text, text, text, slots=4) == 4
    assert pages(speech, text, text, slots=4) == 5
    # Three companion rows take the memory of four, so that few sizes are compiled.
    assert pages(speech, speech, speech, slots=4) == 8


def test_prepare_accepts_files_arrays_and_paths(omni: Omni, tmp_path: Path) -> None:
    pcm = (recording(5) * 32768).astype(np.int16)
    soundfile.write(tmp_path / "q.wav", pcm, 16000, subtype="PCM_16")
    data = io.BytesIO((tmp_path / "q.wav").read_bytes())
    options: Any = {"max_steps": 3}
    forms: list[Callable[[], PreparedRequest]] = [
        lambda: omni.prepare(Request(pcm, sample_rate=16000), **options),
        lambda: omni.prepare(Request(pcm[:, None].repeat(2, axis=1), sample_rate=16000), **options),
        lambda: omni.prepare(Request(tmp_path / "q.wav"), **options),
        lambda: omni.prepare(str(tmp_path / "q.wav"), **options),
        lambda: omni.prepare({"audio": data}, **options),
        lambda: omni.prepare(Request(jnp.asarray(pcm), sample_rate=16000), **options),
        lambda: omni.prepare(Request((tmp_path / "q.wav").read_bytes()), **options),
        lambda: omni.prepare(Request((16000, pcm)), **options),
        lambda: omni.prepare(Request((pcm, np.int64(16000))), **options),
        lambda: omni.prepare(Request(pcm[None].repeat(2, axis=0), sample_rate=16000), **options),
    ]
    first = forms[0]()
    assert len(first.prompt) == 3000 // 320 + 1 + 3
    for form in forms[1:]:
        other = form()
        np.testing.assert_array_equal(other.prompt.tokens, first.prompt.tokens)
        assert other.parts[0].speech is not None
        np.testing.assert_array_equal(other.parts[0].speech, first.parts[0].speech)


def test_prepare_resamples(omni: Omni) -> None:
    request = omni.prepare(Request(recording(0, 8000), sample_rate=48000))
    assert request.parts[0].speech is not None
    assert abs(len(request.parts[0].speech) - 8000 / 3) <= 1
    assert request.prompt.speech_positions == len(request.parts[0].speech) // 320 + 1


@pytest.mark.parametrize("name", ["reply", "reply, sampled, one row", "answer to text", "read aloud"])
def test_stream_equals_whole_answer(name: str, omni: Omni, reference: ReferenceDecoder, codec: DecodeFn) -> None:
    task, ask, request = ANSWERS[name]
    arguments: dict[str, Any] = {
        "reply": {"audio": recording(1), "sample_rate": 16000},
        "reply, sampled, one row": {
            "audio": recording(2),
            "sample_rate": 16000,
            "temperature": 0.9,
            "seed": 7,
            "batch_parallel": False,
        },
        "answer to text": {"text": "Why", "task": "T1T2", "top_p": 0.9, "temperature": 1.0, "seed": 3},
        "read aloud": {"text": "Hi there", "task": Task.T1A1, "max_steps": 30},
    }[name]
    chunks = list(omni.stream(**arguments))
    assert [chunk.reply is not None for chunk in chunks] == [False] * (len(chunks) - 1) + [True]
    assert all(chunk.sample_rate == omni.sample_rate == 24000 for chunk in chunks)
    whole = chunks[-1].reply
    assert whole is not None
    check(whole, codec, reference(request()), task)
    assert "".join(chunk.text for chunk in chunks) == whole.text
    audio = np.concatenate([chunk.audio for chunk in chunks])
    again = ask(omni)
    if task.outputs_audio:
        assert again.audio is not None
        np.testing.assert_allclose(audio, again.audio, atol=1e-5, rtol=0)
        assert sum(len(chunk.audio) > 0 for chunk in chunks) > 1, "the audio comes in several chunks"
    else:
        assert len(audio) == 0
        assert len(chunks) > 2
    assert all(chunk.text or len(chunk.audio) or chunk.reply for chunk in chunks), "no chunk is empty"


def test_stream_can_be_closed_early(omni: Omni) -> None:
    stream: Any = omni.stream(recording(1), sample_rate=16000)
    next(stream)
    stream.close()
    first = omni.reply(recording(1), sample_rate=16000)
    assert first.tokens.tobytes() == omni.reply(recording(1), sample_rate=16000).tokens.tobytes()


class ScriptedEngine:
    """An engine that outputs given tokens, so many at a time."""

    def __init__(self, tokens: np.ndarray, sizes: list[int], finish: str = "stop"):
        ends = np.cumsum([0, *sizes, max(tokens.shape[1] - sum(sizes), 0)]).clip(max=tokens.shape[1])
        self.chunks = [tokens[:, a:b] for a, b in pairwise(ends)]
        self.finish = finish

    def submit(self, key: int, request: PreparedRequest) -> None:
        self.key = key

    @property
    def busy(self) -> bool:
        return bool(self.chunks)

    def advance(self, steps: int = 0) -> list[Progress]:
        tokens = self.chunks.pop(0)
        return [Progress(self.key, tokens, None if self.chunks else self.finish)]


def stream_text(omni: Omni, monkeypatch: pytest.MonkeyPatch, text: list[int], sizes: list[int]) -> list[Chunk]:
    tokens = np.full((8, len(text)), 13, np.int32)
    tokens[7] = text
    monkeypatch.setattr(omni, "_engine", lambda requests, max_batch_size: ScriptedEngine(tokens, sizes))
    return list(omni.stream(text="x", task="T1T2"))


def test_stream_chunks_hold_whole_characters(omni: Omni, monkeypatch: pytest.MonkeyPatch) -> None:
    text = "a é € 𝄞 ö日本"
    ids = byte_tokenizer().encode(text).ids
    assert len(ids) == len(text.encode())
    for sizes in ([1] * len(ids), [2] * (len(ids) // 2), [3] * (len(ids) // 3), [0, 4, 0, 1, 7]):
        chunks = stream_text(omni, monkeypatch, [*ids, 260], sizes)
        assert "".join(chunk.text for chunk in chunks) == text
        assert not any("\ufffd" in chunk.text for chunk in chunks)
        assert chunks[-1].reply is not None
        assert chunks[-1].reply.text == text


def test_stream_with_invalid_utf8_equals_whole_text(omni: Omni, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model may output any bytes: some that are no character, and half of one at the end."""

    def ids(data: bytes) -> list[int]:
        one_each = [byte_tokenizer().encode(chr(b)).ids if b < 128 else None for b in data]
        return [found[0] if found else high_byte(b) for found, b in zip(one_each, data, strict=True)]

    for data in (
        b"\xe2\x82A",
        b"\xff\xfeok\xe2",
        b"\xf0\x9d\x84",
        b"\x80\x80\xe2\x82\xac\xf0\x9d",
        b"a\xe2\xe2\x82\xac",
    ):
        chunks = stream_text(omni, monkeypatch, ids(data), [1] * len(data))
        assert chunks[-1].reply is not None
        assert "".join(chunk.text for chunk in chunks) == chunks[-1].reply.text
        assert chunks[-1].reply.text == data.decode(errors="replace")


def high_byte(byte: int) -> int:
    """The token of a byte of 128 or more, from a character that it is part of."""
    for point in (*range(0x80, 0x800), *range(0x800, 0x10000, 64), *range(0x10000, 0x110000, 4096)):
        if 0xD800 <= point < 0xE000:
            continue
        data = chr(point).encode()
        if byte in data:
            return byte_tokenizer().encode(chr(point)).ids[data.index(byte)]
    # 0xc0, 0xc1, 0xf5... are in no character: the alphabet orders them by the character they are shown as.
    shown = {chr(b): b for b in (*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100))}
    return next(i for i, c in enumerate(alphabet()) if shown.get(c) == byte)


def test_special_tokens_are_not_decoded_to_text(omni: Omni, monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = byte_tokenizer().encode("ab").ids
    chunks = stream_text(omni, monkeypatch, [a, 264, 258, b, 260, a], [1, 1, 1, 1, 1])
    assert "".join(chunk.text for chunk in chunks) == "ab"


def test_invalid_codes_are_filled_and_counted(omni: Omni, codec: DecodeFn, monkeypatch: pytest.MonkeyPatch) -> None:
    frames = np.arange(5 * 7).reshape(5, 7) % 12
    frames[2, 3] = 16
    frames[3, 3] = 13
    frames[0, 0] = 14
    audio = delay(frames, VOCAB)
    tokens = np.concatenate([audio, np.full((1, 13), 261, np.int32)])
    tokens[7, 0] = 260
    monkeypatch.setattr(omni, "_engine", lambda requests, max_batch_size: ScriptedEngine(tokens, [4, 5]))
    filled = frames.copy()
    filled[2, 3] = filled[3, 3] = filled[1, 3]
    filled[0, 0] = 0
    expected = decoded(codec, filled)
    whole = omni.reply(text="x")
    assert whole.num_invalid_codes == 3
    assert whole.audio is not None
    np.testing.assert_allclose(whole.audio, expected, atol=1e-5, rtol=0)
    chunks = list(omni.stream(text="x"))
    np.testing.assert_allclose(np.concatenate([chunk.audio for chunk in chunks]), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("steps", [1, 7, 8, 9])
def test_answer_may_end_before_its_first_frame(omni: Omni, steps: int) -> None:
    """Codebook 6 begins at step 7: eight steps for the first frame."""
    reply = omni.read_aloud("Hi there", max_steps=steps)
    assert reply.tokens.shape == (8, steps)
    assert reply.audio is not None
    assert len(reply.audio) == max(steps - 7, 0) * FRAME
    chunks = list(omni.stream(text="Hi there", task="T1A1", max_steps=steps))
    assert sum(len(chunk.audio) for chunk in chunks) == len(reply.audio)


def test_reply_save(omni: Omni, tmp_path: Path) -> None:
    reply = omni.read_aloud("Hi there", max_steps=30)
    reply.save(tmp_path / "answer.wav")
    audio, rate = soundfile.read(tmp_path / "answer.wav", dtype="float32")
    assert rate == 24000
    assert reply.audio is not None
    np.testing.assert_allclose(audio, reply.audio.clip(-1, 1), atol=1 / 32768, rtol=0)
    with pytest.raises(ConfigError, match="T1T2 outputs text only"):
        omni.answer(text="Hi", max_steps=2).save(tmp_path / "none.wav")
    assert not (tmp_path / "none.wav").exists()


QUESTION = Path(omni_jax.__file__).parent / "assets" / "questions" / "name.wav"
AUDIO = {"audio": recording(), "sample_rate": 16000}


@pytest.mark.parametrize(
    ("invalid", "error", "message"),
    [
        ({}, ConfigError, "found neither"),
        ({**AUDIO, "text": "Hi"}, ConfigError, "found both"),
        ({"text": ""}, ConfigError, "expected some text"),
        ({"text": "Hi", "task": "A1A2"}, ConfigError, "task A1A2: expected audio, found text"),
        ({**AUDIO, "task": "T1T2"}, ConfigError, "task T1T2: expected text, found audio"),
        ({"text": "Hi", "task": "T2T2"}, ConfigError, "A1A2, A1T2, A1T1, T1A2, T1T2, T1A1, found 'T2T2'"),
        ({"text": "Hi", "tusk": "T1T2"}, ConfigError, "tusk"),
        ({"text": "Hi", "config": {"heat": 1}}, ConfigError, "heat"),
        ({"text": "Hi", "config": {"top_p": 2.0}}, ConfigError, r"top_p: .*found 2\.0"),
        ({"text": "Hi", "config": {"max_steps": 0}}, ConfigError, "max_steps: .*found 0"),
        ({"text": "Hi", "config": {"temperature": "hot"}}, ConfigError, "temperature: .*found 'hot'"),
        ({"text": "Hi", "config": {"seed": -1}}, ConfigError, "seed: .*found -1"),
        ({"text": "x" * 62}, ConfigError, "65 positions.*context of 64"),
        ({"audio": recording()}, ConfigError, "sample_rate"),
        ({"audio": recording(), "sample_rate": 0}, AudioError, "sample rate of 1000 to 1000000 Hz"),
        ({"audio": recording(0, MAX_SAMPLES + 1), "sample_rate": 16000}, AudioTooLongError, "at most 0.40 s.*truncate"),
        ({"audio": QUESTION}, AudioTooLongError, r"name\.wav: expected a recording of at most 0\.40 s, found 1\.06 s"),
        ({"audio": QUESTION, "sample_rate": 8000}, ConfigError, r"sample_rate: .*name\.wav has its own, found 8000"),
        ({"audio": object(), "sample_rate": 16000}, AudioError, "found"),
        ({"audio": (16000, recording()), "sample_rate": 8000}, ConfigError, "has its own, found 8000"),
        ({"audio": (recording(), recording())}, ConfigError, r"a tuple of a rate and an array, found \(ndarray, nd"),
        ({"text": 7}, ConfigError, "text: expected a string, found int"),
        ({"text": " "}, ConfigError, "text: expected some text with a letter or a digit, found ' '"),
        (
            {"text": "!!!", "task": "T1A1"},
            ConfigError,
            "text: expected some text with a letter or a digit, found '!!!'",
        ),
        ({"text": "Hi \ud83d"}, ConfigError, "text: expected whole characters, found half of one at 3"),
        (
            {"text": "Hi", "config": []},
            ConfigError,
            "config: expected a GenerationConfig or a dict of options, found list",
        ),
        (7, ConfigError, "request: expected a Request, a dict of its fields or a path, found int"),
        ({"text": "Hi", "config": {"enforce_delay": "no"}}, ConfigError, "enforce_delay: .*found 'no'"),
        ({"audio": "nowhere.wav"}, AudioError, r"nowhere\.wav: .*no such file"),
        ({"audio": np.zeros(3000, np.float32), "sample_rate": 16000}, AudioError, "silence"),
    ],
)
def test_batch_names_the_invalid_request(omni: Omni, invalid: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=rf"^inputs\[1\]: .*{message}"):
        omni.batch([{"text": "fine"}, invalid])


def test_every_method_validates_its_input(omni: Omni) -> None:
    with pytest.raises(ConfigError, match="found neither"):
        omni.reply()
    with pytest.raises(ConfigError, match="found both"):
        omni.answer(recording(), text="Hi", sample_rate=16000)
    with pytest.raises(ConfigError, match="heat"):
        omni.read_aloud("Hi", heat=3)
    with pytest.raises(ConfigError, match="seed"):
        omni.transcribe(recording(), sample_rate=16000, seed=-1)
    with pytest.raises(ConfigError, match="expected some text"):
        omni.stream(text="")  # at once, not when the first chunk is read


def test_text_is_normalized_for_every_task(omni: Omni) -> None:
    for task in (Task.T1A2, Task.T1T2, Task.T1A1):
        plain, typographic = (omni.prepare({"text": text, "task": task}) for text in ("It's so", " It’s\r\n\u200bso "))  # noqa: RUF001
        np.testing.assert_array_equal(typographic.prompt.tokens, plain.prompt.tokens)
        np.testing.assert_array_equal(plain.prompt.tokens, text_request(task, "It's so").prompt.tokens)


@pytest.fixture(scope="module")
def reader(codec: DecodeFn) -> Omni:
    """Reads three words at once."""
    config = replace(CONFIG, text=TextConfig(max_words=3))
    return Omni(random_model(config, seed=SEED, eot=EOT, eoa=3.0), codec, byte_tokenizer())


@pytest.mark.parametrize("count", [1, 2, 8])
def test_read_aloud_speaks_sentence_by_sentence(reader: Omni, count: int) -> None:
    """Each as it is spoken alone, with pauses between them; streamed and whole are the same."""
    sentences = ["Hi there.", "Is it five?", "No, six,", "I did."]
    text = " ".join(sentences[index % 4] for index in range(count))
    options = {"max_steps": 400}
    alone = [reader.read_aloud(sentences[index % 4], **options) for index in range(count)]
    whole = reader.read_aloud(text, **options)
    assert whole.text == text
    np.testing.assert_array_equal(whole.tokens, np.concatenate([reply.tokens for reply in alone], axis=1))
    assert whole.num_invalid_codes == sum(reply.num_invalid_codes for reply in alone)
    assert whole.finish_reason == next((r.finish_reason for r in alone if r.finish_reason != "stop"), "stop")
    pause = np.zeros(int(SENTENCE_PAUSE * 24000), np.float32)
    expected: list[np.ndarray] = []
    for index, reply in enumerate(alone):
        assert reply.audio is not None
        expected += [reply.audio, *([pause] if index + 1 < count and not reply.text.endswith(",") else [])]
    assert whole.audio is not None
    np.testing.assert_allclose(whole.audio, np.concatenate(expected), atol=1e-5, rtol=0)
    chunks = list(reader.stream(text=text, task="T1A1", **options))
    np.testing.assert_allclose(np.concatenate([chunk.audio for chunk in chunks]), whole.audio, atol=1e-5, rtol=0)
    assert "".join(chunk.text for chunk in chunks) == whole.text
    assert chunks[0].text == alone[0].text
    assert chunks[-1].reply is not None
    np.testing.assert_array_equal(chunks[-1].reply.tokens, whole.tokens)


def test_read_aloud_max_steps_counts_all_sentences(reader: Omni) -> None:
    first = reader.read_aloud("Hi there.").tokens.shape[1]
    reply = reader.read_aloud("Hi there. Hi there.", max_steps=first + 2)
    assert (reply.tokens.shape[1], reply.finish_reason) == (first + 2, "length")
    reply = reader.read_aloud("Hi there. Hi there.", max_steps=first)
    assert (reply.tokens.shape[1], reply.finish_reason, reply.text) == (first, "length", "Hi there.")


def test_read_aloud_divides_long_clause(reader: Omni) -> None:
    request = reader.prepare({"text": "Hi. This is too long.", "task": "T1A1"})
    assert [part.text for part in request.parts] == ["Hi.", "This is", "too long."]
    # A question is one input.
    assert len(reader.prepare({"text": "Hi. Hi there.", "task": "T1T2"}).prompt) == len("Hi. Hi there.") + 3


def test_truncate(omni: Omni) -> None:
    long = recording(0, MAX_SAMPLES + 5000)
    request = omni.prepare(Request(long, sample_rate=16000, truncate=True))
    assert request.parts[0].speech is not None
    np.testing.assert_array_equal(request.parts[0].speech, long[:MAX_SAMPLES])
    assert request.prompt.speech_positions == 20
    exact = omni.prepare(Request(long[:MAX_SAMPLES], sample_rate=16000))
    assert exact.prompt.speech_positions == 20
    whole = omni.answer(long, sample_rate=16000, truncate=True, max_steps=3)
    np.testing.assert_array_equal(whole.tokens, omni.answer(long[:MAX_SAMPLES], sample_rate=16000, max_steps=3).tokens)


def test_text_may_fill_the_context(omni: Omni) -> None:
    reply = omni.answer(text="x" * 61)
    assert reply.tokens.shape == (8, 1)
    assert reply.finish_reason in ("context", "stop")


def test_prepare_refuses_tokenizer_larger_than_vocabulary(omni: Omni) -> None:
    wide = byte_tokenizer()
    wide.add_tokens(["<wide>"] + [f"<{i}>" for i in range(5)])
    other = Omni.__new__(Omni)
    other.__dict__.update(vars(omni))
    other.outputs = replace(omni.outputs, tokenizer=wide)
    with pytest.raises(ConfigError, match=r"gives id 261; expected ids below .* 260"):
        other.prepare({"text": "<4>"})


def test_from_pretrained_warns_for_untrained_preset() -> None:
    with pytest.warns(UntrainedWarning, match="'tiny' is untrained") as warned:
        omni = Omni.from_pretrained("tiny")
    assert warned[0].filename == __file__
    assert not omni.trained
    two_seconds = omni.prepare(Request(recording(0, 32000), sample_rate=16000))
    assert two_seconds.prompt.speech_positions == 100
    with pytest.raises(AudioError, match=r"at most 2\.00 s, found 2\.50 s"):
        omni.prepare(Request(recording(0, 40000), sample_rate=16000))
    reply = omni.answer(text="Hello", max_steps=4)
    assert reply.tokens.shape == (8, 4)
    assert reply.finish_reason in ("length", "stop")


def test_from_pretrained_prefers_folder_to_preset(
    tiny_release: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`convert_weights.py import ... mini_omni` makes a folder called as a preset is."""
    monkeypatch.chdir(tiny_release.parent)
    assert tiny_release.name == "tiny"
    assert Omni.from_pretrained("tiny").trained  # and no warning, which would be an error
    (tmp_path / "tiny" / "checkpoints").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match="a training run that has not finished"):
        Omni.from_pretrained("tiny")
    (tmp_path / "tiny" / "checkpoints").rmdir()
    with pytest.warns(UntrainedWarning):
        assert not Omni.from_pretrained("tiny").trained


@pytest.mark.nightly
def test_mini_omni_preset_answers() -> None:
    with pytest.warns(UntrainedWarning):
        omni = Omni.untrained("mini_omni")
    with_audio, text_only = omni.reply(QUESTION, max_steps=12), omni.answer(QUESTION, max_steps=12)
    assert with_audio.tokens.shape == text_only.tokens.shape == (8, 12)
    # The companion row of a batch-parallel answer is the answer in text alone.
    np.testing.assert_array_equal(with_audio.tokens[7], text_only.tokens[7])
    assert ((with_audio.tokens[:7] >= 0) & (with_audio.tokens[:7] < 4160)).all()
    for codebook in range(7):
        assert (with_audio.tokens[codebook, : codebook + 1] == 4097).all()
    assert with_audio.audio is not None
    assert with_audio.audio.shape == (5 * 2048,)
    assert 1e-4 < np.abs(with_audio.audio).max() <= 1
    assert text_only.audio is None


def test_untrained_warning_points_to_the_caller(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensors, "init_model", lambda *args, **kwargs: random_model(CONFIG))
    with pytest.warns(UntrainedWarning) as warned:
        assert Omni.untrained("tiny").trained is False
    assert warned[0].filename == __file__


def test_from_pretrained_refuses_unknown_names() -> None:
    with pytest.raises(ConfigError, match="jax or torch, found 'mp3'"):
        Omni.from_pretrained("tiny", codec="mp3")
    with pytest.raises(ConfigError, match="jax or torch, found 'mp3'"):
        Omni.from_pretrained("nowhere", codec="mp3")
    with pytest.raises(ConfigError, match=r"mini_omni.*found 'huge'"):
        Omni.untrained("huge")
    with pytest.raises(ValueError, match="nowhere"):
        Omni.from_pretrained("nowhere")


@pytest.mark.parametrize(
    ("devices", "message"),
    [(8, "trunk.num_heads, 4, found 8"), (4, "trunk.num_kv_heads, 2, found 4")],
)
def test_heads_that_the_devices_do_not_divide_are_refused(tiny_release: Path, devices: int, message: str) -> None:
    mesh = sharding.make_mesh(tensor=devices)
    with pytest.raises(ConfigError, match=f"tensor: expected a divisor of {message}"):
        Omni.untrained("tiny", mesh=mesh)
    with pytest.raises(ConfigError, match=f"tensor: expected a divisor of {message}"):
        Omni.from_pretrained(tiny_release, mesh=mesh)


def test_generate_takes_task_config_and_options(omni: Omni) -> None:
    config = GenerationConfig(max_steps=9, temperature=0.9, seed=3)
    expected = omni.answer(text="Why", max_steps=9, temperature=0.9, seed=4)
    reply = omni.generate({"text": "Why"}, task="T1T2", config=config, seed=4)
    assert reply.task is Task.T1T2
    np.testing.assert_array_equal(reply.tokens, expected.tokens)
    same = omni.generate(Request(text="Why", task="T1T2", config=config.replace(seed=4)))
    np.testing.assert_array_equal(same.tokens, expected.tokens)
    with pytest.raises(ConfigError, match="task T1T2: expected text, found audio"):
        omni.generate(QUESTION, task="T1T2")


def test_reply_chunk_and_omni_print_short(omni: Omni) -> None:
    last = list(omni.stream(text="Hi there", task="T1A1", max_steps=30))[-1]
    reply = last.reply
    assert reply is not None
    steps = reply.tokens.shape[1]
    assert (
        repr(reply)
        == f"<Reply T1A1 'Hi there', {reply.seconds:.2f} s of audio, {reply.finish_reason} after {steps} steps>"
    )
    assert repr(last) == f"<Chunk '', {len(last.audio) / 24000:.2f} s of audio, last>"
    text_only = omni.answer(text="Hi", max_steps=2)
    steps = text_only.tokens.shape[1]
    assert repr(text_only) == f"<Reply T1T2 {text_only.text!r}, {text_only.finish_reason} after {steps} steps>"
    assert repr(omni) == "<Omni, trunk of 2 layers x 32, 0.4 s in, 24000 Hz out>"


def assert_first_question_compiles_nothing(omni: Omni, caplog: pytest.LogCaptureFixture) -> None:
    """After `Engine.warm_up`, which compiles a small part of all programs."""
    engine = Engine(omni.runner, 1, omni.config.trunk.max_position)
    engine.warm_up()
    before = omni.runner.jitted.prefill._cache_size(), omni.runner.jitted.decode_chunk._cache_size()
    assert before == (1, 2)
    with compiles_nothing(caplog):
        engine.submit(0, omni.prepare({"audio": recording(0, MAX_SAMPLES), "sample_rate": 16000}))
        assert list(engine.run())[-1].finish
    assert len(list(engine.warm_up_rest())) == 7


@pytest.mark.parametrize("mask_padding", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_warm_up_compiles_everything_for_streams(
    codec: DecodeFn, caplog: pytest.LogCaptureFixture, mask_padding: bool
) -> None:
    config = small_config(text=260, max_position=24)
    config = replace(config, audio_encoder=replace(config.audio_encoder, mask_padding=mask_padding))
    omni = Omni(random_model(config, seed=SEED), codec, byte_tokenizer())
    if not mask_padding:
        assert_first_question_compiles_nothing(omni, caplog)
    omni.warm_up()
    with compiles_nothing(caplog):
        for length in (1, 9, 20):
            assert list(omni.stream(text="a" * length, temperature=0.5))
        for samples in (400, 2000, 3000, MAX_SAMPLES):
            assert list(omni.stream(recording(0, samples), sample_rate=16000))


def test_short_windows_encode_short_recordings_in_a_part_of_the_window(
    tiny_release: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    full, short = (Omni.from_pretrained(tiny_release, short_windows=value) for value in (False, True))
    positions = full.config.audio_encoder.max_position
    assert (full.config.audio_encoder.windows, short.config.audio_encoder.windows[::2]) == (
        (positions,),
        (positions // 4, positions),
    )
    with pytest.warns(UntrainedWarning):
        assert Omni.untrained("tiny", short_windows=True).config.audio_encoder.short_windows
    seen = []
    for omni in (full, short):
        with monkeypatch.context() as patch:
            encode = omni.runner.encode_audio
            counted = lambda audio, encode=encode: (seen.append(audio.shape[1]), encode(audio))[1]  # noqa: E731
            patch.setattr(omni.runner, "encode_audio", counted)
            omni.answer(recording(1)[:400], sample_rate=16000, max_steps=2)
    assert seen == [320 * positions, 320 * (positions // 4)]


def test_save_pretrained_round_trip(tiny_release: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_release, tmp_path / "imported")
    (folder / "model_config.yaml").write_text("# as it came\n")
    omni = Omni.from_pretrained(folder)
    omni.save_pretrained(tmp_path / "saved")
    before, after = open_release(folder), open_release(tmp_path / "saved")
    assert (tmp_path / "saved" / "model_config.yaml").read_text() == "# as it came\n"
    assert before.config == after.config
    assert before.tokenizer().to_str() == after.tokenizer().to_str()
    tensors, saved = before.inspect(), after.inspect()
    assert tensors.keys() == saved.keys()
    for name, tensor in tensors.items():
        assert saved[name].dtype == tensor.dtype, name
        np.testing.assert_array_equal(saved[name].read(), tensor.read(), err_msg=name)
    same = Omni.from_pretrained(tmp_path / "saved")
    expected = omni.reply(recording(1), sample_rate=16000, max_steps=20)
    np.testing.assert_array_equal(same.reply(recording(1), sample_rate=16000, max_steps=20).tokens, expected.tokens)
    with pytest.raises(CheckpointError, match="saved"):
        omni.save_pretrained(tmp_path / "saved")


def test_save_pretrained_int8_is_smaller(tiny_release: Path, tmp_path: Path) -> None:
    omni = Omni.from_pretrained(tiny_release)
    omni.save_pretrained(tmp_path / "saved", int8=True)
    sizes = [(folder / MODEL).stat().st_size for folder in (tiny_release, tmp_path / "saved")]
    assert sizes[1] < sizes[0] / 2
    assert Omni.from_pretrained(tmp_path / "saved").answer(text="Hi", max_steps=2).tokens.shape == (8, 2)


def test_save_pretrained_needs_a_release_in_full_precision(omni: Omni, tiny_release: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="expected a model loaded from a release"):
        omni.save_pretrained(tmp_path / "parts")
    with pytest.raises(CheckpointError, match="found one loaded with int8"):
        Omni.from_pretrained(tiny_release, int8=True).save_pretrained(tmp_path / "int8")


def test_from_pretrained_dtype(tiny_release: Path) -> None:
    for dtype in (jnp.float32, jnp.bfloat16):
        omni = Omni.from_pretrained(tiny_release, dtype=dtype)
        assert {leaf.dtype for leaf in jax.tree.leaves(omni.runner.weights)} == {np.dtype(dtype)}
        assert omni.model.dtype == dtype
    assert omni.answer(text="Hi", max_steps=2).tokens.shape == (8, 2)


def test_from_pretrained_passes_revision_and_cache_dir_to_hub(
    tiny_release: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple[str, dict[str, Any]]] = []

    def download(source: str, **options: Any) -> str:
        calls.append((source, options))
        return str(tiny_release)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert Omni.from_pretrained("owner/name", revision="v1", cache_dir=tmp_path).trained
    ((source, options),) = calls
    assert source == "owner/name"
    assert (options["revision"], options["cache_dir"]) == ("v1", tmp_path)


def test_model_is_the_module_over_the_same_weights(omni: Omni) -> None:
    request = text_request(Task.T1T2, "Why", max_steps=1)
    tokens = jnp.asarray(request.prompt.tokens)[None]
    positions = jnp.arange(tokens.shape[2])[None]
    text_hidden, _, _ = omni.model(tokens, positions)
    first = int(omni.model.text_logits(text_hidden[:, -1]).argmax())
    assert first == omni.answer(text="Why", max_steps=1).tokens[7, 0]
    assert omni.model is omni.model
