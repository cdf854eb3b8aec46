"""Sources read small files in the layouts that the corpora are published in."""

from __future__ import annotations

import io
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import soundfile

from omni_jax.audio import io as audio_io
from omni_jax.data import sources
from omni_jax.data.readers import byte_ranges
from omni_jax.data.records import PastTurn
from omni_jax.data.sources import (
    Manifest,
    PendingExchange,
    ReadSpeech,
    RejectedRow,
    Source,
    SourceShard,
    TextQA,
    VoiceAssistant,
    parse_codes,
)
from omni_jax.errors import AudioTooLongError, ConfigError


def tone(seconds: float, rate: int, format: str = "WAV") -> bytes:
    file = io.BytesIO()
    sound = 0.3 * np.sin(np.arange(int(seconds * rate)) / 20)
    soundfile.write(file, sound, rate, format=format, subtype="PCM_16")
    return file.getvalue()


def read(source: Source) -> tuple[list[PendingExchange], list[RejectedRow]]:
    """Every row of every shard."""
    pending, rejected = [], []
    shards = source.shards()
    assert len({shard.name for shard in shards}) == len(shards)
    for shard in shards:
        for _, load in source.rows(shard):
            try:
                pending.append(load())
            except RejectedRow as row:
                rejected.append(row)
    return pending, rejected


def voice_assistant_row(**changes: Any) -> dict[str, Any]:
    row = {
        "split_name": "qa_assistant_v1_7k",
        "index": "12",
        "round": "1",
        "question": "What is your name?",
        "question_audio": {"bytes": tone(0.5, 22_050), "path": "q.wav"},
        "answer": "Omni.",
        "answer_snac": "# 1 2 3 4 5 6 7 # 8 9 10 11 12 13 4095",
    }
    return row | changes


def voice_assistant(folder: Path, rows: list[dict[str, Any]], **options: Any) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), folder / "train-00000-of-00325.parquet", **options)


def test_voice_assistant(tmp_path: Path) -> None:
    rows = [
        voice_assistant_row(),
        voice_assistant_row(index="13", round="2"),
        voice_assistant_row(split_name="identity"),
    ]
    voice_assistant(tmp_path, rows, row_group_size=2)
    assert [shard.part for shard in VoiceAssistant(tmp_path).shards()] == [(0,), (1,)]
    pending, rejected = read(VoiceAssistant(tmp_path))
    assert [row.reason for row in rejected] == ["persona"]
    exchange = pending[0].exchange
    assert (exchange.question_text, exchange.answer_text) == ("What is your name?", "Omni.")
    assert exchange.source == "voice_assistant_400k qa_assistant_v1_7k"
    assert exchange.answer_codes is not None
    assert exchange.answer_codes.tolist() == [[1, 2, 3, 4, 5, 6, 7], [8, 9, 10, 11, 12, 13, 4095]]
    assert exchange.question_audio is not None
    expected = audio_io.to_pcm16(audio_io.read_audio(io.BytesIO(tone(0.5, 22_050))))
    np.testing.assert_array_equal(exchange.question_audio, expected)
    assert len(read(VoiceAssistant(tmp_path, keep_persona=True))[0]) == 3


def test_voice_assistant_without_the_columns_that_are_not_read(tmp_path: Path) -> None:
    row = voice_assistant_row()
    for name in ("split_name", "index", "round"):
        del row[name]
    row["answer_snac"] = [1, 2, 3, 4, 5, 6, 7]
    pq.write_table(pa.Table.from_pylist([row]), tmp_path / "a.parquet")
    ((pending,), rejected) = read(VoiceAssistant(tmp_path))
    assert not rejected
    assert pending.exchange.source == "voice_assistant_400k"
    assert pending.exchange.answer_codes is not None
    assert pending.exchange.answer_codes.tolist() == [[1, 2, 3, 4, 5, 6, 7]]


FRAMES = [[1, 2, 3, 4, 5, 6, 7], [8, 9, 10, 11, 12, 13, 4095]]


