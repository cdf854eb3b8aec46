"""Which pages of the cache are free."""

from __future__ import annotations

import heapq
from collections.abc import Iterable


class PagePool:
    """The pages of each group; those with the lowest numbers are taken first, as attention reads up to the last in use.

    Attributes:
        per_group: pages of each group.
    """

    def __init__(self, groups: int, per_group: int):
        """All pages are free."""
        self.per_group = per_group
        self._free = [list(range(per_group)) for _ in range(groups)]

    @property
    def total(self) -> int:
        """Pages of all groups."""
        return len(self._free) * self.per_group

    @property
    def used(self) -> int:
        """Pages of all groups that are taken."""
        return self.total - sum(map(len, self._free))

    def free(self, group: int) -> int:
        """Pages of a group that are free."""
        return len(self._free[group])

    def take(self, group: int, count: int) -> list[int]:
        """Take free pages of a group; of all that are free, those with the lowest numbers.

        Raises:
            ValueError: there are not so many.
        """
        if count > self.free(group):
            raise ValueError(f"expected {count} free pages, found {self.free(group)}")
        return [heapq.heappop(self._free[group]) for _ in range(count)]

    def give_back(self, group: int, pages: Iterable[int]) -> None:
        """Free pages that were taken."""
        for page in pages:
            heapq.heappush(self._free[group], page)
