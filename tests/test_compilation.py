"""The number of compilations, and the compiled programs: instructions, copies, collectives, targets."""

import concurrent.futures
import functools
import itertools
import re

import chex
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn, nnx
from flax.training import train_state
from helpers import ALIKE, CONFIGURATIONS, EVERYTHING, mesh_of, NARROW_DTYPES, normal, step_of
from jax import export
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

from rmsprop_jax import dialects, rmsprop, round_params_stochastically


ROUND = round_params_stochastically()
W = np.ones((3, 2), np.float32)


def compiled_step(tx, params):
    """A step as users compile it, with parameters and state donated."""
    return jax.jit(step_of(tx), donate_argnums=(0, 1)).lower(params, tx.init(params), params).compile()


# --- How often it compiles ------------------------------------------------------------------------------


def test_an_eager_update_is_one_program(compilations):
    params = [np.ones((5, i + 1), np.float32) for i in range(6)]
    tx = rmsprop(0.1, **EVERYTHING)
    state = tx.init(params)
    with compilations() as compiled:
        tx.update(params, state, params)
    assert len(compiled) == 1


def test_new_numbers_do_not_recompile(compilations):
    params = {"w": jnp.ones((7, 3))}
    options = EVERYTHING | {"eps": 1e-3}
    tx = rmsprop(0.1, **options)
    state = tx.init(params)
    _, state = tx.update(params, state, params)
    with compilations() as compiled:
        tx.update(params, state, params)
        for numbers in (
            {"learning_rate": 0.2},
            {"decay": 0.99},
            {"eps": 1.0},
            {"momentum": 0.5},
            {"weight_decay": 0.0},
        ):
            rmsprop(**{"learning_rate": 0.1, **options, **numbers}).update(params, state, params)
    assert compiled == []
    with compilations() as compiled:  # and the watch itself works
        rmsprop(0.1, **options | {"eps_in_sqrt": False}).update(params, state, params)
    assert len(compiled) == 1


@pytest.mark.parametrize("jit", [False, True])
def test_a_rate_set_under_inject_hyperparams_does_not_recompile(jit, compilations):
    params = {"w": jnp.ones((7, 5))}
    rates = [jnp.float32(rate) for rate in (0.1, 0.01, 0.001)]
    tx = optax.inject_hyperparams(rmsprop)(learning_rate=0.1, momentum=0.9)
    update, state = jax.jit(tx.update) if jit else tx.update, tx.init(params)
    for _ in range(2):
        _, state = update(params, state, params)
    with compilations() as compiled:
        for rate in rates:
            state.hyperparams["learning_rate"] = rate
            _, state = update(params, state, params)
    assert compiled == []


@pytest.mark.parametrize("make", ALIKE.values(), ids=ALIKE)
def test_a_loop_over_seeds_compiles_once(make, compilations):
    """Flax keeps the transformation of a TrainState as static data."""
    params = (jnp.ones((3, 5)), jnp.ones(5))
    step = jax.jit(lambda state, grads: state.apply_gradients(grads=grads))

    def run():
        state = train_state.TrainState.create(apply_fn=None, params=params, tx=make())
        return step(state, params)

    run()
    with compilations() as compiled:
        run()
    assert compiled == []


def annealed(count):
    return 1e-3 / (1 + count.astype(jnp.float32))


def kernels(params):
    return jax.tree.map(lambda p: p.ndim > 1, params)


MADE = {
    "rmsprop": lambda: rmsprop(1e-3),
    "a schedule, a mask, one byte": lambda: rmsprop(
        annealed, weight_decay=0.1, weight_decay_mask=kernels, state_dtype=jnp.uint8
    ),
    "pytorch": lambda: dialects.pytorch(lr=1e-3, alpha=0.9, momentum=0.9),
    "keras": lambda: dialects.keras(1e-3, clipnorm=1.0, weight_decay=0.1),
}
X = np.ones((2, 3), np.float32)


