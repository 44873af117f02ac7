"""MindSpore: arrays whose names begin with the accumulator's name."""

from collections.abc import Mapping
from typing import Any

from .._rmsprop import RMSPropState
from ._arrays import mapping
from ._named import Convert, Entry, Optimizer, state_of


__all__ = ["from_mindspore"]

RMSPROP = Optimizer(
    "MindSpore's RMSProp",
    {"nu": "mean_square", "mu": "mean_grad", "trace": "moment"},
    always=("nu", "trace"),
    others={
        "moment1": "Adam or a variant of it",
        "stat": "SGD",
        "moments": "Momentum",
        "accum": "Adagrad or Adadelta",
    },
)


def from_mindspore(
    checkpoint: Mapping[str, Any], convert: Convert | None = None, *, count: int | None = None
) -> RMSPropState:
    """The state of `dialects.mindspore` from a `.ckpt` file::

        checkpoint = mindspore.load_checkpoint("net.ckpt")

    Averages start at 1; those of old releases started at 0. Both are read as they are.

    Args:
        checkpoint: arrays by name: `mean_square.fc.weight`, `moment.fc.weight` and, if centered,
            `mean_grad.fc.weight`.
        convert: from arrays by name (`"fc.weight"`) to a tree of parameters.
        count: of updates. `None` stands for the file's `global_step`.

    Example:
        >>> import numpy as np
        >>> checkpoint = {"mean_square.w": np.ones(2), "moment.w": np.zeros(2), "global_step": np.array([7])}
        >>> int(from_mindspore(checkpoint, lambda arrays: arrays["w"]).count)
        7

    References:
        mindspore/nn/optim/rmsprop.py, 2.10.0.
    """
    parts = {key: key.partition(".") for key in mapping(checkpoint)}
    every = [Entry(kind, name, checkpoint[key], key) for key, (kind, _, name) in parts.items()]
    # A layer may be called "moment": its weights are no accumulators.
    weights = {name for kind, _, name in parts.values() if kind == RMSPROP.slots["nu"]}
    own = [x for x in every if x.slot in RMSPROP.slots.values() and x.key not in weights]
    if weights & checkpoint.keys():  # where the file has the weights, it has all of them
        own = [x for x in own if x.name in {*weights, *checkpoint}]
    stored = {key: x for key, x in checkpoint.items() if key == "global_step"}
    return state_of(RMSPROP, own or every, convert, count, stored)
