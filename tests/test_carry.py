"""carry_over: from one state into another, with other options, in other wrappers, of Optax, of Flax."""

import dataclasses
import functools
import itertools
import json
import pathlib
from typing import Any, NamedTuple

import chex
import earlier
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import nnx
from flax.training.train_state import TrainState
from golden.checkpoints import END, EPS, ORIGIN, recorded, STOP
from helpers import mesh_of, step_of, types
from interop_helpers import assert_own_buffers, buffers, checkpoint, entry, group
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from problems import grads
from recordings import difference, from_torch_layout, LIMIT, rates, run as run_recorded

from rmsprop_jax import (
    _storage,
    carry_over,
    dialects,
    interop,
    rmsprop,
    RMSPropState,
    round_params_stochastically,
    RoundParamsState,
    scale_by_rms,
)


pytestmark = pytest.mark.usefixtures("users_climate")  # Optax and Flax mix dtypes and ranks

PARAMS = {
    "body": {"kernel": jnp.arange(6.0).reshape(2, 3) / 7, "bias": jnp.ones(3)},
    "head": jnp.full(3, 0.3, jnp.float32),
}
LABELS = {"body": "a", "head": "b"}
OTHER_LABELS = {"body": "y", "head": "x"}
EVERY_SLOT = {"momentum": 0.9, "centered": True, "eps": 1e-3}


def trained(tx, params=PARAMS, steps=3, update=None):
    state = tx.init(params)
    for _ in range(steps):
        _, state = (update or tx.update)(params, state, params)
    return state


def carried(old, new, params=PARAMS, steps=3):
    state = trained(old, params, steps)
    return state, carry_over(state, new.init(params))


def accumulating(tx, steps=3, **options):
    return optax.MultiSteps(tx, steps, **options).gradient_transformation()


# --- The run goes on ----------------------------------------------------------------------------------------


def schedule(count):
    return 1e-2 / (1 + jnp.asarray(count, jnp.float32) / 50)


def wrapped(make):
    """The wrappers that people keep an optimizer in."""
    tx = make(schedule, **EVERY_SLOT)
    leaves = {"body": {"kernel": "a", "bias": "b"}, "head": "b"}
    return {
        "bare": tx,
        "chain": optax.chain(optax.clip(10.0), tx),
        "inject_hyperparams": optax.inject_hyperparams(make)(learning_rate=schedule, **EVERY_SLOT),
        "MultiSteps": accumulating(tx, 1),
        "apply_if_finite": optax.apply_if_finite(tx, 3),
        "masked": optax.masked(tx, {"body": True, "head": True}),
        "a group per subtree": optax.partition({"a": tx, "b": tx}, LABELS),
        "a group per leaf": optax.partition({"a": tx, "b": tx}, leaves),
        "all at once": optax.chain(
            optax.clip(10.0),
            accumulating(optax.inject_hyperparams(make)(learning_rate=schedule, **EVERY_SLOT), 1),
        ),
    }


EVERY_TX = {
    (whose, name): tx
    for whose, make in (("ours", rmsprop), ("Optax's", optax.rmsprop))
    for name, tx in wrapped(make).items()
}


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
    """Parameters and state after 100 steps, and parameters after 200."""
    params, state = runner(key)(PARAMS, EVERY_TX[key].init(PARAMS), jnp.arange(100))
    return params, state, runner(key)(params, state, jnp.arange(100, 200))[0]


def largest(tree, other):
    return max(jax.tree.leaves(jax.tree.map(lambda a, b: np.abs(np.asarray(a) - np.asarray(b)).max(), tree, other)))


# A third of all pairs, in which each wrapper is on both sides, with six or three others.
PAIRS = [(a, b) for i, a in enumerate(EVERY_TX) for j, b in enumerate(EVERY_TX) if "ours" in a + b and (i + j) % 3 == 0]


@pytest.mark.slow
@pytest.mark.parametrize(("source", "target"), PAIRS, ids=lambda key: ", ".join(key))
def test_a_run_goes_on_in_another_wrapper(source, target):
    params, state, end = half_way(source)
    into = EVERY_TX[target].init(params)
    result = carry_over(state, into)
    assert types(result) == types(into)
    assert_own_buffers(result, state, into)
    resumed, _ = runner(target)(params, result, jnp.arange(100, 200))
    afresh, _ = runner(target)(params, into, jnp.arange(100, 200))
    way = largest(end, params)
    assert largest(resumed, end) / way < 2e-6  # Optax's E[g²] - E[g]² rounds
    assert largest(afresh, end) / way > 0.1