class Linen(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(2)(nn.relu(nn.Dense(4)(x)))


# Each makes a loop body: from a seed and a transformation to trained parameters.


@functools.cache
def with_linen():
    network = Linen()
    init = jax.jit(network.init)

    @jax.jit
    def step(state):
        grads = jax.grad(lambda params: (state.apply_fn(params, X) ** 2).sum())(state.params)
        return state.apply_gradients(grads=grads)

    def run(seed, tx):
        state = train_state.TrainState.create(apply_fn=network.apply, params=init(jax.random.key(seed), X), tx=tx)
        return step(step(state)).params

    return run


@functools.cache
def with_nnx():
    @nnx.jit
    def step(model, optimizer):
        grads = nnx.grad(lambda model: (model(X) ** 2).sum())(model)
        optimizer.update(model, grads)

    def run(seed, tx):
        rngs = nnx.Rngs(seed)
        model = nnx.Sequential(nnx.Linear(3, 4, rngs=rngs), nnx.relu, nnx.Linear(4, 2, rngs=rngs))
        optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
        for _ in range(2):
            step(model, optimizer)
        return nnx.state(model)

    return run


@functools.cache
def with_equinox():
    @eqx.filter_jit
    def step(model, state, tx):
        grads = eqx.filter_grad(lambda model: (jax.vmap(model)(X) ** 2).sum())(model)
        updates, state = tx.update(grads, state, eqx.filter(model, eqx.is_inexact_array))
        return eqx.apply_updates(model, updates), state

    def run(seed, tx):
        model = eqx.nn.MLP(3, 2, 4, depth=1, key=jax.random.key(seed))
        state = tx.init(eqx.filter(model, eqx.is_inexact_array))
        for _ in range(2):
            model, state = step(model, state, tx)
        return eqx.filter(model, eqx.is_inexact_array)

    return run


@pytest.mark.slow
@pytest.mark.usefixtures("users_climate")
@pytest.mark.parametrize("framework", [with_linen, with_nnx, with_equinox])
@pytest.mark.parametrize("make", MADE.values(), ids=MADE)
def test_a_sweep_in_a_framework_compiles_for_its_first_seed(framework, make, compilations):
    run = framework()
    first = run(0, make())
    with compilations() as compiled:
        second = run(1, make())
    assert compiled == []
    # Seeds share a program, and nothing else.
    assert all(
        (np.asarray(a) != np.asarray(b)).any() for a, b in zip(*map(jax.tree.leaves, (first, second)), strict=True)
    )
    chex.assert_trees_all_equal(run(0, make()), first, strict=True)


@pytest.mark.usefixtures("users_climate")
def test_a_sweep_in_threads_ends_as_one_after_the_other():
    run = with_linen()
    one_by_one = [run(seed, MADE["rmsprop"]()) for seed in range(4)]
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda seed: run(seed, MADE["rmsprop"]()), range(4)))
    chex.assert_trees_all_equal(together, one_by_one, strict=True)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "dtype"),
    list(zip(CONFIGURATIONS.values(), itertools.cycle([jnp.float32, jnp.complex64, jnp.bfloat16]), strict=False)),
    ids=str,
)
def test_the_second_step_is_the_program_of_the_first(options, dtype, compilations):
    tx = rmsprop(5e-3, **options)
    params = jnp.ones(3, dtype)
    step = jax.jit(step_of(tx))
    params, state = step(params, optax.tree.map_params(tx, lambda x: x, tx.init(params)), params)
    with compilations() as compiled:
        step(params, state, params)
    assert compiled == []


EVERY_SLOT = {"centered": True, "momentum": 0.9, "nesterov": True, "bias_correction": True, "initial_scale": 1.0}
ON_A_MESH = [
    {},
    EVERY_SLOT,
    {"state_dtype": jnp.uint8, "initial_scale": 1.0},
    EVERY_SLOT | {"state_dtype": jnp.bfloat16},
]


