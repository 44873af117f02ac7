"""MLX: an optimizer's state, flattened to arrays by path."""

from collections.abc import Mapping
from typing import Any

from .._rmsprop import RMSPropState
from .._text import listed
from ._named import by_slot, Convert, count_of, somebody_else, state_of


SLOTS = {"nu": "v"}
OTHERS = {"u": "AdaDelta", "m": "Adam, one of its kin, or Lion"}


def from_mlx(arrays: Mapping[str, Any], convert: Convert | None = None, count: int | None = None) -> RMSPropState:
    """The state of `dialects.mlx` from an optimizer's flattened state, as safetensors files have it::

        mx.save_safetensors("optimizer.safetensors", dict(mlx.utils.tree_flatten(optimizer.state)))
        arrays = mx.load("optimizer.safetensors")  # or safetensors.numpy.load_file

    SGD and Adagrad keep one array under the same name. SGD's is refused for its sign. Nothing in the file tells that
    it is Adagrad's: which of the two it was, only you know.

    Args:
        arrays: by name: `layers.0.weight.v`, with `step` and `learning_rate`.
        convert: from arrays by name (`"layers.0.weight"`) to a tree of parameters. `None`: the dict itself.
        count: of updates. `None` stands for the `step`.

    Raises:
        ValueError: names or shapes do not fit; the error lists which. Or there is no count, or the arrays are
            another optimizer's.

    Example:
        >>> import numpy as np
        >>> state = from_mlx({"fc.weight.v": np.ones(2), "step": np.uint64(7)}, lambda arrays: arrays["fc.weight"])
        >>> int(state.count)
        7

    References:
        python/mlx/optimizers/optimizers.py, 0.32.4.
    """
    if nested := [key for key, x in arrays.items() if isinstance(x, (Mapping, list))]:
        raise ValueError(f"{listed(nested)} are not arrays: pass dict(mlx.utils.tree_flatten(optimizer.state))")
    if bits := [key for key, x in arrays.items() if str(getattr(x, "dtype", "")) == "mlx.core.bfloat16"]:
        raise ValueError(f"{listed(bits)} is bfloat16, which NumPy does not have: cast with x.astype(mx.float32)")
    parts = {key: key.rpartition(".") for key in arrays if key not in ("step", "learning_rate")}
    kinds = {kind for *_, kind in parts.values()}
    if kinds != {SLOTS["nu"]}:
        raise somebody_else("MLX's RMSprop", OTHERS, kinds, parts)
    found = [(kind, name, arrays[key]) for key, (name, _, kind) in parts.items()]
    slots, updates = by_slot(SLOTS, found), count_of(count, arrays.get("step"))
    if updates and not any(x.any() for x in slots["nu"].values()):
        raise ValueError(f"every v is 0 after {updates} updates, as in MLX's SGD without momentum")
    return state_of(slots, SLOTS, convert, updates)