@pytest.mark.parametrize(
    "value",
    [
        "# 1 2 3 4 5 6 7 # 8 9 10 11 12 13 4095",
        "1 2 3 4 5 6 7 8 9 10 11 12 13 4095",
        "1, 2,3,4,5,6,7, 8,9,10,11,12,13,4095",
        FRAMES,
        [*FRAMES[0], *FRAMES[1]],
        [str(code) for frame in FRAMES for code in frame],
    ],
)
def test_parse_codes_takes_lists_and_text(value: Any) -> None:
    codes = parse_codes(value, 4096)
    assert codes.dtype == np.int32
    assert codes.tolist() == FRAMES


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ([], "answer without codes"),
        (7, "answer without codes"),
        ([1, 2, 3], "malformed codes"),
        ([[1, 2, 3, 4, 5, 6, 7], [1]], "malformed codes"),
        ([[1] * 14], "malformed codes"),
        ([0.5] * 7, "malformed codes"),
        (["a"] * 7, "malformed codes"),
        ([None] * 7, "malformed codes"),
        ([10**30] * 7, "malformed codes"),
        ("1 2 x 4 5 6 7", "malformed codes"),
        ([-1] * 7, "code out of range"),
        ([4096] * 7, "code out of range"),
    ],
)
def test_parse_codes_rejects(value: Any, reason: str) -> None:
    with pytest.raises(RejectedRow) as found:
        parse_codes(value, 4096)
    assert found.value.reason == reason


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"answer_snac": ""}, "answer without codes"),
        ({"answer_snac": None}, "answer without codes"),
        ({"answer_snac": "# 1 2 3 4 5 6"}, "malformed codes"),
        ({"answer_snac": "# 1 2 3 4 5 6 7 8"}, "malformed codes"),
        ({"answer_snac": "1 2 3 4 5 6"}, "malformed codes"),
        ({"answer_snac": "# 1 2 3 4 5 6 -7"}, "malformed codes"),
        ({"answer_snac": "# 1 2 3 4 5 6 7 #"}, "malformed codes"),
        ({"answer_snac": "# 1 2 3 4 5 6 4096"}, "code out of range"),
        ({"answer_snac": "# 1 2 3 4 5 6 99999999999"}, "code out of range"),
        ({"answer_snac": "# 1 2 3 4 5 6 99999999999999999999"}, "malformed codes"),
        ({"question": "  "}, "question is empty"),
        ({"answer": None}, "answer is empty"),
        ({"question_audio": None}, "question without audio"),
        ({"question_audio": {"bytes": b"", "path": ""}}, "question without audio"),
        ({"question_audio": {"bytes": b"RIFF junk", "path": ""}}, "recording unusable"),
        ({"question_audio": {"bytes": tone(0.5, 22_050, "FLAC")[:-2000], "path": ""}}, "recording unusable"),
        ({"question_audio": {"bytes": tone(15.1, 22_050), "path": ""}}, "recording too long"),
    ],
)
def test_voice_assistant_rejects_rows(tmp_path: Path, change: dict[str, Any], reason: str) -> None:
    voice_assistant(tmp_path, [voice_assistant_row(), voice_assistant_row(**change)])
    pending, rejected = read(VoiceAssistant(tmp_path))
    assert len(pending) == 1
    assert [row.reason for row in rejected] == [reason]


def test_voice_assistant_refuses_other_files(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="expected files that end in"):
        VoiceAssistant(tmp_path).shards()
    pq.write_table(pa.table({"question": ["a"]}), tmp_path / "a.parquet")
    with pytest.raises(ConfigError, match=r"expected the columns .* found none named"):
        VoiceAssistant(tmp_path).shards()
    (tmp_path / "a.parquet").write_bytes(b"junk")
    with pytest.raises(ConfigError, match="expected a parquet file"):
        VoiceAssistant(tmp_path).shards()


def put(path: Path, content: bytes | str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())


def librispeech(folder: Path) -> None:
    put(folder / "dev-clean/84/121123/84-121123-0000.flac", tone(0.4, 16_000, "FLAC"))
    put(folder / "dev-clean/84/121123/84-121123-0001.flac", tone(0.3, 16_000, "FLAC"))
    put(folder / "dev-clean/84/121123/84-121123.trans.txt", "84-121123-0000 GO DO YOU HEAR\n84-121123-0001 AND I SAY\n")


