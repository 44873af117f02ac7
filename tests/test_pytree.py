"""The lift: trees, leaves, dtypes, donation. It treats all options alike, so these tests use few of them."""

import chex
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import dtypes, EVERYTHING, types
from hypothesis import example, given, settings, strategies as st

from rmsprop_jax import rmsprop, RMSPropState


FEW_OPTIONS = [{}, {"momentum": 0.9, "nesterov": True}, EVERYTHING]


def ones(tree):
    return jax.tree.map(jnp.ones_like, tree)


# --- State --------------------------------------------------------------------------------------------


def test_state_has_what_the_options_need():
    params = {"w": jnp.ones((2, 3)), "z": jnp.ones(4, jnp.complex64), "h": jnp.ones((), jnp.bfloat16)}
    plain = rmsprop(0.1).init(params)
    assert isinstance(plain, RMSPropState)
    assert (plain.mu, plain.trace) == (None, None)
    assert plain.count.dtype == jnp.int32
    full = rmsprop(0.1, initial_scale=0.5, **EVERYTHING).init(params)
    for name, value, complex_dtype in [("nu", 0.5, "float32"), ("mu", 0, "complex64"), ("trace", 0, "complex64")]:
        tree = getattr(full, name)
        assert jax.tree.map(jnp.shape, tree) == jax.tree.map(jnp.shape, params)
        assert {k: x.dtype.name for k, x in tree.items()} == {"w": "float32", "z": complex_dtype, "h": "float32"}
        assert all((x == value).all() for x in tree.values())


def test_float64_is_kept(x64):
    tx = rmsprop(0.1, centered=True)
    params = {"w": jnp.ones(2), "z": jnp.ones(2, jnp.complex128), "s": jnp.ones(2, jnp.float32)}
    updates, state = tx.update(jax.tree.map(lambda x: x / 3, params), tx.init(params))
    assert {k: x.dtype.name for k, x in state.nu.items()} == {"w": "float64", "z": "float64", "s": "float32"}
    assert state.mu["z"].dtype == jnp.complex128
    np.testing.assert_allclose(updates["w"], -0.1 / np.sqrt(0.09), rtol=1e-6)
    # A float32 gradient does not take the float64 average down with it.
    _, after = tx.update(
        jax.tree.map(lambda x: x.astype(jnp.complex64 if jnp.iscomplexobj(x) else jnp.float32), params), state
    )
    assert dtypes(after) == dtypes(state)
    expected = 0.9 * (0.09 / 9 + 0.1 * (1 - 0.1 / 3) ** 2)
    np.testing.assert_allclose(after.nu["w"], expected, rtol=1e-14)


@pytest.mark.parametrize(("jit", "options"), [(True, FEW_OPTIONS[1]), (True, EVERYTHING), (False, EVERYTHING)])
def test_float64_of_numpy_is_float32_where_x64_is_off(options, jit):
    tx = rmsprop(0.1, **options)
    params = {"w": np.ones(3), "z": np.ones(2, np.complex128), "s": np.float64(2.0)}
    with jax.disable_jit(not jit):
        updates, state = tx.update(params, tx.init(params), params)
        single = jax.tree.map(lambda x: x.astype(np.complex64 if np.iscomplexobj(x) else np.float32), params)
        expected, _ = tx.update(single, tx.init(single), single)
    assert {k: u.dtype.name for k, u in updates.items()} == {"w": "float32", "z": "complex64", "s": "float32"}
    assert {k: x.dtype.name for k, x in state.nu.items()} == dict.fromkeys(params, "float32")
    chex.assert_trees_all_equal(updates, expected, strict=True)


def test_the_count_stops_at_the_largest_int32():
    tx = rmsprop(0.1)
    params = jnp.ones(2)
    state = tx.init(params)
    for expected in (1, 2, 3):
        _, state = tx.update(params, state)
        assert state.count == expected
    largest = jnp.iinfo(jnp.int32).max
    assert tx.update(params, state._replace(count=jnp.int32(largest)))[1].count == largest


