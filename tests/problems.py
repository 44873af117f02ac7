"""A problem whose gradient depends on the parameters, so that an error feeds back, at many scales."""

import jax
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
    """The parameters after each step of an Optax transformation, in one compiled scan."""
    params = jax.numpy.asarray(start)

    def step(carry, t):
        params, state = carry
        updates, state = tx.update(grads(params, t), state, params)
        params = optax.apply_updates(params, updates)
        return (params, state), params

    return np.asarray(jax.jit(lambda p: jax.lax.scan(step, (p, tx.init(p)), jax.numpy.arange(steps))[1])(params))


def distance(ours, theirs, start=START):
    """Largest difference over a trajectory, relative to how far it went from the start."""
    return np.abs(ours - theirs).max() / np.abs(theirs - start).max()
