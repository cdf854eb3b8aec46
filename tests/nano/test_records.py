"""Recordings become exchanges: whose codes are the codec's own, in folders that are written when they must be."""

from __future__ import annotations

import itertools
import json
import shutil
import zlib
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import soundfile
import typer
from flax import nnx
from typer.testing import CliRunner

from nano import facts, records, synthesize
from nano.synthesize import SynthesisError, Utterance
from omni_jax.checkpoint import release as checkpoint
from omni_jax.codec.snac import Snac, make_encoder
from omni_jax.config.model import CodecConfig
from omni_jax.data.records import INDEX, Exchange, Records, from_bytes
from omni_jax.tasks import Task

TINY = CodecConfig(
    encoder_dim=8, encoder_rates=(16,), decoder_dim=8, decoder_rates=(16,), codebook_size=64, noise=False
)
"""A frame of 64 samples, and an encoder that hears more than a frame on each side."""
FOLDERS = (
    *("train", "typed_train", "held_out_seen", "held_out_unseen"),
    *("read_train", "read_free", "read_answer_like", "read_held_out"),
    *("dictation_train", "dictation_free", "dictation_seen", "dictation_unseen"),
)
TASKS = {
    "train": set(Task),
    "held": set(Task),
    "typed": {Task.T1A2, Task.T1T2, Task.T1A1},
    "read": {Task.T1A1},
    "dictation": {Task.A1T1},
}
"""By the first word of a folder."""
LENGTHS = (960, 150, 129, 959, 190, 192, 191, 897, 40, 64)
FRAMES = (15, 3, 3, 15, 3, 3, 3, 15, 1, 1)
"""Of recordings, in samples and in frames."""

questions = cache(facts.questions)


@pytest.fixture(scope="module")
def codec() -> Snac:
    return Snac(TINY, rngs=nnx.Rngs(0))


