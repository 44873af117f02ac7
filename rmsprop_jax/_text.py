"""Lists in error messages."""

import collections
from collections.abc import Iterable
from typing import Any


__all__ = ["listed", "repeated"]


def listed(items: Iterable[Any], separator: str = ", ", limit: int = 8) -> str:
    """The first items, and how many more there are."""
    items = [str(item) for item in items]
    more = f"{separator}and {len(items) - limit} more" if len(items) > limit else ""
    return separator.join(items[:limit]) + more


def repeated(items: Iterable[Any]) -> list[Any]:
    """The items that occur more than once."""
    return [item for item, times in collections.Counter(items).items() if times > 1]