def sharded(axis_type):
    mesh = mesh_of(axis_type, (4, 2), ("x", "y"))
    specs = {"w": P("x", None), "v": P(None, "y"), "b": P(("x", "y")), "r": P(), "c": P("y"), "s": P()}
    shapes = {"w": (8, 6), "v": (3, 4), "b": (16,), "r": (5,), "c": (16,), "s": (16,)}
    rng = np.random.default_rng(0)
    return {k: jax.device_put(np.float32(rng.normal(size=shapes[k])), NamedSharding(mesh, specs[k])) for k in specs}


@pytest.mark.slow
@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize(("options", "jit_init"), list(zip(ON_A_MESH, [False, True, True, False], strict=True)))
def test_a_run_on_a_mesh_compiles_once_and_sends_nothing(axis_type, options, jit_init, compilations):
    params = grads = sharded(axis_type)
    tx = rmsprop(0.1, **options)
    state = (jax.jit(tx.init) if jit_init else tx.init)(params)
    step = jax.jit(step_of(tx))
    with compilations() as compiled:
        for _ in range(3):
            params, state = step(params, state, grads)
        program = step.lower(params, state, grads).compile()
    assert len(compiled) == 1
    assert "f32[2,6]" in program.as_text()  # one device's part of w
    assert collectives(program) == []


# --- How much there is to compile -----------------------------------------------------------------------


def test_the_update_inlines_under_jit():
    params = {"a": W, "b": W, "c": np.ones(5, np.float32)}
    # Only the compiled program tells: from jax 0.11 on, an inlined function still shows in the jaxpr.
    compiled = compiled_step(rmsprop(0.1), params).as_text()
    entry = compiled[compiled.index("ENTRY") :]
    assert " call(" not in compiled
    # ν and the parameter of each leaf, and the count: nothing between update and apply_updates.
    assert len(re.findall(r" fusion\(", entry)) == 2 * len(params) + 1


def lowered_lines(tx, params):
    """The number of lines in the program that jax hands to XLA."""
    return len(jax.jit(tx.update).lower(params, tx.init(params), params).as_text().splitlines())


@pytest.mark.parametrize("tx", [rmsprop(0.1, momentum=0.9, weight_decay=0.1), ROUND], ids=["rmsprop", "rounding"])
def test_leaves_of_one_shape_are_lowered_once(tx):
    leaf, other = jnp.ones((3, 2), jnp.bfloat16), jnp.ones(5, jnp.bfloat16)
    one, four, two_shapes = (lowered_lines(tx, params) for params in ([leaf], [leaf] * 4, [leaf, other]))
    assert (four - one) / 3 < (two_shapes - one) / 3


@pytest.mark.parametrize("state_dtype", NARROW_DTYPES)
def test_one_hash_for_all_leaves(state_dtype):
    params = {name: jnp.ones(1000) for name in "abcdef"}
    tx = rmsprop(0.1, state_dtype=state_dtype)
    compiled = jax.jit(tx.update).lower(params, tx.init(params)).compile().as_text()
    # The count and two numbers end in a remainder each. The XLA of jax 0.7.2 repeats them in every leaf all the same.
    assert (len(re.findall(r" remainder\(", compiled)) == 3) == (jax.__version_info__ >= (0, 10))


@functools.cache
def instructions_per_leaf(tx):
    """XLA's instructions for one more leaf of the same shape."""
    with jax.numpy_rank_promotion("allow"):  # Optax's scalars
        three, four = (compiled_step(tx, [jnp.ones(1000)] * leaves).as_text().count(" = ") for leaves in (3, 4))
    return four - three


optaxs_rmsprop = functools.cache(functools.partial(optax.rmsprop, 0.1))


