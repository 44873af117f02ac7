"""From one wrapper into another, and into other options."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.training.train_state import TrainState
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

from rmsprop_jax import interop, rmsprop, scale_by_rms


PARAMS = {"body": {"kernel": jnp.arange(6.0).reshape(2, 3) / 7, "bias": jnp.ones(3)}, "head": jnp.full(4, 0.3)}

ALL = {"momentum": 0.9, "centered": True, "eps": 1e-3}


def rate(count):
    return 1e-2 / (1 + jnp.asarray(count, jnp.float32) / 50)


def wrapped(f):
    """The wrappers that people keep an optimizer in, around `f`."""
    tx = f(rate, **ALL)
    leaves = {"body": {"kernel": "a", "bias": "b"}, "head": "b"}
    return {
        "bare": tx,
        "chain": optax.chain(optax.clip(10.0), tx),
        "inject_hyperparams": optax.inject_hyperparams(f)(learning_rate=rate, **ALL),
        "MultiSteps": optax.MultiSteps(tx, 1).gradient_transformation(),
        "apply_if_finite": optax.apply_if_finite(tx, 3),
        "masked": optax.masked(tx, {"body": True, "head": True}),
        "partition, a group per subtree": optax.partition({"a": tx, "b": tx}, {"body": "a", "head": "b"}),
        "partition, a group per leaf": optax.partition({"a": tx, "b": tx}, leaves),
        "all at once": optax.chain(
            optax.clip(10.0),
            optax.MultiSteps(optax.inject_hyperparams(f)(learning_rate=rate, **ALL), 1).gradient_transformation(),
        ),
    }


OURS, THEIRS = wrapped(rmsprop), wrapped(optax.rmsprop)

EVERY_TX = {("ours", k): tx for k, tx in OURS.items()} | {("Optax's", k): tx for k, tx in THEIRS.items()}


@functools.cache
def runner(key):
    tx = EVERY_TX[key]

    def step(carry, t):
        params, state = carry
        wave = 0.05 * jnp.sin(t.astype(jnp.float32))
        grads = jax.tree.map(lambda p: p * (1 + 2 * wave) + wave, params)
        updates, state = tx.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), None

    return jax.jit(lambda params, state, ts: jax.lax.scan(step, (params, state), ts)[0])


@functools.cache
def half_way(key):
    with jax.numpy_dtype_promotion("standard"):
        params, state = runner(key)(PARAMS, EVERY_TX[key].init(PARAMS), jnp.arange(100))
        return params, state, runner(key)(params, state, jnp.arange(100, 200))[0]


PAIRS = [(a, b) for a in EVERY_TX for b in EVERY_TX if "ours" in (a[0], b[0])]


@pytest.mark.parametrize(("source", "target"), PAIRS, ids=lambda key: ", ".join(key))
def test_a_run_goes_on_in_another_wrapper(source, target):
    convert = {"ours": interop.from_rmsprop, "Optax's": interop.from_optax}[source[0]]
    convert = interop.to_optax if target[0] == "Optax's" else convert
    params, state, end = half_way(source)
    with jax.numpy_dtype_promotion("standard"):
        like = EVERY_TX[target].init(params)
        carried = convert(state, like)
        assert jax.tree.map(jax.typeof, carried) == jax.tree.map(jax.typeof, like)
        resumed, _ = runner(target)(params, carried, jnp.arange(100, 200))
        afresh, _ = runner(target)(params, like, jnp.arange(100, 200))
    way = max(jax.tree.leaves(jax.tree.map(lambda a, b: jnp.abs(a - b).max(), end, params)))
    gap, gap_afresh = (
        max(jax.tree.leaves(jax.tree.map(lambda a, b: jnp.abs(a - b).max(), x, end))) / way for x in (resumed, afresh)
    )
    assert gap < 2e-6  # Optax's E[g²] - E[g]² rounds
    assert gap_afresh > 0.1


def carried(old, new, params=PARAMS, steps=1):
    state = old.init(params)
    for _ in range(steps):
        _, state = old.update(params, state, params)
    return state, interop.from_rmsprop(state, new.init(params))


@pytest.mark.usefixtures("users_climate")
def test_what_a_wrapper_holds_is_kept():
    def wrapped_twice(tx):
        return optax.apply_if_finite(optax.MultiSteps(tx, 3).gradient_transformation(), 3)

    old, new = wrapped_twice(rmsprop(0.1)), optax.chain(optax.clip(1.0), wrapped_twice(rmsprop(0.1, momentum=0.9)))
    state = old.init(PARAMS)
    for grads in (jax.tree.map(lambda p: p * jnp.nan, PARAMS), PARAMS, PARAMS, PARAMS, PARAMS):
        _, state = old.update(grads, state, PARAMS)
    after = interop.from_rmsprop(state, new.init(PARAMS))[1]
    assert (after.total_notfinite, after.inner_state.mini_step, after.inner_state.gradient_step) == (1, 1, 1)
    jax.tree.map(np.testing.assert_array_equal, after.inner_state.acc_grads, PARAMS)
    assert after.inner_state.inner_opt_state.count == 1


@pytest.mark.usefixtures("users_climate")
def test_half_an_accumulation_that_has_no_place():
    every = optax.MultiSteps(rmsprop(0.1), 3)
    with pytest.raises(
        ValueError, match=r"state also holds \.mini_step, gradients of half an update: like has no place"
    ):
        carried(every, rmsprop(0.1))
    theirs = optax.MultiSteps(optax.rmsprop(0.1), 3)
    _, half = theirs.update(PARAMS, theirs.init(PARAMS), PARAMS)
    with pytest.raises(ValueError, match="gradients of half an update: a bare state has no place"):
        interop.from_optax(half)
    carried(every, rmsprop(0.1), steps=3)  # between two updates nothing is lost


def test_an_injected_rate_is_like_s():
    old, new = (optax.inject_hyperparams(rmsprop)(learning_rate=r, momentum=0.9) for r in (0.5, 0.25))
    state, after = carried(old, new)
    assert after.hyperparams["learning_rate"] == 0.25
    assert after.count == state.count == 1
    np.testing.assert_array_equal(after.inner_state.nu["head"], state.inner_state.nu["head"])


def test_groups_of_different_options():
    labels = {"body": "a", "head": "b"}
    mixed = optax.partition({"a": rmsprop(0.1, momentum=0.9), "b": rmsprop(0.1, centered=True)}, labels)
    state, same = carried(mixed, mixed, steps=3)
    jax.tree.map(np.testing.assert_array_equal, same, state)
    whole = interop.from_rmsprop(state, rmsprop(0.1, momentum=0.9, centered=True).init(PARAMS))
    assert (whole.mu["body"]["bias"] == 0).all()
    assert (whole.trace["head"] == 0).all()
    back = interop.from_rmsprop(whole, mixed.init(PARAMS))
    jax.tree.map(np.testing.assert_array_equal, back, state)
    theirs = optax.partition({"a": optax.rmsprop(0.1, momentum=0.9), "b": optax.rmsprop(0.1, centered=True)}, labels)
    there = interop.to_optax(state, theirs.init(PARAMS))
    again = interop.from_optax(there, mixed.init(PARAMS))
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-7),
        *(s.inner_states["b"].inner_state.nu["head"] for s in (again, state)),
    )
    # As arrays by name, for a framework: zeros where a group has no buffer.
    arrays = dict(interop.to_keras(state, lambda tree: {"head": tree["head"], "bias": tree["body"]["bias"]}))
    assert set(arrays) == {"iteration"} | {
        f"{n}_{s}" for n in ("head", "bias") for s in ("velocity", "momentum", "average_gradient")
    }
    assert (arrays["head_momentum"] == 0).all()


def test_freezing_and_unfreezing():
    frozen = optax.partition({"a": rmsprop(0.1), "b": optax.set_to_zero()}, {"body": "a", "head": "b"})
    state, there = carried(rmsprop(0.1), frozen)
    np.testing.assert_array_equal(there.inner_states["a"].inner_state.nu["body"]["bias"], state.nu["body"]["bias"])
    # What was frozen has no average: it starts as `like` does.
    back = interop.from_rmsprop(there, rmsprop(0.1, initial_scale=2.0).init(PARAMS))
    assert (back.nu["head"] == 2).all()
    np.testing.assert_array_equal(back.nu["body"]["bias"], state.nu["body"]["bias"])
    with pytest.raises(ValueError, match=r"no accumulators for \['head'\], which were masked"):
        interop.to_keras(there, lambda tree: tree)


def test_pytorch_s_order_in_a_chain_keeps_optax_s_trace():
    def chain(rms):
        return optax.chain(rms(eps_in_sqrt=False), optax.trace(0.9), optax.scale_by_learning_rate(0.1))

    theirs, ours = chain(optax.scale_by_rms), chain(scale_by_rms)
    _, state = theirs.update(PARAMS, theirs.init(PARAMS))
    there = interop.from_optax(state, ours.init(PARAMS))
    jax.tree.map(np.testing.assert_array_equal, there[1], state[1])
    with pytest.raises(
        ValueError, match=r"state also holds \[1\]\.trace\['body'\].*: a bare state has no place for it"
    ):
        interop.from_optax(state)
    with pytest.raises(ValueError, match=r"state also holds \[1\]\.trace.*: like has no place for it"):
        interop.from_optax(state, scale_by_rms().init(PARAMS))


def test_shapes_are_enough_where_nothing_else_is_needed():
    lean = rmsprop(0.1, momentum=0.9, state_dtype=jnp.uint8)
    state, _ = carried(rmsprop(0.1), rmsprop(0.1))
    for abstract in (jax.eval_shape(lean.init, PARAMS), lean.init(PARAMS)):
        there = interop.from_rmsprop(state, abstract)
        assert jax.tree.map(jax.typeof, there) == jax.tree.map(jax.typeof, lean.init(PARAMS))
        assert all((x == 0).all() for x in jax.tree.leaves(there.trace))
    injected = optax.inject_hyperparams(rmsprop)(learning_rate=0.1)
    with pytest.raises(
        ValueError, match=r"like has only the shape of \.hyperparams\['decay'\], and state has no value"
    ):
        interop.from_rmsprop(state, jax.eval_shape(injected.init, PARAMS))


def test_the_result_has_like_s_shardings():
    mesh = jax.make_mesh((4,), ("x",), axis_types=(AxisType.Auto,), devices=jax.devices()[:4])
    split = NamedSharding(mesh, P("x"))
    params = {"w": jnp.arange(8.0)}
    there = {"w": jax.device_put(params["w"], split)}
    state, after = carried(rmsprop(0.1, momentum=0.9), rmsprop(0.1), params)
    assert not isinstance(after.nu["w"].sharding, NamedSharding)
    tx = rmsprop(0.1, momentum=0.9, state_dtype=jnp.uint8)
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tx.init(there))
    for like in (tx.init(there), abstract):
        after = interop.from_rmsprop(state, like)
        for slot in (after.nu, after.trace):
            assert slot["w"].sharding.is_equivalent_to(split, 1)


def test_flax_s_train_state_and_nnx_s_optimizer():
    tx, new_tx = rmsprop(0.1), optax.chain(optax.clip(1.0), rmsprop(0.1, momentum=0.9))
    train_state = TrainState.create(apply_fn=None, params=PARAMS, tx=tx).apply_gradients(grads=PARAMS)
    moved = train_state.replace(tx=new_tx, opt_state=interop.from_rmsprop(train_state.opt_state, new_tx.init(PARAMS)))
    moved = moved.apply_gradients(grads=PARAMS)
    assert moved.opt_state[1].count == 2

    model = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
    old, new = (nnx.Optimizer(model, t, wrt=nnx.Param) for t in (tx, new_tx))
    grads = nnx.grad(lambda m: (m(jnp.ones((1, 2))) ** 2).sum())(model)
    old.update(model, grads)
    new.opt_state = interop.from_rmsprop(old.opt_state, new.opt_state)
    pure = getattr(nnx, "as_pure", None) or nnx.pure
    kernel = lambda optimizer: pure(optax.tree.get(optimizer.opt_state, "nu"))["kernel"]  # noqa: E731
    np.testing.assert_array_equal(kernel(new), kernel(old))
    new.update(model, grads)
    assert pure(new.opt_state)[1].count == 2


MISFITS = {
    "shape": (
        lambda p: rmsprop(0.1).init({**p, "head": jnp.ones(5)}),
        r"\.nu\['head'\] has shape \(4,\) in state and \(5,\)",
    ),
    "new name": (lambda p: rmsprop(0.1).init({**p, "tail": jnp.ones(5)}), r"state has nothing for \.nu\['tail'\]"),
    "lost name": (lambda p: rmsprop(0.1).init({"head": p["head"]}), r"like has no place for \['body'\]\['bias'\]"),
    "adam": (lambda p: optax.adam(0.1).init(p), "no state of RMSProp in like"),
    "optax": (lambda p: optax.rmsprop(0.1, momentum=0.9).init(p), None),
}


@pytest.mark.parametrize(("like", "message"), MISFITS.values(), ids=MISFITS)
def test_what_does_not_fit_is_listed(like, message):
    _, state = rmsprop(0.1).update(PARAMS, rmsprop(0.1).init(PARAMS))
    convert = interop.to_optax if message is None else interop.from_rmsprop
    with pytest.raises(
        ValueError, match=message or r"state has nothing for .*\.trace\['body'\].*the options differ"
    ) as error:
        convert(state, like(PARAMS))
    assert len(str(error.value)) < 700


FOREIGN = {
    "adam": optax.adam(0.1),
    "sgd": optax.sgd(0.1, momentum=0.9),
    "adagrad": optax.adagrad(0.1),
    "adam in a chain": optax.chain(optax.clip(1.0), optax.adamw(0.1)),
    "nothing": optax.identity(),
}


@pytest.mark.parametrize("tx", FOREIGN.values(), ids=FOREIGN)
def test_somebody_else_s_state_is_named(tx):
    state = tx.init({f"layer{i}": jnp.ones((64, 64)) for i in range(50)})
    for function in (interop.from_rmsprop, interop.from_optax, interop.to_optax):
        with pytest.raises(ValueError, match="no state of RMSProp in this .*it holds (Scale|Trace|nothing)") as error:
            function(state, rmsprop(0.1).init(PARAMS))
        assert len(str(error.value)) < 300
    with pytest.raises(ValueError, match=r"no state of RMSProp in this dict.*RMSPropState\(\*\*kept\)"):
        interop.from_rmsprop({"count": 1, "nu": PARAMS}, rmsprop(0.1).init(PARAMS))


def test_two_accumulators_for_one_parameter():
    twice = optax.chain(optax.scale_by_rms(), optax.scale_by_rms())
    with pytest.raises(ValueError, match=r"2 accumulators for nu\['body'\]\['bias'\]: \[0\], \[1\]"):
        interop.from_optax(twice.init(PARAMS))


def test_groups_that_have_counted_differently():
    labels = {"body": "a", "head": "b"}
    tx = optax.partition({"a": rmsprop(0.1), "b": rmsprop(0.1)}, labels)
    state = tx.init(PARAMS)
    group = state.inner_states["b"].inner_state
    state.inner_states["b"] = state.inner_states["b"]._replace(inner_state=group._replace(count=jnp.int32(7)))
    with pytest.raises(ValueError, match=r"the groups have different counts: \[0, 7\]"):
        interop.from_rmsprop(state, rmsprop(0.1).init(PARAMS))


def test_counters_that_differ_between_groups_are_not_guessed():
    labels = {"body": "a", "head": "b"}

    def scheduled():
        return optax.chain(rmsprop(0.1), optax.scale_by_schedule(lambda count: 1.0))

    groups = optax.partition({"a": scheduled(), "b": scheduled()}, labels)
    state = groups.init(PARAMS)
    like = scheduled().init(PARAMS)
    assert interop.from_rmsprop(state, like)[1].count == 0
    other = state.inner_states["b"].inner_state
    state.inner_states["b"] = state.inner_states["b"]._replace(
        inner_state=(other[0], other[1]._replace(count=jnp.int32(5)))
    )
    with pytest.raises(ValueError, match=r"state has 2 values for \[1\]\.count, which differ"):
        interop.from_rmsprop(state, like)
    # In the same groups each keeps its own.
    same = interop.from_rmsprop(state, groups.init(PARAMS))
    assert [same.inner_states[label].inner_state[1].count for label in "ab"] == [0, 5]


@pytest.mark.usefixtures("users_climate")
def test_averages_that_would_be_lost_are_named():
    with pytest.raises(ValueError, match=r"state also holds \[1\]\.ema\['body'\].*like has no place for it"):
        carried(optax.chain(rmsprop(0.1), optax.ema(0.9)), rmsprop(0.1))
