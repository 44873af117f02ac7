"""python tests/benchmarks/training.py: does it train as well with one byte per parameter, or two?

A convolutional network on scikit-learn's digits and a character Transformer on Python's own documentation
(`pydoc_data`), three seeds, over decays, variants and scales of the loss; float32, bfloat16 and uint8 from the same
starts, on the same batches. Prints Markdown, writes JSON. Where PyTorch is installed its RMSprop, fed with the same
gradients, is a row of the table of bytes.
"""

import argparse
import importlib.util
import itertools
import json
import pydoc_data.topics
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from rich.progress import track

from rmsprop_jax import _digits, rmsprop


SEEDS = range(3)
DECAYS = (0.9, 0.99, 0.999)
SCALES = (1e-6, 1.0, 1e6)
VARIANTS = {"plain": {}, "momentum": {"momentum": 0.9}, "centered": {"centered": True}}
DTYPES = {"float32": None, "bfloat16": jnp.bfloat16, "uint8": jnp.uint8}


class Problem(NamedTuple):
    """Something to train."""

    init: Callable[[jax.Array], Any]  # parameters from a key
    batch: Callable[[jax.Array], Any]  # a training batch from a key
    loss: Callable[[Any, Any], tuple[jax.Array, jax.Array]]  # loss and accuracy
    test: Any  # the batch that both are reported on
    steps: int
    learning_rate: float


def digits() -> Problem:
    train, test = _digits.load(0)
    graph, _ = _digits.initial(0)

    def loss(params, batch):
        logits = nnx.merge(graph, params)(batch.images)
        value = optax.softmax_cross_entropy_with_integer_labels(logits, batch.labels).mean()
        return value, (logits.argmax(-1) == batch.labels).mean()

    def batch(key):
        index = jax.random.choice(key, len(train.labels), (_digits.BATCH,), replace=False)
        return _digits.Digits(train.images[index], train.labels[index])

    def init(key):
        return nnx.state(_digits.ConvNet(nnx.Rngs(key)), nnx.Param)

    return Problem(init, batch, loss, test, steps=300, learning_rate=1e-3)


