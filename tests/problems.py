"""A problem whose gradient depends on the parameters, so that an error feeds back, at many scales; and the digits."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax


N = 64
STEPS = 200

_rng = np.random.default_rng(0)
_curvature = np.logspace(-2, 2, N)
_target = _rng.normal(size=N)
_noise = 0.3 * _curvature * _rng.normal(size=(STEPS, N))
START = _rng.normal(size=N).astype(np.float32)


def grads(p, t):
    """Gradient at step t: for NumPy in float64 and for JAX, for real and complex parameters."""
    xp = np if isinstance(p, np.ndarray) else jax.numpy
    curvature, target, noise = (xp.asarray(x, p.dtype) for x in (_curvature, _target, _noise))
    return curvature * (p - target) + noise[t]


def trajectory(tx, start=START, steps=STEPS, grads=grads):
    """The parameters, an array or a tree, after each step of an Optax transformation, in one compiled scan."""
    return jax.tree.map(np.asarray, scanned(tx, steps, grads, jax.tree.map(jnp.asarray, start)))


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def scanned(tx, steps, grads, params):
    def step(carry, t):
        params, state = carry
        updates, state = tx.update(grads(params, t), state, params)
        params = optax.apply_updates(params, updates)
        return (params, state), params

    return jax.lax.scan(step, (params, tx.init(params)), jnp.arange(steps))[1]


def distance(ours, theirs, start=START):
    """Largest difference over a trajectory, relative to how far it went from the start."""
    return np.abs(ours - theirs).max() / np.abs(theirs - start).max()


def train_digits(tx, steps, hidden=64, dtype=jnp.float32, scale=1.0):
    """The last losses of three seeds of a network of two layers, which computes in float32, on scikit-learn's digits."""
    from sklearn.datasets import load_digits

    bunch, rng = load_digits(), np.random.default_rng(0)
    w, v = rng.normal(size=(3, 64, hidden)) / 8, rng.normal(size=(3, hidden, 10)) / hidden**0.5
    params = jax.tree.map(lambda p: p.astype(dtype), {"w": w, "b": np.zeros((3, hidden)), "v": v})
    batches = rng.integers(len(bunch.target), size=(3, steps, 64))
    return np.asarray(losses(tx, scale, np.float32(bunch.data / 16), np.int32(bunch.target), params, batches))


@functools.partial(jax.jit, static_argnums=0)
def losses(tx, scale, images, labels, params, batches):
    def loss(params, images, labels):
        params = jax.tree.map(lambda p: p.astype(jnp.float32), params)
        logits = jax.nn.relu(images @ params["w"] + params["b"][None]) @ params["v"]
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    def run(params, batches):
        def step(carry, index):
            params, state = carry
            grads = jax.grad(lambda p: scale * loss(p, images[index], labels[index]))(params)
            updates, state = tx.update(grads, state, params)
            return (optax.apply_updates(params, updates), state), None

        (params, _), _ = jax.lax.scan(step, (params, tx.init(params)), batches)
        return loss(params, images, labels)

    return jax.vmap(run)(params, batches)
