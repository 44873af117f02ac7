"""python tests/benchmarks/reinforcement.py: the same agent, and only RMSProp's dialect differs.

* `dialects`: everything else is the same, the learning rate too. A2C, IMPALA's numbers and DQN on gymnax' CartPole and
  MinAtar Breakout. p is a permutation test against the first row of a setting, with Holm's correction for its rows.
* `tuned`: each dialect has the best of its own learning rates, chosen with eight seeds from a grid with a factor of √10
  between them. Sixteen other seeds report on it.

Returns are means over the last tenth of training, with a 95 % bootstrap interval over the seeds. All seeds of a row are one
vmapped program, which takes a minute or less.

Needs `pip install -e ".[notebooks]"`. `--json FILE` keeps every seed and its curve, and a run goes on with
what the file has; `python tests/benchmarks/pages.py` makes the tables. `--only` picks settings, `--dialects` their rows, `--seeds` bounds the number of seeds, `--minutes` the time.
"""

import argparse
import contextlib
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from report import Report
from rich.progress import track
from tuning import cheapest, grid, groups, Measurements, search, TimeIsUp

from rmsprop_jax import dialects, rmsprop, round_params_stochastically


POINTS = 50  # of a learning curve
Optimizer = optax.GradientTransformation


class Dialect(NamedTuple):
    """A row: an optimizer from a learning rate, or a schedule, and the dtype of the parameters."""

    make: Callable[[Any], Optimizer]
    params: Any = jnp.float32


class Setting(NamedTuple):
    """An agent and its numbers. The dialects are what differs."""

    environment: str
    frames: int
    seeds: int
    rate: float
    dialects: dict[str, Dialect]
    envs: int = 1
    steps: int = 5  # of each environment between two updates
    constant_rate: bool = False
    clip: float = 0.5
    summed: bool = False  # the loss is a sum over the batch, not its mean
    entropy: float = 0.0
    width: int = 64
    agent: str = "actor-critic"


def fewer_bytes(eps: float) -> dict[str, Dialect]:
    """PyTorch's dialect with ν in one byte, and the same with bfloat16 parameters, without and with their rest."""

    def narrow(rate):
        return dialects.pytorch(rate, alpha=0.99, eps=eps, state_dtype=jnp.uint8)

    def rounded(rate, keep_rest):
        return optax.chain(narrow(rate), round_params_stochastically(keep_rest))

    return {
        "pytorch, uint8": Dialect(narrow),
        "pytorch, 4 bytes": Dialect(functools.partial(rounded, keep_rest=True), jnp.bfloat16),
        "pytorch, 3 bytes": Dialect(functools.partial(rounded, keep_rest=False), jnp.bfloat16),
    }


def a2c(eps: float) -> dict[str, Dialect]:
    """Decay 0.99 and one ε: the dialects that A2C is trained with."""
    return {
        "tensorflow1": Dialect(lambda rate: dialects.tensorflow1(rate, decay=0.99, epsilon=eps)),
        "keras, optax": Dialect(lambda rate: dialects.keras(rate, rho=0.99, epsilon=eps)),
        "pytorch": Dialect(lambda rate: dialects.pytorch(rate, alpha=0.99, eps=eps)),
    }


SETTINGS = {
    "A2C, CartPole": Setting(
        "CartPole-v1",
        frames=500_000,
        seeds=24,
        rate=7e-4,
        envs=16,
        dialects=a2c(1e-5)
        | {
            "outside the root, first ν 1": Dialect(
                lambda rate: rmsprop(rate, 0.99, 1e-5, initial_scale=1.0, eps_in_sqrt=False)
            ),
            "pytorch, √ε": Dialect(lambda rate: dialects.pytorch(rate, alpha=0.99, eps=1e-5**0.5)),
        }
        | fewer_bytes(1e-5),
    ),
    "IMPALA's numbers, Breakout": Setting(
        "Breakout-MinAtar",
        frames=320_000,
        seeds=16,
        rate=6e-4,
        envs=8,
        steps=20,
        clip=40.0,
        summed=True,
        entropy=0.01,
        width=128,
        dialects=a2c(0.01),
    ),
    "A2C, Breakout": Setting(
        "Breakout-MinAtar",
        frames=320_000,
        seeds=16,
        rate=7e-4,
        envs=16,
        entropy=0.01,
        width=128,
        dialects=a2c(1e-5)
        | {
            "tensorflow1, 4 x the rate": Dialect(
                lambda rate: dialects.tensorflow1(lambda count: 4 * rate(count), decay=0.99, epsilon=1e-5)
            ),
        }
        | fewer_bytes(1e-5),
    ),
    "DQN, CartPole": Setting(
        "CartPole-v1",
        frames=40_000,
        seeds=16,
        rate=2.5e-4,
        agent="dqn",
        constant_rate=True,
        dialects={
            "dqn": Dialect(lambda rate: dialects.dqn(rate)),
            "pytorch": Dialect(lambda rate: dialects.pytorch(rate, alpha=0.95, eps=0.01, centered=True)),
        },
    ),
    "A2C, CartPole, Stable Baselines' numbers": Setting(
        "CartPole-v1",
        frames=500_000,
        seeds=16,
        rate=7e-4,
        envs=8,
        constant_rate=True,
        dialects={
            "stable_baselines3": Dialect(lambda rate: dialects.stable_baselines3(rate, alpha=0.99, eps=1e-5)),
            "pytorch": Dialect(lambda rate: dialects.pytorch(rate, alpha=0.99, eps=1e-5)),
        },
    ),
}


