"""A complete training script with Flax Linen and its TrainState, on digits.

Parameters and optimizer state in three bytes, a schedule, clipping, weight
decay of the matrices alone, hyperparameters that can be logged and set, a
progress bar, TensorBoard, and checkpoints; gradient accumulation and an average
of the weights if you ask for them, with four more bytes each. Stop it at any
time and start it again with the same arguments: it ends with the same bits.

    python train_linen.py --out runs/linen
    python train_linen.py --out runs/linen-4 --accumulate 4 --average

The page "Install and start" says how to install rmsprop_jax. This needs its
extra `notebooks`.
"""

import argparse
import functools
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from flax import linen as nn
from flax.training import train_state
from rich.progress import Progress, TextColumn
from rmsprop_jax import (
    metrics,
    params_in_float32,
    rmsprop,
    round_params_stochastically,
)
from sklearn.datasets import load_digits
from tensorboardX import SummaryWriter


EPS = 1e-8


class Network(nn.Module):
    """bfloat16 parameters. Images in float32 make the arithmetic float32."""

    @nn.compact
    def __call__(self, images):
        hidden = nn.relu(nn.Dense(256, param_dtype=jnp.bfloat16)(images))
        return nn.Dense(10, param_dtype=jnp.bfloat16)(hidden)


class TrainState(train_state.TrainState):
    """Flax's, with an average of the weights in float32, or None."""

    average: Any


def kernels(params):
    return jax.tree.map(lambda p: p.ndim > 1, params)


def make_optimizer(steps, accumulate):
    # The schedule counts updates, not steps.
    updates = steps // accumulate
    schedule = optax.warmup_cosine_decay_schedule(
        0.0, 2e-3, warmup_steps=updates // 20, decay_steps=updates
    )
    # What is injected is in the state, where it can be read and set. A function
    # and a dtype must be static, or Optax calls them as schedules. Without
    # hyperparam_dtype they get the parameters' dtype, and bfloat16 rounds 0.999
    # to 1.
    make = optax.inject_hyperparams(
        rmsprop,
        static_args=("weight_decay_mask", "state_dtype"),
        hyperparam_dtype=jnp.float32,
    )
    tx = optax.chain(
        optax.clip_by_global_norm(1.0),
        make(
            schedule,
            decay=0.99,
            eps=EPS,
            weight_decay=1e-2,
            weight_decay_mask=kernels,
            state_dtype=jnp.uint8,
        ),
        round_params_stochastically(),  # always last
    )
    return (
        optax.MultiSteps(tx, every_k_schedule=accumulate)
        if accumulate > 1
        else tx
    )


# Donated: the new parameters and state are written where the old ones were.
@functools.partial(jax.jit, donate_argnums=0)
def train_step(state, images, labels):
    def loss_of(params):
        logits = state.apply_fn({"params": params}, images)
        return optax.softmax_cross_entropy_with_integer_labels(
            logits, labels
        ).mean()

    loss, grads = jax.value_and_grad(loss_of)(state.params)
    state = state.apply_gradients(grads=grads)
    if state.average is not None:
        # In bfloat16 an average at 0.99 would stand still. It moves after an
        # update only.
        weights = params_in_float32(state.params, state.opt_state)
        rate = jnp.where(
            optax.tree.get(state.opt_state, "mini_step", 0) == 0, 0.01, 0.0
        )
        state = state.replace(
            average=optax.incremental_update(weights, state.average, rate)
        )
    return state, {"loss": loss} | metrics(
        state.opt_state, params=state.params, eps=EPS
    )


def report(params, opt_state, average):
    """Bytes per parameter, without gradients and activations."""

    def per_parameter(tree):
        return sum(x.nbytes for x in jax.tree.leaves(tree)) / sum(
            p.size for p in jax.tree.leaves(params)
        )

    also = {
        "accumulation": optax.tree.get(opt_state, "acc_grads", ()),
        "average": average,
    }
    parts = [
        f"{name} {per_parameter(tree):.0f}"
        for name, tree in also.items()
        if jax.tree.leaves(tree)
    ]
    total = per_parameter((params, opt_state, average))
    print(
        f"{total:.2f} bytes per parameter"
        + (", of which " + ", ".join(parts) if parts else "")
    )


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument(
        "--accumulate",
        type=int,
        default=1,
        help="steps, each with its own batch, that make one update",
    )
    parser.add_argument(
        "--average",
        action="store_true",
        help="keep an average of the weights as well",
    )
    parser.add_argument(
        "--save-every",
        type=int,
        default=250,
        help="steps; also in the middle of an accumulation",
    )
    parser.add_argument("--log-every", type=int, default=20, help="steps")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--out",
        type=pathlib.Path,
        default="runs/linen",
        help="folder of checkpoints and event files",
    )
    args = parser.parse_args(arguments)

    digits = load_digits()
    order = np.random.default_rng(args.seed).permutation(len(digits.target))
    images = digits.data[order].astype(np.float32) / 16
    labels = digits.target[order]
    network = Network()
    params = network.init(jax.random.key(args.seed), images[:1])["params"]
    tx = make_optimizer(args.steps, args.accumulate)
    average = params_in_float32(params, ()) if args.average else None
    state = TrainState.create(
        apply_fn=network.apply, params=params, tx=tx, average=average
    )

    checkpoints = ocp.CheckpointManager(
        args.out.resolve() / "checkpoints",
        options=ocp.CheckpointManagerOptions(max_to_keep=2),
    )
    start = checkpoints.latest_step() or 0
    if start:
        state = checkpoints.restore(start, args=ocp.args.StandardRestore(state))
    columns = (
        *Progress.get_default_columns(),
        TextColumn("{task.fields[shown]}"),
    )
    with (
        checkpoints,
        SummaryWriter(str(args.out), purge_step=start + 1) as writer,
        Progress(*columns) as progress,
    ):
        task = progress.add_task(
            "training", total=args.steps, completed=start, shown=""
        )
        for step in range(start + 1, args.steps + 1):
            # The batch depends on the number of the step alone, so a resumed
            # run sees what it would have seen.
            index = np.random.default_rng((args.seed, step)).integers(
                len(labels) - 360, size=64
            )
            state, logged = train_step(state, images[index], labels[index])
            if step % args.log_every == 0:
                for name, value in logged.items():
                    writer.add_scalar(name, float(value), step)
                shown = " ".join(
                    f"{name} {logged[name]:.2g}"
                    for name in ("loss", "learning_rate", "at_floor")
                )
                progress.update(task, completed=step, shown=shown)
            if step % args.save_every == 0 or step == args.steps:
                checkpoints.save(step, args=ocp.args.StandardSave(state))

    report(state.params, state.opt_state, state.average)
    for name, params in {
        "bfloat16 weights": state.params,
        "average": state.average,
    }.items():
        if params is not None:
            right = (
                network.apply({"params": params}, images[-360:]).argmax(-1)
                == labels[-360:]
            )
            print(f"test accuracy of the {name}: {right.mean():.3f}")


if __name__ == "__main__":
    main()
