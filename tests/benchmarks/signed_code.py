"""python tests/benchmarks/signed_code.py: what a momentum buffer in one byte does to training.

ν is in one byte in all but the float32 rows. The buffer is in bfloat16, in the int8 that `state_dtype=jnp.uint8` gives it (1 bit
of sign, 5 of exponent, 2 of mantissa), or in another code of 8 bits, 1+6+1 from 2⁻⁴⁰, through which the buffer of a float32 run goes
after each update. The problems are those of `training.py grid`; momentum 0.9, 0.95 and 0.99, Nesterov, the rate inside and
outside the buffer, at the grid's learning rate and at one that is divided by what momentum multiplies it with. A loss is the mean
over the seeds, followed by its distance from float32 in standard deviations of the seeds.
"""

import argparse
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from report import Report
from rich.progress import track
from tasks import Problem
from training import GRID, keys_of

from rmsprop_jax import rmsprop, RMSPropState


DECAY = 0.99
KINDS = ("float32", "bfloat16", "int8", "1+6+1")
SMALLEST, LARGEST, MANTISSA = 2.0**-40, 2.0**23, 1  # of 1+6+1
MOMENTA = [(0.9, False), (0.9, True), (0.95, False), (0.95, True), (0.99, False)]


def through_code(x: jax.Array, key: jax.Array) -> jax.Array:
    """`x` as the code 1+6+1 keeps it. Its mean over the keys is `x`, up to the largest code."""
    size = jnp.minimum(jnp.abs(x), LARGEST)
    # The distance of two codes is a power of two; below the smallest code it is that code itself.
    exponent = jnp.floor(jnp.log2(jnp.maximum(size, SMALLEST)))
    gap = jnp.where(size < SMALLEST, SMALLEST, jnp.exp2(exponent - MANTISSA))
    return jnp.sign(x) * gap * jnp.floor(size / gap + jax.random.uniform(key, x.shape))


def run(problem: Problem, kind: str, nesterov: bool, inside: bool) -> Any:
    """A function from a momentum, a factor of the rate and a seed to the test loss."""

    def optimizer(momentum, factor):
        schedule = optax.cosine_decay_schedule(problem.learning_rate, problem.steps)
        dtype = None if kind == "float32" else jnp.uint8
        return rmsprop(
            lambda count: factor * schedule(count),
            DECAY,
            momentum=momentum,
            nesterov=nesterov,
            lr_in_momentum=inside,
            state_dtype=dtype,
        )

    @jax.jit
    def step(params, nu, trace, count, momentum, factor, key):
        key, key_code = jax.random.split(key)
        batch = problem.batch(key)
        grads = jax.grad(lambda p: problem.loss(p, batch)[0])(params)
        state = RMSPropState(count, nu, None, trace)
        updates, state = optimizer(momentum, factor).update(grads, state, params)
        trace = state.trace
        if kind == "1+6+1":
            leaves, treedef = jax.tree.flatten(trace)
            keys = jax.random.split(key_code, len(leaves))
            trace = treedef.unflatten([through_code(x, k) for x, k in zip(leaves, keys, strict=True)])
        return optax.apply_updates(params, updates), state.nu, trace, state.count

    test = jax.jit(problem.loss)

    def one(momentum, factor, seed):
        params = problem.init(jax.random.key(seed))
        state = optimizer(momentum, factor).init(params)
        # An update leaves the buffer in the dtype that it has.
        dtype = {"bfloat16": jnp.bfloat16, "1+6+1": jnp.float32}.get(kind)
        trace = state.trace if dtype is None else jax.tree.map(lambda x: jnp.zeros_like(x, dtype), params)
        carry = params, state.nu, trace, state.count
        for key in keys_of(problem, seed):
            carry = step(*carry, jnp.float32(momentum), jnp.float32(factor), key)
        return float(test(carry[0], jax.tree.map(lambda x: x[0], problem.test))[0])

    return one


def table(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    keys = ("problem", "rate", "momentum", "buffer holds")
    result = []
    for setting in dict.fromkeys(tuple(row[key] for key in keys) for row in rows):
        losses = {
            kind: np.array([r["loss"] for r in rows if r["kind"] == kind and tuple(r[key] for key in keys) == setting])
            for kind in KINDS
        }
        full = losses["float32"]
        line = dict(zip(keys, setting, strict=True)) | {"float32": f"{full.mean():.4f} ± {full.std(ddof=1):.4f}"}
        for kind in KINDS[1:]:
            away = (losses[kind].mean() - full.mean()) / full.std(ddof=1)
            line[kind] = f"{losses[kind].mean():.4f} ({away:+.1f})"
        result.append(line)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--problems", nargs="+", choices=GRID, default=list(GRID))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--json", metavar="FILE", help="where to write every run")
    arguments = parser.parse_args()
    report = Report(arguments.json)
    rows = []
    jobs = list(itertools.product(arguments.problems, (True, False), (False, True), KINDS))
    for name, inside, nesterov, kind in track(jobs, "training"):
        one = run(GRID[name](), kind, nesterov, inside)
        for (momentum, with_nesterov), rate, seed in itertools.product(
            MOMENTA, ("as it is", "divided"), range(arguments.seeds)
        ):
            if with_nesterov != nesterov:
                continue
            factor = 1.0 if rate == "as it is" else 1 - momentum
            rows.append({"problem": name, "rate": rate, "momentum": f"{momentum}{', Nesterov' if nesterov else ''}"})
            rows[-1] |= {"buffer holds": "αu" if inside else "u", "kind": kind, "seed": seed}
            rows[-1] |= {"loss": one(momentum, factor, seed)}
    rows.sort(key=lambda row: (row["problem"], row["rate"], row["momentum"], row["buffer holds"]))
    report.add("signed code", rows, table(rows))


if __name__ == "__main__":
    main()
