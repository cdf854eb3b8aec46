"""What is counted as an error of speech. The recognizer is a stand-in, the packages it comes in are made up."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import jax
import numpy as np
import pytest
import soundfile
from flax import nnx
from typer.testing import CliRunner

from nano import codec as codecs
from nano import listen
from omni_jax.codec.snac import Snac
from omni_jax.config.model import CodecConfig


@pytest.mark.parametrize(
    ("written", "said"),
    [
        ("Twelve times three.", "twelve times three"),
        ("12 x 3", "twelve times three"),
        ("12x3 = 36!", "twelve times three is thirty six"),
        ("3 \N{MULTIPLICATION SIGN} 4", "three times four"),
        ("3*4", "three times four"),
        ("7 + 8", "seven plus eight"),
        ("7+8", "seven plus eight"),
        ("20 - 6", "twenty minus six"),
        ("20-6", "twenty minus six"),
        ("20 \N{EN DASH} 6", "twenty minus six"),
        ("20 \N{MINUS SIGN} 6", "twenty minus six"),
        ("Twenty-one", "twenty one"),
        ("a well-known fox", "a well known fox"),
        ("Planet X and x2", "planet x and x two"),
        ("100", "one hundred"),
        ("1,000", "one thousand"),
        ("In 1, 2, 3.", "in one two three"),
        ("4,5", "four five"),
        ("2001", "two zero zero one"),
        ("50% of 30\N{DEGREE SIGN}", "fifty percent of thirty degrees"),
        ("cats & dogs", "cats and dogs"),
        ("It's  fine...", "it's fine"),
        ("It\N{RIGHT SINGLE QUOTATION MARK}s fine", "it's fine"),
        ("", ""),
        (" ?! ", ""),
    ],
)
def test_text_as_it_is_said(decode_text: str, said: str):
    assert listen.spoken(decode_text) == said


def test_every_number_is_as_nano_writes_it():
    for number in range(1001):
        assert listen.spoken(str(number)) == listen.spoken(listen.facts.words(number)).strip()


@pytest.mark.parametrize(
    ("text", "heard", "errors"),
    [
        ("Eight, seven, six.", "876", 0),
        ("Nine, ten, eleven, twelve.", "910-1112.", 0),
        ("Twenty, nineteen, eighteen, seventeen.", "2019-1817", 0),
        ("Four, five, six.", "4, 5, 6.", 0),
        ("Zero, one.", "0 1", 0),
        ("Eight, seven, six.", "875", 1),
        ("Eight, seven, six.", "87", 1),
        ("Eight, seven, six.", "-876 apples", 1),
        # Not a row of numbers: here 42 is not four two.
        ("Forty-two.", "4 2", 1),
        ("Four and two is six.", "426", 1),
        ("One, a cow, two.", "12", 1),
    ],
)
def test_joined_numbers_are_understood(text: str, heard: str, errors: float):
    assert bool(listen.wer([{"text": text, "heard": heard}])) == errors


def test_texts_are_lines(tmp_path: Path):
    entries = [{"file": "a.wav", "text": "Café, 5 \N{EURO SIGN}.", "group": "x"}, {"file": "b.wav", "text": "B"}]
    listen.write_texts(tmp_path, iter(entries))
    lines = (tmp_path / listen.TEXTS).read_text(encoding="utf-8").splitlines()
    assert [json.loads(line) for line in lines] == entries
    assert "Café" in lines[0]


@pytest.fixture
def recogniser(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Hears what stands in the files it is given; the list has which they were."""
    for number, package in enumerate(listen.PACKAGES, 1):
        data = tmp_path / "packages" / package / "data"
        data.mkdir(parents=True)
        (data.parent / "__init__.py").touch()
        (data / f"model.bin.part{number}").write_bytes(b"half %d," % number)
        for name in ("config.json", "tokenizer.json", "vocabulary.txt") if number == 1 else ():
            (data / name).write_text(name)
    monkeypatch.syspath_prepend(tmp_path / "packages")
    heard: list[Path] = []

    class WhisperModel:
        def __init__(self, folder: str, **options: object):
            files = {path.name: path.read_text() for path in Path(folder).iterdir()}
            assert files.pop("model.bin") == "half 1,half 2,"
            assert files == {name: name for name in ("config.json", "tokenizer.json", "vocabulary.txt")}
            assert options == {"device": "cpu", "compute_type": "int8", "cpu_threads": 1}

        def transcribe(self, file: str, language: str, **options: object) -> tuple[object, None]:
            assert language == "en"
            heard.append(Path(file))
            pieces = Path(file).read_text().split("|")
            return (SimpleNamespace(text=f" {piece}") for piece in pieces), None

    module = ModuleType("faster_whisper")
    module.__dict__["WhisperModel"] = WhisperModel
    monkeypatch.setitem(sys.modules, "faster_whisper", module)
    return heard


