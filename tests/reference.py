"""RMSProp in float64 NumPy, as the papers and frameworks write it: slow, obvious, and written without a look at ours.

The variance is E[g²] - |E[g]|², the form of every framework; ours is another one.
"""

import numpy as np


def rmsprop(
    grads,
    params,
    steps,
    learning_rate,
    decay=0.9,
    eps=1e-8,
    initial_scale=0.0,
    eps_in_sqrt=True,
    centered=False,
    momentum=None,
    nesterov=False,
    bias_correction=False,
    *,
    lr_in_momentum=True,
    weight_decay=None,
    decoupled=True,
):
    """The parameters after each of `steps` updates; `grads(p, t)` is the gradient, t counts from 0."""
    wide = np.complex128 if np.iscomplexobj(params) else np.float64
    p = np.asarray(params, wide)
    second = np.full(p.shape, float(initial_scale))
    first = np.zeros(p.shape, wide)
    buffer = np.zeros(p.shape, wide)
    trajectory = []
    for t in range(steps):
        lr = learning_rate(t) if callable(learning_rate) else learning_rate
        g = np.asarray(grads(p, t), wide)
        if weight_decay and not decoupled:
            g = g + weight_decay * p
        second = decay * second + (1 - decay) * np.abs(g) ** 2
        first = decay * first + (1 - decay) * g
        mean_square = second / (1 - decay ** (t + 1)) if bias_correction else second
        # The mean of the centered form starts from zero and is not corrected.
        denominator = mean_square - np.abs(first) ** 2 if centered else mean_square
        root = np.sqrt(denominator + eps) if eps_in_sqrt else np.sqrt(denominator) + eps
        u = g / root
        if momentum is None:
            step = lr * u
        elif lr_in_momentum:
            buffer = momentum * buffer + lr * u
            step = momentum * buffer + lr * u if nesterov else buffer
        else:
            buffer = momentum * buffer + u
            step = lr * (momentum * buffer + u) if nesterov else lr * buffer
        if weight_decay and decoupled:
            step = step + lr * weight_decay * p
        p = p - step
        trajectory.append(p)
    return np.stack(trajectory)