def libritts(folder: Path) -> None:
    put(folder / "dev-clean/84/121123/84_121123_000007_000001.wav", tone(0.4, 24_000))
    put(folder / "dev-clean/84/121123/84_121123_000007_000001.normalized.txt", "Go! Do you hear?")
    put(folder / "dev-clean/84/121123/84_121123_000007_000001.original.txt", "Go! do you hear?")
    put(folder / "dev-clean/84/121123/84_121123_000008_000000.wav", tone(0.3, 24_000))
    put(folder / "dev-clean/84/121123/84_121123_000008_000000.normalized.txt", "And I say.")


def vctk(folder: Path) -> None:
    for number, text in (("001", "Go! Do you hear?"), ("002", "And I say.")):
        put(folder / f"wav48_silence_trimmed/p225/p225_{number}_mic1.flac", tone(0.4, 48_000, "FLAC"))
        put(folder / f"wav48_silence_trimmed/p225/p225_{number}_mic2.flac", tone(0.4, 48_000, "FLAC"))
        put(folder / f"txt/p225/p225_{number}.txt", f"{text}\n")


def mls(folder: Path) -> None:
    for number in (7, 8):
        put(folder / f"train/audio/84/121/84_121_{number:06d}.flac", tone(0.4, 16_000, "FLAC"))
    put(folder / "train/transcripts.txt", "84_121_000007\tgo do you hear\n84_121_000008\tand i say\n9_9_9\tother\n")


LAYOUTS = {"librispeech": librispeech, "libritts": libritts, "vctk": vctk, "mls": mls}


@pytest.mark.parametrize("name", LAYOUTS)
def test_read_speech_reads_each_corpus(tmp_path: Path, name: str) -> None:
    LAYOUTS[name](tmp_path)
    layout, license = sources.SPEECH_CORPORA[name]
    source = ReadSpeech(tmp_path, name, license, layout)
    # `prepare` recognizes a source by its repr, in other processes too.
    assert " at 0x" not in repr(source)
    pending, rejected = read(source)
    assert not rejected
    texts = ["Go! Do you hear?", "And I say."] if name in ("libritts", "vctk") else ["Go do you hear.", "And I say."]
    assert [each.exchange.question_text for each in pending] == texts
    for each in pending:
        assert each.exchange.question_audio is not None
        assert 0.29 < len(each.exchange.question_audio) / 16_000 < 0.41
    answers, _ = read(ReadSpeech(tmp_path, name, license, layout, as_answer=True, answer_sample_rate=24_000))
    assert [each.exchange.answer_text for each in answers] == texts
    assert all(each.answer_audio is not None and len(each.answer_audio) > 0.29 * 24_000 for each in answers)
    assert answers[0].exchange.voice.startswith(f"{name} ")


def test_read_speech_rejects_rows(tmp_path: Path) -> None:
    librispeech(tmp_path)
    layout, license = sources.SPEECH_CORPORA["librispeech"]
    (tmp_path / "dev-clean/84/121123/84-121123-0001.flac").unlink()
    put(tmp_path / "dev-clean/84/2/84-2.trans.txt", "84-2-0000\n84-2-0001 WORDS\n84-2-0002 MORE\n")
    put(tmp_path / "dev-clean/84/2/84-2-0001.flac", b"junk")
    put(tmp_path / "dev-clean/84/2/84-2-0002.flac", tone(31, 16_000, "FLAC"))
    pending, rejected = read(ReadSpeech(tmp_path, "librispeech", license, layout))
    assert len(pending) == 1
    assert [row.reason for row in rejected] == [
        "recording is missing",
        "text is empty",
        "recording unusable",
        "recording too long",
    ]
    with pytest.raises(ConfigError, match="expected recordings"):
        ReadSpeech(tmp_path / "txt", "vctk", "", sources.vctk).shards()


LINES = [
    {"id": "niv.1", "system_prompt": "Be short.", "question": "Q1", "response": "A1"},
    {"instruction": "Q2", "input": "", "output": "A2"},
    {"instruction": "Q3", "input": "more", "output": "A3"},
    {"plain_text": "[Human]: Q4<eoh> [MOSS]: A4<eoa> [Human]: Q5<eoh> [MOSS]: A5<eoa>"},
    {"question": "Q6", "answer": "A6"},
    {"prompt": "Q7", "completion": "A7"},
]
PAIRS = [("Q1", "A1"), ("Q2", "A2"), ("Q3\nmore", "A3"), ("Q4", "A4"), ("Q6", "A6"), ("Q7", "A7")]


