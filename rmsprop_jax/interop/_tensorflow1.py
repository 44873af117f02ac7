"""TensorFlow 1: slot variables, numbered in the order in which they were made."""

import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from .._rmsprop import RMSPropState
from .._text import listed
from ._arrays import mapping
from ._named import Arrays, arrays_of, Convert, ConvertBack, Entry, Optimizer, state_of


__all__ = ["from_tensorflow1", "to_tensorflow1"]

# By whether the optimizer is centered.
SUFFIXES = {False: {"nu": "", "trace": "_1"}, True: {"nu": "", "mu": "_1", "trace": "_2"}}


def from_tensorflow1(
    checkpoint: Mapping[str, Any], convert: Convert | None = None, *, count: int | None = None, name: str = "RMSProp"
) -> RMSPropState:
    """The state of `dialects.tensorflow1` from all variables of a TensorFlow 1 checkpoint::

        reader = tf.train.load_checkpoint(directory)
        checkpoint = {key: reader.get_tensor(key) for key in reader.get_variable_to_shape_map()}

    Args:
        checkpoint: arrays by name. `w/RMSProp` is the mean square and `w/RMSProp_1` the momentum or, when centered,
            `w/RMSProp_1` the mean and `w/RMSProp_2` the momentum.
        convert: from arrays by name (`"w"`) to a tree of parameters.
        count: of updates. `None` stands for the checkpoint's `global_step`. TensorFlow's optimizer does not count:
            pass the number where there is none.
        name: the optimizer's name, if it got another.

    Example:
        >>> checkpoint = {"w/RMSProp": np.ones(2), "w/RMSProp_1": np.zeros(2), "global_step": np.int64(7)}
        >>> from_tensorflow1(checkpoint).trace
        {'w': Array([0., 0.], dtype=float32)}
    """
    if not isinstance(name, str):
        raise ValueError(f"name={name!r}: allowed is the optimizer's name. TensorFlow's default is 'RMSProp'")
    matches = {key: re.fullmatch(rf"(.+)/{re.escape(name)}(|_\d+)(?::0)?", key) for key in mapping(checkpoint)}
    found = {key: match for key, match in matches.items() if match}
    if not found:
        raise ValueError(
            f"no slots of {name}, which are called */{name}, */{name}_1 and */{name}_2: {listed(checkpoint)}. If "
            "keys end in VARIABLE_VALUE, this is an object checkpoint of TensorFlow 2: use from_tensorflow2"
        )
    centered = any(match[2] == "_2" for match in found.values())
    slots = {slot: name + suffix for slot, suffix in SUFFIXES[centered].items()}
    several = {f"{name}_3": f"several optimizers called {name}"}
    optimizer = Optimizer("TensorFlow 1's RMSProp", slots, tuple(slots), several)
    entries = [Entry(name + match[2], match[1], checkpoint[key], key) for key, match in found.items()]
    stored = {key: x for key, x in checkpoint.items() if re.fullmatch(r"(.*/)?global_step(:0)?", key)}
    return state_of(optimizer, entries, convert, count, stored)


def to_tensorflow1(state: Any, convert_back: ConvertBack, name: str = "RMSProp") -> Arrays:
    """Values for the slot variables of TensorFlow 1, by their names in a checkpoint.

    Args:
        state: of `dialects.tensorflow1`.
        convert_back: from a tree of parameters to arrays by name.
        name: the optimizer's name, if it has another.
    """
    _, slots = arrays_of(state, convert_back)
    # TensorFlow has its momentum slot whether it is used or not.
    slots.setdefault("trace", {key: np.zeros_like(x) for key, x in slots["nu"].items()})
    suffixes = SUFFIXES["mu" in slots]
    return {f"{key}/{name}{suffixes[slot]}": x for slot, arrays in slots.items() for key, x in arrays.items()}