OPTIONS = [
    {},
    {"momentum": 0.9},
    {"momentum": 0.9, "nesterov": True, "initial_scale": 1.0},
    {"centered": True},
    {"centered": True, "momentum": 0.9, "eps_in_sqrt": False},
    {"bias_correction": True, "momentum": 0.9},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_a_run_of_optax_is_resumed_and_goes_back(options):
    # Optax takes E[g²] - E[g]² in float32: in this run it ends 2.5e-6 from float64, where we end 2.7e-7.
    accepted = 4e-6 if options == {"centered": True} else LIMIT
    ours, theirs = (f(rates, **{"eps": EPS, **options}) for f in (rmsprop, optax.rmsprop))
    origin = from_torch_layout(ORIGIN)
    whole, _ = run_recorded(theirs, theirs.init(origin), ORIGIN, 0, END)
    for first, second in ((theirs, ours), (ours, theirs)):
        middle, state = run_recorded(first, first.init(origin), ORIGIN, 0, STOP)
        end, _ = run_recorded(second, carry_over(state, second.init(from_torch_layout(middle))), middle)
        assert difference(end, whole) < accepted


def test_half_precision_and_complex_parameters_of_optax():
    params = {"w": jnp.ones(3, jnp.bfloat16), "z": jnp.ones(2, jnp.complex64)}
    for theirs, ours in (
        (optax.scale_by_rms(), scale_by_rms()),
        (optax.rmsprop(0.1, momentum=0.9, centered=True), rmsprop(0.1, momentum=0.9, centered=True)),
    ):
        state, there = carried(theirs, ours, params, steps=1)
        assert types(there) == types(ours.init(params))
        back = carry_over(there, theirs.init(params))
        assert types(back) == types(state)
        chex.assert_trees_all_close(back, state, rtol=0.01)


# --- Other options ------------------------------------------------------------------------------------------


def test_groups_of_different_options():
    mixed, theirs = (
        optax.partition({"a": make(schedule, momentum=0.9), "b": make(schedule, centered=True)}, LABELS)
        for make in (rmsprop, optax.rmsprop)
    )
    state, same = carried(mixed, mixed)
    chex.assert_trees_all_equal(same, state)
    whole = carry_over(state, rmsprop(0.1, momentum=0.9, centered=True).init(PARAMS))
    assert (whole.mu["body"]["bias"] == 0).all()
    assert (whole.trace["head"] == 0).all()
    chex.assert_trees_all_equal(carry_over(whole, mixed.init(PARAMS)), state)
    again = carry_over(carry_over(state, theirs.init(PARAMS)), mixed.init(PARAMS))
    chex.assert_trees_all_close(again, state, rtol=1e-5, atol=1e-7)


def test_a_dropped_mean_goes_back_into_the_second_moment():
    state, there = carried(rmsprop(0.1, centered=True), rmsprop(0.1))
    expected = jax.tree.map(lambda nu, mu: nu + mu**2, state.nu, state.mu)
    chex.assert_trees_all_close(there.nu, expected, rtol=1e-6)
    chex.assert_trees_all_close(there.nu, trained(rmsprop(0.1)).nu, rtol=1e-5)


def test_random_bits_of_a_narrow_state_differ_by_slot_and_by_count():
    """Rounded without bias, and the roundings of two slots, and of two counts, are not the same."""
    x = jnp.full(40_000, 1.0 + 2.0**-10)
    into = rmsprop(0.1, centered=True, momentum=0.9, state_dtype=jnp.bfloat16).init(x)
    one, two = (carry_over(RMSPropState(jnp.int32(count), x, x, x), into) for count in (1, 2))
    for slot in (one.nu, one.mu, one.trace, two.nu):
        up = np.asarray(slot, np.float32) > 1
        assert abs(up.mean() - 1 / 8) < 0.01  # a bfloat16 above 1 is 1 + 2⁻⁷
    for slot in (one.mu, one.trace, two.nu):
        assert 0.1 < np.mean(np.asarray(slot != one.nu)) < 0.34  # 2/8 · 7/8 of independent bits


def test_groups_of_one_byte_become_one_state():
    """What only one group has is zero in the others, not the number of code 0."""
    lean = {"state_dtype": jnp.uint8}
    tx = optax.partition({"a": rmsprop(0.1, momentum=0.9, **lean), "b": rmsprop(0.1, centered=True, **lean)}, LABELS)
    arrays = dict(interop.to_keras(trained(tx), lambda tree: {"head": tree["head"], **tree["body"]}))
    assert set(arrays) == {"iteration"} | {
        f"{n}_{s}" for n in ("head", "kernel", "bias") for s in ("velocity", "momentum", "average_gradient")
    }
    assert (arrays["head_momentum"] == 0).all()
    assert (arrays["bias_average_gradient"] == 0).all()
    assert (arrays["bias_velocity"] > 0).all()


def test_shapes_are_enough_where_nothing_else_is_needed():
    lean = rmsprop(0.1, momentum=0.9, state_dtype=jnp.uint8)
    state = trained(rmsprop(0.1))
    for into in (jax.eval_shape(lean.init, PARAMS), lean.init(PARAMS)):
        there = carry_over(state, into)
        assert types(there) == types(lean.init(PARAMS))
        assert all((x == 0).all() for x in jax.tree.leaves(there.trace))
    injected = jax.eval_shape(optax.inject_hyperparams(rmsprop)(learning_rate=0.1).init, PARAMS)
    with pytest.raises(ValueError, match=r"`into` has only the shape of \.hyperparams\['decay'\], and state has no"):
        carry_over(state, injected)
    new = jax.eval_shape(rmsprop(0.1).init, PARAMS | {"new": jnp.ones(2)})
    with pytest.raises(ValueError, match=r"`into` has only the shape of \.nu\['new'\]"):
        carry_over(state, new, allow_new=True)


# --- What wrappers hold -------------------------------------------------------------------------------------


def test_what_a_wrapper_holds_is_kept():
    def wrapped_twice(tx):
        return optax.apply_if_finite(accumulating(tx), 3)

    old, new = wrapped_twice(rmsprop(0.1)), optax.chain(optax.clip(1.0), wrapped_twice(rmsprop(0.1, momentum=0.9)))
    state, update = old.init(PARAMS), jax.jit(old.update)
    for gradients in (jax.tree.map(lambda p: p * jnp.nan, PARAMS), PARAMS, PARAMS, PARAMS, PARAMS):
        _, state = update(gradients, state, PARAMS)
    after = carry_over(state, new.init(PARAMS))[1]
    assert (after.total_notfinite, after.inner_state.mini_step, after.inner_state.gradient_step) == (1, 1, 1)
    chex.assert_trees_all_equal(after.inner_state.acc_grads, PARAMS)
    assert after.inner_state.inner_opt_state.count == 1


def test_half_an_accumulation_that_has_no_place():
    into, half = rmsprop(0.1).init(PARAMS), functools.partial(optax.tree.set, mini_step=jnp.int32(1))
    beside = optax.chain(rmsprop(0.1), accumulating(optax.identity())).init(PARAMS)  # not around RMSProp
    ours, theirs = (trained(accumulating(make(0.1))) for make in (rmsprop, optax.rmsprop))
    inside = optax.flatten(accumulating(rmsprop(0.1))).init(PARAMS)
    outside = accumulating(optax.flatten(rmsprop(0.1))).init(PARAMS)
    for state, target in ((ours, into), (theirs, into), (ours, beside), (inside, outside)):
        with pytest.raises(
            ValueError, match=r"state also holds \.acc_grads.*, gradients of an unfinished update: `into` has no place"
        ):
            carry_over(half(state), target)
        carry_over(state, target)  # between two updates nothing is lost
    assert jax.jit(carry_over)(half(ours), into).count == 1  # traced, it cannot be seen


def test_hyperparameters_are_those_of_the_new_state():
    old, new = (optax.inject_hyperparams(rmsprop)(learning_rate=r, momentum=0.9) for r in (0.5, 0.25))
    state, there = carried(old, new)
    assert there.hyperparams["learning_rate"] == 0.25
    assert there.count == state.count == 3
    chex.assert_trees_all_equal(there.inner_state, state.inner_state)


def test_a_new_schedule_continues_from_the_count():
    new = optax.chain(optax.inject_hyperparams(rmsprop)(schedule), optax.scale_by_schedule(schedule), optax.ema(0.9))
    _, there = carried(rmsprop(0.1), new)
    assert there[0].count == there[0].hyperparams_states["learning_rate"].count == there[1].count == 3
    assert there[2].count == 0  # an average is new
    assert carried(rmsprop(0.1), accumulating(rmsprop(0.1)))[1].gradient_step == 3


def test_averages_that_would_be_lost_are_named():
    with pytest.raises(ValueError, match=r"state also holds \[1\]\.ema\['body'\].*`into` has no place for it"):
        carried(optax.chain(rmsprop(0.1), optax.ema(0.9)), rmsprop(0.1))
    bf16 = jax.tree.map(jnp.bfloat16, PARAMS)
    four_bytes = optax.chain(rmsprop(0.1), round_params_stochastically(keep_rest=True))
    with pytest.raises(ValueError, match=r"state also holds \[1\]\.rest\['body'\]"):
        carried(four_bytes, rmsprop(0.1), bf16)
    carried(optax.chain(rmsprop(0.1), round_params_stochastically()), rmsprop(0.1), bf16)  # a number of an update


def averages(*parts):
    return optax.chain(*(optax.ema(0.9) if part == "ema" else rmsprop(0.1) for part in parts))


def test_an_average_stays_on_its_side_of_rmsprop():
    in_front, behind = averages("ema", "rmsprop"), averages("rmsprop", "ema")
    state, there = carried(in_front, optax.chain(optax.clip(9.0), optax.ema(0.9), rmsprop(0.1)))
    chex.assert_trees_all_equal(there[1:], state)
    for old, new, place in ((in_front, behind, 0), (behind, in_front, 1)):
        with pytest.raises(
            ValueError,
            match=rf"state also holds \[{place}\]\.ema.*same side of RMSProp's state\. To drop it, .*, state\[{1 - place}\]",
        ):
            carried(old, new)
        # As the error says: the average starts anew.
        state = trained(old)
        there = carry_over(state[1 - place], new.init(PARAMS))
        assert there[1 - place].count == 0
        chex.assert_trees_all_equal(there[place], state[1 - place])


def test_averages_on_both_sides_are_not_exchanged():
    both = averages("ema", "rmsprop", "ema")
    state, there = carried(both, optax.apply_if_finite(both, 3))
    chex.assert_trees_all_equal(there.inner_state, state)
    assert not (state[0].ema["head"] == state[2].ema["head"]).all()
    # One of two behind each other: which one would be a guess.
    with pytest.raises(ValueError, match=r"state has 2 values for \[1\]\.ema\['head'\], which differ"):
        carried(averages("rmsprop", "ema", "ema"), averages("rmsprop", "ema"))


def test_another_optimizer_in_another_group():
    old = optax.partition({"a": rmsprop(0.1), "b": optax.adam(0.1)}, LABELS)
    state, there = carried(old, optax.apply_if_finite(old, 3))
    chex.assert_trees_all_equal(there.inner_state, state)
    with pytest.raises(ValueError, match=r"state also holds \.inner_states\['b'\].*\.mu\['head'\]"):
        carried(old, optax.partition({"a": rmsprop(0.1), "b": optax.set_to_zero()}, LABELS))


OTHERS = {
    "snapshot": lambda tx: optax.chain(tx, optax.snapshot("u", lambda u: u)),
    "noise": lambda tx: optax.chain(tx, optax.add_noise(0.1, 0.5, jax.random.key(3))),
    "noise, an old key": lambda tx: optax.chain(tx, optax.add_noise(0.1, 0.5, 3)),
    "DoG": lambda tx: optax.chain(tx, optax.contrib.dog()),
    "prodigy": lambda tx: optax.chain(tx, optax.contrib.prodigy()),
    "schedule_free": lambda tx: optax.contrib.schedule_free(tx, 0.1),
    "mechanize": optax.contrib.mechanize,
    "sam": lambda tx: optax.contrib.sam(tx, optax.sgd(0.1)),
    "apply_every": lambda tx: optax.chain(tx, optax.apply_every(3)),
    "skip_not_finite": lambda tx: accumulating(tx, 2, should_skip_update_fn=optax.skip_not_finite),
    "conditionally_transform": lambda tx: optax.conditionally_transform(tx, lambda step, **_: step > 1),
    "zero_nans": lambda tx: optax.chain(optax.zero_nans(), tx),
    "named_chain": lambda tx: optax.named_chain(("before", optax.ema(0.9)), ("rms", tx), ("after", optax.trace(0.5))),
    "nested chains": lambda tx: optax.chain(optax.chain(optax.ema(0.9), optax.chain(tx)), optax.chain(optax.ema(0.5))),
    "MultiSteps in a group": lambda tx: optax.partition({"a": accumulating(tx, 2), "b": tx}, LABELS),
    "injection in a group": lambda tx: optax.partition(
        {"a": optax.chain(tx, optax.inject_hyperparams(optax.scale)(0.5)), "b": optax.chain(tx, optax.ema(0.9))}, LABELS
    ),
}


if hasattr(optax, "monitor"):  # the oldest Optax that we support has none
    OTHERS |= {
        "monitor": lambda tx: optax.chain(tx, optax.monitor({"n": optax.tree.norm, "u": lambda u: u})),
        "monitor of averages": lambda tx: optax.chain(
            optax.monitor({"a": optax.measure_with_ema(lambda u: u["head"], decay=0.9), "n": optax.tree.norm}), tx
        ),
    }


@pytest.mark.slow
@pytest.mark.parametrize("wrap", OTHERS.values(), ids=OTHERS)
def test_a_fresh_state_of_the_same_kind_takes_everything(wrap):
    tx = wrap(rmsprop(0.1, momentum=0.9))
    update, fresh = jax.jit(tx.update), tx.init(PARAMS)
    state = trained(tx, update=update)
    expected, _ = update(PARAMS, state, PARAMS)
    there = carry_over(state, fresh)
    assert_own_buffers(there, state)
    further_back = carry_over(state, optax.chain(optax.clip(1e9), tx).init(PARAMS))[1]  # by one link of a chain
    for result in (there, further_back):
        assert jax.tree.structure(result) == jax.tree.structure(fresh)
        chex.assert_trees_all_equal(update(PARAMS, result, PARAMS)[0], expected)


# --- Wrappers of one's own ----------------------------------------------------------------------------------


class Kept(NamedTuple):
    """A tree like the parameters, None where it has nothing, as round_params_stochastically has it."""

    step: jax.Array
    rest: Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class KeptAsDataclass:
    step: jax.Array
    rest: Any


def keeping(kind, rest=True):
    def init(params):
        tree = jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.int8) if p.ndim > 1 else None, params)
        return kind(step=jnp.zeros((), jnp.int32), rest=tree if rest else None)

    def update(updates, state, params=None):
        step, rest = (state["step"], state["rest"]) if kind is dict else (state.step, state.rest)
        return updates, kind(step=step + 1, rest=jax.tree.map(lambda x: x + 1, rest))

    return optax.GradientTransformation(init, update)


