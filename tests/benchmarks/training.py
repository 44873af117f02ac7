"""python tests/benchmarks/training.py: does it train as well with fewer bytes per parameter, and beside other optimizers?

The same starts and batches for all, and several seeds:

* `evidence`: a convolutional network on Fashion-MNIST, a character Transformer on Shakespeare, and a table of Shakespeare's
  words of which a batch touches one row in a hundred. Adam, Optax's RMSProp, and ours with each kind of parameters and each
  `state_dtype`; where they are installed also PyTorch's RMSprop and bitsandbytes' with 8 bits, fed with the same gradients.
* `weights`: how far from float32's weights the others end at rates from 1e-3 to 1e-6, and what averages of them are worth.
* `peers`: other optimizers, each at the best of its own rates: chosen with one seed, reported with three others.
* `batches`: the same for batches of 4, 16 and 64 sequences, with as many characters in all.
* `grid`: a small network on scikit-learn's digits and a small Transformer on Python's own documentation, over decays,
  variants and scales of the loss, with each `state_dtype`.

Prints Markdown; `--json FILE` keeps every run. All but `grid` go on with what the file has, also beside another process that
writes to it; `--minutes` bounds their time.
"""

import argparse
import contextlib
import functools
import importlib.util
import itertools
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from report import Report
from rich.progress import track
from tasks import digits, documentation, fashion, Problem, shakespeare, shakespeares_words
from tuning import cheapest, grid as rates_around, groups, Measurements, search, TimeIsUp, width

from rmsprop_jax import params_in_float32, rmsprop, round_params_stochastically


SEEDS = range(3)
DECAYS = (0.9, 0.99, 0.999)
SCALES = (1e-6, 1.0, 1e6)
VARIANTS = {"plain": {}, "momentum": {"momentum": 0.9}, "centered": {"centered": True}}
DTYPES = {"float32": None, "bfloat16": jnp.bfloat16, "uint8": jnp.uint8}
GRID = {"convnet": digits, "transformer": documentation}
EVIDENCE = {
    "Fashion-MNIST": (fashion, (2e-3,)),
    "Shakespeare": (shakespeare, (1e-3, 1e-4)),
    "Shakespeare's words": (shakespeares_words, (1e-3,)),
}


# --- A run ------------------------------------------------------------------------------------------------


class Candidate(NamedTuple):
    """An optimizer and the parameters that it trains."""

    optimizer: str
    params: str  # the dtype, and after a comma how they are rounded
    make: Callable[[Any], optax.GradientTransformation] | str  # from a schedule; or the name of a class of `torch_run`
    state: str = "float32"
    evaluated: Callable[[Any, Any], Any] = lambda params, state: params  # the parameters that are tested


class Trained(NamedTuple):
    """The end of a run."""

    params: Any
    state: Any
    averages: list[Any]
    losses: list[jax.Array]
    seconds: list[float]


def in_float32(params: Any) -> Any:
    return jax.tree.map(lambda x: x.astype(jnp.float32), params)


def dtype_of(candidate: Candidate) -> Any:
    return jnp.dtype(candidate.params.partition(",")[0])


def trainer(
    problem: Problem, candidate: Candidate, averaged: Iterable[Callable[[Any, Any], Any]] = (), start: Any = jnp.float32
) -> Callable[[int, float], Trained]:
    """A function from the seed and the rate to the end of a run. Compiled once.

    `averaged` are functions of the parameters and the state. The run keeps a moving average of the values of each. The first parameters
    are rounded to the dtype `start`.
    """
    averaged = list(averaged)

    def optimizer(rate):
        return candidate.make(lambda count: rate * optax.cosine_decay_schedule(1.0, problem.steps)(count))

    def loss(params, batch):  # arithmetic in float32
        return problem.loss(in_float32(params), batch)

    @functools.partial(jax.jit, donate_argnums=(0, 1, 2))
    def step(params, state, averages, key, rate):
        (value, _), grads = jax.value_and_grad(loss, has_aux=True)(params, problem.batch(key))
        updates, state = optimizer(rate).update(grads, state, params)
        params = optax.apply_updates(params, updates)
        averages = [
            jax.tree.map(lambda a, x: 0.99 * a + 0.01 * x.astype(a.dtype), average, view(params, state))
            for average, view in zip(averages, averaged, strict=True)
        ]
        return params, state, averages, value

    def run(seed, rate):
        params = jax.tree.map(lambda x: x.astype(start).astype(dtype_of(candidate)), problem.init(jax.random.key(seed)))
        state = optimizer(rate).init(params)
        averages = [jax.tree.map(jnp.copy, in_float32(params)) for _ in averaged]
        losses, seconds = [], []
        for key in keys_of(problem, seed):
            begin = time.perf_counter()
            params, state, averages, value = step(params, state, averages, key, jnp.float32(rate))
            value.block_until_ready()
            seconds.append(time.perf_counter() - begin)
            losses.append(value)
        return Trained(params, state, averages, losses, seconds)

    return run


