"""Items of a Realtime conversation, and the buffer that turns are found in, without a server."""

from __future__ import annotations

import numpy as np
import pytest

from omni_jax.serve import realtime_conversation
from omni_jax.serve.errors import RequestRefusedError
from omni_jax.serve.realtime_beta import from_beta
from omni_jax.serve.realtime_conversation import Conversation, Item, Part, PlaybackClock
from omni_jax.serve.realtime_input import InputBuffer
from omni_jax.serve.realtime_schema import InputConfig, Session, TurnDetection, update


def spoken(text: str, seconds: float, **fields: object) -> Item:
    part = Part("output_audio", text, bytearray(int(seconds * 48_000)), seconds=seconds)
    for name, value in fields.items():
        setattr(part, name, value)
    return Item("assistant", [part])


@pytest.mark.parametrize(
    ("cut", "kept"),
    [(None, "one two three"), (2.0, "one two three"), (1.3, "one two"), (1.0, "one"), (0.3, ""), (0.0, "")],
)
def test_kept_text_ends_with_a_word_that_was_spoken(cut: float | None, kept: str) -> None:
    item = spoken("one two three", 2.0, cut_seconds=cut)
    assert item.text == kept
    assert item.render()["content"][0]["transcript"] == kept


def test_kept_text_of_an_answer_that_was_not_decoded_to_its_end() -> None:
    """Its text is ahead of its audio."""
    text = "one two three four five six seven eight"
    for cut in (0.5, None):
        whole, part = (spoken(text, 0.5, cut_seconds=cut, complete=complete) for complete in (True, False))
        assert (whole.text, part.text) == (text, "one two")
    assert spoken(text, 0.0, complete=False).text == ""


def test_conversation_drops_the_oldest_audio_and_then_the_oldest_items(monkeypatch: pytest.MonkeyPatch) -> None:
    conversation = Conversation(110_000)
    items = [spoken("text", 0.5) for _ in range(6)]
    for item in items:
        conversation.add(item)
    assert [len(item.parts[0].audio) > 0 for item in items] == [False, False, True, True, True, True]
    monkeypatch.setattr(realtime_conversation, "MAX_ITEMS", 4)
    conversation.add(spoken("text", 0.5))
    assert len(conversation) == 4
    assert next(iter(conversation)) is items[3]


def test_conversation_counts_empty_parts_and_wide_characters() -> None:
    conversation = Conversation(1 << 20)
    for _ in range(100):
        conversation.add(Item("user", [Part("input_text", "a") for _ in range(16)]))
    assert sum(len(item.parts) for item in conversation) <= 1024
    assert Item("user", [Part("input_text", "\U0001f600" * 1000)]).num_bytes > 4000


def test_conversation_refuses_a_second_item_with_an_id() -> None:
    conversation = Conversation(1000)
    conversation.add(Item("user", [], "a"))
    with pytest.raises(RequestRefusedError, match=r"item\.id"):
        conversation.add(Item("user", [], "a"))


def test_playback_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Audio is played as it comes: not before, and not while there is none."""
    now = 100.0
    monkeypatch.setattr(realtime_conversation.time, "monotonic", lambda: now)
    clock = PlaybackClock()
    assert (clock.played_ms, clock.remaining) == (0, 0)
    clock.send(1.0)
    now += 0.25
    assert (clock.played_ms, clock.remaining) == (250, 0.75)
    now += 5
    assert (clock.played_ms, clock.remaining) == (1000, 0)
    clock.send(1.0)
    clock.send(1.0)
    now += 0.5
    assert (clock.played_ms, clock.remaining) == (1500, 1.5)


def test_input_buffer_takes_samples_by_time() -> None:
    buffer = InputBuffer(InputConfig(turn_detection=None))
    samples = np.arange(24_000, dtype=np.int16)
    data = samples.tobytes()
    for start in range(0, len(data), 333):
        for piece in buffer.slices(data[start : start + 333]):
            assert buffer.push(piece) == []
    assert (buffer.start, buffer.end) == (0, 1)
    assert buffer.take(0.25, 0.5) == samples[6000:12_000].tobytes()
    assert (buffer.start, buffer.seconds) == (0.5, 0.5)
    buffer.push(b"\1")
    # Half a sample is none.
    assert buffer.take_all() == samples[12_000:].tobytes()
    assert (buffer.start, buffer.seconds) == (1.0, 0)


def test_input_buffer_keeps_little_while_nothing_is_said() -> None:
    buffer = InputBuffer(InputConfig(turn_detection=TurnDetection(prefix_padding_ms=300)))
    for _ in range(100):
        assert buffer.push(bytes(4800)) == []
    assert buffer.end == pytest.approx(10)
    assert buffer.seconds <= 1.4


def test_input_buffer_discards_samples_of_another_format() -> None:
    buffer = InputBuffer(InputConfig(turn_detection=None))
    buffer.push(bytes(4800))
    buffer.configure(update_input({"input_audio_format": "g711_ulaw", "turn_detection": None}))
    assert (buffer.start, buffer.seconds) == (0.1, 0)
    buffer.push(bytes(800))
    assert buffer.end == pytest.approx(0.2)


def update_input(patch: dict[str, object]) -> InputConfig:
    return update(Session(model="m"), from_beta(patch), Session, "session.").audio.input


def test_update_keeps_what_is_absent_and_resets_with_null() -> None:
    session = Session(model="m")
    session = update(session, {"audio": {"input": {"transcription": {"model": "w"}}}}, Session, "session.")
    session = update(session, {"audio": {"output": {"voice": "echo"}}, "instructions": None}, Session, "session.")
    assert session.audio.input.transcription is not None
    assert (session.audio.output.voice, session.audio.input.turn_detection) == ("echo", TurnDetection())
    session = update(session, {"audio": {"input": {"turn_detection": None, "transcription": None}}}, Session, "")
    assert (session.audio.input.transcription, session.audio.input.turn_detection) == (None, None)


def test_from_beta_leaves_the_fields_of_ga() -> None:
    fields = {
        "voice": "echo",
        "modalities": ["audio", "text"],
        "input_audio_format": "mp3",
        "audio": {"output": {"speed": 1}},
    }
    assert from_beta(fields) == {
        "audio": {"output": {"speed": 1, "voice": "echo"}, "input": {"format": {"type": "mp3"}}},
        "output_modalities": ["audio"],
    }
    assert fields["audio"] == {"output": {"speed": 1}}
