from __future__ import annotations

import logging

from omni_jax.log import OneLineFormatter


def test_messages_take_one_line() -> None:
    name = "a.wav\nINFO: all is well\r\x1b[2J\u2028\x85"
    record = logging.LogRecord("omni_jax", logging.WARNING, "", 1, "%s: damaged", (name,), None)
    line = OneLineFormatter().format(record)
    assert line == "a.wav\\nINFO: all is well\\r\\x1b[2J\\u2028\\x85: damaged"
    try:
        raise ValueError("no")
    except ValueError as error:
        record.exc_info = (type(error), error, error.__traceback__)
    assert OneLineFormatter().format(record).splitlines()[1] == "Traceback (most recent call last):"
