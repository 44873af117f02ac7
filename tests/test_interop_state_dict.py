"""State dicts of torch's optimizers: which entry belongs to which weight."""

import numpy as np
import pytest
from interop_helpers import checkpoint, entry, group

from rmsprop_jax import interop


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
    with pytest.raises(ValueError, match=r"names its parameters \['b', 'a', 'c'\], but names is \['a', 'b', 'c'\]"):
        interop.from_pytorch(checkpoint(named, ABC), ["a", "b", "c"])
    with pytest.raises(ValueError, match="does not name its parameters: pass names, in the order of its groups"):
        interop.from_pytorch(checkpoint(IN_GROUPS, ABC))
    with pytest.raises(ValueError, match="names has a name more than once: a"):
        interop.from_pytorch(checkpoint(IN_GROUPS, ABC), ["a", "a", "c"])


class Tensor:
    """A torch tensor, as far as its identity and its shape go: an array compares elements, and is no key."""

    def __init__(self, *shape, address=0):
        self.shape, self.address = shape, address or id(self)

    def data_ptr(self):
        return self.address

    def __eq__(self, other):
        if other is not self:
            raise RuntimeError("Boolean value of Tensor with more than one value is ambiguous")
        return True

    def __hash__(self):
        return id(self)


class Module:
    def __init__(self, parameters, buffers=()):
        self.parameters, self.buffers = parameters, dict(buffers)

    def named_parameters(self):
        """Like torch's, which gives the first name of a tied weight."""
        return {id(x): (name, x) for name, x in reversed(self.parameters.items())}.values().__reversed__()

    def named_buffers(self):
        return self.buffers.items()


class Live:
    """An optimizer, with an average of i + 1 for the i-th of its parameters."""

    def __init__(self, *groups):
        self.param_groups = [group(tensors) for tensors in groups]
        tensors = [x for tensors in groups for x in tensors]
        self.state = {
            x: {"step": np.float32(3), "square_avg": np.full(x.shape, i + 1.0)} for i, x in enumerate(tensors)
        }

    def state_dict(self):
        number = {x: i for i, x in enumerate(self.state)}
        groups = [{**g, "params": [number[x] for x in g["params"]]} for g in self.param_groups]
        return {"state": {number[x]: entry for x, entry in self.state.items()}, "param_groups": groups}


def layers(*shapes):
    """A model with a weight "0", "1", ... of each shape."""
    return Module({str(i): Tensor(*shape) for i, shape in enumerate(shapes)})


def averages(state):
    return {name: float(x.ravel()[0]) for name, x in state.nu.items()}


def test_the_optimizer_and_its_model_need_no_order():
    model = layers((2, 2), (2,), (2, 2), (2,))
    body_w, body_b, head_w, head_b = model.parameters.values()
    optimizer = Live([head_w, head_b], [body_w, body_b])
    expected = {"2": 1, "3": 2, "0": 3, "1": 4}
    shuffled = dict(reversed(model.parameters.items()))
    for names in (model, model.parameters, model.named_parameters(), shuffled):
        assert averages(interop.from_pytorch(optimizer, names)) == expected
    # Parameters that the optimizer does not have stay away; what the model does not have is an error.
    model.parameters["frozen"] = Tensor(2)
    assert averages(interop.from_pytorch(optimizer, model)) == expected
    with pytest.raises(ValueError, match=r"names lacks parameters of the optimizer, of shape \(2, 2\), \(2,\)"):
        interop.from_pytorch(optimizer, Module({"2": head_w, "3": head_b}))
    with pytest.raises(ValueError, match="does not name its parameters: pass names"):
        interop.from_pytorch(optimizer)


def test_tensors_of_the_same_memory_need_no_order():
    """As in `model.state_dict()`, and in `p.data`."""
    model = layers((2, 2), (2, 2))
    first, second = model.parameters.values()
    others = {name: Tensor(*x.shape, address=x.address) for name, x in model.parameters.items()}
    assert averages(interop.from_pytorch(Live([second, first]), others)) == {"1": 1, "0": 2}
    # A slice of a weight begins where the weight does.
    others = {"slice": Tensor(1, 2, address=first.address)} | others
    assert averages(interop.from_pytorch(Live([second, first]), others)) == {"1": 1, "0": 2}
    # Two parameters of one memory are known by their identity.
    model = Module({"0": first, "1": Tensor(2, 2, address=first.address)})
    assert averages(interop.from_pytorch(Live([*model.parameters.values()][::-1]), model)) == {"1": 1, "0": 2}


