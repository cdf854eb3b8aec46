"""How right, how intelligible, how fast; each with an interval that says how sure.

Texts are compared as Whisper's authors compare them (Radford et al. 2022, arXiv 2212.04356, appendix C): lower case,
numbers as digits, no punctuation, British and American spelling alike.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np

from omni_jax.errors import ConfigError

RESAMPLES = 1000
CONFIDENCE = 0.95


def _missing(name: str) -> ConfigError:
    return ConfigError(f"evaluation takes {name}: pip install 'omni-jax[evaluation]'")


@cache
def _normaliser() -> Callable[[str], str]:
    try:
        from whisper_normalizer.english import EnglishTextNormalizer
    except ImportError:
        raise _missing("whisper-normalizer") from None
    return EnglishTextNormalizer()


def normalize(text: str) -> str:
    """A text as it is compared."""
    return " ".join(_normaliser()(text).split())


@dataclass(frozen=True)
class Errors:
    """Edits between what should be said and what was, and of how many."""

    edits: int
    length: int

    def __add__(self, other: Errors) -> Errors:
        return Errors(self.edits + other.edits, self.length + other.length)

    @property
    def rate(self) -> float:
        """May be more than 1."""
        return self.edits / self.length if self.length else float(bool(self.edits))


def word_errors(expected: str, found: str) -> Errors:
    """Words substituted, deleted and inserted, both texts normalized."""
    return _errors(normalize(expected), normalize(found), words=True)


def char_errors(expected: str, found: str) -> Errors:
    """The same in letters."""
    return _errors(normalize(expected), normalize(found), words=False)


def _errors(expected: str, found: str, *, words: bool) -> Errors:
    try:
        import jiwer
    except ImportError:
        raise _missing("jiwer") from None
    if not expected:
        count = len(found.split()) if words else len(found)
        return Errors(count, 0)
    process = jiwer.process_words if words else jiwer.process_characters
    out = process(expected, found)
    edits = out.substitutions + out.deletions + out.insertions
    return Errors(edits, out.hits + out.substitutions + out.deletions)


def best(expected: Sequence[str], found: str, measure: Callable[[str, str], Errors]) -> Errors:
    """Against whichever of several right answers is nearest."""
    return min((measure(text, found) for text in expected), key=lambda errors: errors.rate)


def exact(expected: Sequence[str], found: str) -> float:
    """1 if it is one of the right answers, normalized."""
    return float(normalize(found) in {normalize(text) for text in expected})


def contains(expected: Sequence[str], found: str) -> float:
    """1 if one of the right answers stands in it, as whole words: how spoken answers in sentences are judged."""
    said = f" {normalize(found)} "
    return float(any(f" {normalize(text)} " in said for text in expected if normalize(text)))


def f1(expected: Sequence[str], found: str) -> float:
    """Words in common with the nearest right answer, as SQuAD counts them (arXiv 1606.05250)."""
    return max((_f1(_squad(text), _squad(found)) for text in expected), default=0.0)


def _squad(text: str) -> list[str]:
    text = "".join(letter for letter in text.lower() if letter not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", text).split()


def _f1(expected: list[str], found: list[str]) -> float:
    if not expected or not found:
        return float(expected == found)
    common = sum((Counter(expected) & Counter(found)).values())
    return 2 * common / (len(expected) + len(found))


@dataclass(frozen=True)
class Estimate:
    """A figure, and where it would lie in 95 of 100 samples of such cases."""

    value: float
    low: float
    high: float
    count: int
    """Cases."""


def mean(values: Sequence[float], seed: int = 0) -> Estimate:
    """The mean, with a bootstrap interval (Efron 1979)."""
    return _bootstrap(np.asarray(values, float), np.ones(len(values)), seed)


def rate(errors: Sequence[Errors], seed: int = 0) -> Estimate:
    """Edits over length, of all cases together; cases are drawn whole."""
    edits = np.array([one.edits for one in errors], float)
    return _bootstrap(edits, np.array([one.length for one in errors], float), seed)


def _bootstrap(numerators: np.ndarray, denominators: np.ndarray, seed: int) -> Estimate:
    count = len(numerators)
    value = numerators.sum() / max(denominators.sum(), 1e-9)
    rng = np.random.default_rng(seed)
    drawn = rng.integers(0, count, (RESAMPLES, count))
    values = numerators[drawn].sum(1) / np.maximum(denominators[drawn].sum(1), 1e-9)
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(values, [tail, 1 - tail])
    return Estimate(float(value), float(low), float(high), count)
