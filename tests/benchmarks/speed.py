"""python tests/benchmarks/speed.py: time and memory of one update, ours beside the others', in the same run.

An update is `tx.update` and `optax.apply_updates` in one compiled step with parameters and state donated; for PyTorch
`optimizer.step()`, for Keras `stateless_apply` on the JAX backend. Candidates take turns, round by round, in an order
that changes; a ratio is the median over the rounds of a candidate's time divided by Optax's in that round, followed by
the quartiles. Three and four bytes have bfloat16 parameters and gradients, and their ratio is to Optax's float32.
Tracing (with lowering) and compiling also take turns, each time with JAX's caches cleared; a first call
takes both. The more instructions the compiled program has, the longer that takes; their number has no noise. The floor is
the measured time of a program that reads four arrays and writes one: 20 bytes a parameter, what RMSProp in float32 must
move. Takes torch, keras and bitsandbytes along where they are.

Whole training steps (forward, backward, update) show what share of a step the update is, and the memory of a step of
a model with 100 million parameters is read from the compiled program.

Prints Markdown; `--json FILE` keeps every number. `--parts` picks what is measured, `--layouts` and `--seconds` bound the
time. On a GPU as on a CPU.
"""

import argparse
import functools
import os
import time
from collections.abc import Callable
from typing import Any, NamedTuple


os.environ.setdefault("KERAS_BACKEND", "jax")
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # PyTorch wants some of the GPU's memory, too

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from report import is_here, Report
from rich.console import Console
from rich.progress import Progress
from tasks import FashionNet, Transformer

from rmsprop_jax import rmsprop, round_params_stochastically


Shapes = list[tuple[int, ...]]
RATE = 1e-3
VARIANTS: dict[str, dict[str, Any]] = {"plain": {}, "momentum": {"momentum": 0.9}, "centered": {"centered": True}}
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
# Where tracing and compiling are raced as well.
PREPARED = ("1000 x 1k", "ResNet-50")
SECONDS = ("trace seconds", "compile seconds")


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
    prepare: Callable[[], tuple[float, float, Any]] | None = None  # traces and compiles anew: both times, the program


def of_jax(tx: optax.GradientTransformation, shapes: Shapes, grads: list[jax.Array]) -> Candidate:
    def update(params, state, grads):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    params = [jnp.ones(shape, grad.dtype) for shape, grad in zip(shapes, grads, strict=True)]
    state = tx.init(params)
    return compiled(update, params, state, grads, sum(x.nbytes for x in jax.tree.leaves(state)))


def of_keras(shapes: Shapes, grads: list[jax.Array]) -> Candidate:
    import keras

    variables = [keras.Variable(np.ones(shape, np.float32)) for shape in shapes]
    optimizer = keras.optimizers.RMSprop(RATE)
    optimizer.build(variables)

    def update(params, state, grads):
        return optimizer.stateless_apply(state, grads, params)

    params, state = [v.value for v in variables], [v.value for v in optimizer.variables]
    return compiled(update, params, state, grads, sum(x.nbytes for x in state))


def compiled(update: Callable[..., Any], params: Any, state: Any, grads: Any, state_bytes: int) -> Candidate:
    """Compiled with parameters and state donated."""
    arguments = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), (params, state, grads))

    def prepare():
        jax.clear_caches()  # as in a new process
        function = jax.jit(lambda *arguments: update(*arguments), donate_argnums=(0, 1))
        start = time.perf_counter()
        lowered = function.lower(*arguments)
        middle = time.perf_counter()
        program = lowered.compile()
        return middle - start, time.perf_counter() - middle, program

    trace, compile_, program = prepare()
    held = [params, state]

    def step():
        held[:] = program(*held, grads)

    temporary = program.memory_analysis().temp_size_in_bytes
    instructions = program.as_text().count(" = ")
    return Candidate(
        step, lambda: jax.block_until_ready(held), state_bytes, temporary, trace, compile_, instructions, prepare
    )


def of_torch(how: str, shapes: Shapes) -> Candidate:
    import torch

    device = "cuda" if torch.cuda.is_available() and jax.default_backend() == "gpu" else "cpu"
    params = [torch.ones(shape, device=device, requires_grad=True) for shape in shapes]
    for p in params:
        p.grad = torch.randn(p.shape, device=device)
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    if how == "bitsandbytes":
        import bitsandbytes

        optimizer = bitsandbytes.optim.RMSprop(params, lr=RATE)
    else:
        optimizer = torch.optim.RMSprop(params, lr=RATE, foreach=how != "for-loop")
    step = torch.compile(optimizer.step) if how == "torch.compile" else optimizer.step
    start = time.perf_counter()
    step()
    wait()
    seconds = time.perf_counter() - start if how == "torch.compile" else None
    tensors = [v for s in optimizer.state.values() for v in s.values() if torch.is_tensor(v) and v.dim()]
    return Candidate(step, wait, sum(t.numel() * t.element_size() for t in tensors), compile_seconds=seconds)


