"""Inside other people's training loops: the table of frameworks and wrappers in notebooks/loop.md, line by line."""

import functools
import pathlib
import re

import chex
import equinox as eqx
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn, nnx
from flax.training.train_state import TrainState
from helpers import follow
from problems import distance, grads, START, trajectory

from rmsprop_jax import dialects, interop, rmsprop, scale_by_rms
from rmsprop_jax._digits import load


pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("users_climate")]

PAGES = pathlib.Path(__file__).parents[1] / "notebooks"
LINES = dict(
    re.findall(r"^\| ([^|]+?) \| `([^|]+)` \| [^|]*\d+\.\d+[^|]* \|$", (PAGES / "loop.md").read_text(), re.MULTILINE)
)
NAMES = {"jax": jax, "jnp": jnp, "optax": optax, "nnx": nnx, "eqx": eqx, "TrainState": TrainState}
OURS = {"dialects": dialects, "interop": interop, "rmsprop": rmsprop, "scale_by_rms": scale_by_rms}
OPTAX = {"rmsprop": optax.rmsprop, "scale_by_rms": optax.scale_by_rms}


def run(name, optimizers=OURS, **names):
    """Executes the page's line for `name`, and returns the value that it assigns."""
    namespace = NAMES | optimizers | names
    exec(LINES[name], namespace)
    return namespace[LINES[name].partition(" = ")[0].split(",")[0].strip("(")]


def test_every_line_of_the_table_is_found():
    assert len(LINES) == 18


@pytest.mark.parametrize("name", LINES)
def test_a_line_of_the_table_runs_as_it_stands(name):
    """Every line runs. The results of most are checked below."""
    tx, params = rmsprop(0.1), {"kernels": np.ones(3, np.float32), "rest": np.ones(2, np.float32)}
    linear = eqx.nn.Linear(2, 2, key=jax.random.key(0)) if name == "Equinox" else nnx.Linear(2, 2, rngs=nnx.Rngs(0))
    linear = nn.Dense(2) if name == "Flax Linen" else linear

    def step(carry, _):
        params, state = carry
        updates, state = tx.update(params, state, params)
        return (optax.apply_updates(params, updates), state), params["rest"].sum()

    names = {"kernels": {"kernels": True, "rest": False}, "labels": {"kernels": "kernels", "rest": "rest"}}
    names |= {"model": linear, "tx": tx, "params": params, "state": tx.init(params), "step": step}
    names |= {"batches": np.arange(3), "rates": np.ones(2), "decays": np.ones(3), "train": lambda a, b: a * b}
    made = run(name, **names)
    if hasattr(made, "init"):
        measured = {"value": 1.0} if "plateau" in name else {}
        start = optax.LookaheadParams.init_synced(params) if "lookahead" in name else params
        updates, _ = made.update(params, made.init(start), start, **measured)
        assert jax.tree.structure(updates) == jax.tree.structure(start)
    else:
        assert jax.tree.leaves(made)


@functools.cache
def some_digits():
    digits = load(0)[0]
    return digits.images[:300].reshape(-1, 64), digits.labels[:300]


def cross_entropy(logits, labels):
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


# --- Optax's wrappers ---------------------------------------------------------------------------------


def kernels(value, rest):
    """A tree like the parameters of `start`: `value` for the kernels, `rest` for biases and norm."""
    dense = {"kernel": value, "bias": rest}
    return {"dense1": dense, "norm": {"scale": rest}, "dense2": dense}


def start():
    rng = np.random.default_rng(0)
    params = {
        "dense1": {"kernel": rng.normal(size=(64, 32)) / 8, "bias": np.zeros(32)},
        "norm": {"scale": np.ones(32)},
        "dense2": {"kernel": rng.normal(size=(32, 10)) / 6, "bias": np.zeros(10)},
    }
    return jax.tree.map(np.float32, params)


def loss_of(params, images, labels):
    x = jax.nn.relu(images @ params["dense1"]["kernel"] + params["dense1"]["bias"])
    x = x * params["norm"]["scale"] * jax.lax.rsqrt((x * x).mean(-1, keepdims=True) + 1e-6)
    return cross_entropy(x @ params["dense2"]["kernel"] + params["dense2"]["bias"], labels)


