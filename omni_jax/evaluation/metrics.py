"""Metrics of texts, with bootstrap confidence intervals.

Texts are normalized as Whisper's authors do (Radford et al. 2022, arXiv 2212.04356, appendix C): lower case, numbers as
digits, no punctuation, American spelling.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache

import numpy as np

from omni_jax.errors import MissingExtraError

NUM_RESAMPLES = 1000
CONFIDENCE = 0.95


@cache
def _normalizer() -> Callable[[str], str]:
    try:
        from whisper_normalizer.english import EnglishTextNormalizer
    except ImportError:
        raise MissingExtraError("evaluation needs whisper-normalizer", "evaluation") from None
    return EnglishTextNormalizer()


@lru_cache(maxsize=4096)
def normalize(text: str) -> str:
    """A text as it is compared.

    Raises:
        MissingExtraError: whisper-normalizer is not installed.
    """
    return " ".join(_normalizer()(text).split())


@dataclass(frozen=True)
class ErrorCount:
    """Edits between a reference and a hypothesis, and the length of the reference; in words or characters."""

    edits: int
    length: int

    def __add__(self, other: ErrorCount) -> ErrorCount:
        return ErrorCount(self.edits + other.edits, self.length + other.length)

    @property
    def rate(self) -> float:
        """Edits over length; may be more than 1."""
        return self.edits / self.length if self.length else float(bool(self.edits))


def word_errors(expected: str, found: str) -> ErrorCount:
    """Words substituted, deleted and inserted, both texts normalized.

    Raises:
        MissingExtraError: jiwer or whisper-normalizer is not installed.
    """
    return _count_errors(normalize(expected), normalize(found), words=True)


def char_errors(expected: str, found: str) -> ErrorCount:
    """As `word_errors`, in characters."""
    return _count_errors(normalize(expected), normalize(found), words=False)


def _count_errors(expected: str, found: str, *, words: bool) -> ErrorCount:
    try:
        import jiwer
    except ImportError:
        raise MissingExtraError("evaluation needs jiwer", "evaluation") from None
    if not expected:
        count = len(found.split()) if words else len(found)
        return ErrorCount(count, 0)
    process = jiwer.process_words if words else jiwer.process_characters
    out = process(expected, found)
    edits = out.substitutions + out.deletions + out.insertions
    return ErrorCount(edits, out.hits + out.substitutions + out.deletions)


def fewest_errors(expected: Sequence[str], found: str, count_errors: Callable[[str, str], ErrorCount]) -> ErrorCount:
    """Errors against the nearest of several right answers."""
    return min((count_errors(text, found) for text in expected), key=lambda errors: errors.rate)


def exact_match(expected: Sequence[str], found: str) -> float:
    """1 if the answer is one of the right answers, normalized."""
    return float(normalize(found) in {normalize(text) for text in expected})


def contains_match(expected: Sequence[str], found: str) -> float:
    """1 if the answer contains one of the right answers as whole words, normalized."""
    padded = f" {normalize(found)} "
    return float(any(f" {normalize(text)} " in padded for text in expected if normalize(text)))


def f1(expected: Sequence[str], found: str) -> float:
    """F1 of the words against the nearest right answer, as SQuAD computes it (arXiv 1606.05250)."""
    return max((_f1(_squad_words(text), _squad_words(found)) for text in expected), default=0.0)


def _squad_words(text: str) -> list[str]:
    text = "".join(character for character in text.lower() if character not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", text).split()


def _f1(expected: list[str], found: list[str]) -> float:
    if not expected or not found:
        return float(expected == found)
    common = sum((Counter(expected) & Counter(found)).values())
    return 2 * common / (len(expected) + len(found))


@dataclass(frozen=True)
class Estimate:
    """A value with its bootstrap confidence interval."""

    value: float
    low: float
    high: float
    count: int
    """Number of cases."""


def mean(values: Sequence[float], seed: int = 0) -> Estimate:
    """The mean, with a bootstrap interval (Efron 1979)."""
    return _bootstrap(np.asarray(values, float), np.ones(len(values)), seed)


def error_rate(errors: Sequence[ErrorCount], seed: int = 0) -> Estimate:
    """Edits of all cases over their length; resampled by case."""
    edits = np.array([one.edits for one in errors], float)
    return _bootstrap(edits, np.array([one.length for one in errors], float), seed)


def mean_difference(mine: Sequence[float], theirs: Sequence[float], seed: int = 0) -> Estimate:
    """The difference of two means over the same cases, with a paired bootstrap interval."""
    return mean((np.asarray(mine, float) - np.asarray(theirs, float)).tolist(), seed)


def error_rate_difference(mine: Sequence[ErrorCount], theirs: Sequence[ErrorCount], seed: int = 0) -> Estimate:
    """The difference of two error rates over the same cases, each as `error_rate` defines it; resampled by case."""
    rates = []
    for errors in (mine, theirs):
        edits, lengths = (np.array([getattr(one, name) for one in errors], float) for name in ("edits", "length"))
        rates.append(_resampled_rates(edits, lengths, seed))
    values = rates[0][1] - rates[1][1]
    return _estimate(rates[0][0] - rates[1][0], values, len(mine))


def _bootstrap(numerators: np.ndarray, denominators: np.ndarray, seed: int) -> Estimate:
    return _estimate(*_resampled_rates(numerators, denominators, seed), len(numerators))


def _resampled_rates(numerators: np.ndarray, denominators: np.ndarray, seed: int) -> tuple[float, np.ndarray]:
    """The sum of numerators over that of denominators, of all cases and of each resample."""
    count = len(numerators)
    drawn = np.random.default_rng(seed).integers(0, count, (NUM_RESAMPLES, count))
    values = numerators[drawn].sum(1) / np.maximum(denominators[drawn].sum(1), 1e-9)
    return float(numerators.sum() / max(denominators.sum(), 1e-9)), values


def _estimate(value: float, resampled: np.ndarray, count: int) -> Estimate:
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(resampled, [tail, 1 - tail])
    return Estimate(value, float(low), float(high), count)
