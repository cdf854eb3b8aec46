"""Trains nano's tokenizer, a byte-level BPE.

python -m recipes.nano.tokenizer --out build/nano/tokenizer
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated

import tokenizers
import typer
from tokenizers import Tokenizer

from omni_jax.checkpoint.folders import new_folder
from omni_jax.checkpoint.release import TOKENIZER_FILES
from omni_jax.config.model import PRESETS
from recipes.nano.questions import sample
from recipes.nano.sentences import pattern_sentences

FOLDER = Path("build/nano/tokenizer")


def corpus() -> list[str]:
    """Training texts in which words are about as frequent as in the model's data."""
    items = sample("train", 30_000, 0)
    questions, answers = [item.question for item in items], [item.answer for item in items]
    return questions + answers + pattern_sentences("train", 10_000, 0)


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """A byte-level BPE, which can encode any text.

    Args:
        texts: to train on.
        vocab_size: at least 256; there may be fewer tokens.
    """
    tokenizer = Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=vocab_size, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def main(out: Annotated[Path, typer.Option(help="New folder of the tokenizer's files.")] = FOLDER) -> None:
    """Train the tokenizer."""
    tokenizer = train_tokenizer(corpus(), PRESETS["nano"].vocab.text)
    with new_folder(out) as folder:
        tokenizer.save(str(folder / TOKENIZER_FILES[0]))
        settings = json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}) + "\n"
        (folder / TOKENIZER_FILES[1]).write_text(settings, encoding="utf-8")
    typer.echo(f"{out}: {tokenizer.get_vocab_size()} tokens")


if __name__ == "__main__":
    typer.run(main)