def fit(tx, steps=120, wrap=lambda params: params, inner=lambda params: params, passes_loss=False):
    """Trains on one batch of digits: the last parameters and state, and the loss before each step."""
    data = some_digits()
    params = wrap(start())
    state = tx.init(params)
    losses = []

    @jax.jit
    def step(params, state):
        value, gradient = jax.value_and_grad(loss_of)(inner(params), *data)
        updates, state = tx.update(gradient, state, params, **({"value": value} if passes_loss else {}))
        return optax.apply_updates(params, updates), state, value

    for _ in range(steps):
        params, state, value = step(params, state)
        losses.append(float(value))
    return params, state, losses


MASKS = {"kernels": kernels(True, False), "labels": kernels("kernels", "rest")}
LOOKAHEAD = {"wrap": optax.LookaheadParams.init_synced, "inner": lambda params: params.fast}
WRAPPERS = {
    "`optax.chain`": {},
    "`optax.inject_hyperparams`": {},
    "`optax.MultiSteps`": {"steps": 480},
    "`optax.masked`, no decay of biases and norms": {},
    "`optax.partition`, a dialect per group": {},
    "`optax.apply_if_finite`": {},
    "`optax.lookahead`": LOOKAHEAD | {"steps": 400},
    "`optax.contrib.schedule_free`": {"steps": 400},
    "`optax.contrib.reduce_on_plateau`": {"passes_loss": True},
    "`optax.contrib.sam`": {"steps": 240},
}


@pytest.mark.parametrize("name", WRAPPERS)
def test_trains_the_digits_in_a_wrapper(name):
    losses = fit(run(name, **MASKS), **WRAPPERS[name])[2]
    # From that of guessing among ten digits to less than a tenth of it, where one CPU differs from the next by a part
    # in a hundred. (The last twelve, because SAM's include those of its adversary.)
    assert losses[0] > np.log(10) - 0.05
    assert min(losses[-12:]) < losses[0] / 10


@pytest.mark.parametrize(
    "name", [name for name in WRAPPERS if not re.search("partition|masked|plateau|lookahead|MultiSteps", name)]
)
def test_a_wrapper_gives_what_it_gives_optax(name):
    ours, theirs = (trajectory(run(name, optimizers)) for optimizers in (OURS, OPTAX))
    assert np.abs(theirs - START).max() > 0.1
    assert distance(ours, theirs) < 2e-5


def test_the_learning_rate_is_read_and_set():
    tx = run("`optax.inject_hyperparams`")
    params = np.array([1.0, -1.0], np.float32)
    update = jax.jit(tx.update)
    first, state = update(params, tx.init(params), params)
    assert state.hyperparams["learning_rate"] == np.float32(3e-3)
    np.testing.assert_allclose(first, -3e-3 / np.sqrt(0.1) * params, rtol=1e-5)
    for rate in (1e-1, 1e-2):
        state = optax.tree.set(state, learning_rate=jnp.float32(rate))
        second, _ = update(params, state, params)
        assert optax.tree.get(state, "learning_rate") == np.float32(rate)
        # ν is .1 after the first gradient of 1, and .19 after the second.
        np.testing.assert_allclose(second, -rate / np.sqrt(0.19) * params, rtol=1e-5)


def test_an_injected_schedule_is_the_schedule():
    schedule = optax.exponential_decay(1e-2, 10, 0.5)
    tx = optax.inject_hyperparams(rmsprop)(learning_rate=schedule)
    assert distance(trajectory(tx), trajectory(rmsprop(schedule))) < 1e-6


@pytest.mark.parametrize("options", [{}, {"momentum": 0.9, "centered": True}, {"state_dtype": jnp.uint8}])
def test_multi_steps_are_one_step_of_the_mean(options):
    # Multiples of 1/64: the mean of two is exact however it is formed, and so the bits that rounding sees.
    gradients = np.random.default_rng(1).integers(-99, 99, (5, 2, 64)).astype(np.float32) / 64
    tx = rmsprop(0.1, **options)
    every = optax.MultiSteps(tx, every_k_schedule=2).gradient_transformation()
    many, _, state = follow(every, gradients.reshape(10, 64), START)
    np.testing.assert_allclose(many, follow(tx, gradients.mean(1), START)[0], rtol=0, atol=1e-6)
    assert state.inner_opt_state.count == 5


