"""The record format is lossless and detects damage; folders of records are written atomically."""

from __future__ import annotations

import dataclasses
import io
import json
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import msgpack
import numpy as np
import pytest
import soundfile

from omni_jax.data.records import (
    INDEX,
    Conversation,
    Exchange,
    PastTurn,
    RecordCounts,
    Records,
    RecordWriter,
    from_bytes,
    has_conversations,
    serves,
    to_bytes,
)
from omni_jax.errors import RecordError
from omni_jax.tasks import Task


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def noise(seed: int, samples: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(-32768, 32768, samples).astype(np.int16)


FULL = Exchange(
    question_text="Wie heißt du?",
    question_audio=noise(0, 1234),
    answer_text="Ich heiße Omni. 🙂",
    answer_codes=np.random.default_rng(1).integers(0, 4096, (5, 7)),
    source="tests",
    voice="someone",
)


def assert_equal(found: Exchange, expected: Exchange) -> None:
    for field in dataclasses.fields(Exchange):
        a, b = getattr(found, field.name), getattr(expected, field.name)
        if isinstance(b, np.ndarray):
            np.testing.assert_array_equal(a, b)
        else:
            assert a == b


def packed(body: bytes, version: int = 1, magic: bytes = b"OMNI") -> bytes:
    return struct.pack("<4sBII", magic, version, len(body), zlib.crc32(body)) + body


def changed(**fields: object) -> bytes:
    """A well-formed record of FULL with other values in it."""
    return packed(msgpack.packb(msgpack.unpackb(to_bytes(FULL)[13:]) | fields))


def flac(samples: np.ndarray, rate: int = 16000, subtype: str = "PCM_16", kind: str = "FLAC") -> bytes:
    file = io.BytesIO()
    soundfile.write(file, samples, rate, format=kind, subtype=subtype)
    return file.getvalue()


# Round trip


@pytest.mark.parametrize(
    "exchange",
    [
        FULL,
        Exchange(),
        Exchange(question_text="only text", answer_text="here"),
        Exchange(question_audio=np.array([7], np.int16), question_text="one sample"),
        Exchange(question_audio=np.array([-32768, 32767] * 900, np.int16)),
        Exchange(answer_codes=np.array([[0, 4095, 1, 2, 3, 4, 5]], np.uint16)),
    ],
)
def test_record_round_trip(exchange: Exchange) -> None:
    back = from_bytes(to_bytes(exchange))
    assert_equal(back, exchange)
    assert back.question_audio is None or back.question_audio.dtype == np.int16
    assert back.answer_codes is None or back.answer_codes.dtype == np.int32


def test_from_bytes_without_audio() -> None:
    assert_equal(from_bytes(to_bytes(FULL), audio=False), dataclasses.replace(FULL, question_audio=None))


def test_record_is_compact() -> None:
    t = np.arange(16000 * 4) / 16000
    tone = (6000 * np.sin(2 * np.pi * 220 * t) * np.sin(3 * t)).astype(np.int16)
    codes = np.zeros((50, 7), int)
    size = len(to_bytes(Exchange(question_audio=tone, answer_codes=codes)))
    assert size < 0.6 * tone.nbytes + 14 * 50


def test_serves() -> None:
    audio, codes = np.zeros(9, np.int16), np.zeros((2, 7), int)
    assert serves(FULL) == set(Task)
    assert serves(Exchange()) == set()
    assert serves(Exchange(question_audio=audio, question_text="hi")) == {Task.A1T1}
    assert serves(Exchange(question_audio=audio, answer_text="hi")) == {Task.A1T2}
    assert serves(Exchange(question_text="hi", answer_text="ho")) == {Task.T1T2}
    assert serves(Exchange(answer_text="ho", answer_codes=codes)) == {Task.T1A1}
    assert serves(Exchange(question_text="hi", answer_text="ho", answer_codes=codes)) == {
        Task.T1A2,
        Task.T1T2,
        Task.T1A1,
    }
    assert serves(Exchange(question_text=" ", answer_text="\n", answer_codes=codes)) == set()


# Errors


@pytest.mark.parametrize(
    ("exchange", "message"),
    [
        (Exchange(question_text=3), "question_text: expected text, found int"),
        (Exchange(question_text="\ud800"), "expected text that UTF-8 can hold"),
        (Exchange(question_audio=np.zeros(4, np.float32)), "question_audio: expected int16 .* found float32"),
        (Exchange(question_audio=np.zeros((2, 4), np.int16)), r"question_audio: .* found int16 \[2, 4\]"),
        (Exchange(question_audio=np.zeros(0, np.int16)), r"question_audio: .* found int16 \[0\]"),
        (Exchange(answer_codes=np.zeros((3, 6), int)), r"answer_codes: .* found int64 \[3, 6\]"),
        (Exchange(answer_codes=np.zeros((0, 7), int)), r"answer_codes: .* found int64 \[0, 7\]"),
        (Exchange(answer_codes=np.zeros((3, 7))), "answer_codes: .* found float64"),
        (Exchange(answer_codes=np.full((3, 7), -1)), "answer_codes: .* found -1 to -1"),
        (Exchange(answer_codes=np.full((3, 7), 65536)), "answer_codes: .* found 65536"),
    ],
)
def test_to_bytes_refuses_wrong_fields(exchange: Exchange, message: str) -> None:
    with pytest.raises(RecordError, match=message):
        to_bytes(exchange)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "truncated: expected at least 13 bytes, found 0"),
        (to_bytes(FULL)[:-1], "truncated: expected .* bytes after the header"),
        (to_bytes(FULL) + b"\0", "too long"),
        (packed(b"", magic=b"RIFF"), "begins with b'OMNI', found b'RIFF'"),
        (packed(b"", version=2), "version: expected 1, found 2"),
        (packed(b"\xc1"), "expected a msgpack map"),
        (packed(msgpack.packb([1])), "expected a map of fields, found list"),
        (packed(msgpack.packb({"source": "x"})), "expected the fields .*, found source"),
        (changed(extra=1), "expected the fields .*, found .*extra"),
        (changed(voice=None), "voice: expected text, found NoneType"),
        (changed(answer_codes="text"), "answer_codes: expected bytes or nothing, found str"),
        (changed(answer_codes=b""), "answer_codes: expected frames of 7 codes, 14 bytes each, found 0 bytes"),
        (changed(answer_codes=bytes(15)), "answer_codes: .* found 15 bytes"),
        (changed(answer_codes=b"\xff" * 14), "answer_codes: expected codes below 4096, found 65535"),
        (changed(question_audio=b"junk"), "question_audio: expected FLAC, found 4 bytes"),
        (changed(question_audio=flac(noise(0, 99))[:80]), "question_audio: "),
        (changed(question_audio=flac(noise(0, 99), rate=8000)), "question_audio: .* 16000 Hz, found .*8000"),
        (changed(question_audio=flac(noise(0, 99), subtype="PCM_24")), "question_audio: .* found .*PCM_24"),
        (changed(question_audio=flac(noise(0, 98).reshape(-1, 2))), "question_audio: .* one channel"),
        (changed(question_audio=flac(noise(0, 99), kind="WAV")), "question_audio: .* found .*WAV"),
    ],
)
def test_from_bytes_refuses_malformed_records(data: bytes, message: str) -> None:
    with pytest.raises(RecordError, match=message):
        from_bytes(data)


