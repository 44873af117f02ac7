"""Checkpoints of PyTorch, timm and Stable Baselines 3."""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
import optax
import pytest
from golden.checkpoints import case_name, ORIGIN
from interop_helpers import checkpoint, entry, group
from recordings import from_torch_layout as convert, NAMES, state_dict

from rmsprop_jax import carry_over, dialects, interop, rmsprop


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


class Tensor:
    """A torch tensor, as far as its identity and its shape go: an array compares elements, and is no key."""

    def __init__(self, *shape):
        self.shape = shape

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
    with pytest.raises(ValueError, match=r"names lacks parameters of the optimizer, of the shapes \(2, 2\), \(2,\)"):
        interop.from_pytorch(optimizer, Module({"2": head_w, "3": head_b}))
    with pytest.raises(ValueError, match="does not name its parameters: give names"):
        interop.from_pytorch(optimizer)


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
            ValueError, match=r"the 2 groups .* from_pytorch\(optimizer, model\), or a list of names in"
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
    assert averages(interop.from_pytorch(weights_then_biases, model)) == {"1": 1, "3": 2, "0": 3, "2": 4}
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


def test_a_buffer_of_a_group_without_momentum_stays_behind():
    """PyTorch keeps it when somebody sets the momentum to 0, and does not use it."""
    stale, used = np.full(2, 5.0), np.full(2, 7.0)
    entries = {0: entry(1.0, momentum_buffer=stale), 1: entry(2.0, momentum_buffer=used)}
    state = interop.from_pytorch(checkpoint([group([0]), group([1], momentum=0.9)], entries), ["a", "b"])
    assert {name: float(x[0]) for name, x in state.trace.items()} == {"a": 0, "b": 7}
    assert interop.from_pytorch(checkpoint([group([0, 1])], entries), ["a", "b"]).trace is None


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
    updates, _ = tx.update(params, carry_over(state, tx.init(params)), params)
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
    with pytest.raises(ValueError, match=r"f never stepped, .*give names as a mapping .*dict\(model.named_parameters"):
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
    with pytest.raises(
        ValueError, match=r"square_avg of b has shape \(2,\), the weight \(3, 2\): names are in another order"
    ):
        interop.from_pytorch(whole, dict(reversed(weights.items())))
    with pytest.raises(ValueError, match="have stepped; names has 3"):
        interop.from_pytorch(whole, {**weights, "c": np.ones(2)})
    # Where the checkpoint has the names, the order is the checkpoint's.
    named = checkpoint([group([0, 1], param_names=["a", "b"])], whole["state"])
    assert float(interop.from_pytorch(named, dict(reversed(weights.items()))).nu["b"][0, 0]) == 2
    assert list(interop.from_pytorch(named, {**weights, "c": np.ones(2)}).nu) == ["a", "b"]
    with pytest.raises(ValueError, match="which names contradicts"):
        interop.from_pytorch(named, {"a": np.ones(2)})


def test_names_may_be_a_generator():
    for names in ((name for name in "bac"), {"b": 0, "a": 0, "c": 0}.keys()):
        state = interop.from_pytorch(checkpoint(IN_GROUPS, ABC), names)
        assert {name: float(x[0]) for name, x in state.nu.items()} == {"b": 1, "a": 2, "c": 3}
    pairs = ((name, np.ones(2)) for name in "bac")  # as model.named_parameters()
    assert float(interop.from_pytorch(checkpoint([group([0, 1, 2])], ABC), pairs).nu["a"][0]) == 2
    with pytest.raises(ValueError, match="names='abc' is one string"):
        interop.from_pytorch(checkpoint(IN_GROUPS, ABC), "abc")
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


TORCH = {"foreach": None, "capturable": False, "maximize": False, "differentiable": False}
CLASSES = {
    "from_pytorch": (TORCH, np.float32(3)),
    "from_timm": ({"lr_in_momentum": True, "foreach": None}, np.float32(3)),
    "from_stable_baselines3": ({}, 3),
}


@pytest.mark.parametrize("reader", CLASSES)
@pytest.mark.parametrize("writer", CLASSES)
def test_the_class_that_wrote_the_checkpoint(writer, reader):
    options, step = CLASSES[writer]
    found = checkpoint([group([0], **options)], {0: {"step": step, "square_avg": np.ones(2)}})
    if reader == writer:
        assert getattr(interop, reader)(found, ["w"]).count == 3
        return
    with pytest.raises(ValueError, match=f"use {writer}"):
        getattr(interop, reader)(found, ["w"])
    # One group of the wrong class is enough.
    mine, own_step = CLASSES[reader]
    found = checkpoint(
        [group([0], **mine), group([1], **options)],
        {0: {"step": own_step, "square_avg": np.ones(2)}, 1: {"step": step, "square_avg": np.ones(2)}},
    )
    if "from_stable_baselines3" not in (reader, writer):
        with pytest.raises(ValueError, match=f"use {writer}. Group 1 has"):
            getattr(interop, reader)(found, ["w", "v"])


