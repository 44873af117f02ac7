"""python tests/benchmarks/speed.py: time of one update, ours beside Optax's, in the same run.

An update is `tx.update` and `optax.apply_updates` in one compiled step with parameters and state donated. Candidates take
turns, round by round, in an order that changes; a ratio is the median over the rounds of a candidate's time divided by
Optax's in that round, with the quartiles. Three and four bytes have bfloat16 parameters and gradients, and their ratio is to
Optax's float32.

`--json FILE` keeps every number, and `python tests/benchmarks/pages.py` makes the tables. `--parts` picks what is measured,
`--layouts` and `--seconds` bound the time. On a GPU as on a CPU.
"""

import argparse
import os
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from report import Report
from rich.console import Console
from rich.progress import Progress
from tasks import Transformer

from rmsprop_jax import rmsprop, round_params_stochastically


Shapes = list[tuple[int, ...]]
RATE = 1e-3
STATE_DTYPES = {"float32": None, "bfloat16": "bfloat16", "uint8": "uint8"}
# Bytes of a bfloat16 parameter and its state.
WITH_BFLOAT16 = {
    f"{name} bytes": optax.chain(rmsprop(RATE, state_dtype="uint8"), round_params_stochastically(keep_rest))
    for name, keep_rest in (("three", False), ("four", True))
}


# --- What is updated ----------------------------------------------------------------------------------


def resnet50() -> Shapes:
    """The 161 parameters of torchvision's ResNet-50, 25.6 million numbers."""
    shapes: Shapes = [(64, 3, 7, 7), (64,), (64,)]
    inputs = 64
    for width, blocks in zip((64, 128, 256, 512), (3, 4, 6, 3), strict=True):
        for block in range(blocks):
            for out, size, fan in ((width, 1, inputs), (width, 3, width), (4 * width, 1, width)):
                shapes += [(out, fan, size, size), (out,), (out,)]
            if block == 0:
                shapes += [(4 * width, inputs, 1, 1), (4 * width,), (4 * width,)]
            inputs = 4 * width
    return [*shapes, (1000, 2048), (1000,)]


def gpt2(layers: int = 12, width: int = 768, vocabulary: int = 50_257, context: int = 1024) -> Shapes:
    """The 148 parameters of GPT-2 small, 124 million numbers."""
    block: Shapes = [(width,), (width,), (width, 3 * width), (3 * width,), (width, width), (width,)]
    block += [(width,), (width,), (width, 4 * width), (4 * width,), (4 * width, width), (width,)]
    return [(vocabulary, width), (context, width), *(block * layers), (width,), (width,)]


LAYOUTS: dict[str, Callable[[], Shapes]] = {
    "16M": lambda: [(1 << 24,)],
    "160 x 100k": lambda: [(100_000,)] * 160,
    "1000 x 1k": lambda: [(1_000,)] * 1000,
    "16M, odd": lambda: [(15_999_989,)],
    "160 x 100k, odd": lambda: [(100_003,)] * 160,
    "ResNet-50": resnet50,
    "GPT-2 small": gpt2,
}


# --- Who updates it -----------------------------------------------------------------------------------


class Candidate(NamedTuple):
    """One that takes part: `step` updates in place, `wait` until it is done."""

    step: Callable[[], None]
    wait: Callable[[], None]
    state_bytes: int
    temporary_bytes: int | None = None  # beyond parameters, gradients and state
    trace_seconds: float | None = None  # Python and lowering
    compile_seconds: float | None = None
    instructions: int | None = None  # of XLA in the compiled program


