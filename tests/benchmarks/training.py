"""python tests/benchmarks/training.py: does it train as well with fewer bytes per parameter, and beside other optimizers?

The same starts and batches for all, and several seeds:

* `evidence`: a convolutional network on Fashion-MNIST, a character Transformer on Shakespeare, and a table of Shakespeare's
  words of which a batch touches one row in a hundred. Adam, Optax's RMSProp, and ours with each kind of parameters and each
  `state_dtype`.
* `weights`: how far from float32's weights the others end at rates from 1e-3 to 1e-6.
* `peers`: other optimizers, each at the best of its own rates: chosen with one seed, reported with three others.
* `batches`: the same for batches of 4, 16 and 64 sequences, with as many characters in all.

`--json FILE` keeps every run, and goes on with what the file has, also beside another process that writes to it; `--minutes`
bounds the time. `python tests/benchmarks/pages.py` makes the tables.
"""

import argparse
import contextlib
import functools
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
from tasks import fashion, Problem, shakespeare, shakespeares_words
from tuning import cheapest, grid, groups, Measurements, search, TimeIsUp

from rmsprop_jax import params_in_float32, rmsprop, round_params_stochastically


SEEDS = range(3)
DTYPES = {"float32": None, "bfloat16": jnp.bfloat16, "uint8": jnp.uint8}
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
    make: Callable[[Any], optax.GradientTransformation]  # from a schedule
    state: str = "float32"
    evaluated: Callable[[Any, Any], Any] = lambda params, state: params  # the parameters that are tested


class Trained(NamedTuple):
    """The end of a run."""

    params: Any
    state: Any
    losses: list[jax.Array]
    seconds: list[float]


def in_float32(params: Any) -> Any:
    return jax.tree.map(lambda x: x.astype(jnp.float32), params)


def dtype_of(candidate: Candidate) -> Any:
    return jnp.dtype(candidate.params.partition(",")[0])


def trainer(problem: Problem, candidate: Candidate, start: Any = jnp.float32) -> Callable[[int, float], Trained]:
    """A function from the seed and the rate to the end of a run. Compiled once.

    The first parameters are rounded to the dtype `start`.
    """

    def optimizer(rate):
        return candidate.make(lambda count: rate * optax.cosine_decay_schedule(1.0, problem.steps)(count))

    def loss(params, batch):  # arithmetic in float32
        return problem.loss(in_float32(params), batch)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params, state, key, rate):
        (value, _), grads = jax.value_and_grad(loss, has_aux=True)(params, problem.batch(key))
        updates, state = optimizer(rate).update(grads, state, params)
        return optax.apply_updates(params, updates), state, value

    def run(seed, rate):
        params = jax.tree.map(lambda x: x.astype(start).astype(dtype_of(candidate)), problem.init(jax.random.key(seed)))
        state = optimizer(rate).init(params)
        losses, seconds = [], []
        for key in keys_of(problem, seed):
            begin = time.perf_counter()
            params, state, value = step(params, state, key, jnp.float32(rate))
            value.block_until_ready()
            seconds.append(time.perf_counter() - begin)
            losses.append(value)
        return Trained(params, state, losses, seconds)

    return run


def measured(problem: Problem, candidate: Candidate) -> Callable[[int, float], dict[str, Any]]:
    """A function from the seed and the rate to the numbers of a run. Compiled at the first call."""
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


def gaps(rows: list[dict[str, Any]], mine: list[dict[str, Any]]) -> np.ndarray:
    """Test losses minus those of our RMSProp in float32 with the same problem, rate and seed."""
    reference = {
        (r["problem"], r["learning rate"], r["seed"]): r["loss"]
        for r in rows
        if (r["optimizer"], r["parameters"]) == ("rmsprop", "float32") and r["bytes per parameter"] > 7
    }
    return np.array([r["loss"] - reference[r["problem"], r["learning rate"], r["seed"]] for r in mine])


# --- Weights ----------------------------------------------------------------------------------------------