def measured(problem: Problem, candidate: Candidate) -> Callable[[int, float], dict[str, Any]]:
    """A function from the seed and the rate to the numbers of a run. Compiled at the first call."""
    if isinstance(candidate.make, str):
        return torch_run(problem, candidate.make)
    run, test = trainer(problem, candidate), tester(problem)

    def numbers(seed, rate):
        end = run(seed, rate)
        memory = nbytes((end.params, end.state))
        return result(test(candidate.evaluated(end.params, end.state)), end, memory)

    return numbers


def tester(problem: Problem) -> Callable[[Any], dict[str, float]]:
    """A function from parameters to loss and accuracy on the test set."""
    loss = jax.jit(lambda params, batch: problem.loss(in_float32(params), batch))
    parts = len(jax.tree.leaves(problem.test)[0])

    def test(params):
        tests = [loss(params, jax.tree.map(lambda x, i=i: x[i], problem.test)) for i in range(parts)]
        return {name: float(np.mean([t[i] for t in tests])) for i, name in enumerate(("loss", "accuracy"))}

    return test


def result(tested: dict[str, float], end: Trained, memory: int) -> dict[str, Any]:
    count = sum(x.size for x in jax.tree.leaves(end.params))
    losses = np.array(end.losses, float)
    points = len(losses) // 20 * 20
    return {
        "bytes per parameter": round(memory / count, 2),
        **tested,
        "milliseconds": 1e3 * float(np.median(end.seconds)),
        "curve": [round(float(x), 5) for x in losses[len(losses) - points :].reshape(20, -1).mean(1)],
    }


def keys_of(problem: Problem, seed: int) -> jax.Array:
    return jax.random.split(jax.random.fold_in(jax.random.key(seed), 1), problem.steps)


def nbytes(tree: Any) -> int:
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


def torch_run(problem: Problem, path: str) -> Callable[[int, float], dict[str, Any]]:
    """An optimizer of PyTorch's on the same gradients. Its time is that of the optimizer's step and the gradients."""
    import torch

    module, _, name = path.rpartition(".")
    make = getattr(importlib.import_module(module), name)
    schedule = optax.cosine_decay_schedule(1.0, problem.steps)
    grad = jax.jit(lambda p, key: jax.value_and_grad(problem.loss, has_aux=True)(p, problem.batch(key)))
    test = tester(problem)

    def numbers(seed, rate):
        leaves, treedef = jax.tree.flatten(problem.init(jax.random.key(seed)))
        tensors = [torch.tensor(np.asarray(x), requires_grad=True) for x in leaves]
        optimizer = make(tensors, lr=rate, alpha=0.99, eps=1e-8)

        def tree():
            return treedef.unflatten([jnp.asarray(t.detach().numpy().copy()) for t in tensors])

        losses, seconds = [], []
        for t, key in enumerate(keys_of(problem, seed)):
            begin = time.perf_counter()
            (value, _), grads = grad(tree(), key)
            for tensor, g in zip(tensors, jax.tree.leaves(grads), strict=True):
                tensor.grad = torch.tensor(np.asarray(g))
            optimizer.param_groups[0]["lr"] = rate * float(schedule(t))
            optimizer.step()
            seconds.append(time.perf_counter() - begin)
            losses.append(value)
        # qmap is one table for all parameters; everything else belongs to one.
        slots = [(k, v) for s in optimizer.state.values() for k, v in s.items() if torch.is_tensor(v) and v.dim()]
        memory = sum(v.numel() * v.element_size() for k, v in slots if not k.startswith("qmap"))
        params = tree()
        end = Trained(params, None, [], losses, seconds)
        return result(test(params), end, memory + sum(4 * t.numel() for t in tensors))

    return numbers


# --- Evidence ---------------------------------------------------------------------------------------------

NEAREST, STOCHASTIC, REST = "bfloat16, to nearest", "bfloat16, stochastic", "bfloat16, with a rest"