def environment(name: str) -> tuple[Any, Any]:
    """gymnax allows no jax above 0.11. What is measured can be read and drawn without it."""
    import gymnax

    return gymnax.make(name)


# --- Networks: lists of layers, initialised in NumPy, because a vmapped QR under jit can deadlock on few cores ------


def dense(rng: np.random.Generator, inputs: int, outputs: int, gain: float) -> dict[str, np.ndarray]:
    """Orthogonal weights and no bias."""
    q, r = np.linalg.qr(rng.normal(size=(max(inputs, outputs), min(inputs, outputs))))
    q = q * np.sign(np.diag(r))
    return {"w": (gain * (q if inputs >= outputs else q.T)).astype(np.float32), "b": np.zeros(outputs, np.float32)}


def mlp(rng: np.random.Generator, inputs: int, width: int, outputs: int, gain: float) -> list[dict[str, np.ndarray]]:
    return [dense(rng, inputs, width, 2**0.5), dense(rng, width, width, 2**0.5), dense(rng, width, outputs, gain)]


def apply(layers: Any, x: jax.Array, activation: Callable[[jax.Array], jax.Array] = jnp.tanh) -> jax.Array:
    layers = jax.tree.map(lambda x: x.astype(jnp.float32), layers)
    for layer in layers[:-1]:
        x = activation(x @ layer["w"] + layer["b"])
    return x @ layers[-1]["w"] + layers[-1]["b"]


# --- Agents: from parameters and a key to the returns of finished episodes, all in one scan -------------------------


class Episodes(NamedTuple):
    """Returns so far, and what was finished in one step."""

    running: jax.Array
    total: jax.Array  # of the returns of finished episodes
    finished: jax.Array  # how many

    def after(self, reward: jax.Array, done: jax.Array) -> "Episodes":
        running = self.running + reward
        ended = jnp.where(done, running, 0.0)
        return Episodes(jnp.where(done, 0.0, running), self.total + ended.sum(), self.finished + done.sum())


def actor_critic(setting: Setting, tx: Optimizer) -> Callable[[Any, jax.Array], jax.Array]:
    env, env_params = environment(setting.environment)
    discount = 0.99
    updates = setting.frames // (setting.envs * setting.steps)
    reduce = jnp.sum if setting.summed else jnp.mean

    def observe(obs):
        return obs.reshape(len(obs), -1).astype(jnp.float32)

    def act(params, carry, key):
        obs, env_state, episodes = carry
        key, key_step = jax.random.split(key)
        action = jax.random.categorical(key, apply(params["policy"], obs))
        keys = jax.random.split(key_step, setting.envs)
        new, env_state, reward, terminated, truncated, info = jax.vmap(env.step, (0, 0, 0, None))(
            keys, env_state, action, env_params
        )
        # An episode that is cut off goes on in the estimate of its value.
        final = apply(params["value"], observe(info["final_observation"]))[:, 0]
        cut = truncated & ~terminated
        done = terminated | truncated
        step = obs, action, reward + discount * jnp.where(cut, final, 0.0), done
        return (observe(new), env_state, episodes.after(reward, done)), step

    def loss(params, obs, action, returns):
        logits, value = apply(params["policy"], obs), apply(params["value"], obs)[:, 0]
        log_p = jax.nn.log_softmax(logits)
        advantage = returns - jax.lax.stop_gradient(value)
        policy = -jnp.take_along_axis(log_p, action[:, None], 1)[:, 0] * advantage
        entropy = -(jnp.exp(log_p) * log_p).sum(1)
        return reduce(policy + 0.5 * (returns - value) ** 2 - setting.entropy * entropy)

    def update(carry, key):
        params, state, acting = carry
        start = acting[2]
        acting, (obs, action, reward, done) = jax.lax.scan(
            functools.partial(act, params), acting, jax.random.split(key, setting.steps)
        )

        def back(following, now):
            reward, done = now
            following = reward + discount * jnp.where(done, 0.0, following)
            return following, following

        last = apply(params["value"], acting[0])[:, 0]
        _, returns = jax.lax.scan(back, last, (reward, done), reverse=True)
        flat = (x.reshape(-1, *x.shape[2:]) for x in (obs, action, returns))
        grads = jax.grad(loss)(params, *flat)
        changes, state = tx.update(grads, state, params)
        end = acting[2]
        return (optax.apply_updates(params, changes), state, acting), (
            end.total - start.total,
            end.finished - start.finished,
        )

    def run(params, key):
        key, key_reset = jax.random.split(key)
        obs, env_state = jax.vmap(env.reset, (0, None))(jax.random.split(key_reset, setting.envs), env_params)
        zero = jnp.zeros(())
        acting = (observe(obs), env_state, Episodes(jnp.zeros(setting.envs), zero, zero))
        _, per_update = jax.lax.scan(update, (params, tx.init(params), acting), jax.random.split(key, updates))
        return curve(*per_update)

    return run


