"""Agents as other projects write them, with ours in their optimizer's place: the same numbers, and what they log."""

import functools
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax.training.train_state import TrainState
from frameworks import is_here
from helpers import mesh_of
from jax.sharding import PartitionSpec as P

from rmsprop_jax import dialects, rmsprop, round_params_stochastically


pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("users_climate")]


def gap(ours, theirs, start):
    """The largest difference of parameters, relative to the way that theirs went."""

    def largest(one, other):
        return max(float(jnp.abs(a - b).max()) for a, b in zip(*map(jax.tree.leaves, (one, other)), strict=True))

    return largest(ours, theirs) / largest(theirs, start)


def hand_written(learning_rate, decay=0.9, eps=1e-8):
    """PyTorch's rule as projects write it over Optax's parts: ε outside the root."""

    def update(grads, nu, params=None):
        nu = jax.tree.map(lambda n, g: decay * n + (1 - decay) * g * g, nu, grads)
        return jax.tree.map(lambda n, g: g / (jnp.sqrt(n) + eps), nu, grads), nu

    scale = optax.GradientTransformation(lambda params: jax.tree.map(jnp.zeros_like, params), update)
    return optax.chain(scale, optax.scale_by_learning_rate(learning_rate))


# --- purejaxrl: a DQN whose seeds are one vmapped scan, in which TrainState learns inside lax.cond ------------------


def pole_and_cart(key):
    """The start of an episode: place and speed of the cart, angle and angular speed of its pole."""
    return jax.random.uniform(key, (4,), minval=-0.05, maxval=0.05)


def push(key, state, action):
    """CartPole-v1 without its limit of 500 steps, which nobody reaches here. A new episode follows the last."""
    _, dx, angle, spin = state
    force = jnp.where(action == 1, 10.0, -10.0)
    sin, cos = jnp.sin(angle), jnp.cos(angle)
    pull = (force + 0.05 * spin**2 * sin) / 1.1
    dspin = (9.8 * sin - cos * pull) / (0.5 * (4 / 3 - 0.1 * cos**2 / 1.1))
    ddx = pull - 0.05 * dspin * cos / 1.1
    new = state + 0.02 * jnp.stack([dx, ddx, spin, dspin])
    terminated = (jnp.abs(new[0]) > 2.4) | (jnp.abs(new[2]) > 12 * 2 * jnp.pi / 360)
    return jnp.where(terminated, pole_and_cart(key), new), terminated


class DqnState(TrainState):
    target: Any


class Network(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(2)(nn.relu(nn.Dense(32)(x)))


@functools.cache
def dqn(tx, frames=400, environments=4, size=500):
    """The last parameters, the first ones, and when the poles of three seeds fell."""

    def frame(carry, now):
        t, key = now
        state, memory, obs = carry
        keys = jax.random.split(key, 4)
        greedy = state.apply_fn(state.params, obs).argmax(-1)
        explores = jax.random.uniform(keys[0], greedy.shape) < 0.2
        action = jnp.where(explores, jax.random.randint(keys[1], greedy.shape, 0, 2), greedy)
        new, terminated = jax.vmap(push)(jax.random.split(keys[2], environments), obs, action)
        seen = {"obs": obs, "action": action, "new": new, "terminated": terminated}
        memory = jax.tree.map(lambda kept, x: kept.at[t % size].set(x), memory, seen)

        def learn(state):
            index = jax.random.randint(keys[3], (16,), 0, jnp.minimum(t + 1, size))
            batch = jax.tree.map(lambda x: x[index].reshape(16 * environments, *x.shape[2:]), memory)
            best = state.apply_fn(state.target, batch["new"]).max(-1)
            goal = 1 + 0.99 * jnp.where(batch["terminated"], 0.0, best)

            def loss(params):
                q = state.apply_fn(params, batch["obs"])
                return jnp.mean((jnp.take_along_axis(q, batch["action"][:, None], 1)[:, 0] - goal) ** 2)

            return state.apply_gradients(grads=jax.grad(loss)(state.params))

        state = jax.lax.cond((t > 50) & (t % 2 == 0), learn, lambda state: state, state)
        state = jax.lax.cond(t % 100 == 0, lambda s: s.replace(target=s.params), lambda s: s, state)
        return (state, memory, new), terminated

    def train(key):
        key, key_reset, key_network = jax.random.split(key, 3)
        obs = jax.vmap(pole_and_cart)(jax.random.split(key_reset, environments))
        params = Network().init(key_network, obs)
        state = DqnState.create(apply_fn=Network().apply, params=params, tx=tx, target=params)
        falls = jnp.zeros(environments, bool)
        like = {"obs": obs, "action": jnp.zeros(environments, int), "new": obs, "terminated": falls}
        memory = jax.tree.map(lambda x: jnp.zeros((size, *x.shape), x.dtype), like)
        steps = jnp.arange(frames), jax.random.split(key, frames)
        (state, *_), falls = jax.lax.scan(frame, (state, memory, obs), steps)
        return state.params, params, falls

    return jax.jit(jax.vmap(train))(jax.random.split(jax.random.key(0), 3))


def annealed(count):
    return 1e-3 * (1.0 - count / 300)


DQN = {
    "rmsprop": (rmsprop(annealed), optax.rmsprop(annealed)),
    "dqn": (dialects.dqn(annealed), optax.rmsprop(annealed, 0.95, 0.01, centered=True)),
    "pytorch": (
        dialects.pytorch(learning_rate=annealed, alpha=0.95, eps=1e-3),
        hand_written(annealed, 0.95, 1e-3),
    ),
}


@pytest.mark.parametrize("name", DQN)
def test_a_dqn_in_one_vmapped_scan_ends_as_with_optax(name):
    (params, start, falls), (expected, _, expected_falls) = map(dqn, DQN[name])
    np.testing.assert_array_equal(falls, expected_falls)
    assert falls.any()
    assert gap(params, expected, start) < 1e-4
    other, *_ = dqn(DQN["dqn" if name == "rmsprop" else "rmsprop"][1])
    assert gap(other, expected, start) > 1e-2


# --- Cleanba: IMPALA's chain, replicated over devices ------------------------------------------------------------------


DEVICES, UPDATES, ACCUMULATED = 4, 6, 2


def linear_schedule(count):
    return 6e-4 * (1.0 - count / UPDATES)


def chain(make, last=(), **numbers):
    tx = optax.chain(
        optax.clip_by_global_norm(40.0),
        optax.inject_hyperparams(make, hyperparam_dtype=jnp.float32)(learning_rate=linear_schedule, **numbers),
        *last,
    )
    return optax.MultiSteps(tx, every_k_schedule=ACCUMULATED)


class Agent(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Dense(32)(x))
        return nn.Dense(4)(x), nn.Dense(1)(x)[..., 0]


def rollouts():
    """What actors sent: for each step and device, 20 frames of 8 environments."""
    rng = np.random.default_rng(0)
    shape = (UPDATES * ACCUMULATED, DEVICES, 20, 8)
    draw = {
        "obs": rng.normal(size=(*shape, 16)),
        "advantage": rng.normal(size=shape),
        "returns": rng.normal(size=shape),
    }
    return {k: v.astype(np.float32) for k, v in draw.items()} | {"action": rng.integers(4, size=shape)}


def loss_of(apply_fn, params, batch):
    logits, value = apply_fn(params, batch["obs"])
    log_p = jax.nn.log_softmax(logits)
    policy = -jnp.take_along_axis(log_p, batch["action"][..., None], -1)[..., 0] * batch["advantage"]
    entropy = -(jnp.exp(log_p) * log_p).sum(-1)
    return jnp.sum(policy + 0.5 * 0.5 * (batch["returns"] - value) ** 2 - 0.01 * entropy)


def device_step(state, batch):
    grads = jax.grad(functools.partial(loss_of, state.apply_fn))(state.params, batch)
    return state.apply_gradients(grads=jax.lax.pmean(grads, "devices"))


def with_pmap(state, batches):
    """The state of every device, stacked."""
    step = jax.pmap(device_step, axis_name="devices", devices=jax.devices()[:DEVICES])
    state = jax.tree.map(lambda x: jnp.stack([x] * DEVICES), state)
    for t in range(UPDATES * ACCUMULATED):
        state = step(state, jax.tree.map(lambda x, t=t: x[t], batches))
    return state


def with_shard_map(state, batches):
    """The same in jit, where each device has a state of its own as well."""
    mesh = mesh_of(shape=(DEVICES,), names=("devices",))

    def body(state, batch):
        state = device_step(*jax.tree.map(lambda x: x[0], (state, batch)))
        return jax.tree.map(lambda x: x[None], state)

    step = jax.jit(jax.shard_map(body, mesh=mesh, in_specs=P("devices"), out_specs=P("devices"), check_vma=False))
    state = jax.tree.map(lambda x: jnp.stack([x] * DEVICES), state)
    for t in range(UPDATES * ACCUMULATED):
        state = step(state, jax.tree.map(lambda x, t=t: x[t], batches))
    return state


def impala(tx, devices, dtype=jnp.float32):
    agent = Agent()
    params = jax.tree.map(lambda p: p.astype(dtype), agent.init(jax.random.key(0), jnp.zeros((1, 16))))
    state = TrainState.create(apply_fn=agent.apply, params=params, tx=tx)
    return params, devices(state, rollouts())


OUTSIDE = {"decay": 0.99, "eps": 0.01, "eps_in_sqrt": False}


@pytest.mark.parametrize(
    ("devices", "make", "numbers", "other"),
    [
        (with_pmap, dialects.pytorch, {"alpha": 0.99, "eps": 0.01}, {"alpha": 0.99, "eps": 0.02}),
        (with_shard_map, rmsprop, OUTSIDE, OUTSIDE | {"eps_in_sqrt": True}),
    ],
)
def test_impalas_chain_is_the_hand_written_one(devices, make, numbers, other):
    start, theirs = impala(chain(hand_written, decay=0.99, eps=0.01), devices)
    start = jax.tree.map(lambda x: x[None], start)
    _, ours = impala(chain(make, **numbers), devices)
    assert gap(ours.params, theirs.params, start) < 1e-5
    # Their line that logs the learning rate works as it stands.
    rate = theirs.opt_state[2][1].hyperparams["learning_rate"][-1]
    np.testing.assert_allclose(rate, linear_schedule(UPDATES - 1), rtol=1e-5)
    assert ours.opt_state[2][1].hyperparams["learning_rate"][-1] == rate
    _, others = impala(chain(make, **other), devices)
    assert gap(others.params, theirs.params, start) > 1e-2


@pytest.mark.parametrize("devices", [with_pmap, with_shard_map])
def test_replicas_stay_equal_where_rounding_is_random(devices):
    """Random bits have no key. Equal values and equal gradients give equal bits on every device."""
    tx = chain(
        dialects.pytorch, (round_params_stochastically(keep_rest=True),), alpha=0.99, eps=0.01, state_dtype="uint8"
    )
    start, end = impala(tx, devices, jnp.bfloat16)
    first, *others = (jax.tree.map(lambda x, i=i: x[i], (end.params, end.opt_state)) for i in range(DEVICES))
    for other in others:
        chex.assert_trees_all_equal(first, other)
    _, wide = impala(chain(hand_written, decay=0.99, eps=0.01), devices)
    assert gap(end.params, wide.params, jax.tree.map(lambda x: x[None], start)) < 0.3


# --- sbx: Stable Baselines in JAX, which injects `learning_rate`, sets it before each epoch, and logs it ------------------


def ppo(make, numbers, **options):
    import sbx

    policy = {"optimizer_class": make, "optimizer_kwargs": numbers}
    return sbx.PPO("MlpPolicy", "CartPole-v1", policy_kwargs=policy, seed=0, device="cpu", **options)


def agent_of(model):
    """Parameters and optimizer states of the policy and of the value function."""
    return [(state.params, state.opt_state) for state in (model.policy.actor_state, model.policy.vf_state)]


if is_here("sbx-rl"):  # left out where it is not installed, instead of skipped: .ci/run says where it must be

    @pytest.mark.filterwarnings("ignore")  # theirs
    def test_live_sbx_trains_logs_its_rate_saves_and_goes_on(tmp_path):
        import gymnasium
        import sbx

        returns = []

        def log(found, _):
            returns.append(np.mean([info["r"] for info in found["self"].ep_info_buffer or ()]))

        numbers = {"alpha": 0.99, "eps": 1e-5}
        schedule = lambda left: 1e-3 * (1 + left)  # noqa: E731
        model = ppo(dialects.pytorch, numbers, learning_rate=schedule, n_steps=512, n_epochs=8)
        model.learn(6144, callback=log)
        assert returns[-1] > 2 * returns[600]
        rate = schedule(0.0)
        np.testing.assert_allclose(model.logger.name_to_value["train/learning_rate"], rate, rtol=1e-6)
        for _, (_, injected) in agent_of(model):
            assert set(injected.hyperparams) == {"learning_rate", "alpha", "eps"}
            np.testing.assert_allclose(injected.hyperparams["learning_rate"], rate, rtol=1e-6)
            assert injected.inner_state.count == 12 * 8 * 8  # rollouts, epochs, minibatches
        model.save(tmp_path / "ppo")
        again = sbx.PPO.load(tmp_path / "ppo", env=gymnasium.make("CartPole-v1"))
        chex.assert_trees_all_equal(agent_of(again), agent_of(model))
        again.learn(512, reset_num_timesteps=False)
        assert again.policy.actor_state.opt_state[1].inner_state.count == 13 * 8 * 8

    @pytest.mark.filterwarnings("ignore")
    def test_live_sbx_gets_the_numbers_of_optax():
        def first_updates(make, numbers):
            model = ppo(make, numbers, n_steps=128, n_epochs=2, learning_rate=1e-3)
            return model.learn(128).policy.actor_state.params

        ours = first_updates(dialects.pytorch, {"alpha": 0.99, "eps": 1e-5})
        theirs = first_updates(optax.rmsprop, {"decay": 0.99, "eps": 1e-5, "eps_in_sqrt": False})
        inside = first_updates(optax.rmsprop, {"decay": 0.99, "eps": 1e-5})
        chex.assert_trees_all_close(ours, theirs, atol=1e-5)
        with pytest.raises(AssertionError):
            chex.assert_trees_all_close(inside, theirs, atol=1e-3)

    @pytest.mark.filterwarnings("ignore")
    def test_live_sbx_agents_that_do_not_inject():
        import sbx

        policy = {"optimizer_class": dialects.pytorch, "optimizer_kwargs": {"alpha": 0.99, "eps": 1e-5}}
        model = sbx.DQN("MlpPolicy", "CartPole-v1", policy_kwargs=policy, seed=0, learning_starts=100).learn(300)
        assert model.policy.qf_state.opt_state.count == 50