def ours(params: str, state: str, decay: float = 0.99, **options: Any) -> Candidate:
    """Our RMSProp with a kind of parameters and of state."""

    def make(rate):
        tx = rmsprop(rate, decay, state_dtype=DTYPES[state], **options)
        if params in (STOCHASTIC, REST):
            return optax.chain(tx, round_params_stochastically(keep_rest=params == REST))
        return tx

    return Candidate("rmsprop", params, make, state)


def candidates() -> list[Candidate]:
    result = [
        Candidate("Adam", "float32", optax.adam),
        Candidate("optax.rmsprop", "float32", lambda rate: optax.rmsprop(rate, 0.99)),
    ]
    result += [ours("float32", state) for state in DTYPES]
    result += [ours(*x) for x in itertools.product((NEAREST, STOCHASTIC, REST), ("float32", "uint8"))]
    if importlib.util.find_spec("torch"):
        result.append(Candidate("torch.optim.RMSprop", "float32", "torch.optim.RMSprop"))
        if importlib.util.find_spec("bitsandbytes"):
            result.append(Candidate("bitsandbytes RMSprop8bit", "float32", "bitsandbytes.optim.RMSprop8bit", "uint8"))
    return result


EVIDENCE_KEYS = ("problem", "learning rate", "optimizer", "parameters", "state", "seed")


def evidence(
    measurements: Measurements, name: str, make: Callable[[], Problem], rates: Iterable[float] = (1e-3,)
) -> None:
    """Every run, seed by seed, so that all candidates are measured under the same load."""
    problem = make()
    runs = [(candidate, measured(problem, candidate)) for candidate in candidates()]
    for seed, rate, (candidate, run) in track(list(itertools.product(SEEDS, rates, runs)), name):
        setting = {"problem": name, "learning rate": rate, "optimizer": candidate.optimizer}
        setting |= {"parameters": candidate.params, "state": candidate.state, "seed": seed}
        measurements.get(setting, functools.partial(run, seed, rate))


