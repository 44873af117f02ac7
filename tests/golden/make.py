"""Runs the installed frameworks and writes their trajectories: python tests/golden/make.py NAME [NAME ...]

One file per framework, with every tenth step of each case and the versions that made it (frameworks.py).
"""

import json
import pathlib
import platform
import sys

import numpy as np


HERE = pathlib.Path(__file__).parent
sys.path[:0] = [str(HERE.parent), str(HERE.parents[1])]

from frameworks import cases, FRAMEWORKS, version  # noqa: E402


def write(name):
    framework = FRAMEWORKS[name]
    arrays = {}
    for case, arguments, rates in cases(framework):
        out = framework.run(arguments, rates)
        assert np.isfinite(out).all(), (name, case)
        assert out.dtype == np.float32
        arrays[case] = out[9::10]
    versions = {d: version(d) for d in (*framework.distributions, "numpy")}
    versions["python"] = platform.python_version()
    np.savez_compressed(HERE / f"{name}.npz", versions=np.array(json.dumps(versions)), **arrays)
    print(name, versions, len(arrays), "cases")


if __name__ == "__main__":
    for name in sys.argv[1:]:
        write(name)