def test_schedule_sees_the_count_of_past_updates():
    seen = []

    def schedule(count):  # Python control flow on a concrete count works, as it does in Optax
        seen.append(int(count))
        return 1.0 if count < 1 else 0.5

    tx = rmsprop(schedule, decay=1.0, eps=0.0, initial_scale=1.0)
    state = tx.init(jnp.ones(1))
    for expected in (-1.0, -0.5):
        updates, state = tx.update(jnp.ones(1), state)
        assert updates == expected
    assert seen == [0, 1]


def test_map_params_reaches_every_slot():
    tx = rmsprop(0.1, **EVERYTHING)
    state = tx.init({"w": jnp.ones(3)})
    mapped = optax.tree.map_params(tx, lambda x: "param", state, transform_non_params=lambda x: "other")
    assert mapped == RMSPropState("other", {"w": "param"}, {"w": "param"}, {"w": "param"})


def test_optax_tree_get_and_set_find_the_slots():
    tx = optax.chain(optax.clip_by_global_norm(1.0), rmsprop(0.1, momentum=0.9))
    state = tx.init(jnp.ones(3))
    assert optax.tree.get(state, "nu").shape == (3,)
    assert optax.tree.get(state, "count") == 0
    assert optax.tree.get(optax.tree.set(state, trace=jnp.full(3, 7.0)), "trace")[0] == 7


def test_state_shares_no_buffer():
    params = {"a": jnp.zeros(3), "b": jnp.zeros(3)}
    tx = rmsprop(0.1, **EVERYTHING)
    for init in (tx.init, jax.jit(tx.init)):
        state = init(params)
        pointers = [x.unsafe_buffer_pointer() for x in jax.tree.leaves((params, state))]
        assert len(set(pointers)) == len(pointers)

        @jax.jit
        def step(params, state):
            updates, state = tx.update(params, state, params)
            return optax.apply_updates(params, updates), state

        jax.jit(step, donate_argnums=1)(params, state)


# --- Trees and leaves ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "params",
    [
        {},
        (),
        [None],
        {"a": None, "b": jnp.ones(2)},
        {"a": jnp.ones(())},
        {"a": jnp.ones((0, 3))},
        [jnp.ones(2), (jnp.ones(1), {"c": None})],
        {"a": np.ones(2, np.float32)},
        {"a": 1.0},
        optax.MaskedNode(),
        {"a": optax.MaskedNode(), "b": jnp.ones(2, jnp.float16)},
    ],
    ids=repr,
)
def test_any_tree_of_arrays_is_updated(params):
    tx = rmsprop(0.1, **EVERYTHING)
    for init, update in ((tx.init, tx.update), (jax.jit(tx.init), jax.jit(tx.update))):
        state = init(params)
        updates, after = update(ones(params), state, params)
        assert jax.tree.structure(updates) == jax.tree.structure(params)
        assert jax.tree.structure(after) == jax.tree.structure(state)
        assert jax.tree.map(jnp.shape, updates) == jax.tree.map(jnp.shape, params)
        assert all((u < 0).all() for u in jax.tree.leaves(updates))


leaf_shapes = st.one_of(st.none(), st.sampled_from([(), (0,), (3,), (2, 1), (2, 0, 3), (1, 3, 2)]).map(jnp.ones))
trees = st.recursive(
    leaf_shapes,
    lambda children: st.one_of(
        st.lists(children, max_size=3),
        st.tuples(children),
        st.dictionaries(st.sampled_from("abc"), children, max_size=3),
    ),
    max_leaves=6,
)


@pytest.mark.slow
@settings(max_examples=30)
@example(tree=None)
@given(tree=trees)
def test_leaves_do_not_influence_each_other(tree):
    tx = rmsprop(0.1, momentum=0.9)
    updates, state = tx.update(tree, tx.init(tree))
    assert jax.tree.structure((updates, state.trace)) == jax.tree.structure((tree, tree))
    for u, g in zip(jax.tree.leaves(updates), jax.tree.leaves(tree), strict=True):
        np.testing.assert_array_equal(u, tx.update(g, tx.init(g))[0])


