"""Batches contain every example unchanged, in exact shares, in an order that can be repeated and resumed."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from array_record.python.array_record_module import ArrayRecordReader
from orbax.checkpoint import v1 as ocp
from tokenizers import Tokenizer

from omni_jax.config.model import PRESETS, AdapterConfig
from omni_jax.config.run import DataConfig, SourceConfig
from omni_jax.data import packing
from omni_jax.data.examples import TASKS
from omni_jax.data.packing import Batch, padding
from omni_jax.data.pipeline import Batches, batches, held_out
from omni_jax.data.records import Exchange, RecordWriter, serves
from omni_jax.errors import PipelineError
from omni_jax.prompts import Example, example, speech_positions, speech_prompt, text_prompt
from omni_jax.tasks import Task
from omni_jax.vocab import Vocab
from tests import models

MODEL = PRESETS["tiny"]
VOCAB = Vocab(MODEL.vocab)
EVERY = {task.value: 1.0 for task in TASKS}
A = 100
"""Speech positions of a full recording of `tiny`."""


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer.from_file(str(models.tokenizer_files(tmp_path_factory.mktemp("tokenizer"))[0]))


def exchange(n: int, *, num_samples: int | None = None, text: str = "so {}", frames: int | None = None) -> Exchange:
    """The n-th exchange: short, and different from all others."""
    rng = np.random.default_rng(n)
    return Exchange(
        question_text=f"is it {n}?",
        question_audio=rng.integers(-9999, 9999, num_samples or rng.integers(400, 9000)).astype(np.int16),
        answer_text=text.format(n),
        answer_codes=rng.integers(0, 64, (frames or rng.integers(5, 25), 7)),
    )


def folder_of(path: Path, exchanges: Iterable[Exchange]) -> str:
    with RecordWriter(path, shard_size=16) as writer:
        for each in exchanges:
            writer.write(each)
    return str(path)


EXCHANGES = [exchange(n) for n in range(40)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return folder_of(tmp_path_factory.mktemp("data") / "all", EXCHANGES)


def config(*folders: str, **changes: Any) -> DataConfig:
    sources = tuple(SourceConfig(folder) for folder in folders)
    values = {
        "sources": sources,
        "tasks": EVERY,
        "batch_size": 4,
        "max_length": 160,
        "max_clips": 4,
        "num_workers": 0,
        **changes,
    }
    return DataConfig(**values)


def build_example(task: Task, each: Exchange, tokenizer: Tokenizer) -> Example:
    """The expected example of a task, built without the pipeline."""

    def ids(text: str) -> list[int]:
        return tokenizer.encode(text, add_special_tokens=False).ids

    if task.takes_audio:
        prompt = speech_prompt(task, speech_positions(len(each.question_audio), A), VOCAB)
    else:
        prompt = text_prompt(task, ids(each.answer_text if task is Task.T1A1 else each.question_text), VOCAB)
    answer = each.question_text if task is Task.A1T1 else each.answer_text
    return example(
        prompt, ids(answer) if task.outputs_text else [], each.answer_codes if task.outputs_audio else None, VOCAB
    )


def key(tokens: np.ndarray, targets: np.ndarray, mask: np.ndarray, audio: np.ndarray) -> tuple[bytes, ...]:
    arrays = (tokens.astype(np.int32), targets.astype(np.int32), mask.astype(bool), audio.astype(np.int16))
    return tuple(np.ascontiguousarray(array).tobytes() for array in arrays)


def expected(tokenizer: Tokenizer, exchanges: Iterable[Exchange] = EXCHANGES) -> dict[tuple[bytes, ...], str]:
    """Map from the contents of each example in a row to its task and number."""
    found = {}
    for n, each in enumerate(exchanges):
        for task in serves(each):
            want = build_example(task, each, tokenizer)
            audio = np.zeros(MODEL.audio_encoder.max_samples if task.takes_audio else 0, np.int16)
            if task.takes_audio:
                assert each.question_audio is not None
                audio[: len(each.question_audio)] = each.question_audio
            found[key(want.tokens, want.targets, want.mask, audio)] = f"{task} {n}"
    return found


def unpack(batch: Batch) -> list[tuple[bytes, ...]]:
    """The examples of a batch, row by row, each with the recording that its speech positions point to."""
    examples = []
    for row in range(len(batch["tokens"])):
        segments, speech_index = batch["segments"][row], batch["speech_index"][row]
        clips = []
        for segment in range(1, segments.max(initial=0) + 1):
            at = np.flatnonzero(segments == segment)
            assert (np.diff(at) == 1).all()
            np.testing.assert_array_equal(batch["positions"][row, at], np.arange(len(at)))
            index = speech_index[at]
            audio = np.zeros(0, np.int16)
            if (index >= 0).any():
                clip = index.max() // A
                clips.append(clip)
                # Positions 1, 2, ... have frames 0, 1, ... of one recording, later positions have none.
                n = int((index >= 0).sum())
                assert index[0] == -1
                np.testing.assert_array_equal(index[1 : n + 1], clip * A + np.arange(n))
                audio = batch["sound"][row, clip]
                assert n == speech_positions(len(np.trim_zeros(audio, "b")), A)
            tokens, targets, mask = (batch[name][row][:, at] for name in ("tokens", "targets", "mask"))
            examples.append(key(tokens, targets, mask, audio))
        assert sorted(clips) == list(range(batch["clips"][row]))
        assert not batch["sound"][row, len(clips) :].any()
        empty = segments == 0
        assert not batch["mask"][row][:, empty].any()
        assert (speech_index[empty] == -1).all()
        assert (batch["tokens"][row, :7][:, empty] == VOCAB.pad_a).all()
        assert (batch["tokens"][row, 7, empty] == VOCAB.pad_t).all()
        np.testing.assert_array_equal(batch["targets"][row][:, empty], batch["tokens"][row][:, empty])
    return examples


def draw(iterator: Batches, n: int) -> list[Batch]:
    return [next(iterator) for _ in range(n)]


def assert_same(found: list[Batch], wanted: list[Batch]) -> None:
    assert len(found) == len(wanted)
    for a, b in zip(found, wanted, strict=True):
        assert set(a) == set(b)
        for name in a:
            np.testing.assert_array_equal(a[name], b[name])


@pytest.fixture(autouse=True)
def few_bins(monkeypatch: pytest.MonkeyPatch) -> None:
    """Less work before the first batch."""
    monkeypatch.setattr(packing, "NUM_BINS", 8)


@pytest.fixture
def in_order(few_bins: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows contain the examples in the order in which they are drawn."""
    monkeypatch.setattr(packing, "NUM_BINS", 1)


