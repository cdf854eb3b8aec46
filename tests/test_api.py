"""`Omni`: every question and answer, arrays and files, whole and streamed, and what it refuses."""

from __future__ import annotations

import io
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import soundfile
from flax import nnx

import omni_jax
from omni_jax.api import Omni, Request
from omni_jax.checkpoint import tensors
from omni_jax.codec.snac import DecodeFn, Snac, make_decoder
from omni_jax.delay import fill_invalid_codes, undelay
from omni_jax.errors import AudioError, CheckpointError, ConfigError, UntrainedWarning
from omni_jax.inference.answer import Chunk, Reply
from omni_jax.inference.engine import PreparedRequest, Progress
from omni_jax.prompts import speech_positions, speech_prompt, text_prompt
from omni_jax.tasks import Task
from omni_jax.tokenizer import byte_tokenizer
from tests.inference.reference_decoder import ReferenceDecoder, random_model, small_config
from tests.model.randomized import randomized

pytestmark = pytest.mark.usefixtures("quickly_compiled")

CONFIG = small_config(text=260)
SEED, EOT = 3, 2.5
"""Chosen so that what `test_the_answers_differ_in_kind` asks for does happen."""
FRAME = 64
LONGEST = 20 * 320


@pytest.fixture(scope="module")
def codec() -> DecodeFn:
    return make_decoder(randomized(lambda: Snac(CONFIG.codec, rngs=nnx.Rngs(0))))


@pytest.fixture(scope="module")
def omni(codec: DecodeFn) -> Omni:
    return Omni(random_model(CONFIG, seed=SEED, eot=EOT, eoa=1.5), codec, byte_tokenizer())


@pytest.fixture(scope="module")
def slow(omni: Omni) -> ReferenceDecoder:
    model = random_model(CONFIG, seed=SEED, eot=EOT, eoa=1.5)
    return ReferenceDecoder(model, lambda sound: omni.programs.hear(omni.programs.weights, sound))


def recording(content: int = 0, samples: int = 3000) -> np.ndarray:
    return (0.1 * np.random.default_rng(content).normal(size=samples)).astype(np.float32)


def check(reply: Reply, codec: DecodeFn, expected: tuple[np.ndarray, str], task: Task) -> None:
    """Everything in a reply, derived from the streams that the slow decoder gives."""
    tokens, finish = expected
    np.testing.assert_array_equal(reply.tokens, tokens)
    assert reply.tokens.dtype == np.int32
    assert (reply.task, reply.finish_reason, reply.sample_rate) == (task, finish, 24000)
    text = tokens[7].tolist()
    text = text[: text.index(260)] if 260 in text else text
    as_bytes = "".join(alphabet()[token] for token in text if token < 256)
    assert reply.text == byte_tokenizer().decoder.decode([as_bytes] if as_bytes else [])
    assert 0 < reply.timing.first_token <= reply.timing.total
    assert reply.timing.steps_per_second == pytest.approx(tokens.shape[1] / reply.timing.total)
    if not task.outputs_audio:
        assert reply.audio is None
        assert (reply.tokens[:7] == 13).all()
        assert (reply.seconds, reply.num_invalid_codes, reply.timing.first_sound) == (0.0, 0, None)
        assert reply.timing.real_time_factor is None
        return
    frames = undelay(tokens[:7], omni_vocab())
    assert reply.audio is not None
    assert (reply.audio.dtype, reply.audio.shape) == (np.float32, (len(frames) * FRAME,))
    assert reply.num_invalid_codes == (frames >= 12).sum()
    assert reply.seconds == len(frames) * FRAME / 24000
    if len(frames):
        expected_audio = decoded(codec, fill_invalid_codes(frames, omni_vocab()))
        np.testing.assert_allclose(reply.audio, expected_audio, atol=1e-5, rtol=0)
        assert reply.timing.first_sound is not None
        assert reply.timing.first_token <= reply.timing.first_sound <= reply.timing.total
        assert reply.timing.real_time_factor == pytest.approx(reply.timing.total / reply.seconds)


