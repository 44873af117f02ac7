"""From one wrapper into another, and into other options."""

import functools
from typing import Any, NamedTuple

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


# --- Wrappers that moved ------------------------------------------------------------------------------------


def averaged(*parts):
    return optax.chain(*(optax.ema(0.9) if part == "ema" else rmsprop(0.1) for part in parts))


@pytest.mark.usefixtures("users_climate")
def test_an_average_stays_on_its_side_of_rmsprop():
    in_front, behind = averaged("ema", "rmsprop"), averaged("rmsprop", "ema")
    state, there = carried(in_front, optax.chain(optax.clip(9.0), optax.ema(0.9), rmsprop(0.1)), steps=3)
    jax.tree.map(np.testing.assert_array_equal, there[1], state[0])
    assert state[0].count == 3
    for old, new, place in ((in_front, behind, 0), (behind, in_front, 1)):
        with pytest.raises(
            ValueError,
            match=rf"state also holds \[{place}\]\.ema.*same side of RMSProp's state\. To leave it .*, state\[{1 - place}\]",
        ):
            carried(old, new, steps=3)
        # As the error says: the average starts anew.
        state = old.init(PARAMS)
        for _ in range(3):
            _, state = old.update(PARAMS, state, PARAMS)
        there = interop.from_rmsprop(state[1 - place], new.init(PARAMS))
        assert there[1 - place].count == 0
        assert there[place].count == 3
        np.testing.assert_array_equal(there[place].nu["head"], state[1 - place].nu["head"])


@pytest.mark.usefixtures("users_climate")
def test_averages_on_both_sides_are_not_exchanged():
    both = averaged("ema", "rmsprop", "ema")
    state, there = carried(both, optax.apply_if_finite(both, 3), steps=3)
    jax.tree.map(np.testing.assert_array_equal, there.inner_state, state)
    assert not (state[0].ema["head"] == state[2].ema["head"]).all()
    # One of two behind each other: which one would be a guess.
    with pytest.raises(ValueError, match=r"state has 2 values for \[1\]\.ema\['head'\], which differ"):
        carried(averaged("rmsprop", "ema", "ema"), averaged("rmsprop", "ema"), steps=3)


@pytest.mark.usefixtures("users_climate")
def test_a_wrapper_around_rmsprop_is_not_one_behind_it():
    around = optax.MultiSteps(rmsprop(0.1), 3).gradient_transformation()
    beside = optax.chain(rmsprop(0.1), optax.MultiSteps(optax.identity(), 3).gradient_transformation())
    with pytest.raises(ValueError, match=r"\.mini_step, gradients of half an update"):
        carried(around, beside, steps=4)


@pytest.mark.usefixtures("users_climate")
def test_half_an_accumulation_of_another_shape():
    inside = optax.flatten(optax.MultiSteps(rmsprop(0.1), 3).gradient_transformation())
    outside = optax.MultiSteps(optax.flatten(rmsprop(0.1)), 3).gradient_transformation()
    with pytest.raises(ValueError, match=r"state also holds \.acc_grads, gradients of half an update"):
        carried(inside, outside, steps=4)
    carried(inside, outside, steps=3)


@pytest.mark.usefixtures("users_climate")
def test_another_optimizer_in_another_group():
    labels = {"body": "a", "head": "b"}
    old = optax.partition({"a": rmsprop(0.1), "b": optax.adam(0.1)}, labels)
    state, there = carried(old, optax.apply_if_finite(old, 3), steps=3)
    jax.tree.map(np.testing.assert_array_equal, there.inner_state, state)
    with pytest.raises(ValueError, match=r"state also holds \.inner_states\['b'\].*\.mu\['head'\]"):
        carried(old, optax.partition({"a": rmsprop(0.1), "b": optax.set_to_zero()}, labels))


class Rest(NamedTuple):
    """The state of a wrapper like round_params_stochastically: a tree like the parameters, None where it has nothing."""

    step: jax.Array
    rest: Any