def test_from_bytes_detects_flipped_bits_and_truncation() -> None:
    data = to_bytes(dataclasses.replace(FULL, question_audio=noise(3, 40)))
    for at in range(len(data)):
        with pytest.raises(RecordError):
            from_bytes(data[:at])
        flipped = bytearray(data)
        flipped[at] ^= 1 << at % 8
        with pytest.raises(RecordError):
            from_bytes(bytes(flipped))


def test_from_bytes_refuses_codes_of_a_larger_codebook() -> None:
    with pytest.raises(RecordError, match="expected codes below 64, found"):
        from_bytes(to_bytes(FULL), codebook_size=64)


# Folders


def numbered(n: int) -> Exchange:
    return Exchange(question_text=f"question {n}", answer_text="yes", source="odd" if n % 2 else "even")


def test_writer_and_records(tmp_path: Path) -> None:
    with RecordWriter(tmp_path / "a" / "b", shard_size=3) as writer:
        for n in range(7):
            writer.write(numbered(n))
        writer.write(FULL)
    assert names(writer.folder) == [
        "00000.array_record",
        "00001.array_record",
        "00002.array_record",
        INDEX,
    ]
    index = json.loads((writer.folder / INDEX).read_text())
    assert index == {
        "version": 1,
        "exchanges": 8,
        "conversations": 0,
        "question_hours": 0.0,
        "answer_frames": 5,
        "sources": {"even": 4, "odd": 3, "tests": 1},
        "tasks": {"A1A2": 1, "A1T2": 1, "A1T1": 1, "T1A2": 1, "T1T2": 8, "T1A1": 1},
        "shards": [{"file": f"0000{n}.array_record", "exchanges": k} for n, k in enumerate([3, 3, 2])],
    }
    records = Records(writer.folder)
    assert len(records) == 8
    assert [from_bytes(records[n]).question_text for n in range(7)] == [f"question {n}" for n in range(7)]
    assert_equal(from_bytes(records[7]), FULL)
    assert records.location(0) == f"{writer.folder / '00000.array_record'}, record 0"
    assert records.location(7) == f"{writer.folder / '00002.array_record'}, record 1"
    assert (records.count(Task.T1T2), records.count(Task.A1A2)) == (8, 1)


