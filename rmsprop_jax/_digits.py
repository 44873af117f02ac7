"""The demo's data, batches and network: scikit-learn's handwritten digits and a small Flax convnet."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from sklearn.datasets import load_digits


__all__ = ["BATCH", "IMAGES", "TEST", "ConvNet", "Digits", "batches", "initial", "load"]


IMAGES = 1797
TEST = 360  # of them, a fifth
BATCH = 64


class Digits(NamedTuple):
    """Images of shape (n, 8, 8, 1) in [0, 1] and their labels of shape (n,)."""

    images: jax.Array
    labels: jax.Array


class ConvNet(nnx.Module):
    """Two convolutions and two dense layers: 38,282 parameters."""

    def __init__(self, rngs: nnx.Rngs):
        """Draws the initial weights from `rngs`."""
        self.conv1 = nnx.Conv(1, 16, (3, 3), rngs=rngs)
        self.conv2 = nnx.Conv(16, 32, (3, 3), rngs=rngs)
        self.dense1 = nnx.Linear(4 * 4 * 32, 64, rngs=rngs)
        self.dense2 = nnx.Linear(64, 10, rngs=rngs)

    def __call__(self, images: jax.Array) -> jax.Array:
        """From images (n, 8, 8, 1) to logits (n, 10)."""
        x = nnx.relu(self.conv1(images))
        x = nnx.max_pool(nnx.relu(self.conv2(x)), (2, 2), strides=(2, 2))
        x = nnx.relu(self.dense1(x.reshape(len(x), -1)))
        return self.dense2(x)


def initial(seed: int) -> tuple[Any, Any]:
    """The network's structure and its first parameters."""
    return nnx.split(ConvNet(nnx.Rngs(seed)), nnx.Param)


def load(seed: int) -> tuple[Digits, Digits]:
    """The digits, which scikit-learn's package includes, shuffled: a training set and a test set."""
    bunch: Any = load_digits()
    order = np.random.default_rng(seed).permutation(IMAGES)
    images = (bunch.images[order, :, :, None] / 16).astype(np.float32)
    labels = bunch.target[order].astype(np.int32)
    parts = (slice(TEST, None), slice(TEST))
    train, test = (Digits(jnp.asarray(images[part]), jnp.asarray(labels[part])) for part in parts)
    return train, test


def batches(n: int, epochs: int, seed: int) -> Iterator[np.ndarray]:
    """Indices of shape (BATCH,). Each example comes at most once per epoch."""
    rng = np.random.default_rng(seed)
    for _ in range(epochs):
        yield from rng.permutation(n)[: n - n % BATCH].reshape(-1, BATCH)
