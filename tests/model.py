"""A small model in PyTorch's layout and in Flax's: a convolution and a dense layer, so that converting transposes."""

import numpy as np


Arrays = dict[str, np.ndarray]

SHAPES = {"conv.weight": (4, 2, 3, 3), "fc.weight": (3, 8), "fc.bias": (3,)}
NAMES = list(SHAPES)
STOP, END = 100, 200  # where a run is interrupted, and where it ends

_rng = np.random.default_rng(1)
ORIGIN = {k: _rng.normal(size=s).astype(np.float32) for k, s in SHAPES.items()}
_TARGET = {k: _rng.normal(size=s).astype(np.float32) for k, s in SHAPES.items()}
_CURVATURE = {k: np.logspace(-1, 1, int(np.prod(s))).astype(np.float32).reshape(s) for k, s in SHAPES.items()}
_NOISE = {k: (0.3 * _CURVATURE[k] * _rng.normal(size=(END, *s))).astype(np.float32) for k, s in SHAPES.items()}


def grads(params: Arrays, t: int) -> Arrays:
    """The gradients at step t."""
    return {k: _CURVATURE[k] * (params[k] - _TARGET[k]) + _NOISE[k][t] for k in SHAPES}


def convert(arrays):
    """To Flax: convolutions are (height, width, in, out), dense kernels (in, out)."""
    named = {k.replace("_", "."): v for k, v in arrays.items()}
    return {
        "conv": {"kernel": named["conv.weight"].transpose(2, 3, 1, 0)},
        "fc": {"kernel": named["fc.weight"].T, "bias": named["fc.bias"]},
    }


def convert_back(tree):
    return {
        "conv.weight": np.asarray(tree["conv"]["kernel"]).transpose(3, 2, 0, 1),
        "fc.weight": np.asarray(tree["fc"]["kernel"]).T,
        "fc.bias": np.asarray(tree["fc"]["bias"]),
    }


def with_underscores(tree):
    return {k.replace(".", "_"): v for k, v in convert_back(tree).items()}


def difference(a: Arrays, b: Arrays) -> float:
    """The largest difference, relative to the largest distance from the start."""
    return max(np.abs(a[k] - b[k]).max() for k in SHAPES) / max(np.abs(b[k] - ORIGIN[k]).max() for k in SHAPES)
