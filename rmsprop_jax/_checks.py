"""Checks of arguments: flags, numbers, schedules and counts.

The value of a `jax.Array` is not looked at, because it may be traced. Only a count must be known.
"""

import math
import numbers
import reprlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer


__all__ = ["COUNTS", "count", "flag", "is_traced", "limit", "number", "off", "positive", "refuse", "schedule", "share"]

COUNTS = "a whole number from {} to 2147483647"  # from which limit, for errors


def number(name: str, value: Any, lower: float = 0.0, upper: float = math.inf) -> Any:
    """Checks a number in [lower, upper]."""
    if isinstance(value, (jax.Array, np.ndarray, np.generic)):
        if value.shape != ():
            raise ValueError(f"{name} has shape {value.shape}: allowed is a scalar. For several, use jax.vmap")
        if not (jnp.issubdtype(value.dtype, jnp.floating) or jnp.issubdtype(value.dtype, jnp.integer)):
            raise TypeError(f"{name} has dtype {value.dtype}: allowed is a real number")
        if isinstance(value, jax.Array):
            return value
    elif not isinstance(value, numbers.Real) or isinstance(value, bool):
        raise TypeError(f"{name}={value!r} has type {type(value).__name__}: allowed is a number or a scalar array")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    limits = f" in [{lower:g}, {upper:g}]" if upper < math.inf else f" of at least {lower:g}" * (lower > -math.inf)
    if not (lower <= number <= upper and abs(number) <= float(np.finfo(np.float32).max)):
        raise ValueError(f"{name}={reprlib.repr(value)}: allowed is a finite number{limits} that float32 can hold")
    return number


def share(name: str, value: Any) -> Any:
    """Checks a number in [0, 1]."""
    return number(name, value, upper=1.0)


def schedule(name: str, value: Any, lower: float = 0.0) -> Callable[[jax.Array], Any]:
    """A function of the count. A number is checked at once, and a schedule's where it is called; None is off."""
    if callable(value):
        return lambda count: number(f"{name}(count)", value(count), lower=lower)
    constant = None if value is None else number(name, value, lower=lower)
    return lambda count: constant


def is_traced(value: Any) -> bool:
    """Whether the value may be traced."""
    return isinstance(value, jax.Array)


def _plain(value: Any) -> Any:
    """NumPy's scalars and 0-d arrays as Python's."""
    return value.item() if isinstance(value, (np.generic, np.ndarray)) and value.shape == () else value


def _equals(value: Any, number: Any) -> bool:
    value = _plain(value)
    return not isinstance(value, np.ndarray) and bool(value == _plain(number))


def off(value: Any) -> Any:
    """`value`, or None if it is 0, with which frameworks switch an option off."""
    return None if value is None or (not is_traced(value) and _equals(value, 0)) else value


def flag(name: str, value: Any) -> bool:
    if not isinstance(_plain(value), bool):
        way_out = ". With optax.inject_hyperparams, name it in static_args" if is_traced(value) else ""
        raise TypeError(f"{name}={value!r} has type {type(value).__name__}: allowed are True and False{way_out}")
    return _plain(value)


def positive(name: str, value: Any) -> Any:
    """Checks a number to divide by."""
    value = number(name, value, lower=-math.inf)
    if not is_traced(value) and value < np.finfo(np.float32).tiny:
        raise ValueError(f"{name}={value!r}: allowed is a number above 0 (float32 cannot divide by less than 1.2e-38)")
    return value


def limit(name: str, value: Any, lower: float = 0.0) -> Any:
    """Checks the limit of a clip. 0 or less switches the clip off: the limit becomes None, or inf if it is traced."""
    if value is None:
        return None
    value = number(name, value, lower=lower)
    if is_traced(value):
        return jnp.where(value > 0, value, jnp.inf)
    return value if value > 0 else None


def count(name: str, value: Any, lower: int = 0) -> int:
    """Checks an integer that decides what is computed, so it must be known outside of jax.jit.

    Whole numbers in 0-d arrays of any real dtype are integers: PyTorch counts in float32.
    """
    if isinstance(value, Tracer):
        raise TypeError(f"{name} is traced: make it static. With optax.inject_hyperparams, name it in static_args")
    number = _plain(np.asarray(value) if isinstance(value, jax.Array) else value)
    whole = isinstance(number, int) or (isinstance(number, float) and value is not number and number.is_integer())
    if not whole or isinstance(number, bool) or not lower <= number <= np.iinfo(np.int32).max:
        raise ValueError(f"{name}={reprlib.repr(value)}: allowed is {COUNTS.format(lower)}")
    return int(number)


def refuse(name: str, value: Any, neutral: Any, remedy: str, other: str | None = None) -> None:
    """Raises unless the value is None or `neutral`, which is that of the argument `other` if there is one.

    A value that may be traced cannot be compared.
    """
    if value is None or value is neutral:
        return
    compared = {name: value} if other is None else {name: value, other: neutral}
    if traced := [argument for argument, x in compared.items() if is_traced(x)]:
        raise ValueError(
            f"{traced[0]} is a JAX array, but the argument {name} is not available here: {remedy}. "
            f"optax.inject_hyperparams makes arrays of all numbers: name {' and '.join(compared)} in static_args"
        )
    if not _equals(value, neutral):
        raise ValueError(f"{name}={value!r} is not available here: {remedy}")
