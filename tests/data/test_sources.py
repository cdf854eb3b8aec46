"""Small files in exactly the layouts that the corpora are published in."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import soundfile

from omni_jax.audio import io as audio_io
from omni_jax.data import sources
from omni_jax.data.sources import Manifest, PendingExchange, ReadSpeech, RejectedRow, Source, TextQA, VoiceAssistant
from omni_jax.errors import ConfigError


def tone(seconds: float, rate: int, format: str = "WAV") -> bytes:
    file = io.BytesIO()
    sound = 0.3 * np.sin(np.arange(int(seconds * rate)) / 20)
    soundfile.write(file, sound, rate, format=format, subtype="PCM_16")
    return file.getvalue()


def read(source: Source) -> tuple[list[PendingExchange], list[RejectedRow]]:
    """Every row of every unit."""
    drafts, rejected = [], []
    units = source.units()
    assert len({unit.name for unit in units}) == len(units)
    for unit in units:
        for _, make in source.rows(unit):
            try:
                drafts.append(make())
            except RejectedRow as problem:
                rejected.append(problem)
    return drafts, rejected


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
    assert [unit.part for unit in VoiceAssistant(tmp_path).units()] == [(0,), (1,)]
    drafts, rejected = read(VoiceAssistant(tmp_path))
    assert [problem.reason for problem in rejected] == ["persona"]
    exchange = drafts[0].exchange
    assert (exchange.question_text, exchange.answer_text) == ("What is your name?", "Omni.")
    assert exchange.source == "voice_assistant_400k qa_assistant_v1_7k"
    assert exchange.answer_codes is not None
    assert exchange.answer_codes.tolist() == [[1, 2, 3, 4, 5, 6, 7], [8, 9, 10, 11, 12, 13, 4095]]
    assert exchange.question_audio is not None
    expected = audio_io.to_pcm16(audio_io.read_audio(io.BytesIO(tone(0.5, 22_050))))
    np.testing.assert_array_equal(exchange.question_audio, expected)
    assert len(read(VoiceAssistant(tmp_path, persona=True))[0]) == 3


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"answer_snac": ""}, "answer without codes"),
        ({"answer_snac": None}, "answer without codes"),
        ({"answer_snac": "# 1 2 3 4 5 6"}, "codes in disorder"),
        ({"answer_snac": "# 1 2 3 4 5 6 7 8"}, "codes in disorder"),
        ({"answer_snac": "1 2 3 4 5 6 7"}, "codes in disorder"),
        ({"answer_snac": "# 1 2 3 4 5 6 -7"}, "codes in disorder"),
        ({"answer_snac": "# 1 2 3 4 5 6 7 #"}, "codes in disorder"),
        ({"answer_snac": "# 1 2 3 4 5 6 4096"}, "code out of range"),
        ({"answer_snac": "# 1 2 3 4 5 6 99999999999"}, "code out of range"),
        ({"answer_snac": "# 1 2 3 4 5 6 99999999999999999999"}, "codes in disorder"),
        ({"question": "  "}, "question is empty"),
        ({"answer": None}, "answer is empty"),
        ({"question_audio": None}, "question without sound"),
        ({"question_audio": {"bytes": b"", "path": ""}}, "question without sound"),
        ({"question_audio": {"bytes": b"RIFF junk", "path": ""}}, "recording unusable"),
        ({"question_audio": {"bytes": tone(0.5, 22_050)[:2000], "path": ""}}, "recording unusable"),
        ({"question_audio": {"bytes": tone(15.1, 22_050), "path": ""}}, "recording too long"),
    ],
)
def test_rows_of_voice_assistant_that_are_left_out(tmp_path: Path, change: dict[str, Any], reason: str) -> None:
    voice_assistant(tmp_path, [voice_assistant_row(), voice_assistant_row(**change)])
    drafts, rejected = read(VoiceAssistant(tmp_path))
    assert len(drafts) == 1
    assert [problem.reason for problem in rejected] == [reason]


def test_files_that_are_not_voice_assistant(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="expected files that end in"):
        VoiceAssistant(tmp_path).units()
    pq.write_table(pa.table({"question": ["a"]}), tmp_path / "a.parquet")
    with pytest.raises(ConfigError, match=r"expected the columns .* found none named"):
        VoiceAssistant(tmp_path).units()
    (tmp_path / "a.parquet").write_bytes(b"junk")
    with pytest.raises(ConfigError, match="expected a parquet file"):
        VoiceAssistant(tmp_path).units()


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
def test_corpora_of_read_speech(tmp_path: Path, name: str) -> None:
    LAYOUTS[name](tmp_path)
    listing, license = sources.SPEECH[name]
    source = ReadSpeech(tmp_path, name, license, listing)
    # What is made is known again by it, in other processes too.
    assert " at 0x" not in repr(source)
    drafts, rejected = read(source)
    assert not rejected
    said = [draft.exchange.question_text for draft in drafts]
    spoken = ["Go! Do you hear?", "And I say."] if name in ("libritts", "vctk") else ["Go do you hear.", "And I say."]
    assert said == spoken
    for draft in drafts:
        assert draft.exchange.question_audio is not None
        assert 0.29 < len(draft.exchange.question_audio) / 16_000 < 0.41
    aloud, _ = read(ReadSpeech(tmp_path, name, license, listing, as_answer=True, rate=24_000))
    assert [draft.exchange.answer_text for draft in aloud] == spoken
    assert all(draft.answer_audio is not None and len(draft.answer_audio) > 0.29 * 24_000 for draft in aloud)
    assert aloud[0].exchange.voice.startswith(f"{name} ")


def test_speech_that_lacks_something(tmp_path: Path) -> None:
    librispeech(tmp_path)
    listing, license = sources.SPEECH["librispeech"]
    (tmp_path / "dev-clean/84/121123/84-121123-0001.flac").unlink()
    put(tmp_path / "dev-clean/84/2/84-2.trans.txt", "84-2-0000\n84-2-0001 WORDS\n84-2-0002 MORE\n")
    put(tmp_path / "dev-clean/84/2/84-2-0001.flac", b"junk")
    put(tmp_path / "dev-clean/84/2/84-2-0002.flac", tone(31, 16_000, "FLAC"))
    drafts, rejected = read(ReadSpeech(tmp_path, "librispeech", license, listing))
    assert len(drafts) == 1
    assert [problem.reason for problem in rejected] == [
        "recording is missing",
        "text is empty",
        "recording unusable",
        "recording too long",
    ]
    with pytest.raises(ConfigError, match="expected recordings"):
        ReadSpeech(tmp_path / "txt", "vctk", "", sources.vctk).units()


LINES = [
    {"id": "niv.1", "system_prompt": "Be short.", "question": "Q1", "response": "A1"},
    {"instruction": "Q2", "input": "", "output": "A2"},
    {"instruction": "Q3", "input": "more", "output": "A3"},
    {"plain_text": "[Human]: Q4<eoh> [MOSS]: A4<eoa> [Human]: Q5<eoh> [MOSS]: A5<eoa>"},
    {"question": "Q6", "answer": "A6"},
    {"prompt": "Q7", "completion": "A7"},
]
PAIRS = [("Q1", "A1"), ("Q2", "A2"), ("Q3\nmore", "A3"), ("Q4", "A4"), ("Q6", "A6"), ("Q7", "A7")]


def pairs(drafts: list[PendingExchange]) -> list[tuple[str, str]]:
    return [(draft.exchange.question_text, draft.exchange.answer_text) for draft in drafts]


def test_text(tmp_path: Path) -> None:
    put(tmp_path / "qa.jsonl", "\n\n".join(map(json.dumps, LINES)))
    drafts, rejected = read(TextQA(tmp_path / "qa.jsonl"))
    assert (pairs(drafts), rejected) == (PAIRS, [])
    (tmp_path / "folder").mkdir()
    pq.write_table(pa.Table.from_pylist(LINES[:1] * 5), tmp_path / "folder" / "a.parquet", row_group_size=2)
    table = pa.Table.from_pylist(LINES[1:3])
    with pa.ipc.new_stream(tmp_path / "folder" / "data-00000-of-00001.arrow", table.schema) as stream:
        stream.write_table(table)
    drafts, rejected = read(TextQA(tmp_path / "folder"))
    assert (pairs(drafts), rejected) == ([PAIRS[0]] * 5 + PAIRS[1:3], [])


def test_lines_are_read_once_wherever_a_file_is_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(
        tmp_path / "qa.jsonl",
        "".join(json.dumps({"question": f"Q{n}", "answer": "A" * n}) + "\n" for n in range(1, 60)),
    )
    size = (tmp_path / "qa.jsonl").stat().st_size
    whole = sources._pieces
    for piece in (1, 7, 30, 31, 100, size, size + 1):
        monkeypatch.setattr(sources, "_pieces", lambda path, piece=piece: whole(path, piece))
        drafts, _ = read(TextQA(tmp_path / "qa.jsonl"))
        assert [question for question, _ in pairs(drafts)] == [f"Q{n}" for n in range(1, 60)]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("{", "not JSON"),
        ("[" * 100_000, "not JSON"),
        ("[]", "not an object"),
        ('{"color": "red"}', "unknown columns"),
        ('{"question": "", "answer": "a"}', "question is empty"),
        ('{"question": "q", "answer": 3}', "answer is empty"),
        ('{"question": "\\ud800", "answer": "a"}', "question is no text"),
        ('{"plain_text": "Hello"}', "no turn of Moss"),
        (json.dumps({"question": "q" * 2001, "answer": "a"}), "question too long"),
    ],
)
def test_text_that_is_left_out(tmp_path: Path, line: str, reason: str) -> None:
    put(tmp_path / "qa.jsonl", f"{line}\n{json.dumps(LINES[4])}\n")
    drafts, rejected = read(TextQA(tmp_path / "qa.jsonl"))
    assert pairs(drafts) == [PAIRS[4]]
    assert [problem.reason for problem in rejected] == [reason]


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
    ]
    put(tmp_path / "m.jsonl", "\n".join(lines))
    drafts, rejected = read(Manifest(tmp_path / "m.jsonl", rate=24_000))
    exchange, answer = drafts[0].exchange, drafts[0].answer_audio
    assert (exchange.question_text, exchange.answer_text, exchange.source, exchange.voice) == ("q", "a", "made", "v")
    assert answer is not None
    assert len(answer) == pytest.approx(0.3 * 24_000, abs=2)
    assert drafts[1].exchange.source == "manifest"
    assert [problem.reason for problem in rejected] == [
        "not JSON", "not an object", "unknown field", "voice is no text", "recording unusable",
    ]  # fmt: skip
    with pytest.raises(ConfigError, match="expected a file"):
        Manifest(tmp_path / "none").units()


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
