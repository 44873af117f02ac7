"""Runs carried over in the middle, both ways, from recorded checkpoints everywhere and from live frameworks."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import resume
from flax import nnx
from flax.training.train_state import TrainState
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from resume import (
    case_name,
    CASES,
    convert,
    convert_back,
    dialect_of,
    difference,
    END,
    limit,
    NAMES,
    ORIGIN,
    RATES,
    RECORDED,
    recorded,
    SOURCES,
    STOP,
)

from rmsprop_jax import dialects, interop, rmsprop, scale_by_rms


IDS = [case_name(*case) for case in CASES]


@pytest.mark.parametrize(("name", "options"), CASES, ids=IDS)
def test_resumes_a_recorded_run(name, options):
    run, source = recorded(name, options), SOURCES[name]
    state = source.read(run.checkpoint)
    assert state.count == STOP
    assert (state.mu is None, state.trace is None) == ("centered" not in options, "momentum" not in options)
    end, _ = resume.run_ours(dialect_of(source, name, options), state, run.middle, STOP, END)
    assert difference(end, run.end) < limit(name, options)
    # Without the state it is another run: the test can fail.
    afresh, _ = resume.run_ours(
        dialect_of(source, name, options),
        dialect_of(source, name, options).init(convert(ORIGIN))._replace(count=state.count),
        run.middle,
        STOP,
        END,
    )
    assert difference(afresh, run.end) > 1e-4


def test_every_recorded_run_is_read():
    assert {path.stem for path in RECORDED.glob("*.npz")} == set(IDS)


OPTAX = [
    {},
    {"momentum": 0.9},
    {"momentum": 0.9, "nesterov": True, "initial_scale": 1.0},
    {"centered": True},
    {"centered": True, "momentum": 0.9, "eps_in_sqrt": False},
    {"bias_correction": True, "momentum": 0.9},
]


@pytest.mark.parametrize("options", OPTAX, ids=str)
def test_resumes_optax_both_ways(options):
    accepted = limit("optax", options)
    options = {"eps": resume.EPS} | options
    rate = lambda count: jnp.asarray(RATES)[count]  # noqa: E731
    ours, theirs = rmsprop(rate, **options), optax.rmsprop(rate, **options)
    with jax.numpy_dtype_promotion("standard"):
        middle, state = resume.run_transformation(theirs, theirs.init(ORIGIN), ORIGIN, 0, STOP)
        whole, _ = resume.run_transformation(theirs, theirs.init(ORIGIN), ORIGIN, 0, END)
        end, _ = resume.run_transformation(ours, interop.from_optax(state), middle, STOP, END)
        assert difference(end, whole) < accepted
        our_middle, our_state = resume.run_transformation(ours, ours.init(ORIGIN), ORIGIN, 0, STOP)
        like = theirs.init(ORIGIN)
        carried = interop.to_optax(our_state, like)
        assert jax.tree.structure(carried) == jax.tree.structure(like)
        back, _ = resume.run_transformation(theirs, carried, our_middle, STOP, END)
        assert difference(back, whole) < accepted


def test_optax_scale_by_rms_and_half_precision():
    params = {"w": jnp.ones(3, jnp.bfloat16), "z": jnp.ones(2, jnp.complex64)}
    theirs = optax.scale_by_rms()
    with jax.numpy_dtype_promotion("standard"):
        _, state = theirs.update(params, theirs.init(params))
    carried = interop.from_optax(state)
    assert {k: x.dtype.name for k, x in carried.nu.items()} == {"w": "float32", "z": "float32"}
    expected = scale_by_rms().init(params)
    assert jax.tree.map(jnp.shape, carried) == jax.tree.map(jnp.shape, expected)
    again = interop.to_optax(carried, theirs.init(params))
    assert jax.tree.all(jax.tree.map(lambda a, b: a.dtype == b.dtype and bool((a == b).all()), again, state))


# --- Any wrapper to any wrapper -----------------------------------------------------------------------

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


# From Optax's to Optax's nothing is converted.
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


# --- PyTorch's checkpoints as they come -------------------------------------------------------------------


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


ABC = {0: entry(1.0), 1: entry(2.0), 2: entry(3.0)}
IN_GROUPS = [group([0]), group([1, 2], weight_decay=0.01)]


def test_names_go_in_the_order_of_the_groups():
    state = interop.from_pytorch(checkpoint(IN_GROUPS, ABC), ["b", "a", "c"])
    assert {name: float(x[0]) for name, x in state.nu.items()} == {"b": 1, "a": 2, "c": 3}


def test_names_that_the_checkpoint_has():
    named = [group([0], param_names=["b"]), group([1, 2], param_names=["a", "c"])]
    for names in (None, ["b", "a", "c"]):
        state = interop.from_pytorch(checkpoint(named, ABC), names)
        assert {name: float(x[0]) for name, x in state.nu.items()} == {"b": 1, "a": 2, "c": 3}
    strings = {"b": entry(1.0), "a": entry(2.0)}
    assert float(interop.from_pytorch(checkpoint([group(["b", "a"])], strings)).nu["a"][0]) == 2
    # In the model's order they would be swapped: refused.
    with pytest.raises(
        ValueError, match=r"names its parameters \['b', 'a', 'c'\], which names contradicts: \['a', 'b', 'c'\]"
    ):
        interop.from_pytorch(checkpoint(named, ABC), ["a", "b", "c"])
    with pytest.raises(ValueError, match="does not name its parameters: give names, in the order of its groups"):
        interop.from_pytorch(checkpoint(IN_GROUPS, ABC))
    with pytest.raises(ValueError, match="names has a name more than once: a"):
        interop.from_pytorch(checkpoint(IN_GROUPS, ABC), ["a", "a", "c"])


def test_groups_with_other_momentum_and_centering():
    buffer, mean = np.full(2, 5.0), np.full(2, 0.5)
    groups = [group([0]), group([1], momentum=0.9), group([2], centered=True)]
    entries = {0: entry(1.0), 1: entry(2.0, momentum_buffer=buffer), 2: entry(3.0, grad_avg=mean)}
    state = interop.from_pytorch(checkpoint(groups, entries), ["a", "b", "c"])
    assert {name: float(x[0]) for name, x in state.trace.items()} == {"a": 0, "b": 5, "c": 0}
    assert {name: float(x[0]) for name, x in state.mu.items()} == {"a": 0, "b": 0, "c": 0.5}
    assert {name: float(x[0]) for name, x in state.nu.items()} == {"a": 1, "b": 2, "c": 2.75}
    parts = {
        "a": dialects.pytorch(0.1),
        "b": dialects.pytorch(0.1, momentum=0.9),
        "c": dialects.pytorch(0.1, centered=True),
    }
    tx = optax.partition(parts, {name: name for name in "abc"})
    params = dict.fromkeys("abc", jnp.ones(2))
    updates, _ = tx.update(params, interop.from_rmsprop(state, tx.init(params)), params)
    np.testing.assert_allclose(updates["a"], -0.1 / (np.sqrt(0.99 * 1 + 0.01) + 1e-8), rtol=1e-6)
    np.testing.assert_allclose(updates["b"], -0.1 * (4.5 + 1 / np.sqrt(0.99 * 2 + 0.01)), rtol=1e-6)
    np.testing.assert_allclose(updates["c"], -0.1 / np.sqrt(0.99 * 3 + 0.01 - (0.99 * 0.5 + 0.01) ** 2), rtol=1e-6)
    no_average = {**entries, 0: {"step": np.float32(3)}}
    with pytest.raises(ValueError, match=r"lacks {'square_avg': \['a'\]"):
        interop.from_pytorch(checkpoint(groups, no_average), ["a", "b", "c"])
    with pytest.raises(ValueError, match=r"lacks {'square_avg': \['a'\]}"):
        interop.from_pytorch(checkpoint([group([0, 1])], {0: {"step": 3}, 1: entry(1.0)}), ["a", "b"])
    del entries[1]["momentum_buffer"]
    with pytest.raises(ValueError, match=r"lacks {'momentum_buffer': \['b'\]}"):
        interop.from_pytorch(checkpoint(groups, entries), ["a", "b", "c"])


@pytest.mark.parametrize(("read", "first"), [(interop.from_pytorch, 0), (interop.from_stable_baselines3, 1)])
def test_parameters_that_never_stepped(read, first):
    frozen = checkpoint([group([0, 1])], {1: entry(2.0)})
    params = {"f": jnp.ones((3, 2)), "h": jnp.ones(2)}
    for function in (None, lambda x: {"f": x["f"].T.reshape(3, 2), "h": x["h"]}):
        state = read(frozen, ["f", "h"], function, params)
        np.testing.assert_array_equal(state.nu["f"], np.full((3, 2), first))
        np.testing.assert_array_equal(state.nu["h"], [2, 2])
    assert list(read(frozen, ["h"]).nu) == ["h"]
    with pytest.raises(ValueError, match="f never stepped, and the checkpoint does not know their shapes: give params"):
        read(frozen, ["f", "h"])


def test_convert_must_use_every_accumulator_once():
    whole = checkpoint([group([0, 1])], {0: entry(1.0), 1: entry(2.0)})
    with pytest.raises(
        ValueError, match=r"convert leaves out, or changes the values of, \['b'\], and uses more than once \['a'\]"
    ):
        interop.from_pytorch(whole, ["a", "b"], lambda x: [x["a"], x["a"]])
    with pytest.raises(ValueError, match=r"convert leaves out, or changes the values of, \['a'\]"):
        interop.from_pytorch(whole, ["a", "b"], lambda x: [x["a"] - 1, x["b"]])
    with pytest.raises(ValueError, match=r"convert leaves out, or changes the values of, \['a'\]"):
        interop.from_pytorch(whole, ["a", "b"], lambda x: [x["a"][:1], x["b"]])
    # A tied weight may go to two places, and weights may be split, joined and cast.
    tied = interop.from_pytorch(whole, ["a", "b"], lambda x: [x["a"], x["b"], x["a"]])
    assert [float(x[0]) for x in tied.nu] == [1, 2, 1]
    joined = interop.from_pytorch(whole, ["a", "b"], lambda x: jnp.asarray(np.stack([x["b"], x["a"]]), jnp.bfloat16))
    np.testing.assert_array_equal(joined.nu, [[2, 2], [1, 1]])
    many = checkpoint([group(list(range(300)))], {i: entry(float(i)) for i in range(300)})
    names = [f"w{i}" for i in range(300)]
    interop.from_pytorch(many, names, lambda x: [jnp.asarray(v, jnp.bfloat16) for v in x.values()])
    with pytest.raises(ValueError, match=r"\['w137'\], and uses more than once \['w7'\]"):
        interop.from_pytorch(many, names, lambda x: [x["w7" if k == "w137" else k] for k in x])


def test_the_structure_must_fit_the_parameters():
    whole = checkpoint([group([0, 1])], {0: entry(1.0), 1: entry(2.0)})
    with pytest.raises(ValueError, match=r"square_avg has the structure PyTreeDef\(\[\*, \*\]\), the parameters have"):
        interop.from_pytorch(whole, ["a", "b"], lambda x: [x["a"], x["b"]], (jnp.ones(2), jnp.ones(2)))
    # Integers have no state.
    params = {"a": jnp.ones(2), "b": jnp.ones(2), "n": jnp.arange(2)}
    state = interop.from_pytorch(whole, ["a", "b"], lambda x: {**x, "n": None}, params)
    rmsprop(0.1).update({"a": params["a"], "b": params["b"], "n": None}, state)


TORCH_FOREIGN = {
    "Adam": {"lr": 0.1, "betas": (0.9, 0.999), "params": [0]},
    "SGD": {"lr": 0.1, "momentum": 0.9, "dampening": 0, "nesterov": False, "params": [0]},
    "Adagrad": {"lr": 0.1, "lr_decay": 0, "params": [0]},
    "another optimizer": {"lr": 0.1, "params": [0]},
}


@pytest.mark.parametrize("kind", TORCH_FOREIGN)
def test_other_optimizers_of_pytorch_are_named(kind):
    foreign = checkpoint([TORCH_FOREIGN[kind]], {0: {"step": 1, "exp_avg": np.ones(2), "exp_avg_sq": np.ones(2)}})
    for read in (interop.from_pytorch, interop.from_timm, interop.from_stable_baselines3):
        with pytest.raises(ValueError, match=f"not RMSprop's but that of {kind}"):
            read(foreign, ["w"])


def test_other_things_than_an_optimizer_s_state_dict():
    with pytest.raises(ValueError, match="not the state_dict of an optimizer, with state and param_groups: fc.weight"):
        interop.from_pytorch({"fc.weight": np.ones(2)}, ["fc.weight"])
    odd = checkpoint([group([0])], {0: {"step": 1, "exp_avg": np.ones(2)}})
    with pytest.raises(ValueError, match=r"entry 0 has \['exp_avg', 'step'\]"):
        interop.from_pytorch(odd, ["w"])
    with pytest.raises(
        ValueError, match=r"convert asks for 'fc.weight'.*module.fc.weight.*strip prefixes as `module.`"
    ):
        interop.from_pytorch(checkpoint([group([0])], {0: entry(1.0)}), ["module.fc.weight"], lambda x: x["fc.weight"])


# --- Keras' and TensorFlow's --------------------------------------------------------------------------------


def keras_variables(scope="rm_sprop", names=("a_kernel", "a_bias"), count=7, slots=("velocity", "momentum")):
    values = [(f"{scope}/iteration", count), (f"{scope}/learning_rate", 0.1)]
    return values + [(f"{scope}/{name}_{slot}", np.full(2, float(i))) for slot in slots for i, name in enumerate(names)]


def test_keras_wrappers_are_passed_over():
    scaler = [
        ("loss_scale_optimizer/iteration", 9),
        ("loss_scale_optimizer/step_counter", 3),
        ("loss_scale_optimizer/dynamic_scale", 2.0**15),
    ]
    averages = [("rm_sprop/a_kernel_average", np.ones(2)), ("rm_sprop/a_bias_average", np.ones(2))]
    plain = interop.from_keras(keras_variables())
    for variables in ([*scaler, *keras_variables()], [*averages, *keras_variables()]):
        state = interop.from_keras(variables)
        assert state.count == 7
        jax.tree.map(np.testing.assert_array_equal, state, plain)


def test_keras_accumulation():
    half = [
        ("rm_sprop/a_kernel_gradient_accumulator", np.ones(2)),
        ("rm_sprop/a_bias_gradient_accumulator", np.ones(2)),
    ]
    assert interop.from_keras([*half, *keras_variables(count=12)], gradient_accumulation_steps=4).count == 3
    with pytest.raises(
        ValueError, match="gradient_accumulation_steps=None, but the optimizer has 2 gradient accumulators"
    ):
        interop.from_keras([*half, *keras_variables()])
    with pytest.raises(
        ValueError, match="gradient_accumulation_steps=4, but the optimizer has 0 gradient accumulators"
    ):
        interop.from_keras(keras_variables(), gradient_accumulation_steps=4)
    with pytest.raises(ValueError, match="1 of 4 gradients are accumulated: save after an update"):
        interop.from_keras([*half, *keras_variables(count=13)], gradient_accumulation_steps=4)


def test_keras_layers_of_one_name():
    with pytest.raises(
        ValueError, match="cannot be told apart: rm_sprop/d_kernel_velocity and rm_sprop/d_kernel_velocity"
    ):
        interop.from_keras(keras_variables(names=("d_kernel", "d_kernel")))
    two = [*keras_variables("rm_sprop"), *keras_variables("rm_sprop_1")]
    with pytest.raises(
        ValueError, match="cannot be told apart: rm_sprop/a_kernel_velocity and rm_sprop_1/a_kernel_velocity"
    ):
        interop.from_keras(two)


@pytest.mark.parametrize(
    "variables",
    [
        keras_variables("adam", slots=("velocity", "momentum")),
        keras_variables("my_optimizer", slots=("momentum", "velocity")),  # Adam's order
        keras_variables("nadam_1"),
        keras_variables("sgd", slots=("momentum",)),
        keras_variables("adagrad", slots=("accumulator",)),
        keras_variables("lion", slots=("momentum",)),
        keras_variables("sgd", slots=()),
        [("Adam/iter:0", 3), ("Adam/d/kernel/m:0", np.ones(2)), ("Adam/d/kernel/v:0", np.ones(2))],
    ],
    ids=lambda variables: variables[0][0] + variables[-1][0],
)
def test_other_optimizers_of_keras_are_named(variables):
    name = variables[0][0].partition("/")[0].lower().removesuffix("_1")
    with pytest.raises(ValueError, match=f"not the variables of Keras' RMSprop, but of {name}: "):
        interop.from_keras(variables)


def test_legacy_tf_keras_variables():
    variables = [("RMSprop/iter:0", 5)] + [
        (f"RMSprop/d/{name}/{slot}:0", np.full(2, value))
        for slot, value in (("rms", 4.0), ("momentum", 2.0), ("mg", 1.0))
        for name in ("kernel", "bias")
    ]
    state = interop.from_keras(variables)
    assert state.count == 5
    assert {slot: float(getattr(state, slot)["d/bias"][0]) for slot in ("nu", "mu", "trace")} == {
        "nu": 3,
        "mu": 1,
        "trace": 2,
    }


def test_a_whole_tensorflow_checkpoint():
    slots = {"w/RMSProp": np.full(2, 2.0), "w/RMSProp_1": np.full(2, 3.0)}
    beside = {
        "w": np.ones(2),
        "w/ExponentialMovingAverage": np.ones(2),
        "global_step": np.int64(40),
        "v/Adam": np.ones(2),
    }
    for count, expected in ((0, 40), (7, 7)):
        state = interop.from_tensorflow1(slots | beside, count=count)
        assert state.count == expected
        assert {name: float(x[0]) for name, x in (state.nu | {"b": state.trace["w"]}).items()} == {"w": 2, "b": 3}
    with pytest.raises(ValueError, match=r"no slots of RMSProp, which are called \*/RMSProp.*: w, w/Adam, w/Adam_1"):
        interop.from_tensorflow1({"w": np.ones(2), "w/Adam": np.ones(2), "w/Adam_1": np.ones(2)})


# --- What is wrong is listed -----------------------------------------------------------------------------


def torch_checkpoint(**options):
    return recorded("torch", options or {"momentum": 0.9, "centered": True}).checkpoint


def read(checkpoint, names=NAMES, convert=convert, params=None):
    return interop.from_pytorch(checkpoint, names, convert, params)


def test_missing_and_extra_names():
    with pytest.raises(ValueError, match=r"have stepped; names has 2: \['conv.weight', 'fc.weight'\]"):
        read(torch_checkpoint(), NAMES[:2])
    with pytest.raises(ValueError, match="has 3 parameters, of which 3 have stepped; names has 4"):
        read(torch_checkpoint(), [*NAMES, "extra"])
    with pytest.raises(ValueError, match=r"convert asks for 'fc.bias', the checkpoint has \['conv.weight', 'fc.b', "):
        read(torch_checkpoint(), [*NAMES[:2], "fc.b"], lambda arrays: [arrays[name] for name in NAMES])
    with pytest.raises(ValueError, match=r"convert leaves out, or changes the values of, \['conv.weight', 'fc.bias'\]"):
        read(torch_checkpoint(), convert=lambda arrays: arrays["fc.weight"])


def test_missing_slots():
    lacking_one = torch_checkpoint()
    del lacking_one["state"][1]["momentum_buffer"]
    with pytest.raises(ValueError, match=r"lacks {'momentum_buffer': \['fc.weight'\]}"):
        read(lacking_one)
    no_mean = torch_checkpoint()
    for entry in no_mean["state"].values():
        del entry["grad_avg"]
    with pytest.raises(ValueError, match=r"lacks {'grad_avg': \['conv.weight', 'fc.bias', 'fc.weight'\]}"):
        read(no_mean)
    with pytest.raises(ValueError, match="the checkpoint lacks"):
        read({"state": {}, "param_groups": [{"params": [], "momentum": 0, "centered": False}]}, [])


def test_a_state_without_the_momentum_that_the_dialect_needs():
    state = read(torch_checkpoint(centered=True))
    params = convert(ORIGIN)
    with pytest.raises(ValueError, match=r"state.trace is None: the state was made with other options"):
        dialects.pytorch(0.1, centered=True, momentum=0.9).update(params, state)
    with pytest.raises(ValueError, match=r"state.mu is not None: the state was made with other options"):
        dialects.pytorch(0.1).update(params, state)


def test_transposed_shapes():
    def forgot_to_transpose(arrays):
        return {**convert(arrays), "fc": {"kernel": arrays["fc.weight"], "bias": arrays["fc.bias"]}}

    params = convert(ORIGIN)
    with pytest.raises(
        ValueError, match=r"square_avg does not fit.*{\"\['fc'\]\['kernel'\]\": \(\(3, 8\), \(8, 3\)\)}"
    ):
        read(torch_checkpoint(), convert=forgot_to_transpose, params=params)
    # Without `params` the first update tells.
    state = read(torch_checkpoint(), convert=forgot_to_transpose)
    with pytest.raises(ValueError, match=r"gradient\['fc'\]\['kernel'\] has shape \(8, 3\), its nu \(3, 8\)"):
        dialects.pytorch(0.1, centered=True, momentum=0.9).update(params, state)
    with pytest.raises(ValueError, match=r"\['fc'\]\['bias'\]\": \(\(3,\), None\)"):
        read(torch_checkpoint(), params={"conv": params["conv"], "fc": {"kernel": params["fc"]["kernel"]}})


def test_timm_is_not_pytorch():
    timm = recorded("timm", {"momentum": 0.9}).checkpoint
    with pytest.raises(ValueError, match="not pytorch's, and momentum_buffer means something else: from_timm"):
        read(timm)
    with pytest.raises(ValueError, match="not timm's, and momentum_buffer means something else: from_pytorch"):
        interop.from_timm(torch_checkpoint(), NAMES, convert)


def test_complex_accumulators():
    checkpoint = torch_checkpoint()
    checkpoint["state"][2]["square_avg"] = np.ones(3, np.complex64)
    with pytest.raises(ValueError, match="complex accumulators"):
        read(checkpoint)
    state = rmsprop(0.1, momentum=0.9).init({"w": jnp.ones(2, jnp.complex64)})
    with pytest.raises(ValueError, match="complex accumulators"):
        interop.to_keras(state, lambda tree: tree)


def test_foreign_variables_are_named():
    keras = recorded("keras", {"momentum": 0.9}).checkpoint
    with pytest.raises(ValueError, match=r"not the variables of Keras' RMSprop.*: adam/w_m"):
        interop.from_keras([*keras, ("adam/w_m", np.ones(1))], convert)
    with pytest.raises(ValueError, match=r"lacks {'velocity': \['fc_bias'\]}"):
        interop.from_keras([v for v in keras if not v[0].endswith("fc_bias_velocity")], convert)
    slots = recorded("tensorflow", {"momentum": 0.9}).checkpoint
    with pytest.raises(ValueError, match=r"lacks {'RMSProp_1': \['fc_bias'\]}"):
        interop.from_tensorflow1({k: v for k, v in slots.items() if k != "fc_bias/RMSProp_1"}, convert)


def test_convert_back_must_give_the_names():
    torch_free = rmsprop(0.1).init(convert(ORIGIN))
    with pytest.raises(ValueError, match=r"lacks \['x'\] of names, and has \['fc.bias'\] beside them"):
        interop._export(torch_free, convert_back, [*NAMES[:2], "x"])


def test_tensorflow1_names():
    state = rmsprop(0.1, momentum=0.9, initial_scale=1.0).init({"w": jnp.ones(2)})
    slots = interop.to_tensorflow1(state, lambda tree: tree, name="Opt")
    assert {k: v.tolist() for k, v in slots.items()} == {"w/Opt": [1, 1], "w/Opt_1": [0, 0]}
    again = interop.from_tensorflow1(
        {k + ":0": v for k, v in slots.items()}, lambda arrays: {"w": arrays["w"]}, name="Opt"
    )
    assert jax.tree.all(jax.tree.map(jnp.array_equal, again, state))
    # The slot that TensorFlow has also without momentum.
    assert set(interop.to_tensorflow1(rmsprop(0.1).init({"w": jnp.ones(2)}), lambda tree: tree)) == {
        "w/RMSProp",
        "w/RMSProp_1",
    }
