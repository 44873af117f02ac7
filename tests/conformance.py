"""What an Optax optimizer should be able to do, for any factory: python tests/conformance.py optax.rmsprop

    python tests/conformance.py rmsprop_jax.rmsprop "{}" "{'momentum': 0.9, 'nesterov': True}"

prints which properties fail, for each configuration. A factory takes the learning rate first. In a test:

    @pytest.mark.parametrize("check", properties(my_optimizer, {"plain": {}, "momentum": {"momentum": 0.9}}))
    def test_conformance(check):
        check()

This file needs jax, optax, chex and NumPy, and nothing else of this repository. Some of the properties are those of
optax/_src/alias_test.py, optax/contrib/_common_test.py and optax/transforms/*_test.py.
"""

import argparse
import ast
import contextlib
import functools
import importlib
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P


Make = Callable[..., optax.GradientTransformation]  # from a learning rate
PROPERTIES: list[Callable[[Make], None]] = []
REAL = {"w": np.float32([[1.0, -2.0], [3.0, 0.5]]), "b": np.float32([0.1, -4.0])}


def holds(check: Callable[[Make], None]) -> Callable[[Make], None]:
    """Adds a property to the suite. Its docstring is a sentence about the optimizer."""
    PROPERTIES.append(check)
    return check


@contextlib.contextmanager
def as_users_do() -> Iterator[None]:
    """With jax's defaults, whatever the caller has set."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"), enable_x64(False):
        yield


def enable_x64(on: bool) -> Any:
    """The oldest jax has it elsewhere."""
    return (jax.enable_x64 if hasattr(jax, "enable_x64") else jax.experimental.enable_x64)(on)


def properties(factory: Make, configurations: Mapping[str, dict[str, Any]]) -> list[Any]:
    """A check for each property and configuration: functions without arguments, which raise where it does not hold."""
    checks = []
    for name, options in configurations.items():
        for check in PROPERTIES:
            run = as_users_do()(functools.partial(check, functools.partial(factory, **options)))
            run.__name__, run.configuration = f"{check.__name__}-{name}", name
            checks.append(run)
    return checks


def step_of(tx: Any, **extra: Any) -> Any:
    """`step(params, state, grads) -> (params, state)`."""

    def step(params: Any, state: Any, grads: Any) -> Any:
        updates, state = tx.update(grads, state, params, **extra)
        return optax.apply_updates(params, updates), state

    return step


def run(tx: Any, params: Any = REAL, steps: int = 5, jit: Any = jax.jit) -> Any:
    """Parameters and state after some steps."""
    step, params = jit(step_of(tx)), jax.tree.map(jnp.asarray, params)
    state = tx.init(params)
    for _ in range(steps):
        params, state = step(params, state, jax.tree.map(lambda p: 2 * p - 1, params))
    return params, state


def types(tree: Any) -> Any:
    """Shapes and dtypes."""
    return jax.tree.map(lambda x: (jnp.shape(x), jnp.result_type(x)), tree)


# --- It finds minima --------------------------------------------------------------------------------------


def abs_sq(x: jax.Array) -> jax.Array:
    """The square of the absolute value."""
    return (x * x.conj()).real


def minimize(make: Make, one: complex) -> None:
    """A parabola and Rosenbrock's valley, whose minima are at multiples of `one`."""
    one = jnp.asarray(one)
    goal = {"parabola": one * jnp.array([1.0, -1.0, 1.0]), "valley": jnp.stack([one, one**2])}

    def loss(p: Any) -> jax.Array:
        a, b = p["valley"]
        return abs_sq(p["parabola"] - goal["parabola"]).sum() + abs_sq(one - a) + 100 * abs_sq(b - a**2)

    start = {"parabola": jnp.array([-1.0, 10.0, 1.0], one.dtype), "valley": jnp.zeros(2, one.dtype)}
    tx = make(5e-3)
    step = step_of(tx)

    @jax.jit
    def end(params: Any) -> Any:
        # The gradient of a real function of complex parameters points uphill when conjugated.
        body = lambda carry, _: (step(*carry, jax.tree.map(jnp.conj, jax.grad(loss)(carry[0]))), None)  # noqa: E731
        return jax.lax.scan(body, (params, tx.init(params)), length=10_000)[0][0]

    chex.assert_trees_all_close(end(start), goal, rtol=3e-2, atol=3e-2)