def test_a_mask_keeps_biases_and_norms_from_decay():
    params = jax.tree.map(np.ones_like, start())
    tx = run("`optax.masked`, no decay of biases and norms", **MASKS)
    updates, _ = tx.update(jax.tree.map(np.zeros_like, params), tx.init(params), params)
    signs = jax.tree.map(lambda u: np.unique(np.sign(u)).tolist(), updates)
    assert signs == jax.tree.map(lambda decays: [-1.0 if decays else 0.0], MASKS["kernels"])


def test_a_group_is_trained_by_its_dialect():
    params, labels = {"kernels": jnp.asarray(START), "rest": jnp.asarray(START)}, {"kernels": "kernels", "rest": "rest"}
    tx = run("`optax.partition`, a dialect per group", labels=labels)
    alone = {"kernels": dialects.pytorch(lr=3e-3, weight_decay=1e-4), "rest": dialects.tensorflow1(3e-3)}
    expected = {name: trajectory(dialect, steps=20)[-1] for name, dialect in alone.items()}
    assert np.abs(expected["kernels"] - expected["rest"]).max() > 1e-3
    together = trajectory(tx, params, 20, lambda params, t: jax.tree.map(lambda p: grads(p, t), params))
    for name in params:
        np.testing.assert_allclose(together[name][-1], expected[name], rtol=0, atol=1e-6)


def test_apply_if_finite_leaves_no_trace_of_a_bad_batch():
    tx = run("`optax.apply_if_finite`")
    _, state = tx.update(START, tx.init(START), START)
    for bad in (np.nan, np.inf, -np.inf):
        updates, after = tx.update(np.where(np.arange(64) == 3, np.float32(bad), START), state, START)
        np.testing.assert_array_equal(updates, 0)
        np.testing.assert_array_equal(after.inner_state.nu, state.inner_state.nu)
        assert after.inner_state.count == state.inner_state.count == 1


def test_a_plateau_shortens_the_step():
    tx = run("`optax.contrib.reduce_on_plateau`")
    params = jnp.ones(3)
    state = tx.init(params)
    update = jax.jit(lambda state: tx.update(params, state, params, value=jnp.float32(1.0)))
    steps = []
    for _ in range(60):
        updates, state = update(state)
        steps.append(float(-updates[0]))
    # g = 1 throughout: lr/√(1 - .9ᵗ), until ten steps have not lowered the loss; then half of that, and so on.
    base = 3e-3 / np.sqrt(1 - 0.9 ** np.arange(1, 61) + 1e-8)
    np.testing.assert_allclose(np.unique(np.round(np.log2(base / steps), 4)), np.arange(6), atol=1e-3)


def test_lookahead_steps_the_slow_weights():
    both = optax.LookaheadParams.init_synced(START)
    ours, theirs = (
        trajectory(run("`optax.lookahead`", optimizers), both, 10, lambda params, t: grads(params.fast, t))
        for optimizers in (OURS, OPTAX)
    )
    chex.assert_trees_all_close(ours, theirs, rtol=0, atol=1e-5)
    # Ten is twice the period after which the fast weights are set to the slow ones.
    np.testing.assert_allclose(ours.fast[-1], ours.slow[-1], rtol=1e-6, atol=1e-8)


def test_complex_parameters_as_two_reals():
    tx = run("`optax.contrib.split_real_and_imaginary`")
    z = jnp.asarray(START + 1j * START[::-1], jnp.complex64)
    together = trajectory(tx, z, steps=100)
    real, imaginary = (trajectory(rmsprop(3e-3), part, steps=100, grads=part_grads) for part, part_grads in halves(z))
    np.testing.assert_allclose(together.real, real, rtol=0, atol=2e-6)
    np.testing.assert_allclose(together.imag, imaginary, rtol=0, atol=2e-6)
    # It is PyTorch's view, and not ours of |g|².
    assert distance(trajectory(rmsprop(3e-3), z, steps=100), together, z) > 0.05


