"""Downloads from the Hugging Face Hub."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from omni_jax.errors import CheckpointError


def fetch(
    source: str | Path,
    files: Sequence[str],
    what: str,
    *,
    revision: str | None = None,
    cache_dir: str | Path | None = None,
) -> Path:
    """A local folder as it is, or the snapshot of a hub repository with the given files in it.

    Args:
        source: a folder, or a hub id such as `owner/name`.
        files: names or patterns worth downloading.
        what: what the folder should be, for the error message.
        revision: branch, tag or commit of a hub repository.
        cache_dir: where downloads are kept; None: the hub client's default.

    Raises:
        CheckpointError: there is neither such a folder nor such a repository within reach.
    """
    folder = Path(source)
    if folder.is_dir():
        return folder
    expected = f"{source}: expected {what}: a folder or a hub id such as owner/name"
    if folder.exists():
        raise CheckpointError(f"{expected}; found a file")
    if not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", str(source)):
        raise CheckpointError(f"{expected}; found no such folder")
    import huggingface_hub

    try:
        return Path(
            huggingface_hub.snapshot_download(
                str(source), revision=revision, cache_dir=cache_dir, allow_patterns=list(files)
            )
        )
    # The hub's client raises a dozen kinds of error for "not there", "no network" and "not allowed".
    except (OSError, ValueError, huggingface_hub.errors.HfHubHTTPError) as error:
        reason = next(iter(str(error).splitlines()), "") or type(error).__name__
        raise CheckpointError(f"{expected}; found no such folder, and the hub says: {reason}") from None
