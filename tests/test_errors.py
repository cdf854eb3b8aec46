"""Errors keep their type, message and fields when they are copied or sent to another process."""

from __future__ import annotations

import copy
import pickle

import pytest

from omni_jax.errors import AudioTooLongError, ConfigError, MissingExtraError, OmniError, RecordError

ERRORS = [
    RecordError("damaged"),
    ConfigError("wrong", field="data.sources"),
    AudioTooLongError("too long", max_seconds=3.0),
    MissingExtraError("no parser", "data"),
    MissingExtraError("no voice", package="hibari-tts"),
]


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: str(error))
def test_errors_survive_copy_and_pickle(error: OmniError) -> None:
    for found in (copy.copy(error), pickle.loads(pickle.dumps(error))):
        assert type(found) is type(error)
        assert str(found) == str(error)
        assert vars(found) == vars(error)


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: str(error))
def test_prefixed_error_keeps_its_fields(error: OmniError) -> None:
    message = str(error)
    found = error.prefixed("line 3")
    assert type(found) is type(error)
    assert (str(found), str(error)) == (f"line 3: {message}", message)
    assert vars(found) == vars(error)


def test_missing_extra_has_the_command_that_installs_it() -> None:
    assert str(MissingExtraError("no parser", "data")) == "no parser: pip install 'omni-jax[data]'"
    assert str(MissingExtraError("no voice", package="hibari-tts")) == "no voice: pip install hibari-tts"