def test_writer_leaves_no_empty_shard(tmp_path: Path) -> None:
    with RecordWriter(tmp_path, shard_size=2) as writer:
        for n in range(4):
            writer.write(numbered(n))
    assert names(tmp_path) == ["00000.array_record", "00001.array_record", INDEX]


def test_writer_exception_leaves_complete_shards_only(tmp_path: Path) -> None:
    def write() -> None:
        with RecordWriter(tmp_path, shard_size=2) as writer:
            for n in range(3):
                writer.write(numbered(n))
            raise KeyError

    with pytest.raises(KeyError):
        write()
    assert names(tmp_path) == ["00000.array_record"]
    with pytest.raises(RecordError, match=r"found no index\.json"):
        Records(tmp_path)
    with pytest.raises(RecordError, match="without records, found some"):
        RecordWriter(tmp_path)


def test_killed_writer_leaves_temporary_files_only(tmp_path: Path) -> None:
    code = (
        "import os, sys\n"
        "from omni_jax.data.records import Exchange, RecordWriter\n"
        "writer = RecordWriter(sys.argv[1]).__enter__()\n"
        "for n in range(50): writer.write(Exchange(question_text='x' * 9999, answer_text='y'))\n"
        "os._exit(9)\n"
    )
    assert subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=False).returncode == 9
    assert names(tmp_path) == [".00000.array_record.part"]
    with RecordWriter(tmp_path) as writer:
        writer.write(numbered(0))
    assert names(tmp_path) == ["00000.array_record", INDEX]


def test_writer_goes_on_after_a_wrong_exchange(tmp_path: Path) -> None:
    with RecordWriter(tmp_path) as writer:
        writer.write(numbered(0))
        with pytest.raises(RecordError):
            writer.write(Exchange(answer_codes=np.zeros((2, 3), int)))
        writer.write(numbered(1))
    assert len(Records(tmp_path)) == 2