def of_floor(shapes: Shapes) -> Candidate:
    """Reads four arrays and writes one of them: 20 bytes a parameter. One array, whatever the layout."""
    size = sum(int(np.prod(shape)) for shape in shapes)
    a, b, c, d = (jnp.full(size, x) for x in (1.0, 1e-3, 1e-4, 1e-5))
    stream = jax.jit(lambda a, b, c, d: a + (b + (c + d)), donate_argnums=0)
    held = [stream(a, b, c, d)]

    def step():
        held[0] = stream(held[0], b, c, d)

    return Candidate(step, lambda: held[0].block_until_ready(), 0)


def makers(layout: str, shapes: Shapes) -> dict[str, Callable[[], Candidate]]:
    keys = jax.random.split(jax.random.key(0), len(shapes))
    grads = [jax.random.normal(key, shape) for key, shape in zip(keys, shapes, strict=True)]
    result: dict[str, Callable[[], Candidate]] = {"floor": lambda: of_floor(shapes)}
    for variant, options in VARIANTS.items():
        if variant != "plain" and layout not in ("16M", "ResNet-50"):
            continue  # the odd sizes are there for the plain update alone
        result[f"optax, {variant}"] = lambda options=options: of_jax(optax.rmsprop(RATE, **options), shapes, grads)
        for name, kind in STATE_DTYPES.items():
            result[f"ours {name}, {variant}"] = lambda options=options, kind=kind: of_jax(
                rmsprop(RATE, **options, state_dtype=kind), shapes, grads
            )
    if layout in ("16M", "ResNet-50", "GPT-2 small"):
        halves = [grad.astype(jnp.bfloat16) for grad in grads]
        for name, tx in WITH_BFLOAT16.items():
            result[f"ours {name}"] = lambda tx=tx: of_jax(tx, shapes, halves)
    if is_here("torch"):
        hows = ["for-loop", "foreach", *(["torch.compile"] if len(shapes) < 200 else [])]
        hows += ["bitsandbytes"] if is_here("bitsandbytes") else []
        for how in hows:
            label = how if how in ("torch.compile", "bitsandbytes") else f"torch {how}"
            result[f"{label}, plain"] = lambda how=how: of_torch(how, shapes)
    if is_here("keras"):
        result["keras on jax, plain"] = lambda: of_keras(shapes, grads)
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


def preparations(candidates: dict[str, Candidate], rounds: int, tick: Callable[[], None]) -> dict[str, np.ndarray]:
    """Seconds to trace and to compile, by round, of those that JAX compiles."""
    times: dict[str, list[tuple[float, float]]] = {name: [] for name, c in candidates.items() if c.prepare}
    names = list(times)
    for i in range(rounds):
        for name in names[i % len(names) :] + names[: i % len(names)]:
            prepare = candidates[name].prepare
            assert prepare is not None
            times[name].append(prepare()[:2])
            tick()
    return {name: np.array(series) for name, series in times.items()}


def updates(layout: str, seconds: float, tick: Callable[[], None]) -> list[dict[str, Any]]:
    """One layout: a row per candidate."""
    shapes = LAYOUTS[layout]()
    size = sum(int(np.prod(shape)) for shape in shapes)
    candidates: dict[str, Candidate] = {}
    for name, make in makers(layout, shapes).items():
        try:
            candidates[name] = make()
        except Exception as error:
            print(f"{layout}: {name} does not run here: {type(error).__name__}: {str(error).splitlines()[0]}")
    times = race(candidates, seconds, tick)
    prepared = preparations(candidates, 5, tick) if layout in PREPARED else {}
    rows = []
    for name, candidate in candidates.items():
        reference = f"optax, {name.partition(', ')[2] or 'plain'}"
        rows.append(
            {
                "layout": layout,
                "parameters": size,
                "candidate": name,
                "milliseconds": 1e3 * float(np.median(times[name])),
                **spread("ratio", "quartiles", times[name] / times[reference]),
                "state bytes per parameter": candidate.state_bytes / size,
                "temporary bytes per parameter": per(candidate.temporary_bytes, size),
                "rounds": len(times[name]),
                "trace seconds": candidate.trace_seconds,
                "compile seconds": candidate.compile_seconds,
                "instructions": candidate.instructions,
                "instructions ratio": per(candidate.instructions, candidates[reference].instructions),
            }
        )
        if name in prepared:
            rows[-1] |= {key: float(np.median(x)) for key, x in zip(SECONDS, prepared[name].T, strict=True)}
            own, its = (np.column_stack([x, x.sum(1)]) for x in (prepared[name], prepared[reference]))
            for what, ratios in zip(("trace", "compile", "first call"), (own / its).T, strict=True):
                rows[-1] |= spread(f"{what} ratio", f"{what} quartiles", ratios)
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