def keeping(rest):
    def init(params):
        tree = jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.int8) if p.ndim > 1 else None, params)
        return Rest(jnp.zeros((), jnp.int32), tree if rest else None)

    def update(updates, state, params=None):
        rest = jax.tree.map(lambda x: x + 1, state.rest)
        return updates, Rest(state.step + 1, rest)

    return optax.GradientTransformation(init, update)


@pytest.mark.parametrize("wrap", [lambda tx: tx, lambda tx: optax.apply_if_finite(tx, 3)], ids=["chain", "wrapped"])
def test_a_wrapper_of_one_s_own(wrap):
    with_rest, without = (optax.chain(rmsprop(0.1), keeping(rest)) for rest in (True, False))
    _, there = carried(with_rest, wrap(with_rest), steps=3)
    there = getattr(there, "inner_state", there)
    assert there[1].step == 3
    assert there[1].rest["head"] is None
    assert (there[1].rest["body"]["kernel"] == 3).all()
    assert there[1].rest["body"]["kernel"].dtype == jnp.int8
    # What only `like` has starts as it does there.
    _, there = carried(without, wrap(with_rest), steps=3)
    there = getattr(there, "inner_state", there)
    assert there[1].step == 3
    assert (there[1].rest["body"]["kernel"] == 0).all()
    _, there = carried(with_rest, wrap(without), steps=3)
    there = getattr(there, "inner_state", there)
    assert there[1].rest is None
    assert there[1].step == 3


@pytest.mark.usefixtures("users_climate")
def test_random_keys_of_a_wrapper():
    for key in (3, jax.random.key(3)):
        noisy = optax.chain(rmsprop(0.1), optax.add_noise(0.1, 0.5, key))
        state, there = carried(noisy, optax.chain(optax.clip(1.0), rmsprop(0.1), optax.add_noise(0.1, 0.5, 7)))
        assert (jax.random.key_data(there[2].rng_key) == jax.random.key_data(state[1].rng_key)).all()


# --- optax.rmsprop, or a chain of the same parts --------------------------------------------------------------


CHAINS = {
    "rate before the trace": lambda rms: (rms(0.9), optax.scale(-0.1), optax.trace(0.9)),
    "schedule before the trace": lambda rms: (
        rms(0.9),
        optax.scale_by_learning_rate(optax.linear_schedule(0.1, 0.0, 9)),
        optax.trace(0.9),
    ),
    "no trace": lambda rms: (rms(0.9), optax.scale(-0.1), optax.identity()),
}


@pytest.mark.parametrize("parts", CHAINS.values(), ids=CHAINS)
def test_like_decides_whether_three_parts_are_a_chain(parts):
    theirs, ours = optax.chain(*parts(optax.scale_by_rms)), optax.chain(*parts(scale_by_rms))
    state = theirs.init(PARAMS)
    for _ in range(3):
        _, state = theirs.update(PARAMS, state, PARAMS)
    there = interop.from_optax(state, ours.init(PARAMS))
    back = interop.to_optax(there, theirs.init(PARAMS))
    jax.tree.map(np.testing.assert_array_equal, back, state)
    for (tx, s), (other, o) in (((theirs, state), (ours, there)), ((ours, there), (theirs, back))):
        expected, _ = tx.update(PARAMS, s, PARAMS)
        updates, _ = other.update(PARAMS, o, PARAMS)
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-6), updates, expected)
    # The same parts are optax.rmsprop: so they may become our rmsprop.
    momentum = 0.9 if isinstance(state[2], optax.TraceState) else None
    whole = rmsprop(0.1, momentum=momentum)
    there = interop.from_optax(state, whole.init(PARAMS))
    assert (there.trace is None) == (momentum is None)
    if momentum:
        np.testing.assert_array_equal(there.trace["head"], -state[2].trace["head"])
        back = interop.to_optax(there, theirs.init(PARAMS))
        np.testing.assert_array_equal(back[2].trace["head"], state[2].trace["head"])