@holds
def converges(make: Make) -> None:
    """Finds the minimum of a parabola and of Rosenbrock's valley in 10,000 steps."""
    minimize(make, 1.0)


@holds
def converges_with_complex_parameters(make: Make) -> None:
    """Does the same with complex parameters."""
    minimize(make, 1 + 1j)


# --- Numbers and dtypes -----------------------------------------------------------------------------------


@holds
def keeps_dtypes_through_cond(make: Make) -> None:
    """Keeps the dtypes of parameters and state, in a branch of jax.lax.cond and in six dtypes."""
    with enable_x64(True):
        kinds = ("float16", "bfloat16", "float32", "float64", "complex64", "complex128")
        params = {kind: jnp.array([1.0, 2.0], kind) for kind in kinds}
        tx = make(5e-3)
        step = step_of(tx)
        skip = lambda params, state, grads: (params, state)  # noqa: E731
        either = jax.jit(lambda take, *carry: jax.lax.cond(take, step, skip, *carry))
        state = before = tx.init(params)
        for take in (True, False, True):
            params, state = either(take, params, state, params)
        assert types(state) == types(before)
        assert {kind: x.dtype for kind, x in params.items()} == {kind: jnp.dtype(kind) for kind in kinds}


@holds
def counts_small_gradients_in_half_precision(make: Make) -> None:
    """Steps as in float32 where the gradient's square is too small for float16."""

    def update(dtype: Any) -> jax.Array:
        tx, params = make(1.0), jnp.zeros(3, dtype)
        return tx.update(jnp.full(3, 1e-4, dtype), tx.init(params), params)[0].astype(jnp.float32)

    chex.assert_trees_all_close(update(jnp.float16), update(jnp.float32), rtol=1e-2)


@holds
def remembers_in_bfloat16(make: Make) -> None:
    """Ends a run with bfloat16 gradients where one with float32 ends: no average is stuck."""

    def last_update(dtype: Any) -> jax.Array:
        tx, params = make(1e-2), jnp.zeros(3, dtype)

        def step(state: Any, g: jax.Array) -> Any:
            updates, state = tx.update(jnp.full(3, g, dtype), state, params)
            return state, updates

        g = jnp.where(jnp.arange(2000) < 1000, 1.0, 0.125)
        return jax.jit(lambda: jax.lax.scan(step, tx.init(params), g)[1][-1])().astype(jnp.float32)

    chex.assert_trees_all_close(last_update(jnp.bfloat16), last_update(jnp.float32), rtol=2e-2)


@holds
def stays_finite(make: Make) -> None:
    """Makes finite updates from gradients of zero, of 1e30, and of the smallest numbers."""
    tx, params = make(1e-3), jnp.zeros(5)
    state = tx.init(params)
    for _ in range(3):
        updates, state = jax.jit(tx.update)(jnp.array([0.0, 1e30, -1e30, 1e-30, 1e-38]), state, params)
        chex.assert_tree_all_finite((updates, state))


@holds
def has_a_derivative_in_the_rate(make: Make) -> None:
    """Has a finite derivative in its learning rate, also where a gradient is zero."""

    def end(rate: jax.Array) -> jax.Array:
        tx, params = make(rate), jnp.ones(2)
        state = tx.init(params)
        for _ in range(3):
            params, state = step_of(tx)(params, state, params * jnp.array([1.0, 0.0]))
        return params.sum()

    slope = jax.jit(jax.grad(end))(1e-2)
    chex.assert_tree_all_finite(slope)
    assert slope != 0


@holds
def obeys_strict_promotion(make: Make) -> None:
    """Works where jax is told to refuse implicit promotion of ranks and dtypes."""
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        tx = make(1e-3)
        for dtype in (jnp.float32, jnp.bfloat16):
            params = jax.tree.map(lambda p, dtype=dtype: jnp.asarray(p, dtype), REAL)
            tx.update(params, tx.init(params), params)