def evidence_table(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Mean and standard deviation over the seeds, and the difference from float32, seed by seed."""
    table = []
    keys = ("problem", "learning rate", "optimizer", "parameters", "bytes per parameter")
    order = {name: i for i, name in enumerate(EVIDENCE)}
    for setting, mine in sorted(groups(rows, keys), key=lambda x: (order.get(x[0][0], -1), -float(x[0][1]))):
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


# --- Weights ----------------------------------------------------------------------------------------------

SMALL_RATES = (1e-3, 1e-4, 1e-5, 1e-6)
WEIGHTS_KEYS = ("problem", "learning rate", "parameters", "state", "seed")
WEIGHTS = {"Shakespeare": (functools.partial(shakespeare, steps=600),)}
# Losses of these are reported minus that of float32's network.
VIEWS = ("network", "24 bits", "average of the network", "average of the 24 bits")


def compared() -> list[Candidate]:
    return [
        ours("float32", "float32"),
        ours("float32", "uint8"),
        ours(NEAREST, "uint8"),
        ours(STOCHASTIC, "uint8"),
        ours(REST, "float32"),
        ours(REST, "uint8"),
    ]


def weights(measurements: Measurements, name: str, make: Callable[[], Problem]) -> None:
    """Runs that begin with bfloat16 numbers, and end as near to float32's weights as their bytes allow."""
    problem = make()
    averaged = (lambda params, state: in_float32(params), params_in_float32)
    runs = [(c, trainer(problem, c, averaged, start=jnp.bfloat16)) for c in compared()]
    test = tester(problem)
    for rate, seed in track(list(itertools.product(SMALL_RATES, SEEDS[:2])), "weights"):
        reference = functools.cache(lambda rate=rate, seed=seed: runs[0][1](seed, rate).params)
        begin = jax.tree.map(lambda x: x.astype(jnp.bfloat16).astype(x.dtype), problem.init(jax.random.key(seed)))

        def measure(run: Callable[[int, float], Trained], rate=rate, seed=seed, reference=reference, begin=begin):
            end = run(seed, rate)
            wide = params_in_float32(end.params, end.state)
            losses = [test(x)["loss"] for x in (end.params, wide, *end.averages)]
            travelled, apart = distance(reference(), begin), distance(wide, reference())
            return {
                "bytes per parameter": round(nbytes((end.params, end.state)) / nbytes(in_float32(end.params)) * 4, 2),
                "distance": apart / travelled,
                **dict(zip(VIEWS, losses, strict=True)),
            }

        for candidate, run in runs:
            setting = {"problem": name, "learning rate": rate, "parameters": candidate.params}
            setting |= {"state": candidate.state, "seed": seed}
            measurements.get(setting, functools.partial(measure, run))


def distance(a: Any, b: Any) -> float:
    return float(optax.tree.norm(jax.tree.map(jnp.subtract, a, b)))


def weights_table(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Means over the seeds; losses minus that of float32's network with the same seed."""
    reference = {
        (r["learning rate"], r["seed"]): r["network"] for r in rows if r["parameters"] == r["state"] == "float32"
    }
    keys = ("learning rate", "parameters", "bytes per parameter")
    table = []
    for setting, mine in sorted(groups(rows, keys), key=lambda x: -float(x[0][0])):
        line = dict(zip(keys, setting, strict=True)) | {"distance": float(np.mean([r["distance"] for r in mine]))}
        for view in VIEWS:
            gaps = [r[view] - reference[r["learning rate"], r["seed"]] for r in mine]
            line[view] = f"{np.mean(gaps):+.4f}"
        table.append(line)
    return table


# --- Peers ------------------------------------------------------------------------------------------------


class Peer(NamedTuple):
    """A candidate under its name in the table, and the center of its grid of rates."""

    name: str
    candidate: Candidate
    rate: float = 1e-3


def peers() -> list[Peer]:
    def optax_(name: str, make: Callable[[Any], Any], rate: float = 1e-3, **options: Any) -> Peer:
        return Peer(name, Candidate(name, "float32", make, **options), rate)

    def schedule_free(rate):
        base = rmsprop(rate, 0.999, bias_correction=True, eps_in_sqrt=False)
        return optax.contrib.schedule_free(base, learning_rate=rate)

    def constant(make):  # without a schedule
        return lambda rate: make(rate(0))

    return [
        optax_("Adam", optax.adam),
        optax_("Adam, b1=0", lambda rate: optax.adam(rate, b1=0.0)),
        optax_("Adafactor", lambda rate: optax.adafactor(rate, min_dim_size_to_factor=32), 1e-2),
        optax_("Lion", lambda rate: optax.lion(rate, weight_decay=0.0), 3e-4),
        optax_("SM3", lambda rate: optax.chain(optax.scale_by_sm3(), optax.scale_by_learning_rate(rate)), 0.1),
        optax_(
            "schedule-free RMSProp",
            constant(schedule_free),
            3e-3,
            evaluated=lambda params, state: optax.contrib.schedule_free_eval_params(state, params),
        ),
        optax_("Muon", lambda rate: optax.contrib.muon(rate), 1e-2),
        Peer("RMSProp", ours("float32", "float32")),
        Peer("RMSProp, momentum .9", ours("float32", "float32", momentum=0.9), 1e-4),
        Peer("RMSProp, centered", ours("float32", "float32", centered=True)),
        Peer("RMSProp, bias correction", ours("float32", "float32", bias_correction=True)),
        Peer("RMSProp, ν in one byte", ours("float32", "uint8")),
        Peer("RMSProp, four bytes", ours(REST, "uint8")),
        Peer("RMSProp, three bytes", ours(STOCHASTIC, "uint8")),
        Peer("RMSProp, four bytes, bias correction", ours(REST, "uint8", bias_correction=True)),
        Peer("RMSProp, three bytes, bias correction", ours(STOCHASTIC, "uint8", bias_correction=True)),
    ]


PEERS = {
    "Shakespeare": (functools.partial(shakespeare, steps=1000), peers, 5),
    "Fashion-MNIST": (functools.partial(fashion, 235), peers, 5),
}
PEER_KEYS = ("problem", "optimizer", "learning rate", "seed")


def tune_all(
    measurements: Measurements, name: str, make: Callable[[], Problem], everyone: Callable[[], list[Peer]], count: int
) -> None:
    problem = make()
    for peer in track(everyone(), name):
        tune(measurements, name, problem, peer, count)


def tune(measurements: Measurements, name: str, problem: Problem, peer: Peer, count: int) -> None:
    """Seed 0 chooses the rate from a grid of so many or more, and three others report on it."""
    run = functools.cache(lambda: measured(problem, peer.candidate))

    def loss(rate: float, seed: int = 0) -> float:
        setting = {"problem": name, "optimizer": peer.name, "learning rate": rate, "seed": seed}
        return measurements.get(setting, lambda: run()(seed, rate))["loss"]

    best = cheapest(search(rates_around(peer.rate, count), loss))
    for seed in range(1, 4):
        loss(best, seed)


def peers_table(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each optimizer at its best rate; from the most bytes to the fewest."""
    return [
        {
            "problem": name,
            "optimizer": optimizer,
            "bytes per parameter": fresh[0]["bytes per parameter"],
            "best rate": best,
            "loss": spread([r["loss"] for r in fresh]),
            "accuracy": spread([r["accuracy"] for r in fresh]),
            "rates within 10 %": f"x {width(costs)}",
            "ms per step": float(np.median([r["milliseconds"] for r in fresh])),
        }
        for (name, optimizer), best, costs, fresh in tuned(rows)
    ]


def tuned(rows: list[dict[str, Any]]) -> Iterator[tuple[tuple[Any, ...], float, dict[float, float], list[Any]]]:
    """Problem and optimizer, best rate, the loss at each rate, and the other seeds at the best."""
    for names, mine in groups(rows, ("problem", "optimizer")):
        costs = {r["learning rate"]: r["loss"] for r in mine if r["seed"] == 0}
        best = cheapest(costs)
        fresh = [r for r in mine if r["seed"] > 0 and r["learning rate"] == best]
        if fresh:
            yield names, best, costs, fresh


# --- Batch sizes ------------------------------------------------------------------------------------------

SEQUENCES = 4000  # in all


def batch_peers(size: int) -> list[Peer]:
    """Averages look back over as many sequences at each size: half-lives are those of batches of 16."""
    longer = size / 16

    def adam(rate):
        return optax.adam(rate, 0.9**longer, 0.999**longer)

    return [
        Peer("Adam", Candidate("Adam", "float32", adam)),
        Peer(
            "Adafactor",
            Candidate("Adafactor", "float32", lambda rate: optax.adafactor(rate, min_dim_size_to_factor=32)),
            1e-2,
        ),
        Peer("RMSProp, bias correction", ours("float32", "float32", 0.99**longer, bias_correction=True)),
        Peer("RMSProp, three bytes, bias correction", ours(STOCHASTIC, "uint8", 0.99**longer, bias_correction=True)),
    ]


BATCHES = {
    f"{size} sequences": (
        functools.partial(shakespeare, size, SEQUENCES // size),
        functools.partial(batch_peers, size),
        3,
    )
    for size in (4, 16, 64)
}


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


# --- Reporting --------------------------------------------------------------------------------------------


class Study(NamedTuple):
    """What is measured on each problem, and the table of it."""

    problems: dict[str, tuple[Any, ...]]  # the arguments of `run` after the name
    keys: tuple[str, ...]  # what tells its rows apart
    run: Callable[..., None]
    table: Callable[[list[dict[str, Any]]], list[dict[str, Any]]]


STUDIES = {
    "evidence": Study(EVIDENCE, EVIDENCE_KEYS, evidence, evidence_table),
    "weights": Study(WEIGHTS, WEIGHTS_KEYS, weights, weights_table),
    "peers": Study(PEERS, PEER_KEYS, tune_all, peers_table),
    "batches": Study(BATCHES, PEER_KEYS, tune_all, peers_table),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=[*STUDIES, "grid"])
    parser.add_argument("--problems", nargs="+", metavar="NAME", help="default: all")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS), help="of the grid")
    parser.add_argument("--minutes", type=float, help="begin no run after so many (default: no limit)")
    parser.add_argument("--json", metavar="FILE", help="where to write every run")
    arguments = parser.parse_args()
    problems = GRID if arguments.what == "grid" else STUDIES[arguments.what].problems
    names = arguments.problems or list(problems)
    if unknown := set(names) - set(problems):
        parser.error(f"--problems {' '.join(unknown)}: allowed are {', '.join(problems)}")
    report = Report(arguments.json, "flax", "torch", "bitsandbytes")
    if arguments.what == "grid":
        rows = grid(names, arguments.variants)
        report.add("grid", rows, grid_table(rows))
        return
    study = STUDIES[arguments.what]
    measurements = Measurements(report, arguments.what, study.keys, arguments.minutes)
    with contextlib.suppress(TimeIsUp):
        for name in names:
            study.run(measurements, name, *study.problems[name])
    report.show(study.table(measurements.rows()))


if __name__ == "__main__":
    main()