@pytest.mark.parametrize("kind", [Kept, KeptAsDataclass, dict])
@pytest.mark.parametrize(
    "wrap",
    [
        lambda *parts: optax.chain(*parts),
        lambda *parts: optax.chain(optax.clip(9.0), *parts),
        lambda *parts: optax.chain(optax.apply_if_finite(parts[0], 3), *parts[1:]),
        lambda *parts: optax.masked(optax.chain(*parts), {"body": True, "head": True}),
    ],
    ids=["chain", "longer chain", "wrapped inside", "wrapped outside"],
)
def test_a_wrapper_of_one_s_own(kind, wrap):
    def rests(state):
        return [np.asarray(x) for x in jax.tree.leaves(state) if x.dtype == jnp.int8]

    def is_step(path):
        return getattr(path[-1], "name", getattr(path[-1], "key", None)) == "step"

    def steps(state):
        return [int(x) for path, x in jax.tree_util.tree_leaves_with_path(state) if is_step(path)]

    old = optax.chain(rmsprop(0.1), keeping(kind))
    _, there = carried(old, wrap(rmsprop(0.1), keeping(kind)))
    assert steps(there) == [3]
    assert (np.stack(rests(there)) == 3).all()
    # What only the new one has starts as it does there. A field that is off there is left out.
    _, there = carried(optax.chain(rmsprop(0.1), keeping(kind, rest=False)), wrap(rmsprop(0.1), keeping(kind)))
    assert steps(there) == [3]
    assert (np.stack(rests(there)) == 0).all()
    if kind is not dict:
        _, there = carried(old, wrap(rmsprop(0.1), keeping(kind, rest=False)))
        assert steps(there) == [3]


class Pair(NamedTuple):
    policy: Any
    value: Any


def test_averages_of_parameters_in_named_tuples_are_told_apart():
    params = Pair(jnp.ones(2), Pair(jnp.ones(3), jnp.ones(4)))
    old = optax.chain(rmsprop(0.1), optax.ema(0.9), optax.trace(0.5))
    new = optax.chain(rmsprop(0.1), optax.trace(0.5), optax.ema(0.9))
    state, there = carried(old, new, params)
    chex.assert_trees_all_equal(there, (state[0], state[2], state[1]))


# --- Parameters that train no longer, or not yet --------------------------------------------------------------


def test_freezing_and_unfreezing_by_groups():
    frozen = optax.partition({"a": rmsprop(0.1), "b": optax.set_to_zero()}, LABELS)
    state, there = carried(rmsprop(0.1), frozen)
    chex.assert_trees_all_equal(there.inner_states["a"].inner_state.nu["body"], state.nu["body"])
    # What was frozen has no average: it starts as it does in the new state.
    back = carry_over(there, rmsprop(0.1, initial_scale=2.0).init(PARAMS))
    assert (back.nu["head"] == 2).all()
    chex.assert_trees_all_equal(back.nu["body"], state.nu["body"])
    with pytest.raises(ValueError, match=r"no accumulators for \['head'\], which were masked"):
        interop.to_keras(there, lambda tree: tree)
    # With an average beside it: that of a parameter that is now frozen goes with it.
    groups = {"a": optax.chain(rmsprop(0.1), optax.ema(0.9)), "b": optax.set_to_zero()}
    state, there = carried(averages("rmsprop", "ema"), optax.partition(groups, LABELS))
    chex.assert_trees_all_equal(there.inner_states["a"].inner_state[1].ema["body"], state[1].ema["body"])


@pytest.mark.parametrize("wrap", [lambda tx: tx, accumulating, lambda tx: optax.chain(tx, optax.ema(0.9))])
def test_new_parameters_start_as_they_are_in_the_new_state(wrap):
    body, tx = {"body": PARAMS["body"]}, wrap(rmsprop(0.1, momentum=0.9, initial_scale=2.0))
    state, into = trained(tx, body), tx.init(PARAMS)
    with pytest.raises(ValueError, match=r"state has nothing for \['head'\]: pass allow_new=True to start them as"):
        carry_over(state, into)
    there = carry_over(state, into, allow_new=True)
    nu, trace = optax.tree.get(there, "nu"), optax.tree.get(there, "trace")
    assert (nu["head"] == 2).all()
    assert (trace["head"] == 0).all()
    chex.assert_trees_all_equal(nu["body"], optax.tree.get(state, "nu")["body"])
    chex.assert_trees_all_equal(trace["body"], optax.tree.get(state, "trace")["body"])
    # It allows nothing else.
    with pytest.raises(ValueError, match=r"`into` has no place for \['body'\]\['bias'\], \['body'\]\['kernel'\]"):
        carry_over(state, tx.init({"head": PARAMS["head"]}), allow_new=True)
    with pytest.raises(TypeError, match="allow_new=1 has type int"):
        carry_over(state, into, allow_new=1)


# --- Flax's boxes -------------------------------------------------------------------------------------------


