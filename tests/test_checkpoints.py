"""Orbax: with a target and without, onto another mesh, and into a transformation with other options."""

import json
import pathlib

import earlier
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from helpers import advance, assert_equal, mesh_of, types
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from problems import grads

from rmsprop_jax import _storage, carry_over, rmsprop, RMSPropState, RoundParamsState


GOLDEN = pathlib.Path(__file__).parent / "golden"


pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("users_climate")]

OPTIONS = {
    "plain": {},
    "all slots": {"centered": True, "momentum": 0.9},
    "bfloat16": {"centered": True, "momentum": 0.9, "state_dtype": jnp.bfloat16},
    "uint8": {"state_dtype": jnp.uint8},
}
ROUNDING = {jnp.bfloat16: 0.02, jnp.uint8: 0.5}
EVERY = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)


def start():
    return {"kernel": jax.random.normal(jax.random.key(0), (8, 8)), "bias": jnp.zeros(8)}


def gradient(params, t):
    return {"kernel": grads(params["kernel"].ravel(), t).reshape(8, 8), "bias": params["bias"] - 1.0}


def run(tx, params, state, first, last):
    return advance(tx, params, state, range(first, last), gradient)


def saved(folder, tree):
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(folder / "checkpoint", tree)


def restored(folder, *target):
    with ocp.StandardCheckpointer() as checkpointer:
        return checkpointer.restore(folder / "checkpoint", *target)


@EVERY
def test_a_run_restored_with_a_target_continues_bit_for_bit(tmp_path, options):
    tx = optax.chain(optax.clip_by_global_norm(10.0), rmsprop(optax.linear_schedule(0.1, 0.0, 20), **options))
    params, state = run(tx, start(), tx.init(start()), 0, 10)
    saved(tmp_path, {"params": params, "state": state})
    kept = restored(tmp_path, jax.eval_shape(lambda: {"params": start(), "state": tx.init(start())}))
    assert_equal(kept["state"], state)
    assert_equal(run(tx, kept["params"], kept["state"], 10, 20), run(tx, params, state, 10, 20))


@EVERY
def test_a_state_is_restored_without_a_target(tmp_path, options):
    tx = rmsprop(0.1, **options)
    _, state = run(tx, start(), tx.init(start()), 0, 3)
    saved(tmp_path, state)
    assert_equal(RMSPropState(**restored(tmp_path)), state)


@EVERY
def test_a_state_is_restored_onto_another_mesh(tmp_path, options):
    tx = rmsprop(0.1, **options)

    def laid_out(shape, spec):
        params = jax.device_put(start(), NamedSharding(mesh_of(AxisType.Auto, shape, ("x", "y")), spec))
        return params, jax.jit(tx.init)(params)

    params, state = run(tx, *laid_out((4, 2), P("x")), 0, 10)
    saved(tmp_path, {"params": params, "state": state})
    there, there_state = laid_out((1, 2), P("y"))
    target = jax.tree.map(ocp.utils.to_shape_dtype_struct, {"params": there, "state": there_state})
    kept = restored(tmp_path, target)
    assert_equal(kept, {"params": params, "state": state})
    for x, wanted in zip(jax.tree.leaves(kept), jax.tree.leaves(target), strict=True):
        assert x.sharding.is_equivalent_to(wanted.sharding, x.ndim)
    assert len(kept["state"].nu["kernel"].sharding.device_set) == 2
    one, other = (run(tx, *pair, 10, 12)[0] for pair in ((params, state), (kept["params"], kept["state"])))
    for k in one:
        np.testing.assert_allclose(one[k], other[k], rtol=0, atol=1e-6)


@pytest.mark.parametrize("chained", [False, True])
@pytest.mark.parametrize("new", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("old", OPTIONS.values(), ids=OPTIONS)
def test_a_restored_state_is_carried_over_to_other_options(tmp_path, old, new, chained):
    """As README says: restored as it was saved, then carried over."""
    make = (lambda tx: optax.chain(optax.clip(10.0), tx)) if chained else lambda tx: tx
    before, after = make(rmsprop(1e-3, **old)), make(rmsprop(1e-3, **new))
    params, state = run(before, start(), before.init(start()), 0, 30)
    saved(tmp_path, state)
    kept = restored(tmp_path, jax.eval_shape(before.init, params))
    carried = carry_over(kept, after.init(params))
    assert types(carried) == types(after.init(params))
    if old == new:
        assert_equal(carried, state)
    # Both states have E[g²] in common. It is carried over to within one rounding of its new dtype.
    plain = make(rmsprop(1e-3)).init(params)
    second, expected = (optax.tree.get(carry_over(s, plain), "nu") for s in (carried, kept))
    for k in params:
        np.testing.assert_allclose(second[k], expected[k], rtol=ROUNDING.get(new.get("state_dtype"), 1e-5))
    later, _ = run(after, params, carried, 30, 60)
    assert (abs(later["bias"] - 1) < abs(params["bias"] - 1)).all()


def test_a_target_or_a_state_of_other_options_is_refused(tmp_path):
    plain, centered = rmsprop(0.1), rmsprop(0.1, centered=True)
    saved(tmp_path, plain.init(start()))
    with pytest.raises(ValueError, match="mu"):
        restored(tmp_path, jax.eval_shape(centered.init, start()))
    kept = restored(tmp_path, jax.eval_shape(plain.init, start()))
    with pytest.raises(ValueError, match=r"state\.mu is None: the state was made with other options"):
        centered.update(start(), kept, start())


def restored_from(version, case):
    """What an earlier version saved, and where its run ended."""
    folder = GOLDEN / f"checkpoint-{version}"
    recorded = json.loads((folder / "ends.json").read_text())
    assert recorded["rmsprop_jax"] == f"{version}.0"
    with ocp.StandardCheckpointer() as checkpointer:
        kept = checkpointer.restore(folder / "orbax")[case]
    return kept, {name: np.float32(recorded[name][case]) for name in ("nu", "ends")}


def apart(tx, params, state, end):
    """How far from `end` another 40 updates lead: the root mean square over the longest way of a number."""
    found = np.float32(earlier.advance(tx, params, state, 40)[0]["w"])
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
