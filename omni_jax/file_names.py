"""File names made from ids, which may contain anything."""

from __future__ import annotations

import hashlib
import re
import unicodedata


def safe_file_name(id: str, *, force_hash: bool = False) -> str:
    """An id as a file name: letters, digits and `._-`, at most 100 characters and 200 bytes, not hidden.

    Args:
        id: any text.
        force_hash: append a hash of the id even where nothing had to be replaced, as a file system that ignores case
            may have the name already.

    Returns:
        The id itself if it is such a name; otherwise its characters with a hash of the id, so that two ids never get
        the same name.
    """
    safe = re.sub(r"[^\w.-]", "_", unicodedata.normalize("NFC", id)).lstrip(".")[:100]
    # 100 characters may take more bytes than a file system allows.
    while len(safe.encode()) > 200:
        safe = safe[:-1]
    if safe == id and not force_hash:
        return safe
    return f"{safe}-{hashlib.sha256(id.encode(errors='surrogatepass')).hexdigest()[:8]}"
