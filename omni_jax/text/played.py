"""Which part of an answer's text was played when it was interrupted."""

from __future__ import annotations

CHARACTERS_PER_SECOND = 15.0
"""Of English that is read aloud, spaces included."""


def played_text(text: str, seconds: float, duration: float | None = None) -> str:
    """The beginning of a text whose sound was played, up to the last whole word.

    The model does not say when it speaks which word: the text is taken to be spoken at an even rate.

    Args:
        text: what is being said, as far as it is known.
        seconds: how much of its sound was played.
        duration: seconds of the sound of all of `text`; None, if that is not known yet: `CHARACTERS_PER_SECOND`.
    """
    if duration is not None and seconds >= duration:
        return text
    rate = CHARACTERS_PER_SECOND if duration is None else len(text) / duration
    end = int(max(0.0, seconds) * rate)
    if end >= len(text):
        return text
    beginning = text[:end]
    if not text[end].isspace():
        # A word that was begun is left out.
        beginning = beginning[: -len(beginning.split()[-1])] if beginning and not beginning[-1].isspace() else beginning
    return beginning.rstrip()