def test_a_live_optimizer_whose_groups_have_names():
    model = layers((2,), (2,))
    optimizer = Live([*model.parameters.values()])
    optimizer.param_groups[0]["param_names"] = ["a", "b"]
    assert averages(interop.from_pytorch(optimizer)) == {"a": 1, "b": 2}
    assert averages(interop.from_pytorch(optimizer, model)) == {"0": 1, "1": 2}  # its names now


def test_a_tied_weight_has_its_first_name():
    weight, bias = Tensor(2, 2), Tensor(2)
    tied = {"embedding": weight, "bias": bias, "head": weight}
    optimizer = Live([bias, weight])
    for names in (Module(tied), tied):
        assert averages(interop.from_pytorch(optimizer, names)) == {"embedding": 2, "bias": 1}


def test_a_buffer_may_be_optimized():
    weight, buffer, other = Tensor(2), Tensor(2), Tensor(2)
    model = Module({"weight": weight}, {"scale": buffer, "mean": other})
    assert averages(interop.from_pytorch(Live([buffer, weight]), model)) == {"scale": 1, "weight": 2}
    assert averages(interop.from_pytorch(Live([weight]).state_dict(), model)) == {"weight": 1}


def test_a_model_s_order_is_not_that_of_several_groups():
    """Body and head of one shape: nothing in a state_dict tells that the head came first."""
    model = layers((2, 2), (2,), (2, 2), (2,))
    body_w, body_b, head_w, head_b = model.parameters.values()
    kept = Live([head_w, head_b], [body_w, body_b]).state_dict()
    for names in (model, model.parameters, model.named_parameters()):
        with pytest.raises(
            ValueError, match=r"the 2 groups .* pass the optimizer and the model that it trains, or a list of names in"
        ):
            interop.from_pytorch(kept, names)
    # A list is in the groups' order: the caller says so.
    assert averages(interop.from_pytorch(kept, ["2", "3", "0", "1"])) == {"2": 1, "3": 2, "0": 3, "1": 4}
    # One group, or all parameters in one of them, has the model's order.
    for groups in ([body_w, body_b, head_w, head_b],), ([], [body_w, body_b, head_w, head_b]):
        assert averages(interop.from_pytorch(Live(*groups).state_dict(), model)) == {"0": 1, "1": 2, "2": 3, "3": 4}


def test_shapes_tell_the_order_of_groups_that_have_none_in_common():
    model = layers((2, 2), (2,), (2, 2), (2,))
    a, b, c, d = model.parameters.values()
    weights_then_biases = Live([b, d], [a, c]).state_dict()
    with_buffer = Module(model.parameters, {"mean": Tensor(2)})
    for names in (model, with_buffer):
        assert averages(interop.from_pytorch(weights_then_biases, names)) == {"1": 1, "3": 2, "0": 3, "2": 4}
    model = layers((1,), (2,), (3,), (4,))
    a, b, c, d = model.parameters.values()
    assert averages(interop.from_pytorch(Live([c], [b, d], [a]).state_dict(), model)) == {
        "2": 1,
        "1": 2,
        "3": 3,
        "0": 4,
    }
    # A group in another order than the model's shows that the assumption is wrong.
    with pytest.raises(ValueError, match="shapes do not tell which weight is which"):
        interop.from_pytorch(Live([c, b], [a, d]).state_dict(), model)
    # Of a parameter that never stepped nobody knows the shape.
    kept = Live([a, b], [c, d]).state_dict()
    del kept["state"][3]
    with pytest.raises(ValueError, match="shapes do not tell which weight is which"):
        interop.from_pytorch(kept, model)
    assert averages(interop.from_pytorch(kept, ["0", "1", "2"])) == {"0": 1, "1": 2, "2": 3}


@pytest.mark.parametrize(("read", "first"), [(interop.from_pytorch, 0), (interop.from_stable_baselines3, 1)])
def test_parameters_that_never_stepped_have_their_first_value(read, first):
    frozen = checkpoint([group([0, 1])], {1: entry(2.0)})
    weights = {"f": np.ones((2, 3)), "h": np.ones(2)}
    for function, shape in ((None, (2, 3)), (lambda x: {"f": x["f"].T, "h": x["h"]}, (3, 2))):
        state = read(frozen, weights, function)
        np.testing.assert_array_equal(state.nu["f"], np.full(shape, first))
        np.testing.assert_array_equal(state.nu["h"], [2, 2])
    moving = checkpoint([group([0, 1], momentum=0.9)], {1: entry(2.0, momentum_buffer=np.ones(2))})
    assert (read(moving, weights).trace["f"] == 0).all()
    for names in (["h"], {"h": np.ones(2)}):
        assert list(read(frozen, names).nu) == ["h"]
    with pytest.raises(ValueError, match=r"f never stepped, .*pass names as a mapping .*dict\(model.named_parameters"):
        read(frozen, ["f", "h"])
    named = checkpoint([group([0, 1], param_names=["f", "h"])], {1: entry(2.0)})
    with pytest.raises(ValueError, match="f never stepped"):
        read(named)
    assert list(read(named, weights).nu) == ["f", "h"]
    # Nothing has stepped: a new run.
    state = read(checkpoint([group([0, 1])], {}), weights)
    assert state.count == 0
    assert (state.nu["h"] == first).all()


