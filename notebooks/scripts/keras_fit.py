"""Any Optax optimizer in Keras 3's model.fit, on the JAX backend.

pip install "keras>=3.15"
KERAS_BACKEND=jax python keras_fit.py
"""

# --- The adapter -----------------------------------------------------------
import os


os.environ.setdefault("KERAS_BACKEND", "jax")

import jax
import keras
import numpy as np
import optax


class Optax(keras.optimizers.Optimizer):
    """Its variables are the leaves of the state of an Optax optimizer."""

    def __init__(self, tx, name="optax"):
        super().__init__(learning_rate=0.0, name=name)  # tx has its own
        self.tx = tx

    def build(self, variables):
        if not self.built:
            super().build(variables)
            state = self.tx.init([v.value for v in variables])
            leaves, self.structure = jax.tree.flatten(state)
            self.leaves = [self.variable(i, x) for i, x in enumerate(leaves)]

    def variable(self, i, x):
        kept = keras.Variable(
            np.asarray(x), dtype=str(x.dtype), trainable=False, name=f"leaf{i}"
        )
        self._track_variable(kept)
        return kept

    def apply(self, grads, trainable_variables=None):
        variables = trainable_variables or self._trainable_variables
        self.build(variables)
        params = [v.value for v in variables]
        state = jax.tree.unflatten(
            self.structure, [v.value for v in self.leaves]
        )
        updates, state = self.tx.update(list(grads), state, params)
        new = [*optax.apply_updates(params, updates), *jax.tree.leaves(state)]
        for kept, x in zip([*variables, *self.leaves], new, strict=True):
            kept.assign(x)
        self._iterations.assign_add(1)


# --- Training --------------------------------------------------------------
import jax.numpy as jnp
from rmsprop_jax import dialects


def make_model(optimizer):
    keras.utils.set_random_seed(0)
    layers = [keras.Input((8,)), keras.layers.Dense(16, activation="tanh")]
    model = keras.Sequential([*layers, keras.layers.Dense(1)])
    model.compile(optimizer=optimizer, loss="mse")
    model.optimizer.build(model.trainable_variables)
    return model


def fit(model):
    x = np.random.default_rng(0).normal(size=(256, 8)).astype(np.float32)
    y = 2 * x[:, :1] - x[:, 1:2]
    model.fit(x, y, epochs=3, batch_size=32, shuffle=False, verbose=0)
    return model


rule = dialects.keras(1e-2, momentum=0.9)
narrow = dialects.keras(1e-2, momentum=0.9, state_dtype=jnp.uint8)
theirs = fit(make_model(keras.optimizers.RMSprop(1e-2, momentum=0.9)))
ours = fit(make_model(Optax(rule)))
small = fit(make_model(Optax(narrow)))


def apart(a, b):
    pairs = zip(a.get_weights(), b.get_weights(), strict=True)
    return max(float(np.abs(x - y).max()) for x, y in pairs)


print("apart:", apart(theirs, ours))  # 4e-7
print({v.dtype for v in small.optimizer.variables})

# --- Saved and loaded ------------------------------------------------------
ours.save_weights("ours.weights.h5")  # the optimizer's variables, too
loaded = make_model(Optax(rule))
loaded.load_weights("ours.weights.h5")
print("apart:", apart(fit(loaded), fit(ours)))  # 0.0
