"""Small checkpoints for the tests of `interop`, and where the arrays of a tree lie."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

from rmsprop_jax import interop


def group(keys, **options):
    return {
        "lr": 0.1,
        "momentum": 0,
        "alpha": 0.99,
        "eps": 1e-8,
        "centered": False,
        "weight_decay": 0,
        "params": keys,
    } | options


def entry(value, **slots):
    return {"step": np.float32(3), "square_avg": np.full(2, value)} | slots


def checkpoint(groups, entries):
    return {"param_groups": groups, "state": entries}


def buffers(*trees):
    """The address of each array's memory, on each of its devices."""
    arrays = [x for x in jax.tree.leaves(trees) if isinstance(x, jax.Array) and x.size]
    return [shard.data.unsafe_buffer_pointer() for x in arrays for shard in x.addressable_shards]


def assert_own_buffers(result, *sources):
    """No two arrays of a result share memory, and none shares it with what the result was made from."""
    mine = buffers(result)
    assert len(set(mine)) == len(mine)
    assert not set(mine) & set(buffers(*sources))


class Reader(NamedTuple):
    """A reader, and what makes a checkpoint of one weight "w" for it."""

    read: Callable[..., Any]
    make: Callable[[Any, Any, Any], Any]  # of the average, the momentum and the count


def of_torch(**options):
    groups = [group([0], momentum=0.9, **options)]
    return lambda nu, trace, count: checkpoint(groups, {0: {"step": count, "square_avg": nu, "momentum_buffer": trace}})


VALUE = "/.ATTRIBUTES/VARIABLE_VALUE"
SLOT = "w/.OPTIMIZER_SLOT/optimizer/"


def names_w(read):
    return lambda checkpoint, convert=None, **options: read(checkpoint, ["w"], convert, **options)


READERS = {
    "pytorch": Reader(names_w(interop.from_pytorch), of_torch(foreach=None)),
    "timm": Reader(names_w(interop.from_timm), of_torch(lr_in_momentum=True)),
    "stable_baselines3": Reader(names_w(interop.from_stable_baselines3), of_torch()),
    "bitsandbytes": Reader(
        names_w(interop.from_bitsandbytes),
        lambda nu, trace, count: checkpoint(
            [{"params": [0], "betas": (0.99, 0), "eps": 1e-8}], {0: {"step": count, "state1": nu}}
        ),
    ),
    "keras": Reader(
        interop.from_keras,
        lambda nu, trace, count: [
            ("rmsprop/iteration", count),
            ("rmsprop/w_velocity", nu),
            ("rmsprop/w_momentum", trace),
        ],
    ),
    "tensorflow1": Reader(
        interop.from_tensorflow1, lambda nu, trace, count: {"w/RMSProp": nu, "w/RMSProp_1": trace, "global_step": count}
    ),
    "tensorflow2": Reader(
        interop.from_tensorflow2,
        lambda nu, trace, count: {
            SLOT + "rms" + VALUE: nu,
            SLOT + "momentum" + VALUE: trace,
            "optimizer/iter" + VALUE: count,
        },
    ),
    "paddle": Reader(
        interop.from_paddle,
        lambda nu, trace, count: {
            "w_mean_square_0": nu,
            "w_mean_grad_0": np.zeros(2),
            "w_momentum_0": trace,
            "LR_Scheduler": {"last_epoch": count},
        },
    ),
    "mindspore": Reader(
        interop.from_mindspore, lambda nu, trace, count: {"mean_square.w": nu, "moment.w": trace, "global_step": count}
    ),
    "mlx": Reader(interop.from_mlx, lambda nu, trace, count: {"w.v": nu, "step": count}),
}
WITH_MOMENTUM = [name for name in READERS if name not in ("bitsandbytes", "mlx")]
