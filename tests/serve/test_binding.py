from __future__ import annotations

import socket

import pytest

from omni_jax.errors import ConfigError
from omni_jax.serve.binding import bind


def test_bind_takes_one_port_at_every_address() -> None:
    with bind("localhost", 0) as sockets:
        ports = {found.getsockname()[1] for found in sockets}
        assert len(ports) == 1
        # Nothing is accepted before the server runs.
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", ports.pop()), timeout=5)


def test_bind_refuses_a_taken_port() -> None:
    with bind("127.0.0.1", 0) as sockets:
        sockets[0].listen()
        port = sockets[0].getsockname()[1]
        with (
            pytest.raises(ConfigError, match=f"^--port: expected one that is free, found {port}: "),
            bind("127.0.0.1", port),
        ):
            pass
    with bind("127.0.0.1", port):
        pass