# --- Leaves that do not train -------------------------------------------------------------------------

FIXED = {"int": jnp.arange(3), "bool": np.array([True]), "Python int": 7, "uint8": jnp.zeros(2, jnp.uint8)}


@pytest.mark.parametrize("options", FEW_OPTIONS)
@pytest.mark.parametrize("no_gradient", [lambda x: None, lambda x: np.zeros(np.shape(x), jax.dtypes.float0)])
def test_integers_and_booleans_have_no_state_and_no_update(options, no_gradient):
    tx = rmsprop(0.1, **options)
    params = FIXED | {"w": W}
    state = tx.init(params)
    alone_state = tx.init({"w": W})
    grads = jax.tree.map(no_gradient, FIXED) | {"w": 2 * W}
    for _ in range(2):
        updates, state = tx.update(grads, state, params)
        alone, alone_state = tx.update({"w": 2 * W}, alone_state, {"w": W})
        assert updates == dict.fromkeys(FIXED) | {"w": updates["w"]}
        np.testing.assert_array_equal(updates["w"], alone["w"])
    for slot, tree in state._asdict().items():
        if slot != "count" and tree is not None:
            assert [tree[name] for name in FIXED] == [None] * len(FIXED)
            np.testing.assert_array_equal(tree["w"], getattr(alone_state, slot)["w"])


def test_gradients_of_integers_as_jax_makes_them():
    params = {"w": W, "n": jnp.arange(2)}
    tx = rmsprop(0.1)
    grads = jax.grad(lambda p: jnp.sum(p["w"] ** 2), allow_int=True)(params)
    assert grads["n"].dtype == jax.dtypes.float0
    for update in (tx.update, jax.jit(tx.update)):  # inside jit, float0 is the dtype of a tracer
        assert update(grads, tx.init(params))[0]["n"] is None
        assert update(np.zeros(2, jax.dtypes.float0), tx.init(jnp.arange(2)))[0] is None


@pytest.mark.parametrize("name", FIXED)
def test_a_gradient_for_a_parameter_that_does_not_train_is_refused(name):
    tx = rmsprop(0.1, momentum=0.9)
    params = FIXED | {"w": W}
    grads = dict.fromkeys(FIXED) | {"w": W, name: jnp.ones(np.shape(FIXED[name]))}
    for update in (tx.update, jax.jit(tx.update)):
        with pytest.raises(
            TypeError, match=rf"gradient\['{name}'\] has dtype float32, but its parameter is an integer or"
        ):
            update(grads, tx.init(params))
    with pytest.raises(TypeError, match="gradient has dtype float32, but its parameter is an integer or"):
        tx.update(grads[name], tx.init(params[name]))


@pytest.mark.parametrize("options", FEW_OPTIONS)
def test_a_missing_gradient_leaves_the_state_of_its_parameter(options):
    tx = rmsprop(0.1, **options)
    params = {"a": W, "b": [jnp.ones(3)]}
    _, before = tx.update(params, tx.init(params), params)
    for update in (tx.update, jax.jit(tx.update)):
        updates, after = update({"a": W, "b": [None]}, before, params)
        assert updates["b"] == [None]
        assert after.count == 2
        for slot in ("nu", "mu", "trace"):
            if getattr(before, slot) is not None:
                np.testing.assert_array_equal(getattr(after, slot)["b"][0], getattr(before, slot)["b"][0])
        expected = tx.update(
            {"a": W}, RMSPropState(before.count, *({"a": t["a"]} if t else t for t in before[1:])), params={"a": W}
        )
        np.testing.assert_array_equal(updates["a"], expected[0]["a"])


