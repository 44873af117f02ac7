"""Settings for all tests: eight CPU devices, no silent rank or dtype promotion, and (pyproject.toml) no warnings."""

import contextlib
import os
import pathlib
import sys

import jax
import pytest
from hypothesis import HealthCheck, settings
from jax.experimental.compilation_cache import compilation_cache


# Tests import from these folders as from this one.
sys.path += [str(pathlib.Path(__file__).parent / folder) for folder in ("benchmarks", "golden")]

# They need XLA's compiler for TPUs, or train for minutes. `.ci/run` names them, and then they are collected.
collect_ignore = ["test_processes.py", "test_projects.py", "test_scripts.py", "test_tpu.py"]

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_numpy_dtype_promotion", "strict")
if not hasattr(jax, "enable_x64"):  # the oldest jax that we support has it elsewhere
    jax.enable_x64 = jax.experimental.enable_x64


# Timing decides nothing here: neither a deadline nor a slow machine.
settings.register_profile("house", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("house")


def pytest_terminal_summary(terminalreporter):
    """Says which frameworks are not here. What they do is compared as it was recorded."""
    from frameworks import FRAMEWORKS, is_here

    missing = [name for name in FRAMEWORKS if not is_here(name)]
    terminalreporter.write_line(f"Not installed, and so not run live: {', '.join(missing) or 'none'}.")


# --- Compiled programs ------------------------------------------------------------------------------------

# Their subject is what the compiler makes, so it must run.
READS_PROGRAMS = {"test_compilation", "test_meshes", "test_tpu"}


def pytest_configure(config):
    """A second run finds most programs in pytest's cache: `pytest --cache-clear` forgets them."""
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ and hasattr(config, "cache"):
        jax.config.update("jax_compilation_cache_dir", str(config.cache.mkdir("jax")))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
        jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


@pytest.fixture(scope="module", autouse=True)
def programs_of_one_file(request):
    """Each file starts without compiled programs. All that a run compiles would take five gigabytes."""
    jax.config.update("jax_enable_compilation_cache", request.path.stem not in READS_PROGRAMS)
    compilation_cache.reset_cache()  # it reads the setting once
    yield
    jax.clear_caches()


_compiled: list[str] = []
jax.monitoring.register_event_duration_secs_listener(lambda event, _, **kw: _compiled.append(event))


@pytest.fixture
def compilations():
    """A context manager whose value, a list, has one entry per program that XLA compiled inside it."""

    @contextlib.contextmanager
    def watch():
        events: list[str] = []
        start = len(_compiled)
        yield events
        events += [event for event in _compiled[start:] if "backend_compile" in event]

    return watch


# --- Settings of single tests -----------------------------------------------------------------------------


@pytest.fixture
def x64():
    with jax.enable_x64(True):
        yield


@pytest.fixture
def users_climate():
    """Other people's libraries mix dtypes and ranks: here the user's settings, not ours."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield
