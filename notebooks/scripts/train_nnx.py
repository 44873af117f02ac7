"""A complete training script with Flax NNX: everything that a long run needs, on scikit-learn's digits.

bfloat16 parameters with one byte of ν and one byte of rest, a schedule, clipping, decay of the kernels alone, numbers
that can be logged and set, accumulation, an average of the weights, a progress bar, TensorBoard, and checkpoints.
Stop it at any time and start it again with the same arguments: it ends with the same bits.

    pip install "rmsprop_jax[notebooks]"
    python train_nnx.py --out runs/nnx
"""

import argparse
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from flax import nnx
from rich.progress import Progress, TextColumn
from sklearn.datasets import load_digits
from tensorboardX import SummaryWriter

from rmsprop_jax import metrics, params_in_float32, rmsprop, round_params_stochastically


ACCUMULATE = 4  # steps, each with its own batch, that make one update
EPS = 1e-8


class Network(nnx.Module):
    """The parameters are bfloat16. Images in float32 make the arithmetic float32."""

    def __init__(self, rngs: nnx.Rngs):
        self.hidden = nnx.Linear(64, 256, param_dtype=jnp.bfloat16, rngs=rngs)
        self.logits = nnx.Linear(256, 10, param_dtype=jnp.bfloat16, rngs=rngs)

    def __call__(self, images):
        return self.logits(nnx.relu(self.hidden(images)))


def kernels(params):
    return jax.tree.map(lambda p: p.ndim > 1, params)


def make_optimizer(steps):
    # The schedule counts updates, not steps.
    updates = steps // ACCUMULATE
    schedule = optax.warmup_cosine_decay_schedule(0.0, 2e-3, warmup_steps=updates // 20, decay_steps=updates)
    # What is injected lies in the state, where it can be read and set. A function and a dtype must be static, or
    # Optax calls them as schedules. Without hyperparam_dtype the numbers get the parameters' dtype, and in bfloat16
    # a decay of 0.999 is 1.
    make = optax.inject_hyperparams(
        rmsprop, static_args=("weight_decay_mask", "state_dtype"), hyperparam_dtype=jnp.float32
    )
    tx = optax.chain(
        optax.clip_by_global_norm(1.0),
        make(schedule, decay=0.99, eps=EPS, weight_decay=1e-2, weight_decay_mask=kernels, state_dtype=jnp.uint8),
        round_params_stochastically(keep_rest=True),  # always last
    )
    # The accumulated gradient is float32: four more bytes for each parameter.
    return optax.MultiSteps(tx, every_k_schedule=ACCUMULATE)


@nnx.jit
def train_step(model, optimizer, average, images, labels):
    def loss_of(model):
        return optax.softmax_cross_entropy_with_integer_labels(model(images), labels).mean()

    loss, grads = nnx.value_and_grad(loss_of)(model)
    optimizer.update(model, grads)
    # In bfloat16 an average at 0.99 would stand still. It moves after an update only.
    weights = params_in_float32(nnx.state(model, nnx.Param), optimizer.opt_state)
    rate = jnp.where(optimizer.opt_state.mini_step == 0, 0.01, 0.0)
    nnx.update(average, optax.incremental_update(weights, nnx.state(average, nnx.Param), rate))
    return {"loss": loss} | metrics(optimizer.opt_state, params=weights, eps=EPS)


def accuracy(model, images, labels):
    return float((model(images).argmax(-1) == labels).mean())


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--save-every", type=int, default=250, help="steps; also in the middle of an accumulation")
    parser.add_argument("--log-every", type=int, default=20, help=f"steps, a multiple of {ACCUMULATE}")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=pathlib.Path, default="runs/nnx", help="folder of checkpoints and event files")
    args = parser.parse_args(arguments)

    digits = load_digits()
    order = np.random.default_rng(args.seed).permutation(len(digits.target))
    images, labels = digits.data[order].astype(np.float32) / 16, digits.target[order]
    model = Network(nnx.Rngs(args.seed))
    optimizer = nnx.Optimizer(model, make_optimizer(args.steps), wrt=nnx.Param)
    average = nnx.clone(model)
    nnx.update(average, params_in_float32(nnx.state(model, nnx.Param), optimizer.opt_state))
    run = (model, optimizer, average)

    checkpoints = ocp.CheckpointManager(
        args.out.resolve() / "checkpoints", options=ocp.CheckpointManagerOptions(max_to_keep=2)
    )
    start = checkpoints.latest_step() or 0
    if start:
        nnx.update(run, checkpoints.restore(start, args=ocp.args.StandardRestore(nnx.state(run))))
    columns = (*Progress.get_default_columns(), TextColumn("{task.fields[shown]}"))
    with checkpoints, SummaryWriter(str(args.out), purge_step=start + 1) as writer, Progress(*columns) as progress:
        task = progress.add_task("training", total=args.steps, completed=start, shown="")
        for step in range(start + 1, args.steps + 1):
            # The batch depends on the number of the step alone, so a run that goes on sees what it would have seen.
            index = np.random.default_rng((args.seed, step)).integers(len(labels) - 360, size=64)
            logged = train_step(*run, images[index], labels[index])
            if step % args.log_every == 0:
                for name, value in logged.items():
                    writer.add_scalar(name, float(value), step)
                shown = " ".join(f"{name} {logged[name]:.2g}" for name in ("loss", "learning_rate", "eps_share"))
                progress.update(task, completed=step, shown=shown)
            if step % args.save_every == 0 or step == args.steps:
                checkpoints.save(step, args=ocp.args.StandardSave(nnx.state(run)))

    n = sum(x.size for x in jax.tree.leaves(nnx.state(model)))
    for name, tree in {"parameters": model, "optimizer": optimizer.opt_state, "average": average}.items():
        print(f"{name}: {sum(x.nbytes for x in jax.tree.leaves(tree)) / n:.2f} bytes for each parameter")
    for name, network in (("bfloat16 weights", model), ("average", average)):
        print(f"test accuracy of the {name}: {accuracy(network, images[-360:], labels[-360:]):.3f}")


if __name__ == "__main__":
    main()