def halves(z):
    return [
        (z.real, lambda p, t: grads(p + 0j, t).real),
        (z.imag, lambda p, t: grads(1j * p, t).imag),
    ]


# --- jax's own transformations ------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["`jax.lax.scan`", "`jax.checkpoint`"])
def test_scan_equals_the_loop(name):
    tx = rmsprop(3e-2, momentum=0.9)

    def step(carry, t):
        params, state = carry
        updates, state = tx.update(grads(params, t), state, params)
        params = optax.apply_updates(params, updates)
        return (params, state), jnp.sum(params**2)

    params = jnp.asarray(START)
    state = tx.init(params)
    scanned = run(name, step=step, params=params, state=state, batches=jnp.arange(50))
    compiled = jax.jit(step)
    for t in range(50):
        (params, state), _ = compiled((params, state), t)
    np.testing.assert_allclose(scanned, params, rtol=0, atol=1e-6)


@pytest.mark.parametrize("options", [{}, {"momentum": 0.9, "centered": True}, {"eps_in_sqrt": False}])
def test_checkpoint_gives_the_same_derivative_in_the_learning_rate(options):
    def end(rate, wrap):
        tx = rmsprop(rate, eps=1e-3, **options)

        @wrap
        def step(carry, t):
            params, state = carry
            updates, state = tx.update(grads(params, t), state, params)
            return (optax.apply_updates(params, updates), state), None

        params = jnp.asarray(START)
        (params, _), _ = jax.lax.scan(step, (params, tx.init(params)), jnp.arange(20))
        return jnp.mean(params**2)

    derivative, end_of = (jax.jit(f, static_argnums=1) for f in (jax.grad(end), end))
    plain, saved = (derivative(1e-2, wrap) for wrap in (lambda f: f, jax.checkpoint))
    np.testing.assert_allclose(saved, plain, rtol=1e-5)
    difference = (end_of(1.01e-2, jax.checkpoint) - end_of(0.99e-2, jax.checkpoint)) / 2e-4
    np.testing.assert_allclose(plain, difference, rtol=2e-2)


def test_a_grid_of_hyperparameters_trains_at_every_point():
    rates, decays = np.logspace(-4, -2, 4, dtype=np.float32), np.float32([0.5, 0.9, 0.99])
    images, labels = some_digits()

    def train(rate, decay):
        tx = rmsprop(rate, decay)
        params = start()

        def step(carry, _):
            params, state = carry
            value, gradient = jax.value_and_grad(loss_of)(params, images, labels)
            updates, state = tx.update(gradient, state, params)
            return (optax.apply_updates(params, updates), state), value

        return jax.lax.scan(step, (params, tx.init(params)), None, length=60)[1]

    losses = np.asarray(run("`jax.vmap` over a grid", train=train, rates=rates, decays=decays))
    assert losses.shape == (4, 3, 60)
    alone = jax.jit(train)
    for i, rate in enumerate(rates):
        np.testing.assert_allclose(losses[i, 1, :20], np.asarray(alone(rate, decays[1]))[:20], rtol=1e-3)
    # A good rate and a poor one: the axes of the grid are not swapped.
    assert 10 * losses[:, 1, -1].min() < losses[0, 1, 0]
    assert losses[:, 1, -1].min() < losses[0, 1, -1] / 4


# --- Frameworks ---------------------------------------------------------------------------------------


# Each returns a carry, and a step from one carry to the next and the loss.


def with_nnx(optimizers, images, labels):
    rngs = nnx.Rngs(0)
    model = nnx.Sequential(nnx.Linear(64, 32, rngs=rngs), nnx.relu, nnx.Dropout(0.0), nnx.Linear(32, 10, rngs=rngs))
    optimizer = run("Flax NNX", optimizers, model=model)

    @nnx.jit
    def step(model, optimizer):
        value, gradient = nnx.value_and_grad(lambda model: cross_entropy(model(images), labels))(model)
        optimizer.update(model, gradient)
        return value

    return (model, optimizer), lambda both: (both, step(*both))


