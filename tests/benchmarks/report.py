"""What the benchmarks share: the machine they ran on, Markdown tables, and JSON that is written at once."""

import contextlib
import datetime
import fcntl
import importlib.metadata
import importlib.util
import json
import os
import pathlib
import platform
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax


def is_here(name: str) -> bool:
    return importlib.util.find_spec(name) is not None


def machine(*packages: str) -> str:
    """The processor, versions and the date."""
    cpu = platform.processor()
    info = pathlib.Path("/proc/cpuinfo")
    if info.exists():
        cpu = next((x.partition(": ")[2] for x in info.read_text().splitlines() if x.startswith("model name")), cpu)
    device = f"{os.cpu_count()} cores of {cpu}" if jax.default_backend() == "cpu" else jax.devices()[0].device_kind
    names = [name for name in ("jax", "optax", *packages) if is_here(name)]
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in names)
    return f"{device}; {versions}; {datetime.date.today()}"


def short(value: Any) -> str:
    return "" if value is None else f"{value:.3g}" if isinstance(value, float) else str(value)


def markdown(rows: Sequence[dict[str, Any]]) -> str:
    lines = ["| " + " | ".join(rows[0]) + " |", "|---" * len(rows[0]) + "|"]
    return "\n".join([*lines, *("| " + " | ".join(short(x) for x in row.values()) + " |" for row in rows)])


def to_json(content: dict[str, Any]) -> str:
    """A line for each row."""
    parts = []
    for name, value in content.items():
        rows = "[\n" + ",\n".join(map(json.dumps, value)) + "\n]" if isinstance(value, list) else json.dumps(value)
        parts.append(f"{json.dumps(name)}: {rows}")
    return "{\n" + ",\n".join(parts) + "\n}\n"


class Report:
    """Prints tables and keeps every number: in a file if there is one, also while another process writes to it.

    What is measured stays, whatever comes after, and so do the other tables of the file.
    """

    def __init__(self, file: str | None, *packages: str):
        self.facts: dict[str, Any] = {"machine": machine(*packages)}  # about the run; each file has those of its last
        self.content: dict[str, Any] = {}
        self.path = pathlib.Path(file).absolute() if file else None
        print(f"{self.facts['machine']}\n", flush=True)

    def add(self, name: str, rows: list[dict[str, Any]], *tables: list[dict[str, Any]]) -> None:
        """Keeps `rows` as a whole table, and prints `tables`, by default the rows."""
        self._change(name, lambda _: rows)
        self.show(*(tables or (rows,)))

    def append(self, name: str, row: dict[str, Any]) -> None:
        """Adds one row to a table."""
        self._change(name, lambda rows: [*rows, row])

    def update(self, name: str, rows: list[dict[str, Any]], keys: Sequence[str]) -> None:
        """Puts `rows` in the place of those that agree with them in these keys, and the others behind all."""
        new = {tuple(row[key] for key in keys): row for row in rows}

        def change(old: list[dict[str, Any]]) -> list[dict[str, Any]]:
            kept = {tuple(row[key] for key in keys): row for row in old}
            return list((kept | new).values())

        self._change(name, change)

    def rows(self, name: str) -> list[dict[str, Any]]:
        """Those of the file, or without one those of this process."""
        return self._read().get(name, [])

    def show(self, *tables: list[dict[str, Any]]) -> None:
        for table in filter(None, tables):
            print(markdown(table) + "\n", flush=True)

    def _read(self) -> dict[str, Any]:
        return json.loads(self.path.read_text()) if self.path and self.path.exists() else self.content

    def _change(self, name: str, change: Callable[[list[dict[str, Any]]], list[dict[str, Any]]]) -> None:
        with locked(self.path):
            content = self._read() | self.facts
            content[name] = change(content.get(name, []))
            if not self.path:
                self.content = content
                return
            new = self.path.with_suffix(".new")
            new.write_text(to_json(content))
            new.replace(self.path)


@contextlib.contextmanager
def locked(path: pathlib.Path | None) -> Iterator[None]:
    """No other process changes files of the same folder."""
    if path is None:
        yield
        return
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)
        yield
    finally:
        os.close(folder)
