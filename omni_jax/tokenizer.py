"""Tokenizers: from a file, and the byte tokenizer for models that have no trained one."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omni_jax.errors import CheckpointError
from omni_jax.input_files import read_file

if TYPE_CHECKING:
    import tokenizers

MAX_BYTES = 256 << 20
"""Largest file of a tokenizer; that of 262,144 tokens has 33 MB."""
MAX_GROWTH = 1000
"""Most times that a tokenizer may make a text longer. A few replacements in a row make one of a word a billion."""
SAMPLE = "Hello, world! 123 \u00e9\u4e16"
"""A tokenizer that cannot encode this and decode its ids is damaged."""


def load_tokenizer(file: Path) -> tokenizers.Tokenizer:
    """The tokenizer in a `tokenizer.json`.

    Raises:
        CheckpointError: the file is missing or not a tokenizer, or it does not tokenize.
    """
    data = read_file(file, CheckpointError, "a tokenizer", max_bytes=MAX_BYTES)
    import tokenizers

    with _panics_as_errors(f"{file}: expected a tokenizer, found"):
        tokenizer = tokenizers.Tokenizer.from_buffer(data)
        # Prompts are checked and padded elsewhere; a tokenizer that pads to a billion ends the process.
        tokenizer.no_truncation()
        tokenizer.no_padding()
    for name in ("normalizer", "decoder"):
        component = getattr(tokenizer, name)
        growth = 1.0 if component is None else _growth(json.loads(component.__getstate__()))
        if growth > MAX_GROWTH:
            expected = f"expected texts that become at most {MAX_GROWTH} times as long"
            raise CheckpointError(f"{file}: {name}: {expected}, found {growth:.3g} times")
    tokenizer.decode(encode_text(tokenizer, SAMPLE, name=str(file)))
    return tokenizer


def num_rows(tokenizer: tokenizers.Tokenizer) -> int:
    """Rows that a table needs for all ids of a tokenizer, which may have gaps."""
    return 1 + max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1)


def _growth(component: dict[str, Any]) -> float:
    """How many times as long a normalizer or a decoder, as it is in the file, may make a text of one character."""
    growth = 1.0
    for part in component.get("normalizers") or component.get("decoders") or ():
        growth = min(growth * _growth(part), 1e300)
    pattern, content = component.get("pattern"), component.get("content")
    if isinstance(pattern, dict) and isinstance(content, str):
        # A regular expression may match nothing, between any two characters.
        length = len(pattern.get("String") or "")
        growth *= max(1.0, len(content) / length if length else 1 + len(content))
    return growth + len(component.get("prepend") or "")


def encode_text(tokenizer: tokenizers.Tokenizer, text: str, *, name: str = "tokenizer") -> list[int]:
    """The ids of a text, without special tokens.

    Args:
        tokenizer: of a release, which may come from anywhere.
        text: any text.
        name: of the tokenizer, in the message.

    Raises:
        CheckpointError: the tokenizer is damaged.
    """
    with _panics_as_errors(f"{name}: expected a tokenizer that takes {text[:40]!r}, found"):
        return tokenizer.encode(text, add_special_tokens=False).ids


@contextmanager
def _panics_as_errors(message: str) -> Iterator[None]:
    """Turn what tokenizers raises into a `CheckpointError`.

    It raises nothing more precise than Exception. A bug in Rust, such as an index out of range, is a PanicException,
    which is no Exception: it would end a thread that serves other requests.
    """
    try:
        yield
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise CheckpointError(f"{message} {' '.join(str(error).split())[:300]}") from None


def byte_tokenizer() -> tokenizers.Tokenizer:
    """One token per byte, ids 0..255; stands in where no trained tokenizer is."""
    import tokenizers

    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    return tokenizer
