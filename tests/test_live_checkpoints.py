"""The installed frameworks still save what was recorded of them (golden/checkpoints.py): the same names, the same numbers."""

import importlib.metadata
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest
from golden import checkpoints
from golden.checkpoints import case_name, recorded, ROWS


def distribution(module):
    module = module.partition(".")[0]
    return {"sonnet": "dm-sonnet", "paddle": "paddlepaddle"}.get(module, module)


def is_here(name):
    """Whether the versions are installed that the recording was made with."""
    versions = recorded(case_name(name, ROWS[name].cases[0]))["versions"]
    modules = {module.partition(".")[0] for module in ROWS[name].modules}
    try:
        return all(importlib.metadata.version(distribution(module)) == versions[module] for module in modules)
    except importlib.metadata.PackageNotFoundError:
        return False


LIVE = [name for name in ROWS if is_here(name)]


def leaves(tree, path=""):
    """Arrays and names by path. An object graph is bytes, whose order TensorFlow does not promise."""
    if isinstance(tree, dict):
        return {k: x for key, value in tree.items() for k, x in leaves(value, f"{path}/{key}").items()}
    return {} if isinstance(tree, bytes) else {path: tree}


def test_what_must_be_here_is():
    must = set(os.environ.get("RMSPROP_JAX_LIVE", "").split())  # by distribution, as in .ci/run
    distributions = {name: {distribution(module) for module in row.modules} for name, row in ROWS.items()}
    assert must & set().union(*distributions.values()) <= set().union(*(distributions[name] for name in LIVE))


if LIVE:

    @pytest.mark.slow
    @pytest.mark.parametrize("name", LIVE)
    def test_the_framework_saves_what_was_recorded(name, tmp_path):
        # Each in a process of its own: they do not get along in one.
        command = [sys.executable, checkpoints.__file__, "--into", tmp_path, name]
        environment = {**os.environ, "KERAS_BACKEND": "tensorflow"}  # others want Keras on JAX
        done = subprocess.run(command, env=environment, check=False, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        files = [file.name.removesuffix(".json.gz") for file in pathlib.Path(tmp_path).iterdir()]
        assert files
        for file in files:
            now, then = (leaves(recorded(file, *folder)) for folder in ((tmp_path,), ()))
            assert set(now) == set(then)
            for path, x in then.items():
                if path.startswith("/versions"):
                    continue
                if isinstance(x, np.ndarray) and x.dtype == np.uint8:  # codes: one step apart where rounding differs
                    assert np.mean(x != now[path]) < 0.01
                elif isinstance(x, np.ndarray):
                    np.testing.assert_allclose(now[path], x, rtol=1e-4, atol=1e-6, err_msg=f"{file} {path}")
                else:
                    assert str(now[path]) == str(x)