def decoded(codec: DecodeFn, frames: np.ndarray) -> np.ndarray:
    """The sound of an answer's frames, decoded as a whole; always as one of 64, to compile once."""
    codes = np.zeros((1, 64, 7), np.int32)
    codes[0, : len(frames)] = frames
    return np.asarray(codec(codes, lengths=np.array([len(frames)], np.int32)))[0, : len(frames) * FRAME]


def alphabet() -> list[str]:
    vocab = byte_tokenizer().get_vocab()
    return sorted(vocab, key=vocab.__getitem__)


def omni_vocab() -> Any:
    from omni_jax.vocab import Vocab

    return Vocab(CONFIG.vocab)


def spoken(task: Task, sound: np.ndarray, **settings: Any) -> PreparedRequest:
    return PreparedRequest(speech_prompt(task, speech_positions(len(sound), 20), omni_vocab()), sound, **settings)


def decode_text(task: Task, text: str, **settings: Any) -> PreparedRequest:
    words = byte_tokenizer().pre_tokenizer.pre_tokenize_str(text)
    ids = [alphabet().index(c) for word, _ in words for c in word]
    return PreparedRequest(text_prompt(task, ids, omni_vocab()), **settings)


ANSWERS: dict[str, tuple[Task, Callable[[Omni], Reply], Callable[[], PreparedRequest]]] = {
    "reply": (
        Task.A1A2,
        lambda omni: omni.reply(recording(1), sample_rate=16000),
        lambda: spoken(Task.A1A2, recording(1)),
    ),
    "reply, sampled, one row": (
        Task.A1A2,
        lambda omni: omni.reply(recording(2), sample_rate=16000, temperature=0.9, seed=7, batch_parallel=False),
        lambda: spoken(Task.A1A2, recording(2), temperature=0.9, seed=7, batch_parallel=False),
    ),
    "reply to text": (
        Task.T1A2,
        lambda omni: omni.reply(text="Hello", top_k=3, temperature=0.5, enforce_delay=False),
        lambda: decode_text(Task.T1A2, "Hello", top_k=3, temperature=0.5, enforce_delay=False),
    ),
    "answer": (
        Task.A1T2,
        lambda omni: omni.answer(recording(3), sample_rate=16000, max_steps=9),
        lambda: spoken(Task.A1T2, recording(3), max_steps=9),
    ),
    "answer to text": (
        Task.T1T2,
        lambda omni: omni.answer(text="Why", top_p=0.9, temperature=1.0, seed=3),
        lambda: decode_text(Task.T1T2, "Why", top_p=0.9, temperature=1.0, seed=3),
    ),
    "transcribe": (
        Task.A1T1,
        lambda omni: omni.transcribe(recording(4), sample_rate=16000),
        lambda: spoken(Task.A1T1, recording(4)),
    ),
    "read aloud": (
        Task.T1A1,
        lambda omni: omni.read_aloud("Hi there", max_steps=30),
        lambda: decode_text(Task.T1A1, "Hi there", max_steps=30),
    ),
}


@pytest.mark.parametrize("name", ANSWERS)
def test_every_method_answers_as_the_slow_decoder_does(
    name: str, omni: Omni, slow: ReferenceDecoder, codec: DecodeFn
) -> None:
    task, ask, request = ANSWERS[name]
    check(ask(omni), codec, slow(request()), task)


def test_the_answers_differ_in_kind(slow: ReferenceDecoder) -> None:
    """Some end by themselves and some do not, some speak more than others, text ends before speech and after."""
    answers = {name: slow(request()) for name, (_, _, request) in ANSWERS.items()}
    assert {finish for _, finish in answers.values()} == {"stop", "length", "context"}
    frames = [len(undelay(tokens[:7], omni_vocab())) for tokens, _ in answers.values()]
    assert max(frames) > 16
    assert any((tokens[7] == 260).any() for tokens, _ in answers.values())