def test_names_with_weights_check_every_shape():
    whole = checkpoint([group([0, 1])], {0: entry(1.0), 1: {**entry(0.0), "square_avg": np.full((3, 2), 2.0)}})
    weights = {"a": np.ones(2), "b": np.ones((3, 2))}
    assert float(interop.from_pytorch(whole, weights).nu["b"][0, 0]) == 2
    with pytest.raises(ValueError, match=r"b has .* shapes: {'square_avg': \(2,\), 'weight': \(3, 2\)}.*another order"):
        interop.from_pytorch(whole, dict(reversed(weights.items())))
    with pytest.raises(ValueError, match="have stepped; names has 3"):
        interop.from_pytorch(whole, {**weights, "c": np.ones(2)})
    # Where the checkpoint has the names, the order is the checkpoint's.
    named = checkpoint([group([0, 1], param_names=["a", "b"])], whole["state"])
    assert float(interop.from_pytorch(named, dict(reversed(weights.items()))).nu["b"][0, 0]) == 2
    assert list(interop.from_pytorch(named, {**weights, "c": np.ones(2)}).nu) == ["a", "b"]
    with pytest.raises(ValueError, match="but names is"):
        interop.from_pytorch(named, {"a": np.ones(2)})


def test_names_may_be_a_generator():
    for names in ((name for name in "bac"), {"b": 0, "a": 0, "c": 0}.keys()):
        state = interop.from_pytorch(checkpoint(IN_GROUPS, ABC), names)
        assert {name: float(x[0]) for name, x in state.nu.items()} == {"b": 1, "a": 2, "c": 3}
    pairs = ((name, np.ones(2)) for name in "bac")  # as model.named_parameters()
    assert float(interop.from_pytorch(checkpoint([group([0, 1, 2])], ABC), pairs).nu["a"][0]) == 2
    for names, message in {
        "abc": "names='abc' is one string: allowed are the model, a mapping",
        frozenset("abc"): "is a frozenset, which has no order: allowed are",
        len: "is a builtin_function_or_method, which has no order: .*Pass a function as convert=",
        (("a", "b", "c"),): r"names has \('a', 'b', 'c'\), a tuple: allowed are the model, a mapping",
        (Tensor(2), Tensor(2), Tensor(2)): "names has <.*, a Tensor: allowed are the model, a mapping",
    }.items():
        with pytest.raises(ValueError, match=message):
            interop.from_pytorch(checkpoint(IN_GROUPS, ABC), names)
    with pytest.raises(ValueError, match="is a set, which has no order"):
        interop.from_pytorch(checkpoint(IN_GROUPS, ABC), set("abc"))
    with pytest.raises(ValueError, match="the checkpoint has a parameter more than once: 0"):
        interop.from_pytorch(checkpoint([group([0]), group([0])], {0: entry(1.0)}), ["a", "b"])
    with pytest.raises(ValueError, match="no group has the parameter of entry 1"):
        interop.from_pytorch(checkpoint([group([0])], ABC), ["a"])


def test_numbers_that_became_strings_or_arrays():
    """As after JSON, safetensors, or a tree map over the checkpoint."""
    for key in (str, np.int64, np.asarray):
        entries = {key(i) if key is not np.asarray else i: x for i, x in ABC.items()}
        groups = [{**g, "params": [key(i) if key is not str else i for i in g["params"]]} for g in IN_GROUPS]
        state = interop.from_pytorch(checkpoint(groups, entries), ["b", "a", "c"])
        assert {name: float(x[0]) for name, x in state.nu.items()} == {"b": 1, "a": 2, "c": 3}


def test_a_flattened_state_dict():
    """As torch.distributed.checkpoint writes it with flatten_optimizer_state_dict=True."""
    options = {k: v for k, v in group([], momentum=0.9, foreach=None).items() if k != "params"}
    flat = {}
    for i, name in enumerate(("fc.weight", "fc.bias")):
        flat |= {f"state.{name}.{slot}": x for slot, x in entry(i + 1.0, momentum_buffer=np.full(2, 5.0)).items()}
        flat |= {f"param_groups.{name}.{option}": x for option, x in options.items()}
    state = interop.from_pytorch(flat)
    assert state.count == 3
    assert {name: float(x[0]) for name, x in state.nu.items()} == {"fc.weight": 1, "fc.bias": 2}
    assert {name: float(x[0]) for name, x in state.trace.items()} == {"fc.weight": 5, "fc.bias": 5}
    with pytest.raises(ValueError, match="use from_pytorch"):
        interop.from_stable_baselines3(flat)