def boxes(momentum):
    """One model's parameters, and its states of three steps, in each of the boxes in which Flax keeps arrays."""
    tx = rmsprop(0.1, momentum=momentum)
    plain = {"fc": {"kernel": jnp.ones((2, 3)), "bias": jnp.ones(3)}, "value": {"value": jnp.ones(2)}}

    class Head(nnx.Module):
        def __init__(self):
            self.value = nnx.Param(jnp.ones(2))

    class Model(nnx.Module):
        def __init__(self):
            self.fc, self.value = nnx.Linear(2, 3, rngs=nnx.Rngs(0)), Head()

    optimizer = nnx.Optimizer(Model(), tx, wrt=nnx.Param)
    ones = jax.tree.map(jnp.ones_like, nnx.state(optimizer_model := Model(), nnx.Param))
    for _ in range(3):
        optimizer.update(optimizer_model, ones)
    partitioned = jax.tree.map(lambda p: nn.Partitioned(p, names=(None,) * p.ndim), plain)
    dicts = jax.tree.map(lambda x: {"value": np.asarray(x)}, trained(tx, plain)._asdict())
    return {
        "plain": trained(tx, plain),
        "NNX": optimizer.opt_state,
        "Linen": trained(tx, partitioned),
        "Orbax": RMSPropState(**dicts),  # NNX's state, restored without a target
    }


def test_paths_are_the_same_in_every_box():
    states, others = boxes(0.9), boxes(None)
    expected = {(slot, "/".join(k)): x for slot in ("nu", "trace") for k, x in named(getattr(states["plain"], slot))}
    for old, state in states.items():
        for new in ("plain", "NNX", "Linen"):
            into = states[new]
            there = carry_over(state, into)
            assert jax.tree.structure(there) == jax.tree.structure(into)
            assert [int(x) for x in jax.tree.leaves(there.count)] == [3]
            found = {(slot, "/".join(k)): x for slot in ("nu", "trace") for k, x in named(getattr(there, slot))}
            assert found.keys() == expected.keys(), (old, new)
            for key, x in found.items():
                np.testing.assert_array_equal(x, expected[key])
            assert jax.tree.structure(carry_over(state, others[new])) == jax.tree.structure(others[new])


def named(tree):
    """Arrays by the keys on the way, without a box at the end."""
    for path, x in jax.tree_util.tree_leaves_with_path(tree):
        keys = [str(getattr(key, "key", getattr(key, "name", key))) for key in path]
        yield keys[:-1] if isinstance(path[-1], jax.tree_util.GetAttrKey) else keys, x


def test_flax_s_train_state_and_nnx_s_optimizer_go_on():
    tx, new_tx = rmsprop(0.1), optax.chain(optax.clip(1.0), rmsprop(0.1, momentum=0.9))
    train_state = TrainState.create(apply_fn=None, params=PARAMS, tx=tx).apply_gradients(grads=PARAMS)
    moved = train_state.replace(tx=new_tx, opt_state=carry_over(train_state.opt_state, new_tx.init(PARAMS)))
    assert moved.apply_gradients(grads=PARAMS).opt_state[1].count == 2

    model = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
    old, new = (nnx.Optimizer(model, t, wrt=nnx.Param) for t in (tx, new_tx))
    grads = nnx.grad(lambda m: (m(jnp.ones((1, 2))) ** 2).sum())(model)
    old.update(model, grads)
    chex.assert_trees_all_equal(
        nnx.jit(carry_over)(old.opt_state, new.opt_state), carry_over(old.opt_state, new.opt_state)
    )
    new.opt_state = carry_over(old.opt_state, new.opt_state)
    kernels = [jax.tree.leaves(optax.tree.get(optimizer.opt_state, "nu")["kernel"]) for optimizer in (old, new)]
    np.testing.assert_array_equal(*kernels)
    new.update(model, grads)
    assert jax.tree.leaves(new.opt_state[1].count) == [2]


def test_half_an_accumulation_leaves_nnx():
    model, tx = nnx.Linear(2, 3, rngs=nnx.Rngs(0)), accumulating(rmsprop(0.1))
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    optimizer.update(model, jax.tree.map(jnp.ones_like, nnx.state(model, nnx.Param)))
    plain = {"kernel": jnp.ones((2, 3)), "bias": jnp.ones(3)}
    chex.assert_trees_all_close(carry_over(optimizer.opt_state, tx.init(plain)), trained(tx, plain, 1), rtol=1e-6)


# --- Errors -------------------------------------------------------------------------------------------------


MISFITS = {
    "shape": (
        lambda p: rmsprop(0.1).init({**p, "head": jnp.ones(5)}),
        r"\.nu\['head'\] has shape \(3,\) in state and \(5,\) in `into`",
    ),
    "new name": (lambda p: rmsprop(0.1).init({**p, "tail": jnp.ones(5)}), r"state has nothing for \['tail'\]"),
    "lost name": (
        lambda p: rmsprop(0.1).init({"head": p["head"]}),
        r"`into` has no place for \['body'\]\['bias'\], \['body'\]\['kernel'\]: to drop them, mask them",
    ),
    "adam": (lambda p: optax.adam(0.1).init(p), r"no state of RMSProp in `into`, which is a tuple"),
}


@pytest.mark.parametrize(("into", "message"), MISFITS.values(), ids=MISFITS)
def test_what_does_not_fit_is_listed(into, message):
    for state in (trained(rmsprop(0.1)), trained(optax.rmsprop(0.1))):
        with pytest.raises(ValueError, match=message) as error:
            carry_over(state, into(PARAMS))
        assert len(str(error.value)) < 400
    with pytest.raises(ValueError, match=message):  # also while tracing
        jax.jit(carry_over)(state, into(PARAMS))


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
    with pytest.raises(
        ValueError, match="no state of RMSProp in state, which is a .*it holds (Scale|Trace|nothing)"
    ) as error:
        carry_over(state, rmsprop(0.1).init(PARAMS))
    assert len(str(error.value)) < 300


def test_a_state_restored_as_a_dict_is_refused_with_the_way_out():
    state, tx = trained(rmsprop(0.1)), rmsprop(0.1)
    kept = {"opt_state": [{}, {**state._asdict(), "nu": dict(state.nu)}]}
    with pytest.raises(ValueError, match=r"restored as a dict, put RMSPropState\(\*\*state\['opt_state'\]\[1\]\)"):
        carry_over(kept, tx.init(PARAMS))
    chex.assert_trees_all_equal(carry_over(RMSPropState(**kept["opt_state"][1]), tx.init(PARAMS)), state)


def test_two_accumulators_for_one_parameter():
    twice = optax.chain(optax.scale_by_rms(), optax.scale_by_rms())
    with pytest.raises(ValueError, match=r"2 accumulators for nu\['body'\]\['bias'\]: \[0\], \[1\]"):
        carried(twice, rmsprop(0.1))


def test_a_buffer_is_not_exchanged_for_another_one():
    """PyTorch's order has the trace before the rate: its buffer is another one than that of optax.rmsprop."""
    order = lambda rms: optax.chain(rms(eps_in_sqrt=False), optax.trace(0.9), optax.scale_by_learning_rate(0.1))  # noqa: E731
    theirs, ours = order(optax.scale_by_rms), order(scale_by_rms)
    state, there = carried(theirs, ours)
    chex.assert_trees_all_equal(there[1], state[1])
    with pytest.raises(ValueError, match=r"state also holds \[1\]\.trace\['body'\].*: `into` has no place for it"):
        carry_over(state, rmsprop(0.1, momentum=0.9).init(PARAMS))
    for make in (rmsprop, optax.rmsprop):
        state = trained(make(0.1, momentum=0.9))
        with pytest.raises(
            ValueError, match=r"has RMSProp's momentum buffer, but `into` has optax.trace at \[1\]\.trace"
        ):
            carry_over(state, ours.init(PARAMS))
        there = carry_over(carry_over(state, rmsprop(0.1).init(PARAMS)), ours.init(PARAMS))  # as the error says
        assert (there[1].trace["head"] == 0).all()


# --- optax.rmsprop, or a chain of the same parts ----------------------------------------------------------------


CHAINS = {
    "rate before the trace": lambda rms: (rms(0.9), optax.scale(-0.1), optax.trace(0.9)),
    "schedule before the trace": lambda rms: (rms(0.9), optax.scale_by_schedule(schedule), optax.trace(0.9)),
    "no trace": lambda rms: (rms(0.9), optax.scale(-0.1), optax.identity()),
}