def test_batch_gives_what_each_would_get_alone(
    omni: Omni, slow: ReferenceDecoder, codec: DecodeFn, tmp_path: Path
) -> None:
    path = tmp_path / "question.wav"
    soundfile.write(path, recording(1), 16000, subtype="FLOAT")
    replies = omni.batch(
        [
            path,
            {"text": "Why", "task": "T1T2", "options": {"temperature": 1.0, "top_p": 0.9}},
            Request(recording(4), task=Task.A1T1, sample_rate=16000, options={"seed": 5}),
            Request(text="Hi there", task="T1A1"),
        ],
        seed=3,
        max_steps=30,
    )
    same: dict[str, Any] = {"seed": 3, "max_steps": 30}
    expected = [
        spoken(Task.A1A2, recording(1), **same),
        decode_text(Task.T1T2, "Why", temperature=1.0, top_p=0.9, **same),
        spoken(Task.A1T1, recording(4), max_steps=30, seed=5),
        decode_text(Task.T1A1, "Hi there", **same),
    ]
    for reply, request in zip(replies, expected, strict=True):
        check(reply, codec, slow(request), request.prompt.task)
    assert omni.batch([]) == []


def test_a_recording_may_come_in_any_form(omni: Omni, tmp_path: Path) -> None:
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
    ]
    first = forms[0]()
    assert len(first.prompt) == 3000 // 320 + 1 + 3
    for form in forms[1:]:
        other = form()
        np.testing.assert_array_equal(other.prompt.tokens, first.prompt.tokens)
        assert other.speech is not None
        np.testing.assert_array_equal(other.speech, first.speech)


def test_another_rate_is_resampled(omni: Omni) -> None:
    request = omni.prepare(Request(recording(0, 8000), sample_rate=48000))
    assert request.speech is not None
    assert abs(len(request.speech) - 8000 / 3) <= 1
    assert request.prompt.speech_positions == len(request.speech) // 320 + 1


@pytest.mark.parametrize("name", ["reply", "reply, sampled, one row", "answer to text", "read aloud"])
def test_a_stream_joined_is_the_whole_answer(name: str, omni: Omni, slow: ReferenceDecoder, codec: DecodeFn) -> None:
    task, ask, request = ANSWERS[name]
    kept: dict[str, Any] = {}
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
    parts = list(omni.stream(**arguments, **kept))
    assert [part.reply is not None for part in parts] == [False] * (len(parts) - 1) + [True]
    whole = parts[-1].reply
    assert whole is not None
    check(whole, codec, slow(request()), task)
    assert "".join(part.text for part in parts) == whole.text
    sound = np.concatenate([part.audio for part in parts])
    again = ask(omni)
    if task.outputs_audio:
        assert again.audio is not None
        np.testing.assert_allclose(sound, again.audio, atol=1e-5, rtol=0)
        assert sum(len(part.audio) > 0 for part in parts) > 1, "the sound comes in several parts"
    else:
        assert len(sound) == 0
        assert len(parts) > 2
    assert all(part.text or len(part.audio) or part.reply for part in parts), "no part is empty"


def test_a_stream_may_be_left(omni: Omni) -> None:
    stream = omni.stream(recording(1), sample_rate=16000)
    next(stream)
    stream.close()
    first = omni.reply(recording(1), sample_rate=16000)
    assert first.tokens.tobytes() == omni.reply(recording(1), sample_rate=16000).tokens.tobytes()


class Scripted:
    """An engine that says given tokens, so many at a time."""

    def __init__(self, tokens: np.ndarray, sizes: list[int], finish: str = "stop"):
        ends = np.cumsum([0, *sizes, max(tokens.shape[1] - sum(sizes), 0)]).clip(max=tokens.shape[1])
        self.parts = [tokens[:, a:b] for a, b in pairwise(ends)]
        self.finish = finish

    def submit(self, key: int, request: PreparedRequest) -> None:
        self.key = key

    @property
    def busy(self) -> bool:
        return bool(self.parts)

    def advance(self, steps: int = 0) -> list[Progress]:
        part = self.parts.pop(0)
        return [Progress(self.key, part, None if self.parts else self.finish)]


def says(omni: Omni, monkeypatch: pytest.MonkeyPatch, text: list[int], sizes: list[int]) -> list[Chunk]:
    tokens = np.full((8, len(text)), 13, np.int32)
    tokens[7] = text
    monkeypatch.setattr(omni, "_engine", lambda requests, slots: Scripted(tokens, sizes))
    return list(omni.stream(text="x", task="T1T2"))


