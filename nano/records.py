"""Turns the recordings into what training reads: exchanges whose answers are the trained codec's codes.

    python -m nano.records --codec build/nano/codec/codec.safetensors

Folders of records, under build/nano/records:

    train                                   questions said aloud, and their answers
    typed_train                             questions in writing, and their answers
    read_train, read_free, read_answer_like, read_held_out      sentences to be read aloud
    dictation_train, dictation_free, dictation_seen, dictation_unseen       sentences to be written down
    held_out_seen, held_out_unseen          questions never trained on, by voices that training hears and others

Every answer begins anywhere within a frame, those of training in four places. The same sound then has other codes; a
voice that has but one version of each learns the codes by heart, and not what sounds they stand for.

Codes are kept beside them in pieces, so that an interrupted run goes on, and are made anew for another codec. The
folders are written anew for another codec and for other recordings or texts of theirs.
"""

from __future__ import annotations

import itertools
import shutil
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from tqdm import tqdm

from nano import facts, synthesize
from omni_jax.audio import io as audio_io
from omni_jax.checkpoint import release as checkpoint
from omni_jax.codec.snac import Snac, make_encoder
from omni_jax.data.records import INDEX, Exchange, RecordWriter
from omni_jax.errors import CheckpointError, RecordError
from omni_jax.vocab import NUM_CODEBOOKS

FOLDER = Path("build/nano/records")

Encode = Callable[[list[np.ndarray]], list[np.ndarray]]
"""Recordings, f32 [samples] each, to codes, int32 [F, 7] each."""

VERSIONS = 4
"""Of each answer in training."""
TYPED = 80_000
"""Questions in writing that are answered aloud."""
COMPUTED = ("sum", "difference")
"""Kinds of questions with so many answers that each is said but once or twice, and in a few words."""
READ = {
    "read_train": ("read_train", "read_more"),
    "read_free": ("read_free", "read_more_free"),
    "read_answer_like": ("read_answer_like", "read_named"),
    "read_held_out": ("read_held_out",),
}
"""Folders of sentences to be read aloud, and the parts of the answers that they are made of."""
DICTATED = {
    "dictation_train": ("dictation_train",),
    "dictation_free": ("dictation_free", "dictation_recorded"),
    "dictation_seen": ("dictation_seen",),
    "dictation_unseen": ("dictation_unseen",),
}
"""Folders of sentences to be written down, and the parts of the questions that they are made of."""
_PIECE = 250
"""Recordings whose codes are kept in one file."""
_BATCH = 16
_FRAME_STEP = 16
"""Batches are padded to multiples of this many frames, so that few programs are compiled."""


