"""What the site says of a dialect beside its docstring. It comes from the code, so it cannot be out of date.

The call of `rmsprop` that the dialect stands for, a table of its arguments, and the checkpoints that can be read.
"""

import functools
import inspect
import math
import re
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from rmsprop_jax import dialects, interop, rmsprop


RATE = 0.1
OURS = ("weight_decay_mask", "state_dtype", "max_lr")  # and learning_rate where the framework calls it lr


class Argument(NamedTuple):
    """What a dialect does with one of the framework's arguments."""

    name: str
    kind: str  # "honoured", "refused" or "without meaning"
    meaning: str = ""  # where it goes, or what the error says


# --- The arguments of a dialect ---------------------------------------------------------------------------

# What some arguments need beside them, and values for those where not any number will do.
ANNEALED = {"schedule": "linear", "warmup": 0.0, "anneal": 3000.0}
BESIDE: dict[str, dict[str, Any]] = {
    "anneal": ANNEALED,
    "corrected_weight_decay": {"weight_decay": 0.1, "decoupled_decay": True},
    "decoupled_decay": {"weight_decay": 0.1},
    "lr_in_momentum": {"momentum": 0.9},
    "schedule": ANNEALED,
    "wdregex": {"wd": 0.1},
}
VALUES = {"anneal": 2000.0, "gradient_accumulation_steps": 2, "optim_bits": 8, "schedule": "cosine", "wdregex": ".*"}


@functools.cache
def arguments(dialect: Callable[..., Any]) -> list[Argument]:
    """Tries each argument of a dialect with a value that is not its default: an error, other numbers, or the same."""
    own, *others = inspect.signature(dialect).parameters.values()
    others = [p for p in others if p.name not in OURS and p.name != "learning_rate"]
    return [Argument(own.name, "honoured", "`learning_rate`")] + [probe(dialect, p) for p in others]


def probe(dialect: Callable[..., Any], parameter: inspect.Parameter) -> Argument:
    """Calls a dialect with one more argument."""
    name, default = parameter.name, parameter.default
    context = BESIDE.get(name, {})
    given = context | {name: VALUES.get(name, not default if isinstance(default, bool) else 0.5)}
    try:
        changed = numbers(dialect, **given)
    except (TypeError, ValueError) as error:
        return Argument(name, "refused", re.sub(r"^.* is not available here: ", "", str(error)))
    place = moves(row(dialect, **context), row(dialect, **given))
    if place or changed != numbers(dialect, **context):
        return Argument(name, "honoured", place or "a transformation of the gradients, in front of the rule")
    return Argument(name, "without meaning")


def numbers(dialect: Callable[..., Any], **given: Any) -> bytes:
    """The bits of four updates."""
    tx = dialect(learning_rate=RATE, **given)
    params = {"kernel": jnp.array([[0.5, -2.0], [1.0, 0.25]])}
    state, updates = tx.init(params), []
    for step in range(4):
        grads = {"kernel": (step + 1) * params["kernel"] + 0.5}
        update, state = tx.update(grads, state, params)
        updates.append(np.asarray(update["kernel"]))
    return np.stack(updates).tobytes()


def row(dialect: Callable[..., Any], **given: Any) -> Any:
    """The row of data that a dialect's call stands for."""
    parameters = inspect.signature(dialect).parameters
    defaults = {name: p.default for name, p in parameters.items() if p.default is not inspect.Parameter.empty}
    return inspect.unwrap(dialect)(**defaults | given | {next(iter(parameters)): RATE})


def moves(before: Any, after: Any) -> str:
    """Where two rows differ, apart from transformations in front of the rule."""
    if before.accumulate != after.accumulate:
        return "`optax.MultiSteps`, around the rule"
    names = [name for name in after.options if not same(before.options.get(name), after.options[name])]
    return ", ".join(f"`{name}`" for name in names)


def same(a: Any, b: Any) -> bool:
    """Whether two options are equal; schedules at some counts."""
    if callable(a) and callable(b):
        return a.__qualname__ == b.__qualname__ and all(at(a, count) == at(b, count) for count in (0, 3, 2500))
    return type(a) is type(b) and a == b


def at(function: Callable[..., Any], count: int) -> Any:
    """A schedule's value. A mask is a function of trees: it has none, and equals no other."""
    try:
        return float(function(jnp.int32(count)))
    except (AttributeError, TypeError):
        return math.nan


# --- The page --------------------------------------------------------------------


def call(dialect: Callable[..., Any]) -> str:
    """The call of `rmsprop` that a dialect stands for, without the options that have their default."""
    defaults = {name: p.default for name, p in inspect.signature(rmsprop).parameters.items()}
    options = dialects.options(dialect)
    options["decoupled"] = True if options["weight_decay"] is None else options["decoupled"]
    rate = options.pop("learning_rate")
    rate = "schedule" if callable(rate) else "learning_rate" if rate is None else f"{rate:g}"
    return f"rmsprop({', '.join([rate] + [f'{k}={v!r}' for k, v in options.items() if v != defaults[k]])})"


def page(dialect: Callable[..., Any]) -> Iterator[str]:
    """What a dialect's page says beside its docstring, as reStructuredText."""
    yield from ["", ".. rubric:: With its defaults it is", "", ".. code-block:: python", "", f"    {call(dialect)}", ""]
    yield from [".. rubric:: Arguments", "", ".. list-table::", "   :header-rows: 1", "   :widths: auto", ""]
    yield from cells("argument", "", "where it goes, or why it is refused")
    for argument in arguments(dialect):
        yield from cells(f"``{argument.name}``", argument.kind, argument.meaning.replace("`", "``"))
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
