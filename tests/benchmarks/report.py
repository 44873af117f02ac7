"""What the benchmarks share: the machine they ran on, Markdown tables, and JSON that is written at once."""

import datetime
import fcntl
import importlib.metadata
import importlib.util
import json
import os
import pathlib
import platform
from collections.abc import Sequence
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
    """Prints tables and writes every number to a file. What is measured stays, whatever comes after.

    `add` writes a whole table, in the place of what the file had. `rows` and `append` go on with a table that the file has, also
    while another process does.
    """

    def __init__(self, file: str | None, *packages: str):
        self.content: dict[str, Any] = {"machine": machine(*packages)}
        self.file = file
        print(f"{self.content['machine']}\n", flush=True)

    def add(self, name: str, rows: list[dict[str, Any]], *tables: list[dict[str, Any]]) -> None:
        """Keeps `rows`, and prints `tables`, by default the rows."""
        self.content[name] = rows
        self.show(*(tables or (rows,)))
        if self.file:
            pathlib.Path(self.file).write_text(to_json(self.content))

    def show(self, *tables: list[dict[str, Any]]) -> None:
        for table in filter(None, tables):
            print(markdown(table) + "\n", flush=True)

    def rows(self, name: str) -> list[dict[str, Any]]:
        """Those of the file, or without one those of this process."""
        path = pathlib.Path(self.file) if self.file else None
        content = json.loads(path.read_text()) if path and path.exists() else self.content
        return content.get(name, [])

    def append(self, name: str, row: dict[str, Any]) -> None:
        if not self.file:
            self.content.setdefault(name, []).append(row)
            return
        path = pathlib.Path(self.file).absolute()
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            fcntl.flock(folder, fcntl.LOCK_EX)
            content = json.loads(path.read_text()) if path.exists() else {}
            content["machine"] = self.content["machine"]
            content.setdefault(name, []).append(row)
            new = path.with_suffix(".new")
            new.write_text(to_json(content))
            new.replace(path)
        finally:
            os.close(folder)