@pytest.mark.parametrize("parts", CHAINS.values(), ids=CHAINS)
def test_the_other_side_decides_whether_three_parts_are_a_chain(parts):
    theirs, ours = optax.chain(*parts(optax.scale_by_rms)), optax.chain(*parts(scale_by_rms))
    state, there = carried(theirs, ours)
    back = carry_over(there, theirs.init(PARAMS))
    chex.assert_trees_all_equal(back, state)
    for (tx, s), (other, o) in (((theirs, state), (ours, there)), ((ours, there), (theirs, back))):
        chex.assert_trees_all_close(other.update(PARAMS, o, PARAMS)[0], tx.update(PARAMS, s, PARAMS)[0], rtol=1e-6)
    # The same parts are optax.rmsprop: so they may become our rmsprop.
    momentum = 0.9 if isinstance(state[2], optax.TraceState) else None
    there = carry_over(state, rmsprop(0.1, momentum=momentum).init(PARAMS))
    assert (there.trace is None) == (momentum is None)
    if momentum:
        chex.assert_trees_all_equal(there.trace, jax.tree.map(jnp.negative, state[2].trace))
        chex.assert_trees_all_equal(carry_over(there, theirs.init(PARAMS))[2], state[2])


# --- Counts -------------------------------------------------------------------------------------------------


def test_the_count_of_the_nearest_wrapper_that_counts():
    """optax.rmsprop without a schedule does not count. Around it MultiSteps counts updates, and injection gradients."""
    tx = optax.inject_hyperparams(lambda learning_rate: accumulating(optax.rmsprop(learning_rate)))(learning_rate=0.1)
    state = trained(tx, steps=6, update=jax.jit(tx.update))
    there = carry_over(state, rmsprop(0.1).init(PARAMS))
    assert (state.count, state.inner_state.gradient_step, there.count) == (6, 2, 2)
    assert carried(optax.rmsprop(0.1), rmsprop(0.1))[1].count == 0


def test_counts_that_are_equally_near_and_differ():
    tx = optax.chain(optax.scale_by_rms(), *(optax.scale_by_schedule(lambda count: 1.0) for _ in range(2)))
    state, into = tx.init(PARAMS), scale_by_rms().init(PARAMS)
    two = (state[0], state[1]._replace(count=jnp.int32(3)), state[2]._replace(count=jnp.int32(4)))
    with pytest.raises(
        ValueError,
        match=r"state has 2 values for \.count, which differ: 3 in state\[1\].count, 4 in state\[2\].count. Set one for all",
    ):
        carry_over(two, into)
    assert carry_over(optax.tree.set(two, count=3), into).count == 3  # as the error says


def in_group_b(state, **fields):
    group = state.inner_states["b"]
    new = group._replace(inner_state=optax.tree.set(group.inner_state, **fields))
    return state._replace(inner_states={**state.inner_states, "b": new})


def test_groups_that_have_counted_differently():
    tx = optax.partition({"a": rmsprop(0.1), "b": rmsprop(0.1)}, LABELS)
    state, into = trained(tx), rmsprop(0.1).init(PARAMS)
    differ = in_group_b(state, count=7)
    with pytest.raises(
        ValueError, match=r"state has 2 values for \.count, which differ: 3 in state.*, 7 in state.*\. Set one for all"
    ):
        carry_over(differ, into)
    assert carry_over(optax.tree.set(differ, count=7), into).count == 7  # as the error says
    with pytest.raises(ValueError, match=r"the groups have different counts: 3 in state.*, 7 in state"):
        interop.to_keras(differ, lambda tree: tree)
    # In the same groups each keeps its own, also with other wrappers and other options.
    groups = optax.apply_if_finite(
        optax.partition({"x": rmsprop(0.1, centered=True), "y": rmsprop(0.1)}, OTHER_LABELS), 3
    )
    there = carry_over(differ, groups.init(PARAMS)).inner_state.inner_states
    assert (there["y"].inner_state.count, there["x"].inner_state.count) == (3, 7)
    # A traced value is never looked at.
    assert jax.jit(lambda count: carry_over(in_group_b(state, count=count), into))(jnp.int32(3)).count == 3


def test_schedules_of_groups_that_differ_are_not_guessed():
    scheduled = lambda: optax.chain(optax.scale_by_schedule(lambda count: 1.0), optax.ema(0.9), rmsprop(0.1))  # noqa: E731
    groups = optax.partition({"a": scheduled(), "b": scheduled()}, LABELS)
    state, into = trained(groups), scheduled().init(PARAMS)
    assert carry_over(state, into)[0].count == 3
    inner = state.inner_states["b"].inner_state
    state.inner_states["b"] = state.inner_states["b"]._replace(
        inner_state=(inner[0]._replace(count=jnp.int32(5)), *inner[1:])
    )
    with pytest.raises(ValueError, match=r"state has 2 values for \[0\]\.count, which differ"):
        carry_over(state, into)
    same = carry_over(state, groups.init(PARAMS))  # in the same groups each keeps its own
    assert [int(same.inner_states[label].inner_state[0].count) for label in "ab"] == [3, 5]


# --- Many states, and one vector ------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [jnp.uint8, jnp.bfloat16], ids=["uint8", "bfloat16"])
def test_vmapped_states_into_narrow_ones(dtype):
    tx, narrow = rmsprop(0.1, momentum=0.9), rmsprop(0.1, momentum=0.9, state_dtype=dtype)
    many = {"w": np.random.default_rng(0).normal(size=(5, 64, 64)).astype(np.float32), "b": np.ones(5, np.float32)}
    state = jax.jit(lambda many: jax.vmap(tx.update)(many, jax.vmap(tx.init)(many))[1])(many)
    into = jax.jit(jax.vmap(narrow.init))(many)
    there = jax.jit(carry_over)(state, into)
    assert types(there) == types(into)
    back = jax.jit(carry_over)(there, state)
    for slot in ("nu", "trace"):
        mine, wide = (np.asarray(getattr(tree, slot)["w"]) for tree in (back, state))
        # Rounded, and right in the mean of each member.
        assert not np.array_equal(mine, wide)
        np.testing.assert_allclose(abs(mine).mean((1, 2)), abs(wide).mean((1, 2)), rtol=0.02)
    jax.eval_shape(jax.vmap(narrow.update), many, there)
    with pytest.raises(ValueError, match=r"\.count has shape \(5,\) in state and \(\) in `into`"):
        carry_over(state, jax.eval_shape(narrow.init, jax.tree.map(lambda x: x[0], many)))


def test_vmapped_accumulations():
    every, many = accumulating(rmsprop(0.1), 2), jnp.ones((3, 2))
    update, into = jax.jit(jax.vmap(every.update)), jax.vmap(rmsprop(0.1).init)(many)
    _, half = update(many, jax.vmap(every.init)(many), many)
    with pytest.raises(ValueError, match="gradients of an unfinished update"):
        carry_over(half, into)
    _, whole = update(many, half, many)
    assert carry_over(whole, into).count.tolist() == [1, 1, 1]


@pytest.mark.parametrize("options", [{}, EVERY_SLOT, {"momentum": 0.9, "state_dtype": jnp.uint8}], ids=str)
def test_all_parameters_as_one_vector(options):
    plain, flat = rmsprop(schedule, **options), optax.flatten(rmsprop(schedule, **options))
    state, there = carried(plain, flat)
    chex.assert_trees_all_equal(carry_over(there, plain.init(PARAMS)), state)
    if "state_dtype" not in options:  # one byte rounds with bits of its own
        chex.assert_trees_all_close(flat.update(PARAMS, there)[0], plain.update(PARAMS, state)[0], rtol=1e-6)
    wide = carry_over(state, optax.flatten(rmsprop(schedule, momentum=0.9, centered=True)).init(PARAMS))
    assert wide.nu.shape == wide.mu.shape == wide.trace.shape == (12,)
    with pytest.raises(ValueError, match="do not fit"):
        carry_over(state, flat.init({**PARAMS, "head": jnp.ones(5)}))
    theirs = optax.flatten(optax.rmsprop(0.1, momentum=0.9))
    state, there = carried(theirs, rmsprop(0.1, momentum=0.9))
    chex.assert_trees_all_equal(carry_over(there, theirs.init(PARAMS)), state)
    # A code beside a complex buffer is what it stands for.
    mixed = {"complex": jnp.full(2, 1j), "real": jnp.full(3, 0.5)}
    narrow, wide = (rmsprop(0.1, momentum=0.9, state_dtype=dtype) for dtype in (jnp.uint8, None))
    state, there = carried(narrow, optax.flatten(wide), mixed)
    np.testing.assert_array_equal(there.trace[2:], _storage.decode(state.trace["real"]))


# --- Odd states ---------------------------------------------------------------------------------------------


