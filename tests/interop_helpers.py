"""Small states for the tests of `interop`: a checkpoint of PyTorch's, and where the arrays of a tree lie."""

import jax
import numpy as np


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