def pairs(pending: list[PendingExchange]) -> list[tuple[str, str]]:
    return [(each.exchange.question_text, each.exchange.answer_text) for each in pending]


def test_text_qa_reads_jsonl_parquet_and_arrow(tmp_path: Path) -> None:
    put(tmp_path / "qa.jsonl", "\n\n".join(map(json.dumps, LINES)))
    pending, rejected = read(TextQA(tmp_path / "qa.jsonl"))
    assert (pairs(pending), rejected) == (PAIRS, [])
    (tmp_path / "folder").mkdir()
    pq.write_table(pa.Table.from_pylist(LINES[:1] * 5), tmp_path / "folder" / "a.parquet", row_group_size=2)
    table = pa.Table.from_pylist(LINES[1:3])
    with pa.ipc.new_stream(tmp_path / "folder" / "data-00000-of-00001.arrow", table.schema) as stream:
        stream.write_table(table)
    pending, rejected = read(TextQA(tmp_path / "folder"))
    assert (pairs(pending), rejected) == ([PAIRS[0]] * 5 + PAIRS[1:3], [])


def test_lines_are_read_once_for_any_byte_ranges(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(
        tmp_path / "qa.jsonl",
        "".join(json.dumps({"question": f"Q{n}", "answer": "A" * n}) + "\n" for n in range(1, 60)),
    )
    size = (tmp_path / "qa.jsonl").stat().st_size
    for length in (1, 7, 30, 31, 100, size, size + 1):
        monkeypatch.setattr(sources, "byte_ranges", lambda path, length=length: byte_ranges(path, length))
        pending, _ = read(TextQA(tmp_path / "qa.jsonl"))
        assert [question for question, _ in pairs(pending)] == [f"Q{n}" for n in range(1, 60)]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("{", "not JSON"),
        ("[" * 100_000, "not JSON"),
        ("[]", "not an object"),
        ('{"color": "red"}', "unknown columns"),
        ('{"question": "", "answer": "a"}', "question is empty"),
        ('{"question": "q", "answer": 3}', "answer is empty"),
        ('{"question": "\\ud800", "answer": "a"}', "question is not text"),
        ('{"plain_text": "Hello"}', "not in Moss format"),
        (json.dumps({"question": "q" * 2001, "answer": "a"}), "question too long"),
    ],
)
def test_text_qa_rejects_rows(tmp_path: Path, line: str, reason: str) -> None:
    put(tmp_path / "qa.jsonl", f"{line}\n{json.dumps(LINES[4])}\n")
    pending, rejected = read(TextQA(tmp_path / "qa.jsonl"))
    assert pairs(pending) == [PAIRS[4]]
    assert [row.reason for row in rejected] == [reason]


