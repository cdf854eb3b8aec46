"""Preparing a corpus: the index, encoded answers, resuming after interruptions, and memory use."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import soundfile
from flax import nnx

from omni_jax.audio import io as audio_io
from omni_jax.audio.encoding import write_audio
from omni_jax.codec.snac import Snac, make_encoder
from omni_jax.config.model import PRESETS, CodecConfig
from omni_jax.data import sources
from omni_jax.data.prepare import prepare
from omni_jax.data.readers import byte_ranges
from omni_jax.data.records import INDEX, Exchange, Records, RecordWriter, from_bytes, write_json
from omni_jax.data.shards import MANIFEST_SUFFIX, CodecSpec, ShardManifest, ShardWriter, encode_answers, manifest_path
from omni_jax.data.sources import Manifest, RejectedRow, Row, SourceShard, TextQA, VoiceAssistant
from omni_jax.errors import ConfigError, FolderInUseError, MissingExtraError, RecordError
from omni_jax.tasks import Task
from tests.data.test_sources import put, tone, voice_assistant, voice_assistant_row

# Two blocks and frames of 60 samples: small programs, and answers of many frames.
CODEC = CodecConfig(
    encoder_dim=4, encoder_rates=(3, 5), decoder_dim=8, decoder_rates=(5, 3), codebook_size=64, noise=False
)


@dataclasses.dataclass(frozen=True)
class SmallCodec:
    """A `CodecSpec` with a small random codec."""

    config: CodecConfig = CODEC

    def load_encoder(self) -> Any:
        rng = np.random.default_rng(0)
        shapes = nnx.eval_shape(lambda: Snac(CODEC, rngs=nnx.Rngs(0))).params()
        params = {name: rng.uniform(-0.5, 0.5, like.shape).astype(np.float32) for name, like in shapes.items()}
        return make_encoder(Snac.from_params(CODEC, params))


def write_questions(path: Path, count: int, **more: Any) -> None:
    put(path, "".join(json.dumps({"question": f"Q{n}", "answer": f"A{n}"} | more) + "\n" for n in range(count)))


def read_questions(folder: Path) -> list[str]:
    records = Records(folder)
    return [from_bytes(records[number], audio=False).question_text for number in range(len(records))]


def test_prepare_writes_index(tmp_path: Path) -> None:
    bad = [voice_assistant_row(answer_snac=""), voice_assistant_row(answer=""), voice_assistant_row(answer="")]
    rows = [voice_assistant_row(), *bad, voice_assistant_row(question="Two?")]
    voice_assistant(tmp_path / "in", rows, row_group_size=2)
    index = prepare(VoiceAssistant(tmp_path / "in"), tmp_path / "out")
    assert index == json.loads((tmp_path / "out" / INDEX).read_text())
    assert index["exchanges"] == 2
    assert index["question_hours"] == pytest.approx(1 / 3600, abs=1e-4)
    assert index["answer_frames"] == 4
    assert index["licenses"] == {"voice_assistant_400k": "Apache-2.0"}
    assert index["rejected"] == {"answer is empty": 2, "answer without codes": 1}
    assert index["rejected_examples"]["answer is empty"] == [
        "train-00000-of-00325.parquet:1 row 0: answer is empty",
        "train-00000-of-00325.parquet:1 row 1: answer is empty",
    ]
    # The shard in the middle is empty: it has no file, and its number is not reused.
    assert [shard["file"] for shard in index["shards"]] == ["00000.array_record", "00002.array_record"]
    assert read_questions(tmp_path / "out") == ["What is your name?", "Two?"]
    assert Records(tmp_path / "out").count(Task.A1A2) == 2


def test_batched_encoding_equals_single(tmp_path: Path) -> None:
    rows = []
    for number, seconds in enumerate((0.05, 0.08, 0.04)):
        sound = 0.1 * np.random.default_rng(number).standard_normal(int(seconds * 24_000))
        write_audio(tmp_path / f"a{number}.wav", sound.astype(np.float32), 24_000)
        rows.append({"answer_text": f"a {number}", "answer_audio": f"a{number}.wav"})
    rows.insert(1, {"question_text": "only", "answer_text": "text"})
    put(tmp_path / "m.jsonl", "\n".join(map(json.dumps, rows)))
    source = Manifest(tmp_path / "m.jsonl", answer_sample_rate=CODEC.sample_rate)
    index = prepare(source, tmp_path / "out", codec=SmallCodec())
    assert index["exchanges"] == 4
    records, encode = Records(tmp_path / "out"), SmallCodec().load_encoder()
    made = [from_bytes(records[number], codebook_size=CODEC.codebook_size) for number in range(4)]
    assert [exchange.answer_text for exchange in made] == ["a 0", "text", "a 1", "a 2"]
    for number, exchange in enumerate(made[:1] + made[2:]):
        audio = audio_io.read_audio(tmp_path / f"a{number}.wav", CODEC.sample_rate)
        alone = encode_answers([audio], encode, CODEC)[0]
        assert exchange.answer_codes is not None
        np.testing.assert_array_equal(exchange.answer_codes, alone)
        assert len(exchange.answer_codes) == -(-len(audio) // CODEC.frame_size)
        assert len(np.unique(exchange.answer_codes)) > 5
    without = prepare(source, tmp_path / "without")
    assert without["rejected"] == {"answer audio without a codec": 3}


def test_row_that_serves_no_task_is_rejected(tmp_path: Path) -> None:
    put(tmp_path / "m.jsonl", '{"question_text": "alone"}\n{"question_text": "q", "answer_text": "a"}')
    index = prepare(Manifest(tmp_path / "m.jsonl"), tmp_path / "out")
    assert (index["exchanges"], index["rejected"]) == (1, {"serves no task": 1})


def test_prepare_on_a_full_disk_says_so_and_resumes(tmp_path: Path) -> None:
    letters = np.random.default_rng(0).choice(list("abcdefghijklmnop "), (100, 1900))
    lines = [json.dumps({"question": "".join(text), "answer": "a"}) for text in letters]
    put(tmp_path / "m.jsonl", "\n".join(lines))
    source = TextQA(tmp_path / "m.jsonl")
    _, most = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, most))
    try:
        with pytest.raises(RecordError, match="out: the records could not be written: File too large; once they can"):
            prepare(source, tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))
    assert not list((tmp_path / "out").iterdir())
    assert prepare(source, tmp_path / "out")["exchanges"] == 100


@pytest.fixture
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cut files of lines every 400 bytes."""
    monkeypatch.setattr(sources, "byte_ranges", lambda path: byte_ranges(path, 400))


