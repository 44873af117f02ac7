"""python tests/benchmarks/watching.py: what share of a training step `metrics` takes, when computed in every step.

Steps with and without it take turns, round by round. A ratio is the median over the rounds of the time with it divided by
the time without, followed by the quartiles.
"""

import argparse
import itertools
import os
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from report import Report
from speed import Candidate, Model, model, race, RATE, spread

from rmsprop_jax import metrics, rmsprop
from rmsprop_jax._digits import BATCH, ConvNet


class MLP(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        sizes = (784, 2048, 2048, 2048, 10)
        self.layers = nnx.List([nnx.Linear(m, n, rngs=rngs) for m, n in itertools.pairwise(sizes)])

    def __call__(self, x):
        for layer in self.layers[:-1]:
            x = nnx.relu(layer(x))
        return self.layers[-1](x)


WATCHED: dict[str, Callable[[], Model]] = {
    "the demo's convnet, 38,282 parameters": lambda: model(
        ConvNet, jax.ShapeDtypeStruct((BATCH, 8, 8, 1), jnp.float32), (BATCH,)
    ),
    "MLP, 10 M parameters": lambda: model(MLP, jax.ShapeDtypeStruct((128, 784), jnp.float32), (128,)),
}
STATES = {"float32": None, "uint8": "uint8"}
CALLS: dict[str, Callable[..., Any]] = {
    "without": lambda state, updates, params: {},
    "metrics(state)": lambda state, updates, params: metrics(state),
    "metrics(state, updates, params, eps=1e-8)": lambda *trees: metrics(*trees, eps=1e-8),
}


def training(network: Model, state_dtype: Any, watch: Callable[..., Any]) -> Candidate:
    """A compiled step with parameters and state donated, which also gives the numbers of `watch`."""
    tx, rng = rmsprop(RATE, state_dtype=state_dtype), np.random.default_rng(0)

    def value(x: Any) -> jax.Array:
        if jnp.issubdtype(x.dtype, jnp.integer):
            return jnp.asarray(rng.integers(0, 10, x.shape), x.dtype)
        return jnp.asarray(rng.normal(size=x.shape) / max(x.shape[0], 1) ** 0.5, x.dtype)

    def step(params, state, batch):
        loss, grads = jax.value_and_grad(network.loss)(params, batch)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, loss, watch(state, updates, params)

    params, batch = jax.tree.map(value, (network.params, network.batch))
    held = [params, tx.init(params), None, None]
    program = jax.jit(step, donate_argnums=(0, 1)).lower(*held[:2], batch).compile()

    def advance():
        held[:] = program(*held[:2], batch)

    return Candidate(advance, lambda: jax.block_until_ready(held), 0)


def watching(seconds: float) -> list[dict[str, Any]]:
    rows = []
    for name, make in WATCHED.items():
        for state, state_dtype in STATES.items():
            network = make()
            times = race({call: training(network, state_dtype, f) for call, f in CALLS.items()}, seconds, lambda: None)
            for call, series in times.items():
                rows.append({"network": name, "state": state, "numbers": call, "ms": 1e3 * float(np.median(series))})
                rows[-1] |= spread("ratio", "quartiles", series / times["without"])
    return rows


def table(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [
        {
            "network": row["network"],
            "state": row["state"],
            "numbers": row["numbers"],
            "a step": f"{row['ms']:.3g} ms",
            "ratio": "{:.2f} ({:.2f}-{:.2f})".format(row["ratio"], *row["quartiles"]),
        }
        for row in rows
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--seconds", type=float, default=20.0, help="of racing for each network and state (default: 20)"
    )
    parser.add_argument("--json", metavar="FILE", help="where to write every number")
    arguments = parser.parse_args()
    report = Report(arguments.json, "flax")
    report.facts["load"] = os.getloadavg()
    rows = watching(arguments.seconds)
    report.add("watching", rows, table(rows))


if __name__ == "__main__":
    main()
