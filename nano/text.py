"""Writes what nano's trunk learns from before it hears or says a word: a tokenizer and questions in writing.

    python -m nano.text                             # writes build/nano/tokenizer and build/nano/text

Folders of records, under build/nano/text:

    numbers     every training question for a sum or a difference, and its answer
    products    every training question for a product, too few to be met often among those
    larger_products  those for larger ones, which nobody asks for: `facts.larger_products`
    further_counts   those to count numbers that nobody asks for: `facts.further_counts`
    knowledge   those about anything else in the world
    smalltalk   those about nano itself, greetings, thanks and the like, too few as well
    repeat      training questions and sentences that are asked to be said again, word for word
    held_out    questions never trained on, a thousand of them

Questions of training also come in the further phrasings.

What a published model brings along, the skill of repeating what it was told, has to be learned here: transcribing and
reading aloud build on it.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated

import tokenizers
import typer
from tokenizers import Tokenizer

from nano import facts
from nano.records import renew, texts_mark
from omni_jax.checkpoint.release import TOKENIZER_FILES
from omni_jax.config.model import PRESETS
from omni_jax.data.records import Exchange

FOLDER = Path("build/nano/text")
TOKENIZER = Path("build/nano/tokenizer")
NUMBERS = ("sum", "difference", "product")
SMALLTALK = tuple(kind.name for kind in facts.KINDS.values() if len(kind.facts) <= 10)
"""Kinds with so few facts that among the others they would hardly be met."""
SENTENCES = 20_000
HELD_OUT = 1000
REPEAT = ("say: {}", "repeat: {}", "say again: {}", "repeat after me: {}", "please say: {}", "please repeat: {}")


def corpus() -> list[str]:
    """Training texts in which the words are about as often as nano hears and says them."""
    items = facts.sample("train", 30_000, 0)
    return [*(item.question for item in items), *(item.answer for item in items), *facts.sentences("train", 10_000, 0)]


def train_tokenizer(texts: Iterable[str], size: int) -> Tokenizer:
    """A byte-level BPE of at most `size` tokens: any text can be written in it.

    Args:
        texts: to learn from.
        size: of the vocabulary, 256 or more.
    """
    tokenizer = Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=size, initial_alphabet=sorted(alphabet), show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, folder: Path) -> list[Path]:
    """Write a tokenizer as a release has it; the files."""
    folder.mkdir(parents=True, exist_ok=True)
    files = [folder / name for name in TOKENIZER_FILES]
    tokenizer.save(str(files[0]))
    files[1].write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}) + "\n", encoding="utf-8")
    return files


def repeated(sentences: int, seed: int = 0) -> Iterator[Exchange]:
    """Training questions about anything but two numbers, some that are, and sentences, asked to be said again."""
    rng = random.Random(f"repeat {seed}")
    texts = [item.question for item in questions(set(facts.KINDS) - set(NUMBERS))]
    texts += [item.question for item in facts.sample("train", sentences, seed)]
    texts += facts.sentences("train", sentences, seed)
    for text in rng.sample(texts, len(texts)):
        asked = rng.choice(REPEAT).format(text)
        yield Exchange(asked[0].upper() + asked[1:], None, text, source="nano repeat")


def questions(kinds: Iterable[str]) -> list[facts.Item]:
    """Those of training, however they are phrased."""
    return facts.questions("train", kinds, further=True)


def exchanges(items: Iterable[facts.Item]) -> Iterator[Exchange]:
    """Questions in writing and their answers; the source says the kind and why it is held out, if it is."""
    for item in items:
        yield Exchange(item.question, None, item.answer, source=f"nano {item.kind} {item.held_out}".strip())


def write(out: Path, *, sentences: int = SENTENCES, held_out: int = HELD_OUT) -> dict[str, int]:
    """Write every folder of records that is not there yet, not whole, or of other texts.

    Args:
        out: folder of the folders.
        sentences: of those to be said again, and as many sampled questions.
        held_out: questions.

    Returns:
        How many exchanges went into each folder written now.
    """
    folders = {
        "numbers": exchanges(questions(["sum", "difference"])),
        "products": exchanges(questions(["product"])),
        "larger_products": exchanges(facts.larger_products()),
        "further_counts": exchanges(facts.further_counts()),
        "knowledge": exchanges(questions(set(facts.KINDS) - {*NUMBERS, *SMALLTALK})),
        "smalltalk": exchanges(questions(SMALLTALK)),
        "repeat": repeated(sentences),
        "held_out": exchanges(facts.sample("held_out", held_out, 0)),
    }
    decode_text = {}
    for name, texts in folders.items():
        made = list(texts)
        count = renew(out / name, f"texts {texts_mark(made)}", made, shard_size=100_000)
        if count is not None:
            decode_text[name] = count
    return decode_text


def main(
    out: Annotated[Path, typer.Option(help="Folder for the records")] = FOLDER,
    tokenizer: Annotated[Path, typer.Option(help="Folder for the tokenizer")] = TOKENIZER,
) -> None:
    """Write the tokenizer and the texts that nano's trunk learns from."""
    if not (tokenizer / TOKENIZER_FILES[1]).exists():
        made = train_tokenizer(corpus(), PRESETS["nano"].vocab.text)
        save_tokenizer(made, tokenizer)
        typer.echo(f"tokenizer: {made.get_vocab_size()} tokens")
    for name, count in write(out).items():
        typer.echo(f"{name}: {count} exchanges")


if __name__ == "__main__":
    typer.run(main)