def test_records_refuses_other_folders(tmp_path: Path) -> None:
    with pytest.raises(RecordError, match=r"nowhere: .* found no such folder"):
        Records(tmp_path / "nowhere")
    file = tmp_path / "file"
    file.write_text("x")
    with pytest.raises(RecordError, match="expected a folder to write to"):
        RecordWriter(file)
    with RecordWriter(tmp_path / "empty"):
        pass
    with pytest.raises(RecordError, match="expected at least one exchange, found none"):
        Records(tmp_path / "empty")
    with RecordWriter(tmp_path / "a") as writer:
        writer.write(numbered(0))
    index = tmp_path / "a" / INDEX
    text = index.read_text()
    for wrong, message in (
        (text.replace('"version": 1', '"version": 2'), "version: expected 1, found 2"),
        ("{", "expected the index"),
        ("[]", "expected the index"),
        (text.replace('"T1T2"', '"T2T2"'), "expected the index"),
    ):
        index.write_text(wrong)
        with pytest.raises(RecordError, match=message):
            Records(tmp_path / "a")
    index.write_text(text)
    (tmp_path / "a" / "00000.array_record").unlink()
    with pytest.raises(RecordError, match=r"expected 1 shards, found 00000\.array_record missing"):
        Records(tmp_path / "a")


def test_record_counts_merge() -> None:
    counts, other = RecordCounts(), RecordCounts()
    counts.add(FULL, {Task.A1A2, Task.T1T2})
    other.add(numbered(1), {Task.T1T2})
    counts.merge(other)
    assert (counts.exchanges, counts.samples, counts.frames) == (2, 1234, 5)
    assert counts.sources == {"tests": 1, "odd": 1}
    assert counts.tasks == {"A1A2": 1, "T1T2": 2}


def test_from_bytes_refuses_flac_that_claims_more_than_it_has() -> None:
    """libsndfile would allocate 137 GB for the length that this header claims."""
    data = bytearray(flac(noise(0, 4000)))
    # The last 36 bits of the length in STREAMINFO, after four bytes of "fLaC", four of a header, and 13 others.
    data[21] |= 0x0F
    data[22:26] = b"\xff" * 4
    with pytest.raises(RecordError, match="question_audio: expected at most 57600000 samples, found 68719476735"):
        from_bytes(changed(question_audio=bytes(data)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"file": "../00000.array_record"},
            "expected a file of the folder and the number of its records, found '../00000",
        ),
        (
            {"exchanges": 10**12},
            "expected a file of the folder and the number of its records, found .* and 1000000000000",
        ),
        ({"exchanges": -1}, "expected a file of the folder and the number of its records, found .* and -1"),
        ({"exchanges": "many"}, "expected the index of a folder of records, found ValueError"),
    ],
)
def test_records_refuses_an_index_that_points_elsewhere(
    tmp_path: Path, change: dict[str, object], message: str
) -> None:
    with RecordWriter(tmp_path / "a") as writer:
        writer.write(numbered(0))
    with RecordWriter(tmp_path / "a" / "b") as writer:
        writer.write(numbered(0))
    index = json.loads((tmp_path / "a" / "b" / INDEX).read_text())
    index["shards"][0] |= change
    (tmp_path / "a" / "b" / INDEX).write_text(json.dumps(index))
    with pytest.raises(RecordError, match=message):
        Records(tmp_path / "a" / "b")


@pytest.mark.parametrize("text", ["[" * 10**6, '{"version": NaN}', '{"version": 1, "version": 1}', "1"])
def test_records_refuses_an_index_that_is_no_json_object(tmp_path: Path, text: str) -> None:
    (tmp_path / INDEX).write_text(text)
    with pytest.raises(RecordError, match=r"index\.json: expected the index of a folder of records, found"):
        Records(tmp_path)


# Conversations

TURN = dataclasses.replace(FULL, system="Be kind.", history=(PastTurn("ä?", "b", True), PastTurn("", "c")))


