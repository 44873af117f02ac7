"""What guards main, part by part. `.ci/run` runs it; `.ci/run lint` runs one part.

Each part has a fresh virtual environment, so that a missing install step fails. PYTHON names the interpreters of the
parts that run on several: by default the oldest that pyproject.toml allows, and the newest that is here.
"""

import os
import pathlib
import re
import shutil
import tarfile
import xml.etree.ElementTree

import nox


PROJECT = nox.project.load_toml("pyproject.toml")["project"]
OLDEST, *NEWER = nox.project.python_versions({"project": PROJECT})
NEWEST = next((version for version in reversed(NEWER) if shutil.which(f"python{version}")), None)
if NEWEST is None:
    raise RuntimeError(f"no Python newer than {OLDEST}: on that one, pip finds an older jax than users get")
PYTHONS = os.environ.get("PYTHON", f"{OLDEST} {NEWEST}").split()
LOWER_BOUNDS = [re.sub(r">=([^,]+).*", r"==\1", dependency) for dependency in PROJECT["dependencies"]]

# The frameworks themselves: versions as recorded in tests/golden, so that a new release is a decision. Paddle cannot be
# imported beside TensorFlow, so Paddle, MindSpore and MLX are compared as recorded.
FRAMEWORKS = ["torch==2.13.0", "keras==3.15.1", "tensorflow==2.21.0", "tf_keras==2.21.0", "dm-sonnet==2.0.2"]
FRAMEWORKS += ["sbx-rl==0.28.0", "tfp-nightly==0.26.0.dev20261027", "gymnasium", "pandas", "cloudpickle"]
FRAMEWORKS += ["hydra-core==1.3.8", "fiddle==0.3.1", "gin-config==0.5.0", "jsonargparse==4.53.0"]
# Without their dependencies, which would replace torch: their optimizers need torch alone.
ALONE = ["timm==1.0.31", "stable-baselines3==2.9.2", "bitsandbytes==0.50.2", "pfrl==0.4.0", "kauldron==1.4.2"]
FRAMEWORKS += ["etils[ecolab,enp,epath,epy]", "immutabledict", "ml_collections", "tqdm", "wrapt"]  # of konfig
LIVE = "torch timm stable-baselines3 pfrl bitsandbytes keras tf-keras tensorflow dm-sonnet sbx-rl"
LIVE += " hydra-core fiddle gin-config jsonargparse kauldron"

nox.options.error_on_missing_interpreters = True
nox.options.stop_on_first_error = True
os.environ |= {"PIP_DISABLE_PIP_VERSION_CHECK": "1", "PIP_PROGRESS_BAR": "off", "PIP_QUIET": "1"}
# 0 turns --no-compile on, as pip's documentation says. Compiling every module takes half of an installation.
os.environ["PIP_NO_COMPILE"] = "0"


def tests(session, *arguments, **environment):
    """Runs pytest. A check that was skipped did not pass."""
    file = pathlib.Path(session.create_tmp()) / "report.xml"
    try:
        session.run("pytest", *arguments, f"--junitxml={file}", env=environment)
    finally:
        if file.exists():
            suite = xml.etree.ElementTree.parse(file).find("testsuite").attrib
            failed, skipped = int(suite["failures"]) + int(suite["errors"]), int(suite["skipped"])
            passed = int(suite["tests"]) - failed - skipped
            line = f"{passed} passed, {failed} failed, {skipped} skipped in {float(suite['time']):.2f}s"
            with pathlib.Path(os.environ.get("SUMMARIES", os.devnull)).open("a") as summaries:
                summaries.write(f"{session.name}: {line}\n")
    if skipped or not passed:
        session.error(f"a check was skipped, or nothing was tested: {line}")


def execute(session, *notebooks):
    """Runs notebooks, and leaves them as they are."""
    command = ["jupyter", "nbconvert", "--log-level=WARN", "--to=notebook", "--execute"]
    session.run(*command, f"--output-dir={session.create_tmp()}", *map(str, notebooks))


@nox.session(python=OLDEST)
def lint(session):
    """Style and types."""
    session.install("-e", ".[test]", "--group", "dev")
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")
    session.run("pyright")


