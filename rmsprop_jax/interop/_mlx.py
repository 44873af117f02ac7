"""MLX: an optimizer's state, flattened to arrays by path."""

from collections.abc import Mapping
from typing import Any

import jax

from .._rmsprop import RMSPropState
from .._text import listed
from ._arrays import mapping
from ._named import Convert, Entry, Optimizer, state_of


__all__ = ["from_mlx"]

RMSPROP = Optimizer("MLX's RMSprop", {"nu": "v"}, others={"u": "AdaDelta", "m": "Adam, a variant of it, or Lion"})


def from_mlx(
    checkpoint: Mapping[str, Any], convert: Convert | None = None, *, count: int | None = None
) -> RMSPropState:
    """The state of `dialects.mlx` from an optimizer's flattened state, as safetensors files have it::

        mx.save_safetensors("optimizer.safetensors", dict(mlx.utils.tree_flatten(optimizer.state)))
        checkpoint = mx.load("optimizer.safetensors")  # or safetensors.numpy.load_file

    SGD and Adagrad keep one array under the same name. SGD's is refused for its sign. Nothing in the file tells
    Adagrad's from RMSprop's: make sure that it is RMSprop's.

    Args:
        checkpoint: arrays by name: `layers.0.weight.v`, with `step` and `learning_rate`. The optimizer may be part of
            a larger tree, `{"model": ..., "optimizer": ...}`.
        convert: from arrays by name (`"layers.0.weight"`) to a tree of parameters.
        count: of updates. `None` stands for the `step`.

    Example:
        >>> import numpy as np
        >>> state = from_mlx({"fc.weight.v": np.ones(2), "step": np.uint64(7)}, lambda arrays: arrays["fc.weight"])
        >>> int(state.count)
        7

    References:
        python/mlx/optimizers/optimizers.py, 0.32.4.
    """
    steps = [key for key in mapping(checkpoint) if f".{key}".endswith(".step")]
    if len(steps) > 1:
        raise ValueError(
            f"the checkpoint has several optimizers, with {listed(steps)}: read them one by one, as in "
            f"{{key: x for key, x in checkpoint.items() if key.startswith({steps[0].removesuffix('step')!r})}}"
        )
    prefix = steps[0].removesuffix("step") if steps else ""  # of the optimizer in a larger tree
    arrays = {key.removeprefix(prefix): x for key, x in checkpoint.items() if key.startswith(prefix)}
    if nested := [key for key, x in arrays.items() if _is_nested(x)]:
        raise ValueError(f"{listed(nested)} are not arrays: pass dict(mlx.utils.tree_flatten(optimizer.state))")
    if bits := [key for key, x in arrays.items() if str(getattr(x, "dtype", "")) == "mlx.core.bfloat16"]:
        raise ValueError(f"{listed(bits)} is bfloat16, which NumPy does not have: cast with x.astype(mx.float32)")
    arrays.pop("learning_rate", None)
    stored = {"step": arrays.pop("step")} if "step" in arrays else {}
    parts = {key: key.rpartition(".") for key in arrays}
    entries = [Entry(slot, weight, arrays[key], key) for key, (weight, _, slot) in parts.items()]
    state = state_of(RMSPROP, entries, convert, count, stored)
    if state.count and not any(x.any() for x in jax.tree.leaves(state.nu)):
        raise ValueError(f"every v is 0 after {state.count} updates, as in SGD without momentum: pass RMSprop's state")
    return state


def _is_nested(x: Any) -> bool:
    return isinstance(x, Mapping) or (isinstance(x, list) and any(map(_is_nested, x)))
