"""Runs of the model that stop, hand out a checkpoint and go on from it: recorded, live in a framework, and ours."""

import inspect
import pathlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from frameworks import Framework, FRAMEWORKS, RATES
from model import (  # noqa: F401 (names that tests take from here)
    Arrays,
    convert,
    convert_back,
    difference,
    END,
    grads,
    NAMES,
    ORIGIN,
    SHAPES,
    STOP,
    with_underscores,
)


# The frameworks whose checkpoints we read.
SOURCES = {name: framework for name, framework in FRAMEWORKS.items() if framework.resumed}
CASES = [(name, options) for name, source in SOURCES.items() for options in source.resumed]
EPS = 1e-3


def case_name(source: str, options: dict[str, Any]) -> str:
    return ",".join([source, *(f"{k}={v}" for k, v in options.items())])


def foreign(name: str, options: dict[str, Any]) -> dict[str, Any]:
    """The options with the framework's name for ε."""
    arguments = inspect.signature(SOURCES[name].dialect).parameters
    return {"epsilon" if "epsilon" in arguments else "eps": EPS} | options


def dialect_of(source: Framework, name: str, options: dict[str, Any]) -> optax.GradientTransformationExtraArgs:
    return source.dialect(lambda count: jnp.asarray(RATES)[count], **foreign(name, options))


def limit(name: str, options: dict[str, Any]) -> float:
    # Keras and Optax take E[g²] - E[g]² in float32: in this run they end 2.5e-6 from float64, where we end 2.7e-7.
    return 4e-6 if name in ("keras", "optax") and options == {"centered": True} else 1e-6


def run_framework(
    source: Framework, arguments: dict[str, Any], params: Arrays, start: int, end: int, checkpoint: Any = None
) -> tuple[Arrays, Any]:
    """The framework's parameters and checkpoint after the steps from `start` to `end`."""
    runner = source.runner(params, RATES, arguments)
    if checkpoint is not None:
        runner.load(checkpoint)
    for t in range(start, end):
        runner.step(grads(runner.params(), t), RATES[t])
    return runner.params(), runner.checkpoint()


def run_transformation(tx, state, params: Arrays, start: int, end: int, convert=dict, convert_back=dict):
    """Any Optax transformation on the model, by default in the framework's layout."""
    update = jax.jit(tx.update)
    params = convert({k: jnp.asarray(v) for k, v in params.items()})
    for t in range(start, end):
        g = grads(convert_back(jax.tree.map(np.asarray, params)), t)
        updates, state = update(convert(g), state, params)
        params = optax.apply_updates(params, updates)
    return convert_back(jax.tree.map(np.asarray, params)), state


def run_ours(tx, state, params: Arrays, start: int, end: int):
    """Ours, in Flax's layout, from and to the framework's."""
    return run_transformation(tx, state, params, start, end, convert, convert_back)


RECORDED = pathlib.Path(__file__).parent / "golden" / "resume"


class Recorded(NamedTuple):
    middle: Arrays
    checkpoint: Any  # in the framework's own structure
    end: Arrays


def recorded(name: str, options: dict[str, Any]) -> Recorded:
    """A run that golden/make.py recorded."""
    golden = np.load(RECORDED / f"{case_name(name, options)}.npz")
    middle, end = ({k: golden[f"/{part}/{k}"] for k in SHAPES} for part in ("middle", "end"))
    entries = {k.removeprefix("/checkpoint/"): golden[k] for k in golden if k.startswith("/checkpoint/")}
    return Recorded(middle, SOURCES[name].runner.recorded(entries), end)