# --- Hyperparameters --------------------------------------------------------------------------------------


@holds
def takes_a_schedule(make: Make) -> None:
    """Takes a function of the step as its learning rate."""
    falling = make(lambda count: jnp.where(count < 1, 5e-3, 0.0))
    (params, first), (_, second) = run(falling, steps=1), run(falling, steps=2)
    chex.assert_trees_all_close(params, run(make(5e-3), steps=1)[0], rtol=1e-6)
    assert types(first) == types(second)


@holds
def can_be_injected(make: Make) -> None:
    """Gives the same under optax.inject_hyperparams, where numbers are arrays."""
    injected = optax.inject_hyperparams(make.func)(5e-3, **make.keywords)
    # 1 - decay is taken in float32 here, and in Python there: one part in 60,000 at 0.999.
    (params, state), (expected, plain) = run(injected), run(make(5e-3))
    chex.assert_trees_all_close((params, state.inner_state), (expected, plain), rtol=1e-4)


@holds
def follows_an_injected_rate(make: Make) -> None:
    """Steps twice as far when the injected learning rate is doubled."""
    tx, params = optax.inject_hyperparams(make.func)(5e-3, **make.keywords), jax.tree.map(jnp.asarray, REAL)
    state = tx.init(params)
    once, _ = tx.update(params, state, params)
    twice, _ = tx.update(params, optax.tree.set(state, learning_rate=jnp.float32(1e-2)), params)
    chex.assert_trees_all_close(twice, jax.tree.map(lambda u: 2 * u, once), rtol=1e-5)


@holds
def trains_a_grid_of_rates(make: Make) -> None:
    """Can be made inside jax.vmap, with a learning rate for each member."""
    rates = jnp.array([1e-3, 1e-2])
    together = jax.jit(jax.vmap(lambda rate: run(make(rate), steps=2)[0]))(rates)
    alone = [run(make(float(rate)), steps=2)[0] for rate in rates]
    chex.assert_trees_all_close(together, jax.tree.map(lambda *x: jnp.stack(x), *alone), rtol=1e-5)


@holds
def is_equal_to_one_made_alike(make: Make) -> None:
    """Equals another of the same call, so that a jitted function that gets it does not compile again."""
    assert make(1e-3) == make(1e-3)
    assert hash(make(1e-3)) == hash(make(1e-3))
    assert make(1e-3) != make(1e-2)


# --- Trees, states, devices -------------------------------------------------------------------------------


@holds
def is_the_same_without_jit(make: Make) -> None:
    """Gives eagerly what it gives compiled."""
    chex.assert_trees_all_close(run(make(1e-2), jit=lambda f: f), run(make(1e-2)), rtol=2e-6, atol=1e-7)


@holds
def ignores_extra_arguments(make: Make) -> None:
    """Accepts arguments of `update` that are meant for another member of a chain."""
    tx = optax.with_extra_args_support(make(1e-2))
    params = jax.tree.map(jnp.asarray, REAL)
    results = [step_of(tx, **extra)(params, tx.init(params), params) for extra in ({}, {"value": 2.0, "other": 1})]
    chex.assert_trees_all_equal(*results)


@holds
def starts_from_shapes(make: Make) -> None:
    """Makes its state from jax.ShapeDtypeStruct and under jax.eval_shape, as checkpoints need it."""
    tx = make(1e-3)
    shapes = jax.tree.map(lambda p: jax.ShapeDtypeStruct(p.shape, p.dtype), REAL)
    expected = types(tx.init(jax.tree.map(jnp.asarray, REAL)))
    assert types(jax.eval_shape(tx.init, shapes)) == expected
    assert types(tx.init(shapes)) == expected


