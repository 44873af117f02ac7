"""The step inside the backward pass: the same bits as the ordinary step, right gradients, and errors for misuse."""

import functools

import chex
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import mesh_of
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

from rmsprop_jax import metrics, params_in_float32, rmsprop, round_params_stochastically, value_and_update


pytestmark = pytest.mark.usefixtures("users_climate")

LAYERS, WIDTH, VOCABULARY, BATCH, STEPS = 3, 8, 11, 16, 6


# --- Two networks, and their two steps --------------------------------------------------------------------


def small_layer(params, x, each, gate):
    return x + jnp.tanh(x @ params["kernel"] + params["bias"][None]) * gate[None] * each, None


def small_loss(outer, layers, x):
    x = x.astype(outer["gate"].dtype)
    y, _ = layers(x, jnp.arange(1, LAYERS + 1, dtype=x.dtype), outer["gate"])
    return jnp.mean(jnp.square(y.astype(jnp.float32) - 1))


def small_batch(t):
    return (np.random.default_rng(t).normal(size=(BATCH, WIDTH)).astype(np.float32),)


def layer(params, x, key, gate):
    h = jnp.tanh(x @ params["kernel"] + params["bias"][None]) * gate[None]
    kept = jnp.where(jax.random.bernoulli(key, 0.8, h.shape), h * h.dtype.type(1.25), h.dtype.type(0))  # dropout
    return x + kept, jnp.mean(jnp.square(h.astype(jnp.float32)))


def loss(outer, layers, tokens, keys):
    x, squares = layers(outer["embed"][tokens], keys, outer["gate"])
    logits = (x @ outer["embed"].T).astype(jnp.float32)  # tied
    return optax.softmax_cross_entropy_with_integer_labels(logits, (tokens + 1) % VOCABULARY).mean() + squares.mean()


def parameters(dtype=jnp.float32, seed=0):
    random = np.random.default_rng(seed)
    normal = lambda *shape, mean=0.0: jnp.asarray(random.normal(mean, 0.3, shape), dtype)  # noqa: E731
    layers = {"kernel": normal(LAYERS, WIDTH, WIDTH), "bias": normal(LAYERS, WIDTH)}
    return {"embed": normal(VOCABULARY, WIDTH), "gate": normal(WIDTH, mean=1.0)}, layers


def batch(t):
    tokens = jnp.asarray(np.random.default_rng(t).integers(VOCABULARY, size=BATCH))
    return tokens, jax.random.split(jax.random.key(t), LAYERS)


def scanned(layer, params):
    """`layers` of the ordinary step."""

    def layers(x, each, *shared):
        body = jax.checkpoint(lambda x, of_layer: layer(of_layer[0], x, of_layer[1], *shared))
        return jax.lax.scan(body, x, (params, each))

    return layers


def ordinary(loss, layer, tx, has_aux=False):
    def step(outer, params, state, *args):
        def of_both(outer, params):
            return loss(outer, scanned(layer, params), *args)

        value, (outer_grads, grads) = jax.value_and_grad(of_both, (0, 1), has_aux, allow_int=True)(outer, params)
        updates, state = tx.update(grads, state, params)
        return value, outer_grads, eqx.apply_updates(params, updates), state

    return step


def trained(step):
    """With gradient descent for the outer parameters."""

    @jax.jit
    def train(outer, params, state, *args):
        value, grads, params, state = step(outer, params, state, *args)
        outer = jax.tree.map(lambda p, g: p - p.dtype.type(0.1) * g, outer, grads)
        return value, outer, params, state

    return train


def run(steps, outer, params, state, batches=batch):
    """The end of a run whose step number t is steps[t]."""
    values = []
    for t, step in enumerate(steps):
        value, outer, params, state = step(outer, params, state, *batches(t))
        values.append(value)
        # As from a checkpoint.
        outer, params, state = jax.tree.map(np.asarray, (outer, params, state))
    return values, outer, params, state


# --- The same numbers -------------------------------------------------------------------------------------

SCHEDULE = optax.warmup_cosine_decay_schedule(0.0, 1e-2, 2, STEPS)
THREE = optax.chain(rmsprop(1e-2, state_dtype="uint8"), round_params_stochastically())
FOUR = optax.chain(
    rmsprop(1e-2, centered=True, momentum=0.9, state_dtype="uint8"), round_params_stochastically(keep_rest=True)
)


