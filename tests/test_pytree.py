"""The lift: trees, leaves, dtypes, compilation, donation. What holds for one option holds for all: few options here."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import example, given, settings, strategies as st
from jax import export

from rmsprop_jax import rmsprop, RMSPropState, scale_by_rms


EVERYTHING = {"centered": True, "momentum": 0.9, "bias_correction": True, "weight_decay": 0.1}
CONFIGURATIONS = [{}, {"momentum": 0.9, "nesterov": True}, EVERYTHING]


def ones(tree):
    return jax.tree.map(jnp.ones_like, tree)


def dtypes(tree):
    return jax.tree.map(lambda x: x.dtype, tree)


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
    assert jax.tree.map(lambda x: x.dtype, after) == jax.tree.map(lambda x: x.dtype, state)
    expected = 0.9 * (0.09 / 9 + 0.1 * (1 - 0.1 / 3) ** 2)
    np.testing.assert_allclose(after.nu["w"], expected, rtol=1e-14)


def test_count_counts_and_stops():
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


def test_tree_get_and_set():
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
@pytest.mark.parametrize("options", CONFIGURATIONS)
def test_any_tree(params, options):
    tx = rmsprop(0.1, **options)
    for init, update in ((tx.init, tx.update), (jax.jit(tx.init), jax.jit(tx.update))):
        state = init(params)
        updates, after = update(ones(params), state, params)
        assert jax.tree.structure(updates) == jax.tree.structure(params)
        assert jax.tree.structure(after) == jax.tree.structure(state)
        assert jax.tree.map(jnp.shape, updates) == jax.tree.map(jnp.shape, params)
        assert all((u < 0).all() for u in jax.tree.leaves(updates))


leaf_shapes = st.one_of(st.none(), st.lists(st.integers(0, 3), max_size=3).map(tuple).map(jnp.ones))
trees = st.recursive(
    leaf_shapes,
    lambda children: st.one_of(
        st.lists(children, max_size=3),
        st.tuples(children),
        st.dictionaries(st.sampled_from("abc"), children, max_size=3),
    ),
    max_leaves=6,
)


@settings(max_examples=30)
@example(tree=None)
@given(tree=trees)
def test_a_tree_is_its_leaves(tree):
    tx = rmsprop(0.1, momentum=0.9)
    updates, state = tx.update(tree, tx.init(tree))
    assert jax.tree.structure((updates, state.trace)) == jax.tree.structure((tree, tree))
    for u, g in zip(jax.tree.leaves(updates), jax.tree.leaves(tree), strict=True):
        np.testing.assert_array_equal(u, tx.update(g, tx.init(g))[0])


BAD_PARAMS = {
    "int": ({"w": jnp.ones(2), "n": [jnp.arange(3)]}, r"parameter\['n'\]\[0\] has dtype int32"),
    "Python int": ({"n": 1}, r"parameter\['n'\] has dtype int32"),
    "bool": ({"mask": np.array([True])}, r"parameter\['mask'\] has dtype bool"),
    "key": ({"rng": jax.random.key(0)}, r"parameter\['rng'\] has dtype key"),
}


@pytest.mark.parametrize(("params", "message"), BAD_PARAMS.values(), ids=BAD_PARAMS.keys())
def test_bad_parameters_are_named(params, message):
    with pytest.raises(TypeError, match=message + ".*allowed are floating and complex"):
        rmsprop(0.1).init(params)


W = jnp.ones((3, 2))
BAD_GRADS = {
    "int": ({"a": W, "b": jnp.ones(3, jnp.int32)}, TypeError, r"gradient\['b'\] has dtype int32"),
    "float0": ({"a": W, "b": np.zeros(3, jax.dtypes.float0)}, TypeError, r"gradient\['b'\] has dtype"),
    "scalar": ({"a": W, "b": jnp.ones(())}, ValueError, r"gradient\['b'\] has shape \(\), its .* \(3,\)"),
    "transposed": ({"a": W.T, "b": jnp.ones(3)}, ValueError, r"gradient\['a'\] has shape \(2, 3\), its .* \(3, 2\)"),
    "None": ({"a": W, "b": None}, ValueError, r"no gradient for \['b'\]"),
    "masked": ({"a": W, "b": optax.MaskedNode()}, ValueError, r"no gradient for \['b'\]"),
    "missing": ({"a": W}, ValueError, r"no gradient for \['b'\]"),
    "surplus": ({"a": W, "b": jnp.ones(3), "c": W}, ValueError, r"no \['c'\] in .* for its gradient"),
    "subtree": ({"a": W, "b": [jnp.ones(3)]}, ValueError, r"no gradient for \['b'\].*; no \['b'\]\[0\] in"),
    "complex": ({"a": W.astype(jnp.complex64), "b": jnp.ones(3)}, TypeError, r"gradient\['a'\] is complex64"),
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


def test_a_list_for_a_tuple_is_named():
    tx = rmsprop(0.1)
    with pytest.raises(ValueError, match=r"structure of state.nu: PyTreeDef\(\[\*\]\) is not PyTreeDef\(\(\*,\)\)"):
        tx.update([W], tx.init((W,)))


def test_real_gradient_of_a_complex_parameter():
    tx = rmsprop(0.1, momentum=0.9)
    with pytest.raises(TypeError, match="gradient is float32: it must be complex just where"):
        tx.update(jnp.ones(2), tx.init(jnp.ones(2, jnp.complex64)))


def test_params_of_another_shape_are_named():
    tx = rmsprop(0.1, weight_decay=0.1)
    with pytest.raises(ValueError, match=r"gradient\['a'\] has shape \(3, 2\), its parameter \(3, 1\)"):
        tx.update({"a": W}, tx.init({"a": W}), {"a": jnp.ones((3, 1))})


@pytest.mark.parametrize("decoupled", [True, False])
def test_weight_decay_needs_params(decoupled):
    tx = rmsprop(0.1, weight_decay=0.1, decoupled=decoupled)
    with pytest.raises(ValueError, match=r"weight_decay needs the parameters \[\"\['w'\]\"\]: call update"):
        tx.update({"w": W}, tx.init({"w": W}))


def test_params_are_not_looked_at_without_weight_decay():
    tx = rmsprop(0.1)
    tx.update(W, tx.init(W), "anything")
    tx.update(W, tx.init(W), value=1.0, anything=None)


# --- Compilation --------------------------------------------------------------------------------------


def test_an_eager_update_is_one_program(compilations):
    params = [jnp.ones((5, i + 1)) for i in range(20)]
    tx = rmsprop(0.1, **EVERYTHING)
    state = tx.init(params)
    with compilations() as compiled:
        tx.update(params, state, params)
    assert len(compiled) == 1


def test_new_numbers_do_not_recompile(compilations):
    params = {"w": jnp.ones((7, 3))}
    options = EVERYTHING | {"eps": 1e-3}
    tx = rmsprop(0.1, **options)
    state = tx.init(params)
    _, state = tx.update(params, state, params)
    with compilations() as compiled:
        tx.update(params, state, params)
        for numbers in (
            {"learning_rate": 0.2},
            {"decay": 0.99},
            {"eps": 1.0},
            {"momentum": 0.5},
            {"weight_decay": 0.0},
        ):
            rmsprop(**{"learning_rate": 0.1, **options, **numbers}).update(params, state, params)
    assert compiled == []
    with compilations() as compiled:  # and the watch itself works
        rmsprop(0.1, **options | {"eps_in_sqrt": False}).update(params, state, params)
    assert len(compiled) == 1


def test_inject_hyperparams_outside_jit_does_not_recompile(compilations):
    params = {"w": jnp.ones((7, 5))}
    rates = [jnp.float32(rate) for rate in (0.1, 0.01, 0.001)]
    tx = optax.inject_hyperparams(rmsprop)(learning_rate=0.1, momentum=0.9)
    state = tx.init(params)
    for _ in range(2):
        _, state = tx.update(params, state, params)
    with compilations() as compiled:
        for rate in rates:
            state.hyperparams["learning_rate"] = rate
            updates, state = tx.update(params, state, params)
    assert compiled == []
    reference = rmsprop(lambda count: jnp.array([0.1, 0.1, 0.1, 0.01, 0.001])[count], momentum=0.9)
    expected_state = reference.init(params)
    for _ in range(5):
        expected, expected_state = reference.update(params, expected_state)
    np.testing.assert_allclose(updates["w"], expected["w"], rtol=1e-6)


def test_it_inlines_under_the_users_jit():
    tx = rmsprop(0.1)
    params = {"a": W, "b": W + 1, "c": jnp.ones(5)}

    def step(params, state, grads):
        updates, state = tx.update(grads, state)
        return optax.apply_updates(params, updates), state

    args = params, tx.init(params), params
    jaxpr = str(jax.make_jaxpr(step)(*args))
    assert "_update" not in jaxpr
    assert jaxpr.count("name=_apply") == len(params)  # one function for each shape, which XLA inlines:
    compiled = jax.jit(step, donate_argnums=(0, 1)).lower(*args).compile().as_text()
    entry = compiled[compiled.index("ENTRY") :]
    assert " call(" not in compiled
    # ν and the parameter of each leaf, and the count: nothing between update and apply_updates.
    assert len(re.findall(r" fusion\(", entry)) == 2 * len(params) + 1


NARROW = {"state_dtype": jnp.uint8}


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"momentum": 0.9},
        {"centered": True},
        {"eps_in_sqrt": False},
        EVERYTHING,
        NARROW,
        NARROW | {"eps_in_sqrt": False, "bias_correction": True, "weight_decay": 0.1},
    ],
)
def test_no_copy_of_the_state(options):
    tx = rmsprop(1e-3, **options)
    params = jnp.ones(1 << 16)

    def step(params, state, grads):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    compiled = jax.jit(step, donate_argnums=(0, 1)).lower(params, tx.init(params), params).compile()
    assert " fusion(" in compiled.as_text()  # the text is what we think it is
    assert " copy(" not in compiled.as_text()
    # Every donated buffer is used again: parameter, count and slots. And no array is made on the way.
    memory = compiled.memory_analysis()
    assert memory.alias_size_in_bytes >= params.nbytes + sum(x.nbytes for x in jax.tree.leaves(tx.init(params)))
    assert memory.temp_size_in_bytes < 1000


@pytest.mark.parametrize("bias_correction", [False, True])
@pytest.mark.parametrize("centered", [False, True])
@pytest.mark.parametrize("eps_in_sqrt", [False, True])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16, jnp.complex64])
@pytest.mark.parametrize("state_dtype", [None, jnp.bfloat16, jnp.uint8])
def test_lowers_for_every_target(state_dtype, bias_correction, centered, eps_in_sqrt, dtype):
    for options in ({}, {"momentum": 0.9, "nesterov": True, "lr_in_momentum": False, "weight_decay": 0.1}):
        tx = rmsprop(
            lambda count: 0.1 / (1 + count.astype(jnp.float32)),
            eps_in_sqrt=eps_in_sqrt,
            centered=centered,
            bias_correction=bias_correction,
            state_dtype=state_dtype,
            **options,
        )
        params = jax.ShapeDtypeStruct((8, 4), dtype)
        state = jax.eval_shape(tx.init, params)
        exported = export.export(jax.jit(tx.update), platforms=("cpu", "cuda", "tpu"))(params, state, params)
        assert exported.platforms == ("cpu", "cuda", "tpu")
        assert exported.out_avals[0].dtype == dtype


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


def test_hashable_and_static():
    tx = rmsprop(0.1)
    assert hash(tx) == hash(tx)
    step = jax.jit(lambda tx, g: tx.update(g, tx.init(g))[0], static_argnums=0)
    np.testing.assert_allclose(step(tx, W), -0.1 / np.sqrt(0.1), rtol=1e-6)


def test_init_on_shapes_allocates_what_init_on_arrays_does():
    tx = rmsprop(0.1, **EVERYTHING)
    arrays = {"w": jnp.ones((2, 3), jnp.bfloat16)}
    shapes = jax.eval_shape(lambda: arrays)
    assert jax.tree.map(jax.typeof, tx.init(shapes)) == jax.tree.map(jax.typeof, tx.init(arrays))
    assert jax.tree.map(lambda x: x.dtype, jax.eval_shape(tx.init, arrays)) == jax.tree.map(
        lambda x: x.dtype, tx.init(arrays)
    )


def test_scale_by_rms_keeps_the_sign():
    updates, _ = scale_by_rms(0.75, 0.0).update(jnp.array([2.0, -3.0]), scale_by_rms().init(jnp.ones(2)))
    np.testing.assert_array_equal(updates, [2.0, -2.0])
