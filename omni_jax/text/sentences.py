"""Divides a text into pieces that a model can read aloud at once.

Numbers and abbreviations have become words before (`omni_jax.text.spoken_english`), so that a point ends a sentence: a
rule is enough.
"""

from __future__ import annotations

import re

from omni_jax.errors import ConfigError

_END = re.compile(r"(?<=[.?!])(?<!\w\.\w\.)\s+|(?<=[.?!][\"')\]])\s+")
_BREAKS = (
    re.compile(r"(?<=[,;:])\s+"),
    re.compile(r"\s+(?=(?:and|but|or|because|when|while|if|so|that|which|who)\s)", re.IGNORECASE),
)
"""Where a sentence that is too long is divided, the best places first."""


def split_sentences(text: str, max_words: int) -> list[str]:
    """The sentences of a text, long ones divided at commas and conjunctions; joined by spaces they are the text.

    Raises:
        ConfigError: more than `max_words` words have neither a comma nor a conjunction between them.
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
    for clause in clauses:
        if (count := len(clause.split())) > max_words:
            raise ConfigError(
                f"text: expected at most {max_words} words without a comma, a conjunction or the end of a sentence, "
                f"found {count}: {clause if len(clause) <= 80 else clause[:80] + '...'!r}",
                field="text",
            )
        if pieces and len(f"{pieces[-1]} {clause}".split()) <= max_words:
            pieces[-1] += f" {clause}"
        else:
            pieces.append(clause)
    return pieces
