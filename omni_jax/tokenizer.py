"""Tokenizers: from a file, and the byte tokenizer for models that have no trained one."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from omni_jax.errors import CheckpointError
from omni_jax.input_files import read_file

if TYPE_CHECKING:
    import tokenizers

MAX_BYTES = 256 << 20
"""Largest file of a tokenizer; that of 262,144 tokens has 33 MB."""
SAMPLE = "Hello, world! 123 \u00e9\u4e16"
"""A tokenizer that cannot encode this and decode its ids is damaged."""


def load_tokenizer(file: Path) -> tokenizers.Tokenizer:
    """The tokenizer in a `tokenizer.json`.

    Raises:
        CheckpointError: the file is missing or not a tokenizer, or it does not tokenize.
    """
    data = read_file(file, CheckpointError, "a tokenizer", max_bytes=MAX_BYTES)
    import tokenizers

    try:
        tokenizer = tokenizers.Tokenizer.from_buffer(data)
        tokenizer.decode(tokenizer.encode(SAMPLE, add_special_tokens=False).ids)
    except BaseException as error:
        # tokenizers raises nothing more precise than Exception. What is a bug in Rust, such as an index that is out of
        # range, is a PanicException, which is no Exception.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise CheckpointError(f"{file}: expected a tokenizer, found {' '.join(str(error).split())[:300]}") from None
    return tokenizer


def byte_tokenizer() -> tokenizers.Tokenizer:
    """One token per byte, ids 0..255; stands in where no trained tokenizer is."""
    import tokenizers

    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    return tokenizer