def of_jax(tx: optax.GradientTransformation, shapes: Shapes, grads: list[jax.Array]) -> Candidate:
    """Compiled with parameters and state donated."""

    def update(params, state, grads):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    params = [jnp.ones(shape, grad.dtype) for shape, grad in zip(shapes, grads, strict=True)]
    held = [params, tx.init(params)]
    start = time.perf_counter()
    lowered = jax.jit(update, donate_argnums=(0, 1)).lower(*held, grads)
    middle = time.perf_counter()
    program = lowered.compile()
    end = time.perf_counter()

    def step():
        held[:] = program(*held, grads)

    return Candidate(
        step,
        lambda: jax.block_until_ready(held),
        state_bytes=sum(x.nbytes for x in jax.tree.leaves(held[1])),
        temporary_bytes=program.memory_analysis().temp_size_in_bytes,
        trace_seconds=middle - start,
        compile_seconds=end - middle,
        instructions=program.as_text().count(" = "),
    )


def makers(layout: str, shapes: Shapes) -> dict[str, Callable[[], Candidate]]:
    keys = jax.random.split(jax.random.key(0), len(shapes))
    grads = [jax.random.normal(key, shape) for key, shape in zip(keys, shapes, strict=True)]
    result = {"optax": lambda: of_jax(optax.rmsprop(RATE), shapes, grads)}
    for name, kind in STATE_DTYPES.items():
        result[f"ours {name}"] = lambda kind=kind: of_jax(rmsprop(RATE, state_dtype=kind), shapes, grads)
    if layout in ("16M", "ResNet-50", "GPT-2 small"):
        halves = [grad.astype(jnp.bfloat16) for grad in grads]
        for name, tx in WITH_BFLOAT16.items():
            result[f"ours {name}"] = lambda tx=tx: of_jax(tx, shapes, halves)
    return result


# --- Measuring ----------------------------------------------------------------------------------------


def race(candidates: dict[Any, Candidate], seconds: float, tick: Callable[[], None]) -> dict[Any, np.ndarray]:
    """Seconds per update of each, by round; as many rounds as fit, at least 5 and at most 60."""
    inner, once = {}, 0.0
    for name, candidate in candidates.items():
        for _ in range(2):  # the second one is without the page faults of the first
            start = time.perf_counter()
            candidate.step()
            candidate.wait()
            elapsed = time.perf_counter() - start
        inner[name] = max(1, min(50, round(0.02 / elapsed)))
        once += inner[name] * elapsed
    times: dict[str, list[float]] = {name: [] for name in candidates}
    names = list(candidates)
    rounds = int(np.clip(seconds / once, 5, 60))
    for i in range(rounds):
        for name in names[i % len(names) :] + names[: i % len(names)]:
            candidate = candidates[name]
            start = time.perf_counter()
            for _ in range(inner[name]):
                candidate.step()
            candidate.wait()
            times[name].append((time.perf_counter() - start) / inner[name])
        tick()
    return {name: np.array(series) for name, series in times.items()}


def updates(layout: str, seconds: float, tick: Callable[[], None]) -> list[dict[str, Any]]:
    """One layout: a row per candidate."""
    shapes = LAYOUTS[layout]()
    size = sum(int(np.prod(shape)) for shape in shapes)
    candidates = {name: make() for name, make in makers(layout, shapes).items()}
    times = race(candidates, seconds, tick)
    rows = []
    for name, candidate in candidates.items():
        rows.append(
            {
                "layout": layout,
                "parameters": size,
                "candidate": name,
                "milliseconds": 1e3 * float(np.median(times[name])),
                **spread("ratio", "quartiles", times[name] / times["optax"]),
                "state bytes per parameter": candidate.state_bytes / size,
                "temporary bytes per parameter": per(candidate.temporary_bytes, size),
                "rounds": len(times[name]),
                "trace seconds": candidate.trace_seconds,
                "compile seconds": candidate.compile_seconds,
                "instructions": candidate.instructions,
                "instructions ratio": per(candidate.instructions, candidates["optax"].instructions),
            }
        )
    return rows


def spread(name: str, quartiles: str, series: np.ndarray) -> dict[str, Any]:
    low, median, high = (float(x) for x in np.quantile(series, (0.25, 0.5, 0.75)))
    return {name: median, quartiles: [low, high]}


