"""The functions that convert arrays by name to trees of parameters, and back."""

import chex
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from golden.checkpoints import ORIGIN
from interop_helpers import checkpoint, entry, group
from recordings import from_torch_layout as convert, NAMES, to_torch_layout as convert_back

from rmsprop_jax import carry_over, interop, rmsprop
from rmsprop_jax.interop import _named


WHOLE = checkpoint([group([0, 1])], {0: entry(1.0), 1: entry(2.0)})


def test_convert_must_use_every_accumulator_once():
    def read(convert):
        return interop.from_pytorch(WHOLE, ["a", "b"], convert)

    with pytest.raises(ValueError, match=r"convert leaves out or changes \['b'\], and uses \['a'\] more than once"):
        read(lambda x: [x["a"], x["a"]])
    with pytest.raises(ValueError, match=r"convert leaves out or changes \['a'\]"):
        read(lambda x: [x["a"] - 1, x["b"]])
    with pytest.raises(ValueError, match=r"convert leaves out or changes \['a'\]"):
        read(lambda x: [x["a"][:1], x["b"]])
    # A tied weight may go to two places, and weights may be split, joined and cast to float32.
    tied = read(lambda x: [x["a"], x["b"], x["a"]])
    assert [float(x[0]) for x in tied.nu] == [1, 2, 1]
    joined = read(lambda x: jnp.asarray(np.stack([x["b"], x["a"]]), jnp.float32))
    np.testing.assert_array_equal(joined.nu, [[2, 2], [1, 1]])
    in_order = checkpoint([group([0, 1])], {0: entry(2.0, square_avg=np.ones((2, 3))), 1: entry(1.0)})
    matrix, vector = interop.from_pytorch(in_order, ["b", "a"], lambda x: [*x.values()]).nu
    assert (matrix.shape, vector.shape) == ((2, 3), (2,))
    interop.from_pytorch(
        in_order, ["b", "a"], lambda x: [v.reshape(s) for v, s in zip(x.values(), [6, 2], strict=True)]
    )
    many = checkpoint([group(list(range(300)))], {i: entry(float(i)) for i in range(300)})
    names = [f"w{i}" for i in range(300)]
    interop.from_pytorch(many, names, lambda x: [jnp.asarray(v, jnp.float32) for v in x.values()])
    with pytest.raises(ValueError, match=r"\['w137'\], and uses \['w7'\] more than once"):
        interop.from_pytorch(many, names, lambda x: [x["w7" if k == "w137" else k] for k in x])


@pytest.mark.parametrize("dtype", [jnp.bfloat16, np.float16, np.int32, np.complex64], ids=str)
def test_convert_must_not_cast_to_what_cannot_hold_an_accumulator(dtype):
    with pytest.raises(
        ValueError, match=rf"convert casts \['b'\] to {np.dtype(dtype)}, but accumulators need float32.*after convert"
    ):
        interop.from_pytorch(WHOLE, ["a", "b"], lambda x: {"a": x["a"], "b": jnp.asarray(x["b"], dtype)})


@pytest.mark.parametrize("dtype", [jnp.bfloat16, np.float16], ids=str)
def test_convert_must_not_round_on_the_way(dtype):
    with pytest.raises(ValueError, match=r"leaves out or changes \['b'\]|['a', 'b']"):
        interop.from_pytorch(WHOLE, ["a", "b"], lambda x: {k: np.float32(np.asarray(v, dtype)) for k, v in x.items()})


class Dropout(nnx.Module):
    def __init__(self, rngs):
        self.layer, self.dropout = nnx.Linear(1, 2, use_bias=False, rngs=rngs), nnx.Dropout(0.1, rngs=rngs)


def test_what_is_no_array_of_floats_is_named_and_can_be_left_out():
    perceptron = eqx.nn.MLP(1, 1, 2, 1, use_bias=False, use_final_bias=False, key=jax.random.key(0))
    kernels = lambda model: [layer.weight for layer in model.layers]  # noqa: E731

    def module(arrays):
        return eqx.tree_at(kernels, perceptron, [arrays["a"][:, None], arrays["b"][None]])

    def variables(arrays):
        state = nnx.state(Dropout(nnx.Rngs(0)))
        state["layer"]["kernel"] = state["layer"]["kernel"].replace(arrays["a"][None])
        return state

    with pytest.raises(
        ValueError, match=r"convert returns \.activation of type .*eqx.filter\(tree, eqx.is_inexact_array"
    ):
        interop.from_pytorch(WHOLE, ["a", "b"], module)
    state = interop.from_pytorch(WHOLE, ["a", "b"], lambda x: eqx.filter(module(x), eqx.is_inexact_array))
    np.testing.assert_array_equal(kernels(state.nu)[1], [[2, 2]])
    one = checkpoint([group([0])], {0: entry(1.0)})
    with pytest.raises(ValueError, match=r"\['dropout'\].*nnx.filter_state\(state, nnx.Param\)"):
        interop.from_pytorch(one, ["a"], variables)
    state = interop.from_pytorch(one, ["a"], lambda x: nnx.filter_state(variables(x), nnx.Param))
    np.testing.assert_array_equal(jax.tree.leaves(state.nu)[0], [[1, 1]])
    for leaf in ("gelu", jax.random.key(0), np.array([True, False])):
        with pytest.raises(ValueError, match=r"convert returns \['c'\] of type"):
            interop.from_pytorch(WHOLE, ["a", "b"], lambda x: {**x, "c": leaf})  # noqa: B023


def test_convert_may_return_numbers():
    centered = checkpoint([group([0], centered=True)], {0: entry(3.0, grad_avg=np.ones(2))})
    state = interop.from_pytorch(centered, ["w"], lambda x: [v.item() for v in x["w"]])
    assert [float(x) for x in state.nu] == [2, 2]


def test_what_does_not_train_has_no_state():
    params = {"a": jnp.ones(2), "b": jnp.ones(2), "n": jnp.arange(2)}
    state = interop.from_pytorch(WHOLE, ["a", "b"], lambda x: {**x, "n": None})
    tx = rmsprop(0.1)
    assert jax.tree.structure(carry_over(state, tx.init(params))) == jax.tree.structure(tx.init(params))
    tx.update({**params, "n": None}, state)


def test_a_variance_is_the_difference_in_float64():
    """In float32 E[g²] - E[g]² of a nearly constant gradient is nothing but rounding."""
    mean = np.float32([1.0001, 3.3333, -2.7182, 7.0])
    second = np.float32(np.float64(mean) ** 2 * (1 + 3e-7))
    groups = [group([0], centered=True)]
    state = interop.from_pytorch(checkpoint(groups, {0: entry(0.0, square_avg=second, grad_avg=mean)}), ["w"])
    expected = np.float64(second) - np.float64(mean) ** 2
    np.testing.assert_allclose(state.nu["w"], np.maximum(expected, 0), rtol=1e-6)
    # A difference below zero, which rounding makes, is no variance.
    below = checkpoint(groups, {0: entry(0.0, square_avg=second * np.float32(0.999), grad_avg=mean)})
    state = interop.from_pytorch(below, ["w"])
    assert (state.nu["w"] == 0).all()
    updates, _ = rmsprop(0.1, centered=True).update({"w": jnp.array(mean)}, state)
    assert jnp.isfinite(updates["w"]).all()


def test_convert_back_must_give_the_names():
    state = rmsprop(0.1).init(convert(ORIGIN))
    with pytest.raises(ValueError, match="names must be those that convert_back makes: check fc.bias, x"):
        interop.to_pytorch(state, [*NAMES[:2], "x"], convert_back)
    with pytest.raises(ValueError, match="names has a name more than once: fc.bias"):
        interop.to_pytorch(state, [*NAMES, "fc.bias"], convert_back)
    with pytest.raises(ValueError, match="is a set, which has no order"):
        interop.to_pytorch(state, set(NAMES), convert_back)
    with pytest.raises(
        ValueError, match=r"other shapes than the weights': fc.weight has \(3, 8\), its weight \(8, 3\)$"
    ):
        interop.to_pytorch(state, {**ORIGIN, "fc.weight": ORIGIN["fc.weight"].T}, convert_back)


WRITERS = {
    "keras": (interop.to_keras, lambda found: dict(found)["a_velocity"]),
    "tensorflow1": (interop.to_tensorflow1, lambda found: found["a/RMSProp"]),
    "pytorch": (lambda state, back: interop.to_pytorch(state, ["a", "b"], back), None),
}
BACK = {
    r"leaves out or changes \['b'\]\. To drop one on purpose, put None in its place": lambda x: {"a": x["a"]},
    r"leaves out or changes \['b'\], and uses \['a'\] more": lambda x: {"a": x["a"], "b": x["a"]},
    r"leaves out or changes \['a'\], \['b'\]": lambda x: {name: -v for name, v in x.items()},
    r"casts \['a'\] to int32": lambda x: {name: v.astype(int) for name, v in x.items()},
    r"casts \['b'\] to bfloat16": lambda x: {**x, "b": x["b"].astype(jnp.bfloat16)},
    r"makes elements of \['c'\] that come from none of its arrays: leave them out": lambda x: {**x, "c": np.ones(2)},
    r"is a int: allowed is a function of arrays": 7,
    r"makes None: allowed is a mapping from names": lambda x: None,
    r"makes \[.*: allowed is a mapping from names": lambda x: [x["a"], x["b"]],
    r"makes {0: .*: allowed is a mapping from names": lambda x: {0: x["a"], "b": x["b"]},
}


@pytest.mark.parametrize("writer", WRITERS)
@pytest.mark.parametrize(("message", "back"), BACK.items(), ids=BACK)
def test_convert_back_must_use_every_accumulator_once(writer, message, back):
    state = rmsprop(0.1).init({"a": jnp.ones(2), "b": jnp.ones(2)})._replace(nu={"a": jnp.ones(2), "b": jnp.zeros(2)})
    with pytest.raises(ValueError, match=r"convert_back(=\d+)? " + message):
        WRITERS[writer][0](state, back)


def test_padding_is_put_on_and_taken_off():
    padded = interop.from_pytorch(WHOLE, ["a", "b"], lambda x: {"a": np.pad(x["a"], (0, 2)), "b": x["b"]})
    plain = interop.from_pytorch(WHOLE, ["a", "b"])
    np.testing.assert_array_equal(padded.nu["a"], np.pad(plain.nu["a"], (0, 2)))
    written = [
        dict(interop.to_keras(state, lambda tree, n=n: {"a": tree["a"][:n], "b": tree["b"]}))
        for state, n in ((padded, plain.nu["a"].size), (plain, None))
    ]
    chex.assert_trees_all_equal(*written)
    with pytest.raises(ValueError, match=r"convert makes elements of \['c'\] that come from none"):
        interop.from_pytorch(WHOLE, ["a", "b"], lambda x: {**x, "c": np.zeros(2)})


@pytest.mark.parametrize("writer", ["keras", "tensorflow1"])
def test_convert_back_may_drop_on_purpose_and_change_shapes(writer):
    def back(tree):
        tree["layer"]["bias"] = tree["gone"] = None
        return {"a": np.asarray(tree["layer"]["kernel"]).T}

    state = rmsprop(0.1).init({"layer": {"kernel": jnp.ones((2, 3)), "bias": jnp.ones(2)}, "gone": [jnp.ones(2)]})
    state.nu["layer"]["kernel"] = jnp.arange(6.0).reshape(2, 3)
    write, a_of = WRITERS[writer]
    np.testing.assert_array_equal(a_of(write(state, back)), np.arange(6.0).reshape(2, 3).T)


def test_a_centered_state_goes_out_as_frameworks_keep_it():
    state = rmsprop(0.1, centered=True, momentum=0.9).init({"w": jnp.ones(2)})
    state = state._replace(count=7, nu={"w": jnp.array([3.0, 0.0])}, mu={"w": jnp.array([-1.0, 2.0])})
    count, slots = _named.arrays_of(state, lambda tree: tree)
    assert count == 7
    assert {slot: arrays["w"].tolist() for slot, arrays in slots.items()} == {
        "nu": [4, 4],
        "mu": [-1, 2],
        "trace": [0, 0],
    }
    assert {arrays["w"].dtype for arrays in slots.values()} == {np.dtype("float32")}
    assert interop.to_tensorflow1(rmsprop(0.1).init({}), dict) == {}


def test_a_checkpoint_has_no_place_for_what_wrappers_hold():
    tx = optax.chain(rmsprop(0.1), optax.ema(0.9))
    state = tx.init({"w": jnp.ones(2)})
    with pytest.raises(
        ValueError, match=r"state also holds \[1\]\.ema\['w'\]: a framework's .*pass RMSProp's own state, state\[0\]"
    ):
        interop.to_keras(state, lambda tree: tree)
    assert len(interop.to_keras(state[0], lambda tree: tree)) == 2
    many = jax.vmap(rmsprop(0.1).init)(jnp.ones((3, 2)))
    with pytest.raises(ValueError, match=r"the count has shape \(3,\): pass one of the states"):
        interop.to_keras(many, lambda tree: {"w": tree})


SOME = _named.Optimizer(
    "Some RMSProp", {"nu": "ms", "mu": "mg", "trace": "mom"}, ("nu", "trace"), {"m": "Adam", "s": "SGD"}
)


def entries_of(**arrays):
    """Entries "slot__weight"."""
    return [_named.Entry(*key.split("__"), np.asarray(x, float), f"file:{key}") for key, x in arrays.items()]


def read_some(count=7, stored=None, shapes=None, **arrays):
    return _named.state_of(SOME, entries_of(**arrays), None, count, stored or {}, shapes)


def test_entries_come_in_any_order():
    arrays = {"mom__b": [5, 6], "ms__a": [1], "mg__b": [0, 1], "mom__a": [4], "mg__a": [0.5], "ms__b": [2, 3]}
    for order in (list, reversed, sorted):
        state = read_some(**dict(order(list(arrays.items()))))
        assert {k: x.tolist() for k, x in state.nu.items()} == {"a": [0.75], "b": [2, 2]}
        assert {k: x.tolist() for k, x in state.mu.items()} == {"a": [0.5], "b": [0, 1]}
        assert {k: x.tolist() for k, x in state.trace.items()} == {"a": [4], "b": [5, 6]}
        assert {x.dtype for x in jax.tree.leaves((state.nu, state.mu, state.trace))} == {jnp.dtype("float32")}


def test_a_slot_that_is_not_always_written_may_be_missing():
    assert read_some(ms__a=[1], mom__a=[2]).mu is None
    with pytest.raises(ValueError, match=r"lacks {'mg': \['a'\]}, which Some RMSProp writes with these options"):
        read_some(ms__a=[1], mom__a=[2], ms__b=[1], mom__b=[2], mg__b=[0])
    with pytest.raises(ValueError, match=r"lacks {'mom': \['a'\]}"):
        read_some(ms__a=[1])
    with pytest.raises(ValueError, match=r"lacks {'ms': \['b'\]}"):
        read_some(ms__a=[1], mom__a=[2], mom__b=[2])
    with pytest.raises(ValueError, match=r"lacks {'ms': \['b'\], 'mom': \['b'\]}"):
        read_some(ms__a=[1], mom__a=[2], shapes={"b": None})


def test_another_optimizer_is_named_by_what_it_has():
    with pytest.raises(
        ValueError, match=r"not the checkpoint of Some RMSProp, but of Adam: it has file:m__a, file:v__a$"
    ):
        read_some(m__a=[1], v__a=[1])
    with pytest.raises(ValueError, match=r"but of SGD: it has file:s__a$"):
        read_some(ms__a=[1], mom__a=[1], s__a=[1])
    with pytest.raises(ValueError, match=r"but of another optimizer: it has file:x__a$"):
        read_some(x__a=[1])
    with pytest.raises(ValueError, match=r"but of another optimizer: it has file:mom__a$"):
        read_some(mom__a=[1])
    with pytest.raises(ValueError, match=r"but of one without accumulators, such as SGD: it has no accumulators"):
        read_some()


def test_one_name_twice_shows_both_places():
    twice = [*entries_of(ms__a=[1], mom__a=[1]), _named.Entry("ms", "a", np.ones(1), "other:a")]
    with pytest.raises(ValueError, match=r"has ms of a twice, and they cannot be told apart: file:ms__a and other:a"):
        _named.state_of(SOME, twice, None, 7, {})


def test_shapes_are_compared():
    with pytest.raises(ValueError, match=r"a has arrays of different shapes: {'ms': \(1,\), 'mom': \(2,\), "):
        read_some(ms__a=[1], mom__a=[1, 2])
    assert read_some(ms__a=[1], mom__a=[1], shapes={"a": (1,)}).nu["a"].shape == (1,)
    with pytest.raises(ValueError, match=r"'weight': \(2,\)}. Are the names in another order\?"):
        read_some(ms__a=[1], mom__a=[1], shapes={"a": (2,)})


def test_a_negative_average_averages_no_squares():
    with pytest.raises(ValueError, match=r"ms of b has negative elements"):
        read_some(ms__a=[0], mom__a=[-1], ms__b=[-1e-9], mom__b=[1])
    for lost in (np.nan, np.inf):  # a run that diverged
        np.testing.assert_array_equal(read_some(ms__a=[lost], mom__a=[1]).nu["a"], [lost])


def test_counts_of_the_caller_and_of_the_checkpoint():
    one = {"ms__a": [1], "mom__a": [1]}
    assert read_some(None, {"step": 3}, **one).count == 3
    assert read_some(None, {"x": 3, "y": np.float32(3)}, **one).count == 3
    assert read_some(0, {"x": 3, "y": 4}, **one).count == 0
    assert read_some(**one).count.dtype == jnp.int32
    with pytest.raises(
        ValueError, match=r"several counts, which differ: {'x': 3, 'y': 4}. Pass the right one as count"
    ):
        read_some(None, {"x": 3, "y": 4}, **one)
    with pytest.raises(ValueError, match="does not say how many updates were made: pass count, which schedules need"):
        read_some(None, **one)


def test_a_name_that_convert_does_not_find():
    with pytest.raises(ValueError, match=r"convert asks for 'b', but the checkpoint has \['a'\]: strip prefixes"):
        _named.state_of(SOME, entries_of(ms__a=[1], mom__a=[1]), lambda x: x["b"], 7, {})
    dotted = [_named.Entry(slot, "module.fc", np.ones(1), slot) for slot in ("ms", "mom")]
    with pytest.raises(ValueError, match=r"convert asks for 'fc', .*strip prefixes like `module.` there"):
        _named.state_of(SOME, dotted, lambda x: x["fc"], 7, {})
    assert float(_named.state_of(SOME, dotted, lambda x: x["module.fc"], 7, {}).nu[0]) == 1