def test_manifest(tmp_path: Path) -> None:
    put(tmp_path / "q.wav", tone(0.4, 22_050))
    put(tmp_path / "a.wav", tone(0.3, 16_000))
    good = {
        "question_text": "q",
        "question_audio": "q.wav",
        "answer_text": "a",
        "answer_audio": str(tmp_path / "a.wav"),
    }
    lines = [
        json.dumps(good | {"source": "made", "voice": "v"}),
        json.dumps({"question_text": "only", "answer_text": "text", "question_audio": None}),
        "{",
        "[]",
        json.dumps(good | {"color": "red"}),
        json.dumps(good | {"voice": 3}),
        json.dumps(good | {"answer_audio": "none.wav"}),
        json.dumps(good | {"answer_codes": [[1, 2, 3, 4, 5, 6, 7]]}),
        json.dumps({"answer_text": "a", "answer_codes": "1 2 3 4 5 6 4096"}),
        json.dumps({"answer_text": "a", "answer_codes": "1 2 3 4 5 6 7"}),
    ]
    put(tmp_path / "m.jsonl", "\n".join(lines))
    pending, rejected = read(Manifest(tmp_path / "m.jsonl", answer_sample_rate=24_000))
    exchange, answer = pending[0].exchange, pending[0].answer_audio
    assert (exchange.question_text, exchange.answer_text, exchange.source, exchange.voice) == ("q", "a", "made", "v")
    assert answer is not None
    assert len(answer) == pytest.approx(0.3 * 24_000, abs=2)
    assert pending[1].exchange.source == "manifest"
    assert [row.reason for row in rejected] == [
        "not JSON", "not an object", "unknown field", "voice is not text", "recording unusable", "two answers",
        "code out of range",
    ]  # fmt: skip
    codes = pending[2].exchange.answer_codes
    assert codes is not None
    assert codes.tolist() == [[1, 2, 3, 4, 5, 6, 7]]
    with pytest.raises(ConfigError, match="expected a file"):
        Manifest(tmp_path / "none").shards()
    small = Manifest(tmp_path / "m.jsonl", range_bytes=50)
    assert len(small.shards()) == -(-(tmp_path / "m.jsonl").stat().st_size // 50)
    assert pairs(read(small)[0]) == pairs(pending)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("I THINK I'M HERE", "I think I'm here."),
        ("what is it?", "What is it?"),
        ("Already So", "Already So"),
        ("", ""),
    ],
)
def test_sentence_case(text: str, expected: str) -> None:
    assert sources.sentence_case(text) == expected


def test_shard_fingerprint_changes_with_its_files(tmp_path: Path) -> None:
    put(tmp_path / "a.jsonl", "{}\n")
    shard = SourceShard("a", (tmp_path / "a.jsonl",), (0, 3))
    first = shard.fingerprint()
    assert shard.fingerprint() == first
    assert SourceShard("a", shard.files, (0, 2)).fingerprint() != first
    os.utime(tmp_path / "a.jsonl", (1, 1))
    assert shard.fingerprint() != first


