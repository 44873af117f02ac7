"""Trees of gradients, parameters and masks as users have them: what is taken, and errors that name the leaf."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rmsprop_jax import dialects, rmsprop


W = jnp.ones((3, 2))


# --- Leaves that are no arrays --------------------------------------------------------------------------


class Tensor:
    """A tensor of another library, whose dtype NumPy does not know."""

    shape, dtype = (2,), "torch.float32"


Tensor.__module__ = "torch"
NO_ARRAYS = {
    "function": ([jax.nn.relu], r"\[0\] has type .*eqx.filter.*optax.masked"),
    "text": ("linear", r" has type str: .*eqx.filter.*optax.masked"),
    "array of text": (np.array(["a"]), " has dtype <U1: .*eqx.filter"),
    "array of objects": (np.array([None]), " has dtype object: .*eqx.filter"),
    "key": (jax.random.key(0), " has dtype key.*eqx.filter"),
    "object": (object(), " has type object.*eqx.filter"),
    "torch": (Tensor(), r" has type Tensor of torch: .*jnp.asarray\(x.detach\(\).cpu\(\).numpy\(\)\)"),
    "another library": (memoryview(b"ab"), r" has type memoryview of builtins: .*jnp.asarray\(np.asarray\(x\)\)"),
}


@pytest.mark.parametrize(("leaf", "message"), NO_ARRAYS.values(), ids=NO_ARRAYS)
def test_leaves_that_are_no_arrays_are_refused_by_name(leaf, message):
    tree = {"w": W, "it": leaf}
    ones = jax.tree.map(lambda _: 1.0, tree)
    message = rf"\['it'\]{message}"
    with pytest.raises(TypeError, match="parameter" + message):
        rmsprop(0.1).init(tree)
    with pytest.raises(TypeError, match="gradient" + message):
        rmsprop(0.1).update(tree, rmsprop(0.1).init(ones))
    decaying = rmsprop(0.1, weight_decay=0.1)
    with pytest.raises(TypeError, match="parameter" + message):
        decaying.update(ones, decaying.init(ones), tree)


def test_a_parameter_that_is_none_but_has_a_gradient_is_refused_where_it_would_decay():
    tx = rmsprop(0.1, weight_decay=0.1)
    with pytest.raises(ValueError, match=r"params\['b'\] is None, and there is a gradient for it"):
        tx.update({"a": W, "b": W}, tx.init({"a": W, "b": W}), {"a": W, "b": None})


@pytest.mark.parametrize("kinds", [(jnp.complex64, jnp.float32), (jnp.float32, jnp.complex64)])
def test_a_gradient_is_complex_where_its_parameter_is(kinds):
    grad, param = (jnp.ones(2, dtype) for dtype in kinds)
    tx = rmsprop(0.1)
    state = tx.init({"w": grad})
    with pytest.raises(TypeError, match=r"gradient\['w'\] is .*: both must be real or both complex"):
        tx.update({"w": grad}, state, {"w": param})
    for params in (None, {"w": 1.0}, {"v": param, "w": param}):
        tx.update({"w": grad}, state, params)


def test_an_error_lists_a_few_leaves():
    tx, params = rmsprop(0.1), {f"w{i}": W for i in range(100)}
    with pytest.raises(ValueError, match=r"no gradient for \['w0'\].*; and 91 more"):
        tx.update({"w99": W}, tx.init(params))


# --- Masks ----------------------------------------------------------------------------------------------


class Layer(eqx.Module):
    weight: jax.Array
    bias: jax.Array

    def __call__(self, x):
        return self.weight @ x + self.bias


PARAMS = Layer(jnp.ones((2, 3)), jnp.ones(2))
MASKS = {
    "a module that can be called": jax.tree.map(lambda p: p.ndim > 1, PARAMS),
    "NumPy's booleans": jax.tree.map(lambda p: np.bool_(p.ndim > 1), PARAMS),
    "a function": lambda params: jax.tree.map(lambda p: p.ndim > 1, params),
    "a function that returns a module": lambda params: Layer(True, False),
}


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
@pytest.mark.parametrize("make", [rmsprop, dialects.keras])
def test_a_mask_says_which_parameters_decay(make, mask):
    grads = jax.tree.map(jnp.zeros_like, PARAMS)
    tx = make(0.1, weight_decay=0.5, weight_decay_mask=mask)
    updates, _ = tx.update(grads, tx.init(PARAMS), PARAMS)
    np.testing.assert_allclose(updates.weight, -0.05)
    np.testing.assert_array_equal(updates.bias, 0)


class DictConfig(dict):
    """As of OmegaConf or ml_collections: JAX knows no subclass of dict, and takes it for a leaf."""


class ListConfig(list):
    """As of OmegaConf."""


@pytest.mark.parametrize("mask", [DictConfig(w=True), ListConfig([True]), lambda params: DictConfig(w=True)])
def test_a_mask_of_a_configuration_system_is_refused_with_a_way_out(mask):
    tx = rmsprop(0.1, weight_decay=0.1, weight_decay_mask=mask)
    with pytest.raises(TypeError, match=r"_mask has type (Dict|List)Config.*OmegaConf.to_container.*to_dict\(\)"):
        tx.update({"w": W}, tx.init({"w": W}), {"w": W})


def test_a_mask_that_is_no_tree_of_booleans_is_refused():
    for mask in (True, np.True_, jnp.array(True)):
        with pytest.raises(TypeError, match="weight_decay_mask is a single .*static_args"):
            rmsprop(0.1, weight_decay=0.1, weight_decay_mask=mask)
    for mask, error, message in (
        ((1,), TypeError, r"weight_decay_mask\[0\] has type int: allowed are True and False$"),
        (("yes",), TypeError, r"weight_decay_mask\[0\] has type str: allowed are True and False$"),
        ((jnp.array(True),), TypeError, r"weight_decay_mask\[0\] has type .*: allowed are True and False$"),
        ((True, False), ValueError, "weight_decay_mask must be a tree like the parameters', or a prefix of it"),
    ):
        tx = rmsprop(0.1, weight_decay=0.1, weight_decay_mask=mask)
        with pytest.raises(error, match=message):
            tx.update((W,), tx.init((W,)), (W,))


def test_a_whole_equinox_module_serves_as_params():
    """Its functions and integers have no gradient, so a weight decay passes over them."""
    model = eqx.nn.MLP(2, 1, 3, 1, key=jax.random.key(0))
    trained = eqx.filter(model, eqx.is_inexact_array)
    grads = jax.tree.map(jnp.ones_like, trained)
    tx = rmsprop(0.1, weight_decay=0.1)
    updates, _ = tx.update(grads, tx.init(trained), model)
    expected, _ = tx.update(grads, tx.init(trained), trained)
    assert eqx.tree_equal(updates, expected)