def test_groups_that_tell_nothing_about_their_class():
    silent = checkpoint([group([0])], {0: entry(1.0)})
    assert interop.from_pytorch(silent, ["w"]).count == interop.from_stable_baselines3(silent, ["w"]).count == 3
    with pytest.raises(ValueError, match="not timm's checkpoint: group 0 has no lr_in_momentum"):
        interop.from_timm(silent, ["w"])
    # An old PyTorch: marked as the error says, it is read.
    old = checkpoint([group([0])], {0: {"step": 3, "square_avg": np.ones(2)}})
    with pytest.raises(ValueError, match="use from_stable_baselines3 .*add foreach=None to its groups"):
        interop.from_pytorch(old, ["w"])
    assert interop.from_pytorch(checkpoint([group([0], foreach=None)], old["state"]), ["w"]).count == 3


def run_of_old_class(first, alpha, steps, scale, seed=0):
    """The average of a parameter with gradients of this scale, in float32, as RMSprop and RMSpropTFLike have it."""
    rng = np.random.default_rng(seed)
    nu = np.full(50, first, np.float32)
    grads = rng.normal(size=(steps, 50)).astype(np.float32) * np.float32(scale)
    grads[:, :5] = 0  # inputs that are always zero
    for g in grads:
        nu = np.float32(alpha) * nu + np.float32(1 - alpha) * g * g
    return checkpoint([group([0], alpha=alpha)], {0: {"step": steps, "square_avg": nu}})


OLD_RUNS = [
    (0.99, 1, 1e-3),
    (0.99, 30, 1.0),
    (0.99, 100, 1e-2),
    (0.9, 100, 1e-4),
    (0.999, 5000, 0.1),
    (0.99, 7000, 0.1),
]


@pytest.mark.parametrize(("alpha", "steps", "scale"), OLD_RUNS)
def test_averages_tell_an_old_pytorch_from_stable_baselines3(alpha, steps, scale):
    """Before 1.12 PyTorch's groups had the options of RMSpropTFLike's, whose averages start at 1."""
    old, tf_like = (run_of_old_class(first, alpha, steps, scale) for first in (0.0, 1.0))
    assert interop.from_pytorch(old, ["w"]).count == steps
    with pytest.raises(ValueError, match=r"this is torch.optim.RMSprop's checkpoint: use from_pytorch. Group 0 has"):
        interop.from_stable_baselines3(old, ["w"])
    assert interop.from_stable_baselines3(tf_like, ["w"]).count == steps
    with pytest.raises(ValueError, match=r"use from_stable_baselines3 .*add foreach=None to its groups"):
        interop.from_pytorch(tf_like, ["w"])


def test_where_averages_do_not_tell_both_classes_are_read():
    # What started at 1 has become zero in float32, or is far below averages of large gradients.
    zero = run_of_old_class(0.0, 0.9, 2000, 0.1)
    large = checkpoint([group([0])], {0: {"step": 1000, "square_avg": np.full(2, 4.0)}})
    empty = checkpoint([group([0])], {0: {"step": 3, "square_avg": np.zeros((0, 2))}})
    no_alpha = checkpoint(
        [{k: v for k, v in group([0]).items() if k != "alpha"}], {0: {"step": 3, "square_avg": np.zeros(2)}}
    )
    for silent in (zero, large, empty, no_alpha):
        for read in (interop.from_pytorch, interop.from_stable_baselines3):
            read(silent, ["w"])


def test_the_count_is_the_largest_step():
    entries = {0: {**entry(1.0), "step": np.float32(5)}, 1: {**entry(2.0), "step": np.float32(9)}, 2: entry(3.0)}
    assert interop.from_pytorch(checkpoint(IN_GROUPS, entries), ["b", "a", "c"]).count == 9
    without = {i: {"square_avg": np.ones(2)} for i in range(3)}
    with pytest.raises(ValueError, match="does not say how many updates were made"):
        interop.from_pytorch(checkpoint(IN_GROUPS, without), ["b", "a", "c"])


def test_slots_of_different_shapes():
    odd = checkpoint([group([0], momentum=0.9)], {0: entry(1.0, momentum_buffer=np.ones(3))})
    with pytest.raises(ValueError, match=r"the accumulators of w have different shapes: {'square_avg': \(2,\), 'mom"):
        interop.from_pytorch(odd, ["w"])


TORCH_FOREIGN = {
    "Adam": {"lr": 0.1, "betas": (0.9, 0.999), "params": [0]},
    "SGD": {"lr": 0.1, "momentum": 0.9, "dampening": 0, "nesterov": False, "params": [0]},
    "Adagrad": {"lr": 0.1, "lr_decay": 0, "params": [0]},
    "another optimizer": {"lr": 0.1, "params": [0]},
    "bitsandbytes": {"lr": 0.1, "betas": (0.99, 0), "eps": 1e-8, "weight_decay": 0, "params": [0]},
}


