"""What the site says of a dialect beside its docstring. It comes from the code, so it cannot be out of date.

The call of `rmsprop` that the dialect stands for, a table of its arguments, and the checkpoints that can be read.
"""

import inspect
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from rmsprop_jax import dialects, interop, rmsprop


RMSPROP = inspect.signature(rmsprop).parameters
OURS = ("learning_rate", "weight_decay_mask", "state_dtype", "max_lr")  # beside the framework's own arguments
PLACES = {
    "before": "a transformation of the gradients, in front of the rule",
    "accumulate": "`optax.MultiSteps`, around the rule",
}


class Argument(NamedTuple):
    """What becomes of one of the framework's arguments."""

    name: str
    kind: str  # "honoured", "refused" or "without meaning"
    meaning: str = ""  # where it goes, or why it is refused


def arguments(dialect: Callable[..., Any]) -> Iterator[Argument]:
    """The framework's arguments, as the dialect's data have them."""
    facts = dialects.dialect_of(dialect)
    own, *others = facts.signature.parameters
    yield Argument(own, "honoured", "`learning_rate`")
    for name in others:
        if name in facts.refused:
            _, remedy = facts.refused[name]
            yield Argument(name, "refused", remedy)
        elif name in facts.inert:
            yield Argument(name, "without meaning")
        elif name not in OURS:
            places = [PLACES.get(place, f"`{place}`") for place in facts.honoured[name]]
            yield Argument(name, "honoured", ", ".join(places))


def call(dialect: Callable[..., Any]) -> str:
    """The call of `rmsprop` that a dialect stands for, without the options that have their default."""
    options = dialects.options(dialect)
    rate = options.pop("learning_rate")
    rate = "schedule" if callable(rate) else "learning_rate" if rate is None else f"{rate:g}"
    return f"rmsprop({', '.join([rate] + [f'{k}={v!r}' for k, v in options.items() if v != RMSPROP[k].default])})"


def page(dialect: Callable[..., Any]) -> Iterator[str]:
    """What a dialect's page says beside its docstring, as reStructuredText."""
    yield from ["", ".. rubric:: With its defaults it is", "", ".. code-block:: python", "", f"    {call(dialect)}", ""]
    yield from [".. rubric:: Arguments", "", ".. list-table::", "   :header-rows: 1", "   :widths: auto", ""]
    yield from cells("argument", "", "where it goes, or why it is refused")
    for name, kind, meaning in arguments(dialect):
        yield from cells(f"``{name}``", kind, meaning.replace("`", "``"))
    yield ""
    formats = [row for row in interop.table() if row["dialect"] == dialect.__name__]
    if formats:
        yield from [".. rubric:: Checkpoints", "", ".. list-table::", "   :header-rows: 1", "   :widths: auto", ""]
        yield from cells("framework", "file", "read by", "written by")
        for format in formats:
            refs = [f":func:`~rmsprop_jax.interop.{format[key]}`" if format[key] else "" for key in ("read", "write")]
            yield from cells(format["framework"], format["file"], *refs)
        yield ""


def cells(*row: str) -> Iterator[str]:
    """A row of a list-table."""
    for i, cell in enumerate(row):
        yield f"   {'* -' if i == 0 else '  -'} {cell}"
