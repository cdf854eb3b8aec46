"""Divides a text into pieces that a model can read aloud at once.

Numbers and abbreviations have become words before (`omni_jax.text.spoken_english`), so that a point ends a sentence: a
rule is enough.
"""

from __future__ import annotations

import itertools
import re

_END = re.compile(r"(?<=[.?!])(?<!\w\.\w\.)\s+|(?<=[.?!][\"')\]])\s+")
_BREAKS = (
    re.compile(r"(?<=[,;:])\s+"),
    re.compile(r"\s+(?=(?:and|but|or|because|when|while|if|so|that|which|who)\s)", re.IGNORECASE),
)
"""Where a sentence that is too long is divided, the best places first."""


def split_sentences(text: str, max_words: int) -> list[str]:
    """The sentences of a text; joined by spaces they are the text.

    Longer ones are divided at commas, else before conjunctions, else after equal numbers of words.
    """
    return [piece for sentence in _END.split(text) if sentence for piece in _pieces(sentence, max_words)]


def ends_sentence(piece: str) -> bool:
    """Whether a piece is the end of its sentence, which a pause follows."""
    return piece.rstrip("\"')]").endswith((".", "?", "!"))


def _pieces(sentence: str, max_words: int) -> list[str]:
    if len(sentence.split()) <= max_words:
        return [sentence]
    clauses = [sentence]
    for places in _BREAKS:
        clauses = [
            part
            for clause in clauses
            for part in (places.split(clause) if len(clause.split()) > max_words else [clause])
        ]
    pieces: list[str] = []
    clauses = [part for clause in clauses for part in _evenly(clause, max_words)]
    for clause in clauses:
        if pieces and len(f"{pieces[-1]} {clause}".split()) <= max_words:
            pieces[-1] += f" {clause}"
        else:
            pieces.append(clause)
    return pieces


def _evenly(clause: str, max_words: int) -> list[str]:
    """A clause as pieces of about as many words, at most `max_words`."""
    words = clause.split()
    count = -(-len(words) // max_words)
    bounds = [round(len(words) * number / count) for number in range(count + 1)]
    return [" ".join(words[start:end]) for start, end in itertools.pairwise(bounds)]