def test_audio_too_long_without_a_declared_length(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The reason of a rejection does not depend on the wording of the error."""

    def read_audio(*_: object, max_seconds: float) -> None:
        raise AudioTooLongError("any words", max_seconds=max_seconds)

    monkeypatch.setattr(audio_io, "read_audio", read_audio)
    put(tmp_path / "m.jsonl", '{"question_audio": "q.wav"}')
    _, (row,) = read(Manifest(tmp_path / "m.jsonl"))
    assert (row.reason, str(row)) == ("recording too long", "recording too long: any words")


# Conversations


def test_voice_assistant_rounds_are_turns(tmp_path: Path) -> None:
    """Consecutive rounds of the same index; a rejected row is part of the history."""
    rows = [
        voice_assistant_row(index="1", round="round_1", question="a?", answer="b"),
        voice_assistant_row(index="1", round="round_2", question="c?", answer="d", answer_snac=""),
        voice_assistant_row(index="1", round="round_3"),
        voice_assistant_row(index="1", round="round_5"),
        voice_assistant_row(index="2", round="round_6"),
        voice_assistant_row(index="2", round=None),
        voice_assistant_row(index="2", round="None"),
    ]
    voice_assistant(tmp_path, rows)
    pending, rejected = read(VoiceAssistant(tmp_path))
    assert [each.exchange.history for each in pending] == [
        (),
        (PastTurn("a?", "b"), PastTurn("c?", "d")),
        (),
        (),
        (),
        (),
    ]
    assert [row.reason for row in rejected] == ["answer without codes"]


def lines(path: Path, *rows: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def chat(*texts: str, system: str = "", **fields: Any) -> dict[str, Any]:
    messages = [{"role": "system", "content": system}] if system else []
    roles = ["user", "assistant"] * len(texts)
    messages += [{"role": role, "content": text} for role, text in zip(roles, texts, strict=False)]
    return {"messages": messages, **fields}


def test_text_of_chat_messages(tmp_path: Path) -> None:
    chosen = chat("a?", "b", "c?", "d", "e?", "f")
    chosen["messages"][1]["weight"] = 0
    path = lines(tmp_path / "chat.jsonl", chat("a?", "b", system="Be kind."), chosen, {"question": "q", "answer": "r"})
    pending, rejected = read(TextQA(path))
    assert not rejected
    first, second, third = (each.exchange for each in pending)
    assert (first.system, first.question_text, first.answer_text, first.history) == ("Be kind.", "a?", "b", ())
    assert (second.question_text, second.answer_text) == ("e?", "f")
    assert second.history == (PastTurn("a?", "b"), PastTurn("c?", "d", True))
    assert (third.question_text, third.in_conversation) == ("q", False)
    every, _ = read(TextQA(path, every_turn=True))
    assert [each.exchange.question_text for each in every] == ["a?", "c?", "e?", "q"]
    assert every[2].exchange.history == (PastTurn("a?", "b"), PastTurn("c?", "d"))


def test_greeting_and_unanswered_question_of_chat_messages(tmp_path: Path) -> None:
    greeting = {"messages": [{"role": "assistant", "content": "Hello."}, *chat("a?", "b", "c?")["messages"]]}
    pending, rejected = read(TextQA(lines(tmp_path / "chat.jsonl", greeting)))
    assert not rejected
    assert [(each.exchange.question_text, each.exchange.history) for each in pending] == [
        ("a?", (PastTurn("", "Hello."),))
    ]


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"messages": "hi"}, "malformed messages"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "malformed messages"),
        (chat("a?"), "messages without an answer"),
        ({"messages": []}, "messages without an answer"),
        (chat("a" * 30, "b", "c?", "d"), "question too long"),
        (chat("\ud800", "b"), "message is not text"),
    ],
)
def test_chat_messages_that_are_rejected(tmp_path: Path, row: dict[str, Any], reason: str) -> None:
    pending, rejected = read(TextQA(lines(tmp_path / "chat.jsonl", row), max_characters=20))
    assert not pending
    assert [row.reason for row in rejected] == [reason]


def turn(name: str, number: int, **fields: Any) -> dict[str, Any]:
    row = {"conversation": name, "turn": number, "question_text": f"{name}{number}?", "answer_text": f"{number}"}
    return row | fields


def test_manifest_of_conversations(tmp_path: Path) -> None:
    path = lines(
        tmp_path / "m.jsonl",
        turn("x", 1, system="Be kind."),
        turn("x", 2, question_text=""),
        turn("x", 7),
        {"question_text": "alone?", "answer_text": "yes"},
        turn("y", 3),
        turn("x", 8),
    )
    pending, rejected = read(Manifest(path))
    assert not rejected
    found = [
        (each.exchange.system, [(past.question, past.answer) for past in each.exchange.history]) for each in pending
    ]
    assert found == [
        ("Be kind.", []),
        ("Be kind.", [("x1?", "1")]),
        ("Be kind.", [("x1?", "1"), ("", "2")]),
        ("", []),
        ("", []),
        ("", []),
    ]
    assert not any(past.trained for each in pending for past in each.exchange.history)


@pytest.mark.parametrize("range_bytes", [1, 60, 200, 5000])
def test_ranges_of_a_manifest_end_between_conversations(tmp_path: Path, range_bytes: int) -> None:
    rows = [turn(name, number) for name, turns in (("x", 5), ("y", 1), ("z", 4)) for number in range(turns)]
    path = lines(tmp_path / "m.jsonl", *rows, {"question_text": "alone?"}, *[turn("w", n) for n in range(3)])
    source = Manifest(path, range_bytes=range_bytes)
    pending, rejected = read(source)
    assert not rejected
    assert [len(each.exchange.history) for each in pending] == [0, 1, 2, 3, 4, 0, 0, 1, 2, 3, 0, 0, 1, 2]
    assert (len(source.shards()) > 1) == (range_bytes < 5000)


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (turn("x", 1), "turn out of order"),
        (turn("x", 0), "turn out of order"),
        (turn("x", True), "malformed turn"),
        ({"conversation": "x"}, "malformed turn"),
        (turn("x", 2, system=3), "malformed turn"),
        (turn("", 2), "turn without a conversation"),
        ({"system": "a"}, "turn without a conversation"),
    ],
)
def test_turns_of_a_manifest_that_are_rejected(tmp_path: Path, row: dict[str, Any], reason: str) -> None:
    pending, rejected = read(Manifest(lines(tmp_path / "m.jsonl", turn("x", 1), row)))
    assert len(pending) == 1
    assert [row.reason for row in rejected] == [reason]
