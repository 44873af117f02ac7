"""Which learning rate is best, and how much it matters. Shared by training.py and reinforcement.py.

The seeds that choose a rate do not report on it: the best of several noisy results looks better than it is.
"""

import math
import time
from collections.abc import Callable, Hashable, Iterable, Iterator
from typing import Any

from report import Report


Row = dict[str, Any]


class TimeIsUp(Exception):
    """The next run would begin after the last minute. Those before it are in the file."""


class Measurements:
    """The rows of one table. Those that the file has are not measured again."""

    def __init__(self, report: Report, name: str, keys: Iterable[str], minutes: float | None = None):
        self.report, self.name, self.keys = report, name, tuple(keys)
        self.end = math.inf if minutes is None else time.monotonic() + 60 * minutes

    def rows(self) -> list[Row]:
        return self.report.rows(self.name)

    def get(self, setting: Row, measure: Callable[[], Row]) -> Row:
        """The row of this setting: from the file, or measured now and added to it."""
        for row in self.rows():
            if all(row[key] == setting[key] for key in self.keys):
                return row
        if time.monotonic() > self.end:
            raise TimeIsUp
        row = setting | measure()
        self.report.append(self.name, row)
        return row


def grid(center: float, count: int = 5) -> list[float]:
    """Rates around the center, with a factor of √10 between them."""
    return [rounded(center * 10 ** (i / 2)) for i in range(-(count // 2), (count + 1) // 2)]


def rounded(rate: float) -> float:
    """Two digits, so that a rate is the same number in every file and table."""
    return float(f"{rate:.2g}")


def search(rates: Iterable[float], cost: Callable[[float], float], most: int = 8) -> dict[float, float]:
    """The cost at each rate, in order. While the cheapest is at an end, a rate is added there, up to `most`."""
    costs = {rate: cost(rate) for rate in rates}
    while len(costs) < most:
        best, low, high = cheapest(costs), min(costs), max(costs)
        if best not in (low, high):
            break
        rate = rounded(best * 10 ** (0.5 if best == high else -0.5))
        costs[rate] = cost(rate)
    return dict(sorted(costs.items()))


def cheapest(costs: dict[float, float]) -> float:
    return min(costs, key=lambda rate: math.inf if math.isnan(costs[rate]) else costs[rate])


def groups(rows: Iterable[Row], keys: Iterable[str]) -> Iterator[tuple[tuple[Hashable, ...], list[Row]]]:
    """Rows that agree in these keys, in the order of their first."""
    keys = tuple(keys)
    found: dict[tuple[Hashable, ...], list[Row]] = {}
    for row in rows:
        found.setdefault(tuple(row[key] for key in keys), []).append(row)
    yield from found.items()