def per(x: float | None, y: float | None) -> float | None:
    return None if x is None or not y else x / y


def outside_jit(seconds: float) -> list[dict[str, Any]]:
    """`tx.update` called from Python on 160 leaves of 1,000: what dispatch costs."""
    grads = [jax.random.normal(jax.random.key(i), (1000,)) for i in range(160)]

    def candidate(tx: Any) -> Candidate:
        held = [tx.init(grads)]

        def step():
            held[0] = tx.update(grads, held[0])[1]

        return Candidate(step, lambda: jax.block_until_ready(held), 0)

    times = race({"optax": candidate(optax.rmsprop(RATE)), "ours": candidate(rmsprop(RATE))}, seconds, lambda: None)
    ratio = float(np.median(times["optax"] / times["ours"]))
    rows = {name: 1e3 * float(np.median(series)) for name, series in times.items()}
    return [{"what": "update outside jit, 160 leaves", **rows, "times faster": ratio}]


# --- Whole training steps -----------------------------------------------------------------------------


class Model(NamedTuple):
    """A loss of parameters and a batch, and their shapes."""

    loss: Callable[[Any, Any], jax.Array]
    params: Any
    batch: Any


def model(make: Callable[[nnx.Rngs], nnx.Module], inputs: Any, labels: tuple[int, ...]) -> Model:
    graph = nnx.eval_shape(lambda: nnx.split(make(nnx.Rngs(0)), nnx.Param)[0])
    params = jax.eval_shape(lambda: nnx.state(make(nnx.Rngs(0)), nnx.Param))

    def loss(params, batch):
        logits = nnx.merge(graph, params)(batch[0]).astype(jnp.float32)
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch[1]).mean()

    return Model(loss, params, (inputs, jax.ShapeDtypeStruct(labels, jnp.int32)))


def language(vocabulary: int, length: int, width: int, heads: int, layers: int, batch: int) -> Model:
    def make(rngs):
        return Transformer(vocabulary, length, width, heads, layers, rngs)

    return model(make, jax.ShapeDtypeStruct((batch, length), jnp.int32), (batch, length))


# --- Reporting ----------------------------------------------------------------------------------------


def time_table(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Candidates by layouts: milliseconds, ratio to Optax, quartiles."""
    layouts = list(dict.fromkeys(row["layout"] for row in rows))
    table = []
    for name in dict.fromkeys(row["candidate"] for row in rows):
        line = {"update": name}
        for layout in layouts:
            row = next((r for r in rows if (r["candidate"], r["layout"]) == (name, layout)), None)
            quartiles = row and "{:.2f}-{:.2f}".format(*row["quartiles"])
            line[layout] = row and f"{row['milliseconds']:.3g} ms, {row['ratio']:.2f} ({quartiles})"
        table.append(line)
    return table


PARTS = ("updates", "outside jit")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), metavar="PART")
    parser.add_argument("--layouts", nargs="+", choices=LAYOUTS, default=list(LAYOUTS), metavar="LAYOUT")
    parser.add_argument("--seconds", type=float, default=30.0, help="of racing for each layout (default: 30)")
    parser.add_argument("--json", metavar="FILE", help="where to write every number")
    arguments = parser.parse_args()
    report = Report(arguments.json, "flax")
    report.facts["load"] = os.getloadavg()

    with Progress(console=Console(stderr=True), transient=True) as progress:
        bar = progress.add_task("racing", total=None)

        def tick() -> None:
            progress.advance(bar)

        for part in arguments.parts:
            progress.update(bar, description=part)
            if part == "updates":
                rows = []
                for layout in arguments.layouts:
                    progress.update(bar, description=layout)
                    rows += updates(layout, arguments.seconds, tick)
                    report.add("updates", rows, [])
                report.show(time_table(rows))
            else:
                report.add("outside jit", outside_jit(arguments.seconds / 4))


if __name__ == "__main__":
    main()