class Block(nnx.Module):
    def __init__(self, width: int, heads: int, rngs: nnx.Rngs):
        self.norm1, self.norm2 = nnx.LayerNorm(width, rngs=rngs), nnx.LayerNorm(width, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(heads, width, decode=False, rngs=rngs)
        self.up, self.down = nnx.Linear(width, 4 * width, rngs=rngs), nnx.Linear(4 * width, width, rngs=rngs)

    def __call__(self, x):
        x = x + self.attention(self.norm1(x), mask=nnx.make_causal_mask(x[..., 0]))
        return x + self.down(nnx.gelu(self.up(self.norm2(x))))


class Transformer(nnx.Module):
    def __init__(self, vocabulary: int, length: int, width: int, heads: int, layers: int, rngs: nnx.Rngs):
        self.token = nnx.Embed(vocabulary, width, rngs=rngs)
        self.position = nnx.Embed(length, width, rngs=rngs)
        self.blocks = nnx.List([Block(width, heads, rngs) for _ in range(layers)])
        self.norm = nnx.LayerNorm(width, rngs=rngs)
        self.head = nnx.Linear(width, vocabulary, rngs=rngs)

    def __call__(self, tokens):
        x = self.token(tokens) + self.position(jnp.arange(tokens.shape[-1]))
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def characters(length: int = 32, size: int = 8) -> Problem:
    text = "".join(pydoc_data.topics.topics[name] for name in sorted(pydoc_data.topics.topics))
    alphabet, tokens = np.unique(np.array(list(text)), return_inverse=True)
    train, test = jnp.asarray(tokens[:-40_000], jnp.int32), jnp.asarray(tokens[-40_000:], jnp.int32)
    shape = {"vocabulary": len(alphabet), "length": length, "width": 64, "heads": 4, "layers": 2}
    graph, _ = nnx.split(Transformer(**shape, rngs=nnx.Rngs(0)), nnx.Param)

    def loss(params, batch):
        logits = nnx.merge(graph, params)(batch[:, :-1])
        value = optax.softmax_cross_entropy_with_integer_labels(logits, batch[:, 1:]).mean()
        return value, (logits.argmax(-1) == batch[:, 1:]).mean()

    def batch(key):
        start = jax.random.randint(key, (size, 1), 0, len(train) - length)
        return train[start + jnp.arange(length + 1)]

    def init(key):
        return nnx.state(Transformer(**shape, rngs=nnx.Rngs(key)), nnx.Param)

    windows = test[: len(test) // (length + 1) * (length + 1)].reshape(-1, length + 1)[:256]
    return Problem(init, batch, loss, windows, steps=300, learning_rate=1e-3)


PROBLEMS = {"convnet": digits, "transformer": characters}


def runs(problem: Problem, transformation: Callable[..., Any]) -> Callable[..., Any]:
    """A function: test loss and accuracy for one decay, scale of the loss, and seed. Compiled once for all."""

    def optimizer(decay):
        return transformation(optax.cosine_decay_schedule(problem.learning_rate, problem.steps), decay)

    # A step at a time: in a loop of its own, XLA's CPU backend convolves on one thread.
    @jax.jit
    def step(params, state, decay, scale, key):
        batch = problem.batch(key)
        grads = jax.grad(lambda p: scale * problem.loss(p, batch)[0])(params)
        updates, state = optimizer(decay).update(grads, state, params)
        return optax.apply_updates(params, updates), state

    test = jax.jit(problem.loss)

    def run(decay, scale, seed):
        params = problem.init(jax.random.key(seed))
        state = optimizer(decay).init(params)
        for key in jax.random.split(jax.random.fold_in(jax.random.key(seed), 1), problem.steps):
            params, state = step(params, state, jnp.float32(decay), jnp.float32(scale), key)
        return tuple(float(x) for x in test(params, problem.test))

    return run


def compare(names: list[str], variants: list[str]) -> list[dict[str, Any]]:
    settings = list(itertools.product(DECAYS, SCALES, SEEDS))
    rows = []
    jobs = [(name, variant, dtype) for name in names for variant in variants for dtype in DTYPES]
    for name, variant, dtype in track(jobs, "training"):
        # eps=0, so that only the storage can tell the scales of the loss apart.
        run = runs(
            PROBLEMS[name](),
            lambda rate, decay, options=VARIANTS[variant], dtype=dtype: rmsprop(
                rate, decay, eps=0.0, state_dtype=DTYPES[dtype], **options
            ),
        )
        for decay, scale, seed in settings:
            loss, accuracy = run(decay, scale, seed)
            rows.append({"problem": name, "variant": variant, "dtype": dtype, "decay": decay, "scale": scale})
            rows[-1] |= {"seed": seed, "loss": loss, "accuracy": accuracy}
    return rows


def side_by_side(names: list[str]) -> list[dict[str, Any]]:
    """Ours beside Optax's and PyTorch's, all with decay 0.99 and eps=1e-8, loss as it is."""
    rows = []
    for name in names:
        problem = PROBLEMS[name]()
        shapes = jax.eval_shape(problem.init, jax.random.key(0))
        count = sum(x.size for x in jax.tree.leaves(shapes))
        candidates = {"optax.rmsprop": lambda rate, decay: optax.rmsprop(rate, decay)} | {
            f"rmsprop, {dtype}": lambda rate, decay, kind=kind: rmsprop(rate, decay, state_dtype=kind)
            for dtype, kind in DTYPES.items()
        }
        for label, transformation in candidates.items():
            state = jax.eval_shape(transformation(0.1, 0.99).init, shapes)
            nbytes = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state))
            run = runs(problem, transformation)
            rows.append(row(name, label, nbytes / count, *zip(*(run(0.99, 1.0, seed) for seed in SEEDS), strict=True)))
        if importlib.util.find_spec("torch"):
            results = [torch_run(problem, seed) for seed in SEEDS]
            rows.append(row(name, "torch.optim.RMSprop", results[0][2], *zip(*(r[:2] for r in results), strict=True)))
    return rows