def encoder(codec: Snac) -> Encode:
    """The codec's encoder for recordings of any length, in batches of like length."""
    run, frame = make_encoder(codec), codec.config.frame_size

    def encode(recordings: list[np.ndarray]) -> list[np.ndarray]:
        codes = [np.zeros((0, NUM_CODEBOOKS), np.int32)] * len(recordings)
        order = sorted(range(len(recordings)), key=lambda index: len(recordings[index]))
        for start in range(0, len(order), _BATCH):
            rows = order[start : start + _BATCH]
            step = _FRAME_STEP * frame
            audio = np.zeros((_BATCH, -(-len(recordings[rows[-1]]) // step) * step), np.float32)
            lengths = np.full(_BATCH, frame, np.int32)
            for row, index in enumerate(rows):
                lengths[row] = len(recordings[index])
                audio[row, : lengths[row]] = recordings[index]
            found = np.asarray(run(audio, lengths=lengths))
            for row, index in enumerate(rows):
                codes[index] = found[row, : -(-lengths[row] // frame)]
        return codes

    return encode


def spoken(
    corpora: Path, part: str, keep: Path, encode: Encode, mark: int, frame: int, versions: int = 1
) -> list[dict[str, np.ndarray]]:
    """The codes of every text of a part that nano's own voice speaks, in each version.

    Args:
        corpora: what `nano.synthesize` wrote.
        part: `answers/train` and the like.
        keep: folder of the codes that are made already.
        encode: from `encoder`.
        mark: of the codec; kept codes with another mark are made anew.
        frame: samples of the codec's frame.
        versions: how many; each begins elsewhere in the frame.
    """
    made: list[dict[str, np.ndarray]] = [{} for _ in range(versions)]
    keep.mkdir(parents=True, exist_ok=True)
    recordings = synthesize.recordings(corpora, part)
    pieces = iter(lambda: list(itertools.islice(recordings, _PIECE)), [])
    for number, piece in enumerate(tqdm(pieces, desc=part, unit="piece")):
        texts = [recording.utterance.text for recording in piece]
        for version, known in enumerate(made):
            path = keep / f"{part.replace('/', '-')}-version{version}-{number:05d}.npz"
            codes = _kept(path, texts, mark)
            if codes is None:
                codes = encode([_shifted(recording, frame, version) for recording in piece])
                _keep(path, texts, codes, mark)
            known.update(zip(texts, codes, strict=True))
    return made


def _shifted(recording: synthesize.Recording, frame: int, version: int) -> np.ndarray:
    """f32 [samples], after less than a frame of silence: how much, text and version decide."""
    shift = zlib.crc32(recording.utterance.text.encode(), version) % frame
    return np.pad(audio_io.from_pcm16(recording.audio), (shift, 0))


def _keep(path: Path, texts: list[str], codes: list[np.ndarray], mark: int) -> None:
    """Write what `_kept` finds, whole or not at all."""
    partial = path.with_name(f".{path.name}.part")
    with partial.open("wb") as file:
        lengths = [len(code) for code in codes]
        np.savez(file, mark=mark, texts=np.array(texts), codes=np.concatenate(codes), lengths=lengths)
    partial.replace(path)


def _kept(path: Path, texts: list[str], mark: int) -> list[np.ndarray] | None:
    """The codes of these texts by this codec, if they are there."""
    if not path.exists():
        return None
    with np.load(path) as file:
        if int(file["mark"]) != mark or file["texts"].tolist() != texts:
            return None
        return np.split(file["codes"], np.cumsum(file["lengths"])[:-1])


def asked(corpora: Path, part: str, versions: Sequence[dict[str, np.ndarray]]) -> Iterator[Exchange]:
    """Questions said aloud; the source of each says its kind and why it is held out, if it is.

    Their answers take turns among the versions of the codes.

    Raises:
        nano.synthesize.SynthesisError: an answer is missing.
    """
    for recording, codes in zip(synthesize.recordings(corpora, part), itertools.cycle(versions)):
        said = recording.utterance
        yield Exchange(
            question_text=said.text,
            question_audio=recording.audio,
            answer_text=said.answer,
            answer_codes=_answer(codes, said.answer, corpora, part),
            source=f"nano {said.kind} {said.held_out}".strip(),
            voice=synthesize.ANSWER_VOICE,
        )


def typed(corpora: Path, versions: Sequence[dict[str, np.ndarray]]) -> Iterator[Exchange]:
    """Training questions in writing, half of them in the further phrasings; the answers take turns among the versions.

    Half of them are of every kind as many as are asked aloud. The others are for learning the words that have little in
    common with others: of every kind but the sums and differences as many as it has answers.

    Raises:
        nano.synthesize.SynthesisError: an answer is missing.
    """
    answers = {name: len(kind.answers) for name, kind in facts.KINDS.items() if name not in COMPUTED}
    items = [
        item
        for seed, shares in ((6, None), (7, answers))
        for further in (False, True)
        for item in facts.sample("train", TYPED // 4, seed, further=further, shares=shares)
    ]
    for item, codes in zip(items, itertools.cycle(versions)):
        code = _answer(codes, item.answer, corpora, "the typed questions")
        yield Exchange(item.question, None, item.answer, code, f"nano {item.kind}", synthesize.ANSWER_VOICE)


def _answer(codes: dict[str, np.ndarray], text: str, corpora: Path, part: str) -> np.ndarray:
    """The codes of an answer, or an error that says of which part one is missing."""
    if text not in codes:
        raise synthesize.SynthesisError(
            f"{corpora}: expected an answer to each of {part}, found none that says {text!r}: python -m nano.synthesize"
        )
    return codes[text]


def read(versions: Sequence[dict[str, np.ndarray]]) -> Iterator[Exchange]:
    """Sentences to be read aloud."""
    for text, code in _items(versions):
        yield Exchange(answer_text=text, answer_codes=code, source="nano sentence", voice=synthesize.ANSWER_VOICE)


def _items(versions: Sequence[dict[str, np.ndarray]]) -> Iterator[tuple[str, np.ndarray]]:
    """Texts and codes of one version after the other."""
    return itertools.chain.from_iterable(codes.items() for codes in versions)


def dictated(corpora: Path, part: str) -> Iterator[Exchange]:
    """Sentences to be written down."""
    for recording in synthesize.recordings(corpora, part):
        yield Exchange(question_text=recording.utterance.text, question_audio=recording.audio, source="nano sentence")


def write(corpora: Path, out: Path, codec: Snac) -> dict[str, int]:
    """Write every folder that is not there yet, not whole, or made from another codec or other recordings.

    Args:
        corpora: what `nano.synthesize` wrote.
        out: folder of the folders.
        codec: the trained codec.

    Returns:
        How many exchanges went into each folder written now.

    Raises:
        nano.synthesize.SynthesisError: recordings are missing.
        omni_jax.data.records.RecordError: a folder cannot be written to.
    """
    encode, mark = encoder(codec), _mark(codec)

    def answers(part: str, versions: int = 1) -> list[dict[str, np.ndarray]]:
        return spoken(corpora, f"answers/{part}", out / "codes", encode, mark, codec.config.frame_size, versions)

    every = [own | more for own, more in zip(answers("train", VERSIONS), answers("more", VERSIONS), strict=True)]
    (held_out,) = answers("held_out")
    known = [every[0] | held_out]

    def origin(*parts: str) -> str:
        return f"codec {mark}, recordings {_made(corpora, parts)}"

    answered = ("answers/train", "answers/more")
    tested = (*answered, "answers/held_out")
    typed_train = list(typed(corpora, every))
    # With what they are made from.
    folders: dict[str, tuple[Iterable[Exchange], str]] = {
        "train": (
            itertools.chain.from_iterable(asked(corpora, part, every) for part in synthesize.ASKED),
            origin(*synthesize.ASKED, *answered),
        ),
        "typed_train": (typed_train, f"{origin(*answered)}, texts {texts_mark(typed_train)}"),
    }
    for name in ("held_out_seen", "held_out_unseen"):
        part = f"questions/{name}"
        folders[name] = asked(corpora, part, known), origin(part, *tested)
    for name, parts in READ.items():
        codes = [version for part in parts for version in answers(part)]
        folders[name] = read(codes), origin(*(f"answers/{part}" for part in parts))
    for name, parts in DICTATED.items():
        sources = [f"questions/{part}" for part in parts]
        sentences = itertools.chain.from_iterable(dictated(corpora, source) for source in sources)
        folders[name] = sentences, origin(*sources)
    decode_text = {}
    for name, (exchanges, made_from) in folders.items():
        count = renew(out / name, made_from, exchanges)
        if count is not None:
            decode_text[name] = count
    return decode_text


def renew(folder: Path, origin: str, exchanges: Iterable[Exchange], *, shard_size: int = 2048) -> int | None:
    """Write a folder of records, unless it is whole and was made from the same.

    Args:
        folder: what is in it is replaced.
        origin: what the exchanges are made from, one line; noted beside them.
        exchanges: drawn only if they are written.
        shard_size: exchanges per file.

    Returns:
        How many were written, None if the folder has been left as it is.
    """
    note = folder / "origin.txt"
    if (folder / INDEX).exists() and note.exists() and note.read_text() == f"{origin}\n":
        return None
    shutil.rmtree(folder, ignore_errors=True)
    count = 0
    with RecordWriter(folder, shard_size=shard_size) as writer:
        for exchange in tqdm(exchanges, desc=folder.name, unit="exchange"):
            writer.write(exchange)
            count += 1
    note.write_text(f"{origin}\n")
    return count


def texts_mark(exchanges: Iterable[Exchange]) -> int:
    """A number that exchanges of other texts will hardly have."""
    mark = 0
    for exchange in exchanges:
        mark = zlib.crc32(f"{exchange.question_text}\n{exchange.answer_text}\n".encode(), mark)
    return mark


def _mark(codec: Snac) -> int:
    """A number that another codec will hardly have."""
    mark = 0
    for name, values in sorted(codec.params().items()):
        mark = zlib.crc32(np.asarray(values).tobytes(), zlib.crc32(name.encode(), mark))
    return mark


def _made(corpora: Path, parts: Sequence[str]) -> int:
    """A number that other recordings of these parts will hardly have."""
    mark = 0
    for part in parts:
        for path in sorted(corpora.glob(f"{part}-*.jsonl")):
            mark = zlib.crc32(path.read_bytes(), mark)
    return mark


def _codec(path: Path) -> Snac:
    """A trained codec: what `nano.codec` wrote, or a release's."""
    if path.is_dir():
        return checkpoint.open_release(path).load_codec()
    from nano import codec

    return codec.read(path)


def main(
    codec: Annotated[Path, typer.Option(help="codec.safetensors as trained, or a release folder")] = Path(
        "build/nano/codec/codec.safetensors"
    ),
    corpora: Annotated[Path, typer.Option(help="Folder of the recordings")] = synthesize.FOLDER,
    out: Annotated[Path, typer.Option(help="Folder to write")] = FOLDER,
) -> None:
    """Write the records that training and evaluation read."""
    try:
        decode_text = write(corpora, out, _codec(codec))
    except (synthesize.SynthesisError, RecordError, CheckpointError) as error:
        typer.echo(f"nano.records: {error}", err=True)
        raise typer.Exit(2) from None
    for name, count in decode_text.items():
        typer.echo(f"{name}: {count} exchanges")


if __name__ == "__main__":
    typer.run(main)
