"""Ids as file names."""

from __future__ import annotations

import hashlib
import re
import unicodedata


def safe_file_name(id: str, *, tell_apart: bool = False) -> str:
    """An id as a file name: letters, digits, `._-`, at most 100 of them, not hidden.

    Where something had to be replaced, or `tell_apart` is set, a hash of the id follows.
    """
    safe = re.sub(r"[^\w.-]", "_", unicodedata.normalize("NFC", id)).lstrip(".")[:100]
    # A name of 100 letters may take more bytes than a file system allows.
    while len(safe.encode()) > 200:
        safe = safe[:-1]
    if safe == id and not tell_apart:
        return safe
    return f"{safe}-{hashlib.sha256(id.encode(errors='surrogatepass')).hexdigest()[:8]}"
