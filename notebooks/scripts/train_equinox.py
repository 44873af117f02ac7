"""A complete training script with Equinox, on scikit-learn's digits.

Parameters and optimizer state in three bytes, a schedule, clipping, weight
decay of the matrices alone, hyperparameters that can be logged and set, a
progress bar, TensorBoard, and checkpoints; gradient accumulation and an average
of the weights if you ask for them, with four more bytes each. Stop it at any
time and start it again with the same arguments: it ends with the same bits.

    python train_equinox.py --out runs/equinox
    python train_equinox.py --out runs/equinox-4 --accumulate 4 --average

The page "Install and start" says how to install rmsprop_jax. This needs its
extra `notebooks`.
"""

import argparse
import pathlib

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
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


def matrices(params):
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
            weight_decay_mask=matrices,
            state_dtype=jnp.uint8,
        ),
        round_params_stochastically(),  # always last
    )
    return (
        optax.MultiSteps(tx, every_k_schedule=accumulate)
        if accumulate > 1
        else tx
    )


def make_step(tx):
    # Donated: the new parameters and state are written where the old ones were.
    @eqx.filter_jit(donate="all")
    def train_step(model, opt_state, average, images, labels):
        def loss_of(model):
            return optax.softmax_cross_entropy_with_integer_labels(
                jax.vmap(model)(images), labels
            ).mean()

        loss, grads = eqx.filter_value_and_grad(loss_of)(model)
        updates, opt_state = tx.update(
            grads, opt_state, eqx.filter(model, eqx.is_inexact_array)
        )
        model = eqx.apply_updates(model, updates)
        weights = params_in_float32(
            eqx.filter(model, eqx.is_inexact_array), opt_state
        )
        if average is not None:
            # In bfloat16 an average at 0.99 would stand still. It moves after
            # an update only.
            rate = jnp.where(
                optax.tree.get(opt_state, "mini_step", 0) == 0, 0.01, 0.0
            )
            average = optax.incremental_update(weights, average, rate)
        return (
            model,
            opt_state,
            average,
            {"loss": loss} | metrics(opt_state, updates, weights, eps=EPS),
        )

    return train_step


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
        default="runs/equinox",
        help="folder of checkpoints and events",
    )
    args = parser.parse_args(arguments)

    digits = load_digits()
    order = np.random.default_rng(args.seed).permutation(len(digits.target))
    images = digits.data[order].astype(np.float32) / 16
    labels = digits.target[order]
    # bfloat16 parameters. Images in float32 make the arithmetic float32.
    model = eqx.nn.MLP(
        64, 10, 256, depth=1, dtype=jnp.bfloat16, key=jax.random.key(args.seed)
    )
    # Activation functions are leaves of the model. They have no place in the
    # optimizer or in a checkpoint.
    params, functions = eqx.partition(model, eqx.is_inexact_array)
    tx = make_optimizer(args.steps, args.accumulate)
    run = (
        params,
        tx.init(params),
        params_in_float32(params, ()) if args.average else None,
    )
    train_step = make_step(tx)

    checkpoints = ocp.CheckpointManager(
        args.out.resolve() / "checkpoints",
        options=ocp.CheckpointManagerOptions(max_to_keep=2),
    )
    start = checkpoints.latest_step() or 0
    if start:
        run = checkpoints.restore(start, args=ocp.args.StandardRestore(run))
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
        model, opt_state, average = eqx.combine(run[0], functions), *run[1:]
        for step in range(start + 1, args.steps + 1):
            # The batch depends on the number of the step alone, so a resumed
            # run sees what it would have seen.
            index = np.random.default_rng((args.seed, step)).integers(
                len(labels) - 360, size=64
            )
            model, opt_state, average, logged = train_step(
                model, opt_state, average, images[index], labels[index]
            )
            if step % args.log_every == 0:
                for name, value in logged.items():
                    writer.add_scalar(name, float(value), step)
                shown = " ".join(
                    f"{name} {logged[name]:.2g}"
                    for name in ("loss", "learning_rate", "eps_share")
                )
                progress.update(task, completed=step, shown=shown)
            if step % args.save_every == 0 or step == args.steps:
                run = (
                    eqx.filter(model, eqx.is_inexact_array),
                    opt_state,
                    average,
                )
                checkpoints.save(step, args=ocp.args.StandardSave(run))

    report(*run)
    for name, params in {"bfloat16 weights": run[0], "average": run[2]}.items():
        if params is not None:
            right = (
                jax.vmap(eqx.combine(params, functions))(images[-360:]).argmax(
                    -1
                )
                == labels[-360:]
            )
            print(f"test accuracy of the {name}: {right.mean():.3f}")


if __name__ == "__main__":
    main()
