"""Runs that go on from recorded checkpoints (golden/checkpoints.py)."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from golden import checkpoints
from golden.checkpoints import END, ORIGIN, recorded, STOP


LIMIT = 1e-6  # of the distance travelled; an accumulator that is off by a percent ends more than 2e-6 away

Arrays = dict[str, np.ndarray]


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


def from_keras_layout(conv: str, kernel: str, bias: str) -> Any:
    """A `convert` for these names: Keras' layout is Flax'."""
    return lambda arrays: {"conv": {"kernel": arrays[conv]}, "fc": {"kernel": arrays[kernel], "bias": arrays[bias]}}


def rates(count: Any) -> jax.Array:
    return jnp.asarray(checkpoints.RATES)[count]


def distance(tx: optax.GradientTransformation, state: Any, recording: Any) -> float:
    """How far from the recorded end the run is that goes on from a state, relative to the distance travelled."""
    params = jax.tree.map(jnp.asarray, from_torch_layout(recording["middle"]))
    for t in range(STOP, END):
        grads = from_torch_layout(checkpoints.grads(to_torch_layout(params), t))
        updates, state = tx.update(grads, state, params)
        params = optax.apply_updates(params, updates)
    ours, theirs = to_torch_layout(params), recording["end"]
    away = max(np.abs(ours[k] - theirs[k]).max() for k in theirs)
    return away / max(np.abs(theirs[k] - ORIGIN[k]).max() for k in theirs)


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