@pytest.mark.parametrize("kind", TORCH_FOREIGN)
def test_other_optimizers_of_pytorch_are_named(kind):
    slots = {"bitsandbytes": ["state1"], "Adam": ["exp_avg", "exp_avg_sq"], "SGD": ["momentum_buffer"]}.get(
        kind, ["sum"]
    )
    foreign = checkpoint([TORCH_FOREIGN[kind]], {0: {"step": 1} | {slot: np.ones(2) for slot in slots}})
    for read in (interop.from_pytorch, interop.from_timm, interop.from_stable_baselines3):
        with pytest.raises(ValueError, match=f"not the checkpoint of RMSprop, but of {kind}"):
            read(foreign, ["w"])


def test_one_group_of_another_optimizer_is_enough():
    mixed = checkpoint([group([0]), {**TORCH_FOREIGN["Adam"], "params": [1]}], {0: entry(1.0), 1: entry(1.0)})
    with pytest.raises(ValueError, match="not the checkpoint of RMSprop, but of Adam"):
        interop.from_pytorch(mixed, ["a", "b"])


def test_other_things_than_an_optimizer_s_state_dict():
    with pytest.raises(ValueError, match="not the state_dict of an optimizer, with state and param_groups: fc.weight"):
        interop.from_pytorch({"fc.weight": np.ones(2)}, ["fc.weight"])
    odd = checkpoint([group([0])], {0: {"step": 1, "exp_avg": np.ones(2)}})
    with pytest.raises(ValueError, match=r"but of Adam or one of its kin: it has exp_avg of w"):
        interop.from_pytorch(odd, ["w"])
    with pytest.raises(
        ValueError, match=r"convert asks for 'fc.weight'.*module.fc.weight.*strip prefixes as `module.`"
    ):
        interop.from_pytorch(checkpoint([group([0])], {0: entry(1.0)}), ["module.fc.weight"], lambda x: x["fc.weight"])


def torch_checkpoint(**options):
    return state_dict(case_name("torch", options or {"momentum": 0.9, "centered": True}))


def read(checkpoint, names=NAMES, convert=convert):
    return interop.from_pytorch(checkpoint, names, convert)


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
    for slots in no_mean["state"].values():
        del slots["grad_avg"]
    with pytest.raises(ValueError, match=r"lacks {'grad_avg': \['conv.weight', 'fc.bias', 'fc.weight'\]}"):
        read(no_mean)
    with pytest.raises(ValueError, match="but of one that keeps nothing, as SGD: it has no accumulators"):
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
    state = read(torch_checkpoint(), convert=forgot_to_transpose)
    tx = dialects.pytorch(0.1, centered=True, momentum=0.9)
    with pytest.raises(ValueError, match=r"\.nu\['fc'\]\['kernel'\] has shape \(3, 8\) in state and \(8, 3\) in like"):
        carry_over(state, tx.init(params))
    # Without it the first update tells.
    with pytest.raises(ValueError, match=r"gradient\['fc'\]\['kernel'\] has shape \(8, 3\), its nu \(3, 8\)"):
        tx.update(params, state)


def test_timm_is_not_pytorch():
    timm = state_dict("timm,momentum=0.9")
    with pytest.raises(
        ValueError, match="this is timm's checkpoint, whose momentum_buffer holds the learning rate: use from_timm"
    ):
        read(timm)
    with pytest.raises(ValueError, match="this is torch.optim.RMSprop's checkpoint: use from_pytorch"):
        interop.from_timm(torch_checkpoint(), NAMES, convert)


def test_complex_accumulators_say_how_they_are_split():
    complex_checkpoint = torch_checkpoint()
    complex_checkpoint["state"][2]["square_avg"] = np.ones(3, np.complex64)
    advice = r"complex accumulators: .*torch\.view_as_real.*`real` and `imaginary`.*split_real_and_imaginary\(tx\)"
    with pytest.raises(ValueError, match=advice):
        read(complex_checkpoint)
    state = rmsprop(0.1, momentum=0.9).init({"w": jnp.ones(2, jnp.complex64)})
    with pytest.raises(ValueError, match=advice):
        interop.to_keras(state, lambda tree: tree)


class Pair(NamedTuple):
    real: np.ndarray
    imaginary: np.ndarray


@pytest.mark.usefixtures("users_climate")
def test_complex_accumulators_that_were_split_go_on():
    """PyTorch's update of a complex parameter, in float64: each half has its own average."""
    parts = np.array([[0.01, 0.04], [0.09, 0.16]])  # as torch.view_as_real makes them
    entries = {0: {"step": np.float32(3), "square_avg": parts}}
    state = interop.from_pytorch(checkpoint([group([0])], entries), ["w"], lambda a: {"w": Pair(*a["w"].T)})
    tx = optax.contrib.split_real_and_imaginary(dialects.pytorch(0.1))
    params = {"w": jnp.ones(2, jnp.complex64)}
    updates, _ = tx.update({"w": jnp.array([1 + 2j, 3 - 4j])}, carry_over(state, tx.init(params)))
    g = np.array([[1.0, 2.0], [3.0, -4.0]])
    expected = -0.1 * g / (np.sqrt(0.99 * parts + 0.01 * g**2) + 1e-8)
    np.testing.assert_allclose(updates["w"], expected[:, 0] + 1j * expected[:, 1], rtol=1e-6)
