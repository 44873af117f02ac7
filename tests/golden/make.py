"""Runs the installed frameworks and writes their trajectories: python tests/golden/make.py NAME [NAME ...]

One file per framework, with every tenth step of each case and the versions that made it (frameworks.py); and, under
resume/, a checkpoint at half of a run with the parameters there and at the end (resume.py).
"""

import json
import pathlib
import platform
import sys

import numpy as np


HERE = pathlib.Path(__file__).parent
sys.path[:0] = [str(HERE.parent), str(HERE.parents[1])]

import resume  # noqa: E402
from frameworks import cases, FRAMEWORKS, version  # noqa: E402


def flat(tree, path=""):
    """Arrays by path, and everything else as JSON."""
    if isinstance(tree, dict):
        return {k: v for name, x in tree.items() for k, v in flat(x, f"{path}/{name}").items()}
    if isinstance(tree, list) and tree and isinstance(tree[0], tuple):
        return flat(dict(tree), path)
    if isinstance(tree, list):
        return {path: np.array(json.dumps(tree))}
    return {path: np.asarray(tree)}


def write_resume(name, versions):
    framework = FRAMEWORKS[name]
    for options in framework.resumed:
        arguments = resume.foreign(name, options)
        middle, checkpoint = resume.run_framework(framework, arguments, resume.ORIGIN, 0, resume.STOP)
        end, _ = resume.run_framework(framework, arguments, resume.ORIGIN, 0, resume.END)
        arrays = flat({"middle": middle, "end": end, "checkpoint": checkpoint})
        file = HERE / "resume" / f"{resume.case_name(name, options)}.npz"
        np.savez_compressed(file, versions=np.array(json.dumps(versions)), **arrays)


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
    write_resume(name, versions)
    print(name, versions, len(arrays), "cases")


if __name__ == "__main__":
    for name in sys.argv[1:]:
        write(name)