# Contents of a batch


def test_batches_contain_every_example_unchanged(folder: str, tokenizer: Tokenizer) -> None:
    known = expected(tokenizer)
    assert len(known) == 6 * len(EXCHANGES)
    seen: Counter[str] = Counter()
    for batch in draw(batches(config(folder), MODEL, tokenizer, seed=1), 40):
        shapes = {name: (array.dtype.name, array.shape) for name, array in batch.items()}
        assert shapes == {
            "tokens": ("int32", (4, 8, 160)),
            "targets": ("int32", (4, 8, 160)),
            "mask": ("bool", (4, 8, 160)),
            "positions": ("int32", (4, 160)),
            "segments": ("int32", (4, 160)),
            "speech_index": ("int32", (4, 160)),
            "sound": ("int16", (4, 4, 32000)),
            "clips": ("int32", (4,)),
            "examples": ("int32", (4, 6)),
        }
        found = [known[each] for each in unpack(batch)]
        counts = Counter(name.split()[0] for name in found)
        assert [counts[task] for task in TASKS] == batch["examples"].sum(0).tolist()
        seen.update(found)
    assert set(seen) == set(known.values())


def test_stacked_frames_take_fewer_positions(folder: str, tokenizer: Tokenizer) -> None:
    """With `stack` 3 a clip has ceil(100 / 3) = 34 speech positions."""
    model = models.replace(MODEL, adapter=AdapterConfig(intermediate_size=48, stack=3))
    batch = next(batches(config(folder, tasks={"A1T1": 1}), model, tokenizer, seed=0))
    seen = 0
    for row in range(4):
        for clip in range(batch["clips"][row]):
            index = batch["speech_index"][row]
            n = int(((index >= clip * 34) & (index < (clip + 1) * 34)).sum())
            assert n == speech_positions(len(np.trim_zeros(batch["sound"][row, clip], "b")), 100, 3)
            seen += 1
    assert seen == batch["clips"].sum() == batch["examples"][:, TASKS.index(Task.A1T1)].sum() > 4
    assert batch["speech_index"].max() < 34 * 4