def row(problem: str, label: str, bytes_per_parameter: float, losses: Any, accuracies: Any) -> dict[str, Any]:
    losses, accuracies = np.asarray(losses, float), np.asarray(accuracies, float)
    return {
        "problem": problem,
        "optimizer": label,
        "bytes per parameter": round(bytes_per_parameter, 3),
        "loss": f"{losses.mean():.4f} ± {losses.std():.4f}",
        "accuracy": f"{accuracies.mean():.4f} ± {accuracies.std():.4f}",
    }


def torch_run(problem: Problem, seed: int) -> tuple[float, float, float]:
    """PyTorch's RMSprop on the same gradients; also its bytes per parameter."""
    import torch

    params = problem.init(jax.random.key(seed))
    leaves, treedef = jax.tree.flatten(params)
    tensors = [torch.tensor(np.asarray(x), requires_grad=True) for x in leaves]
    optimizer = torch.optim.RMSprop(tensors, lr=problem.learning_rate, alpha=0.99, eps=1e-8)
    rate = optax.cosine_decay_schedule(problem.learning_rate, problem.steps)
    grad = jax.jit(jax.grad(lambda p, key: problem.loss(p, problem.batch(key))[0]))

    def tree():
        return treedef.unflatten([jnp.asarray(t.detach().numpy()) for t in tensors])

    for t, key in enumerate(jax.random.split(jax.random.fold_in(jax.random.key(seed), 1), problem.steps)):
        for tensor, g in zip(tensors, jax.tree.leaves(grad(tree(), key)), strict=True):
            tensor.grad = torch.tensor(np.asarray(g))
        optimizer.param_groups[0]["lr"] = float(rate(t))
        optimizer.step()
    loss, accuracy = jax.jit(problem.loss)(tree(), problem.test)
    nbytes = sum(v.numel() * v.element_size() for s in optimizer.state.values() for k, v in s.items() if k != "step")
    return float(loss), float(accuracy), nbytes / sum(t.numel() for t in tensors)


def markdown(rows: list[dict[str, Any]]) -> str:
    lines = ["| " + " | ".join(rows[0]) + " |", "|---" * len(rows[0]) + "|"]
    return "\n".join(lines + ["| " + " | ".join(str(x) for x in row.values()) + " |" for row in rows])


def summary(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Final losses, mean and spread of the seeds: a line per setting, a column per dtype."""
    table = []
    keys = ("problem", "variant", "decay", "scale")
    for setting in dict.fromkeys(tuple(row[key] for key in keys) for row in rows):
        line: dict[str, Any] = dict(zip(keys, setting, strict=True))
        for dtype in DTYPES:
            chosen = [r for r in rows if r["dtype"] == dtype and tuple(r[key] for key in keys) == setting]
            losses, accuracies = (np.array([r[what] for r in chosen]) for what in ("loss", "accuracy"))
            line[dtype] = f"{losses.mean():.4f} ± {losses.std():.4f}, {100 * accuracies.mean():.1f} %"
        table.append(line)
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--problems", nargs="+", choices=PROBLEMS, default=list(PROBLEMS))
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--only-table", action="store_true", help="only the table beside Optax and PyTorch")
    parser.add_argument("--json", metavar="FILE", help="where to write every run")
    arguments = parser.parse_args()
    table = side_by_side(arguments.problems)
    print(markdown(table), flush=True)
    rows = [] if arguments.only_table else compare(arguments.problems, arguments.variants)
    if rows:
        print("\n" + markdown(summary(rows)))
    if arguments.json:
        with open(arguments.json, "w") as file:
            json.dump({"table": table, "runs": rows}, file, indent=1)


if __name__ == "__main__":
    main()