def matrices(params):
    """As many write it for layers that are no stacks."""
    return jax.tree.map(lambda p: p.ndim > 2, params)


def every_two(tx):
    steps = optax.MultiSteps(tx, 2)
    return optax.GradientTransformationExtraArgs(steps.init, steps.update)


EQUAL = {
    "plain": rmsprop(1e-2),
    "bfloat16": rmsprop(1e-2, momentum=0.9, state_dtype="bfloat16"),
    "uint8": rmsprop(1e-2, centered=True, momentum=0.9, state_dtype="uint8"),
    "three bytes": THREE,
    "four bytes": FOUR,
    "clip, three bytes": optax.chain(optax.clip(0.01), THREE),
    "masked": optax.masked(rmsprop(1e-2, state_dtype="uint8"), matrices),
    "partition": optax.partition({"a": THREE, "b": optax.sgd(1e-2)}, {"kernel": "a", "bias": "b"}),
    "MultiSteps": every_two(THREE),
}
# Of a sum of two products in float32, XLA rounds one product or none, and not the same in each program.
CLOSE = {
    "centered": rmsprop(1e-2, centered=True, bias_correction=True),
    "momentum": rmsprop(1e-2, momentum=0.9, nesterov=True),
    "decay, schedule": rmsprop(SCHEDULE, weight_decay=0.1, weight_decay_mask=matrices),
    "injected": optax.inject_hyperparams(rmsprop)(SCHEDULE, momentum=0.9),
    "optax.adam": optax.adam(1e-3),
    "optax.adamw": optax.adamw(1e-3, mask=matrices),
    "optax.lion": optax.lion(1e-3),
    "optax.rmsprop": optax.rmsprop(1e-2, momentum=0.9),
}


def dtype_of(name):
    return jnp.bfloat16 if any(word in name for word in ("bytes", "partition", "MultiSteps")) else jnp.float32