def test_turn_of_a_conversation_round_trip() -> None:
    assert_equal(from_bytes(to_bytes(TURN)), TURN)
    assert_equal(from_bytes(to_bytes(TURN), audio=False), dataclasses.replace(TURN, question_audio=None))
    alone = dataclasses.replace(TURN, system="", history=())
    assert to_bytes(alone) == to_bytes(FULL), "records of single exchanges stay as they were"
    assert b"conversation" not in to_bytes(FULL)


@pytest.mark.parametrize(
    "conversation", [3, {}, {"system": 3, "history": []}, {"system": "", "history": [["a"] * 4]}, {"system": "a"}]
)
def test_malformed_conversation_is_an_error(conversation: object) -> None:
    with pytest.raises(RecordError, match="conversation: expected"):
        from_bytes(changed(conversation=conversation))


@pytest.mark.parametrize("turn", [PastTurn(3), PastTurn("a", "b", 1)])
def test_malformed_turn_is_not_written(turn: PastTurn) -> None:
    with pytest.raises(RecordError, match="conversation: expected texts"):
        to_bytes(dataclasses.replace(FULL, history=(turn,)))


def text_exchange(number: int, **fields: object) -> Exchange:
    return Exchange(question_text=f"q{number}", answer_text=f"a{number}", **fields)


def test_conversation_of_text_is_one_record_with_all_answers() -> None:
    exchanges = tuple(text_exchange(n) for n in range(3))
    (record,) = Conversation(exchanges, "s").to_exchanges()
    assert_equal(record, dataclasses.replace(exchanges[2], system="s", history=record.history))
    assert record.history == (PastTurn("q0", "a0", True), PastTurn("q1", "a1", True))
    (chosen,) = Conversation(exchanges, trained=(False, True, False)).to_exchanges()
    assert (chosen.question_text, chosen.history) == ("q1", (PastTurn("q0", "a0"),))
    assert Conversation(exchanges, trained=(False, False, False)).to_exchanges() == []
    each = Conversation(exchanges).to_exchanges(every_turn=True)
    assert [record.question_text for record in each] == ["q0", "q1", "q2"]
    assert each[2].history == (PastTurn("q0", "a0"), PastTurn("q1", "a1"))


def test_conversation_of_speech_is_a_record_for_each_spoken_turn() -> None:
    """Every answer counts once: that of text before the spoken one in its record."""
    spoken = text_exchange(1, question_audio=np.zeros(9, np.int16))
    records = Conversation((text_exchange(0), spoken, text_exchange(2), text_exchange(3))).to_exchanges()
    assert [record.question_text for record in records] == ["q1", "q3"]
    assert records[0].history == (PastTurn("q0", "a0", True),)
    assert records[1].history == (PastTurn("q0", "a0"), PastTurn("q1", "a1"), PastTurn("q2", "a2", True))


def test_wrong_conversations_are_errors() -> None:
    with pytest.raises(RecordError, match="trained: expected 1 entries, found 2"):
        Conversation((FULL,), trained=(True, False)).to_exchanges()
    with pytest.raises(RecordError, match="exchange 1: expected no history of its own"):
        Conversation((FULL, TURN)).to_exchanges()


def test_index_counts_conversations(tmp_path: Path) -> None:
    assert not has_conversations(tmp_path)
    for name, exchanges in (("plain", [FULL]), ("talk", [FULL, TURN])):
        with RecordWriter(tmp_path / name) as writer:
            for exchange in exchanges:
                writer.write(exchange)
    assert [has_conversations(tmp_path / name) for name in ("plain", "talk")] == [False, True]
    assert Records(tmp_path / "talk").index["conversations"] == 1
    index = json.loads((tmp_path / "plain" / INDEX).read_text())
    del index["conversations"]
    (tmp_path / "plain" / INDEX).write_text(json.dumps(index))
    assert not has_conversations(tmp_path / "plain")
    assert len(Records(tmp_path / "plain")) == 1