@nox.session(python=PYTHONS)
def readme(session):
    """The two lines that README.md tells a newcomer to paste: the demo and the tests."""
    text = pathlib.Path("README.md").read_text()
    demo, test = re.findall(r"^pip install -e .* && .*$", text, re.MULTILINE)
    session.run("bash", "-c", demo, external=True)
    session.run("bash", "-c", test.removesuffix(" && pytest"), external=True)
    tests(session)


@nox.session(python=OLDEST)
def lower_bounds(session):
    """The oldest jax and Optax that are allowed."""
    session.install("-e", ".[test]", *LOWER_BOUNDS)
    names = ["pytree", "states", "carry", "layers", "metrics", "sharding", "compilation", "ecosystem"]
    tests(session, *(f"tests/test_{name}.py" for name in names))


@nox.session(python=PYTHONS)
def package(session):
    """The wheel and the sdist as a stranger gets them. DIST names a folder that has both; without it they are built."""
    folder = pathlib.Path(session.create_tmp())
    dist = pathlib.Path(os.environ.get("DIST", folder / "dist")).resolve()
    if "DIST" not in os.environ:
        session.install("build")
        session.run("python", "-m", "build", "--outdir", str(dist), ".", silent=True)
    (wheel,), (sdist,) = dist.glob("*.whl"), dist.glob("*.tar.gz")
    session.install(f"{wheel}[demo]", "pytest")
    with session.chdir(folder):  # no checkout: the demo and the doctests run from what was installed
        session.run("python", "-m", "rmsprop_jax", "--epochs", "2")
        tests(session, "--doctest-modules", "-p", "no:cacheprovider", "--pyargs", "rmsprop_jax")
    if session.python == PYTHONS[-1]:
        with tarfile.open(sdist) as archive:
            archive.extractall(folder, filter="data")
        unpacked = folder / sdist.name.removesuffix(".tar.gz")
        session.install("-e", f"{unpacked}[test]")
        with session.chdir(unpacked):
            tests(session, "tests/test_house.py", "tests/test_interop_resumed_runs.py", "tests/test_conformance.py")


@nox.session(python=NEWEST)
def tpu(session):
    """Programs for a TPU. XLA's compiler for TPUs needs no TPU."""
    session.install("-e", ".[test]", "jax[tpu]")
    tests(session, "tests/test_tpu.py", JAX_PLATFORMS="cpu")


@nox.session(python=NEWEST)
def programs(session):
    """Complete scripts and several processes: killed, and resumed to the same bits."""
    session.install("-e", ".[test]")
    tests(session, "tests/test_scripts.py", "tests/test_processes.py")


@nox.session(python=OLDEST)
def notebooks(session):
    """All of them. Without PyTorch and Keras, dialects.ipynb reads what was recorded; `live` runs it beside them."""
    session.install("-e", ".[notebooks]")
    execute(session, *sorted(pathlib.Path("notebooks").glob("*.ipynb")))


@nox.session(python=NEWEST)
def site(session):
    """The documentation. A warning is an error, and so is a dead link. SITE names a folder for it."""
    session.install("-e", ".[docs]")
    shutil.rmtree("notebooks/api", ignore_errors=True)
    folder = os.environ.get("SITE") or str(pathlib.Path(session.create_tmp()) / "site")
    session.run("sphinx-build", "-q", "-W", "--keep-going", "notebooks", folder, env={"JAX_PLATFORMS": "cpu"})
    session.run("python", "tests/built_site.py", folder)


@nox.session(python=OLDEST)
def live(session):
    """Other frameworks, beside ours."""
    session.install("-e", ".[test,notebooks]", *FRAMEWORKS)
    session.install("--no-deps", *ALONE)
    environment = {"JAX_PLATFORMS": "cpu", "KERAS_BACKEND": "jax", "TF_CPP_MIN_LOG_LEVEL": "3"}
    names = ["live", "live_checkpoints", "live_pages", "projects"]
    tests(session, *(f"tests/test_{name}.py" for name in names), RMSPROP_JAX_LIVE=LIVE, **environment)
    session.env.update(environment)
    execute(session, "notebooks/dialects.ipynb")