@pytest.mark.parametrize(
    ("limit", "options"),
    [
        (1.4, {}),
        (1.4, {"centered": True}),
        (1.5, {"momentum": 0.9}),
        # The XLA of jax 0.7.2 repeats the hash in every leaf. Spreading the sign over the hash takes four of these.
        *(
            []
            if jax.__version_info__ < (0, 10)
            else [(2.4, {"state_dtype": jnp.bfloat16}), (3.1, {"state_dtype": jnp.uint8})]
        ),
    ],
)
def test_a_leaf_has_at_most_a_few_more_instructions_than_optax(limit, options):
    # The more there are, the longer XLA compiles. Optax's plain update has 27.
    optaxs = optaxs_rmsprop(**{name: x for name, x in options.items() if name != "state_dtype"})
    assert instructions_per_leaf(rmsprop(0.1, **options)) < limit * instructions_per_leaf(optaxs)


def unrolled_instructions(updates, **options):
    """The length of the program of so many updates in one jit."""
    tx = rmsprop(1e-3, centered=True, momentum=0.9, **options)

    def run(params, state):
        for _ in range(updates):
            step, state = tx.update(jnp.sin(params), state)
            params = params + step
        return params

    params = jnp.ones(64)
    return len(jax.jit(run).lower(params, tx.init(params)).compile().as_text().splitlines())


@pytest.mark.slow
@pytest.mark.parametrize("state_dtype", NARROW_DTYPES)
def test_updates_in_one_program_are_not_recomputed_in_each_other(state_dtype):
    # XLA may recompute a slot, or the count, from the start wherever it is read. Then the program grows with the
    # square of the updates or faster: for bfloat16 on jax 0.12, 14 updates took 17 s to compile, and 20 had no end.
    one, twice = (unrolled_instructions(n, state_dtype=state_dtype) for n in (8, 16))
    assert twice < 2.3 * one


# --- Copies ---------------------------------------------------------------------------------------------


NARROW = {"state_dtype": jnp.uint8}
# Slots in bfloat16. XLA's older CPU backends copy them.
SIGNED = [
    NARROW | {"centered": True},
    {"state_dtype": jnp.bfloat16},
    {"state_dtype": jnp.bfloat16, **EVERYTHING},
]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"momentum": 0.9},
        {"centered": True},
        {"eps_in_sqrt": False},
        EVERYTHING,
        NARROW,
        NARROW | {"momentum": 0.9},
        NARROW | {"eps_in_sqrt": False, "bias_correction": True, "weight_decay": 0.1},
        *([] if jax.__version_info__ < (0, 10) else SIGNED),
    ],
)
def test_no_copy_of_the_state(options):
    tx = rmsprop(1e-3, **options)
    params = jnp.ones(1 << 16)
    compiled = compiled_step(tx, params)
    assert " fusion(" in compiled.as_text()  # the text is a compiled program
    assert " copy(" not in compiled.as_text()
    # XLA emits scalar instructions for it, and LLVM does not vectorize them where cores get unequal parts of an array.
    assert " rsqrt(" not in compiled.as_text()
    # Every donated buffer is used again: parameter, count and slots. And no array is made on the way.
    memory = compiled.memory_analysis()
    assert memory.alias_size_in_bytes >= params.nbytes + sum(x.nbytes for x in jax.tree.leaves(tx.init(params)))
    assert memory.temp_size_in_bytes < 1000


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize(
    ("keep_rest", "loops", "copies"),
    # The XLA of jax 0.7.2 copies the old remainder as well.
    [(False, 2, 0), *([] if jax.__version_info__ < (0, 10) else [(True, 4, 1)])],
)
@pytest.mark.usefixtures("users_climate")
def test_copies_of_parameters_that_are_rounded(keep_rest, loops, copies, dtype):
    """None for three bytes. With a remainder u is kept as well, and the old parameter, which XLA's CPU backend reads twice."""
    tx = optax.chain(rmsprop(1e-3, **NARROW), round_params_stochastically(keep_rest))
    params = jnp.ones(1 << 16, jnp.bfloat16)
    state, grads = tx.init(params), jnp.ones(params.shape, dtype)
    compiled = jax.jit(step_of(tx), donate_argnums=(0, 1)).lower(params, state, grads).compile()
    entry = compiled.as_text().partition("ENTRY")[2]
    assert len(re.findall(r"\[65536\]\S* fusion\(", entry)) == loops
    assert compiled.as_text().count(" copy(") == copies
    memory = compiled.memory_analysis()
    assert memory.alias_size_in_bytes >= params.nbytes + sum(x.nbytes for x in jax.tree.leaves(state))
    assert memory.temp_size_in_bytes < keep_rest * (grads.nbytes + params.nbytes) + 1000