class Linen(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(10)(nn.relu(nn.Dense(32)(x)))


def with_linen(optimizers, images, labels):
    model = Linen()
    params = model.init(jax.random.key(0), images)["params"]
    state = run("Flax Linen", optimizers, model=model, params=params)

    @jax.jit
    def step(state):
        def loss(params):
            return cross_entropy(state.apply_fn({"params": params}, images), labels)

        value, gradient = jax.value_and_grad(loss)(state.params)
        return state.apply_gradients(grads=gradient), value

    return state, step


def with_equinox(optimizers, images, labels):
    # Its activation functions are leaves that are not arrays: None after the filter, in all trees.
    model = eqx.nn.MLP(64, 10, 32, depth=1, key=jax.random.key(0))
    tx = optimizers["rmsprop"](3e-3)
    state = run("Equinox", optimizers, model=model, tx=tx)

    @eqx.filter_jit
    def step(carry):
        model, state = carry
        value, gradient = eqx.filter_value_and_grad(lambda m: cross_entropy(jax.vmap(m)(images), labels))(model)
        updates, state = tx.update(gradient, state, eqx.filter(model, eqx.is_inexact_array))
        return (eqx.apply_updates(model, updates), state), value

    return (model, state), step


def with_haiku(optimizers, images, labels):
    net = hk.without_apply_rng(hk.transform(lambda x: hk.nets.MLP([32, 10])(x)))
    params = net.init(jax.random.key(0), images)
    tx = optimizers["rmsprop"](3e-3)
    state = run("Haiku", optimizers, params=params, tx=tx)

    @jax.jit
    def step(carry):
        params, state = carry
        value, gradient = jax.value_and_grad(lambda p: cross_entropy(net.apply(p, images), labels))(params)
        updates, state = tx.update(gradient, state, params)
        return (optax.apply_updates(params, updates), state), value

    return (params, state), step


def losses(framework, optimizers, steps):
    carry, step = framework(optimizers, *some_digits())
    values = []
    for _ in range(steps):
        carry, value = step(carry)
        values.append(float(value))
    return values


@pytest.mark.parametrize("framework", [with_nnx, with_linen, with_equinox, with_haiku])
def test_trains_in_a_framework(framework):
    ours, theirs = losses(framework, OURS, 100), losses(framework, OPTAX, 10)
    assert ours[0] > np.log(10) - 0.15
    assert ours[-1] < ours[0] / 10
    # The same losses at first; then a rounding has grown.
    np.testing.assert_allclose(ours[:10], theirs, rtol=1e-4)


# --- Rows of a table ----------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"centered": True, "momentum": 0.9, "bias_correction": True}])
def test_rows_that_were_not_touched_keep_average_and_value(options):
    """The page's recipe against one small table per row, which sees an update only when its row is touched."""
    blocks = re.findall(r"```python\n(.*?)```", (PAGES / "recipes.md").read_text(), re.DOTALL)
    (block,) = [block for block in blocks if "return_inverse" in block]
    block = block.replace("rmsprop(1e-2)", "rmsprop(1e-2, **options)")
    namespace = {"options": options}
    exec(block, namespace)
    tx, step = namespace["tx"], namespace["step"]
    rng = np.random.default_rng(0)
    table = rng.normal(size=(12, 5)).astype(np.float32)
    state, update = tx.init(table), jax.jit(tx.update)
    alone = [(row, tx.init(row)) for row in table]
    touched = np.zeros(12, int)
    for ids in rng.integers(0, 9, (8, 6)):
        table, state = step(table, state, ids)
        for row, times in zip(*np.unique(ids, return_counts=True), strict=True):
            params, row_state = alone[row]
            # Bias correction knows the number of all updates.
            row_state = row_state._replace(count=state.count - 1)
            updates, row_state = update(np.float32(2 * times) * params, row_state, params)
            alone[row] = params + np.asarray(updates), row_state
            touched[row] += 1
    assert (touched[:9] > 0).sum() >= 7
    assert (touched[9:] == 0).all()
    np.testing.assert_allclose(table, np.stack([params for params, _ in alone]), rtol=0, atol=1e-6)
    for name in ("nu", "mu", "trace"):
        if getattr(state, name) is not None:
            rows = np.stack([getattr(row_state, name) for _, row_state in alone])
            np.testing.assert_allclose(getattr(state, name), rows, rtol=1e-5)