@pytest.mark.usefixtures("small_shards")
def test_prepare_again_skips_finished_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_questions(tmp_path / "qa.jsonl", 100)
    source, out = TextQA(tmp_path / "qa.jsonl"), tmp_path / "out"
    seen: list[tuple[int, int]] = []
    first = prepare(source, out, progress=lambda *at: seen.append(at))
    count = len(source.shards())
    assert count > 5
    assert seen == [(n + 1, count) for n in range(count)]
    assert read_questions(out) == [f"Q{n}" for n in range(100)]
    times = {path: path.stat().st_mtime_ns for path in out.iterdir() if path.name != INDEX}

    assert prepare(source, out) == first
    assert {path: path.stat().st_mtime_ns for path in out.iterdir() if path.name != INDEX} == times

    # A missing shard and a damaged manifest are written again, and nothing else.
    (out / "00001.array_record").unlink()
    (out / f"00003{MANIFEST_SUFFIX}").write_text("{")
    again: list[tuple[int, int]] = []
    assert prepare(source, out, progress=lambda *at: again.append(at)) == first
    assert len(again) == 2

    # A changed file is read again; shards that a shorter source does not have are removed.
    write_questions(tmp_path / "qa.jsonl", 30)
    assert prepare(source, out)["exchanges"] == 30
    assert read_questions(out) == [f"Q{n}" for n in range(30)]
    assert len(list(out.glob(f"*{MANIFEST_SUFFIX}"))) == len(source.shards())


