"""The complete scripts in notebooks/scripts, as users run them: killed, started again, and compared bit for bit."""

import collections
import os
import pathlib
import re
import runpy
import signal
import subprocess
import sys

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from tensorboardX.proto.event_pb2 import Event


pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("users_climate")]

SCRIPTS = sorted((pathlib.Path(__file__).parents[1] / "notebooks" / "scripts").glob("train_*.py"))

STEPS, SAVED, LOGGED, ACCUMULATED = 120, 30, 20, 4
ARGUMENTS = ["--steps", str(STEPS), "--save-every", str(SAVED), "--log-every", str(LOGGED)]
ARGUMENTS += ["--accumulate", str(ACCUMULATED), "--average"]

# Runs a script, and kills it as it is about to save for the second time.
KILLED = """
import os, runpy, signal, sys
import orbax.checkpoint as ocp

class Manager(ocp.CheckpointManager):
    def save(self, step, **kwargs):
        self.wait_until_finished()
        if self.all_steps():
            os.kill(os.getpid(), signal.SIGKILL)
        return super().save(step, **kwargs)

ocp.CheckpointManager = Manager
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def output(out, *command, arguments=ARGUMENTS, ends=0):
    """What a run prints. It finds the programs that an earlier run of the test has compiled."""
    cache = {"JAX_COMPILATION_CACHE_DIR": str(out.parent / "programs")}
    cache |= {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0", "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1"}
    command = [sys.executable, *map(str, command), *arguments, "--out", str(out)]
    done = subprocess.run(command, env=os.environ | cache, capture_output=True, text=True, check=False)
    assert done.returncode == ends, done.stderr
    assert "Warning" not in done.stderr, done.stderr
    return done.stdout


def manager(folder):
    return ocp.CheckpointManager(folder / "checkpoints")


def steps_saved(folder):
    with manager(folder) as checkpoints:
        return list(checkpoints.all_steps())


def saved(folder, step):
    """A checkpoint as a tree of dicts and lists."""
    with manager(folder) as checkpoints:
        return checkpoints.restore(step, args=ocp.args.StandardRestore())


def found(tree, name):
    """Everything under this name, in any wrapper and any framework."""
    nodes = jax.tree_util.tree_flatten_with_path(tree)[0]
    return [x for path, x in nodes if f"'{name}'" in jax.tree_util.keystr(path)]


def logged(folder):
    """From the event files: {tag: {step: value}}."""
    values = {}
    for file in sorted(folder.glob("events.*")):
        data = file.read_bytes()
        while data:  # length, its checksum, an event, its checksum
            size = int.from_bytes(data[:8], "little")
            event, data = Event.FromString(data[12 : 12 + size]), data[16 + size :]
            for value in event.summary.value:
                values.setdefault(value.tag, {})[event.step] = value.simple_value
    return values


def test_the_scripts_are_found():
    assert [script.stem for script in SCRIPTS] == ["train_equinox", "train_layers", "train_linen", "train_nnx"]


# One test for each script, because each check needs the same three runs.
@pytest.mark.parametrize("script", [x for x in SCRIPTS if x.stem != "train_layers"], ids=lambda path: path.stem)
def test_a_killed_run_ends_with_the_same_bits(script, tmp_path, subtests, capsys):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    stdout = output(whole, script)
    output(killed, "-c", KILLED, script, ends=-signal.SIGKILL)
    assert steps_saved(killed) == [SAVED]
    middle = saved(killed, SAVED)
    resumed_stdout = output(killed, script)

    with subtests.test("bits"):
        assert found(middle, "mini_step") == [SAVED % ACCUMULATED]
        assert SAVED % ACCUMULATED != 0
        assert all(np.abs(x).max() > 0 for x in found(middle, "acc_grads"))
        chex.assert_trees_all_equal(saved(killed, STEPS), saved(whole, STEPS))
    with subtests.test("dtypes"):
        check_dtypes(saved(whole, STEPS))
    with subtests.test("bytes"):
        assert "11.00 bytes per parameter, of which accumulation 4, average 4\n" in stdout
        short = runpy.run_path(str(script))["main"]
        short(["--steps", "2", "--out", str(tmp_path / "short")])
        assert "\n3.00 bytes per parameter\n" in capsys.readouterr().out
    with subtests.test("accuracy"):
        accuracies, resumed = (re.findall("test accuracy.*", text) for text in (stdout, resumed_stdout))
        assert len(accuracies) == 2
        assert accuracies == resumed
        assert float(accuracies[0].split()[-1]) > 0.8
    with subtests.test("event files"):
        check_events(logged(whole), logged(killed), with_updates=script.stem == "train_equinox")


def check_dtypes(end):
    expected = {"nu": {"uint8"}, "rest": set(), "acc_grads": {"float32"}}
    assert {name: {str(x.dtype) for x in found(end, name)} for name in expected} == expected
    sizes = collections.Counter()
    for x in jax.tree.leaves(end):
        sizes[str(x.dtype)] += x.size
    assert sizes["bfloat16"] == sizes["uint8"]
    # The accumulated gradient, the average, and a few injected numbers.
    assert 0 < sizes["float32"] - 2 * sizes["bfloat16"] < 20


def check_events(values, resumed, with_updates):
    tags = {"loss", "count", "learning_rate", "grad_rms", "nu_min", "nu_max", "at_floor", "at_ceiling", "eps_share"}
    tags |= {"param_rms"} | ({"update_rms", "update_max", "update_to_param"} if with_updates else set())
    assert set(values) == tags
    steps = list(range(LOGGED, STEPS + 1, LOGGED))
    updates = STEPS // ACCUMULATED
    schedule = optax.warmup_cosine_decay_schedule(0.0, 2e-3, updates // 20, updates)
    for tag, series in values.items():
        assert list(series) == steps
        # The killed run may not have written out all that it logged.
        assert {step for step in steps if step > SAVED} <= set(resumed[tag])
        assert {step: series[step] for step in resumed[tag]} == resumed[tag]
    for step in steps:
        assert values["count"][step] == step // ACCUMULATED
        rate = schedule(jnp.int32(step // ACCUMULATED - 1))
        np.testing.assert_allclose(values["learning_rate"][step], rate, rtol=1e-5)
    assert values["loss"][STEPS] < values["loss"][LOGGED] / 2


def test_a_killed_run_inside_the_backward_pass_ends_with_the_same_bits(tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    (script,) = [x for x in SCRIPTS if x.stem == "train_layers"]
    text = pathlib.Path(__file__).parents[1] / "README.md"
    arguments = ["--text", str(text), "--steps", "15", "--save-every", "5", "--log-every", "5"]
    stdout = output(whole, script, arguments=arguments)
    output(killed, "-c", KILLED, script, arguments=arguments, ends=-signal.SIGKILL)
    assert steps_saved(killed) == [5]
    resumed = output(killed, script, arguments=arguments)
    end = saved(whole, 15)
    chex.assert_trees_all_equal(saved(killed, 15), end)
    assert stdout.splitlines()[-4:] == resumed.splitlines()[-4:]
    assert "828,544 parameters, 3.00 bytes each, with their state" in stdout
    assert {str(x.dtype) for x in found(end, "nu")} == {"uint8"}
    losses = logged(whole)["loss"]
    assert losses[15] < losses[5] - 0.3
