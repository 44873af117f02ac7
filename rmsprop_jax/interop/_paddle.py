"""PaddlePaddle: arrays whose names end in the accumulator's name and a number."""

import re
from collections.abc import Mapping
from typing import Any

import jax

from .._rmsprop import RMSPropState
from .._text import listed
from ._arrays import mapping
from ._named import Convert, Entry, Optimizer, state_of


__all__ = ["from_paddle"]

RMSPROP = Optimizer(
    "Paddle's RMSProp",
    {"nu": "mean_square", "mu": "mean_grad", "trace": "momentum"},
    always=("nu", "mu", "trace"),
    others={
        "moment1": "Adam or a variant of it",
        "inf_norm": "Adamax",
        "moment": "Adagrad",
        "velocity": "Momentum",
        "_avg_squared_grad": "Adadelta",
    },
)

# The last is a table of names, which `paddle.load` leaves out and `pickle.load` does not.
PASSED_OVER = ("LR_Scheduler", "master_weights", "StructuredToParameterName@@")

# With master weights an accumulator has the name of the copy in float32.
_NAME = re.compile(rf"(.+?)(?:_fp32_master_\d+)?_({'|'.join([*RMSPROP.slots.values(), *RMSPROP.others])})_\d+")


def from_paddle(
    checkpoint: Mapping[str, Any],
    convert: Convert | None = None,
    *,
    count: int | None = None,
    names: Mapping[str, str] | None = None,
) -> RMSPropState:
    """The state of `dialects.paddle` from a `.pdopt` file::

        checkpoint = paddle.load("net.pdopt")  # or pickle.load
        names = {p.name: name for name, p in net.named_parameters()}

    Paddle makes every accumulator, used or not. A mean that is zero everywhere, as without centering, is left out.

    Args:
        checkpoint: the optimizer's `state_dict()`.
        convert: from arrays by name to a tree of parameters.
        count: of updates. `None` stands for the `last_epoch` of the learning rate's scheduler, which counts the
            calls of its `step()`. Without a scheduler Paddle does not count: pass the number.
        names: from Paddle's names (`"linear_0.w_0"`) to those that `convert` knows (`"fc.weight"`). `None`: Paddle's.

    Example:
        >>> import numpy as np
        >>> checkpoint = {f"linear_0.w_0_{slot}_0": np.ones(2) for slot in ("mean_square", "mean_grad", "momentum")}
        >>> checkpoint["LR_Scheduler"] = {"last_epoch": 7, "last_lr": 0.1}
        >>> state = from_paddle(checkpoint, names={"linear_0.w_0": "fc.weight"})
        >>> int(state.count), state.trace
        (7, {'fc.weight': Array([1., 1.], dtype=float32)})

    References:
        python/paddle/optimizer/rmsprop.py, 3.3.1.
    """
    given = {key: x for key, x in mapping(checkpoint).items() if key not in PASSED_OVER}
    if bits := [key for key, x in given.items() if str(getattr(x, "dtype", "")).endswith("uint16")]:
        raise ValueError(f"{listed(bits)} is uint16, the bits of bfloat16: use paddle.load, without return_numpy")
    found = {key: match.groups() if (match := _NAME.fullmatch(key)) else ("", key) for key in given}
    way_out = "Pass {p.name: name for name, p in net.named_parameters()}"
    ours = mapping({} if names is None else names, "your names by Paddle's", "names", way_out)
    entries = [Entry(slot, ours.get(weight, weight), given[key], key) for key, (weight, slot) in found.items()]
    scheduler = mapping(checkpoint.get("LR_Scheduler") or {}, "last_epoch and more", "LR_Scheduler", "Or leave it out")
    stored = {key: x for key, x in scheduler.items() if key == "last_epoch"}
    state = state_of(RMSPROP, entries, convert, count, stored)
    return state if any(x.any() for x in jax.tree.leaves(state.mu)) else state._replace(mu=None)