def test_no_part_of_a_stream_holds_half_a_character(omni: Omni, monkeypatch: pytest.MonkeyPatch) -> None:
    text = "a é € 𝄞 ö日本"
    ids = byte_tokenizer().encode(text).ids
    assert len(ids) == len(text.encode())
    for sizes in ([1] * len(ids), [2] * (len(ids) // 2), [3] * (len(ids) // 3), [0, 4, 0, 1, 7]):
        parts = says(omni, monkeypatch, [*ids, 260], sizes)
        assert "".join(part.text for part in parts) == text
        assert not any("\ufffd" in part.text for part in parts)
        assert parts[-1].reply is not None
        assert parts[-1].reply.text == text


def test_a_stream_of_broken_characters_is_what_the_whole_text_is(omni: Omni, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model may say anything: bytes that are no character, and half of one at the end."""

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
        parts = says(omni, monkeypatch, ids(data), [1] * len(data))
        assert parts[-1].reply is not None
        assert "".join(part.text for part in parts) == parts[-1].reply.text
        assert parts[-1].reply.text == data.decode(errors="replace")


def high_byte(byte: int) -> int:
    """The token of a byte of 128 or more, from a character that it is part of."""
    for point in (*range(0x80, 0x800), *range(0x800, 0x10000, 64), *range(0x10000, 0x110000, 4096)):
        if 0xD800 <= point < 0xE000:
            continue
        data = chr(point).encode()
        if byte in data:
            return byte_tokenizer().encode(chr(point)).ids[data.index(byte)]
    # 0xc0, 0xc1, 0xf5... stand in no character: the alphabet orders them by the character they are shown as.
    shown = {chr(b): b for b in (*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100))}
    return next(i for i, c in enumerate(alphabet()) if shown.get(c) == byte)


def test_specials_are_no_text(omni: Omni, monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = byte_tokenizer().encode("ab").ids
    parts = says(omni, monkeypatch, [a, 264, 258, b, 260, a], [1, 1, 1, 1, 1])
    assert "".join(part.text for part in parts) == "ab"


def test_codes_that_are_none_are_played_as_the_code_before_and_counted(
    omni: Omni, codec: DecodeFn, monkeypatch: pytest.MonkeyPatch
) -> None:
    frames = np.arange(5 * 7).reshape(5, 7) % 12
    frames[2, 3] = 16
    frames[3, 3] = 13
    frames[0, 0] = 14
    from omni_jax.delay import delay

    audio = delay(frames, omni_vocab())
    tokens = np.concatenate([audio, np.full((1, 13), 261, np.int32)])
    tokens[7, 0] = 260
    monkeypatch.setattr(omni, "_engine", lambda requests, slots: Scripted(tokens, [4, 5]))
    repaired = frames.copy()
    repaired[2, 3] = repaired[3, 3] = repaired[1, 3]
    repaired[0, 0] = 0
    expected = decoded(codec, repaired)
    whole = omni.reply(text="x")
    assert whole.num_invalid_codes == 3
    assert whole.audio is not None
    np.testing.assert_allclose(whole.audio, expected, atol=1e-5, rtol=0)
    parts = list(omni.stream(text="x"))
    np.testing.assert_allclose(np.concatenate([part.audio for part in parts]), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("steps", [1, 7, 8, 9])
def test_an_answer_may_end_before_its_first_frame(omni: Omni, steps: int) -> None:
    """Layer 6 begins at step 7: eight steps for the first frame."""
    reply = omni.read_aloud("Hi there", max_steps=steps)
    assert reply.tokens.shape == (8, steps)
    assert reply.audio is not None
    assert len(reply.audio) == max(steps - 7, 0) * FRAME
    parts = list(omni.stream(text="Hi there", task="T1A1", max_steps=steps))
    assert sum(len(part.audio) for part in parts) == len(reply.audio)


def test_saving(omni: Omni, tmp_path: Path) -> None:
    reply = omni.read_aloud("Hi there", max_steps=30)
    reply.save(tmp_path / "answer.wav")
    audio, rate = soundfile.read(tmp_path / "answer.wav", dtype="float32")
    assert rate == 24000
    assert reply.audio is not None
    np.testing.assert_allclose(audio, reply.audio.clip(-1, 1), atol=1 / 32768, rtol=0)
    with pytest.raises(ValueError, match="T1T2 answers in text only"):
        omni.answer(text="Hi", max_steps=2).save(tmp_path / "none.wav")
    assert not (tmp_path / "none.wav").exists()


QUESTION = Path(omni_jax.__file__).parent / "assets" / "questions" / "name.wav"
SOUND = {"audio": recording(), "sample_rate": 16000}


@pytest.mark.parametrize(
    ("ask", "error", "says"),
    [
        ({}, ConfigError, "found neither"),
        ({**SOUND, "text": "Hi"}, ConfigError, "found both"),
        ({"text": ""}, ConfigError, "expected some text"),
        ({"text": "Hi", "task": "A1A2"}, ConfigError, "task A1A2: expected audio, found text"),
        ({**SOUND, "task": "T1T2"}, ConfigError, "task T1T2: expected text, found audio"),
        ({"text": "Hi", "task": "T2T2"}, ConfigError, "A1A2, A1T2, A1T1, T1A2, T1T2, T1A1, found 'T2T2'"),
        ({"text": "Hi", "tusk": "T1T2"}, ConfigError, "tusk"),
        ({"text": "Hi", "options": {"heat": 1}}, ConfigError, "heat"),
        ({"text": "Hi", "options": {"top_p": 2.0}}, ConfigError, r"top_p: .*found 2\.0"),
        ({"text": "Hi", "options": {"max_steps": 0}}, ConfigError, "max_steps: .*found 0"),
        ({"text": "Hi", "options": {"temperature": "hot"}}, ConfigError, "temperature: .*found 'hot'"),
        ({"text": "Hi", "options": {"seed": -1}}, ConfigError, "seed: .*found -1"),
        ({"text": "x" * 62}, ConfigError, "65 positions.*context of 64"),
        ({"audio": recording()}, ConfigError, "sample_rate"),
        ({"audio": recording(), "sample_rate": 0}, AudioError, "sample rate of at least 1000 Hz"),
        ({"audio": recording(0, LONGEST + 1), "sample_rate": 16000}, AudioError, "at most 0.40 s.*cut=True"),
        ({"audio": QUESTION}, AudioError, r"name\.wav: expected a recording of at most 0\.40 s, found 1\.06 s"),
        ({"audio": QUESTION, "sample_rate": 8000}, ConfigError, r"sample_rate: .*name\.wav says its own, found 8000"),
        ({"audio": object(), "sample_rate": 16000}, AudioError, "found"),
        ({"text": 7}, ConfigError, "text: expected a string, found int"),
        ({"text": "Hi \ud83d"}, ConfigError, "text: expected whole characters, found half of one at 3"),
        ({"text": "Hi", "options": None}, ConfigError, "options: expected names and values, found NoneType"),
        (7, ConfigError, "ask: expected an Ask, a dict of its fields or a path, found int"),
        ({"text": "Hi", "options": {"enforce_delay": "no"}}, ConfigError, "enforce_delay: .*found 'no'"),
        ({"audio": "nowhere.wav"}, AudioError, r"nowhere\.wav: .*no such file"),
        ({"audio": np.zeros(3000, np.float32), "sample_rate": 16000}, AudioError, "silence"),
    ],
)
def test_what_cannot_be_asked_is_refused_in_words(omni: Omni, ask: Any, error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=rf"^asks\[1\]: .*{says}"):
        omni.batch([{"text": "fine"}, ask])


def test_errors_come_from_every_door(omni: Omni) -> None:
    with pytest.raises(ConfigError, match="found neither"):
        omni.reply()
    with pytest.raises(ConfigError, match="found both"):
        omni.answer(recording(), text="Hi", sample_rate=16000)
    with pytest.raises(ConfigError, match="heat"):
        omni.read_aloud("Hi", heat=3)  # type: ignore[call-arg]
    with pytest.raises(ConfigError, match="seed"):
        omni.transcribe(recording(), sample_rate=16000, seed=-1)
    with pytest.raises(ConfigError, match="expected some text"):
        omni.stream(text="")  # at once, not when the first part is asked for


def test_speech_that_is_too_long_is_cut_only_when_asked(omni: Omni) -> None:
    long = recording(0, LONGEST + 5000)
    request = omni.prepare(Request(long, sample_rate=16000, cut=True))
    assert request.speech is not None
    np.testing.assert_array_equal(request.speech, long[:LONGEST])
    assert request.prompt.speech_positions == 20
    exact = omni.prepare(Request(long[:LONGEST], sample_rate=16000))
    assert exact.prompt.speech_positions == 20
    whole = omni.answer(long, sample_rate=16000, cut=True, max_steps=3)
    np.testing.assert_array_equal(whole.tokens, omni.answer(long[:LONGEST], sample_rate=16000, max_steps=3).tokens)


def test_a_text_may_fill_the_context(omni: Omni) -> None:
    reply = omni.answer(text="x" * 61)
    assert reply.tokens.shape == (8, 1)
    assert reply.finish_reason in ("context", "stop")


def test_a_tokenizer_that_does_not_fit_is_named(omni: Omni) -> None:
    wide = byte_tokenizer()
    wide.add_tokens(["<wide>"] + [f"<{i}>" for i in range(5)])
    other = Omni.__new__(Omni)
    other.__dict__.update(vars(omni))
    other.tokenizer = wide
    with pytest.raises(ConfigError, match=r"gives id 261; expected ids below .* 260"):
        other.prepare({"text": "<4>"})


def test_untrained_tiny_says_so_and_hears_two_seconds() -> None:
    with pytest.warns(UntrainedWarning, match="'tiny' is untrained") as warned:
        omni = Omni.load("tiny")
    assert warned[0].filename == __file__
    assert not omni.trained
    two_seconds = omni.prepare(Request(recording(0, 32000), sample_rate=16000))
    assert two_seconds.prompt.speech_positions == 100
    with pytest.raises(AudioError, match=r"at most 2\.00 s, found 2\.50 s"):
        omni.prepare(Request(recording(0, 40000), sample_rate=16000))
    reply = omni.answer(text="Hello", max_steps=4)
    assert reply.tokens.shape == (8, 4)
    assert reply.finish_reason in ("length", "stop")


def test_a_release_comes_before_a_preset_of_its_name(
    tiny_release: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`convert_weights.py import ... mini_omni` makes a folder called as a preset is."""
    monkeypatch.chdir(tiny_release.parent)
    assert tiny_release.name == "tiny"
    assert Omni.load("tiny").trained  # and no warning, which would be an error
    (tmp_path / "tiny" / "checkpoints").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match="a training run that has not finished"):
        Omni.load("tiny")
    (tmp_path / "tiny" / "checkpoints").rmdir()
    with pytest.warns(UntrainedWarning):
        assert not Omni.load("tiny").trained


@pytest.mark.slow
def test_the_real_shape_answers() -> None:
    with pytest.warns(UntrainedWarning):
        omni = Omni.untrained("mini_omni")
    spoken, decode_text = omni.reply(QUESTION, max_steps=12), omni.answer(QUESTION, max_steps=12)
    assert spoken.tokens.shape == decode_text.tokens.shape == (8, 12)
    # The second row of a batch-parallel answer is the answer in text alone.
    np.testing.assert_array_equal(spoken.tokens[7], decode_text.tokens[7])
    assert ((spoken.tokens[:7] >= 0) & (spoken.tokens[:7] < 4160)).all()
    for layer in range(7):
        assert (spoken.tokens[layer, : layer + 1] == 4097).all()
    assert spoken.audio is not None
    assert spoken.audio.shape == (5 * 2048,)
    assert 1e-4 < np.abs(spoken.audio).max() <= 1
    assert decode_text.audio is None


def test_untrained_by_its_own_name_blames_the_caller(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensors, "init_model", lambda *args, **kwargs: random_model(CONFIG))
    with pytest.warns(UntrainedWarning) as warned:
        assert Omni.untrained("tiny").trained is False
    assert warned[0].filename == __file__


def test_wrong_names_are_refused_before_anything_is_loaded() -> None:
    with pytest.raises(ConfigError, match="jax or torch, found 'mp3'"):
        Omni.load("tiny", codec="mp3")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="jax or torch, found 'mp3'"):
        Omni.load("nowhere", codec="mp3")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"mini_omni.*found 'huge'"):
        Omni.untrained("huge")
    with pytest.raises(ValueError, match="nowhere"):
        Omni.load("nowhere")
