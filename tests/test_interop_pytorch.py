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
    with pytest.raises(ValueError, match=r"lacks {'square_avg': \['a'\]}"):
        interop.from_pytorch(checkpoint(groups, no_average), ["a", "b", "c"])
    del entries[1]["momentum_buffer"]
    with pytest.raises(ValueError, match=r"lacks {'momentum_buffer': \['b'\]}"):
        interop.from_pytorch(checkpoint(groups, entries), ["a", "b", "c"])


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
    with pytest.raises(ValueError, match="use from_pytorch. Group 0 has"):
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


def test_each_group_is_judged_by_its_own_averages():
    both = [run_of_old_class(first, 0.99, 30, 1.0)["state"][0] for first in (0.0, 1.0)]
    found = checkpoint([group([0]), group([1])], dict(enumerate(both)))
    with pytest.raises(ValueError, match=r"use from_stable_baselines3.* Group 1 has"):
        interop.from_pytorch(found, ["a", "b"])
    with pytest.raises(ValueError, match=r"use from_pytorch. Group 0 has"):
        interop.from_stable_baselines3(found, ["a", "b"])


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


def test_slots_of_another_optimizer_in_groups_of_rmsprop():
    odd = checkpoint([group([0])], {0: {"step": 1, "exp_avg": np.ones(2)}})
    with pytest.raises(ValueError, match=r"but of Adam or a variant of it: it has exp_avg of w"):
        interop.from_pytorch(odd, ["w"])


def torch_checkpoint(**options):
    return state_dict(case_name("torch", options or {"momentum": 0.9, "centered": True}))


def read(checkpoint, names=NAMES, convert=convert):
    return interop.from_pytorch(checkpoint, names, convert)


def test_transposed_shapes():
    def forgot_to_transpose(arrays):
        return {**convert(arrays), "fc": {"kernel": arrays["fc.weight"], "bias": arrays["fc.bias"]}}

    params = convert(ORIGIN)
    state = read(torch_checkpoint(), convert=forgot_to_transpose)
    tx = dialects.pytorch(0.1, centered=True, momentum=0.9)
    with pytest.raises(
        ValueError, match=r"\.nu\['fc'\]\['kernel'\] has shape \(3, 8\) in state and \(8, 3\) in `into`"
    ):
        carry_over(state, tx.init(params))
    # Without it the first update tells.
    with pytest.raises(
        ValueError, match=r"gradient\['fc'\]\['kernel'\] has shape \(8, 3\), but its state\.nu has \(3, 8\)"
    ):
        tx.update(params, state)


def test_complex_accumulators_say_how_they_are_split():
    complex_checkpoint = torch_checkpoint()
    complex_checkpoint["state"][2]["square_avg"] = np.ones(3, np.complex64)
    advice = r"is complex: .*torch\.view_as_real.*`real` and `imaginary`.*split_real_and_imaginary\(tx\)"
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
