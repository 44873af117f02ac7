"""python tests/cluster.py: one process of a data-parallel run on the digits, which can be killed and started again.

Every process has `--devices` CPU devices; Gloo connects them over the loopback interface. Orbax keeps a checkpoint of
parameters and state every ten steps, and a run that finds one goes on from there. At the end each process writes the
parameters and the state that it has to a file of its own, `--out` with its number.
"""

import argparse
import functools
import itertools
import pathlib
from typing import Any

import jax
import numpy as np
import optax
import orbax.checkpoint as ocp
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

from rmsprop_jax import rmsprop
from rmsprop_jax._digits import batches, initial, load


def arguments() -> argparse.Namespace:
    """The options on the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--process", type=int, default=0)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--devices", type=int, default=1, help="of each process")
    parser.add_argument("--port", type=int)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--state-dtype")
    parser.add_argument("--checkpoints", type=pathlib.Path, required=True)
    parser.add_argument("--out", type=pathlib.Path, required=True)
    return parser.parse_args()


def main(options: argparse.Namespace) -> None:
    """Trains from the newest checkpoint to the end."""
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", options.devices)
    if options.processes > 1:
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        jax.distributed.initialize(f"127.0.0.1:{options.port}", options.processes, options.process)
    mesh = jax.make_mesh((options.processes * options.devices,), ("data",), axis_types=(AxisType.Auto,))
    everywhere, split = NamedSharding(mesh, P()), NamedSharding(mesh, P("data"))

    tx = rmsprop(optax.linear_schedule(3e-3, 1e-3, options.steps), momentum=0.9, state_dtype=options.state_dtype)
    train_set, _ = load(0)
    graph, params = initial(0)
    params = jax.device_put(params, everywhere)
    state = jax.jit(tx.init)(params)

    @functools.partial(jax.jit, donate_argnums=(0, 1), out_shardings=everywhere)
    def step(params: Any, state: Any, images: jax.Array, labels: jax.Array) -> tuple[Any, Any, jax.Array]:
        def loss(params: Any) -> jax.Array:
            logits = nnx.merge(graph, params)(images)
            return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

        value, grads = jax.value_and_grad(loss)(params)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, value

    every_ten = ocp.CheckpointManagerOptions(save_interval_steps=10, max_to_keep=2)
    with ocp.CheckpointManager(options.checkpoints, options=every_ten) as manager:
        done = manager.latest_step() or 0
        if done:
            like = jax.tree.map(ocp.utils.to_shape_dtype_struct, {"params": params, "state": state})
            kept = manager.restore(done, args=ocp.args.StandardRestore(like))
            params, state = kept["params"], kept["state"]
            print(f"process {options.process}: goes on from step {done}", flush=True)
        indices = itertools.islice(batches(len(train_set.labels), 2, seed=0), done, options.steps)
        for i, index in enumerate(indices, done + 1):
            images, labels = (jax.device_put(np.asarray(x[index]), split) for x in train_set)
            params, state, value = step(params, state, images, labels)
            print(f"process {options.process}: step {i}, loss {float(value):.9f}", flush=True)
            manager.save(i, args=ocp.args.StandardSave({"params": params, "state": state}))
        manager.wait_until_finished()

    # In float64, which holds the values of every dtype.
    np.savez(f"{options.out}{options.process}.npz", *(np.float64(x) for x in jax.tree.leaves((params, state))))


if __name__ == "__main__":
    main(arguments())
