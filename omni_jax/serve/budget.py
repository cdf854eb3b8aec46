"""How much the requests in progress may hold at once: in all, and by client."""

from __future__ import annotations

import functools
import ipaddress
import threading
from collections import Counter


@functools.lru_cache(maxsize=4096)
def client_name(address: str) -> str:
    """Whom an address is counted for: itself, or of IPv6 the network of 64 bits, which one client has to itself."""
    try:
        found = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return address
    if isinstance(found, ipaddress.IPv6Address):
        if found.ipv4_mapped is not None:
            return str(found.ipv4_mapped)
        return str(ipaddress.ip_network((found, 64), strict=False))
    return str(found)


class Budget:
    """An amount of something that is shared by all clients, of which each may take a part. For any thread.

    Attributes:
        total: the most that may be taken at once.
        per_client: the most that one client may take.
    """

    def __init__(self, total: int, per_client: int):
        self.total, self.per_client = total, per_client
        self._lock = threading.Lock()
        self._taken: Counter[str | None] = Counter()

    def left(self, client: str | None) -> int:
        """What a client may still take; None is one that stands for many, whose part is not limited."""
        with self._lock:
            left = self.total - self._taken.total()
            return left if client is None else min(left, self.per_client - self._taken[client])

    def take(self, client: str | None, amount: int) -> bool:
        """Take an amount, if it fits."""
        with self._lock:
            if self._taken.total() + amount > self.total:
                return False
            if client is not None and self._taken[client] + amount > self.per_client:
                return False
            self._taken[client] += amount
            return True

    def give_back(self, client: str | None, amount: int) -> None:
        """Give back what was taken."""
        with self._lock:
            self._taken[client] -= amount
            if not self._taken[client]:
                del self._taken[client]


class Share:
    """What one request or connection has taken of a budget; a context manager that gives it back."""

    def __init__(self, budget: Budget, client: str | None):
        self._budget, self._client, self._amount = budget, client, 0

    def take(self, amount: int) -> bool:
        """Take more, if it fits."""
        taken = self._budget.take(self._client, amount)
        self._amount += amount * taken
        return taken

    def change(self, amount: int) -> bool:
        """Take so much instead, if it fits; else what was taken stays taken."""
        before = self._amount
        self.give_back()
        fits = self.take(amount)
        if not fits:
            self.take(before)
        return fits

    def give_back(self) -> None:
        """Give all of it back."""
        amount, self._amount = self._amount, 0
        self._budget.give_back(self._client, amount)

    def __enter__(self) -> Share:
        """Itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Give all of it back."""
        self.give_back()