def sweep(seconds: float, count: int = 256, steps: int = 100) -> list[dict[str, Any]]:
    """100 steps on 1,000 parameters for 256 learning rates and decays: one vmapped program, or one after another."""
    rates, decays = jnp.logspace(-4, -1, count), jnp.linspace(0.5, 0.999, count)
    curvature = jnp.logspace(-2, 2, 1000)

    def run(make: Callable[..., Any], rate: Any, decay: Any) -> jax.Array:
        tx = make(rate, decay)

        def step(carry, _):
            params, state = carry
            updates, state = tx.update(curvature * params, state)
            return (optax.apply_updates(params, updates), state), None

        params = jnp.ones(1000)
        (params, _), _ = jax.lax.scan(step, (params, tx.init(params)), None, length=steps)
        return jnp.sum(curvature * params**2)

    candidates = {}
    for name, make in {"optax": optax.rmsprop, "ours": rmsprop}.items():
        together, alone = (jax.jit(f) for f in (jax.vmap(functools.partial(run, make)), functools.partial(run, make)))
        for how, f in (
            ("vmap", lambda f=together: f(rates, decays)),
            ("loop", lambda f=alone: [f(rate, decay) for rate, decay in zip(rates, decays, strict=True)]),
        ):
            candidates[name, how] = Candidate(lambda f=f: jax.block_until_ready(f()), lambda: None, 0)
    times = {key: 1e3 * float(np.median(series)) for key, series in race(candidates, seconds, lambda: None).items()}
    return [
        {
            "sweep of 256": name,
            "vmap ms": times[name, "vmap"],
            "loop ms": times[name, "loop"],
            "times faster": times[name, "loop"] / times[name, "vmap"],
        }
        for name in ("optax", "ours")
    ]


def growth(seconds: float, tick: Callable[[], None]) -> list[dict[str, Any]]:
    """Time and compile time over leaves (of 1,000) and over parameters (in one leaf)."""
    rows = []
    counts = [(n, (1000,)) for n in (10, 100, 1000, 10_000)] + [(1, (10**k,)) for k in (4, 5, 6, 7, 8)]
    for leaves, shape in counts:
        grads = [jnp.ones(shape)] * leaves
        kinds = {"optax": optax.rmsprop(RATE)} | {
            f"ours {name}": rmsprop(RATE, state_dtype=kind) for name, kind in STATE_DTYPES.items() if name != "bfloat16"
        }
        if leaves == 10_000:
            del kinds["ours uint8"]  # three minutes to compile, and nothing new in it
        candidates = {name: of_jax(tx, [shape] * leaves, grads) for name, tx in kinds.items()}
        times = race(candidates, seconds / 4, tick)
        for name, candidate in candidates.items():
            rows.append({"leaves": leaves, "parameters": leaves * shape[0], "candidate": name})
            rows[-1] |= {"milliseconds": 1e3 * float(np.median(times[name]))}
            rows[-1] |= {"trace seconds": candidate.trace_seconds, "compile seconds": candidate.compile_seconds}
        del candidates
    return rows