SMALL, LARGE = (small_loss, small_layer, small_batch), (loss, layer, batch)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "network"),
    [("three bytes", LARGE), *((name, SMALL) for name in EQUAL | CLOSE)],
    ids=lambda x: x if isinstance(x, str) else "large" if x is LARGE else "small",
)
def test_a_run_ends_with_the_bits_of_the_ordinary_one(name, network):
    """Also one that changes to this step and back, from checkpoints."""
    tx, (loss, layer, batches) = (EQUAL | CLOSE)[name], network
    outer, params = parameters(dtype_of(name))
    a, b = (trained(make(loss, layer, tx)) for make in (ordinary, value_and_update))
    whole, inside, mixed = (
        run(steps, outer, params, tx.init(params), batches)
        for steps in ([a] * STEPS, [b] * STEPS, [a, b] * (STEPS // 2))
    )
    assert not np.array_equal(whole[2]["kernel"], params["kernel"])
    for found in (inside, mixed):
        chex.assert_trees_all_equal_shapes_and_dtypes(found, whole)
        if name in EQUAL:
            chex.assert_trees_all_equal(found, whole)
        else:
            chex.assert_trees_all_close(found, whole, rtol=1e-6, atol=4e-7)


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "tx"), [(AxisType.Auto, FOUR), (AxisType.Explicit, THREE)], ids=["Auto", "Explicit"])
def test_bits_and_shardings_on_a_mesh_are_those_of_the_ordinary_step(kind, tx):
    """Sharded as by FSDP, in another axis than that of the layers."""
    mesh, reshard = mesh_of(kind, (2,)), getattr(jax, "reshard", None) or jax.sharding.reshard  # before jax 0.8
    place = lambda x, axes: jax.device_put(x, NamedSharding(mesh, P(*axes)))  # noqa: E731
    outer, params = parameters(jnp.bfloat16)
    params = {"kernel": place(params["kernel"], (None, "x")), "bias": place(params["bias"], (None, "x"))}
    outer, x = place(outer, ()), place(*small_batch(0), ("x",))

    def layer(params, *args):
        if kind == AxisType.Explicit:
            params = jax.tree.map(lambda p: reshard(p, P()), params)
        return small_layer(params, *args)

    with jax.set_mesh(mesh):
        ends = []
        for make in (ordinary, value_and_update):
            step = jax.jit(make(small_loss, layer, tx))
            p, s = params, jax.jit(tx.init)(params)
            for _ in range(3):
                value, _, p, s = step(outer, p, s, x)
            ends.append((value, p, s))
    chex.assert_trees_all_equal(*ends)
    for ours, before in zip(
        jax.tree.leaves((ends[1][1], ends[1][2][0].nu)), jax.tree.leaves((params, params)), strict=True
    ):
        assert ours.sharding.is_equivalent_to(before.sharding, ours.ndim)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("tx", "own"),
    [
        (optax.adafactor(1e-2, min_dim_size_to_factor=4), True),
        (optax.chain(optax.adaptive_grad_clip(0.01), rmsprop(1e-2, momentum=0.9)), True),
        (optax.lamb(1e-2), False),
        (optax.chain(optax.clip_by_block_rms(0.01), optax.sgd(1e-1)), False),
    ],
    ids=["adafactor", "adaptive_grad_clip", "lamb", "clip_by_block_rms"],
)
def test_what_looks_at_a_whole_array_sees_that_of_one_layer(tx, own):
    outer, params = parameters()
    inside = jax.jit(value_and_update(small_loss, small_layer, tx))

    @jax.jit
    def separate(layers, state, *args):
        def run(layers, x, each, gate):
            for i, p in enumerate(layers):
                x, _ = small_layer(p, x, each[i], gate)
            return x, None

        grads = jax.grad(lambda layers: small_loss(outer, functools.partial(run, layers), *args))(layers)
        updates, state = tx.update(grads, state, layers)
        return optax.apply_updates(layers, updates), state

    layers = [jax.tree.map(lambda p, i=i: p[i], params) for i in range(LAYERS)]
    state, of_layers = (jax.vmap(tx.init) if own else tx.init)(params), tx.init(layers)
    for t in range(3):
        _, _, params, state = inside(outer, params, state, *small_batch(t))
        layers, of_layers = separate(layers, of_layers, *small_batch(t))
    chex.assert_trees_all_close(params, jax.tree.map(lambda *p: np.stack(p), *layers), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_each_layer_can_have_a_state_of_its_own_and_what_reads_a_state_reads_that_of_this_step():
    outer, params = parameters(jnp.bfloat16)
    step = trained(value_and_update(small_loss, small_layer, FOUR))
    *shared, state = run([step] * 3, outer, params, jax.jit(FOUR.init)(params), small_batch)
    *own, states = run([step] * 3, outer, params, jax.jit(jax.vmap(FOUR.init))(params), small_batch)
    chex.assert_trees_all_equal(own, shared)
    assert states[0].count.tolist() == [3] * LAYERS
    new = shared[-1]
    assert state[0].count == metrics(state, params=new)["count"] == 3
    exact, rounded = jax.jit(params_in_float32)(new, state)["kernel"], new["kernel"].astype(np.float32)
    np.testing.assert_allclose(exact, rounded, rtol=2**-8)
    assert not np.array_equal(exact, rounded)


# --- Gradients --------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_gradients_through_each_and_shared_and_trees_as_x():
    """x has a counter and a key; each layer has a scale and an index; all share a memory and a mask."""

    def layer(params, x, each, shared):
        key, now = jax.random.split(x["key"])
        h = jnp.tanh(x["h"] @ params["kernel"] + shared["memory"]) * each["scale"] + each["index"]
        h = jnp.where(shared["mask"], h, 0.0) + jax.random.normal(now, h.shape) + params["bias"]
        return {"h": h, "n": x["n"] + each["index"], "key": key}, (h.sum(), x["n"])

    def loss(outer, layers, x):
        x = {"h": x @ outer["in"], "n": jnp.int32(1), "key": jax.random.key(3)}
        each = {"scale": jnp.exp(outer["scales"]), "index": jnp.arange(LAYERS)}
        shared = {"memory": jnp.sin(outer["in"][0]), "mask": jnp.arange(WIDTH) < 6}
        y, (sums, counts) = layers(x, each, shared)
        return jnp.mean(jnp.square(y["h"])) + jnp.sin(sums).sum() + outer["in"].sum(), (y["n"], counts)

    outer, params = parameters()
    outer = {"in": params["kernel"][0], "scales": jnp.linspace(-1, 1, LAYERS), "calls": jnp.int32(7), "none": None}
    tx = rmsprop(1e-2)
    found, expected = (
        jax.jit(make(loss, layer, tx, True))(outer, params, tx.init(params), jnp.ones((2, WIDTH)))
        for make in (value_and_update, ordinary)
    )
    assert found[1].pop("calls").dtype == expected[1].pop("calls").dtype == jax.dtypes.float0
    chex.assert_trees_all_close(found, expected, rtol=1e-5, atol=1e-6)
    (_, (n, counts)), grads, _, _ = found
    assert (n, counts.tolist()) == (4, [1, 1, 2])
    assert all(jnp.abs(g).min() > 0 for g in (grads["in"], grads["scales"]))


def test_leaves_that_do_not_train():
    """Integers and None in the stack, and outer parameters without an array."""

    def layer(params, x, each):
        return jnp.where(params["which"] > 0, x * params["w"], x), None

    def loss(outer, layers, x):
        return layers(x)[0].sum()

    tx = rmsprop(0.5)
    params = {"w": jnp.full((3, 2), 2.0), "which": jnp.array([1, 0, 1]), "bias": None}
    value, grads, new, _ = value_and_update(loss, layer, tx)({}, params, tx.init(params), jnp.ones(2))  # without jit
    assert (value, grads, new["which"].tolist(), new["bias"]) == (8, {}, [1, 0, 1], None)
    assert np.all(new["w"][np.array([0, 2])] < 2)
    assert np.all(new["w"][1] == 2)


def test_loss_is_traced_twice_and_the_update_once_for_all_steps():
    outer, params = parameters()
    tx = rmsprop(1e-2)
    traced = chex.assert_max_traces(small_loss, 2)
    step = jax.jit(value_and_update(traced, small_layer, tx))
    run([step] * 3, outer, params, tx.init(params), small_batch)


# --- Misuse -----------------------------------------------------------------------------------------------


def once(outer, params, state, tx, loss=loss, layer=layer):
    return jax.eval_shape(lambda *args: value_and_update(loss, layer, tx)(outer, params, state, *args), *batch(0))


COUPLED = {
    "clip_by_global_norm": optax.chain(optax.clip_by_global_norm(1.0), rmsprop(1e-2)),
    "apply_if_finite": optax.apply_if_finite(rmsprop(1e-2), 3),
    "prodigy": optax.contrib.prodigy(),
    "normalize_by_update_norm": optax.normalize_by_update_norm(),
    "skip_large_updates": optax.MultiSteps(
        optax.sgd(0.1), 2, should_skip_update_fn=functools.partial(optax.skip_large_updates, max_squared_norm=1.0)
    ).gradient_transformation(),
}


def test_optax_flatten_is_refused_with_every_kind_of_state():
    outer, params = parameters()
    tx = optax.flatten(rmsprop(1e-2))
    for init in (tx.init, jax.vmap(tx.init)):
        with pytest.raises(ValueError, match="[Ll]eave out optax.flatten"):
            once(outer, params, init(params), tx)


@pytest.mark.parametrize("tx", COUPLED.values(), ids=COUPLED)
def test_coupled_arrays_are_refused(tx):
    outer, params = parameters()
    with pytest.raises(
        ValueError, match=r"tx uses the gradient of params\['bias'\] to change other arrays.*clip_by_block_rms"
    ):
        once(outer, params, tx.init(params), tx)


def test_a_state_that_layers_cannot_share_is_refused():
    outer, params = parameters()
    for tx in (optax.sm3(0.1), optax.contrib.dadapt_adamw(0.1)):
        with pytest.raises(ValueError, match=r"tx uses .* to change (a part of its state that all|other arrays)"):
            once(outer, params, tx.init(params), tx)
    once(outer, params, jax.vmap(optax.sm3(0.1).init)(params), optax.sm3(0.1))
    tx = optax.add_noise(0.1, 0.5, 0)
    with pytest.raises(ValueError, match=r"state.*rng_key looks like a random key.*draw random numbers in loss"):
        once(outer, params, tx.init(params), tx)


def swallow(tx):
    """A wrapper that hands nothing on."""
    return optax.GradientTransformation(tx.init, lambda updates, state, params=None: tx.update(updates, state, params))


@pytest.mark.parametrize(
    "tx",
    [
        optax.MultiSteps(rmsprop(1e-2, state_dtype="uint8"), 2).gradient_transformation(),
        swallow(THREE),
        optax.chain(swallow(rmsprop(1e-2, momentum=0.9, state_dtype="bfloat16")), round_params_stochastically()),
        optax.chain(rmsprop(1e-2, state_dtype="uint8"), swallow(round_params_stochastically())),
        optax.partition(
            {"a": swallow(optax.chain(optax.sgd(0.1), round_params_stochastically())), "b": THREE},
            {"kernel": "a", "bias": "b"},
        ),
    ],
    ids=["MultiSteps", "all", "one of two", "the other", "partition"],
)
def test_a_wrapper_that_would_change_the_random_bits_is_refused(tx):
    outer, params = parameters(jnp.bfloat16)
    for init in (jax.vmap(tx.init), tx.init):
        with pytest.raises(ValueError, match=r"does not pass the argument `layer`.*optax.GradientTransformationE"):
            jax.eval_shape(lambda params, init=init: once(outer, params, init(params), tx), params)
    once(outer, params, optax.sgd(0.1).init(params), swallow(optax.sgd(0.1)))  # nothing is rounded


CALLS = {
    "never": (lambda call, outer, x: outer["gate"].sum(), "never calls layers"),
    "twice": (lambda call, outer, x: call(outer, x) + call(outer, x), "calls layers twice"),
    "in jit": (lambda call, outer, x: jax.jit(lambda outer: call(outer, x))(outer), "inside jit, scan"),
    "in jit, closed": (lambda call, outer, x: jax.jit(lambda: call(outer, x))(), "inside jit, scan"),
    "in checkpoint": (lambda call, outer, x: jax.checkpoint(lambda outer: call(outer, x))(outer), "inside jit"),
    "in scan": (
        lambda call, outer, x: jax.lax.scan(lambda c, _: (c + call(outer, x), None), 0.0, length=2)[0],
        "inside jit, scan",
    ),
    "in cond": (
        lambda call, outer, x: jax.lax.cond(outer["gate"][0] > 0, lambda: call(outer, x), lambda: 0.0),
        "inside jit, scan",
    ),
    "in vmap": (
        lambda call, outer, x: jax.vmap(lambda row: call(outer, row[None]))(x).sum(),
        "with the whole batch",
    ),
    "in grad": (lambda call, outer, x: jax.grad(call)(outer, x)["gate"].sum(), "vmap, grad or"),
    "in jvp": (lambda call, outer, x: jax.jvp(lambda x: call(outer, x), (x,), (x,))[1], "vmap, grad or"),
    "in linearize": (lambda call, outer, x: jax.linearize(lambda x: call(outer, x), x)[0], "vmap, grad or"),
    "in hessian": (lambda call, outer, x: jax.hessian(call, 1)(outer, x).sum(), "vmap, grad or"),
    "in grad in jit": (lambda call, outer, x: jax.jit(jax.grad(call))(outer, x)["gate"].sum(), "vmap, grad or"),
}


@pytest.mark.parametrize("name", CALLS)
def test_layers_is_called_once_and_outside_of_transformations(name):
    wrong, message = CALLS[name]
    outer, params = parameters()
    state = optax.sgd(0.1).init(params)

    def loss(outer, layers, x):
        return wrong(lambda outer, x: small_loss(outer, layers, x), outer, x)

    eager = value_and_update(loss, small_layer, optax.sgd(0.1))
    for step in (eager, jax.jit(eager)):
        with pytest.raises(ValueError, match=message):
            step(outer, params, state, *small_batch(0))


def test_a_compiled_loss_is_refused_and_layers_may_stand_beside_a_derivative():
    outer, params = parameters()
    state = optax.sgd(0.1).init(params)
    with pytest.raises(ValueError, match="inside jit, scan"):
        value_and_update(jax.jit(small_loss), small_layer, optax.sgd(0.1))(outer, params, state, *small_batch(0))

    def beside(outer, layers, x):
        return jax.grad(lambda factor: factor * small_loss(outer, layers, x))(1.0)

    found, expected = (
        value_and_update(loss, small_layer, optax.sgd(0.1))(outer, params, state, *small_batch(0))
        for loss in (beside, small_loss)
    )
    chex.assert_trees_all_close(found, expected, rtol=1e-6)


def test_what_layer_closes_over_gets_no_gradient_and_is_refused():
    outer, params = parameters()

    @jax.jit
    def step(outer, params):
        def closing(p, x, key, gate):
            return layer(p, x, key, outer["gate"])

        return value_and_update(loss, closing, optax.sgd(0.1))(outer, params, (optax.EmptyState(),) * 2, *batch(0))

    with pytest.raises(ValueError, match=r"layer closes over outer\['gate'\].*layers\(x, each, shared\)"):
        step(outer, params)


OUTER, PARAMS = parameters()
STATE = rmsprop(1e-2).init(PARAMS)
WRONG = {
    "a leaf without layers": (
        {"params": PARAMS | {"scale": jnp.float32(1)}},
        ValueError,
        r"params\['scale'\] has \(\): the first axis",
    ),
    "other lengths": (
        {"params": PARAMS | {"bias": jnp.zeros((2, WIDTH))}},
        ValueError,
        r"params\['kernel'\] has \(3, 8, 8\)",
    ),
    "no layers": ({"params": {"kernel": jnp.zeros((0, 8, 8))}}, ValueError, r"\['kernel'\] has shape \(0, 8, 8\)"),
    "no arrays": ({"params": {}}, ValueError, "params has no arrays"),
    "functions": ({"params": {"f": jnp.tanh}}, TypeError, r"params\['f'\] has type .*eqx.partition"),
    "a module with functions": (
        {"outer": eqx.nn.MLP(1, 1, 1, 1, key=jax.random.key(0))},
        TypeError,
        r"outer.*has type .*eqx.partition",
    ),
    "a state of other parameters": (
        {"state": rmsprop(1e-2).init({"kernel": PARAMS["kernel"]})},
        ValueError,
        r"state.nu\['bias'\] is missing.*tx.init\(params\)",
    ),
    "a state of one layer": (
        {"state": rmsprop(1e-2).init({k: p[0] for k, p in PARAMS.items()})},
        ValueError,
        r"state.nu\['bias'\] has shape \(8,\)",
    ),
    "a state of another tx": ({"state": optax.adam(1e-2).init(PARAMS)}, ValueError, r"state.count is missing"),
    "x of another dtype": (
        {"layer": lambda p, x, each, gate: (x.astype(jnp.bfloat16), x[0, 0])},
        TypeError,
        r"layer turns x from float32\[16, 8\] into bfloat16\[16, 8\]",
    ),
    "x of another shape": (
        {"layer": lambda p, x, each, gate: (x[1:], None)},
        TypeError,
        r"layer turns x from .* into float32\[15, 8\]",
    ),
    "x of another structure": ({"layer": lambda p, x, each, gate: ((x, x), None)}, TypeError, "layer turns x from .*"),
    "no pair": ({"layer": lambda p, x, each, gate: x}, TypeError, r"layer returns .*: allowed is the pair \(x, out\)"),
    "keys for other layers": (
        {"loss": lambda outer, layers, tokens, keys: loss(outer, layers, tokens, keys[:2])},
        ValueError,
        r"each has \(2,\): the first axis",
    ),
    "no scalar": (
        {"loss": lambda outer, layers, *args: layers(jnp.ones((2, WIDTH)), args[1], outer["gate"])[0]},
        TypeError,
        r"loss returns float32\[2, 8\]: allowed is a real scalar",
    ),
    "auxiliary outputs": ({"loss": lambda *args: (loss(*args), 1)}, TypeError, "has_aux=True"),
}


@pytest.mark.parametrize("name", WRONG)
def test_misuse_is_an_error_that_names_what_is_wrong(name):
    wrong, error, message = WRONG[name]
    arguments = {"outer": OUTER, "params": PARAMS, "state": STATE, "tx": rmsprop(1e-2)} | wrong
    with pytest.raises(error, match=message):
        once(**arguments)


def test_arguments_are_checked_at_construction():
    for arguments, message in [
        ((None, layer, optax.sgd(0.1)), "loss has type NoneType: allowed is a function"),
        ((loss, PARAMS, optax.sgd(0.1)), "layer has type dict"),
        ((loss, layer, optax.sgd), "tx has type function: allowed is an optax.GradientTransformation"),
        ((loss, layer, optax.sgd(0.1), 1), "has_aux=1 has type int"),
    ]:
        with pytest.raises(TypeError, match=message):
            value_and_update(*arguments)
