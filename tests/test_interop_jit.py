"""interop under jax.jit: the numbers are the same, and no traced value is looked at."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from rmsprop_jax import interop, rmsprop


pytestmark = pytest.mark.usefixtures("users_climate")

PARAMS = {"a": jnp.arange(1.0, 4.0), "b": jnp.ones((2, 2))}
GROUPS = {"a": "x", "b": "y"}


def advanced(tx, steps=3):
    state = tx.init(PARAMS)
    for _ in range(steps):
        _, state = tx.update(PARAMS, state, PARAMS)
    return state


def scheduled(rms):
    return optax.chain(rms(0.1), optax.scale_by_schedule(lambda count: 1.0))


CASES = {
    "other options": (rmsprop(0.1, momentum=0.9, centered=True), rmsprop(0.1)),
    "one byte": (rmsprop(0.1, momentum=0.9), rmsprop(0.1, momentum=0.9, state_dtype=jnp.uint8)),
    "from one byte": (rmsprop(0.1, momentum=0.9, state_dtype=jnp.uint8), rmsprop(0.1, momentum=0.9)),
    "groups into one": (optax.partition({"x": rmsprop(0.1), "y": rmsprop(0.1)}, GROUPS), rmsprop(0.1)),
    "one into groups": (rmsprop(0.1), optax.partition({"x": rmsprop(0.1), "y": rmsprop(0.1)}, GROUPS)),
    "schedules of groups into one": (
        optax.partition({"x": scheduled(rmsprop), "y": scheduled(rmsprop)}, GROUPS),
        scheduled(rmsprop),
    ),
    "out of MultiSteps": (optax.MultiSteps(rmsprop(0.1), 3).gradient_transformation(), rmsprop(0.1)),
    "into MultiSteps": (rmsprop(0.1), optax.MultiSteps(rmsprop(0.1), 3).gradient_transformation()),
    "averages": (optax.chain(optax.ema(0.9), rmsprop(0.1)), optax.chain(optax.ema(0.9), rmsprop(0.1, momentum=0.9))),
    "one vector": (rmsprop(0.1), optax.flatten(rmsprop(0.1))),
}


@pytest.mark.parametrize(("old", "new"), CASES.values(), ids=CASES)
def test_from_rmsprop(old, new):
    state, like = advanced(old), new.init(PARAMS)
    expected = interop.from_rmsprop(state, like)
    for function, arguments in (
        (interop.from_rmsprop, (state, like)),
        (lambda state: interop.from_rmsprop(state, like), (state,)),
        (lambda like: interop.from_rmsprop(state, like), (like,)),
    ):
        result = jax.jit(function)(*arguments)
        assert jax.tree.map(jax.typeof, result) == jax.tree.map(jax.typeof, like)
        jax.tree.map(np.testing.assert_array_equal, result, expected)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda rms: rms(0.1, momentum=0.9),
        lambda rms: rms(lambda count: 0.1, momentum=0.9, centered=True),
        lambda rms: rms(0.1, bias_correction=True),
        lambda rms: optax.inject_hyperparams(rms)(learning_rate=0.1, momentum=0.9),
        lambda rms: optax.MultiSteps(rms(0.1), 3).gradient_transformation(),
        lambda rms: optax.partition({"x": scheduled(rms), "y": scheduled(rms)}, GROUPS),
    ],
    ids=["momentum", "centered", "bias correction", "injected", "MultiSteps", "schedules"],
)
def test_from_and_to_optax(wrap):
    theirs, ours = wrap(optax.rmsprop), wrap(rmsprop)
    state = advanced(theirs)
    expected = interop.from_optax(state, ours.init(PARAMS))
    result = jax.jit(interop.from_optax)(state, ours.init(PARAMS))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-6), result, expected)
    bare = interop.from_optax(state)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-6), jax.jit(interop.from_optax)(state), bare)
    back = jax.jit(interop.to_optax)(expected, theirs.init(PARAMS))
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-6), back, interop.to_optax(expected, theirs.init(PARAMS))
    )


def test_groups_whose_counts_cannot_be_compared():
    tx = optax.partition({"x": rmsprop(0.1), "y": rmsprop(0.1)}, GROUPS)
    state = advanced(tx, 1)

    @jax.jit
    def carried(count):
        group = state.inner_states["y"].inner_state._replace(count=count)
        groups = {**state.inner_states, "y": state.inner_states["y"]._replace(inner_state=group)}
        return interop.from_rmsprop(state._replace(inner_states=groups), rmsprop(0.1).init(PARAMS))

    assert carried(jnp.int32(1)).count == 1


def test_half_an_update_cannot_be_seen():
    tx = optax.MultiSteps(rmsprop(0.1), 3).gradient_transformation()
    like = rmsprop(0.1).init(PARAMS)
    half = advanced(tx, 4)
    assert jax.jit(interop.from_rmsprop)(half, like).count == 1
    with pytest.raises(ValueError, match="gradients of half an update"):
        interop.from_rmsprop(half, like)


def test_misfits_are_found_while_tracing():
    state = advanced(rmsprop(0.1))
    with pytest.raises(ValueError, match=r"like has no place for \['a'\]"):
        jax.jit(interop.from_rmsprop)(state, rmsprop(0.1).init({"b": PARAMS["b"]}))
    ema = optax.chain(rmsprop(0.1), optax.ema(0.9))
    with pytest.raises(ValueError, match=r"state also holds \[1\]\.ema\['a'\]"):
        jax.jit(interop.from_rmsprop)(advanced(ema), rmsprop(0.1).init(PARAMS))


def test_flax_s_optimizer_inside_jit():
    model = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
    old, new = (nnx.Optimizer(model, rmsprop(0.1, **options), wrt=nnx.Param) for options in ({}, {"momentum": 0.9}))
    grads = nnx.grad(lambda m: (m(jnp.ones((1, 2))) ** 2).sum())(model)
    old.update(model, grads)
    result = nnx.jit(interop.from_rmsprop)(old.opt_state, new.opt_state)
    expected = interop.from_rmsprop(old.opt_state, new.opt_state)
    jax.tree.map(np.testing.assert_array_equal, result, expected)
