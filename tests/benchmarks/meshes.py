"""python tests/benchmarks/meshes.py: what the state weighs on each of eight devices, and what an update sends.

A dense network (64-512-512-10 on scikit-learn's digits) on a 4 x 2 mesh of CPU devices, laid out in each of the usual
ways. Collectives are those in the compiled text of `tx.update` and `optax.apply_updates`. Prints Markdown.
"""

import collections
import itertools
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec as P

from rmsprop_jax import rmsprop
from rmsprop_jax._digits import Digits, load


BOTH = ("data", "model")
REPLICATED = {f"dense{i}": {"kernel": P(), "bias": P()} for i in (1, 2, 3)}
SPLIT = {f"dense{i}": {"kernel": P(BOTH), "bias": P(BOTH) if i < 3 else P()} for i in (1, 2, 3)}
# Columns, rows, columns: as Megatron does, with the last layer's ten columns on two devices.
TENSOR = {
    "dense1": {"kernel": P(None, "model"), "bias": P("model")},
    "dense2": {"kernel": P("model"), "bias": P()},
    "dense3": {"kernel": P(None, "model"), "bias": P("model")},
}
# How the parameters lie, and how the state.
LAYOUTS = {
    "data parallel": (REPLICATED, REPLICATED),
    "tensor parallel": (TENSOR, TENSOR),
    "FSDP": (SPLIT, SPLIT),
    "ZeRO-1": (REPLICATED, SPLIT),
}


def make_mesh(axis_type: AxisType = AxisType.Auto, shape: tuple[int, int] = (4, 2)) -> Mesh:
    """A mesh of CPU devices."""
    devices = jax.devices("cpu")[: shape[0] * shape[1]]
    return jax.make_mesh(shape, BOTH, axis_types=(axis_type,) * 2, devices=devices)


def start(seed: int = 0) -> Any:
    """The first parameters, on one device."""
    rng = np.random.default_rng(seed)
    sizes = (64, 512, 512, 10)
    return {
        f"dense{i}": {"kernel": rng.normal(0, n**-0.5, (n, m)).astype(np.float32), "bias": np.zeros(m, np.float32)}
        for i, (n, m) in enumerate(itertools.pairwise(sizes), 1)
    }


def data() -> Digits:
    """The first 1,408 digits: eight equal parts."""
    digits = load(0)[0]
    return Digits(digits.images[:1408].reshape(1408, 64), digits.labels[:1408])


def loss(params: Any, digits: Digits) -> jax.Array:
    """Cross-entropy of the network, in nats."""
    x = digits.images
    for i in (1, 2, 3):
        x = x @ params[f"dense{i}"]["kernel"] + params[f"dense{i}"]["bias"]
        x = jax.nn.relu(x) if i < 3 else x
    return optax.softmax_cross_entropy_with_integer_labels(x, digits.labels).mean()


def shardings(mesh: Mesh, specs: Any) -> Any:
    """A tree of specs as a tree of shardings."""
    return jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs, is_leaf=lambda x: isinstance(x, P))


def state_specs(tx: optax.GradientTransformation, specs: Any) -> Any:
    """The state with `specs` for each of its trees, and every count on all devices."""
    state = jax.eval_shape(tx.init, start())
    return optax.tree.map_params(tx, lambda _, spec: spec, state, specs, transform_non_params=lambda _: P())


def place(tx: optax.GradientTransformation, mesh: Mesh, layout: str) -> tuple[Any, Any, Any]:
    """Parameters, state and the compiled `update(grads, state, params) -> (params, state)` of a layout."""
    params_specs, moments_specs = LAYOUTS[layout]
    params = jax.device_put(start(), shardings(mesh, params_specs))
    if moments_specs is params_specs:  # the state follows by itself
        state, out_shardings = jax.jit(tx.init)(params), None
    else:
        wanted = shardings(mesh, state_specs(tx, moments_specs))
        state = jax.jit(tx.init, out_shardings=wanted)(params)
        out_shardings = (shardings(mesh, params_specs), wanted)

    def update(grads: Any, state: Any, params: Any) -> tuple[Any, Any]:
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    return params, state, jax.jit(update, out_shardings=out_shardings).lower(params, state, params).compile()


def bytes_per_device(tree: Any) -> int:
    """What the first device holds of a tree."""
    return sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(tree))


def collectives(text: str) -> dict[str, int]:
    """The operations of a compiled program that send something to another device."""
    return dict(
        collections.Counter(re.findall(r" (all-\w+|collective-\w+|reduce-scatter|send|recv)(?:-start)?\(", text))
    )


def main() -> None:
    """Prints the table."""
    jax.config.update("jax_num_cpu_devices", 8)
    mesh = make_mesh()
    print("| layout | parameters | state, float32 | state, uint8 | sent by the update |\n|---|---|---|---|---|")
    for layout in LAYOUTS:
        cells = []
        for state_dtype in (None, jnp.uint8):
            params, state, update = place(rmsprop(1e-3, state_dtype=state_dtype), mesh, layout)
            cells.append(f"{bytes_per_device(state):,}")
        sent = ", ".join(f"{n} {name}" for name, n in collectives(update.as_text()).items()) or "nothing"
        print(f"| {layout} | {bytes_per_device(params):,} | {' | '.join(cells)} | {sent} |")


if __name__ == "__main__":
    main()
