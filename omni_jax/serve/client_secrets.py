"""Short-lived keys for the Realtime API: a backend gets one for a browser, which never sees the real key."""

from __future__ import annotations

import secrets
import time

from omni_jax.errors import BusyError
from omni_jax.serve.budget import Budget, Share
from omni_jax.serve.realtime_schema import Session

MAX_BYTES = 32 << 20
"""Most that all valid ones keep; those that one client has asked for, a quarter."""
SECRET_BYTES = 2048
"""What one keeps besides its settings."""
PREFIX = "ek_"
"""Of every client secret."""


class ClientSecrets:
    """The client secrets that were given out, each with the session that it begins."""

    def __init__(self) -> None:
        self._sessions: dict[str, tuple[float, Session, str | None, Share]] = {}
        self._budget = Budget(MAX_BYTES, MAX_BYTES // 4)

    def create(self, client: str | None, session: Session, seconds: int) -> tuple[str, int]:
        """A new client secret and when it expires, in seconds since the epoch.

        Args:
            client: that asks for it; see `Service.client_of`.
            session: settings of the sessions that it begins.
            seconds: that it is valid for. A session that has begun goes on.

        Raises:
            BusyError: too many are valid.
        """
        now = time.time()
        for secret in [secret for secret, (expires, *_) in self._sessions.items() if expires <= now]:
            self._sessions.pop(secret)[-1].give_back()
        share = Share(self._budget, client)
        if not share.take(SECRET_BYTES + len(session.model_dump_json())):
            raise BusyError("as many client secrets are valid as are allowed; try again later")
        secret = PREFIX + secrets.token_urlsafe(32)
        self._sessions[secret] = (now + seconds, session, client, share)
        return secret, int(now + seconds)

    def find(self, secret: str) -> tuple[Session, str | None] | None:
        """The settings of the session that a client secret begins, and who has asked for it.

        None if it is unknown or has expired.
        """
        # A table of random keys, whose timing tells nothing about a key.
        found = self._sessions.get(secret)
        return None if found is None or found[0] <= time.time() else found[1:3]