def test_errors_are_counted_by_group(tmp_path: Path, recogniser: list[Path]):
    said = {
        "a.wav": ("Two plus two is four.", "2 + 2 = 4.", "answers"),
        "b.wav": ("The cat sings.", "The cat|sinks. ", "answers"),
        "c.wav": ("One two.", "", "sentences"),
        "d.wav": ("A dog and a cow.", "A dog and a cow sat.", "sentences"),
    }
    for file, (_, heard, _) in said.items():
        (tmp_path / file).write_text(heard)
    listen.write_texts(
        tmp_path, ({"file": file, "text": text, "group": group} for file, (text, _, group) in said.items())
    )
    result = CliRunner().invoke(listen.app, ["hear", str(tmp_path)])
    assert result.exception is None
    assert recogniser == [tmp_path / file for file in said]
    found = json.loads((tmp_path / listen.HEARD).read_text())
    # One word of eight; two lost and one too many for seven.
    assert found["summary"] == {
        "answers": {"recordings": 2, "wer": 0.125, "exact": 0.5},
        "sentences": {"recordings": 2, "wer": round(3 / 7, 4), "exact": 0.0},
    }
    assert [entry["heard"] for entry in found["recordings"]] == [
        *("2 + 2 = 4.", "The cat sinks.", "", "A dog and a cow sat."),
    ]
    assert [entry["errors"] for entry in found["recordings"]] == pytest.approx([0, 1 / 3, 1, 0.2])
    # The worst first, the right ones not at all.
    assert [line.strip() for line in result.stdout.splitlines()] == [
        "answers: {'recordings': 2, 'wer': 0.125, 'exact': 0.5}",
        "The cat sings.  ->  The cat sinks.",
        "sentences: {'recordings': 2, 'wer': 0.4286, 'exact': 0.0}",
        "One two.  ->",
        "A dog and a cow.  ->  A dog and a cow sat.",
    ]


def test_groups_may_be_left_out(tmp_path: Path, recogniser: list[Path]):
    (tmp_path / "a.wav").write_text("Moo.")
    listen.write_texts(tmp_path, [{"file": "a.wav", "text": "Moo."}])
    result = CliRunner().invoke(listen.app, ["hear", str(tmp_path)])
    assert result.stdout == "all: {'recordings': 1, 'wer': 0.0, 'exact': 1.0}\n"


def test_a_recogniser_that_is_not_installed(tmp_path: Path, recogniser: list[Path], monkeypatch: pytest.MonkeyPatch):
    listen.write_texts(tmp_path, [{"file": "a.wav", "text": "Moo."}])
    monkeypatch.setattr(listen, "PACKAGES", (listen.PACKAGES[0], "no_such_part"))
    result = CliRunner().invoke(listen.app, ["hear", str(tmp_path)])
    assert result.exit_code == 1
    assert result.output.startswith("no-such-part is not installed; see the top of ")
    assert not (tmp_path / listen.HEARD).exists()


def shard(folder: Path, part: str, lengths: list[int]) -> list[np.ndarray]:
    """Noise as nano.synthesize writes it."""
    rng = np.random.default_rng(len(lengths))
    sounds = [rng.integers(-9000, 9000, samples, np.int16) for samples in lengths]
    lines = []
    for number, sound in enumerate(sounds):
        entry = {"text": f"{part} {number}", "kind": "answer", "engine": "none", "voice": "none", "varied": {}}
        start = sum(lengths[:number])
        lines.append(json.dumps({**entry, "start": start, "samples": len(sound)}))
    (folder / "answers").mkdir(parents=True, exist_ok=True)
    soundfile.write(folder / f"answers/{part}-00000.flac", np.concatenate(sounds), 24_000, subtype="PCM_16")
    (folder / f"answers/{part}-00000.jsonl").write_text("\n".join(lines) + "\n")
    return sounds


def test_round_trip_is_coded_and_decoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    config = CodecConfig(
        encoder_dim=8, encoder_rates=(16,), decoder_dim=8, decoder_rates=(16,), codebook_size=64, noise=False
    )
    # Every parameter moved: biases start at zero, which would make silence after the end harmless.
    rng = np.random.default_rng(0)
    params = Snac(config, rngs=nnx.Rngs(0)).params()
    codec = Snac.from_params(
        config, {name: value + 0.2 * rng.standard_normal(value.shape, np.float32) for name, value in params.items()}
    )
    monkeypatch.setattr(codecs, "read", lambda path: codec)
    sounds = shard(tmp_path, "held_out", [900, 959, 64])
    others = shard(tmp_path, "read_held_out", [910])
    out = tmp_path / "heard"
    result = CliRunner().invoke(
        listen.app, ["round-trip", "--folder", str(tmp_path), "--out", str(out), "--count", "2"]
    )
    assert result.stdout == f"6 recordings in {out}\n"
    entries = [json.loads(line) for line in (out / listen.TEXTS).read_text().splitlines()]
    assert [(entry["group"], entry["text"]) for entry in entries] == [
        *(("held_out codec", "held_out 0"), ("held_out original", "held_out 0")),
        *(("held_out codec", "held_out 1"), ("held_out original", "held_out 1")),
        *(("read_held_out codec", "read_held_out 0"), ("read_held_out original", "read_held_out 0")),
    ]
    codes, decode = jax.jit(codec.encode), jax.jit(codec.decode)
    for number, sound in enumerate([*sounds[:2], *others]):
        coded, original = (soundfile.read(out / entry["file"]) for entry in entries[2 * number : 2 * number + 2])
        assert coded[1] == original[1] == 24_000
        np.testing.assert_array_equal(original[0] * 32768, sound)
        # By itself, in whole frames.
        padded = np.pad(sound.astype(np.float32) / 32768, (0, -len(sound) % 64))[None]
        alone = decode(codes(padded, lengths=np.array([len(sound)])))[0, : len(sound)]
        np.testing.assert_allclose(coded[0], alone, atol=1e-4)
