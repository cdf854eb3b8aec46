"""Tokenizers of a language model's folder, whole and made from older files."""

import json

import pytest
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from omni_jax.convert.tokenizer import num_text_rows, tokenizer_files
from omni_jax.errors import CheckpointError, ConversionError
from tests import models

TEXTS = [
    "What is your name?",
    "It's  12345 o'clock,\n\n  isn't it?",
    "e\u0301t\u00e9 <|endoftext|> na\u00efve \U0001f600",
]


@pytest.fixture
def old_folder(tmp_path):
    """`vocab.json`, `merges.txt` and `tokenizer_config.json`, which names an added token."""
    models.tokenizer_files(tmp_path / "whole")
    model = json.loads((tmp_path / "whole" / "tokenizer.json").read_text())["model"]
    folder = tmp_path / "lm"
    folder.mkdir()
    vocab = {token: number for token, number in model["vocab"].items() if token != "<|endoftext|>"}
    (folder / "vocab.json").write_text(json.dumps(vocab))
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n")
    return folder


def settings(folder, name):
    size = len(json.loads((folder / "vocab.json").read_text()))
    token = {"content": "<|endoftext|>", "special": True, "normalized": False}
    values = {"tokenizer_class": name, "added_tokens_decoder": {str(size): token}, "unk_token": "<|endoftext|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps({**values, "eos_token": "<|endoftext|>"}))


@pytest.mark.parametrize("name", ["Qwen2Tokenizer", "GPT2Tokenizer"])
def test_tokenizer_of_vocab_and_merges_equals_that_of_transformers(name, old_folder, tmp_path):
    settings(old_folder, name)
    found, config = tokenizer_files(old_folder, tmp_path)
    assert config == old_folder / "tokenizer_config.json"
    ours = Tokenizer.from_file(str(found))
    (old_folder / "config.json").write_text(json.dumps({"model_type": "qwen2" if "Qwen" in name else "gpt2"}))
    theirs = AutoTokenizer.from_pretrained(old_folder)
    for text in TEXTS:
        ids = ours.encode(text, add_special_tokens=False).ids
        assert ids == theirs(text, add_special_tokens=False)["input_ids"]
        assert ours.decode(ids, skip_special_tokens=False) == theirs.decode(ids)


def test_tokenizer_settings_that_are_missing_are_made(tmp_path):
    models.tokenizer_files(tmp_path / "lm")
    (tmp_path / "lm" / "tokenizer_config.json").unlink()
    (tmp_path / "made").mkdir()
    found, config = tokenizer_files(tmp_path / "lm", tmp_path / "made")
    assert found == tmp_path / "lm" / "tokenizer.json"
    assert json.loads(config.read_text()) == {"tokenizer_class": "PreTrainedTokenizerFast"}


def with_added_tokens(folder, *tokens):
    """A tokenizer of 280 tokens, and those."""
    file, _ = models.tokenizer_files(folder)
    tokenizer = Tokenizer.from_file(str(file))
    tokenizer.add_special_tokens(list(tokens))
    tokenizer.save(str(file))
    return file


def test_rows_of_a_tokenizer_that_is_larger_than_the_embedding(tmp_path, caplog):
    file = with_added_tokens(tmp_path, "<one>", "<two>")
    assert [num_text_rows(file, rows) for rows in (300, 282)] == [300, 282]
    assert caplog.text == ""
    assert num_text_rows(file, 281) == 320
    assert "has ids up to 281, and the embedding 281 rows: it grows to 320" in caplog.text
    with pytest.raises(ConversionError, match=r"whose embedding has 150 rows, found one of 282 tokens"):
        num_text_rows(file, 150)
    # Ids may have gaps: those count, not how many there are.
    values = json.loads(file.read_text())
    values["added_tokens"][-1]["id"] = 290
    values["model"]["vocab"]["<two>"] = 290
    file.write_text(json.dumps(values))
    assert num_text_rows(file, 288) == 320
    values["model"]["vocab"]["<two>"] = values["added_tokens"][-1]["id"] = 2**22
    file.write_text(json.dumps(values))
    with pytest.raises(ConversionError, match="found one of 4194305 tokens"):
        num_text_rows(file, 288)
    file.write_text("{}")
    with pytest.raises(CheckpointError, match=r"tokenizer\.json: expected a tokenizer, found"):
        num_text_rows(file, 300)


def test_tokenizer_errors(old_folder, tmp_path):
    settings(old_folder, "GPT2Tokenizer")
    values = json.loads((old_folder / "tokenizer_config.json").read_text())
    values["added_tokens_decoder"] = {"299": {"content": "<extra>"}}
    (old_folder / "tokenizer_config.json").write_text(json.dumps(values))
    with pytest.raises(ConversionError, match="added token '<extra>': expected number 279, found 299"):
        tokenizer_files(old_folder, tmp_path)
    (old_folder / "merges.txt").unlink()
    with pytest.raises(
        ConversionError, match=r"expected tokenizer\.json, or vocab\.json with merges\.txt, found neither"
    ):
        tokenizer_files(old_folder, tmp_path)
