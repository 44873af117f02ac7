"""Transformations that are equal by value: Flax keeps them as static data, where a new one compiles a step again."""

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import optax


__all__ = ["equal_by_arguments"]


def equal_by_arguments(
    tx: optax.GradientTransformationExtraArgs, arguments: tuple[Any, ...]
) -> optax.GradientTransformationExtraArgs:
    """`tx`, equal to every other transformation that the same factory made from equal arguments.

    With an argument that cannot be hashed, such as an array or a dict, it is equal to itself alone. So is
    whatever Optax makes of it: `optax.chain`, `optax.MultiSteps` and `optax.inject_hyperparams` return new functions
    in each call. `arguments` is everything on which `tx` depends, and the factory if others share its code.
    """
    try:
        hash(_key(arguments))
    except TypeError:
        return tx
    return optax.GradientTransformationExtraArgs(*(_Method(function, arguments) for function in tx))


class _Method:
    """`init` or `update`, equal to every other one that was made from the same arguments."""

    def __init__(self, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
        functools.update_wrapper(self, function)
        self._function = function
        self._key = (function.__module__, function.__qualname__, _key(arguments))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._function(*args, **kwargs)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Method) and self._key == other._key

    def __hash__(self) -> int:
        return hash(self._key)

    def __deepcopy__(self, memo: Any) -> "_Method":
        return self  # functions are not copied either


def _key(x: Any) -> Any:
    """`x` for comparisons that tell 1, 1.0 and True apart, and 0.0 and -0.0."""
    if isinstance(x, tuple):
        return (type(x), *map(_key, x))
    return (type(x), repr(x) if isinstance(x, (float, np.generic)) else x)
