"""Sentences to read aloud or to write down, made from the patterns and the grammar in `facts/sentences.yaml`.

Held out are a fifth of the patterns, and a tenth of what the other patterns give. A held-out pattern is in no free
sentence either.
"""

from __future__ import annotations

import random
import re
from functools import cache

from recipes.nano.questions import (
    HELD_OUT_PHRASINGS,
    TABLES,
    Split,
    capitalize,
    hash_fraction,
    lowest_hashes,
    read_facts,
    words,
)

HELD_OUT_SENTENCES = 1 / 10
MAX_FREE_WORDS = 14
_SENTENCES = read_facts("sentences.yaml")
PATTERNS = tuple(_SENTENCES["patterns"].splitlines())
GRAMMAR = {symbol: text.splitlines() for symbol, text in _SENTENCES["grammar"].items()}
GRAMMAR["favorite"] = list(TABLES["favorites"])
HELD_OUT_PATTERNS = lowest_hashes(PATTERNS, HELD_OUT_PHRASINGS, "pattern")


def pattern_sentences(split: Split, count: int, seed: int) -> list[str]:
    """Distinct sentences of the patterns.

    Args:
        split: `train` or `held_out`; half of the held-out sentences have a held-out pattern, the others are held-out
            combinations of words in a training pattern.
        count: of the sentences.
        seed: of the choice.
    """
    rng = random.Random(f"sentences {split} {seed}")
    known = [pattern for pattern in PATTERNS if pattern not in HELD_OUT_PATTERNS]
    groups = [known] if split == "train" else [known, sorted(HELD_OUT_PATTERNS)]
    found: dict[str, None] = {}
    while len(found) < count:
        group = groups[len(found) % len(groups)]
        text = _fill(rng.choice(group), rng)
        new_words = hash_fraction("sentence", text) < HELD_OUT_SENTENCES
        if group is not known or new_words == (split == "held_out"):
            found.setdefault(text)
    return list(found)


def free_sentences(count: int, seed: int, form: str = "sentence") -> list[str]:
    """Distinct training sentences of the grammar: a model that reads only the patterns does not learn other forms.

    Args:
        count: of the sentences.
        seed: of the choice.
        form: where the grammar starts. `sentence`; `answer`: forms of answers with words that few answers have, right
            or wrong, since nine tenths of all answers are numbers; `named`: with nano's name, which only one answer
            has.
    """
    rng = random.Random(f"free {form}s {seed}")
    held_out = [
        re.compile(re.sub(r"\{(\w+)\}", lambda slot: f"({'|'.join(slots()[slot[1]])})", pattern.rstrip(".?")), re.I)
        for pattern in HELD_OUT_PATTERNS
    ]
    found: dict[str, None] = {}
    while len(found) < count:
        text = _fill(_expand(form, rng), rng)
        trained = hash_fraction("sentence", text) >= HELD_OUT_SENTENCES
        trained = trained and not any(pattern.search(text) for pattern in held_out)
        if trained and len(text.split()) <= MAX_FREE_WORDS:
            found.setdefault(text)
    return list(found)


@cache
def slots() -> dict[str, list[str]]:
    """The words of the tables by the slot of a sentence that they fit."""
    animals = [animal.split()[-1] for animal in TABLES["sounds"]]
    return {
        "animal": animals,
        "animals": [TABLES["plurals"].get(animal, animal + "s") for animal in animals],
        "thing": [thing.split()[-1] for thing in TABLES["things"]],
        "adj": TABLES["adjectives"],
        "color": sorted(set(TABLES["colors"].values())),
        "number": [words(number) for number in range(2, 101)],
        "day": TABLES["days"],
        "month": TABLES["months"],
        "country": list(TABLES["capitals"]),
        "city": list(TABLES["capitals"].values()),
        "sound": list(TABLES["sounds"].values()),
        "name": TABLES["names"],
        "unit": [unit for unit, *_ in TABLES["units"]],
        "whole": [whole for _, whole, _ in TABLES["units"]],
        "opposite": [word for pair in TABLES["opposites"].items() for word in pair],
        "creature": list(TABLES["sounds"]),
        "colored": list(TABLES["colors"]),
    }


def _expand(symbol: str, rng: random.Random) -> str:
    """A pattern of the grammar."""
    parts = rng.choice(GRAMMAR[symbol]).replace("}", "{").split("{")
    for index in range(1, len(parts), 2):
        part = parts[index]
        parts[index] = _expand(part, rng) if part in GRAMMAR else f"{{{part}}}"
    return "".join(parts)


def _fill(pattern: str, rng: random.Random) -> str:
    """A sentence of a pattern; a slot that occurs twice gets two different words."""
    left: dict[str, list[str]] = {}
    parts = []
    for index, part in enumerate(pattern.replace("}", "{").split("{")):
        if index % 2 == 0:
            parts.append(part)
            continue
        row = left.setdefault(part, list(slots()[part]))
        parts.append(row.pop(rng.randrange(len(row))))
    return capitalize(re.sub(r"\b([Aa]) (?=[aeiou])", r"\1n ", "".join(parts)))