def test_a_state_without_parameters():
    for params in (None, {}, {"a": None}):
        state = rmsprop(0.1).init(params)
        there = carry_over(state._replace(count=jnp.int32(3)), rmsprop(0.1).init(params))
        assert jax.tree.structure(there) == jax.tree.structure(state)
        assert there.count == 3
    assert carry_over(optax.rmsprop(0.1).init({}), rmsprop(0.1).init({})).nu == {}
    with pytest.raises(ValueError, match=r"state has nothing for \['body'\]\['bias'\]"):
        carry_over(rmsprop(0.1).init(None), rmsprop(0.1).init(PARAMS))
    with pytest.raises(ValueError, match=r"`into` has no place for \['head'\]"):
        carry_over(rmsprop(0.1).init({"head": jnp.ones(2)}), rmsprop(0.1).init(None))


def test_a_complex_buffer_does_not_become_real():
    tx = rmsprop(0.1, momentum=0.9)
    state = tx.init({"w": jnp.ones(2, jnp.complex64)})
    with pytest.raises(ValueError, match=r"\.trace\['w'\] has dtype complex64 in state and float32 in `into`"):
        carry_over(state, tx.init({"w": jnp.ones(2)}))
    # Without a buffer there is nothing complex in it.
    carry_over(rmsprop(0.1).init({"w": jnp.ones(2, jnp.complex64)}), rmsprop(0.1).init({"w": jnp.ones(2)}))


def test_a_state_of_numpy_arrays():
    """As pickled, or restored without JAX's arrays."""
    state = trained(rmsprop(0.1, momentum=0.9))
    there = carry_over(jax.tree.map(np.asarray, state), rmsprop(0.1, state_dtype=jnp.uint8).init(PARAMS))
    assert there.nu["head"].dtype == jnp.uint8
    assert there.count == 3
    assert carry_over(state._replace(count=1), rmsprop(0.1).init(PARAMS)).count.dtype == jnp.int32


# --- jit, meshes, donation ------------------------------------------------------------------------------------


def scheduled(make):
    return optax.chain(make(0.1), optax.scale_by_schedule(lambda count: 1.0))


JITTED = {
    "other options": (rmsprop(0.1, momentum=0.9, centered=True), rmsprop(0.1)),
    "one byte": (rmsprop(0.1, momentum=0.9), rmsprop(0.1, momentum=0.9, state_dtype=jnp.uint8)),
    "from one byte": (rmsprop(0.1, momentum=0.9, state_dtype=jnp.uint8), rmsprop(0.1, momentum=0.9)),
    "schedules of groups into one": (
        optax.partition({"a": scheduled(rmsprop), "b": scheduled(rmsprop)}, LABELS),
        scheduled(rmsprop),
    ),
    "one into groups": (rmsprop(0.1), optax.partition({"a": rmsprop(0.1), "b": rmsprop(0.1)}, LABELS)),
    "out of MultiSteps": (accumulating(rmsprop(0.1)), rmsprop(0.1)),
    "into MultiSteps": (rmsprop(0.1), accumulating(rmsprop(0.1))),
    "averages": (optax.chain(optax.ema(0.9), rmsprop(0.1)), optax.chain(optax.ema(0.9), rmsprop(0.1, momentum=0.9))),
    "one vector": (rmsprop(0.1), optax.flatten(rmsprop(0.1))),
    "from Optax": (optax.rmsprop(schedule, **EVERY_SLOT), rmsprop(schedule, **EVERY_SLOT)),
    "to Optax": (rmsprop(schedule, **EVERY_SLOT), optax.rmsprop(schedule, **EVERY_SLOT, bias_correction=True)),
}


@pytest.mark.parametrize(("name", "traced"), [*zip(JITTED, itertools.cycle(["state", "into"]))])
def test_inside_jit_the_numbers_are_the_same(name, traced):
    """With both traced, and with one of the two."""
    old, new = JITTED[name]
    arguments = {"state": trained(old), "into": new.init(PARAMS)}
    expected = carry_over(**arguments)
    for names in (["state", "into"], [traced]):
        others = {name: x for name, x in arguments.items() if name not in names}
        result = jax.jit(functools.partial(carry_over, **others))(**{name: arguments[name] for name in names})
        assert types(result) == types(arguments["into"])
        chex.assert_trees_all_close(result, expected, rtol=1e-6)
        assert_own_buffers(result, arguments)


def make(rms=rmsprop, **options):
    """Wrappers in which one number stands in several places."""
    tx = rms(lambda count: 0.1, momentum=0.9, **options)
    return {
        "bare": tx,
        "bias correction": rms(lambda count: 0.1, momentum=0.9, bias_correction=True, **options),
        "MultiSteps": accumulating(tx, 2),
        "inject_hyperparams": optax.inject_hyperparams(rms)(learning_rate=lambda count: 0.1, momentum=0.9, **options),
        "apply_if_finite": optax.apply_if_finite(tx, 3),
        "partition": optax.partition({"a": tx, "b": tx}, LABELS),
        "with averages": optax.chain(optax.ema(0.9), tx, optax.trace(0.5), round_params_stochastically()),
        "all at once": accumulating(optax.apply_if_finite(optax.chain(tx, optax.ema(0.9)), 3), 2),
    }


after_two_steps = functools.cache(lambda rms, name: trained(make(rms)[name], steps=2))


@pytest.mark.slow
@pytest.mark.parametrize(("place", "new"), [*enumerate(make())])
def test_what_is_carried_over_can_be_donated(place, new):
    for turn, (from_, to) in enumerate(((rmsprop, rmsprop), (optax.rmsprop, rmsprop), (rmsprop, optax.rmsprop))):
        tx = make(to)[new]
        into = tx.init(PARAMS)
        for i, old in enumerate(make()):
            alone = any(word in (old, new) for word in ("with averages", "all at once"))  # an average has no place
            if old != new and (alone or (i + place + turn) % 3):
                continue
            state = after_two_steps(from_, old)
            result = carry_over(state, into)
            assert_own_buffers(result, PARAMS, state, into)
        if turn == place % 3:
            before = jax.tree.map(np.array, (state, into))
            jax.jit(tx.update, donate_argnums=1)(PARAMS, result, PARAMS)
            chex.assert_trees_all_equal(jax.tree.map(np.array, (state, into)), before)  # none was deleted


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
def test_the_result_has_the_new_state_s_shardings(axis_type):
    mesh = jax.make_mesh((4,), ("x",), axis_types=(axis_type,), devices=jax.devices()[:4])
    split = NamedSharding(mesh, P("x"))
    params = {"w": jnp.arange(8.0)}
    there = jax.device_put(params, {"w": split})
    state = trained(rmsprop(0.1, momentum=0.9), params)
    tx = rmsprop(0.1, momentum=0.9, state_dtype=jnp.uint8)
    into = tx.init(there)
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), into)
    for target in (into, abstract):
        result = carry_over(state, target)
        assert len(buffers(result)) > 8
        assert_own_buffers(result, state, into)
        for slot in (result.nu, result.trace):
            assert slot["w"].sharding.is_equivalent_to(split, 1)


# --- A layer that was lost, or is new --------------------------------------------------------------------------


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
    with pytest.raises(ValueError, match=r"head"):  # a masked place has to be filled
        dialects.timm(0.1, momentum=0.9).update(NEW_PARAMS, read, NEW_PARAMS)


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
        match=r"convert leaves out .*\['head.weight'\]. To drop one on purpose, set arrays\['head.weight'\] = None",
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


# --- Checkpoints of Orbax, and of earlier versions ----------------------------------------------------------------


GOLDEN = pathlib.Path(__file__).parent / "golden"
STATES = {
    "plain": {},
    "all slots": {"centered": True, "momentum": 0.9},
    "bfloat16": {"centered": True, "momentum": 0.9, "state_dtype": jnp.bfloat16},
    "uint8": {"state_dtype": jnp.uint8},
}
ROUNDING = {jnp.bfloat16: 0.02, jnp.uint8: 0.5}


def each(make):
    """One transformation of {name: parameters}, with a transformation, and a state, for each of STATES."""
    txs = {name: make(options) for name, options in STATES.items()}

    def update(grads, state, params):
        found = {name: tx.update(grads[name], state[name], params[name]) for name, tx in txs.items()}
        return tuple({name: pair[i] for name, pair in found.items()} for i in (0, 1))

    return optax.GradientTransformation(
        lambda params: {name: tx.init(params[name]) for name, tx in txs.items()}, update
    )


ONE = {"kernel": np.random.default_rng(0).normal(size=(8, 8)).astype(np.float32), "bias": np.zeros(8, np.float32)}
START = dict.fromkeys(STATES, ONE)