def test_the_count_is_the_largest_step():
    entries = {0: {**entry(1.0), "step": np.float32(5)}, 1: {**entry(2.0), "step": np.float32(9)}, 2: entry(3.0)}
    assert interop.from_pytorch(checkpoint(IN_GROUPS, entries), ["b", "a", "c"]).count == 9
    without = {i: {"square_avg": np.ones(2)} for i in range(3)}
    with pytest.raises(ValueError, match="does not say how many updates were made"):
        interop.from_pytorch(checkpoint(IN_GROUPS, without), ["b", "a", "c"])
    mixed = checkpoint(IN_GROUPS, {**entries, 2: without[2]})
    with pytest.raises(ValueError, match="step of c is None: allowed is a whole number"):
        interop.from_pytorch(mixed, ["b", "a", "c"])
    assert interop.from_pytorch(mixed, ["b", "a", "c"], count=7).count == 7


def test_nothing_to_read_is_a_new_run():
    for read in (interop.from_pytorch, interop.from_stable_baselines3):
        with pytest.raises(
            ValueError, match=r"has no accumulators of these names: start a new run with tx.init\(params"
        ):
            read(checkpoint([group([0])], {}), [])
        with pytest.raises(
            ValueError, match=r"has no accumulators of these names: start a new run with tx.init\(params"
        ):
            read(checkpoint([group([])], {}), layers())


def test_a_copy_of_the_model_has_other_tensors():
    """Then only shapes tell which is which."""
    for groups in (1, 2):
        model, copy = layers((2,), (2,)), layers((2,), (2,))
        optimizer = Live(*([*model.parameters.values()][i::groups] for i in range(groups)))
        message = "has other tensors than names, .* shapes do not tell which weight is which: pass the optimizer and the model that it trains, or"
        with pytest.raises(ValueError, match=message):
            interop.from_pytorch(optimizer, copy)
        assert averages(interop.from_pytorch(optimizer, ["0", "1"])) == {"0": 1, "1": 2}
    model, copy = layers((2,), (3,), (4,)), layers((2,), (3,), (4,))
    first, second, third = model.parameters.values()
    optimizer = Live([third, first], [second])
    del optimizer.state[second]
    assert averages(interop.from_pytorch(optimizer, copy)) == {"2": 1, "0": 2, "1": 0}


def test_a_buffer_is_no_name_of_a_state_dict():
    """Its parameters have numbers, and only named_parameters are numbered."""
    model = Module({"weight": Tensor(2)}, {"mean": Tensor(2)})
    with pytest.raises(ValueError, match="has 2 parameters, of which 2 have stepped; names has 1"):
        interop.from_pytorch(checkpoint([group([0, 1])], {0: entry(1.0), 1: entry(2.0)}), model)


BROKEN = {
    r"param_groups=\[7\]: allowed is a list of mappings with params": checkpoint([7], {}),
    r"param_groups=\[{'params': None}\]: allowed is a list of mappings": checkpoint([{"params": None}], {}),
    "param_groups=None: allowed is a list of mappings with params": checkpoint(None, {}),
    r"param_groups=\[{.*: allowed is a list of mappings with params": checkpoint([{"lr": 0.1}], {}),
    "state=None: allowed is a mapping of mappings": checkpoint([group([0])], None),
    "state={0: None}: allowed is a mapping of mappings": checkpoint([group([0])], {0: None}),
    "an entry twice, as a number and as a string: 0, 0. Remove": checkpoint(
        [group([0])], {0: entry(1.0), "0": entry(5.0)}
    ),
}


@pytest.mark.parametrize(("message", "found"), BROKEN.items(), ids=BROKEN)
def test_a_broken_state_dict_is_named(message, found):
    for read in (interop.from_pytorch, interop.from_bitsandbytes):
        with pytest.raises(ValueError, match=message):
            read(found, ["w"])


@pytest.mark.parametrize(
    "found", [{}, {"fc.weight": np.ones(2)}, {"state": {}}, {"optimizer": checkpoint([], {})}], ids=list
)
def test_other_mappings_than_a_state_dict(found):
    with pytest.raises(ValueError, match="not an optimizer's state_dict: state or param_groups is missing"):
        interop.from_pytorch(found, ["fc.weight"])
