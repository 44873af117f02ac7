"""Checkpoints that frameworks write here and now, in every form in which people keep them."""

import json
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from frameworks import is_here, StableBaselines3, Timm, Torch

from rmsprop_jax import carry_over, dialects, interop


pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore"), pytest.mark.usefixtures("users_climate")]


def where_it_is(name):
    """Leaves a test out where its framework is not installed."""
    return lambda test: test if is_here(name) else None


MOVING = {"lr": 3e-3, "alpha": 0.9, "eps": 1e-3, "momentum": 0.9, "centered": True}


class Pair(NamedTuple):
    real: np.ndarray
    imaginary: np.ndarray


def torch_model():
    import torch

    return torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 4), torch.nn.Linear(4, 2))


def torch_steps(model, optimizer, steps):
    import torch

    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.randn(16, 3)).square().mean().backward()
        optimizer.step()


@where_it_is("torch")
def test_torch_optimizers_as_people_save_them():
    import torch

    model = torch_model()
    optimizer = torch.optim.RMSprop(model.parameters(), **MOVING)
    torch_steps(model, optimizer, 5)
    expected = interop.from_pytorch(optimizer.state_dict(), dict(model.named_parameters()))
    assert expected.count == 5
    # Without state_dict: the keys are the parameters themselves, which need no order.
    raw = {"state": optimizer.state, "param_groups": optimizer.param_groups}
    shuffled = dict(reversed(list(model.named_parameters())))
    for names in (shuffled, model.named_parameters(), [name for name, _ in model.named_parameters()]):
        found = interop.from_pytorch(raw, names)
        jax.tree.map(np.testing.assert_array_equal, found, expected)
    # Through files: numbers become strings, or arrays.
    kept = json.loads(json.dumps(optimizer.state_dict(), default=lambda x: x.tolist()))
    found = interop.from_pytorch(kept, model.named_parameters())
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-6), found, expected)
    arrays = {**optimizer.state_dict(), "param_groups": [{**optimizer.state_dict()["param_groups"][0]}]}
    arrays["param_groups"][0]["params"] = torch.arange(6)
    jax.tree.map(np.testing.assert_array_equal, interop.from_pytorch(arrays, model.named_parameters()), expected)


@where_it_is("torch")
@pytest.mark.parametrize("flat", [False, True])
def test_torch_distributed_state_dicts(flat):
    import torch
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, StateDictOptions

    model = torch_model()
    model[2].weight.requires_grad_(False)
    optimizer = torch.optim.RMSprop(
        [{"params": model[3].parameters(), "momentum": 0.5}, {"params": model[:3].parameters()}], **MOVING
    )
    torch_steps(model, optimizer, 5)
    kept = get_optimizer_state_dict(model, optimizer, options=StateDictOptions(flatten_optimizer_state_dict=flat))
    weights = dict(model.named_parameters())
    state = interop.from_pytorch(kept, weights)
    assert state.count == 5
    for name, p in weights.items():
        if name != "2.weight":
            np.testing.assert_allclose(state.trace[name], optimizer.state[p]["momentum_buffer"].numpy(), rtol=1e-6)
    assert (state.nu["2.weight"] == 0).all()


@where_it_is("torch")
@pytest.mark.parametrize("options", [{}, {"momentum": 0.9, "centered": True}], ids=str)
def test_torch_complex_parameters(options):
    """As the error says: view_as_real before, split_real_and_imaginary behind."""
    import torch

    def gradient(t):
        rng = np.random.default_rng(t)
        return (rng.normal(size=3) + 1j * rng.normal(size=3)).astype(np.complex64)

    p = torch.nn.Parameter(torch.ones(3, dtype=torch.complex64))
    optimizer = torch.optim.RMSprop([p], lr=0.1, **options)

    def steps(first, last):
        for t in range(first, last):
            p.grad = torch.from_numpy(gradient(t))
            optimizer.step()

    steps(0, 10)
    kept = optimizer.state_dict()
    with pytest.raises(ValueError, match="view_as_real"):
        interop.from_pytorch(kept, ["w"])
    entry = {k: torch.view_as_real(x) if x.is_complex() else x for k, x in kept["state"][0].items()}
    state = interop.from_pytorch({**kept, "state": {0: entry}}, ["w"], lambda a: {"w": Pair(*a["w"].T)})
    tx = optax.contrib.split_real_and_imaginary(dialects.pytorch(0.1, **options))
    params = {"w": jnp.asarray(p.detach().numpy())}
    state = carry_over(state, tx.init(params))
    steps(10, 30)
    for t in range(10, 30):
        updates, state = tx.update({"w": jnp.asarray(gradient(t))}, state, params)
        params = optax.apply_updates(params, updates)
    np.testing.assert_allclose(params["w"], p.detach().numpy(), rtol=1e-5)


