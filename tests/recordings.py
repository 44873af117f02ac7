"""Runs that are resumed: from recorded checkpoints (golden/checkpoints.py), or live."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from golden import checkpoints
from golden.checkpoints import END, ORIGIN, recorded, SHAPES, STOP


LIMIT = 1e-6  # of the distance travelled; an accumulator that is off by a percent ends more than 2e-6 away

Arrays = dict[str, np.ndarray]
NAMES = list(SHAPES)


def from_torch_layout(named: Arrays) -> Any:
    """Flax' tree of parameters."""
    return {
        "conv": {"kernel": named["conv.weight"].transpose(2, 3, 1, 0)},
        "fc": {"kernel": named["fc.weight"].T, "bias": named["fc.bias"]},
    }


def to_torch_layout(tree: Any) -> Arrays:
    arrays = jax.tree.map(np.asarray, tree)
    return {
        "conv.weight": arrays["conv"]["kernel"].transpose(3, 2, 0, 1),
        "fc.weight": arrays["fc"]["kernel"].T,
        "fc.bias": arrays["fc"]["bias"],
    }


def with_underscores(tree: Any) -> Arrays:
    """PyTorch's layout under the names of TensorFlow's variables."""
    return {k.replace(".", "_"): v for k, v in to_torch_layout(tree).items()}


def from_underscores(arrays: Arrays) -> Any:
    return from_torch_layout({k.replace("_", "."): v for k, v in arrays.items()})


def state_dict(name: str) -> Any:
    """PyTorch's, with numbers for keys, which JSON does not have."""
    kept = recorded(name)["checkpoint"]["state_dict"]
    return {**kept, "state": {int(key): entry for key, entry in kept["state"].items()}}


def from_keras_layout(conv: str, kernel: str, bias: str) -> Any:
    """A `convert` for these names: Keras' layout is Flax'."""
    return lambda arrays: {"conv": {"kernel": arrays[conv]}, "fc": {"kernel": arrays[kernel], "bias": arrays[bias]}}


def rates(count: Any) -> jax.Array:
    return jnp.asarray(checkpoints.RATES)[count]


def run(tx: Any, state: Any, arrays: Arrays, start: int = STOP, end: int = END) -> tuple[Arrays, Any]:
    """The parameters and the state of a transformation after these steps, from a state of Flax' tree."""
    update, params = jax.jit(tx.update), jax.tree.map(jnp.asarray, from_torch_layout(arrays))
    for t in range(start, end):
        updates, state = update(from_torch_layout(checkpoints.grads(to_torch_layout(params), t)), state, params)
        params = optax.apply_updates(params, updates)
    return to_torch_layout(params), state


def difference(ours: Arrays, theirs: Arrays) -> float:
    """The largest difference, relative to the largest distance from the start."""
    away = max(np.abs(ours[k] - theirs[k]).max() for k in theirs)
    return away / max(np.abs(theirs[k] - ORIGIN[k]).max() for k in theirs)


def distance(tx: Any, state: Any, recording: Any) -> float:
    """How far from the recorded end the run is that goes on from a state."""
    return difference(run(tx, state, recording["middle"])[0], recording["end"])


def check_goes_on(dialect: Any, options: dict[str, Any], state: Any, recording: Any, rate: Any = rates) -> None:
    """The run ends where the framework's did. Without its state it does not: the check can fail."""
    tx = dialect(rate, **{k: v for k, v in options.items() if k != "mixed"})
    assert state.count == STOP
    assert (state.mu is None, state.trace is None) == ("centered" not in options, "momentum" not in options)
    assert distance(tx, state, recording) < LIMIT
    afresh = tx.init(from_torch_layout(recording["middle"]))._replace(count=state.count)
    assert distance(tx, afresh, recording) > 10 * LIMIT


def without_unused(state: Any, options: dict[str, Any]) -> Any:
    """Some frameworks make the momentum even if it is zero."""
    return state if "momentum" in options else state._replace(trace=None)


def others(*names: str) -> list[tuple[str, str, Any]]:
    """Name, optimizer and forms of each recorded checkpoint that is not RMSProp's."""
    recordings = {name: recorded(f"{name},others") for name in names}
    return [(name, kind, forms) for name, x in recordings.items() for kind, forms in x.items() if kind != "versions"]