# --- Collectives ----------------------------------------------------------------------------------------


def collectives(compiled):
    return re.findall(r"\b(?:all-\w+|collective-\w+|reduce-scatter)[\w-]*\(", compiled.as_text())


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"centered": True, "momentum": 0.9}])
@pytest.mark.parametrize("state_dtype", NARROW_DTYPES)
def test_init_and_updates_in_one_program_have_no_collectives(state_dtype, options):
    tx = rmsprop(0.1, 0.99, state_dtype=state_dtype, **options)

    def run(params, gradients):
        state = tx.init(params)
        for gradient in gradients:
            updates, state = tx.update(gradient, state, params)
        return updates, state

    mesh = mesh_of()
    params = jax.device_put(normal((64, 32)), NamedSharding(mesh, P("x")))
    gradients = jax.device_put(normal((3, 64, 32), seed=1), NamedSharding(mesh, P(None, "x")))
    assert collectives(jax.jit(run).lower(params, gradients).compile()) == []


def test_rounding_has_no_collectives():
    params = jax.device_put(normal((64, 8), jnp.bfloat16), NamedSharding(mesh_of(), P("x")))
    compiled = jax.jit(ROUND.update).lower(params, ROUND.init(params), params).compile()
    assert "bf16[8,8]" in compiled.as_text()
    assert collectives(compiled) == []


# --- Targets --------------------------------------------------------------------------------------------


PLATFORMS = ("cpu", "cuda", "tpu")
STRUCTURES = list(itertools.product([False, True], repeat=3))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("state_dtype", "dtype", "structure"),
    [
        (*dtypes, structure)
        for dtypes, structure in zip(
            itertools.product([None, jnp.bfloat16, jnp.uint8], [jnp.float32, jnp.bfloat16, jnp.float16, jnp.complex64]),
            itertools.cycle(STRUCTURES[i] for i in (0, 5, 3, 6, 7, 2, 4, 1)),
            strict=False,
        )
    ],
)
def test_lowers_for_every_target(state_dtype, dtype, structure):
    flags = dict(zip(("eps_in_sqrt", "centered", "bias_correction"), structure, strict=True))
    for options in ({}, {"momentum": 0.9, "nesterov": True, "lr_in_momentum": False, "weight_decay": 0.1}):
        tx = rmsprop(annealed, 0.9, 1e-20, state_dtype=state_dtype, **flags, **options)
        params = jax.ShapeDtypeStruct((8, 4), dtype)
        state = jax.eval_shape(tx.init, params)
        exported = export.export(jax.jit(tx.update), platforms=PLATFORMS)(params, state, params)
        assert exported.platforms == PLATFORMS
        assert exported.out_avals[0].dtype == dtype


EXPORTED = {
    "every slot": rmsprop(annealed, **EVERYTHING),
    "one byte": rmsprop(0.1, state_dtype=jnp.uint8, momentum=0.9),
    "four bytes": optax.chain(rmsprop(0.1, state_dtype=jnp.uint8), round_params_stochastically(keep_rest=True)),
}


@pytest.mark.slow
@pytest.mark.parametrize("tx", EXPORTED.values(), ids=EXPORTED)
def test_a_step_can_be_exported_and_loaded_with_its_state(tx):
    params = {"w": normal((8, 4), jnp.bfloat16), "b": jnp.ones(3)}
    state, step = tx.init(params), jax.jit(step_of(tx))
    loaded = export.deserialize(export.export(step)(params, state, params).serialize())
    for _ in range(2):
        expected = step(params, state, params)
        params, state = loaded.call(params, state, params)
        chex.assert_trees_all_equal((params, state), expected, strict=True)