def test_equinox_applies_updates_that_are_none():
    params = {"w": W, "n": jnp.arange(2), "frozen": W}
    tx = rmsprop(0.1)
    updates, _ = tx.update({"w": W, "n": None, "frozen": None}, tx.init(params), params)
    new = eqx.apply_updates(params, updates)
    assert (new["w"] < params["w"]).all()
    np.testing.assert_array_equal(new["n"], params["n"])
    np.testing.assert_array_equal(new["frozen"], W)


W = jnp.ones((3, 2))
BAD_GRADS = {
    "int": ({"a": W, "b": jnp.ones(3, jnp.int32)}, TypeError, r"gradient\['b'\] has dtype int32"),
    "scalar": ({"a": W, "b": jnp.ones(())}, ValueError, r"gradient\['b'\] has shape \(\), but its .* \(3,\)"),
    "transposed": ({"a": W.T, "b": jnp.ones(3)}, ValueError, r"gradient\['a'\] has shape \(2, 3\), but .* \(3, 2\)"),
    "masked": ({"a": W, "b": optax.MaskedNode()}, ValueError, r"no gradient for \['b'\]"),
    "missing": ({"a": W}, ValueError, r"no gradient for \['b'\]"),
    "surplus": ({"a": W, "b": jnp.ones(3), "c": W}, ValueError, r"no \['c'\] in .* for its gradient"),
    "subtree": ({"a": W, "b": [jnp.ones(3)]}, ValueError, r"no gradient for \['b'\].*; no \['b'\]\[0\] in"),
    "complex": ({"a": W.astype(jnp.complex64), "b": jnp.ones(3)}, TypeError, r"gradient\['a'\] is complex, its"),
}


@pytest.mark.parametrize(("grads", "error", "message"), BAD_GRADS.values(), ids=BAD_GRADS.keys())
@pytest.mark.parametrize("options", [{"momentum": 0.9}, {"momentum": 0.9, "weight_decay": 0.1}])
def test_bad_gradients_are_named(grads, error, message, options):
    params = {"a": W, "b": jnp.ones(3)}
    tx = rmsprop(0.1, **options)
    state = tx.init(params)
    for update in (tx.update, jax.jit(tx.update)):
        with pytest.raises(error, match=message):
            update(grads, state, params)


def test_an_error_shows_structures_that_differ():
    tx = rmsprop(0.1)
    with pytest.raises(ValueError, match=r"structure of state.nu: PyTreeDef\(\[\*\]\) is not PyTreeDef\(\(\*,\)\)"):
        tx.update([W], tx.init((W,)))


def test_a_real_gradient_of_a_complex_parameter_is_refused():
    tx = rmsprop(0.1, momentum=0.9)
    with pytest.raises(TypeError, match="gradient is real, its parameter is complex: both must be"):
        tx.update(jnp.ones(2), tx.init(jnp.ones(2, jnp.complex64)))
    # Without a signed slot only the parameters tell, where they are given.
    tx = rmsprop(0.1)
    for grads, params in ((W.astype(jnp.complex64), W), (W, W.astype(jnp.complex64))):
        with pytest.raises(TypeError, match=r"gradient\['w'\] is (real|complex), its parameter is (real|complex)"):
            tx.update({"w": grads}, tx.init({"w": params}), {"w": params})


def test_params_of_another_shape_are_named():
    tx = rmsprop(0.1, weight_decay=0.1)
    with pytest.raises(ValueError, match=r"gradient\['a'\] has shape \(3, 2\), but its parameter has \(3, 1\)"):
        tx.update({"a": W}, tx.init({"a": W}), {"a": jnp.ones((3, 1))})


@pytest.mark.parametrize("decoupled", [True, False])
def test_weight_decay_needs_params(decoupled):
    tx = rmsprop(0.1, weight_decay=0.1, decoupled=decoupled)
    with pytest.raises(ValueError, match=r"weight_decay needs params: call update\(updates, state, params\)"):
        tx.update({"w": W}, tx.init({"w": W}))


