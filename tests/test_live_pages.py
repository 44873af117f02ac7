"""The scripts of the documentation that need another framework, where it is installed: .ci runs them with the live checks."""

import os
import pathlib
import re
import runpy

import jax
import numpy as np
import pytest
from frameworks import is_here, where_it_is

from rmsprop_jax import __main__ as demo


pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore"), pytest.mark.usefixtures("users_climate")]
SCRIPTS = pathlib.Path(__file__).parents[1] / "notebooks" / "scripts"


@where_it_is("torch")
def test_a_pytorch_run_ends_in_nnx_where_it_would_have_ended():
    names = runpy.run_path(str(SCRIPTS / "from_pytorch.py"))
    assert names["apart"] < 1e-5
    assert int(names["state"].count) == names["HALF"]


@where_it_is("torch")
def test_the_recorded_run_of_the_demo_is_pytorchs():
    import torch

    params = torch.nn.Parameter(torch.from_numpy(demo.START.copy()))
    optimizer = torch.optim.RMSprop([params], momentum=0.9)
    for step in range(100):
        optimizer.param_groups[0]["lr"] = 0.002 * 0.98**step
        optimizer.zero_grad()
        (params**4 / 40 - torch.cos(params)).sum().backward()
        optimizer.step()
    np.testing.assert_allclose(params.detach().numpy(), demo.END, atol=1e-6)


@where_it_is("stable-baselines3")
@pytest.mark.parametrize(("policy", "shape"), [("MlpPolicy", (4,)), ("CnnPolicy", (36, 36, 1))])
def test_a_model_of_stable_baselines_is_read_by_its_zip_file(policy, shape, tmp_path, monkeypatch):
    import gymnasium
    from stable_baselines3 import A2C

    class Environment(gymnasium.Env):
        observation_space = gymnasium.spaces.Box(0, 255, shape, np.uint8)
        action_space = gymnasium.spaces.Discrete(2)

        def reset(self, **_):
            return self.observation_space.sample(), {}

        def step(self, action):
            return self.observation_space.sample(), 1.0, bool(action), False, {}

    monkeypatch.chdir(tmp_path)
    model = A2C(policy, Environment()).learn(50)
    model.save("a2c.zip")
    (code,) = re.findall(r"```py\n(.*?)```", (SCRIPTS.parent / "projects.md").read_text(), re.DOTALL)
    names = {}
    exec(code, names)
    held = {name: model.policy.optimizer.state[p] for name, p in model.policy.named_parameters()}
    assert int(names["state"].count) == 10
    assert set(names["state"].nu) == set(held)
    for name, entry in held.items():
        np.testing.assert_array_equal(names["state"].nu[name], entry["square_avg"])


@where_it_is("keras")
def test_keras_fit_trains_with_an_optax_optimizer(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert os.environ["KERAS_BACKEND"] == "jax"
    names = runpy.run_path(str(SCRIPTS / "keras_fit.py"))
    first, last = (float(x) for x in re.findall(r"apart: (\S+)", capsys.readouterr().out))
    assert first < 2e-6
    assert last == 0
    dtypes = [str(v.dtype) for v in names["small"].optimizer.variables]
    assert dtypes.count("uint8") == dtypes.count("int8") == len(names["small"].trainable_variables)


def test_the_scripts_are_those_that_pages_show():
    pages = "".join(path.read_text() for path in SCRIPTS.parent.glob("*.md"))
    assert set(re.findall(r"literalinclude\} scripts/(\w+)", pages)) == {path.stem for path in SCRIPTS.glob("*.py")}


NEEDED = {"Hydra": "hydra-core", "fiddle": "fiddle", "gin": "gin-config", "jsonargparse": "jsonargparse"}
NEEDED["konfig"] = "kauldron"
PAGE = (SCRIPTS.parent / "configuration.md").read_text()
SYSTEMS = dict(re.findall(r"^## (\w+)\n[^#]*?^```py\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL))


INSTALLED = [name for name in SYSTEMS if is_here(NEEDED[name])]


@(lambda test: test if INSTALLED else None)
@pytest.mark.parametrize("name", INSTALLED)
def test_a_configuration_makes_the_optimizer(name):
    made = {}
    exec(SYSTEMS[name], made)
    (expected,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    wanted = {}
    exec(expected, wanted)
    params = {"w": jax.numpy.ones((4, 2))}
    ends = [tx.update(params, tx.init(params), params) for tx in (made["tx"], wanted["tx"])]
    jax.tree.map(np.testing.assert_array_equal, *ends)


def test_every_configuration_system_is_named():
    assert set(SYSTEMS) == set(NEEDED)
