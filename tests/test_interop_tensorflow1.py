"""Slot variables of TensorFlow 1."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rmsprop_jax import interop, rmsprop


def test_a_whole_tensorflow_checkpoint():
    slots = {"w/RMSProp": np.full(2, 2.0), "w/RMSProp_1": np.full(2, 3.0)}
    beside = {
        "w": np.ones(2),
        "w/ExponentialMovingAverage": np.ones(2),
        "global_step": np.int64(40),
        "v/Adam": np.ones(2),
    }
    for count, expected in ((None, 40), (0, 0), (7, 7)):
        state = interop.from_tensorflow1(slots | beside, count=count)
        assert state.count == expected
        assert {name: float(x[0]) for name, x in (state.nu | {"b": state.trace["w"]}).items()} == {"w": 2, "b": 3}
    with pytest.raises(ValueError, match=r"no slots of RMSProp, which are called \*/RMSProp.*: w, w/Adam, w/Adam_1"):
        interop.from_tensorflow1({"w": np.ones(2), "w/Adam": np.ones(2), "w/Adam_1": np.ones(2)})


def test_tensorflow1_names():
    state = rmsprop(0.1, momentum=0.9, initial_scale=1.0).init({"w": jnp.ones(2)})
    slots = interop.to_tensorflow1(state, lambda tree: tree, name="Opt")
    assert {k: v.tolist() for k, v in slots.items()} == {"w/Opt": [1, 1], "w/Opt_1": [0, 0]}
    again = interop.from_tensorflow1(
        {k + ":0": v for k, v in slots.items()}, lambda arrays: {"w": arrays["w"]}, name="Opt", count=0
    )
    assert jax.tree.all(jax.tree.map(jnp.array_equal, again, state))
    # The slot that TensorFlow has also without momentum.
    assert set(interop.to_tensorflow1(rmsprop(0.1).init({"w": jnp.ones(2)}), lambda tree: tree)) == {
        "w/RMSProp",
        "w/RMSProp_1",
    }


def test_the_global_step_wherever_it_lies():
    slots = {"w/RMSProp": np.ones(2), "w/RMSProp_1": np.ones(2)}
    for key in ("global_step", "global_step:0", "train/global_step", "train/global_step:0"):
        assert interop.from_tensorflow1({**slots, key: np.int64(40)}).count == 40
    with pytest.raises(ValueError, match="does not say how many updates were made: pass count"):
        interop.from_tensorflow1({**slots, "global_step_of_mine": np.int64(3)})


def test_a_name_that_is_no_string():
    with pytest.raises(
        ValueError, match="name=None: allowed is the optimizer's name. TensorFlow's default is 'RMSProp'"
    ):
        interop.from_tensorflow1({"w/RMSProp": np.ones(2), "w/RMSProp_1": np.ones(2)}, count=7, name=None)


def test_two_optimizers_of_one_name():
    """TensorFlow numbers the second one's slots on: RMSProp_2 is no momentum then."""
    slots = {f"w/RMSProp{suffix}": np.ones(2) for suffix in ("", "_1", "_2", "_3")}
    with pytest.raises(ValueError, match="but of several optimizers called RMSProp: it has w/RMSProp_3"):
        interop.from_tensorflow1(slots, count=7)


def test_a_slot_that_is_there_twice():
    slots = {"w/RMSProp": np.ones(2), "w/RMSProp_1": np.ones(2), "w/RMSProp:0": np.zeros(2)}
    with pytest.raises(ValueError, match=r"RMSProp of w twice.*: w/RMSProp and w/RMSProp:0"):
        interop.from_tensorflow1(slots, count=7)


def test_a_centered_state_goes_there_and_back():
    state = rmsprop(0.1, momentum=0.9, centered=True).init({"w": jnp.ones(2)})
    state = state._replace(count=jnp.int32(7), nu={"w": jnp.array([3.0, 1.0])}, mu={"w": jnp.array([1.0, 2.0])})
    slots = interop.to_tensorflow1(state, lambda tree: tree)
    assert {key: x.tolist() for key, x in slots.items()} == {
        "w/RMSProp": [4, 5],
        "w/RMSProp_1": [1, 2],
        "w/RMSProp_2": [0, 0],
    }
    again = interop.from_tensorflow1(slots, count=7)
    jax.tree.map(np.testing.assert_array_equal, again, state)