def test_float16_saturates():
    """ν stays 0 at a decay of 1, so the step is g / √ε = 10⁶."""
    tx = rmsprop(1.0, decay=1.0)
    grads = jnp.array([100.0, -100.0, 0.0, jnp.inf, jnp.nan], jnp.float16)
    updates, _ = tx.update(grads, tx.init(grads))
    np.testing.assert_array_equal(updates, np.array([-65504, 65504, 0, np.nan, np.nan], np.float16))


FOREIGN = {
    "optax": lambda p: optax.rmsprop(0.1).init(p),
    "chain": lambda p: optax.chain(rmsprop(0.1)).init(p),
    "restored as a dict": lambda p: {"count": jnp.int32(0), "nu": p},
    "none": lambda p: None,
}


@pytest.mark.parametrize("foreign", FOREIGN.values(), ids=FOREIGN.keys())
def test_a_foreign_state_is_refused(foreign):
    with pytest.raises(TypeError, match=r"state has type (tuple|dict|NoneType): allowed is the RMSPropState that init"):
        rmsprop(0.1).update(W, foreign(W))


def test_a_state_of_other_options_is_refused():
    plain, full = rmsprop(0.1), rmsprop(0.1, momentum=0.9)
    with pytest.raises(ValueError, match=r"state\.trace is None: the state was made with other options"):
        full.update(W, plain.init(W))
    with pytest.raises(ValueError, match=r"state\.trace is not None: the state was made with other options"):
        plain.update(W, full.init(W))
    with pytest.raises(ValueError, match=r"state\.nu is None: the state was made with other options"):
        full.update(W, RMSPropState(jnp.int32(0), None, trace=W))


def test_params_are_not_looked_at_without_weight_decay():
    tx = rmsprop(0.1)
    tx.update(W, tx.init(W), "anything")
    tx.update(W, tx.init(W), value=1.0, anything=None)


# --- Transformations ----------------------------------------------------------------------------------


def test_vmap_over_hyperparameters():
    rates, decays = jnp.array([0.1, 0.01]), jnp.array([0.9, 0.5])

    def run(rate, decay):
        tx = rmsprop(rate, decay, momentum=0.9)
        params = jnp.array([1.0, -2.0])
        state = tx.init(params)
        for _ in range(3):
            updates, state = tx.update(params, state)
            params = optax.apply_updates(params, updates)
        return params

    together = jax.jit(jax.vmap(run))(rates, decays)
    for i in range(2):
        np.testing.assert_allclose(together[i], run(float(rates[i]), float(decays[i])), rtol=1e-5)


def test_vmap_over_members():
    tx = rmsprop(0.1, momentum=0.9)
    params = jax.random.normal(jax.random.key(0), (4, 3))
    updates, state = jax.vmap(tx.update)(params, jax.vmap(tx.init)(params))
    assert state.count.shape == (4,)
    for i in range(4):
        np.testing.assert_array_equal(updates[i], tx.update(params[i], tx.init(params[i]))[0])


def test_init_on_shapes_allocates_what_init_on_arrays_does():
    tx = rmsprop(0.1, **EVERYTHING)
    arrays = {"w": jnp.ones((2, 3), jnp.bfloat16)}
    shapes = jax.eval_shape(lambda: arrays)
    assert types(tx.init(shapes)) == types(tx.init(arrays))
    assert dtypes(jax.eval_shape(tx.init, arrays)) == dtypes(tx.init(arrays))


@pytest.mark.parametrize("eps", [0.0, 1e-40, 1e-8])
def test_an_eps_in_a_jax_array_gives_the_same_bits(eps):
    grads = {"w": W, "zero": jnp.zeros(3)}
    results = []
    for value in (eps, jnp.float32(eps)):
        tx = rmsprop(0.1, eps=value)
        state = tx.init(grads)
        for _ in range(3):
            updates, state = tx.update(grads, state)
        results.append((updates, state))
    chex.assert_trees_all_equal(*results, strict=True)
    assert (results[0][0]["zero"] == 0).all()
