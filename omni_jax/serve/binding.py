"""Sockets that are bound before the model is loaded: a taken port is reported at once."""

from __future__ import annotations

import contextlib
import errno
import socket
import struct
from collections.abc import Callable, Iterator
from typing import Any

from omni_jax.errors import ConfigError

MAX_REFUSALS = 500
"""Connections that are closed in a row before other things have their turn."""
NO_ADDRESS = (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT)


class AdmittingSocket(socket.socket):
    """A socket that closes at once what is not to be admitted: no more than that keeps up with a flood.

    Attributes:
        admit: whether a connection from an address and port may be open.
    """

    admit: Callable[[Any], bool] = staticmethod(lambda _: True)

    def accept(self) -> tuple[socket.socket, Any]:
        """The next connection that is admitted.

        Raises:
            BlockingIOError: there is none now.
        """
        for _ in range(MAX_REFUSALS):
            connection, address = super().accept()
            if self.admit(address):
                return connection, address
            # Without the states of an orderly end.
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            connection.close()
        raise BlockingIOError


@contextlib.contextmanager
def bind(host: str, port: int) -> Iterator[list[socket.socket]]:
    """Bind a port at every address of a host. Connections are refused until the server runs.

    Args:
        host: a name or an address.
        port: 0 for any that is free.

    Raises:
        ConfigError: the host is unknown, or the port is taken or not allowed.
    """
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except OSError as error:
        raise ConfigError(f"--host: expected a name or an address of this machine, found {host!r}: {error}") from None
    with contextlib.ExitStack() as stack:
        sockets: list[socket.socket] = []
        for family, kind, protocol, _, address in found:
            # The same port at every address, if any will do.
            number = sockets[0].getsockname()[1] if sockets else port
            try:
                bound = stack.enter_context(AdmittingSocket(family, kind, protocol))
                # Otherwise a restart fails until the connections before it have timed out.
                bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                if family == socket.AF_INET6:
                    bound.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
                bound.bind((address[0], number, *address[2:]))
            except OSError as error:
                if error.errno in NO_ADDRESS and len(found) > 1:
                    # The name has an address of IPv6, the machine has none.
                    continue
                raise ConfigError(f"--port: expected one that is free, found {number}: {error.strerror}") from None
            sockets.append(bound)
        yield sockets