def test_prepare_refuses_folder_of_another_corpus(tmp_path: Path) -> None:
    write_questions(tmp_path / "qa.jsonl", 5)
    out = tmp_path / "out"
    prepare(TextQA(tmp_path / "qa.jsonl"), out)
    other = TextQA(tmp_path / "qa.jsonl", name="other")
    with pytest.raises(ConfigError, match=r"out: expected an empty folder or one of other, found one of text"):
        prepare(other, out)
    assert len(Records(out)) == 5


@pytest.mark.usefixtures("small_shards")
def test_interrupted_prepare_leaves_no_index_and_resumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_questions(tmp_path / "qa.jsonl", 100)
    source, out, write = TextQA(tmp_path / "qa.jsonl"), tmp_path / "out", ShardWriter.write

    def broken(*args: Any) -> Any:
        if args[1] == 3:
            raise KeyboardInterrupt
        return write(*args)

    monkeypatch.setattr(ShardWriter, "write", broken)
    with pytest.raises(KeyboardInterrupt):
        prepare(source, out)
    assert not (out / INDEX).exists()
    monkeypatch.setattr(ShardWriter, "write", write)
    done: list[tuple[int, int]] = []
    prepare(source, out, progress=lambda *at: done.append(at))
    assert done[0][0] == 4
    assert read_questions(out) == [f"Q{n}" for n in range(100)]


def test_several_workers_write_the_same(tmp_path: Path) -> None:
    rows = [voice_assistant_row(question=f"Q{n}?") for n in range(12)]
    voice_assistant(tmp_path / "in", rows, row_group_size=3)
    source = VoiceAssistant(tmp_path / "in")
    one, two = prepare(source, tmp_path / "one"), prepare(source, tmp_path / "two", workers=2)
    assert one == two
    assert read_questions(tmp_path / "two") == [f"Q{n}?" for n in range(12)]


@pytest.mark.slow
def test_killed_prepare_resumes(tmp_path: Path) -> None:
    """SIGKILL leaves complete files only; the next run writes the remaining shards."""
    sound = {"bytes": tone(2, 22_050), "path": ""}
    rows = [voice_assistant_row(question=f"Q{n}?", question_audio=sound) for n in range(60)]
    voice_assistant(tmp_path / "in", rows, row_group_size=3)
    command = [Path(sys.executable).with_name("omni-jax"), "prepare", "voice_assistant", tmp_path / "in"]
    command += ["--out", tmp_path / "out"]
    killed = 0
    for _ in range(3):
        process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
        before = len(list((tmp_path / "out").glob(f"*{MANIFEST_SUFFIX}"))) if (tmp_path / "out").exists() else 0
        until = time.monotonic() + 60
        while process.poll() is None and time.monotonic() < until:
            if len(list((tmp_path / "out").glob(f"*{MANIFEST_SUFFIX}"))) > before:
                os.kill(process.pid, signal.SIGKILL)
                killed += 1
                break
        process.wait()
    assert killed
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "60 exchanges" in done.stderr
    assert read_questions(tmp_path / "out") == [f"Q{n}?" for n in range(60)]
    assert not list((tmp_path / "out").glob(".*"))


def test_prepare_imports_without_jax() -> None:
    code = "import sys, omni_jax.data.prepare, omni_jax.data.sources; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def peak_mebibytes(corpus: Path) -> int:
    """Of a process that prepares it."""
    code = (
        "import resource, sys\n"
        "from pathlib import Path\n"
        "from omni_jax.data.prepare import prepare\n"
        "from omni_jax.data.sources import VoiceAssistant\n"
        "prepare(VoiceAssistant(Path(sys.argv[1])), sys.argv[2])\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)\n"
    )
    command = [sys.executable, "-c", code, corpus, corpus.with_name(f"{corpus.name}-out")]
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout) // 1024


@pytest.mark.slow
def test_memory_does_not_grow_with_corpus_size(tmp_path: Path) -> None:
    """Rows are read a few at a time, also within a row group."""
    sound = {"bytes": tone(10, 22_050), "path": ""}
    for name, count in (("small", 20), ("large", 200)):
        voice_assistant(tmp_path / name, [voice_assistant_row(question_audio=sound) for _ in range(count)])
    # 200 rows have 84 MB of audio in the file, and as much once decoded.
    assert peak_mebibytes(tmp_path / "large") - peak_mebibytes(tmp_path / "small") < 100