def dqn(setting: Setting, tx: Optimizer) -> Callable[[Any, jax.Array], jax.Array]:
    """MinAtar's numbers: batches of 32, a new target every 1,000 frames, ε-greedy from 1 to 0.1 over 10,000 frames."""
    env, env_params = environment(setting.environment)
    discount, size, begin, batch = 0.99, 10_000, 1_000, 32
    relu = functools.partial(apply, activation=jax.nn.relu)

    def loss(params, target, replay, index):
        obs, action, reward, new, terminated = (x[index] for x in replay)
        best = relu(target["q"], new).max(1)
        q = jnp.take_along_axis(relu(params["q"], obs), action[:, None], 1)[:, 0]
        return optax.huber_loss(q, reward + discount * jnp.where(terminated, 0.0, best)).mean()

    def frame(carry, now):
        t, key = now
        params, target, state, replay, obs, env_state, episodes = carry
        key_explore, key_action, key_step, key_batch = jax.random.split(key, 4)
        explore = jax.random.uniform(key_explore) < jnp.maximum(0.1, 1 - 0.9 * t / 10_000)
        random = jax.random.randint(key_action, (), 0, env.num_actions)
        action = jnp.where(explore, random, relu(params["q"], obs).argmax()).astype(jnp.int32)
        new, env_state, reward, terminated, truncated, info = env.step(key_step, env_state, action, env_params)
        stored = obs, action, reward, info["final_observation"], terminated
        replay = tuple(x.at[t % size].set(y) for x, y in zip(replay, stored, strict=True))
        index = jax.random.randint(key_batch, (batch,), 0, jnp.minimum(t + 1, size))
        grads = jax.grad(loss)(params, target, replay, index)
        changes, next_state = tx.update(grads, state, params)
        started = t >= begin
        params, state = jax.tree.map(
            lambda new, old: jnp.where(started, new, old),
            (optax.apply_updates(params, changes), next_state),
            (params, state),
        )
        target = jax.tree.map(lambda new, old: jnp.where(t % 1000 == 0, new, old), params, target)
        after = episodes.after(reward, terminated | truncated)
        finished = after.total - episodes.total, after.finished - episodes.finished
        return (params, target, state, replay, new, env_state, after), finished

    def run(params, key):
        key, key_reset = jax.random.split(key)
        obs, env_state = env.reset(key_reset, env_params)
        zero = jnp.zeros(())
        replay = (jnp.zeros((size, *obs.shape)), jnp.zeros(size, jnp.int32), jnp.zeros(size))
        replay = (*replay, jnp.zeros((size, *obs.shape)), jnp.zeros(size, bool))
        carry = (params, params, tx.init(params), replay, obs, env_state, Episodes(zero, zero, zero))
        frames = jnp.arange(setting.frames), jax.random.split(key, setting.frames)
        _, per_frame = jax.lax.scan(frame, carry, frames)
        return curve(*per_frame)

    return run


def curve(total: jax.Array, finished: jax.Array) -> jax.Array:
    """The mean return of the episodes that ended in each of equal parts of the training; NaN where none did."""
    parts = len(total) // POINTS * POINTS
    total, finished = (x[len(x) - parts :].reshape(POINTS, -1).sum(1) for x in (total, finished))
    return total / finished