def test_max_clips_limits_recordings_per_row(folder: str, tokenizer: Tokenizer) -> None:
    batch = next(batches(config(folder, max_length=400, max_clips=2), MODEL, tokenizer, seed=0))
    assert batch["sound"].shape == (4, 2, 32000)
    assert batch["clips"].max() == 2


def test_packing_wastes_little(tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Questions of 2 to 8 s, answers of 20 to 100 frames, rows of 2048."""
    monkeypatch.undo()
    rng = np.random.default_rng(0)
    lengths = [(int(rng.uniform(2, 8) * 16000), int(rng.integers(20, 101))) for _ in range(60)]
    path = folder_of(
        tmp_path / "long",
        (exchange(n, num_samples=num_samples, frames=frames) for n, (num_samples, frames) in enumerate(lengths)),
    )
    model = models.replace(PRESETS["mini_omni"], vocab=MODEL.vocab, codec=MODEL.codec)
    # As many batches as are packed at the same time: their last rows have the most padding.
    iterator = batches(config(path, max_length=2048, max_clips=8, tasks={"A1A2": 1}), model, tokenizer, seed=0)
    wasted = [padding(next(iterator)) for _ in range(packing.NUM_BINS // 4)]
    assert 0 < np.mean(wasted) < 0.1


# Shares and order


def test_mixture_has_exact_shares(folder: str, tmp_path: Path, tokenizer: Tokenizer, in_order: None) -> None:
    """Of tasks, and of sources within a task, although half the records of a source cannot serve it."""
    half = folder_of(tmp_path / "half", (exchange(n, text="so {}" if n % 2 else "") for n in range(100, 140)))
    shares = {"T1T2": 1.0, "A1T1": 1 / 3, "T1A1": 0.77}
    sources = (SourceConfig(folder, weight=0.3), SourceConfig(half, weight=1, tasks=("T1T2", "A1T1")))
    iterator = batches(config(sources=sources, tasks=shares), MODEL, tokenizer, seed=0)
    known, counts, first = expected(tokenizer), Counter[str](), Counter[str]()
    for batch in draw(iterator, 60):
        for each in unpack(batch):
            # Those of the second source are not in `known`.
            if each in known:
                first[known[each].split()[0]] += 1
        counts.update(dict(zip(TASKS, batch["examples"].sum(0).tolist(), strict=True)))
    total = sum(counts.values())
    assert total > 600
    for task, share in shares.items():
        assert counts[task] == pytest.approx(total * share / sum(shares.values()), abs=5)
    assert first["T1T2"] == pytest.approx(counts["T1T2"] * 0.3 / 1.3, abs=5)
    assert first["T1A1"] == counts["T1A1"]
    assert iterator.skipped["unsuitable"] > 50


def draw_names(iterator: Batches, tokenizer: Tokenizer, n: int) -> list[str]:
    """Task and number of the next n examples."""
    known, found = expected(tokenizer), []
    while len(found) < n:
        found += [known[each] for each in unpack(next(iterator))]
    return found[:n]


def test_epochs_have_every_record_once_in_different_orders(folder: str, tokenizer: Tokenizer, in_order: None) -> None:
    names = draw_names(batches(config(folder, tasks={"T1T2": 1}), MODEL, tokenizer, seed=3), tokenizer, 120)
    epochs = [names[start : start + 40] for start in (0, 40, 80)]
    everything = [f"T1T2 {n}" for n in range(40)]
    for epoch in epochs:
        assert sorted(epoch) == sorted(everything)
        assert epoch != everything
    assert epochs[0] != epochs[1] != epochs[2]


def test_streams_of_one_source_have_different_orders(folder: str, tokenizer: Tokenizer, in_order: None) -> None:
    tasks = {"T1T2": 1, "T1A1": 1}
    names = draw_names(batches(config(folder, tasks=tasks), MODEL, tokenizer, seed=3), tokenizer, 160)
    streams = [[name.split()[1] for name in names if name.startswith(task)] for task in tasks]
    assert streams[0][:40] != streams[1][:40]
    # Nor those of a later epoch.
    assert streams[0][40:80] != streams[1][:40]
    assert streams[0][:40] != streams[1][40:80]


def test_processes_read_disjoint_records(folder: str, tokenizer: Tokenizer, in_order: None) -> None:
    whole = config(folder, tasks={"A1A2": 1})
    halves = []
    for process in range(2):
        iterator = batches(whole, MODEL, tokenizer, seed=5, process_index=process, process_count=2)
        halves.append(draw_names(iterator, tokenizer, 20))
        assert next(iterator)["tokens"].shape[0] == 2
    assert not set(halves[0]) & set(halves[1])
    assert sorted(halves[0] + halves[1]) == sorted(f"A1A2 {n}" for n in range(40))


def test_seed_decides_batches(folder: str, tokenizer: Tokenizer) -> None:
    one, two, other = (draw(batches(config(folder), MODEL, tokenizer, seed=seed), 3) for seed in (0, 0, 1))
    assert_same(one, two)
    assert any((a["tokens"] != b["tokens"]).any() for a, b in zip(one, other, strict=True))


# Resuming


@pytest.mark.parametrize("num_workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_resume_from_state(folder: str, tokenizer: Tokenizer, tmp_path: Path, num_workers: int) -> None:
    """From JSON, back in the same iterator, and through Orbax, between rows that are packed at the same time."""
    data = config(folder, num_workers=num_workers, tasks={"A1A2": 2, "T1T2": 1})

    def start() -> Batches:
        return batches(data, MODEL, tokenizer, seed=2)

    first = start()
    beginning = first.get_state()
    before = draw(first, 5)
    state = json.loads(json.dumps(first.get_state()))
    ocp.save_checkpointables(tmp_path / "saved", {"data": first})
    after = draw(first, 20)
    first.set_state(state)
    assert_same(draw(first, 20), after)
    first.set_state(beginning)
    assert_same(draw(first, 5), before)
    first.close()
    second = start()
    ocp.load_checkpointables(tmp_path / "saved", {"data": second})
    assert_same(draw(second, 20), after)
    second.close()


def test_counts_are_part_of_the_state(tmp_path: Path, tokenizer: Tokenizer) -> None:
    path = folder_of(tmp_path / "x", (exchange(n, text="so {}" if n else "word " * 90) for n in range(30)))
    spoil(path, 3)
    iterator = batches(config(path, tasks={"T1A2": 1}), MODEL, tokenizer, seed=0)
    draw(iterator, 20)
    state, counts, names = json.loads(json.dumps(iterator.get_state())), iterator.skipped, iterator.unreadable
    assert counts["unreadable"] > len(names) == 1
    assert counts["refused"] > 1
    draw(iterator, 20)
    later = iterator.skipped
    assert later["refused"] > counts["refused"]
    again = batches(config(path, tasks={"T1A2": 1}), MODEL, tokenizer, seed=0)
    again.set_state(state)
    assert (again.skipped, again.unreadable) == (counts, names)
    draw(again, 20)
    assert again.skipped == later


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_workers": 1}, "data.num_workers: expected 0 as saved, found 1"),
        ({"batch_size": 8}, r"data.batch_size \(rows of a process\): expected 4 as saved, found 8"),
        ({"max_length": 200}, "data.max_length: expected 160 as saved, found 200"),
        ({"tasks": {"T1T2": 1}}, "data.tasks: expected"),
    ],
)
def test_state_of_another_layout_is_refused(
    folder: str, tokenizer: Tokenizer, changes: dict[str, Any], message: str
) -> None:
    state = batches(config(folder), MODEL, tokenizer, seed=0).get_state()
    with pytest.raises(PipelineError, match=message):
        batches(config(folder, **changes), MODEL, tokenizer, seed=0).set_state(state)
    with pytest.raises(PipelineError, match="seed: expected 0 as saved, found 1"):
        batches(config(folder), MODEL, tokenizer, seed=1).set_state(state)
    with pytest.raises(PipelineError, match="process_index: expected 0 as saved, found 1"):
        batches(config(folder, batch_size=8), MODEL, tokenizer, seed=0, process_index=1, process_count=2).set_state(
            state
        )


# Skipped records


def spoil(path: str, shard_record: int) -> None:
    """Flip a bit in the middle of a record of the first shard, which has 16 of nearly equal size."""
    file = Path(path) / "00000.array_record"
    data = bytearray(file.read_bytes())
    reader = ArrayRecordReader(str(file))
    record = reader.read([shard_record])[0]
    reader.close()
    at = bytes(data).find(record[20:60])
    data[at + 25] ^= 4
    file.write_bytes(bytes(data))


def test_unreadable_record_is_counted_once_and_skipped(tmp_path: Path, tokenizer: Tokenizer) -> None:
    path = folder_of(tmp_path / "x", EXCHANGES[:20])
    spoil(path, 7)
    iterator = batches(config(path, max_corrupt=1), MODEL, tokenizer, seed=0)
    known = expected(tokenizer)
    seen = {known[each].split()[1] for batch in draw(iterator, 40) for each in unpack(batch)}
    assert seen == {str(n) for n in range(20)} - {"7"}
    assert iterator.unreadable == [f"{Path(path) / '00000.array_record'}, record 7"]
    assert iterator.skipped["unreadable"] > 6


@pytest.mark.parametrize("num_workers", [0, 1])
def test_too_many_unreadable_records(tmp_path: Path, tokenizer: Tokenizer, num_workers: int) -> None:
    path = folder_of(tmp_path / "x", EXCHANGES[:20])
    spoil(path, 7)
    spoil(path, 9)
    iterator = batches(config(path, max_corrupt=1, num_workers=num_workers), MODEL, tokenizer, seed=0)
    with pytest.raises(PipelineError, match=r"at most 1 records .*found 2.*\n.*00000\.array_record, record [79]"):
        draw(iterator, 40)
    iterator.close()


def test_max_corrupt_applies_before_the_first_batch(tmp_path: Path, tokenizer: Tokenizer) -> None:
    """All records have codes beyond the codebook: no batch is ever complete."""
    path = folder_of(tmp_path / "x", (Exchange(answer_text="a", answer_codes=np.full((9, 7), 70)) for _ in range(9)))
    iterator = batches(config(path, tasks={"T1A1": 1}, max_corrupt=3), MODEL, tokenizer, seed=0)
    with pytest.raises(PipelineError, match=r"record \d: answer_codes: expected codes below 64, found 70"):
        next(iterator)


def test_skipped_records_are_counted_by_reason(tmp_path: Path, tokenizer: Tokenizer, in_order: None) -> None:
    bad = {
        1: exchange(1, text=""),
        2: exchange(2, num_samples=32001),
        3: exchange(3, frames=150),
        4: exchange(4, text="seventeen words " * 9, frames=5),
    }
    path = folder_of(tmp_path / "x", (bad.get(n, EXCHANGES[n]) for n in range(40)))
    iterator = batches(config(path, tasks={"A1A2": 1}), MODEL, tokenizer, seed=0)
    known = expected(tokenizer)
    seen: list[str] = []
    while len(seen) < 36:
        seen += [known[each] for each in unpack(next(iterator))]
    assert sorted(seen[:36]) == sorted(f"A1A2 {n}" for n in range(40) if n not in bad)
    counts = iterator.skipped
    assert counts.pop("unreadable") == 0
    assert set(counts) == {"unsuitable", "longer_than_encoder", "longer_than_row", "refused"}
    assert all(1 <= n <= 2 for n in counts.values()), counts


def test_recording_of_the_greatest_length_is_used(tmp_path: Path, tokenizer: Tokenizer) -> None:
    each = exchange(0, num_samples=32000)
    path = folder_of(tmp_path / "x", [each])
    batch = next(batches(config(path, tasks={"A1T2": 1}), MODEL, tokenizer, seed=0))
    assert set(unpack(batch)) <= set(expected(tokenizer, [each]))


def test_source_without_usable_example_is_an_error(tmp_path: Path, tokenizer: Tokenizer) -> None:
    path = folder_of(tmp_path / "x", (exchange(n, num_samples=40000) for n in range(5)))
    with pytest.raises(
        PipelineError, match="expected examples of A1T1, found none in 5 records: 5 longer_than_encoder"
    ):
        next(batches(config(path, tasks={"A1T1": 1}), MODEL, tokenizer, seed=0))


def test_batches_refuses_wrong_sources_rows_and_tokenizer(folder: str, tmp_path: Path, tokenizer: Tokenizer) -> None:
    text = folder_of(tmp_path / "text", [Exchange(question_text="a", answer_text="b")])
    wrong: list[tuple[Callable[[], object], str]] = [
        (lambda: batches(config("/nowhere"), MODEL, tokenizer, seed=0), r"/nowhere: .*found no such folder"),
        (lambda: batches(config(text), MODEL, tokenizer, seed=0), "text: expected exchanges that can serve A1A2"),
        (
            lambda: batches(config(folder, batch_size=3), MODEL, tokenizer, seed=0, process_count=2),
            "batch_size: expected a multiple of the 2 processes, found 3",
        ),
    ]
    small = models.replace(MODEL, vocab=models.replace(MODEL.vocab, text=270))
    wrong.append(
        (lambda: batches(config(folder), small, tokenizer, seed=0), "tokenizer: expected at most .* 270 tokens")
    )
    for call, message in wrong:
        with pytest.raises(PipelineError, match=message):
            call()


# Held-out data


def test_held_out_yields_every_example_once(folder: str, tmp_path: Path, tokenizer: Tokenizer, in_order: None) -> None:
    """In order, and independently of the number of processes."""
    too_long = folder_of(tmp_path / "x", [*EXCHANGES[:3], exchange(0, num_samples=40000)])
    sources = (SourceConfig(folder), SourceConfig(too_long, tasks=("A1T1",)))
    data = config(folder, held_out=sources, tasks={"A1T1": 1, "T1A1": 1})
    iterator = held_out(data, MODEL, tokenizer)
    whole = list(iterator)
    known = expected(tokenizer)
    found = Counter(known[each] for batch in whole for each in unpack(batch))
    assert found == Counter(
        [f"{task} {n}" for task in ("A1T1", "T1A1") for n in range(40)] + [f"A1T1 {n}" for n in range(3)]
    )
    assert iterator.skipped["longer_than_encoder"] == 1
    assert {batch["tokens"].shape for batch in whole} == {(4, 8, 160)}
    # One task after the other.
    per_batch = np.array([batch["examples"].sum(0) for batch in whole])
    first, second = per_batch[:, TASKS.index(Task.A1T1)], per_batch[:, TASKS.index(Task.T1A1)]
    assert first[0] > 0 == second[0]
    shares = [list(held_out(data, MODEL, tokenizer, process_index=n, process_count=2)) for n in range(2)]
    joined = [{name: np.concatenate([a[name], b[name]]) for name in a} for a, b in zip(*shares, strict=True)]
    assert_same(joined, whole)


def test_held_out_counts_records_skipped_at_the_end(tmp_path: Path, tokenizer: Tokenizer) -> None:
    path = folder_of(tmp_path / "x", [EXCHANGES[0], exchange(0, num_samples=40000)])
    iterator = held_out(config(path, held_out=(SourceConfig(path),), tasks={"A1T2": 1}), MODEL, tokenizer)
    (batch,) = iterator
    assert batch["examples"].sum() == 1
    assert iterator.skipped["longer_than_encoder"] == 1


def test_held_out_without_sources_is_empty(folder: str, tokenizer: Tokenizer) -> None:
    assert list(held_out(config(folder), MODEL, tokenizer)) == []
