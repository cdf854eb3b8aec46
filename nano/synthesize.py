"""Gives nano's texts their voices: questions by many, answers and sentences by the one that nano is to have.

    python -m nano.synthesize                       # everything, into build/nano
    python -m nano.synthesize --shards 20           # twenty more shards, then stop; go on later
    python -m nano.synthesize --only answers/train

What is to be said, by whom and how, is planned first, from seeds alone. A part of the plan is cut into shards, each
one FLAC file with its recordings end to end and one file of JSON lines that tells them apart; the lines come last,
so a shard that has them is whole. Run it again after an interruption and only what is missing is made.

Needs the Debian packages espeak-ng, flite, festival and festvox-kdlpc16k, and hibari-tts and ttspico from PyPI.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import random
import zlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, replace
from functools import cache
from multiprocessing import get_context
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import soundfile
import typer
from tqdm import tqdm

from nano import facts
from omni_jax.audio import augment
from omni_jax.audio import io as audio_io
from omni_jax.data import synthesizers

FOLDER = Path("build/nano")
ANSWER_RATE = 24_000
"""Samples per second of answers and sentences, the codec's."""
MAX_QUESTION_SECONDS = 6.0
"""What the ear can hear at once."""
SHARD = 250
"""Recordings per file."""

ASKED = ("questions/train", "questions/more", "questions/phrased", "questions/recorded")
"""Parts of the plan: the spoken questions of training."""

SPEED = (0.9, 1.15)
"""Of questions; 1 is as the voice speaks by itself."""
PITCH = {"espeak": 2.0, "flite": 1.5, "hibari": 1.5}
"""Semitones up or down. The latter two are shifted, throat and all, and soon sound like nobody."""
WIDER_PITCH = {"espeak": 4.0, "flite": 3.0, "hibari": 3.0, "pico": 4.0, "festival": 1.5}
"""Of later parts, said by voices that hardly sound like themselves: so do those that training never hears."""
AUGMENTATION = augment.Augmentation(
    stretch=(0.97, 1.03),
    room_chance=0.3,
    rt60=(0.1, 0.35),
    drr_db=(6.0, 18.0),
    noise_chance=0.6,
    snr_db=(15.0, 40.0),
    band_chance=0.2,
    low_cut=(50.0, 250.0),
    high_cut=(3500.0, 7000.0),
    level=(-32.0, -16.0),
)
"""Of questions: rooms and microphones that people talk to a machine in. A small ear learns no more in an evening."""

ANSWER_VOICE = "heart"
ANSWER_LEVEL = -20.0
"""RMS of every answer, in dB of full scale."""
ANSWER_SILENCE = (0.05, 0.15)
"""Seconds before and after an answer."""
QUESTION_SILENCE = (0.1, 0.3)
"""Shortest and longest silence on each side of a question, in seconds."""

SEEN_ACCENTS = ("en-us", "en-gb", "en-gb-x-rp", "en-us-nyc", "en-gb-x-gbclan")
UNSEEN_ACCENT = "en-gb-scotland"
SEEN_VARIANTS = """
    Alex Andrea Andy Annie Denis Diogo Gene Henrique Jacky Lee Mario Michael Mike Nguyen Storm adam anika antonio boris
    caleb david ed edward f1 f2 f4 f5 gustave iven john m1 m2 m3 m4 m7 m8 marcelo max michel miguel pablo rob robert
    sandro shelby
""".split()  # noqa: SIM905 - a list of this length is easier to read so
UNSEEN_VARIANTS = "Hugo Marco belinda benjamin f3 linda m6 quincy steph steph2 steph3 travis victor".split()  # noqa: SIM905
"""espeak-ng has more: whisperers, robots, croakers, and some that an independent recognizer hardly understands."""
SEEN_FLITE = ("awb", "kal16", "slt")
UNSEEN_FLITE = ("rms",)
SEEN_PICO = ("en-GB", "en-US")
SEEN_FESTIVAL = ("ked_diphone",)
FESTIVAL = """festival --heap 1000000 -b '(voice_{voice})' "(Parameter.set 'Duration_Stretch (/ 1 {speed}))"
    '(utt.save.wave (utt.synth (Utterance Text "{text}")) "{out}" (quote riff))'"""