SMALL_RATES = (1e-3, 1e-4, 1e-5, 1e-6)
WEIGHTS_KEYS = ("problem", "learning rate", "parameters", "state", "seed")
WEIGHTS = {"Shakespeare": (functools.partial(shakespeare, steps=600),)}


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
    runs = [(c, trainer(problem, c, start=jnp.bfloat16)) for c in compared()]
    for rate, seed in track(list(itertools.product(SMALL_RATES, SEEDS[:2])), "weights"):
        reference = functools.cache(lambda rate=rate, seed=seed: runs[0][1](seed, rate).params)
        begin = jax.tree.map(lambda x: x.astype(jnp.bfloat16).astype(x.dtype), problem.init(jax.random.key(seed)))

        def measure(run: Callable[[int, float], Trained], rate=rate, seed=seed, reference=reference, begin=begin):
            end = run(seed, rate)
            wide = params_in_float32(end.params, end.state)
            travelled, apart = distance(reference(), begin), distance(wide, reference())
            return {
                "bytes per parameter": round(nbytes((end.params, end.state)) / nbytes(in_float32(end.params)) * 4, 2),
                "distance": apart / travelled,
            }

        for candidate, run in runs:
            setting = {"problem": name, "learning rate": rate, "parameters": candidate.params}
            setting |= {"state": candidate.state, "seed": seed}
            measurements.get(setting, functools.partial(measure, run))


def distance(a: Any, b: Any) -> float:
    return float(optax.tree.norm(jax.tree.map(jnp.subtract, a, b)))


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

    best = cheapest(search(grid(peer.rate, count), loss))
    for seed in range(1, 4):
        loss(best, seed)


def tuned(rows: list[dict[str, Any]]) -> Iterator[tuple[tuple[Any, ...], float, list[Any]]]:
    """Problem and optimizer, best rate, and the other seeds at the best."""
    for names, mine in groups(rows, ("problem", "optimizer")):
        costs = {r["learning rate"]: r["loss"] for r in mine if r["seed"] == 0}
        best = cheapest(costs)
        fresh = [r for r in mine if r["seed"] > 0 and r["learning rate"] == best]
        if fresh:
            yield names, best, fresh


# --- Batch sizes ------------------------------------------------------------------------------------------

SEQUENCES = 4000  # in all


def batch_peers(size: int) -> list[Peer]:
    """Averages look back over as many sequences at each size: half-lives are those of batches of 16."""
    longer = size / 16

    def adam(rate):
        return optax.adam(rate, 0.9**longer, 0.999**longer)

    return [
        Peer("Adam", Candidate("Adam", "float32", adam)),
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


# --- Reporting --------------------------------------------------------------------------------------------


class Study(NamedTuple):
    """What is measured on each problem."""

    problems: dict[str, tuple[Any, ...]]  # the arguments of `run` after the name
    keys: tuple[str, ...]  # what tells its rows apart
    run: Callable[..., None]


STUDIES = {
    "evidence": Study(EVIDENCE, EVIDENCE_KEYS, evidence),
    "weights": Study(WEIGHTS, WEIGHTS_KEYS, weights),
    "peers": Study(PEERS, PEER_KEYS, tune_all),
    "batches": Study(BATCHES, PEER_KEYS, tune_all),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=STUDIES)
    parser.add_argument("--problems", nargs="+", metavar="NAME", help="default: all")
    parser.add_argument("--minutes", type=float, help="begin no run after so many (default: no limit)")
    parser.add_argument("--json", metavar="FILE", help="where to write every run")
    arguments = parser.parse_args()
    study = STUDIES[arguments.what]
    names = arguments.problems or list(study.problems)
    if unknown := set(names) - set(study.problems):
        parser.error(f"--problems {' '.join(unknown)}: allowed are {', '.join(study.problems)}")
    report = Report(arguments.json, "flax")
    measurements = Measurements(report, arguments.what, study.keys, arguments.minutes)
    with contextlib.suppress(TimeIsUp):
        for name in names:
            study.run(measurements, name, *study.problems[name])


if __name__ == "__main__":
    main()