def trainer(setting: Setting, dialect: Dialect) -> Callable[[Sequence[int], float], np.ndarray]:
    """A function from seeds and a learning rate to learning curves of shape (seeds, POINTS). Compiled once."""
    updates = setting.frames // (setting.envs * setting.steps)
    env, env_params = environment(setting.environment)
    inputs = int(np.prod(env.observation_space(env_params).shape))
    agent = {"actor-critic": actor_critic, "dqn": dqn}[setting.agent]

    def start(seed):
        rng = np.random.default_rng(seed)
        if setting.agent == "dqn":
            return {"q": mlp(rng, inputs, setting.width, env.num_actions, 1.0)}
        return {
            "policy": mlp(rng, inputs, setting.width, env.num_actions, 0.01),
            "value": mlp(rng, inputs, setting.width, 1, 1.0),
        }

    @jax.jit
    def run(params, keys, rate):
        schedule = optax.constant_schedule(rate) if setting.constant_rate else optax.linear_schedule(rate, 0.0, updates)
        tx = dialect.make(schedule)
        if setting.agent == "actor-critic":
            tx = optax.chain(optax.clip_by_global_norm(setting.clip), tx)
        return jax.vmap(agent(setting, tx))(params, keys)

    def curves(seeds, rate):
        params = jax.tree.map(lambda *x: jnp.asarray(np.stack(x), dialect.params), *map(start, seeds))
        keys = jax.random.split(jax.random.key(0), max(seeds) + 1)[np.array(seeds)]
        return np.asarray(run(params, keys, jnp.float32(rate)), float)

    return curves


def kept(curves: np.ndarray) -> list[list[float | None]]:
    """As JSON has it, where there is no NaN."""
    return [[None if np.isnan(x) else round(x, 3) for x in series] for series in curves.tolist()]


# --- Statistics -------------------------------------------------------------------------------------------------------


def bootstrap(values: np.ndarray, draws: int = 10_000) -> tuple[float, float]:
    """A 95 % interval of the mean."""
    rng = np.random.default_rng(0)
    means = rng.choice(values, (draws, len(values))).mean(1)
    low, high = np.quantile(means, (0.025, 0.975))
    return float(low), float(high)


def permutation(a: np.ndarray, b: np.ndarray, draws: int = 20_000) -> float:
    """The two-sided p of a difference of means, when labels are exchanged at random."""
    rng = np.random.default_rng(0)
    both, observed = np.concatenate([a, b]), abs(a.mean() - b.mean())
    shuffled = rng.permuted(np.tile(both, (draws, 1)), axis=1)
    gaps = np.abs(shuffled[:, : len(a)].mean(1) - shuffled[:, len(a) :].mean(1))
    return float((1 + (gaps >= observed - 1e-12).sum()) / (1 + draws))


def holm(ps: list[float]) -> list[float]:
    """Holm's correction for several tests."""
    result, worst = [0.0] * len(ps), 0.0
    for rank, i in enumerate(np.argsort(ps)):
        worst = max(worst, min(1.0, (len(ps) - rank) * ps[i]))
        result[i] = worst
    return result