"""A command for `omni_jax.data.speech`; without a smaller heap it takes three times as long to start."""
ENGINES = {
    "many": {"espeak": 5, "flite": 3, "hibari": 2},
    "recorded": {"pico": 4, "flite": 3, "festival": 2, "hibari": 1},
    "unseen": {"espeak": 2, "flite": 1},
}
"""Who speaks how often. Formant voices have the numbers; those that were made from recordings sound more like people,
and an ear that has met few of them misunderstands the next."""


class SynthesisError(RuntimeError):
    """Recordings that cannot be made or read: says what was expected and what was found."""


@dataclass(frozen=True)
class Sizes:
    """How many there are of everything."""

    questions: int = 6000
    """Drawn for training; each is said `voicings` times."""
    voicings: int = 2
    more_questions: int = 18_000
    """Others, said once: whoever hears few questions learns them by heart."""
    phrased_questions: int = 24_000
    """Others, said once, in the further phrasings. What nano had only read in many ways it answered when it was asked
    in writing, and often not when it was asked aloud."""
    recorded_questions: int = 24_000
    """Others, said once, half of them in the further phrasings, by voices made from recordings. Of those there had
    been four, and two fifths of what went wrong with voices never heard was said by one of that kind."""
    held_out_seen: int = 1000
    """Held-out questions by voices that training hears."""
    held_out_unseen: int = 500
    """Held-out questions by voices that it never hears."""
    answers: int = 6000
    """Distinct training answers, those to the first questions among them; the others are part of the plan, too."""
    sentences: int = 24_000
    """To be read aloud in training. Of 3,000 a voice learns the codes by heart, and reads nothing else."""
    more_sentences: int = 60_000
    """Others: a voice is to practise, not to say again what it knows by heart."""
    free_sentences: int = 30_000
    """To be read aloud, of any form. Two dozen patterns teach to read these patterns: of 24 new sentences 17 of a
    hundred words were heard wrong where the pattern was known, and 70 where it was not."""
    more_free_sentences: int = 30_000
    """Others."""
    answer_like_sentences: int = 24_000
    """To be read aloud, full of the words that few answers have: of those about capitals, a quarter to a half of the
    words were heard wrong."""
    named_sentences: int = 2000
    """To be read aloud, with nano's name: it was heard as Nato."""
    held_out_sentences: int = 300
    dictations: int = 40_800
    """Sentences said by many voices, to be written down in training. So many, as an ear that hears few texts learns
    them by heart instead of how they sound."""
    free_dictations: int = 12_000
    """As `free_sentences`, to be written down."""
    recorded_dictations: int = 12_000
    """Others, by voices made from recordings."""
    held_out_dictations: int = 200
    """By voices that training hears; half as many again by others."""


@dataclass(frozen=True)
class Utterance:
    """Something to be said, by whom and how."""

    text: str
    kind: str
    """Of the question, or `sentence`."""
    engine: str
    voice: str
    speed: float = 1.0
    pitch: float = 0.0
    answer: str = ""
    """To the question."""
    held_out: str = ""
    """See `nano.facts.Item`."""


@dataclass(frozen=True, eq=False)
class Recording:
    """An utterance as it sounds."""

    utterance: Utterance
    audio: np.ndarray
    """int16 [samples]."""
    rate: int
    """Samples per second: 16,000 of questions, 24,000 of answers."""
    varied: dict[str, float]
    """What `omni_jax.audio.augment.augment` drew; empty for answers."""


