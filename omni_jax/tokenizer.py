"""The byte tokenizer, for models that have no trained one."""

from __future__ import annotations

import tokenizers


def byte_tokenizer() -> tokenizers.Tokenizer:
    """One token per byte, ids 0..255; stands in where no trained tokenizer is."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    return tokenizer