def test_a_buffer_with_the_rate_does_not_become_one_without():
    """PyTorch's order has the trace before the rate: it is no chain of the parts of optax.rmsprop."""
    theirs = optax.rmsprop(0.1, momentum=0.9)
    pytorch_s = optax.chain(scale_by_rms(), optax.trace(0.9), optax.scale(-0.1))
    with pytest.raises(ValueError, match=r"like has no \[0\]\.trace: the options differ"):
        interop.from_optax(theirs.init(PARAMS), pytorch_s.init(PARAMS))


# --- Counts -------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("users_climate")
def test_the_count_of_the_nearest_wrapper_that_counts():
    """optax.rmsprop without a schedule does not count. Around it MultiSteps counts updates, and injection gradients."""

    def accumulating(learning_rate):
        return optax.MultiSteps(optax.rmsprop(learning_rate), 3).gradient_transformation()

    tx = optax.inject_hyperparams(accumulating)(learning_rate=0.1)
    state = tx.init(PARAMS)
    for _ in range(6):
        _, state = tx.update(PARAMS, state, PARAMS)
    assert (state.count, state.inner_state.gradient_step) == (6, 2)
    assert interop.from_optax(state).count == 2
    assert interop.from_optax(optax.rmsprop(0.1).init(PARAMS)).count == 0


def test_counts_that_are_equally_near_and_differ():
    tx = optax.chain(optax.scale_by_rms(), *(optax.scale_by_schedule(lambda count: 1.0) for _ in range(2)))
    state = tx.init(PARAMS)
    two = (state[0], state[1]._replace(count=jnp.int32(3)), state[2]._replace(count=jnp.int32(4)))
    with pytest.raises(ValueError, match=r"no count of its own, and \[1\]\.count, \[2\]\.count differ: \[3, 4\]"):
        interop.from_optax(two)
    assert interop.from_optax((*two[:2], state[2]._replace(count=jnp.int32(3)))).count == 3


# --- Many states, and one vector ----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [jnp.uint8, jnp.bfloat16], ids=["uint8", "bfloat16"])
def test_vmapped_states_into_narrow_ones(dtype):
    tx, narrow = rmsprop(0.1, momentum=0.9), rmsprop(0.1, momentum=0.9, state_dtype=dtype)
    many = {"w": jax.random.normal(jax.random.key(0), (5, 64, 64)), "b": jnp.ones(5)}
    state = jax.vmap(tx.init)(many)
    _, state = jax.vmap(tx.update)(many, state)
    like = jax.vmap(narrow.init)(many)
    there = interop.from_rmsprop(state, like)
    assert jax.tree.map(jax.typeof, there) == jax.tree.map(jax.typeof, like)
    back = interop.from_rmsprop(there, jax.vmap(tx.init)(many))
    for slot in ("nu", "trace"):
        mine, wide = getattr(back, slot)["w"], getattr(state, slot)["w"]
        # Rounded, and right in the mean of each member.
        assert not jnp.array_equal(mine, wide)
        np.testing.assert_allclose(abs(mine).mean((1, 2)), abs(wide).mean((1, 2)), rtol=0.02)
    jax.vmap(narrow.update)(many, there)
    with pytest.raises(ValueError, match=r"\.count has shape \(5,\) in state and \(\) in like"):
        interop.from_rmsprop(state, narrow.init({"w": many["w"][0], "b": many["b"][0]}))


@pytest.mark.usefixtures("users_climate")
def test_vmapped_accumulations():
    every = optax.MultiSteps(rmsprop(0.1), 2).gradient_transformation()
    many = jnp.ones((3, 2))
    _, half = jax.vmap(every.update)(many, jax.vmap(every.init)(many), many)
    with pytest.raises(ValueError, match="gradients of half an update"):
        interop.from_rmsprop(half, jax.vmap(rmsprop(0.1).init)(many))
    _, whole = jax.vmap(every.update)(many, half, many)
    assert interop.from_rmsprop(whole, jax.vmap(rmsprop(0.1).init)(many)).count.tolist() == [1, 1, 1]