@pytest.mark.slow
def test_memory_of_preparing_a_gigabyte(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(-3000, 3000, 10 * 22_050).astype(np.int16)
    buffer = io.BytesIO()
    soundfile.write(buffer, noise, 22_050, format="WAV")
    rows = [voice_assistant_row(question_audio={"bytes": buffer.getvalue(), "path": ""}) for _ in range(24)]
    table = pa.Table.from_pylist(rows)
    for name, times in (("small", 2), ("large", 100)):
        (tmp_path / name).mkdir()
        # With a dictionary, the recording, the same in all rows, would be stored once.
        with pq.ParquetWriter(tmp_path / name / "train.parquet", table.schema, use_dictionary=False) as writer:
            for _ in range(times):
                writer.write_table(table)
    assert (tmp_path / "large" / "train.parquet").stat().st_size > 1e9
    small, large = peak_mebibytes(tmp_path / "small"), peak_mebibytes(tmp_path / "large")
    assert json.loads((tmp_path / "large-out" / INDEX).read_text())["exchanges"] == 2400
    print(f"peak memory: {small} MiB for 21 MB, {large} MiB for 1.06 GB")
    assert large - small < 50


@pytest.mark.usefixtures("small_shards")
def test_prepare_refuses_a_folder_that_another_run_writes_to(tmp_path: Path) -> None:
    write_questions(tmp_path / "qa.jsonl", 30)
    source, out = TextQA(tmp_path / "qa.jsonl"), tmp_path / "out"
    refused = 0

    def start_another(done: int, total: int) -> None:
        nonlocal refused
        with pytest.raises(FolderInUseError, match="found `omni-jax prepare` of "):
            prepare(source, out)
        refused += 1

    prepare(source, out, progress=start_another)
    assert refused == len(source.shards())
    assert read_questions(out) == [f"Q{n}" for n in range(30)]
    assert not list(out.glob(".*"))


def test_prepare_refuses_folder_of_another_writer(tmp_path: Path) -> None:
    with RecordWriter(tmp_path / "out") as writer:
        writer.write(Exchange("q", answer_text="a"))
    write_questions(tmp_path / "qa.jsonl", 3)
    with pytest.raises(ConfigError, match="records of another writer"):
        prepare(TextQA(tmp_path / "qa.jsonl"), tmp_path / "out")
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="expected a folder to write to"):
        prepare(TextQA(tmp_path / "qa.jsonl"), tmp_path / "file")


def test_manifest_round_trip_and_rejected_examples(tmp_path: Path) -> None:
    manifest = ShardManifest(fingerprint="f", source="text")
    for number in range(7):
        manifest.reject(f"row {number}", RejectedRow("too long", "3 of 2"))
    assert manifest.rejected == {"too long": 7}
    assert manifest.examples == {"too long": [f"row {number}: too long: 3 of 2" for number in range(5)]}
    path = manifest_path(tmp_path, 12)
    assert path.name == "00012.manifest.json"
    assert ShardManifest.read(path) is None
    write_json(path, vars(manifest))
    assert ShardManifest.read(path) == manifest


def test_codec_spec_has_the_shape_of_its_model() -> None:
    assert CodecSpec("tiny").config == PRESETS["tiny"].codec


def test_error_of_a_worker_process_reaches_the_caller(tmp_path: Path) -> None:
    rows = [voice_assistant_row() for _ in range(4)]
    voice_assistant(tmp_path / "in", rows, row_group_size=1)
    with pytest.raises(MissingExtraError, match=r"^no parser: pip install 'omni-jax\[data\]'$") as caught:
        prepare(FailingSource(tmp_path / "in"), tmp_path / "out", workers=2)
    assert caught.value.extra == "data"


class FailingSource(VoiceAssistant):
    """A corpus that needs a package which is not installed."""

    def rows(self, shard: SourceShard) -> Iterator[Row]:
        raise MissingExtraError("no parser", "data")
