"""TensorFlow 1: slot variables, numbered in the order in which they were made."""

import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from .._rmsprop import RMSPropState
from .._text import listed
from ._named import array, Arrays, arrays_of, Convert, ConvertBack, state_of


SUFFIXES = {"nu": "", "trace": "_1"}
SUFFIXES_CENTERED = {"nu": "", "mu": "_1", "trace": "_2"}


def from_tensorflow1(
    slots: Mapping[str, Any],
    convert: Convert | None = None,
    count: int = 0,
    name: str = "RMSProp",
) -> RMSPropState:
    """The state of `dialects.tensorflow1` from a TensorFlow 1 checkpoint.

    All variables of the checkpoint may be there: weights, moving averages and other optimizers' slots are
    passed over::

        reader = tf.train.load_checkpoint(directory)
        slots = {key: reader.get_tensor(key) for key in reader.get_variable_to_shape_map()}

    Args:
        slots: arrays by name. `w/RMSProp` is the mean square and `w/RMSProp_1` the momentum or, when centered,
            `w/RMSProp_1` the mean and `w/RMSProp_2` the momentum.
        convert: from arrays by name (`"w"`) to a tree of parameters. `None`: the dict itself.
        count: of updates, for a schedule. TensorFlow's optimizer does not count. 0 stands for the checkpoint's
            `global_step`, if it has one.
        name: the optimizer's name, if it got another.

    Returns:
        The state. TensorFlow makes the momentum slot even for a momentum of zero. Without momentum, go
        on with `state._replace(trace=None)`.

    Raises:
        ValueError: names, slots or shapes do not fit; the error lists which. Or there are no such slots, or
            several steps that differ.

    Example:
        >>> slots = {"w/RMSProp": np.ones(2), "w/RMSProp_1": np.zeros(2)}
        >>> from_tensorflow1(slots, lambda arrays: arrays).trace
        {'w': Array([0., 0.], dtype=float32)}
    """
    matches = {key: re.fullmatch(rf"(.+)/{re.escape(name)}(|_1|_2)(?::0)?", key) for key in slots}
    found = {key: match for key, match in matches.items() if match}
    if not found and any(key.endswith("/.ATTRIBUTES/VARIABLE_VALUE") for key in slots):
        raise ValueError(f"this is an object checkpoint of TensorFlow 2, which from_tensorflow2 reads: {listed(slots)}")
    if not found:
        raise ValueError(f"no slots of {name}, which are called */{name}, */{name}_1 and */{name}_2: {listed(slots)}")
    centered = any(match[2] == "_2" for match in found.values())
    suffixes = SUFFIXES_CENTERED if centered else SUFFIXES
    slot_of = {suffix: slot for slot, suffix in suffixes.items()}
    columns: dict[str, Arrays] = {slot: {} for slot in suffixes}
    for key, match in found.items():
        columns[slot_of[match[2]]][match[1]] = array(slots[key])
    foreign = {slot: name + suffix for slot, suffix in suffixes.items()}
    return state_of(columns, foreign, convert, count or _global_step(slots))


def _global_step(slots: Mapping[str, Any]) -> int:
    found = {key: int(array(x)) for key, x in slots.items() if re.fullmatch(r"(.*/)?global_step(:0)?", key)}
    if len(set(found.values())) > 1:
        raise ValueError(f"several steps, which differ: {found}. Pass the right one as count")
    return next(iter(found.values()), 0)


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
    suffixes = SUFFIXES_CENTERED if "mu" in slots else SUFFIXES
    return {f"{key}/{name}{suffixes[slot]}": x for slot, arrays in slots.items() for key, x in arrays.items()}
