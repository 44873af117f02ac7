"""The numbers: against Optax, against float64 recurrences, and exact where arithmetic gives exact values."""

import functools
import inspect
import itertools
import math
import operator

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import reference
from helpers import dtypes, finite_floats, follow, NARROW_DTYPES, SGD
from hypothesis import example, given, settings, strategies as st
from problems import distance, grads, START, trajectory

from rmsprop_jax import _storage, dialects, rmsprop, scale_by_rms


def schedule(count):
    """From 0 up to 0.01 over 20 updates, then down by 0.97 every 4."""
    count = count.astype(jnp.float32)
    return 1e-2 * jnp.minimum(count / 20, 0.97 ** (count // 4))


def schedule_f64(t):
    return 1e-2 * min(t / 20, 0.97 ** (t // 4))


FLAGS = [
    dict(zip(("eps_in_sqrt", "centered", "bias_correction"), flags, strict=True))
    for flags in itertools.product([True, False], repeat=3)
]
MOMENTA = [{}, {"momentum": 0.9}, {"momentum": 0.9, "nesterov": True}, {"momentum": 0.0}]
NUMBERS = [
    {"eps": eps, "initial_scale": scale, "decay": decay}
    for eps, scale, decay in [(1e-8, 0.0, 0.9), (1e-3, 1.0, 0.9), (1e-8, 1.0, 0.99), (1e-3, 0.0, 0.5)]
]
DECAYS = [{}, {"weight_decay": 0.1, "decoupled": False}, {"weight_decay": 0.1}]


def grid(*axes):
    """Every combination of one row per axis."""
    rows = [functools.reduce(operator.or_, combination) for combination in itertools.product(*axes)]
    return [pytest.param(row, id=",".join(f"{k}={v}" for k, v in row.items())) for row in rows]


def cycled(rows, *lists):
    """Each row with the next entry of every list."""
    cycles = [itertools.cycle(entries) for entries in lists]
    return [
        pytest.param(*row.values, *entries, id=f"{row.id},{entries}")
        for row, *entries in zip(rows, *cycles, strict=False)
    ]


def comparable(rows):
    """Without the documented difference: centered, Optax's bias correction starts from a variance of 0."""
    return [row for row in rows if not (row.values[0]["centered"] and row.values[0]["bias_correction"])]


@pytest.mark.parametrize(("options", "numbers"), cycled(comparable(grid(FLAGS, MOMENTA)), NUMBERS))
@pytest.mark.slow
def test_equals_optax(options, numbers):
    options = options | numbers
    with jax.numpy_dtype_promotion("standard"):  # Optax's bias correction mixes dtypes
        theirs = trajectory(optax.rmsprop(1e-2, **options), steps=20)
    assert distance(trajectory(rmsprop(1e-2, **options), steps=20), theirs) < 2e-5


@pytest.mark.parametrize(("options", "numbers"), cycled(comparable(grid(FLAGS)), NUMBERS))
def test_scale_by_rms_equals_optax(options, numbers):
    options = options | numbers
    centered = {k: v for k, v in options.items() if k != "centered"}
    theirs = (optax.scale_by_stddev if options["centered"] else optax.scale_by_rms)(**centered)
    ours, state = scale_by_rms(**options), None
    gradient = jnp.asarray(grads(np.asarray(START, np.float64), 0), jnp.float32)
    state, their_state = ours.init(gradient), theirs.init(gradient)
    for scale in (1.0, -2.0, 0.5):
        updates, state = ours.update(scale * gradient, state)
        with jax.numpy_dtype_promotion("standard"):
            expected, their_state = theirs.update(scale * gradient, their_state)
        np.testing.assert_allclose(updates, expected, rtol=2e-5)


def test_equals_adam_without_first_moment():
    ours = scale_by_rms(0.999, eps_in_sqrt=False, bias_correction=True)
    adam = optax.scale_by_adam(b1=0.0, b2=0.999)
    tail = optax.scale(-1e-2)
    with jax.numpy_dtype_promotion("standard"):
        theirs = trajectory(optax.chain(adam, tail))
    assert distance(trajectory(optax.chain(ours, tail)), theirs) < 1e-6


# The learning rate's place in the buffer is an option only where there is a buffer.
PLACES = [MOMENTA[0], *({**row, "lr_in_momentum": place} for row in MOMENTA[1:3] for place in (True, False))]


@pytest.mark.parametrize(
    ("options", "numbers", "decay"), cycled(grid(FLAGS, PLACES), [NUMBERS[i] for i in (0, 1, 2, 3, 1, 0, 3)], DECAYS)
)
def test_equals_the_float64_reference(options, numbers, decay):
    options = options | numbers | decay
    theirs = reference.rmsprop(grads, START, 200, schedule_f64, **options)
    assert distance(trajectory(rmsprop(schedule, **options)), theirs) < 1e-5


@pytest.mark.parametrize(("options", "more"), cycled(grid(FLAGS), [{"momentum": 0.9, "weight_decay": 0.1}, {}]))
def test_equals_the_float64_reference_on_complex_parameters(options, more):
    options = options | more
    start = (START + 1j * START[::-1]).astype(np.complex64)
    theirs = reference.rmsprop(grads, start, 200, 1e-2, **options)
    ours = trajectory(rmsprop(1e-2, **options), start)
    assert ours.dtype == np.complex64
    assert distance(ours, theirs, start) < 1e-5


COUPLED = {"weight_decay": 0.25, "decoupled": False}

# One parameter at 8, gradients 2 then 6, and numbers with exact binary fractions and exact roots.
EXACT = {
    # ν = 1, then 0.75 + 9 with decay 0.75: √(1 + 3) = 2.
    "eps inside": ({"decay": 0.75, "eps": 3.0}, [8 - 0.5 * 2 / 2]),
    "eps outside": ({"decay": 0.75, "eps": 3.0, "eps_in_sqrt": False}, [8 - 0.5 * 2 / 4]),
    "initial scale": ({"decay": 0.75, "eps": 0.0, "initial_scale": 4.0}, [8 - 0.5 * 2 / 2]),
    "decay 1 and eps 0": ({"decay": 1.0, "eps": 0.0, "initial_scale": 4.0}, [8 - 0.5 * 2 / 2, 7.5 - 0.5 * 6 / 2]),
    "decay 0": ({"decay": 0.0, "eps": 0.0}, [8 - 0.5, 7.5 - 0.5]),
    # An average that never moves has no bias; and a variance of exactly 0 divides by 1.
    "bias correction, decay 1": (
        {"decay": 1.0, "eps": 0.0, "initial_scale": 4.0, "bias_correction": True},
        [8 - 0.5 * 2 / 2, 7.5 - 0.5 * 6 / 2],
    ),
    "centered, decay 0 and eps 0": ({"decay": 0.0, "eps": 0.0, "centered": True}, [8 - 0.5 * 2, 7 - 0.5 * 6]),
    "centered, decay 0 and eps 0 outside": (
        {"decay": 0.0, "eps": 0.0, "centered": True, "eps_in_sqrt": False},
        [8 - 0.5 * 2, 7 - 0.5 * 6],
    ),
    "bias correction": ({"decay": 0.75, "eps": 0.0, "bias_correction": True}, [8 - 0.5 * 2 / 2]),
    # μ = 1, ν = ½(0 + ½·2²) = 1, then μ = 3.5, ν = ½(1 + ½·5²) = 6.75, √(6.75 + 2.25) = 3 (eps only then).
    "centered": ({"decay": 0.5, "eps": 0.0, "centered": True}, [8 - 0.5 * 2 / 1]),
    "centered, eps": ({"decay": 0.5, "eps": 2.25, "centered": True}, [None, ("last", 0.5 * 6 / 3)]),
    "centered, initial scale": ({"decay": 0.5, "eps": 0.0, "centered": True, "initial_scale": 6.0}, [8 - 0.5 * 2 / 2]),
    # (ν + ½μ²) / ½ = (1 + ½) / ½ = 3, √(3 + 1) = 2.
    "centered, bias correction": (
        {"decay": 0.5, "eps": 1.0, "centered": True, "bias_correction": True},
        [8 - 0.5 * 2 / 2],
    ),
    # From here on α = ½, g = 2 and then 6.
    "sgd": (SGD, [7, 4]),
    "momentum": (SGD | {"momentum": 0.5}, [7, 7 - (0.5 * 1 + 3)]),
    "nesterov": (SGD | {"momentum": 0.5, "nesterov": True}, [8 - (0.5 * 1 + 1), 6.5 - (0.5 * 3.5 + 3)]),
    "lr outside momentum": (
        SGD | {"momentum": 0.5, "lr_in_momentum": False, "rates": [0.5, 0.25]},
        [7, 7 - 0.25 * (0.5 * 2 + 6)],
    ),
    "lr inside momentum": (SGD | {"momentum": 0.5, "rates": [0.5, 0.25]}, [7, 7 - (0.5 * 1 + 0.25 * 6)]),
    "coupled decay": (SGD | COUPLED, [8 - 0.5 * (2 + 2)]),
    "coupled decay enters the average": (COUPLED | {"decay": 0.75, "eps": 0.0}, [8 - 0.5 * 4 / 2]),
    "decoupled decay": (SGD | {"weight_decay": 0.25}, [8 - 0.5 * 2 - 0.5 * 0.25 * 8]),
    "decoupled decay stays out of the buffer": (
        SGD | {"weight_decay": 0.25, "momentum": 0.5, "rates": [0.5, 0.0]},
        [6, 6 - 0.5 * 1],
    ),
}


@pytest.mark.parametrize(("options", "expected"), EXACT.values(), ids=EXACT.keys())
def test_exact_values(options, expected):
    options = dict(options)
    rates = jnp.asarray(options.pop("rates", [0.5, 0.5]))
    tx = rmsprop(lambda count: rates[count], **options)
    params = jnp.float32(8.0)
    state = tx.init(params)
    for gradient, value in zip((2.0, 6.0), expected, strict=False):
        updates, state = tx.update(jnp.float32(gradient), state, params)
        if isinstance(value, tuple):
            assert updates == -value[1]
        params = params + updates
        assert value is None or isinstance(value, tuple) or params == value


# --- Inputs that break other implementations -------------------------------------------------------------

ALL_FLAGS = grid(FLAGS, [{}, {"momentum": 0.9, "nesterov": True}])
DTYPES = [jnp.float16, jnp.bfloat16, jnp.float32, jnp.complex64]


@pytest.mark.parametrize(
    ("options", "dtype", "eps"),
    cycled(ALL_FLAGS, [DTYPES[i] for i in (0, 1, 2, 3, 2, 3, 0, 1, 3, 2)], [0.0, 0.0, 1e-8]),
)
def test_a_zero_gradient_gives_a_zero_update(options, dtype, eps):
    _, updates, state = follow(rmsprop(1e-3, eps=eps, **options), jnp.zeros((3, 4), dtype), jnp.ones(4, dtype))
    np.testing.assert_array_equal(updates, np.zeros((3, 4)))
    assert updates.dtype == dtype
    chex.assert_tree_all_finite(state)


@pytest.mark.parametrize("gradient", [6e-8, 3e-4, 300.0, 6e4])
def test_float16_steps_like_float32(gradient):
    half = follow(rmsprop(1e-3), jnp.full((3, 1), gradient, jnp.float16), jnp.ones(1, jnp.float16))
    full = follow(rmsprop(1e-3), jnp.full((3, 1), jnp.float16(gradient), jnp.float32), jnp.ones(1))
    np.testing.assert_array_equal(half[1], full[1].astype(jnp.float16))
    np.testing.assert_array_equal(half[2].nu, full[2].nu)
    assert half[1][0] < 0


@pytest.mark.parametrize(
    ("decay", "dtype"), [(0.9, jnp.float16), (0.99, jnp.bfloat16), (0.999, jnp.float16), (0.9999, jnp.bfloat16)]
)
def test_averages_of_half_precision_gradients_are_exact(decay, dtype):
    gradients = np.random.default_rng(0).normal(size=(1000, 64)).astype(dtype)
    *_, state = follow(scale_by_rms(decay), gradients, jnp.zeros(64, dtype))
    expected = np.zeros(64)
    for g in gradients.astype(np.float64):
        expected = decay * expected + (1 - decay) * g**2
    assert state.nu.dtype == jnp.float32
    # 1 - decay**1000 in float32 is off by 1000 · 2⁻²⁵ at most.
    np.testing.assert_allclose(state.nu, expected, rtol=3e-5)
    # And it forgets: in bfloat16 0.999 is 1, and nothing ever decays.
    *_, after = follow(scale_by_rms(0.999), np.pad(gradients, ((0, 5000), (0, 0))), jnp.zeros(64, dtype))
    assert after.nu.max() < 0.02


@pytest.mark.parametrize(
    ("parameter", "gradient"), [(jnp.bfloat16, jnp.float32), (jnp.float16, jnp.float32), (jnp.float32, jnp.float16)]
)
def test_the_state_keeps_its_dtype(parameter, gradient):
    tx = rmsprop(1e-3, centered=True, momentum=0.9)
    state = tx.init(jnp.ones(3, parameter))
    updates, after = tx.update(jnp.ones(3, gradient), state)
    assert updates.dtype == gradient
    assert dtypes(after) == dtypes(state)


@pytest.mark.parametrize("eps_in_sqrt", [True, False])
@pytest.mark.parametrize(
    ("c", "noise", "eps"),
    [(1.0, 1e-4, 0.0), (1.0, 1e-3, 1e-8), (1.0, 0.0, 0.0), (10.0, 1e-4, 1e-5), (1e-3, 1e-4, 1e-8)],
)
def test_nearly_constant_gradients_stay_finite(eps_in_sqrt, eps, c, noise):
    gradients = np.float32(c * (1 + noise * np.random.default_rng(0).normal(size=(2000, 100))))
    options = {"centered": True, "eps": eps, "eps_in_sqrt": eps_in_sqrt}
    params, updates, state = follow(rmsprop(1e-3, **options), gradients, jnp.zeros(100))
    chex.assert_tree_all_finite((params, updates, state))
    if noise:  # the step is about g / standard deviation: against float64 over the last half
        deviations = np.sqrt(np.asarray(state.nu, np.float64))
        np.testing.assert_allclose(np.median(deviations), c * noise, rtol=0.3)


def test_centered_with_bias_correction_starts_with_a_step_of_the_learning_rate():
    for gradient in (1e-6, 0.3, 1e6):
        tx = rmsprop(1e-3, centered=True, bias_correction=True, eps=0.0)
        updates, _ = tx.update(jnp.float32(gradient), tx.init(jnp.float32(0)))
        # ν̂ = (ρ(1-ρ) + ρ(1-ρ)²) g² / (1-ρ) = ρ(2-ρ) g² = 0.99 g²
        np.testing.assert_allclose(updates, -1e-3 / np.sqrt(0.99), rtol=1e-6)


# --- Long memories, and gradients whose square underflows ------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"centered": True}, {"eps_in_sqrt": False}], ids=str)
def test_the_first_step_with_bias_correction_is_one_whatever_the_memory(options):
    """1 - ρ in float32 is off by 0.1 percent for 0.99999. A decay in a float32 array stands for that number itself."""

    def first(decay):
        tx, g = rmsprop(1.0, decay, 0.0, bias_correction=True, **options), jnp.array(-3.0)
        return tx.update(g, tx.init(g))[0]

    for decay in (0.0, 0.9, 0.99, 0.9999, 0.99999, 0.999999, 1 - 1e-7, 1 - 1e-12):
        expected = 1.0 if not options.get("centered") else (decay * (2 - decay)) ** -0.5 if decay else 3.0
        for value in (decay, np.float64(decay), jnp.float32(decay)):
            if value != 1:
                np.testing.assert_allclose(first(value), expected, rtol=1e-6)
        if decay < 1 - 1e-7:
            np.testing.assert_allclose(jax.jit(first)(jnp.float32(decay)), expected, rtol=1e-6)
    np.testing.assert_allclose(first(0.999), 1.0, rtol=1e-5)  # 1 - ρᵗ is Optax's here, see test_equals_adam
    with jax.enable_x64(True):
        np.testing.assert_allclose(first(0.99999), 1.0, rtol=1e-5 if options.get("centered") else 1e-9)


@pytest.mark.parametrize("decay", [0.9999, 0.99999, 0.999999])
@pytest.mark.parametrize("centered", [False, True])
def test_a_long_memory_equals_the_float64_reference(decay, centered):
    options = {"decay": decay, "bias_correction": True, "centered": centered, "eps": 1e-3}
    theirs = reference.rmsprop(grads, START, 200, 1e-2, **options)
    assert distance(trajectory(rmsprop(1e-2, **options)), theirs) < 1e-5


MAGNITUDES = np.float32(10.0) ** np.arange(-30, -9.9, 0.25, dtype=np.float32)
FORMS = {
    "eps 1e-20 outside": {"eps": 1e-20, "eps_in_sqrt": False},
    "eps 1e-8 outside": {"eps": 1e-8, "eps_in_sqrt": False},
    "no eps outside": {"eps": 0.0, "eps_in_sqrt": False},
    "no eps": {"eps": 0.0},
    "eps 1e-36": {"eps": 1e-36},
    "eps 1e-20": {"eps": 1e-20},
}


@pytest.mark.parametrize(
    ("form", "bias_correction", "decays"),
    [(form, on, [(0.0, 0.999), (0.9, 0.99999)][(i + on) % 2]) for i, form in enumerate(FORMS) for on in (False, True)],
)
def test_a_tiny_gradient_makes_no_longer_step_than_in_exact_arithmetic(form, bias_correction, decays):
    """Float32 holds no square of a number below 1e-19. Such an average once counted as 0 while ε was smaller still."""
    options = FORMS[form] | {"bias_correction": bias_correction}
    rng = np.random.default_rng(0)
    for decay, signs in itertools.product(decays, (np.ones((60, 1)), rng.normal(size=(60, 1)))):
        gradients = (signs * MAGNITUDES).astype(np.float32)
        start = np.zeros_like(MAGNITUDES)
        _, updates, _ = follow(rmsprop(1.0, decay, **options), jnp.asarray(gradients), jnp.asarray(start))
        theirs = reference.rmsprop(lambda p, t, g=gradients: g[t], start, 60, 1.0, decay, **options)
        sizes, exact = np.abs(np.asarray(updates, np.float64)), np.abs(np.diff(theirs, axis=0, prepend=0))
        assert (sizes.max(0) <= 1.07 * exact.max(0)).all()
        if form in ("eps 1e-20 outside", "eps 1e-8 outside", "eps 1e-20") and signs[0] == signs[1] and decay < 0.99:
            seen = MAGNITUDES > 1e-18
            np.testing.assert_allclose(sizes[:, seen], exact[:, seen], rtol=1e-4)


@pytest.mark.parametrize("gradient", [3e-18, 1e-18, 4e-19, 3e-17, -3e-18])
@pytest.mark.parametrize("state_dtype", [None, jnp.bfloat16])
def test_the_first_step_of_dreamer_with_a_tiny_gradient(gradient, state_dtype):
    tx = dialects.dreamer(1.0, warmup=0, agc=None, state_dtype=state_dtype)
    updates, _ = tx.update(jnp.float32(gradient), tx.init(jnp.float32(0)), jnp.float32(0))
    np.testing.assert_allclose(updates, -gradient / (abs(gradient) + 1e-20), rtol=2e-2 if state_dtype else 1e-4)


OTHERS = grid([{}, {"centered": True}, {"eps_in_sqrt": False}, {"momentum": 0.9}, {"bias_correction": True}])


@pytest.mark.parametrize(("options", "bad"), cycled(OTHERS * 2, [1e19, 3e38, 1e20, -3e38, 1e25, -1e19, 2e20]))
def test_recovers_from_a_huge_gradient(options, bad):
    tx = rmsprop(1e-3, **options)
    gradients = np.ones((1511, 2), np.float32)
    gradients[5], gradients[10, 0], gradients[11::2] = -1.0, bad, -0.5
    params, updates, state = follow(tx, gradients, jnp.zeros(2))
    chex.assert_tree_all_finite((params, updates, state))
    # The step itself is as long as a first step, about √1/(1-ρ), and not 1e25 / √largest ...
    assert 1e-3 < abs(updates[10, 0]) < 20e-3
    # ... and at the end the two columns, with and without the accident, walk together again.
    np.testing.assert_allclose(updates[-10:, 0], updates[-10:, 1], rtol=1e-3)
    assert np.abs(updates[-10:]).min() > 1e-5


@pytest.mark.parametrize(("options", "decay"), cycled(OTHERS * 2, [0.0, 0.5, 0.9, 0.999, 0.9999, 0.99, 1.0]))
def test_an_average_of_huge_gradients_stays_finite(options, decay):
    gradients = np.tile(np.float32([[3e38, 3e38], [3e38, -3e38]]), (250, 1))
    *_, state = follow(rmsprop(1e-3, decay=decay, **options), gradients, jnp.zeros(2))
    chex.assert_tree_all_finite(state)


@pytest.mark.parametrize(
    ("options", "state_dtype", "wide"),
    cycled(OTHERS * 2, ["complex64", "float32", "complex64"], [False, True, True, False]),
)
def test_huge_gradients_of_any_precision_leave_room(options, state_dtype, wide):
    """Both components at the limit, and signs that make g - μ twice as large: the bound leaves a factor of 16 for this."""
    with jax.enable_x64(wide):
        dtype = jnp.dtype(state_dtype)
        complex_ = jnp.issubdtype(dtype, jnp.complexfloating)
        size = (1 + 1j if complex_ else 1) * (1e60 if wide else 3e38)
        kind = (jnp.complex128 if complex_ else jnp.float64) if wide else dtype
        gradients = np.concatenate([size * np.where(np.arange(60) % 7 < 3, 1, -1), np.ones(2000)]).astype(kind)
        tx = rmsprop(1e-3, decay=0.5, **options)

        def step(state, g):
            updates, state = tx.update(g, state)
            return state, (updates, state.nu)

        _, (updates, nu) = jax.lax.scan(step, tx.init(jnp.zeros((), dtype)), gradients)
        chex.assert_tree_all_finite((updates, nu))
        assert nu.max() > 1e36  # it is at its limit
        np.testing.assert_allclose(nu[-1], 0 if options.get("centered") else 1, atol=1e-5)
        assert abs(updates[-1]) > 1e-4  # and the parameter moves again


@pytest.mark.parametrize("bad", [jnp.inf, -jnp.inf, jnp.nan])
@pytest.mark.parametrize(("options", "dtype"), cycled(OTHERS, [jnp.float32, jnp.float16, jnp.complex64]))
def test_does_not_hide_inf_and_nan(options, dtype, bad):
    tx = rmsprop(1e-3, **options)
    params = jnp.ones(3, dtype)
    _, state = tx.update(jnp.ones(3, dtype), tx.init(params), params)
    updates, _ = tx.update(jnp.ones(3, dtype).at[1].set(bad), state, params)
    assert jnp.isfinite(updates).tolist() == [True, False, True]


@pytest.mark.slow
@pytest.mark.parametrize(("options", "eps"), cycled(grid(FLAGS), [0.0, 1e-3, 0.0]))
def test_third_derivatives_at_exact_zeros_are_finite(options, eps):
    tx = rmsprop(0.1, eps=eps, **options)

    def loss(g):
        updates, state = tx.update(g, tx.init(g))
        return (updates + tx.update(g, state)[0]).sum()

    derivatives = jax.grad(loss), jax.hessian(loss), jax.jacfwd(jax.hessian(loss))
    chex.assert_tree_all_finite(jax.jit(lambda g: [f(g) for f in derivatives])(jnp.array([0.0, 1.0])))


@pytest.mark.parametrize(
    ("ends", "options"),
    [
        ((1.0,), {"bias_correction": True}),
        ((1.0,), {"bias_correction": True, "centered": True}),
        ((1.0,), {"bias_correction": True, "initial_scale": 1.0}),
        ((0.0,), {"centered": True}),
        ((0.0, 0.9991, 1.0), {"centered": True, "bias_correction": True, "eps_in_sqrt": False}),
        ((0.0, 0.99, 0.9999), {"eps_in_sqrt": False}),
    ],
    ids=str,
)
def test_first_derivatives_at_the_ends_of_decay_are_finite(ends, options):
    @jax.jit
    @functools.partial(jax.grad, argnums=(0, 1, 2))
    def derivatives(decay, eps, g):
        tx = rmsprop(0.1, decay, eps, **options)
        updates, state = tx.update(g, tx.init(g))
        return updates + tx.update(g, state)[0]

    for decay, eps, g in itertools.product(ends, (0.0, 1e-20, 1e-3), (0.0, 1.0)):
        chex.assert_tree_all_finite(derivatives(decay, eps, jnp.float32(g)))


def test_eps_outside_is_exact_where_the_average_is_zero():
    # ν = 0 and g ≠ 0: ρ = 1, or a gradient whose square underflows.
    for options, g, eps in (({"decay": 1.0}, 3.0, 0.5), ({}, 1e-25, 1e-18), ({}, 1e-30, 0.25)):
        tx = rmsprop(1.0, eps=eps, eps_in_sqrt=False, **options)
        np.testing.assert_allclose(tx.update(jnp.float32(g), tx.init(jnp.float32(0)))[0], -g / eps, rtol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "eps", "dtype"),
    cycled(ALL_FLAGS, [1e-8, 0.0, 0.0, 1e-8, 1e-20], [DTYPES[i] for i in (2, 3, 3, 2)]),
)
def test_derivatives_through_updates(options, eps, dtype):
    data = jnp.array([1.0, 0.0, -2.0], dtype)

    def loss(rate, start, data):
        tx = rmsprop(rate, eps=eps, **options)
        params, state = start, tx.init(start)
        for _ in range(3):
            updates, state = tx.update(data * params.real.astype(dtype), state, params)
            params = params + updates
        return jnp.sum(params.real**2)

    derivatives = jax.jit(jax.grad(loss, (0, 1, 2)))(0.01, jnp.ones(3, dtype), data)
    chex.assert_tree_all_finite(derivatives)
    assert derivatives[0] != 0


@pytest.mark.slow
@pytest.mark.parametrize("flags", [{}, {"centered": True}, {"bias_correction": True}, {"eps_in_sqrt": False}])
def test_derivatives_with_respect_to_every_number(flags):
    def loss(numbers):
        rate, decay, eps, momentum, initial_scale = numbers
        tx = rmsprop(rate, decay, eps, initial_scale, momentum=momentum, **flags)
        params = jnp.array([1.0, -3.0])
        state = tx.init(params)
        for _ in range(3):
            updates, state = tx.update(2 * params, state, params)
            params = params + updates
        return jnp.sum(params**2)

    losses, *derivatives = (jax.jit(f(loss)) for f in (jax.vmap, jax.grad, jax.jacfwd))
    with jax.enable_x64(True):
        for decay in (0.0, 0.9):
            numbers, h = np.array([0.01, decay, 0.1, 0.5, 0.2]), 1e-6
            # One-sided at decay 0, of second order: below it there is no average.
            here, ahead, twice = np.asarray(losses(numbers + h * np.kron([[0], [1], [2]], np.eye(5)))).reshape(3, 5)
            expected = (4 * ahead - twice - 3 * here) / (2 * h)
            for derivative in (np.asarray(f(numbers)) for f in derivatives):
                chex.assert_tree_all_finite(derivative)
                # At decay 0 the variance is 0 by a `where`, which hides how it would grow.
                known = [True, not flags.get("centered") or decay > 0, True, True, True]
                np.testing.assert_allclose(derivative[known], expected[known], rtol=1e-5, atol=1e-7)


BAD = {
    "decay above 1": ({"decay": 1.5}, ValueError, "decay=1.5"),
    "decay below 0": ({"decay": -0.5}, ValueError, "decay=-0.5"),
    "decay NaN": ({"decay": float("nan")}, ValueError, "decay=nan"),
    "decay array": ({"decay": np.array([0.9, 0.99])}, ValueError, r"decay has shape \(2,\)"),
    "eps below 0": ({"eps": -1}, ValueError, "eps=-1"),
    "eps NaN": ({"eps": np.float32("nan")}, ValueError, "eps="),
    "learning rate NaN": ({"learning_rate": float("nan")}, ValueError, "learning_rate=nan"),
    "learning rate inf": ({"learning_rate": float("inf")}, ValueError, "learning_rate=inf"),
    "learning rate too large": ({"learning_rate": 1e39}, ValueError, "learning_rate=1e[+]39.*float32 can hold"),
    "learning rate of 400 digits": ({"learning_rate": 10**400}, ValueError, "learning_rate=100.{,40}: allowed"),
    "learning rate too small": ({"learning_rate": -1e39}, ValueError, "learning_rate=-1e[+]39.*float32 can hold"),
    "learning rate -inf": ({"learning_rate": np.array(-np.inf)}, ValueError, "learning_rate=array.-inf.: allowed"),
    "learning rate complex": ({"learning_rate": 1j}, TypeError, "learning_rate=1j has type complex"),
    "learning rate complex array": ({"learning_rate": jnp.array(1j)}, TypeError, "learning_rate has dtype complex64"),
    "learning rate NumPy bool": ({"learning_rate": np.True_}, TypeError, "learning_rate has dtype bool"),
    "learning rate array of text": ({"learning_rate": np.array("1")}, TypeError, "learning_rate has dtype <U1"),
    "decay NumPy array": ({"decay": np.array(1.5)}, ValueError, "decay=array.1.5."),
    "eps too large": ({"eps": 1e39}, ValueError, "eps=1e[+]39.*float32 can hold"),
    "momentum NumPy scalar": ({"momentum": np.float64(1.1)}, ValueError, "momentum=.*1.1"),
    "weight decay NumPy array": ({"weight_decay": np.array(-1.0)}, ValueError, "weight_decay=array"),
    "initial scale NumPy array": ({"initial_scale": np.array(-0.5)}, ValueError, "initial_scale=array.-0.5."),
    "initial scale inf": ({"initial_scale": math.inf}, ValueError, "initial_scale=inf"),
    "mask alone": ({"weight_decay_mask": lambda p: p}, ValueError, "weight_decay_mask needs weight_decay"),
    "nesterov NumPy bool alone": ({"nesterov": np.True_}, ValueError, "nesterov=True needs momentum"),
    "learning rate None": ({"learning_rate": None}, ValueError, "learning_rate=None.*scale_by_rms"),
    "learning rate text": ({"learning_rate": "0.1"}, TypeError, "learning_rate='0.1' has type str"),
    "learning rate bool": ({"learning_rate": True}, TypeError, "learning_rate=True has type bool"),
    "momentum above 1": ({"momentum": 2}, ValueError, r"momentum=2.*\[0, 1\]"),
    "momentum below 0": ({"momentum": -1.0}, ValueError, "momentum=-1.0"),
    "initial scale below 0": ({"initial_scale": -1.0}, ValueError, "initial_scale=-1.0"),
    "weight decay below 0": ({"weight_decay": -0.1}, ValueError, "weight_decay=-0.1"),
    "rate outside of no buffer": ({"lr_in_momentum": False}, ValueError, "lr_in_momentum=False needs momentum, got"),
    "coupled without decay": ({"decoupled": np.False_}, ValueError, "decoupled=False needs weight_decay, got"),
    "nesterov alone": ({"nesterov": True}, ValueError, "nesterov=True needs momentum"),
    "centered text": ({"centered": "yes"}, TypeError, "centered='yes' has type str"),
    "flag as a number": ({"lr_in_momentum": 1}, TypeError, "lr_in_momentum=1 has type int"),
    "state dtype": ({"state_dtype": jnp.int8}, ValueError, "state_dtype=.*int8.*allowed"),
}


@pytest.mark.parametrize(("options", "error", "message"), BAD.values(), ids=BAD.keys())
def test_bad_hyperparameters_are_refused(options, error, message):
    with pytest.raises(error, match=message):
        rmsprop(**{"learning_rate": 0.1} | options)
    if name := next(iter(options.keys() & {"decay", "eps", "initial_scale", "centered", "state_dtype"}), None):
        with pytest.raises(error, match=message):
            scale_by_rms(**{name: options[name]})


def test_good_hyperparameters_are_accepted():
    for number in (0, 1, 0.0, np.float32(1), np.float64(0.5), np.int64(1), np.array(0.5), jnp.float32(0.5)):
        rmsprop(number, number, number, number, momentum=number, weight_decay=number)
    rmsprop(0.1, jnp.int32(1), momentum=jnp.int32(0)).init(jnp.ones(1))
    # The value of a JAX array is never looked at: it may be traced.
    rmsprop(jnp.float32(-1), jnp.float32(7), jnp.float32(-1))
    jax.jit(lambda x: rmsprop(x, x, x, x, momentum=x, weight_decay=x).init(jnp.ones(2)))(-1.0)


@pytest.mark.parametrize("options", [{}, {"momentum": 0.9, "lr_in_momentum": False}])
@pytest.mark.parametrize("rate", [-0.1, -1, np.float32(-0.1), lambda count: -0.1, lambda count: jnp.float32(-0.1)])
def test_a_negative_learning_rate_ascends_as_optax_does(rate, options):
    ours, g = rmsprop(rate, **options), jnp.array([1.0, -2.0])
    # Optax has no place for the rate outside the buffer; for one step it does not matter.
    theirs = optax.rmsprop(rate, **{k: v for k, v in options.items() if k == "momentum"})
    updates, _ = ours.update(g, ours.init(g))
    np.testing.assert_allclose(updates, theirs.update(g, theirs.init(g))[0], rtol=1e-6)
    assert (updates * g > 0).all()


SCHEDULES = {
    "matrix": (lambda count: jnp.ones((3, 1)), ValueError, r"learning_rate\(count\) has shape \(3, 1\)"),
    "list of one": (lambda count: np.ones(1), ValueError, r"learning_rate\(count\) has shape \(1,\)"),
    "None": (lambda count: None, TypeError, r"learning_rate\(count\)=None has type NoneType"),
    "text": (lambda count: "0.1", TypeError, r"learning_rate\(count\)='0.1' has type str"),
    "bool": (lambda count: count < 3, TypeError, r"learning_rate\(count\) has dtype bool"),
    "complex": (lambda count: 1j * count, TypeError, r"learning_rate\(count\) has dtype complex64"),
    "NaN": (lambda count: math.nan, ValueError, r"learning_rate\(count\)=nan"),
    "tuple": (lambda count: (0.1,), TypeError, r"learning_rate\(count\)=\(0.1,\) has type tuple"),
}


@pytest.mark.parametrize(("schedule", "error", "message"), SCHEDULES.values(), ids=SCHEDULES)
def test_a_schedule_must_return_a_number(schedule, error, message):
    tx = rmsprop(schedule)
    for update in (tx.update, jax.jit(tx.update)):
        with jax.numpy_dtype_promotion("standard"), pytest.raises(error, match=message + ".*: allowed is"):
            update(jnp.ones(3), tx.init(jnp.ones(3)))


def test_schedules_may_return_any_number():
    for rate in (1, 0.5, np.float64(0.5), np.array(1), jnp.int32(1), jnp.bfloat16(0.5)):
        tx = rmsprop(lambda count, rate=rate: rate, decay=1.0, eps=0.0, initial_scale=1.0)
        assert tx.update(jnp.ones(()), tx.init(jnp.ones(())))[0] == -float(rate)


def test_a_decay_that_rounds_to_one_is_warned_about():
    with pytest.warns(UserWarning, match="rounds 0.999 to 1.*hyperparam_dtype"):
        rmsprop(1e-3, jnp.bfloat16(0.999))
    with pytest.warns(UserWarning, match="rounds 0.999 to 1.0: .*hyperparam_dtype"):
        jax.jit(lambda decay: rmsprop(1e-3, decay).init(decay))(jnp.bfloat16(0.999))


def test_signatures_extend_those_of_optax():
    for ours, theirs in ((rmsprop, optax.rmsprop), (scale_by_rms, optax.scale_by_rms)):
        parameters = [inspect.signature(f).parameters.values() for f in (ours, theirs)]
        positional = [(p.name, p.default) for p in parameters[0] if p.kind is p.POSITIONAL_OR_KEYWORD]
        assert positional == [(p.name, p.default) for p in parameters[1]]
    assert inspect.signature(rmsprop).parameters["learning_rate"].annotation is optax.ScalarOrSchedule


# --- Any tree, dtype, magnitude ---------------------------------------------------------------------------


@pytest.mark.slow
@settings(max_examples=40)
@example(  # a variance of exactly 0, with a gradient that overflows when it is divided by ε
    gradients=[(0.0, 3.4e8), (0.0, 0.0)],
    dtype=jnp.bfloat16,
    eps=1e-30,
    decay=0.0,
    initial_scale=0.0,
    flags={"eps_in_sqrt": False, "centered": True, "bias_correction": True},
    others={"momentum": 0.0},
    state_dtype=None,
)
@given(
    gradients=st.lists(st.tuples(finite_floats, finite_floats), min_size=1, max_size=6),
    dtype=st.sampled_from(DTYPES),
    eps=st.sampled_from([0.0, 1e-30, 1e-8, 1.0]),
    decay=st.sampled_from([0.0, 0.5, 0.9, 0.999, 1.0]),
    initial_scale=st.sampled_from([0.0, 1.0]),
    flags=st.sampled_from(FLAGS),
    others=st.sampled_from([{}, *MOMENTA[1:], {"momentum": 0.9, "weight_decay": 0.1}]),
    state_dtype=st.sampled_from([None, *NARROW_DTYPES]),
)
def test_finite_gradients_make_no_nan(gradients, dtype, eps, decay, initial_scale, flags, others, state_dtype):
    tx = rmsprop(1e-3, decay, eps, initial_scale, state_dtype=state_dtype, **flags, **others)
    params = jnp.ones(2, dtype)
    state = tx.init(params)
    for g in gradients:
        limit = float(jnp.finfo(dtype).max)
        g = jnp.asarray(np.clip(np.float32(g), -limit, limit), dtype)
        updates, state = tx.update(g, state, params)
        # g / √ε may be too large for the gradient's dtype; NaN it must never be.
        assert not np.isnan(updates).any()
        assert np.isfinite(_storage.decode(state.nu)).all()
        assert state.trace is None or state_dtype is None or np.isfinite(_storage.decode(state.trace)).all()
        plain = not others and state_dtype is None and not flags["centered"] and dtype == jnp.float32
        if decay < 1 and initial_scale == 0 and plain:
            assert np.abs(updates).max() <= 1e-3 / np.sqrt(1 - decay) * (1 + 1e-6)


@settings(max_examples=50)
@given(
    gradients=st.lists(st.floats(2.0**-40, 2.0**40, width=32), min_size=1, max_size=5),
    signs=st.lists(st.sampled_from([-1.0, 1.0]), min_size=5, max_size=5),
    flags=st.sampled_from(FLAGS[:2] + FLAGS[4:6]),
)
@pytest.mark.slow
def test_any_magnitude_equals_float64(gradients, signs, flags):
    series = np.float32([s * g for s, g in zip(signs, gradients, strict=False)])
    _, updates, _ = follow(rmsprop(1.0, eps=1e-8, **flags), jnp.asarray(series), jnp.float32(0.0))
    theirs = reference.rmsprop(lambda p, t: series[t], np.float32(0), len(series), 1.0, eps=1e-8, **flags)
    np.testing.assert_allclose(updates, np.diff(theirs, prepend=0), rtol=1e-5, atol=1e-15)
