"""Optimizers of other libraries that are a call of a dialect: a float64 transcription of each, from its source."""

import functools
from collections import defaultdict

import jax.numpy as jnp
import numpy as np
import pytest
from frameworks import CONSTANT, RATES
from problems import distance, grads, START, trajectory

from rmsprop_jax import dialects, rmsprop


STEPS = 100


# Each takes a parameter, its gradient, its state (whatever is not set yet is 0), the learning rate and the options.


def burn(p, g, s, lr, alpha=0.99, momentum=0.9, epsilon=1e-5, centered=False, weight_decay=0.0):
    """tracel-ai/burn 02c972d: crates/burn-core/src/optim/rmsprop.rs."""
    g = g + weight_decay * p
    s["square_avg"] = s["square_avg"] * alpha + g**2 * (1 - alpha)
    avg = s["square_avg"]
    if centered:
        s["grad_avg"] = s["grad_avg"] * alpha + g * (1 - alpha)
        avg = avg - s["grad_avg"] ** 2
    g = g / (np.sqrt(avg) + epsilon)
    if momentum > 0:
        g = s["buf"] = s["buf"] * momentum + g
    return p - g * lr


def dfdx(p, g, s, lr, alpha=0.9, eps=1e-8, momentum=None, centered=False):
    """coreylowman/dfdx 0a77c5f: src/optim/rmsprop.rs."""
    square_avg = s.get("square_avg", 1.0)
    square_avg = s["square_avg"] = square_avg + (1 - alpha) * (g * g - square_avg)
    if centered:
        s["grad_avg"] += (1 - alpha) * (g - s["grad_avg"])
        square_avg = square_avg - s["grad_avg"] ** 2
    g = g / np.sqrt(square_avg + eps)
    if momentum is not None:
        g = s["momentum"] = s["momentum"] * momentum + g
    return p - g * lr


def oneflow(p, g, s, lr, alpha=0.99, eps=1e-8, weight_decay=0.0, centered=False):
    """Oneflow-Inc/oneflow 0370e79: python/oneflow/nn/optimizer/rmsprop.py, and its kernel. It refuses a momentum."""
    g = g + weight_decay * p
    mean_square = s["mean_square"] = (1 - alpha) * g * g + alpha * s["mean_square"]
    if centered:
        s["mean_gradient"] = (1 - alpha) * g + alpha * s["mean_gradient"]
        mean_square = mean_square - s["mean_gradient"] ** 2
    return p - lr * g / np.sqrt(mean_square + eps)


def nnabla(p, g, s, lr, decay=0.9, eps=1e-8):
    """sony/nnabla 0bbdae2: src/nbla/solver/generic/rmsprop.cpp."""
    s["v"] = s["v"] * decay + g * g * (1 - decay)
    return p - lr / (np.sqrt(s["v"]) + eps) * g


def tensorflow_federated(p, g, s, lr, decay=0.9, epsilon=1e-7):
    """google-parfait/tensorflow-federated 009f4c6: python/learning/optimizers/rmsprop.py."""
    s["preconditioner"] += (g**2 - s["preconditioner"]) * (1 - decay)
    return p - lr * g / (np.sqrt(s["preconditioner"]) + epsilon)


def mxnet(p, g, s, lr, rho=0.9, momentum=0.9, epsilon=1e-8, centered=False, wd=0.0, version=2):
    """apache/mxnet 29e946a: python/mxnet/optimizer/rmsprop.py. Version 1 has ε inside the root in both forms."""
    g = g + wd * p
    s["var"] = s["var"] * rho + (1 - rho) * g**2
    if not centered:
        return p - lr * g / (np.sqrt(s["var"]) + epsilon if version == 2 else np.sqrt(s["var"] + epsilon))
    s["mean"] = s["mean"] * rho + (1 - rho) * g
    s["mom"] = s["mom"] * momentum - lr * g / np.sqrt(s["var"] - s["mean"] ** 2 + epsilon)
    return p + s["mom"]


def ascend(p, g, s, lr, alpha=0.9, eps=1e-10, weight_decay=0.0, momentum=0.0, centered=False, lr_in_momentum=True):
    """apex/optimizers/npu_fused_rmsprop_tf.py of Ascend's PyTorch."""
    square_avg = s.get("square_avg", 1.0)
    g = g + weight_decay * p
    avg = s["square_avg"] = square_avg + (1 - alpha) * (g**2 - square_avg)
    if centered:
        s["grad_avg"] += (1 - alpha) * (g - s["grad_avg"])
        avg = avg - s["grad_avg"] ** 2
    u = g / np.sqrt(avg + eps)
    if momentum > 0:
        s["buf"] = s["buf"] * momentum + (lr * u if lr_in_momentum else u)
        return p - (s["buf"] if lr_in_momentum else lr * s["buf"])
    return p - lr * u


