"""The text tokenizer of a language model's folder, as a release has it; what is missing is made from older files."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from omni_jax.checkpoint.release import TOKENIZER_FILES
from omni_jax.config.model import MAX_SIZE
from omni_jax.convert.files import CONFIG, read_json
from omni_jax.errors import ConversionError
from omni_jax.tokenizer import load_tokenizer, num_rows

logger = logging.getLogger(__name__)

VOCAB, MERGES, ADDED_TOKENS = "vocab.json", "merges.txt", "added_tokens.json"
OLD_FILES = (VOCAB, MERGES, ADDED_TOKENS)
"""What byte-level BPE tokenizers were saved as before `tokenizer.json`."""

ROWS_MULTIPLE = 64
"""What a table of text tokens grows to a multiple of, so that it divides over devices."""

_QWEN2_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""Words that Qwen2's tokenizer splits a text into; others of this kind split as GPT-2's does."""


def tokenizer_files(folder: Path, made: Path) -> list[Path]:
    """The two files of a release.

    Args:
        folder: of a language model.
        made: an existing folder for what `folder` does not have.

    Raises:
        ConversionError: there is no tokenizer that can be read.
    """
    tokenizer_json, settings = (folder / name for name in TOKENIZER_FILES)
    values = read_json(settings) if settings.is_file() else {}
    if not tokenizer_json.is_file():
        if not (folder / VOCAB).is_file() or not (folder / MERGES).is_file():
            raise ConversionError(f"{folder}: expected {tokenizer_json.name}, or {VOCAB} with {MERGES}, found neither")
        tokenizer_json = made / tokenizer_json.name
        _from_bpe(folder, values).save(str(tokenizer_json))
    if not settings.is_file():
        settings = made / settings.name
        settings.write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}), encoding="utf-8")
    return [tokenizer_json, settings]


def num_text_rows(file: Path, rows: int) -> int:
    """Rows of the text tables, without specials, that a speech model needs.

    Args:
        file: `tokenizer.json`.
        rows: that the language model's embedding has.

    Returns:
        `rows` if each id of the tokenizer has a row, else the next multiple of 64 that is enough.

    Raises:
        CheckpointError: the file is not a tokenizer.
        ConversionError: it needs more than twice the rows.
    """
    needed = num_rows(load_tokenizer(file))
    if needed <= rows:
        return rows
    grown = math.ceil(needed / ROWS_MULTIPLE) * ROWS_MULTIPLE
    if grown > min(2 * rows, MAX_SIZE):
        raise ConversionError(
            f"{file}: expected a tokenizer of the language model, whose embedding has {rows} rows, found one of "
            f"{needed} tokens; an embedding grows to twice its rows, and to {MAX_SIZE}, at most"
        )
    message = "%s has ids up to %d, and the embedding %d rows: it grows to %d; the new rows are untrained"
    logger.warning(message, file, needed - 1, rows, grown)
    return grown


def _from_bpe(folder: Path, settings: Mapping[str, Any]) -> Any:
    """A `tokenizers.Tokenizer` of the vocabulary, the merges and the tokens that were added to it."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    try:
        tokenizer = Tokenizer(models.BPE.from_file(str(folder / VOCAB), str(folder / MERGES)))
    except Exception as error:  # tokenizers raises nothing more precise
        raise ConversionError(f"{folder / VOCAB}: expected a vocabulary of {MERGES}, found {error}") from None
    tokenizer.decoder = decoders.ByteLevel()
    if _is_qwen2(folder, settings):
        tokenizer.normalizer = normalizers.NFC()
        words = pre_tokenizers.Split(Regex(_QWEN2_WORDS), "isolated")
        split = [words, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(split)
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=bool(settings.get("add_prefix_space")))
    added = {int(number): dict(token) for number, token in (settings.get("added_tokens_decoder") or {}).items()}
    if not added and (folder / ADDED_TOKENS).is_file():
        added = {
            number: {"content": text, "special": True} for text, number in read_json(folder / ADDED_TOKENS).items()
        }
    for number, token in sorted(added.items()):
        options = {name: bool(token.get(name)) for name in ("special", "lstrip", "rstrip", "single_word", "normalized")}
        tokenizer.add_tokens([AddedToken(token["content"], **options)])
        if (found := tokenizer.token_to_id(token["content"])) != number:
            raise ConversionError(
                f"{folder}: added token {token['content']!r}: expected number {found}, found {number}"
            )
    return tokenizer


def _is_qwen2(folder: Path, settings: Mapping[str, Any]) -> bool:
    name = str(settings.get("tokenizer_class") or read_json(folder / CONFIG).get("model_type"))
    return name.lower().startswith("qwen")
