"""Transformations made with the same arguments are equal, and nothing keeps them or their arguments alive."""

import concurrent.futures
import copy
import gc
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import ALIKE

from rmsprop_jax import dialects, rmsprop, round_params_stochastically, scale_by_rms


@pytest.mark.parametrize("make", ALIKE.values(), ids=ALIKE)
def test_transformations_made_with_the_same_arguments_are_equal(make):
    first = make()
    assert first == make()
    assert hash(first) == hash(make())
    assert first == copy.deepcopy(first)
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        assert set(pool.map(lambda _: make(), range(32))) == {first}


def test_spellings_of_one_call_are_equal():
    assert rmsprop(1e-3) == rmsprop(learning_rate=1e-3, decay=0.9, nesterov=False)
    assert rmsprop(1e-3, nesterov=np.False_) == rmsprop(1e-3)
    assert rmsprop(1e-3, state_dtype="uint8") == rmsprop(1e-3, state_dtype=jnp.uint8)
    assert dialects.pytorch(1e-3) == dialects.pytorch(learning_rate=1e-3)


def test_other_arguments_make_another_transformation():
    made = [
        *(rmsprop(rate) for rate in (1, 1.0, np.float32(1), 0.0, -0.0, lambda count: 1.0)),
        *(rmsprop(1.0, decay=decay) for decay in (1, 1.0, 0)),
        rmsprop(1.0, initial_scale=0),
        rmsprop(1.0, weight_decay=0.1),
        rmsprop(1.0, weight_decay=0.1, weight_decay_mask=(True,)),
        rmsprop(1.0, state_dtype=jnp.uint8),
        rmsprop(-2.0),
        scale_by_rms(),
        round_params_stochastically(),
        round_params_stochastically(True),
        dialects.mlx(1e-2),
        dialects.pytorch(1e-2),
    ]
    assert len(set(made)) == len(made)
    assert made[0] != "rmsprop"
    assert made[0].init != made[0].update


def test_a_transformation_with_an_argument_that_cannot_be_hashed_equals_itself_alone():
    for argument in (jnp.float32(0.1), np.array(0.1)):
        assert rmsprop(argument) != rmsprop(argument)
    made = [rmsprop(0.1, weight_decay=0.1, weight_decay_mask={"w": True}) for _ in range(2)]
    assert made[0] == made[0]
    assert made[0] != made[1]


def test_a_transformation_can_be_a_static_argument():
    tx, g = rmsprop(0.1), jnp.ones((3, 2))
    step = jax.jit(lambda tx, g: tx.update(g, tx.init(g))[0], static_argnums=0)
    np.testing.assert_allclose(step(tx, g), -0.1 / np.sqrt(0.1), rtol=1e-6)


class Trainer:
    """Holds a transformation that holds the trainer, in one of the ways in which people write it."""

    rate = 0.1

    def __init__(self, way):
        arguments = {
            "schedule": lambda: {"learning_rate": self.schedule},
            "closure": lambda: {"learning_rate": lambda count: self.rate},
            "decay": lambda: {"learning_rate": 0.1, "weight_decay": self.schedule},
            "mask": lambda: {"learning_rate": 0.1, "weight_decay": 0.1, "weight_decay_mask": self.mask},
        }[way]()
        make = dialects.pytorch if way == "closure" else rmsprop
        self.tx = optax.chain(make(**arguments), round_params_stochastically())
        params = {"w": jnp.ones(2)}
        self.tx.update(params, self.tx.init(params), params)

    def schedule(self, count):
        return self.rate

    def mask(self, params):
        return jax.tree.map(lambda _: True, params)


@pytest.mark.parametrize("way", ["schedule", "closure", "decay", "mask"])
def test_a_trainer_is_freed_with_its_transformation(way):
    gone = [weakref.ref(Trainer(way)) for _ in range(50)]
    gc.collect()
    assert [ref for ref in gone if ref() is not None] == []


def test_a_schedule_may_hold_a_tracer():
    with jax.checking_leaks():
        jax.jit(lambda x: rmsprop(lambda _: x).update(jnp.ones(2), rmsprop(1.0).init(jnp.ones(2)))[0])(0.1)
