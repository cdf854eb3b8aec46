"""Short-lived keys for the Realtime API: a backend gets one for a browser, which never sees the real key."""

from __future__ import annotations

import secrets
import time

from omni_jax.errors import BusyError
from omni_jax.serve.realtime_schema import Session

MAX_SECRETS = 10_000
"""Most that are valid at a time."""
PREFIX = "ek_"
"""Of every client secret."""


class ClientSecrets:
    """The client secrets that were given out, each with the session that it begins."""

    def __init__(self) -> None:
        self._sessions: dict[str, tuple[float, Session]] = {}

    def create(self, session: Session, seconds: int) -> tuple[str, int]:
        """A new client secret and when it expires, in seconds since the epoch.

        Args:
            session: settings of the sessions that it begins.
            seconds: that it is valid for. A session that has begun goes on.

        Raises:
            BusyError: too many are valid.
        """
        now = time.time()
        self._sessions = {secret: kept for secret, kept in self._sessions.items() if kept[0] > now}
        if len(self._sessions) >= MAX_SECRETS:
            raise BusyError(f"{MAX_SECRETS} client secrets are valid, the most allowed; try again later")
        secret = PREFIX + secrets.token_urlsafe(32)
        self._sessions[secret] = (now + seconds, session)
        return secret, int(now + seconds)

    def find(self, secret: str) -> Session | None:
        """The settings of the session that a client secret begins; None if it is unknown or has expired."""
        # A table of random keys, whose timing tells nothing about a key.
        expires, session = self._sessions.get(secret, (0.0, None))
        return session if expires > time.time() else None