@functools.partial(jax.jit, static_argnums=0)
def run(tx, params, state, first, last):
    def step(t, carry):
        gradients = {
            name: {"kernel": grads(p["kernel"].ravel(), t).reshape(8, 8), "bias": p["bias"] - 1.0}
            for name, p in carry[0].items()
        }
        return step_of(tx)(*carry, gradients)

    return jax.lax.fori_loop(first, last, step, (params, state))


def saved(folder, tree):
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(folder / "checkpoint", tree)


def restored(folder, *target):
    with ocp.StandardCheckpointer() as checkpointer:
        return checkpointer.restore(folder / "checkpoint", *target)


def test_a_run_restored_with_a_target_continues_bit_for_bit(tmp_path):
    rates = optax.linear_schedule(0.1, 0.0, 20)
    tx = each(lambda options: optax.chain(optax.clip_by_global_norm(10.0), rmsprop(rates, **options)))
    params, state = run(tx, START, tx.init(START), 0, 10)
    saved(tmp_path, {"params": params, "state": state})
    kept = restored(tmp_path, jax.eval_shape(lambda: {"params": START, "state": tx.init(START)}))
    chex.assert_trees_all_equal(kept["state"], state)
    chex.assert_trees_all_equal(run(tx, kept["params"], kept["state"], 10, 20), run(tx, params, state, 10, 20))
    # Without a target the types are lost.
    for name, dicts in restored(tmp_path)["state"].items():
        chex.assert_trees_all_equal(RMSPropState(**dicts[1]), state[name][1])


@pytest.mark.slow
def test_a_state_is_restored_onto_another_mesh(tmp_path):
    tx = each(lambda options: rmsprop(0.1, **options))

    def laid_out(shape, spec):
        params = jax.device_put(START, NamedSharding(mesh_of(AxisType.Auto, shape, ("x", "y")), spec))
        return params, jax.jit(tx.init)(params)

    params, state = run(tx, *laid_out((4, 2), P("x")), 0, 10)
    saved(tmp_path, {"params": params, "state": state})
    there, there_state = laid_out((1, 2), P("y"))
    target = jax.tree.map(ocp.utils.to_shape_dtype_struct, {"params": there, "state": there_state})
    kept = restored(tmp_path, target)
    chex.assert_trees_all_equal(kept, {"params": params, "state": state})
    for x, wanted in zip(jax.tree.leaves(kept), jax.tree.leaves(target), strict=True):
        assert x.sharding.is_equivalent_to(wanted.sharding, x.ndim)
    assert all(len(x.nu["kernel"].sharding.device_set) == 2 for x in kept["state"].values())
    one, other = (run(tx, *pair, 10, 12)[0] for pair in ((params, state), (kept["params"], kept["state"])))
    chex.assert_trees_all_close(one, other, rtol=0, atol=1e-6)


@pytest.mark.slow
def test_a_restored_state_is_carried_over_to_other_options(tmp_path):
    """As README says: restored as it was saved, then carried over."""
    tx = each(lambda options: optax.chain(optax.clip(10.0), rmsprop(1e-3, **options)))
    ends, state = run(tx, START, tx.init(START), 0, 30)
    saved(tmp_path, state)
    kept = restored(tmp_path, jax.eval_shape(tx.init, START))
    into = tx.init(START)
    for old, end in ends.items():
        there = {new: carry_over(kept[old], fresh) for new, fresh in into.items()}
        assert types(there) == types(into)
        chex.assert_trees_all_equal(there[old], state[old])
        # All states have E[g²] in common. It is carried over to within one rounding of its new dtype.
        expected = carry_over(kept[old], into["plain"])[1].nu
        later, _ = run(tx, dict.fromkeys(STATES, end), there, 30, 60)
        for new, options in STATES.items():
            second, rounding = (
                carry_over(there[new], into["plain"])[1].nu,
                ROUNDING.get(options.get("state_dtype"), 1e-5),
            )
            chex.assert_trees_all_close(second, expected, rtol=rounding, atol=0)
            assert (abs(later[new]["bias"] - 1) < abs(end["bias"] - 1)).all()


def test_a_target_or_a_state_of_other_options_is_refused(tmp_path):
    plain, centered = rmsprop(0.1), rmsprop(0.1, centered=True)
    saved(tmp_path, plain.init(ONE))
    with pytest.raises(ValueError, match="mu"):
        restored(tmp_path, jax.eval_shape(centered.init, ONE))
    kept = restored(tmp_path, jax.eval_shape(plain.init, ONE))
    with pytest.raises(ValueError, match=r"state\.mu is None: the state was made with other options"):
        centered.update(ONE, kept, ONE)


def test_nnx_is_restored_without_a_target(tmp_path):
    def made():
        model = nnx.List([nnx.Linear(2, 3, rngs=nnx.Rngs(i)) for i in range(2)])
        return model, nnx.Optimizer(model, optax.chain(optax.clip(1.0), rmsprop(0.1, momentum=0.9)), wrt=nnx.Param)

    model, optimizer = made()
    ones = jax.tree.map(jnp.ones_like, nnx.state(model, nnx.Param))
    for _ in range(3):
        optimizer.update(model, ones)
    saved(tmp_path, nnx.state(optimizer))
    kept = restored(tmp_path)
    _, fresh = made()
    with pytest.raises(ValueError, match=r"restored as a dict, put RMSPropState\(\*\*state\['opt_state'\]\['1'\]\)"):
        carry_over(kept, fresh.opt_state)
    fresh.opt_state = carry_over(RMSPropState(**kept["opt_state"]["1"]), fresh.opt_state)  # as the error says
    chex.assert_trees_all_equal(fresh.opt_state, optimizer.opt_state)


def restored_from(version, case):
    """What an earlier version saved, and where its run ended."""
    folder = GOLDEN / f"checkpoint-{version}"
    recorded = json.loads((folder / "ends.json").read_text())
    assert recorded["rmsprop_jax"] == f"{version}.0"
    with ocp.StandardCheckpointer() as checkpointer:
        kept = checkpointer.restore(folder / "orbax")[case]
    return kept, {name: np.float32(recorded[name][case]) for name in ("nu", "ends")}


advance = jax.jit(earlier.advance, static_argnums=(0, 3))


def apart(tx, params, state, end):
    """How far from `end` another 40 updates lead: the root mean square over the longest way of a number."""
    found = np.float32(advance(tx, params, state, 40)[0]["w"])
    return np.sqrt(np.mean((found - end) ** 2)) / np.abs(end - np.float32(params["w"])).max()


def check_end(tx, params, state, end, tolerance):
    """Nearer to the recorded end than a run that starts anew. Narrow states round with other random bits than they did."""
    assert apart(tx, params, state, end) <= tolerance < apart(tx, params, tx.init(params), end)


@pytest.mark.parametrize("version", ["0.1", "0.2"])
@pytest.mark.parametrize("case", earlier.CASES)
def test_a_checkpoint_of_an_earlier_version_is_resumed(version, case):
    kept, recorded = restored_from(version, case)
    params, tx = kept["params"], earlier.transformation(earlier.CASES[case])
    state = carry_over(RMSPropState(**kept["state"]), tx.init(params))
    assert state.count == 40
    wide = earlier.transformation({**earlier.CASES[case], "state_dtype": None})
    np.testing.assert_array_equal(carry_over(state, wide.init(params)).nu["w"], recorded["nu"])
    if version == "0.2":  # every slot has the dtype that it has now, so every bit stays
        for slot in ("nu", "mu", "trace"):
            jax.tree.map(np.testing.assert_array_equal, getattr(state, slot), kept["state"][slot])
    tolerance = {"float32": 1e-6, "bfloat16": 0.01, "uint8": 0.1}[case.partition(", ")[2]]
    check_end(tx, params, state, recorded["ends"], tolerance)


@pytest.mark.parametrize("keep_rest", [False, True])
def test_three_bytes_of_version_0_2_are_resumed(keep_rest):
    """Its RoundParamsState had no rest, so Orbax refuses a target of 0.3. Restored as a dict, it becomes a state."""
    kept, recorded = restored_from("0.2", earlier.THREE_BYTES)
    ours, rounding = kept["state"]
    tx = earlier.three_bytes(keep_rest)
    old = RMSPropState(**ours), RoundParamsState(**rounding)
    state = carry_over(old, tx.init(kept["params"]))
    assert state[0].count == state[1].step == 40
    np.testing.assert_array_equal(_storage.decode(state[0].nu["w"]), recorded["nu"])
    check_end(tx, kept["params"], state, recorded["ends"], 0.2)