def plan(sizes: Sizes, seed: int = 0) -> dict[str, list[Utterance]]:
    """What is to be said, by part; the part's name is the folder and the beginning of its files' names.

    questions/train, more, phrased, recorded, held_out_seen, held_out_unseen: by many voices, with the answers.
    questions/dictation_train, dictation_free, dictation_recorded, dictation_seen, dictation_unseen: sentences by many
    voices.
    answers/train, more: every training answer by nano's own voice; those to questions/train are among the former.
    answers/held_out: others that are asked for.
    answers/read_train, read_more, read_free, read_more_free, read_answer_like, read_named, read_held_out: sentences
    by it.
    """
    rng = random.Random(f"voices {seed}")
    asked = facts.sample("train", sizes.questions, seed)
    tested = {
        "held_out_seen": facts.sample("held_out", sizes.held_out_seen, seed),
        "held_out_unseen": facts.sample("held_out", sizes.held_out_unseen, seed + 1),
    }
    dictations = facts.sentences("train", sizes.dictations, seed + 1)
    unseen = sizes.held_out_dictations // 2
    tests = facts.sentences("held_out", sizes.held_out_dictations + unseen, seed + 1)

    answers = dict.fromkeys(item.answer for item in asked)
    every = dict.fromkeys(item.answer for item in facts.questions("train"))
    for answer in rng.sample(list(every), len(every)):
        if len(answers) >= sizes.answers:
            break
        answers.setdefault(answer)
    held_out = dict.fromkeys(item.answer for items in tested.values() for item in items)
    mixed = rng.sample(list(answers), len(answers))
    read = facts.sentences("train", sizes.sentences, seed)
    known = set(read)
    # Of twice as many as are wanted: some are known already.
    drawn = facts.sentences("train", 2 * sizes.more_sentences, seed + 2)
    read_more = [text for text in drawn if text not in known][: sizes.more_sentences]

    parts = {
        "questions/train": [_asked(item, rng, "many") for item in asked for _ in range(sizes.voicings)],
        "questions/held_out_seen": [_asked(item, rng, "many") for item in tested["held_out_seen"]],
        "questions/held_out_unseen": [_asked(item, rng, "unseen") for item in tested["held_out_unseen"]],
        "questions/dictation_train": [_dictated(text, rng, "many") for text in dictations],
        "questions/dictation_seen": [_dictated(text, rng, "many") for text in tests[unseen:]],
        "questions/dictation_unseen": [_dictated(text, rng, "unseen") for text in tests[:unseen]],
        "answers/train": [_own(text, "answer") for text in mixed],
        "answers/more": [_own(text, "answer") for text in every if text not in answers],
        "answers/held_out": [_own(text, "answer") for text in held_out if text not in every],
        "answers/read_train": [_own(text, "sentence") for text in read],
        "answers/read_more": [_own(text, "sentence") for text in read_more],
        "answers/read_held_out": [
            _own(text, "sentence") for text in facts.sentences("held_out", sizes.held_out_sentences, seed)
        ],
    }
    # Shuffled, so that any few shards are like all of them.
    parts["questions/train"] = rng.sample(parts["questions/train"], len(parts["questions/train"]))
    more = facts.sample("train", sizes.more_questions, seed + 2)
    parts["questions/more"] = [_asked(item, rng, "many") for item in rng.sample(more, len(more))]
    wanted = (sizes.free_sentences, sizes.free_dictations, sizes.more_free_sentences, sizes.recorded_dictations)
    free = iter(facts.free_sentences(sum(wanted), seed))
    read_free, dictated_free, more_free, dictated_recorded = (list(itertools.islice(free, count)) for count in wanted)
    parts["answers/read_free"] = [_own(text, "sentence") for text in read_free]
    parts["answers/read_more_free"] = [_own(text, "sentence") for text in more_free]
    answer_like = facts.free_sentences(sizes.answer_like_sentences, seed, "answer")
    parts["answers/read_answer_like"] = [_own(text, "sentence") for text in answer_like]
    named = facts.free_sentences(sizes.named_sentences, seed, "named")
    parts["answers/read_named"] = [_own(text, "sentence") for text in named]
    parts["questions/dictation_free"] = [_dictated(text, rng, "many") for text in dictated_free]
    phrased = facts.sample("train", sizes.phrased_questions, seed + 3, further=True)
    parts["questions/phrased"] = [_asked(item, rng, "many", WIDER_PITCH) for item in phrased]
    recorded = facts.sample("train", sizes.recorded_questions // 2, seed + 4)
    recorded += facts.sample("train", sizes.recorded_questions // 2, seed + 5, further=True)
    recorded = rng.sample(recorded, len(recorded))
    parts["questions/recorded"] = [_asked(item, rng, "recorded", WIDER_PITCH) for item in recorded]
    parts["questions/dictation_recorded"] = [
        _dictated(text, rng, "recorded", WIDER_PITCH) for text in dictated_recorded
    ]
    return parts


def recordings(folder: str | Path, part: str) -> Iterator[Recording]:
    """The finished shards of a part, in order.

    Args:
        folder: what `python -m nano.synthesize` wrote.
        part: see `plan`.

    Raises:
        SynthesisError: there is no finished shard of that part.
    """
    indices = sorted(Path(folder).glob(f"{part}-*.jsonl"))
    if not indices:
        raise SynthesisError(f"{folder}: expected recordings of {part}, found none: python -m nano.synthesize")
    for path in indices:
        audio, rate = soundfile.read(path.with_suffix(".flac"), dtype="int16")
        for line in path.read_text(encoding="utf-8").splitlines():
            entry = json.loads(line)
            if "dropped" not in entry:
                start, samples = entry.pop("start"), entry.pop("samples")
                varied = entry.pop("varied")
                yield Recording(Utterance(**entry), audio[start : start + samples], rate, varied)


def say(utterance: Utterance, seed: int, *, own: bool) -> tuple[np.ndarray, dict[str, float]]:
    """Speak, trim, vary.

    Args:
        utterance: what and how.
        seed: of the variation.
        own: nano's own voice, kept clean at `ANSWER_RATE`; else as if recorded somewhere, at 16 kHz.

    Returns:
        int16 [samples] and what was varied.

    Raises:
        omni_jax.data.speech.SpeechError: the engine fails.
    """
    samples, rate = _engine(utterance.engine).speak(utterance.text, utterance.voice, utterance.speed, utterance.pitch)
    wanted = ANSWER_RATE if own else audio_io.SAMPLE_RATE
    before, after = ANSWER_SILENCE if own else np.random.default_rng([seed, 1]).uniform(*QUESTION_SILENCE, 2)
    decibels = ANSWER_LEVEL if own else None
    samples = augment.pad_silence(samples, rate, wanted, before, after, decibels=decibels)
    varied: dict[str, float] = {}
    if not own:
        samples, varied = augment.augment(samples, wanted, [seed, 0], AUGMENTATION)
    return audio_io.to_pcm16(samples), varied


def make_shard(path: str, utterances: Sequence[Utterance], first: int) -> Counter[str]:
    """Write one shard, whole or not at all.

    Args:
        path: of the shard, without an ending.
        utterances: what is said in it.
        first: number of its first utterance in its part.

    Returns:
        How many were `made` or dropped, and why.
    """
    part = Path(path).parent.name + "/" + Path(path).name.rpartition("-")[0]
    own = part.startswith("answers/")
    rate = ANSWER_RATE if own else audio_io.SAMPLE_RATE
    pieces, lines, start, outcome = [], [], 0, Counter[str]()
    for number, utterance in enumerate(utterances, first):
        entry: dict[str, Any] = asdict(utterance)
        audio, varied = say(utterance, zlib.crc32(f"{part} {number}".encode()), own=own)
        if not own and len(audio) > MAX_QUESTION_SECONDS * rate:
            entry["dropped"] = f"{len(audio) / rate:.1f} s long"
            outcome["too long"] += 1
        else:
            entry.update(start=start, samples=len(audio), varied=varied)
            pieces.append(audio)
            start += len(audio)
            outcome["made"] += 1
        lines.append(json.dumps(entry))
    sound, index = Path(f"{path}.flac"), Path(f"{path}.jsonl")
    for file in (sound, index):
        file.unlink(missing_ok=True)
    partial = sound.with_name(f".{sound.name}.part")
    # A FLAC file without a sample could not be read again.
    samples = np.concatenate(pieces or [np.zeros(1, np.int16)])
    soundfile.write(partial, samples, rate, format="FLAC", subtype="PCM_16")
    partial.replace(sound)
    partial = index.with_name(f".{index.name}.part")
    partial.write_text("\n".join(lines) + "\n", encoding="utf-8")
    partial.replace(index)
    return outcome


def synthesize(
    folder: Path,
    parts: dict[str, list[Utterance]],
    *,
    workers: int = 2,
    shards: int | None = None,
) -> tuple[Counter[str], int]:
    """Make the shards of a plan that are missing.

    Args:
        folder: where to.
        parts: from `plan`.
        workers: processes.
        shards: stop after this many.

    Returns:
        How many recordings were made or dropped this time, and how many shards are still missing.

    Raises:
        SynthesisError: the folder holds shards of another plan.
    """
    missing: list[tuple[str, list[Utterance], int]] = []
    for name, utterances in parts.items():
        _same_plan(folder / f"{name}.plan", utterances)
        for first in range(0, len(utterances), SHARD):
            path = folder / f"{name}-{first // SHARD:05d}"
            if not path.with_name(path.name + ".jsonl").exists():
                missing.append((str(path), utterances[first : first + SHARD], first))
    now = missing[:shards]
    outcome: Counter[str] = Counter()
    # Fresh processes: a forked one would inherit the threads of whatever the caller has loaded.
    with (
        ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool,
        tqdm(total=sum(len(utterances) for _, utterances, _ in now), unit="recording", smoothing=0) as bar,
    ):
        jobs = {pool.submit(make_shard, *shard): len(shard[1]) for shard in now}
        try:
            for job in as_completed(jobs):
                outcome += job.result()
                bar.update(jobs[job])
        except BaseException:
            # Otherwise an interruption or an error would wait until all the rest is made.
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return outcome, len(missing) - len(now)


@cache
def _engine(name: str) -> synthesizers.Engine:
    return synthesizers.Command(FESTIVAL, SEEN_FESTIVAL) if name == "festival" else synthesizers.engine(name)


def _asked(item: facts.Item, rng: random.Random, voices: str, pitch: Mapping[str, float] = PITCH) -> Utterance:
    said = _voiced(item.question, item.kind, rng, voices, pitch)
    return replace(said, answer=item.answer, held_out=item.held_out)


def _dictated(text: str, rng: random.Random, voices: str, pitch: Mapping[str, float] = PITCH) -> Utterance:
    return _voiced(text, "sentence", rng, voices, pitch)


def _own(text: str, kind: str) -> Utterance:
    return Utterance(text, kind, "hibari", ANSWER_VOICE)


def _voiced(text: str, kind: str, rng: random.Random, voices: str, pitch: Mapping[str, float] = PITCH) -> Utterance:
    """By any of some voices, see `ENGINES`, at any pace and pitch."""
    engine = rng.choices([*ENGINES[voices]], [*ENGINES[voices].values()])[0]
    # Whatever is not needed is drawn all the same: so every voice is where it has been since the first plan.
    if voices == "unseen":
        accent = rng.choice((UNSEEN_ACCENT, rng.choice(SEEN_ACCENTS)))
        voice = f"{accent}+{rng.choice(UNSEEN_VARIANTS)}" if engine == "espeak" else rng.choice(UNSEEN_FLITE)
    else:
        espeak = f"{rng.choice(SEEN_ACCENTS)}+{rng.choice(SEEN_VARIANTS)}"
        flite = rng.choice(SEEN_FLITE)
        if engine in ("pico", "festival"):
            voice = rng.choice({"pico": SEEN_PICO, "festival": SEEN_FESTIVAL}[engine])
        else:
            voice = {"espeak": espeak, "flite": flite, "hibari": ANSWER_VOICE}[engine]
    speed, semitones = round(rng.uniform(*SPEED), 2), round(rng.uniform(-pitch[engine], pitch[engine]), 1)
    return Utterance(text, kind, engine, voice, speed, semitones)


def _same_plan(path: Path, utterances: Sequence[Utterance]) -> None:
    """Note what a part is made from, or see that it is what it was."""
    digest = hashlib.sha256(json.dumps([asdict(utterance) for utterance in utterances]).encode()).hexdigest()
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(digest + "\n", encoding="utf-8")
    elif path.read_text(encoding="utf-8").strip() != digest:
        raise SynthesisError(
            f"{path}: expected the plan that its recordings were begun with, found another: remove "
            f"{path.name} and {path.stem}-* there, or choose another folder"
        )


def main(
    out: Annotated[Path, typer.Option(help="Folder to write")] = FOLDER,
    workers: Annotated[int, typer.Option(help="Processes", min=1)] = 2,
    shards: Annotated[int | None, typer.Option(help="Make at most this many shards now", min=1)] = None,
    only: Annotated[list[str] | None, typer.Option(help="A part, e.g. answers/train; may be repeated")] = None,
) -> None:
    """Make all recordings that nano is taught and tested with, or those that are missing."""
    parts = plan(Sizes())
    if unknown := set(only or ()) - set(parts):
        raise typer.BadParameter(f"--only: expected some of {', '.join(parts)}, found {', '.join(sorted(unknown))}")
    try:
        outcome, left = synthesize(out, {name: parts[name] for name in only or parts}, workers=workers, shards=shards)
    except (SynthesisError, synthesizers.SpeechError) as error:
        typer.echo(f"nano.synthesize: {error}", err=True)
        raise typer.Exit(2) from None
    made = ", ".join(f"{count} {what}" for what, count in outcome.most_common()) or "nothing to do"
    typer.echo(f"{made}; {left} shards left" if left else f"{made}; complete")


if __name__ == "__main__":
    typer.run(main)
