"""MindSpore: arrays whose names begin with the accumulator's name."""

from collections.abc import Mapping
from typing import Any

from .._rmsprop import RMSPropState
from ._named import by_slot, Convert, count_of, somebody_else, state_of


SLOTS = {"nu": "mean_square", "mu": "mean_grad", "trace": "moment"}
OTHERS = {
    "moment1": "Adam or one of its kin",
    "stat": "SGD",
    "moments": "Momentum",
    "accum": "Adagrad or Adadelta",
}


def from_mindspore(arrays: Mapping[str, Any], convert: Convert | None = None, count: int | None = None) -> RMSPropState:
    """The state of `dialects.mindspore` from a `.ckpt` file::

        arrays = mindspore.load_checkpoint("net.ckpt")

    Weights and everything else in the file are passed over. Averages start at 1; those of old releases started at
    0. Either way they come along.

    Args:
        arrays: by name: `mean_square.fc.weight`, `moment.fc.weight` and, if centered, `mean_grad.fc.weight`.
        convert: from arrays by name (`"fc.weight"`) to a tree of parameters. `None`: the dict itself.
        count: of updates. `None` stands for the file's `global_step`.

    Returns:
        The state. MindSpore has its moment even for a momentum of zero. Without momentum, go on with
        `state._replace(trace=None)`.

    Raises:
        ValueError: names, slots or shapes do not fit; the error lists which. Or there is no count, or the arrays
            are another optimizer's.

    Example:
        >>> import numpy as np
        >>> arrays = {"mean_square.w": np.ones(2), "moment.w": np.zeros(2), "global_step": np.array([7])}
        >>> int(from_mindspore(arrays, lambda arrays: arrays["w"]).count)
        7

    References:
        mindspore/nn/optim/rmsprop.py, 2.10.0.
    """
    parts = {key: key.partition(".") for key in arrays}
    weights = {name for kind, _, name in parts.values() if kind == SLOTS["nu"]}
    if not weights:
        raise somebody_else("MindSpore's RMSProp", OTHERS, {kind for kind, *_ in parts.values()}, arrays)
    # A layer may be called "moment": its weights are no accumulators.
    found = [
        (kind, name, arrays[key])
        for key, (kind, _, name) in parts.items()
        if kind in SLOTS.values() and name in weights
    ]
    return state_of(by_slot(SLOTS, found), SLOTS, convert, count_of(count, arrays.get("global_step")))
