"""A model that lost a layer, got one, or has another in its place, when its run is carried over."""

import jax
import numpy as np
import optax
import pytest
from golden.checkpoints import recorded
from interop_helpers import checkpoint, entry, group

from rmsprop_jax import carry_over, dialects, interop, rmsprop


BUFFERS = {"square_avg": np.full((3, 2), 2.0), "momentum_buffer": np.full((3, 2), 4.0)}
TORCH = checkpoint(
    [group([0, 1], momentum=0.9, lr_in_momentum=True)], {0: entry(1.0, **BUFFERS), 1: entry(3.0, **BUFFERS)}
)
NEW_PARAMS = {"body": np.zeros((2, 3)), "head": {"kernel": np.zeros((5, 7)), "bias": np.zeros(7)}}


def replace_head(arrays):
    """The head has another shape: its accumulators are dropped, and the new ones start afresh."""
    arrays["head.weight"] = None
    return {"body": arrays["body.weight"].T, "head": optax.MaskedNode()}


@pytest.mark.parametrize("wrap", [lambda tx: tx, lambda tx: optax.chain(optax.clip(1.0), tx)], ids=["bare", "chain"])
def test_another_layer_in_the_place_of_one(wrap):
    tx = wrap(dialects.timm(0.1, momentum=0.9))
    fresh = tx.init(NEW_PARAMS)
    read = interop.from_timm(TORCH, ["body.weight", "head.weight"], replace_head)
    state = carry_over(read, fresh)
    bare = carry_over(state, dialects.timm(0.1, momentum=0.9).init(NEW_PARAMS))
    assert (bare.nu["body"] == 2).all()
    assert (bare.trace["body"] == 4).all()
    # timm's averages start at 1.
    assert (bare.nu["head"]["kernel"] == 1).all()
    assert (bare.trace["head"]["bias"] == 0).all()
    assert bare.count == 3
    tx.update(NEW_PARAMS, state, NEW_PARAMS)


def forgets(arrays):
    return {"body": arrays["body.weight"].T, "head": optax.MaskedNode()}


def pops(arrays):
    arrays.pop("head.weight")
    return forgets(arrays)


def adds(arrays):
    arrays["another"] = arrays["body.weight"]
    return forgets(arrays)


@pytest.mark.parametrize("convert", [forgets, pops, adds])
def test_nothing_is_forgotten_in_silence(convert):
    with pytest.raises(
        ValueError,
        match=r"convert leaves out, .*\['head.weight'\]. If they are to go, say so in convert: arrays\['head.weight'\] = None",
    ):
        interop.from_timm(TORCH, ["body.weight", "head.weight"], convert)


def test_a_layer_that_is_gone():
    def nothing_new(arrays):
        arrays["head.weight"] = None
        return {"body": arrays["body.weight"].T}

    tx = dialects.timm(0.1, momentum=0.9)
    dropped = interop.from_timm(TORCH, ["body.weight", "head.weight"], nothing_new)
    with pytest.raises(ValueError, match=r"state has nothing for .*\['head'\]\['kernel'\]"):
        carry_over(dropped, tx.init(NEW_PARAMS))
    state = carry_over(dropped, tx.init({"body": NEW_PARAMS["body"]}))
    assert set(state.nu) == {"body"}


def test_a_layer_that_is_new():
    kept = recorded("mlx")["checkpoint"]["safetensors"]
    read = interop.from_mlx(kept, lambda arrays: {**arrays, "new": {"kernel": optax.MaskedNode()}})
    params = {name: np.zeros_like(x) for name, x in read.nu.items() if name != "new"} | {"new": {"kernel": np.ones(3)}}
    state = carry_over(read, rmsprop(0.1, initial_scale=0.5).init(params))
    assert (state.nu["new"]["kernel"] == 0.5).all()
    np.testing.assert_array_equal(state.nu["fc.bias"], kept["fc.bias.v"])
    assert state.count == 100


def test_a_masked_place_has_to_be_filled():
    read = interop.from_timm(TORCH, ["body.weight", "head.weight"], replace_head)
    with pytest.raises(ValueError, match=r"head"):
        jax.block_until_ready(dialects.timm(0.1, momentum=0.9).update(NEW_PARAMS, read, NEW_PARAMS))
