"""Markdown as plain text."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

from markdown_it import MarkdownIt
from markdown_it.token import Token

_PARSER = MarkdownIt("commonmark", {"maxNesting": 20}).enable(["table", "strikethrough"])
_TAG = re.compile(r"</?[A-Za-z][^<>]*>|<!--.*?-->", re.DOTALL)
_PRODUCT = re.compile(r"(?<=\d)(\s*)\*(?=\s*\d)")
"""Stars of `2*3*4` are no emphasis."""


def markdown_blocks(text: str) -> list[str]:
    """The text of each heading, paragraph, list item, table cell and block of code, without its marks.

    Of a link its text is kept, of a picture its description. Numbers of lists are kept.
    """
    return [block for block in _blocks(_PARSER.parse(_PRODUCT.sub(r"\1×", text))) if block.strip()]  # noqa: RUF001


def _blocks(tokens: Iterable[Token]) -> Iterator[str]:
    number = ""
    for token in tokens:
        if token.type == "list_item_open":
            number = f"{token.info}. " if token.info else ""
        elif token.type == "inline":
            yield number + "".join(_inline(token.children or []))
            number = ""
        elif token.type in ("code_block", "fence"):
            yield token.content
        elif token.type == "html_block":
            yield _TAG.sub(" ", token.content)


def _inline(tokens: Iterable[Token]) -> Iterator[str]:
    for token in tokens:
        if token.type == "image":
            yield from _inline(token.children or [])
        elif token.type in ("softbreak", "hardbreak"):
            yield "\n"
        elif token.type != "html_inline":
            yield token.content