@pytest.fixture
def pieces(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Small pieces and batches, two versions, few typed questions; how many recordings were encoded each time."""
    monkeypatch.setattr(records, "VERSIONS", 2)
    monkeypatch.setattr(records, "TYPED", 44)
    monkeypatch.setattr(records, "_PIECE", 4)
    monkeypatch.setattr(records, "_BATCH", 3)
    known = list(dict.fromkeys(item.answer for item in facts.sample("train", 300, 0)))[:11]

    def sample(
        split: str, count: int, seed: int, *, further: bool, shares: dict[str, float] | None
    ) -> list[facts.Item]:
        """A question for every answer that is spoken, again and again."""
        assert split == "train"
        assert (shares is None) == (seed == 6)
        if shares is not None:
            assert not shares.keys() & {"sum", "difference"}
            assert (shares["capital"], shares["joke"], shares["color"]) == (48, 1, 36)
        plain = {item.question for item in questions("train")}
        asked = {
            item.answer: item for item in questions("train", further=True) if (item.question not in plain) == further
        }
        return list(itertools.islice(itertools.cycle(asked[answer] for answer in known), count))

    monkeypatch.setattr(facts, "sample", sample)
    encoder, counts = records.encoder, []

    def counted(codec: Snac) -> records.Encode:
        encode = encoder(codec)

        def run(recordings: list[np.ndarray]) -> list[np.ndarray]:
            counts.append(len(recordings))
            return encode(recordings)

        return run

    monkeypatch.setattr(records, "encoder", counted)
    return counts


def shard(path: Path, utterances: list[Utterance], rate: int, seed: int) -> None:
    """As nano.synthesize writes it; noise."""
    rng = np.random.default_rng(seed)
    sounds, lines, start = [], [], 0
    for number, utterance in enumerate(utterances):
        samples = LENGTHS[number % len(LENGTHS)]
        sounds.append(rng.integers(-9000, 9000, samples, np.int16))
        lines.append(json.dumps({**asdict(utterance), "start": start, "samples": samples, "varied": {}}))
        start += samples
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path.with_suffix(".flac"), np.concatenate(sounds), rate, subtype="PCM_16")
    path.with_suffix(".jsonl").write_text("\n".join(lines) + "\n")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made")
    train, held_out = (facts.sample(split, 300, 0) for split in ("train", "held_out"))
    every = list(dict.fromkeys(item.answer for item in train))
    known, more = every[:10], every[10:11]
    asked = {
        "train": [item for item in train if item.answer in known][:12],
        "more": [item for item in train if item.answer in known + more][12:14],
        "phrased": [item for item in train if item.answer in known + more][14:15],
        "recorded": [item for item in train if item.answer in known + more][15:16],
        "held_out_seen": held_out[:3],
        "held_out_unseen": held_out[3:5] + [item for item in held_out if item.answer in known][:1],
    }
    answers = {item.answer for name in ("held_out_seen", "held_out_unseen") for item in asked[name]} - set(known)
    read = {split: facts.sentences(split, 6, 0) for split in ("train", "held_out")}
    said = {
        "train": known,
        "more": more,
        "held_out": sorted(answers),
        "read_train": read["train"][:3],
        "read_more": read["train"][5:],
        "read_free": facts.free_sentences(1, 0),
        "read_more_free": facts.free_sentences(2, 0)[1:],
        "read_answer_like": facts.free_sentences(1, 0, "answer"),
        "read_named": facts.free_sentences(1, 0, "named"),
        "read_held_out": read["held_out"][:2],
    }
    dictated = {
        "train": read["train"][3:5],
        "free": facts.free_sentences(2, 1),
        "recorded": facts.free_sentences(3, 1)[2:],
        "seen": read["held_out"][2:4],
        "unseen": read["held_out"][4:5],
    }
    for seed, (name, items) in enumerate(asked.items()):
        voiced = [
            Utterance(item.question, item.kind, "espeak", "en-us", 1.0, 0.0, item.answer, item.held_out)
            for item in items
        ]
        shard(folder / f"questions/{name}-00000", voiced, 16_000, seed)
    for seed, (name, texts) in enumerate(dictated.items(), 10):
        voiced = [Utterance(text, "sentence", "espeak", "en-us") for text in texts]
        shard(folder / f"questions/dictation_{name}-00000", voiced, 16_000, seed)
    for seed, (name, texts) in enumerate(said.items(), 20):
        shard(
            folder / f"answers/{name}-00000",
            [Utterance(text, "answer", "hibari", "heart") for text in texts],
            24_000,
            seed,
        )
    return folder


@pytest.fixture
def corpora(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "made"))


def exchanges(folder: Path) -> list[Exchange]:
    found = Records(folder)
    return [from_bytes(found[index], codebook_size=64) for index in range(len(found))]


@cache
def alone(codec: Snac) -> Callable[[np.ndarray], np.ndarray]:
    """The codes of one recording by itself."""
    encode = make_encoder(codec)

    def run(audio: np.ndarray) -> np.ndarray:
        padded = np.pad(audio.astype(np.float32) / 32768, (0, -len(audio) % codec.config.frame_size))
        return np.asarray(encode(padded[None], lengths=np.array([len(audio)])))[0]

    return run


def test_codes_are_those_of_each_recording_alone(codec: Snac, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(records, "_BATCH", 3)
    rng = np.random.default_rng(0)
    sounds = [rng.integers(-9000, 9000, samples, np.int16) for samples in LENGTHS]
    found = records.encoder(codec)([sound.astype(np.float32) / 32768 for sound in sounds])
    assert [len(codes) for codes in found] == list(FRAMES)
    encode = alone(codec)
    for sound, codes in zip(sounds, found, strict=True):
        np.testing.assert_array_equal(codes, encode(sound))
    assert len(np.unique(np.concatenate(found))) > 16
    assert records.encoder(codec)([]) == []


@pytest.mark.usefixtures("pieces")
def test_every_folder_has_what_its_tasks_need(corpora: Path, codec: Snac, tmp_path: Path):
    out = tmp_path / "records"
    counts = records.write(corpora, out, codec)
    assert tuple(counts) == FOLDERS
    everything = {name: exchanges(out / name) for name in FOLDERS}
    assert {name: len(found) for name, found in everything.items()} == counts
    assert counts == dict(zip(FOLDERS, (16, 44, 3, 3, 4, 2, 2, 2, 2, 3, 2, 1), strict=True))

    for name, count in counts.items():
        index, tasks = Records(out / name), TASKS[name.partition("_")[0]]
        assert {task: index.count(task) for task in Task} == {task: count * (task in tasks) for task in Task}

    encode = alone(codec)
    plain, versions = {}, ({}, {})
    read = itertools.chain.from_iterable(records.READ.values())
    for part in ("train", "more", "held_out", *read):
        for recording in synthesize.recordings(corpora, f"answers/{part}"):
            text = recording.utterance.text
            plain[text] = encode(recording.audio)
            for version, codes in enumerate(versions):
                shift = zlib.crc32(text.encode(), version) % codec.config.frame_size
                codes[text] = encode(np.pad(recording.audio, (shift, 0)))
    for other in (plain, versions[1]):
        changed = [not np.array_equal(versions[0][text], other[text]) for text in plain]
        assert np.mean(changed) > 0.9, "a recording that begins elsewhere in a frame has other codes"
    asked = {
        name: [*synthesize.recordings(corpora, f"questions/{name}")]
        for name in ("train", "more", "phrased", "recorded")
    }
    turns = [number % 2 for part in asked.values() for number in range(len(part))]
    assert len(turns) == 16
    for name, found in everything.items():
        expected = {"train": turns, "typed_train": [0, 1] * 22}.get(name, [0] * len(found))
        for exchange, version in zip(found, expected, strict=True):
            if exchange.answer_text:
                np.testing.assert_array_equal(exchange.answer_codes, versions[version][exchange.answer_text])
                assert exchange.voice == "heart"
    for name in (name for name in FOLDERS if name.startswith(("train", "held_out", "dictation"))):
        parts = records.DICTATED.get(name, (name,))
        said = itertools.chain(
            *(asked.values() if name == "train" else (synthesize.recordings(corpora, f"questions/{p}") for p in parts))
        )
        for exchange, recording in zip(everything[name], said, strict=True):
            np.testing.assert_array_equal(exchange.question_audio, recording.audio)
            assert exchange.question_text == recording.utterance.text
            assert exchange.answer_text == recording.utterance.answer
            kind, held_out = recording.utterance.kind, recording.utterance.held_out
            assert exchange.source.split() == ["nano", kind, *held_out.split()]
    assert {exchange.source.split()[2] for exchange in everything["held_out_seen"]} <= {"pair", "phrasing", "both"}

    # Answers of training are asked for in writing, too, by questions that have them, half of them in further phrasings.
    answers = {(item.question, item.answer): item.kind for item in questions("train", further=True)}
    plain = {item.question for item in questions("train")}
    assert sum(exchange.question_text in plain for exchange in everything["typed_train"]) == 22
    assert len({exchange.answer_text for exchange in everything["typed_train"]}) == 11
    for exchange in everything["typed_train"]:
        assert exchange.source == f"nano {answers[exchange.question_text, exchange.answer_text]}"


def test_what_is_there_is_not_made_again(corpora: Path, codec: Snac, tmp_path: Path, pieces: list[int]):
    out = tmp_path / "records"
    whole = records.write(corpora, out, codec)
    held_out = sum(1 for _ in synthesize.recordings(corpora, "answers/held_out"))
    assert sorted(pieces) == sorted([4, 4, 2, 1, 4, 4, 2, 1, held_out, 3, 1, 1, 1, 1, 1, 2])
    before = {name: exchanges(out / name) for name in FOLDERS}
    pieces.clear()
    assert records.write(corpora, out, codec) == {}

    # What a killed run leaves: no index, or no codes.
    (out / "read_train" / INDEX).unlink()
    (out / "typed_train" / "origin.txt").unlink()
    assert records.write(corpora, out, codec) == {"typed_train": 44, "read_train": 4}
    assert pieces == []
    (out / "codes" / "answers-train-version1-00001.npz").unlink()
    assert records.write(corpora, out, codec) == {}
    assert pieces == [4]

    # Another codec: all of it, with other codes.
    pieces.clear()
    other = Snac(TINY, rngs=nnx.Rngs(1))
    assert records.write(corpora, out, other) == whole
    assert sum(pieces) == 2 * (10 + 1) + held_out + 3 + 1 + 1 + 1 + 1 + 1 + 2
    encode = alone(other)
    recording = next(synthesize.recordings(corpora, "answers/read_train"))
    after = exchanges(out / "read_train")
    shift = zlib.crc32(recording.utterance.text.encode()) % other.config.frame_size
    np.testing.assert_array_equal(after[0].answer_codes, encode(np.pad(recording.audio, (shift, 0))))
    assert not np.array_equal(after[0].answer_codes, before["read_train"][0].answer_codes)


def test_more_recordings_are_written_and_only_they_are_coded(
    corpora: Path, codec: Snac, tmp_path: Path, pieces: list[int]
):
    out = tmp_path / "records"
    records.write(corpora, out, codec)
    pieces.clear()
    shard(corpora / "answers/read_train-00001", [Utterance("New words.", "sentence", "hibari", "heart")] * 1, 24_000, 9)
    assert records.write(corpora, out, codec) == {"read_train": 5}, "the folder of the new one, and no other"
    assert pieces == [4], "the piece that has the new one, and no other"
    assert exchanges(out / "read_train")[3].answer_text == "New words."


@pytest.mark.usefixtures("pieces")
def test_questions_in_other_words_are_written_anew(
    corpora: Path, codec: Snac, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    out = tmp_path / "records"
    records.write(corpora, out, codec)
    asked = facts.sample
    monkeypatch.setattr(
        facts,
        "sample",
        lambda *args, **kwargs: [replace(item, question=f"Well, {item.question}") for item in asked(*args, **kwargs)],
    )
    assert records.write(corpora, out, codec) == {"typed_train": 44}
    assert all(exchange.question_text.startswith("Well, ") for exchange in exchanges(out / "typed_train"))


@pytest.mark.usefixtures("pieces")
def test_an_answer_that_was_never_spoken_is_missed(corpora: Path, codec: Snac, tmp_path: Path):
    (corpora / "answers/held_out-00000.jsonl").write_text("")
    shard(corpora / "answers/held_out-00001", [Utterance("Something else.", "answer", "hibari", "heart")], 24_000, 9)
    with pytest.raises(SynthesisError, match=r"expected an answer to each of questions/held_out_seen, found none that"):
        records.write(corpora, tmp_path / "records", codec)
    with pytest.raises(ValueError, match="found no index"):
        Records(tmp_path / "records" / "held_out_seen")
    (corpora / "answers/more-00000.jsonl").write_text("")
    shard(corpora / "answers/more-00001", [Utterance("Another.", "answer", "hibari", "heart")], 24_000, 9)
    with pytest.raises(SynthesisError, match=r"expected an answer to each of the typed questions, found none that"):
        records.write(corpora, tmp_path / "records", codec)


def test_the_command_says_what_it_did(tiny_release: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    app = typer.Typer()
    app.command()(records.main)
    given: list[Snac] = []

    def write(corpora: Path, out: Path, codec: Snac) -> dict[str, int]:
        given.append(codec)
        if corpora.name == "empty":
            raise SynthesisError("nothing there")
        return {"train": 3}

    monkeypatch.setattr(records, "write", write)
    arguments = ["--codec", str(tiny_release), "--out", str(tmp_path), "--corpora"]
    result = CliRunner().invoke(app, [*arguments, "made"])
    assert (result.exit_code, result.stdout) == (0, "train: 3 exchanges\n")
    expected = checkpoint.open_release(tiny_release).load_codec().params()
    for name, values in given[0].params().items():
        np.testing.assert_array_equal(values, expected[name])
    result = CliRunner().invoke(app, [*arguments, "empty"])
    assert (result.exit_code, result.stderr) == (2, "nano.records: nothing there\n")
    missing = CliRunner().invoke(app, ["--codec", str(tmp_path / "none.safetensors"), "--corpora", "made"])
    assert missing.exit_code == 2
    assert "none.safetensors: expected a safetensors file, found no such file" in missing.stderr