@pytest.mark.parametrize("options", [{}, ALL, {"momentum": 0.9, "state_dtype": jnp.uint8}], ids=str)
def test_all_parameters_as_one_vector(options):
    plain, flat = rmsprop(rate, **options), optax.flatten(rmsprop(rate, **options))
    state, there = carried(plain, flat, steps=3)
    back = interop.from_rmsprop(there, plain.init(PARAMS))
    jax.tree.map(np.testing.assert_array_equal, back, state)
    expected, _ = plain.update(PARAMS, state)
    updates, _ = flat.update(PARAMS, there)
    if "state_dtype" not in options:  # one byte rounds with bits of its own
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-6), updates, expected)
    wide = optax.flatten(rmsprop(rate, momentum=0.9, centered=True))
    there = interop.from_rmsprop(state, wide.init(PARAMS))
    assert there.nu.shape == there.mu.shape == there.trace.shape == (13,)
    with pytest.raises(ValueError, match="do not fit"):
        interop.from_rmsprop(state, flat.init({**PARAMS, "head": jnp.ones(5)}))


def test_optax_s_state_of_one_vector():
    theirs, ours = optax.flatten(optax.rmsprop(0.1, momentum=0.9)), rmsprop(0.1, momentum=0.9)
    state = theirs.init(PARAMS)
    _, state = theirs.update(PARAMS, state)
    there = interop.from_optax(state, ours.init(PARAMS))
    back = interop.to_optax(there, theirs.init(PARAMS))
    jax.tree.map(np.testing.assert_array_equal, back, state)


# --- Odd states ---------------------------------------------------------------------------------------------


def test_a_state_without_parameters():
    for params in (None, {}, {"a": None}):
        state = rmsprop(0.1).init(params)
        there = interop.from_rmsprop(state._replace(count=jnp.int32(3)), rmsprop(0.1).init(params))
        assert jax.tree.structure(there) == jax.tree.structure(state)
        assert there.count == 3
    assert interop.from_optax(optax.rmsprop(0.1).init({})).nu == {}
    with pytest.raises(ValueError, match=r"state has nothing for \.nu\['head'\]"):
        interop.from_rmsprop(rmsprop(0.1).init(None), rmsprop(0.1).init(PARAMS))
    with pytest.raises(ValueError, match=r"like has no place for \['head'\]"):
        interop.from_rmsprop(rmsprop(0.1).init({"head": jnp.ones(2)}), rmsprop(0.1).init(None))


def test_a_complex_buffer_does_not_become_real():
    tx = rmsprop(0.1, momentum=0.9)
    state = tx.init({"w": jnp.ones(2, jnp.complex64)})
    with pytest.raises(ValueError, match=r"\.trace\['w'\] has dtype complex64 in state and float32 in like"):
        interop.from_rmsprop(state, tx.init({"w": jnp.ones(2)}))
    # Without a buffer there is nothing complex in it.
    interop.from_rmsprop(rmsprop(0.1).init({"w": jnp.ones(2, jnp.complex64)}), rmsprop(0.1).init({"w": jnp.ones(2)}))


def test_a_state_of_numpy_arrays():
    """As pickled, or restored without JAX's arrays."""
    tx = rmsprop(0.1, momentum=0.9)
    _, state = tx.update(PARAMS, tx.init(PARAMS))
    there = interop.from_rmsprop(jax.tree.map(np.asarray, state), rmsprop(0.1, state_dtype=jnp.uint8).init(PARAMS))
    assert there.nu["head"].dtype == jnp.uint8
    assert there.count == 1
    plain = state._replace(count=1)
    assert interop.from_rmsprop(plain, rmsprop(0.1).init(PARAMS)).count.dtype == jnp.int32