def laprop(p, g, s, lr, betas=(0.9, 0.999), eps=1e-15):
    """Z-T-WANG/LaProp-Optimizer 9373f13: laprop.py, whose average holds the learning rate."""
    s["exp_avg_sq"] = s["exp_avg_sq"] * betas[1] + (1 - betas[1]) * g * g
    s["exp_avg_lr_1"] = s["exp_avg_lr_1"] * betas[0] + (1 - betas[0]) * lr
    s["exp_avg_lr_2"] = s["exp_avg_lr_2"] * betas[1] + (1 - betas[1])
    denom = np.sqrt(s["exp_avg_sq"] / s["exp_avg_lr_2"]) + eps
    s["exp_avg"] = s["exp_avg"] * betas[0] + (1 - betas[0]) * lr * g / denom
    return p - s["exp_avg"] / (s["exp_avg_lr_1"] / lr)


def fastai(p, g, s, lr, sqr_mom=0.99, mom=0.0, eps=1e-8):
    """fastai/fastai 0a20fa1: fastai/optimizer.py. The momentum is one of gradients, before the division."""
    s["grad_avg"] = s["grad_avg"] * mom + g
    s["sqr_avg"] = s["sqr_avg"] * sqr_mom + (1 - sqr_mom) * g * g
    return p - lr * s["grad_avg"] / (np.sqrt(s["sqr_avg"]) + eps)


def run(step, rates, options):
    p, state = START.astype(np.float64), defaultdict(float)
    for t, lr in enumerate(rates[:STEPS].astype(np.float64)):
        p = step(p, grads(p, t), state, lr, **options)
        yield p


MOMENTUM, CENTERED, DECAY, EPS = {"momentum": 0.9}, {"centered": True}, {"weight_decay": 0.1}, {"eps": 1e-3}
SAME = {  # the relative, its options, and the call
    "Burn": (burn, {}, dialects.pytorch, {"momentum": 0.9, "eps": 1e-5}),
    "Burn, all": (burn, {**CENTERED, **DECAY, "epsilon": 1e-3}, dialects.pytorch, MOMENTUM | CENTERED | DECAY | EPS),
    "dfdx": (dfdx, {}, dialects.stable_baselines3, {"alpha": 0.9}),
    "dfdx, all": (
        dfdx,
        MOMENTUM | CENTERED | EPS,
        dialects.stable_baselines3,
        {"alpha": 0.9} | MOMENTUM | CENTERED | EPS,
    ),
    "OneFlow": (oneflow, {}, dialects.pfrl, {}),
    "OneFlow, all": (oneflow, CENTERED | DECAY | EPS, dialects.pfrl, CENTERED | DECAY | EPS),
    "nnabla": (nnabla, {}, dialects.pytorch, {"alpha": 0.9}),
    "TensorFlow Federated": (tensorflow_federated, {}, dialects.tf_keras, {}),
    "MXNet 2": (mxnet, {"wd": 0.1}, dialects.pytorch, {"alpha": 0.9, **DECAY}),
    "MXNet 1": (mxnet, {"version": 1}, dialects.sonnet, {"epsilon": 1e-8}),
    "MXNet, centered": (mxnet, CENTERED | {"epsilon": 1e-3}, dialects.sonnet, MOMENTUM | CENTERED | {"epsilon": 1e-3}),
    "Ascend": (ascend, {}, dialects.timm, {}),
    "Ascend, all": (ascend, MOMENTUM | CENTERED | DECAY | EPS, dialects.timm, MOMENTUM | CENTERED | DECAY | EPS),
    "Ascend, lr outside": (
        ascend,
        {**MOMENTUM, "lr_in_momentum": False},
        dialects.timm,
        {**MOMENTUM, "lr_in_momentum": False},
    ),
    "fastai": (fastai, {}, dialects.pytorch, {}),
}


@pytest.mark.slow
@pytest.mark.parametrize("rates", [CONSTANT, RATES], ids=["constant", "schedule"])
@pytest.mark.parametrize("name", SAME)
def test_it_is_the_same_rule(name, rates):
    relative, theirs, dialect, ours = SAME[name]
    tx = dialect(lambda count: jnp.asarray(rates)[count], **ours)
    expected = np.stack(list(run(relative, rates, theirs)))
    assert distance(trajectory(tx, steps=STEPS), expected) < 1e-5


def test_laprop_is_dreamer_at_a_constant_learning_rate():
    make = functools.partial(dialects.dreamer, agc=0, warmup=0, eps=1e-15)
    expected = np.stack(list(run(laprop, CONSTANT, {})))
    assert distance(trajectory(make(3e-3), steps=STEPS), expected) < 1e-5
    scheduled = np.stack(list(run(laprop, RATES, {})))
    assert distance(trajectory(make(lambda count: jnp.asarray(RATES)[count]), steps=STEPS), scheduled) > 0.01


def test_fastai_with_momentum_is_another_rule():
    expected = np.stack(list(run(fastai, CONSTANT, {"mom": 0.9})))
    for tx in (
        dialects.pytorch(3e-3, momentum=0.9),
        rmsprop(3e-3, 0.99, momentum=0.9),
        dialects.timm(3e-3, momentum=0.9),
    ):
        assert distance(trajectory(tx, steps=STEPS), expected) > 0.1