# --- Wrappers of groups, chains by name, boxes with masks -----------------------------------------------------


def test_an_array_of_a_wrapper_goes_to_the_wrapper_of_the_same_parameters():
    """Names of groups say nothing, and their order is that of their names."""

    def groups(one, other):
        twos, threes = (optax.chain(optax.ema(0.9), accumulating(rmsprop(0.1), k)) for k in (2, 3))
        return optax.partition({one: twos, other: threes}, {"a": one, "b": other})

    params = {"a": jnp.ones(2), "b": jnp.full(2, 3.0)}
    state = trained(groups("decay", "none"), params, 5)
    new = carry_over(state, groups("weights", "biases").init(params))
    for one, other in {"decay": "weights", "none": "biases"}.items():
        chex.assert_trees_all_equal(*(x.inner_states[y] for x, y in ((state, one), (new, other))))


def test_two_players_keep_their_counts():
    tx = optax.inject_hyperparams(rmsprop)(schedule)
    states = [trained(tx, {f"w{steps}": jnp.ones(2)}, steps) for steps in (5, 25)]
    fresh = [tx.init({f"w{steps}": jnp.ones(2)}) for steps in (5, 25)]
    new = carry_over(tuple(states), {"disc": fresh[1], "gen": fresh[0]})
    chex.assert_trees_all_equal(new["gen"].inner_state, states[0].inner_state)
    assert [int(x) for x in (new["gen"].count, new["disc"].count, new["disc"].inner_state.count)] == [5, 25, 25]


@pytest.mark.parametrize("other", [optax.inject_hyperparams(optax.adam)(0.1), accumulating(optax.adam(0.1), 4)])
def test_another_optimizer_beside_does_not_count_for_rmsprop(other):
    params = {"w": jnp.ones(2)}
    state = {"d": trained(other, params, 9), "g": trained(optax.rmsprop(0.1), params)}
    new = carry_over(state, {"d": other.init(params), "g": rmsprop(schedule).init(params)})
    assert int(new["g"].count) == 0
    chex.assert_trees_all_equal(new["d"], state["d"])


@pytest.mark.parametrize(
    "wrapper",
    [
        optax.add_decayed_weights(schedule),
        optax.add_noise(0.1, 0.5, key=0),
        optax.conditionally_transform(optax.scale(0.5), lambda step: step < 5),
        optax.conditionally_mask(optax.scale(0.5), lambda step: step < 5),
        optax.scale_by_schedule(schedule),
    ],
)
def test_schedules_of_new_wrappers_continue_from_the_count(wrapper):
    _, new = carried(rmsprop(0.1), optax.chain(wrapper, rmsprop(0.1)), steps=7)
    (counter,) = [x for x in jax.tree.leaves(new[0]) if x.dtype == jnp.int32 and x.shape == ()]
    assert int(counter) == 7


@pytest.mark.parametrize(("old", "new"), [*itertools.product([rmsprop, optax.rmsprop], repeat=2)])
@pytest.mark.parametrize("params", [{"value": jnp.ones(2)}, {"q": {"value": jnp.ones(2)}, "r": {"value": jnp.ones(3)}}])
def test_a_parameter_may_be_called_value(old, new, params):
    tx, other = old(0.1), new(0.1)
    state = carry_over(trained(tx, params), other.init(params))
    chex.assert_trees_all_equal_structs(state, other.init(params))
    chex.assert_trees_all_close(
        carry_over(state, tx.init(params))[0 if old is optax.rmsprop else 1],
        trained(tx, params)[0 if old is optax.rmsprop else 1],
    )


@pytest.mark.parametrize("old", [optax.scale_by_rms(), optax.rmsprop(0.1)])
def test_boxes_of_nnx_restored_as_dicts_without_a_counter(old):
    state = trained(old)
    boxed = jax.tree.map(lambda x: {"value": x}, state)
    chex.assert_trees_all_equal(*(carry_over(x, rmsprop(0.1).init(PARAMS)) for x in (boxed, state)))


def test_a_chain_by_name_has_an_order():
    average, ours = ("average", optax.ema(0.9)), ("rms", rmsprop(0.1))
    state = trained(optax.named_chain(average, ours))
    same = optax.named_chain(("z", average[1]), ("a", ours[1]))
    chex.assert_trees_all_equal(carry_over(state, same.init(PARAMS))["z"], state["average"])
    chex.assert_trees_all_equal(carry_over(state, optax.chain(average[1], ours[1]).init(PARAMS))[0], state["average"])
    with pytest.raises(ValueError, match=r"state also holds \['average'\].ema"):
        carry_over(state, optax.named_chain(ours, average).init(PARAMS))


def test_integers_in_the_state_of_optax_do_not_train():
    params = {"w": jnp.ones(3), "i": jnp.arange(3)}
    theirs, ours = optax.rmsprop(0.1).init(params), rmsprop(0.1).init(params)
    chex.assert_trees_all_equal(carry_over(theirs, ours), ours)
    chex.assert_trees_all_equal(carry_over(ours, theirs), theirs)
    chex.assert_trees_all_equal(carry_over(theirs, theirs), theirs)
    assert [*dict(interop.to_keras(theirs, lambda tree: {"w": tree["w"]}))] == ["iteration", "w_velocity"]


def test_the_shapes_of_a_state_on_an_explicit_mesh():
    mesh = mesh_of(AxisType.Explicit)
    params = {"w": jax.device_put(np.ones(8, np.float32), NamedSharding(mesh, P("x")))}
    tx = rmsprop(0.1, momentum=0.9)
    with jax.set_mesh(mesh):
        state = trained(tx, params)
        new = carry_over(state, jax.eval_shape(tx.init, params))
    chex.assert_trees_all_equal(new, state)
    assert new.nu["w"].sharding == state.nu["w"].sharding


@pytest.mark.parametrize("box", ["NNX", "Linen"])
def test_masked_parameters_in_boxes(box):
    if box == "NNX":
        params = nnx.state(nnx.Sequential(nnx.Linear(2, 2, rngs=nnx.Rngs(0)), nnx.Linear(2, 3, rngs=nnx.Rngs(1))))
    else:
        params = jax.tree.map(lambda x: nn.Partitioned(x, names=(None,) * x.ndim), PARAMS)
    chosen = jax.tree.map_with_path(lambda path, _: "bias" in jax.tree_util.keystr(path), params)
    whole, part = rmsprop(0.1), optax.masked(rmsprop(0.1), chosen)
    state = trained(whole, params, update=lambda *_: (None, _[1]._replace(count=jnp.int32(3))))
    new = carry_over(state, part.init(params))
    assert int(new.inner_state.count) == 3
    back = carry_over(new, whole.init(params), allow_new=True)
    chex.assert_trees_all_equal_structs(back, state)


def test_a_way_out_that_leaves_a_wrapper_keeps_the_count():
    state = trained(optax.chain(optax.ema(0.9), optax.inject_hyperparams(optax.rmsprop)(schedule)), steps=5)
    into = rmsprop(schedule).init(PARAMS)
    with pytest.raises(
        ValueError, match=r"pass .* state\[1\].inner_state, and then call optax.tree.set\(result, count=5\)"
    ):
        carry_over(state, into)
    assert int(optax.tree.set(carry_over(state[1].inner_state, into), count=5).count) == 5


def test_random_keys_of_groups_are_compared():
    tx = optax.chain(optax.add_noise(0.1, 0.5, key=jax.random.key(0)), rmsprop(0.1))
    groups = optax.partition({"a": tx, "b": tx}, LABELS)
    assert carry_over(groups.init(PARAMS), tx.init(PARAMS))[0].rng_key == jax.random.key(0)


def test_only_our_own_dict_is_taken_for_our_state():
    ours, adam = (x._asdict() for x in (rmsprop(0.1).init(PARAMS), optax.scale_by_adam().init(PARAMS)))
    with pytest.raises(ValueError, match=r"put RMSPropState\(\*\*state\['x'\]\) there"):
        carry_over({"x": ours}, rmsprop(0.1).init(PARAMS))
    with pytest.raises(
        ValueError, match=r"is of rmsprop_jax, .*state of Optax was restored as dicts, restore it with a target"
    ):
        carry_over({"x": adam}, rmsprop(0.1).init(PARAMS))