@holds
def takes_trees_without_leaves(make: Make) -> None:
    """Takes an empty tree, a None in a tree, and leaves without elements."""
    tx = make(1e-3)
    for params in ({}, {"w": jnp.ones(2), "frozen": None}, {"w": jnp.ones((0, 3))}):
        chex.assert_trees_all_equal_structs(tx.update(params, tx.init(params), params)[0], params)


@holds
def tells_params_from_numbers(make: Make) -> None:
    """Works with optax.tree.map_params, which finds the parts of the state that are like the parameters."""
    tx = make(1e-3)
    state = tx.init(jax.tree.map(jnp.asarray, REAL))
    told = optax.tree.map_params(tx, lambda _: True, state, transform_non_params=lambda _: False)
    assert told == jax.tree.map(lambda x: jnp.ndim(x) > 0, state)


@holds
def can_be_masked(make: Make) -> None:
    """Leaves parameters alone that optax.masked or optax.partition takes from it."""
    labels = {"w": "train", "b": "freeze"}
    parted = optax.partition({"train": make(1e-2), "freeze": optax.set_to_zero()}, labels)
    alone, _ = run(make(1e-2), {"w": REAL["w"]})
    chex.assert_trees_all_close(run(parted)[0], {**alone, "b": REAL["b"]}, rtol=1e-6)


@holds
def accumulates_gradients(make: Make) -> None:
    """Makes one step of four gradients under optax.MultiSteps, also in bfloat16."""
    inner = make(5e-3)
    tx = optax.MultiSteps(inner, every_k_schedule=4)
    for dtype in (jnp.float32, jnp.bfloat16):
        params = jnp.array([1.0, 2.0], dtype)
        state, update = tx.init(params), jax.jit(tx.update)
        for i in range(4):
            updates, state = update(2 * params, state, params)
            assert (updates == 0).all() == (i < 3)
        expected, _ = jax.jit(inner.update)(2 * params, inner.init(params), params)
        chex.assert_trees_all_close(updates.astype(jnp.float32), expected.astype(jnp.float32), rtol=1e-2)


@holds
def can_donate_its_state(make: Make) -> None:
    """Shares no memory between two arrays of its state, or with the parameters, so that all can be donated."""
    params = jax.tree.map(jnp.array, REAL)
    step = jax.jit(step_of(make(1e-3)), donate_argnums=(0, 1))
    state = make(1e-3).init(params)
    for _ in range(2):
        params, state = step(params, state, jax.tree.map(jnp.ones_like, params))


@holds
def lies_where_the_parameters_lie(make: Make) -> None:
    """Makes its state with the shardings of the parameters, eagerly and under jit. (Needs two devices.)"""
    mesh = jax.make_mesh((2,), ("x",), axis_types=(AxisType.Explicit,), devices=jax.devices()[:2])
    params = jax.device_put(jnp.ones((4, 6)), NamedSharding(mesh, P("x")))
    tx = make(1e-3)
    for init in (tx.init, jax.jit(tx.init)):
        like = [x for x in jax.tree.leaves(init(params)) if x.shape == params.shape]
        assert all(x.sharding.is_equivalent_to(params.sharding, 2) for x in like)


# --- The command ------------------------------------------------------------------------------------------


def main() -> None:
    """Prints what holds, and why the rest does not."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("factory", help="such as optax.rmsprop")
    parser.add_argument("configurations", nargs="*", default=["{}"], help="options as dicts of Python")
    options = parser.parse_args()
    jax.config.update("jax_num_cpu_devices", 2)
    module, _, name = options.factory.rpartition(".")
    factory = getattr(importlib.import_module(module), name)
    failed = 0
    for check in properties(factory, {text: ast.literal_eval(text) for text in options.configurations}):
        property_, configuration = check.__wrapped__.func, check.configuration
        try:
            check()
        except Exception as error:
            failed += 1
            why = "".join(traceback.format_exception_only(error)).split("\n")
            print(f"FAILS  {options.factory} {configuration}: {property_.__name__}\n       {property_.__doc__}")
            print("       " + " ".join(line.strip() for line in why if line.strip())[:160])
    print(f"{failed} of {len(PROPERTIES)} x {len(options.configurations)} properties fail for {options.factory}")
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
