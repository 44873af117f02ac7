"""Lists that are short enough for an error."""

from collections.abc import Iterable
from typing import Any


def listed(items: Iterable[Any], separator: str = ", ", limit: int = 8) -> str:
    """The first of the items, and how many more there are."""
    items = [str(item) for item in items]
    more = f"{separator}and {len(items) - limit} more" if len(items) > limit else ""
    return separator.join(items[:limit]) + more