def last_tenth(curves: np.ndarray) -> np.ndarray:
    return np.nanmean(curves[:, -POINTS // 10 :], 1)


def decimals(setting: str) -> int:
    return 0 if "CartPole" in setting else 2


def interval(values: np.ndarray, digits: int, sign: str = "") -> str:
    low, high = bootstrap(values)
    return f"{values.mean():{sign}.{digits}f} [{low:{sign}.{digits}f}, {high:{sign}.{digits}f}]"


def table(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    result = []
    for (name,), mine in groups(rows, ["setting"]):
        ends = [ends_of(row) for row in mine]
        ps = holm([permutation(ends[0], x) for x in ends[1:]])
        for row, end, p in zip(mine, ends, [None, *ps], strict=True):
            result.append(
                {
                    "setting": name,
                    "dialect": row["dialect"],
                    "seeds": len(end),
                    "return": interval(end, decimals(name)),
                    "curve": f"{np.nanmean(np.array(row['curves'], float)):.{decimals(name)}f}",
                    "p": "" if p is None else f"{p:.2g}",
                }
            )
    return result


def ends_of(row: dict[str, Any]) -> np.ndarray:
    return last_tenth(np.array(row["curves"], float))


def compare(measurements: Measurements, name: str, setting: Setting, dialect: str, seeds: int | None = None) -> None:
    """Measures one dialect at the rate of the setting."""
    some = range(setting.seeds)[:seeds]
    run = trainer(setting, setting.dialects[dialect])
    measurements.get({"setting": name, "dialect": dialect}, lambda: {"curves": kept(run(some, setting.rate))})


# --- Tuned ------------------------------------------------------------------------------------------------------------

GRID_SEEDS, FRESH_SEEDS = range(8), range(8, 24)


def tuned_settings() -> dict[str, Setting]:
    """A2C on CartPole and three of MinAtar's games, and IMPALA's numbers. The rate of a setting is the center of its grid."""

    def root(eps: float) -> dict[str, Dialect]:
        return a2c(eps) | {"pytorch, √ε": Dialect(lambda rate: dialects.pytorch(rate, alpha=0.99, eps=eps**0.5))}

    breakout = SETTINGS["A2C, Breakout"]._replace(frames=200_000, rate=2e-3, dialects=root(1e-5))
    return {
        "A2C, CartPole": SETTINGS["A2C, CartPole"]._replace(rate=2e-3, dialects=root(1e-5)),
        "A2C, Breakout": breakout,
        "A2C, Asterix": breakout._replace(environment="Asterix-MinAtar"),
        "A2C, Space Invaders": breakout._replace(environment="SpaceInvaders-MinAtar"),
        "IMPALA's numbers, Breakout": SETTINGS["IMPALA's numbers, Breakout"]._replace(
            frames=200_000, rate=2e-3, dialects=root(0.01)
        ),
    }


def tune(measurements: Measurements, name: str, setting: Setting, dialect: str, seeds: int | None = None) -> None:
    """Searches the rate with some seeds, and measures the best with others."""
    run = functools.cache(lambda: trainer(setting, setting.dialects[dialect]))

    def ends(rate: float, group: str, some: range) -> float:
        row = {"setting": name, "dialect": dialect, "rate": rate, "seeds": group}
        some = some[:seeds]
        return float(np.nanmean(ends_of(measurements.get(row, lambda: {"curves": kept(run()(some, rate))}))))

    costs = search(grid(setting.rate), lambda rate: -ends(rate, "grid", GRID_SEEDS))
    ends(cheapest(costs), "fresh", FRESH_SEEDS)


def returns(rows: list[dict[str, Any]], setting: str, dialect: str) -> dict[float, float]:
    """The mean return at each rate of the grid."""
    some = [r for r in rows if (r["setting"], r["dialect"], r["seeds"]) == (setting, dialect, "grid")]
    return {row["rate"]: float(np.nanmean(ends_of(row))) for row in some}


# --- Reporting --------------------------------------------------------------------------------------------------------


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="?", choices=["dialects", "tuned"], default="dialects")
    parser.add_argument("--only", nargs="+", metavar="SETTING", help="default: all")
    parser.add_argument("--dialects", nargs="+", metavar="DIALECT", help="default: all of a setting")
    parser.add_argument("--seeds", type=int, help="at most so many (default: those of the setting)")
    parser.add_argument("--minutes", type=float, help="begin no run after so many (default: no limit)")
    parser.add_argument("--json", metavar="FILE", help="where to write every curve")
    arguments = parser.parse_args()
    settings = SETTINGS if arguments.what == "dialects" else tuned_settings()
    if unknown := set(arguments.only or ()) - set(settings):
        parser.error(f"--only {', '.join(map(repr, unknown))}: allowed are {', '.join(map(repr, settings))}")
    jobs = [(name, dialect) for name in arguments.only or settings for dialect in settings[name].dialects]
    if unknown := set(arguments.dialects or ()) - {dialect for _, dialect in jobs}:
        parser.error(f"--dialects {', '.join(map(repr, unknown))}: allowed are {', '.join(repr(x) for _, x in jobs)}")
    jobs = [(name, dialect) for name, dialect in jobs if dialect in (arguments.dialects or (dialect,))]
    report = Report(arguments.json, "gymnax")
    name = "tuned" if arguments.what == "tuned" else "reinforcement"
    keys = ("setting", "dialect", "rate", "seeds") if name == "tuned" else ("setting", "dialect")
    measurements = Measurements(report, name, keys, arguments.minutes)
    run = tune if name == "tuned" else compare
    with contextlib.suppress(TimeIsUp):
        for setting, dialect in track(jobs, name):
            run(measurements, setting, settings[setting], dialect, arguments.seeds)
    if name == "reinforcement":
        report.add("table", table(measurements.rows()))  # a notebook prints it


if __name__ == "__main__":
    main()
