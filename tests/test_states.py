"""_states: what an optimizer's state holds, found by one walk and replaced by one, in any wrapper and any box."""

from typing import Any, NamedTuple

import chex
import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from rmsprop_jax import _states, metrics, rmsprop, RMSPropState, round_params_stochastically, RoundParamsState


pytestmark = pytest.mark.usefixtures("users_climate")

PARAMS = {"w": jnp.ones((2, 3), jnp.bfloat16), "b": jnp.ones(3, jnp.bfloat16)}


def accumulating(tx):
    return optax.MultiSteps(tx, 2).gradient_transformation()


WRAPPERS = {
    "bare": lambda tx: tx,
    "chain": lambda tx: optax.chain(optax.clip(1.0), tx),
    "all at once": lambda tx: optax.apply_if_finite(accumulating(optax.chain(tx, optax.ema(0.9))), 3),
    "groups": lambda tx: optax.partition({"x": tx, "y": tx}, {"w": "x", "b": "y"}),
    "named_chain": lambda tx: optax.named_chain(("a", optax.ema(0.9)), ("b", tx)),
}


def is_rounding(x):
    return isinstance(x, RoundParamsState)


@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
def test_what_is_found_can_be_replaced_and_nothing_else_changes(wrap):
    tx = wrap(optax.chain(rmsprop(0.1), round_params_stochastically(keep_rest=True)))
    state = tx.init(PARAMS)
    found = _states.find(state, is_rounding)
    assert found
    assert all(map(is_rounding, found.values()))
    arrays = [x for node in found.values() for x in _states.arrays_of(node.rest).values()]
    assert sorted(x.shape for x in arrays if not _states.is_masked(x)) == [(2, 3), (3,)]
    chex.assert_trees_all_equal(_states.replace(state, found), state)
    new = {path: node._replace(step=jnp.int32(7)) for path, node in found.items()}
    chex.assert_trees_all_equal(_states.replace(state, new), optax.tree.set(state, step=7))
    assert _states.find(state, lambda x: isinstance(x, optax.ScaleByAdamState)) == {}


class Module(eqx.Module):
    layers: Any
    value: Any


def test_a_parameter_has_one_name_in_every_tree():
    """A `value` at the end is a box only where it keeps an array of Flax's, and never a parameter of that name."""
    x = jnp.ones(2)
    plain = {"layers": [x, {"value": x}], "value": x}

    class Layer(nnx.Module):
        def __init__(self):
            self.value = nnx.Param(x)

    class Model(nnx.Module):
        def __init__(self):
            self.layers, self.value = nnx.List([nnx.Param(x), Layer()]), nnx.Param(x)

    trees = {
        "NNX": nnx.state(Model(), nnx.Param),
        "a module of NNX": Model(),
        "Linen": jax.tree.map(lambda x: nn.Partitioned(x, names=(None,)), plain),
        "plain": plain,
        "tuples": {"layers": (x, {"value": x}), "value": x},
        "texts for numbers": {"layers": {"0": x, "1": {"value": x}}, "value": x},
    }
    for name, tree in trees.items():
        found = _states.arrays_of(tree)
        assert found.keys() == {("layers", "0"), ("layers", "1", "value"), ("value",)}, name
        assert all(isinstance(array, jax.Array) for array in found.values())
    assert _states.arrays_of(Module([x], x)).keys() == {("layers", "0"), ("value",)}
    # What Orbax restores without a target: a state in which every array is boxed.
    restored = jax.tree.map(lambda x: {"value": np.asarray(x)}, RMSPropState(jnp.int32(3), plain)._asdict())
    contents = _states.contents_of(RMSPropState(**restored))
    assert contents.accumulators().keys() == _states.arrays_of(plain).keys()
    assert [*contents.counts(()).values()] == [3]
    labels = {label.rpartition("/")[0] for label in metrics(RMSPropState(**restored), per_leaf=True)}
    assert labels == {"", "layers/0", "layers/1/value", "value"}


def test_a_replaced_array_goes_into_its_box():
    state = nnx.Optimizer(nnx.Linear(2, 3, rngs=nnx.Rngs(0)), optax.chain(rmsprop(0.1), optax.ema(0.9)), wrt=nnx.Param)
    contents = _states.contents_of(state.opt_state)
    new = _states.replace(state.opt_state, {path: x + 1 for path, x in contents.arrays.items()})
    assert jax.tree.structure(new) == jax.tree.structure(state.opt_state)
    assert sorted(float(x.sum()) for x in jax.tree.leaves(new[1])) == [1, 3, 6]
    chex.assert_trees_all_equal(new[0], state.opt_state[0])


def test_arrays_of_wrappers_are_told_by_their_wrapper_and_their_side():
    tx = optax.chain(
        optax.ema(0.9),
        accumulating(optax.partition({"x": rmsprop(0.1), "y": optax.adam(0.1)}, {"w": "x", "b": "y"})),
        optax.scale_by_schedule(lambda count: 1.0),
    )
    keys = _states.contents_of(tx.init(PARAMS)).keys.values()
    found = {(key.kind.__name__, key.field, key.below, *key.side) for key in keys}
    assert found == {
        ("EmaState", "count", (), "in front"),
        ("EmaState", "ema", ("w",), "in front"),
        ("EmaState", "ema", ("b",), "in front"),
        *(("MultiStepsState", field, (), "around") for field in ("mini_step", "gradient_step")),
        *(("MultiStepsState", "acc_grads", (name,), "around") for name in "wb"),
        ("ScaleByAdamState", "count", (), "beside"),
        *(("ScaleByAdamState", field, ("b",), "beside") for field in ("mu", "nu")),
        ("ScaleByScheduleState", "count", (), "behind"),
    }
    assert {(key.kind.__name__, key.field) for key in keys if key.counts_updates} == {
        ("MultiStepsState", "gradient_step"),
        ("ScaleByScheduleState", "count"),
    }


class Hyperparameters(NamedTuple):
    """Parameters that are called like what optax.inject_hyperparams keeps."""

    hyperparams: Any


class OwnInjection(NamedTuple):
    """A wrapper of somebody else, with a field of that name."""

    hyperparams: Any
    inner_state: Any


@pytest.mark.parametrize("name", ["learning_rate", "lr", "eta"])
def test_a_parameter_that_is_called_like_a_learning_rate_is_none(name):
    params = {name: jnp.float32(2.0), "w": jnp.float32(1.0)}
    for tree in (params, Hyperparameters(params)):
        state = optax.chain(optax.ema(0.9), rmsprop(0.1), accumulating(optax.trace(0.9))).init(tree)
        assert _states.contents_of(state).learning_rates() == {}
        injected = optax.chain(optax.ema(0.9), optax.inject_hyperparams(rmsprop)(0.25)).init(tree)
        assert [*_states.contents_of(injected).learning_rates().values()] == [0.25]
    state = OwnInjection({name: jnp.float32(0.5)}, rmsprop(0.1).init(params))
    assert _states.contents_of(state).learning_rates() == {}


def test_variance_and_second_moment_are_inverse_and_never_negative():
    mean, nu = jnp.array([3.0, -1e3, 1e-3]), jnp.array([0.5, 2.0, 0.0])
    second = _states.second_moment(nu, mean)
    np.testing.assert_allclose(second, [9.5, 1e6 + 2, 1e-6], rtol=1e-6)
    np.testing.assert_allclose(_states.variance(second, mean), nu, atol=0.1)
    assert (_states.variance(second * (1 - 1e-6), mean) >= 0).all()
    assert _states.variance(jnp.array([25.0 + 0j]), jnp.array([3.0 + 4j]))[0] == 0