@where_it_is("stable-baselines3")
def test_classes_tell_each_other_apart():
    import torch

    classes = {
        "from_pytorch": Torch.optimizer_class(),
        "from_timm": Timm.optimizer_class(),
        "from_stable_baselines3": StableBaselines3.optimizer_class(),
    }
    for writer, make in classes.items():
        p = torch.nn.Parameter(torch.ones(3))
        optimizer = make([p], lr=0.1)
        p.grad = torch.ones_like(p)
        optimizer.step()
        for reader in classes:
            if reader == writer:
                assert getattr(interop, reader)(optimizer.state_dict(), ["w"]).count == 1
                continue
            with pytest.raises(ValueError, match=f"use {writer}"):
                getattr(interop, reader)(optimizer.state_dict(), ["w"])


@where_it_is("tf-keras")
def test_keras_files_that_are_sorted(tmp_path, subtests):
    """h5py gives groups in groups, and names in alphabetical order."""
    import h5py
    import keras
    import tf_keras

    options = {"learning_rate": 0.01, "momentum": 0.9, "epsilon": 1e-3}
    for module, optimizers in (
        (tf_keras, tf_keras.optimizers.legacy),
        (tf_keras, tf_keras.optimizers),
        (keras, keras.optimizers),
    ):
        for centered in (False, True):
            with subtests.test(f"{optimizers.__name__}, centered={centered}"):
                optimizer = optimizers.RMSprop(**options, centered=centered)
                model = module.Sequential([module.layers.Input((3,)), module.layers.Dense(2, name="d")])
                model.compile(optimizer, "mse")
                model.fit(np.ones((4, 3)), np.ones((4, 2)), epochs=3, verbose=0)
                variables = optimizer.variables() if callable(optimizer.variables) else optimizer.variables
                state = interop.from_keras([(getattr(v, "path", v.name), v.numpy()) for v in variables])
                assert state.count == 3
                model.save(tmp_path / "model.h5")
                with h5py.File(tmp_path / "model.h5") as file:
                    for found in (file["optimizer_weights"], {"optimizer_weights": file["optimizer_weights"]}):
                        jax.tree.map(np.testing.assert_array_equal, interop.from_keras(found), state)
        with subtests.test(f"{optimizers.__name__}, Adam"):
            model.compile(optimizers.Adam(0.01), "mse")
            model.fit(np.ones((4, 3)), np.ones((4, 2)), epochs=3, verbose=0)
            model.save(tmp_path / "adam.h5")
            with (
                h5py.File(tmp_path / "adam.h5") as file,
                pytest.raises(ValueError, match="not the variables of Keras' RMSprop, but of adam"),
            ):
                interop.from_keras(file["optimizer_weights"])


@where_it_is("torch")
def test_blocks_of_bitsandbytes_in_tensors():
    import torch
    from test_interop_bitsandbytes import HIDDEN, NAMES, state_dict

    tensors = state_dict()
    for entry in tensors["state"].values():
        entry[HIDDEN] = {k: torch.from_numpy(x.copy()) for k, x in entry[HIDDEN].items()}
    expected = interop.from_bitsandbytes(state_dict(), NAMES)
    jax.tree.map(np.testing.assert_array_equal, interop.from_bitsandbytes(tensors, NAMES), expected)