def fits(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Cost per leaf and per parameter, least squares in relative error, and what they come to at scale."""
    result = []
    for name in dict.fromkeys(row["candidate"] for row in rows):
        mine = [row for row in rows if row["candidate"] == name]
        leaves, size, ms = (np.array([r[k] for r in mine], float) for k in ("leaves", "parameters", "milliseconds"))
        design = np.stack([leaves, size], 1) / ms[:, None]
        (per_leaf, per_parameter), *_ = np.linalg.lstsq(design, np.ones(len(ms)), rcond=None)
        many = [r for r in mine if r["leaves"] >= 100]
        slope = {
            k: np.polyfit(np.log([r["leaves"] for r in many]), np.log([r[k] for r in many]), 1)[0] for k in SECONDS
        }
        state = 1 if "uint8" in name else 4
        result.append(
            {
                "candidate": name,
                "us per leaf": 1e3 * per_leaf,
                "ns per parameter": 1e6 * per_parameter,
                "trace ~ leaves^": slope["trace seconds"],
                "compile ~ leaves^": slope["compile seconds"],
                "1e9 on 8 devices": at_scale(state, per_parameter, 1e9, 8),
                "1e12 on 1024 devices": at_scale(state, per_parameter, 1e12, 1024),
            }
        )
    return result


def at_scale(state_bytes: int, ms_per_parameter: float, parameters: float, devices: int) -> str:
    """State and time of an update for each device under FSDP: the update itself moves nothing between them."""
    share = parameters / devices
    return f"{state_bytes * share / 1e9:.3g} GB, {ms_per_parameter * share / 1e3:.2g} s"


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


class MLP(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        sizes = (784, 2048, 2048, 2048, 10)
        self.layers = nnx.List([nnx.Linear(m, n, rngs=rngs) for m, n in itertools.pairwise(sizes)])

    def __call__(self, x):
        for layer in self.layers[:-1]:
            x = nnx.relu(layer(x))
        return self.layers[-1](x)


def language(vocabulary: int, length: int, width: int, heads: int, layers: int, batch: int) -> Model:
    def make(rngs):
        return Transformer(vocabulary, length, width, heads, layers, rngs)

    return model(make, jax.ShapeDtypeStruct((batch, length), jnp.int32), (batch, length))


MODELS: dict[str, Callable[[], Model]] = {
    "MLP, 10 M": lambda: model(MLP, jax.ShapeDtypeStruct((128, 784), jnp.float32), (128,)),
    "convnet, .1 M": lambda: model(FashionNet, jax.ShapeDtypeStruct((128, 28, 28, 1), jnp.float32), (128,)),
    "Transformer, 3 M": lambda: language(10_000, 64, 128, 4, 2, batch=8),
}


class Trained(NamedTuple):
    """An optimizer, and the dtype of the parameters."""

    tx: optax.GradientTransformation | None
    params: Any = jnp.float32


def trained() -> dict[str, Trained]:
    result = {"gradients alone": Trained(None), "optax.adam": Trained(optax.adam(RATE))}
    result |= {"optax.rmsprop": Trained(optax.rmsprop(RATE))}
    result |= {f"ours, {name} state": Trained(rmsprop(RATE, state_dtype=kind)) for name, kind in STATE_DTYPES.items()}
    three, four = (Trained(tx, jnp.bfloat16) for tx in WITH_BFLOAT16.values())
    return result | {"ours, uint8 state, bfloat16 parameters": three, "ours, four bytes": four}


def training_step(model: Model, candidate: Trained, arithmetic: Any = jnp.float32) -> tuple[Any, Any]:
    """The compiled step with parameters and state donated, and the shapes of the parameters."""
    params = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, candidate.params), model.params)
    state = jax.eval_shape(candidate.tx.init, params) if candidate.tx else None

    def step(params, state, batch):
        def loss(params):
            return model.loss(jax.tree.map(lambda x: x.astype(arithmetic), params), batch)

        value, grads = jax.value_and_grad(loss)(params)
        if candidate.tx is None:
            return grads, state, value
        updates, state = candidate.tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, value

    donated = () if candidate.tx is None else (0, 1)
    return jax.jit(step, donate_argnums=donated).lower(params, state, model.batch).compile(), params


def training_steps(seconds: float, tick: Callable[[], None]) -> list[dict[str, Any]]:
    rows = []
    for name, make in MODELS.items():
        model = make()
        rng = np.random.default_rng(0)

        def values(x, rng=rng):
            if jnp.issubdtype(x.dtype, jnp.integer):
                return jnp.asarray(rng.integers(0, 10, x.shape), x.dtype)
            return jnp.asarray(rng.normal(size=x.shape) / max(x.shape[0], 1) ** 0.5, x.dtype)

        batch = jax.tree.map(values, model.batch)
        candidates = {}
        for label, candidate in trained().items():
            program, params = training_step(model, candidate)
            params = jax.tree.map(values, params)
            held = [params, candidate.tx.init(params) if candidate.tx else None, None]

            def step(program=program, held=held, batch=batch, update=candidate.tx is not None):
                new = program(held[0], held[1], batch)
                held[:] = new if update else [held[0], None, new]

            candidates[label] = Candidate(step, lambda held=held: jax.block_until_ready(held), 0)
        times = race(candidates, seconds, tick)
        for label, series in times.items():
            rows.append({"model": name, "step": label, "milliseconds": 1e3 * float(np.median(series))})
            rows[-1] |= spread("ratio", "quartiles", series / times["optax.rmsprop"])
            rows[-1] |= {"share": float(np.median(1 - times["gradients alone"] / series))}
    return rows


def steps_table(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Milliseconds, ratio to Optax's with quartiles, and the share of the step that the update takes."""
    models = list(dict.fromkeys(row["model"] for row in rows))
    table = []
    for label in dict.fromkeys(row["step"] for row in rows):
        line = {"training step": label}
        for name in models:
            row = next(r for r in rows if (r["model"], r["step"]) == (name, label))
            ratio = "{:.2f} ({:.2f}-{:.2f})".format(row["ratio"], *row["quartiles"])
            share = "" if label == "gradients alone" else f", update {100 * row['share']:.0f} %"
            line[name] = f"{row['milliseconds']:.3g} ms, {ratio}{share}"
        table.append(line)
    return table


def memory() -> list[dict[str, Any]]:
    """A whole step of a Transformer with 100 million parameters, in bytes per parameter, as the compiled program has it.

    Arithmetic is in the parameters' dtype. One sequence of 128 tokens, so that activations are small.
    """
    model = language(10_000, 128, 768, 12, 12, batch=1)
    size = sum(x.size for x in jax.tree.leaves(model.params))
    rows = []
    for label, candidate in trained().items():
        if candidate.tx is None:
            continue
        program, _ = training_step(model, candidate, candidate.params)
        analysis = program.memory_analysis()
        held = analysis.argument_size_in_bytes
        beside = analysis.temp_size_in_bytes + analysis.output_size_in_bytes - analysis.alias_size_in_bytes
        rows.append({"training step": label, "parameters": f"{size:,}", "parameters and state": held / size})
        rows[-1] |= {"gradients and all else": beside / size, "peak": (held + beside) / size}
        rows[-1] |= {"peak in MB": (held + beside) / 1e6}
    return rows


# --- Reporting ----------------------------------------------------------------------------------------


def time_table(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Candidates by layouts: milliseconds, ratio to Optax's same variant, quartiles."""
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


def cost_table(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """State, temporary memory, tracing and compiling, and both; torch.compile's is that of its first call."""
    table = []
    for row in rows:
        if row["compile seconds"] is None or row["layout"] not in PREPARED:
            continue
        keys = ("state bytes per parameter", "temporary bytes per parameter")
        line = {"update": row["candidate"], "layout": row["layout"], **{key: row[key] for key in keys}}
        for what in ("trace", "compile", "first call"):
            seconds, ratio = row.get(f"{what} seconds"), row.get(f"{what} ratio")
            text = [] if seconds is None else [f"{seconds:.3g} s"]
            text += [] if ratio is None else ["{:.2f} ({:.2f}-{:.2f})".format(ratio, *row[f"{what} quartiles"])]
            line[what] = ", ".join(text)
        line["instructions"] = row["instructions"] and f"{row['instructions']}, {row['instructions ratio']:.2f}"
        table.append(line)
    return table


PARTS = ("updates", "steps", "memory", "outside jit", "sweep", "growth")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS[:-1]), metavar="PART")
    parser.add_argument("--layouts", nargs="+", choices=LAYOUTS, default=list(LAYOUTS), metavar="LAYOUT")
    parser.add_argument("--seconds", type=float, default=30.0, help="of racing for each layout (default: 30)")
    parser.add_argument("--json", metavar="FILE", help="where to write every number")
    arguments = parser.parse_args()
    report = Report(arguments.json, "flax", "torch", "keras", "bitsandbytes")
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
                report.show(time_table(rows), cost_table(rows))
            elif part == "steps":
                rows = training_steps(arguments.seconds, tick)
                report.add("steps", rows, steps_table(rows))
            elif part == "memory":
                report.add("memory", memory())
            elif part == "outside jit":
                report.add("outside jit", outside_jit(arguments.seconds / 4))
            elif part == "sweep":
                report.add("sweep", sweep(arguments.seconds / 4))
            else:
                rows = growth(arguments.seconds, tick)
                report.add("growth", rows, rows, fits(rows))


if __name__ == "__main__":
    main()
