"""Compilers for TPUs and GPUs that are not there: their devices, and how many instructions they write."""

import functools
import math
import os
import pathlib
import re
import shutil
import subprocess
import sysconfig
import tempfile
from collections.abc import Hashable
from typing import NamedTuple

import numpy as np
from jax.experimental import topologies


class Compiler(NamedTuple):
    """What differs between the two."""

    platform: str
    package: str  # that brings it
    settings: dict[str, str]  # of the environment; {} is the folder into which it writes
    column: str  # the name of its instructions in tables
    parameters: int  # for which they are counted there


class Chip(NamedTuple):
    """A small topology with such chips, and what is published of one."""

    compiler: Compiler
    topology: str
    bytes_per_second: float
    instructions_per_second: float
    facts: str | None = None  # of a GPU, which its compiler asks for


@functools.cache
def devices(topology: str) -> np.ndarray:
    """Descriptions of devices, such as those of "v5e:4x4" or "h100:1x1x8"."""
    name, _, shape = topology.partition(":")
    chip = CHIPS[name]
    # Compilers read their settings once, when they are loaded.
    os.environ |= {key: value.replace("{}", folder().name) for key, value in chip.compiler.settings.items()}
    options = {"topology": shape, "target_config": chip.facts} if chip.facts else {}
    found = topologies.get_topology_desc(name if chip.facts else topology, chip.compiler.platform, **options)
    return np.array(found.devices)


@functools.cache
def folder() -> tempfile.TemporaryDirectory[str]:
    """Into which compilers write."""
    return tempfile.TemporaryDirectory(prefix="compiled-")


def files(pattern: str) -> list[pathlib.Path]:
    return [path for path in pathlib.Path(folder().name).glob(pattern) if path.is_file()]


def forget() -> None:
    """Takes the files away."""
    for path in files("**/*"):
        path.unlink()


class Kernel(NamedTuple):
    """A kernel in a program."""

    name: str
    arrays: Hashable  # that it reads and writes
    trips: int  # the steps of its grid


def instructions(kernels: list[Kernel]) -> int | None:
    """Instructions of the program that was compiled last."""
    return bundles(kernels) or thread_instructions()


# --- TPUs ---------------------------------------------------------------------------------------------


def bundles(kernels: list[Kernel]) -> int:
    """Instructions of a TPU's core, each as often as its kernel's grid has steps."""
    counts = {}
    for file in files("*-final_hlo-static*"):
        name = re.sub(r"^\d+-|-\d+-final_hlo.*", "", file.name)
        counts[name] = len(file.read_text().partition("UTILIZATION:\n")[2].splitlines())
    # Of equal kernels one is written.
    alike = {kernel.arrays: counts[kernel.name] for kernel in kernels if kernel.name in counts}
    return sum(kernel.trips * counts.get(kernel.name, alike.get(kernel.arrays, 0)) for kernel in kernels)


TPU = Compiler(
    platform="tpu",
    package="libtpu",
    settings={
        "LIBTPU_INIT_ARGS": "--xla_jf_dump_to={} --xla_jf_dump_llo_text=true "
        "--xla_jf_dump_llo_pass_label_regex=.*static-per-bundle-utilization",
        "TPU_SKIP_MDS_QUERY": "1",  # there is no server that knows the machine
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # else one process at a time
        "TPU_WORKER_HOSTNAMES": "localhost",  # this and the next: else it warns
        "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    },
    column="bundles per 1024",
    parameters=1024,
)


# --- NVIDIA's GPUs ------------------------------------------------------------------------------------


def thread_instructions() -> int | None:
    """Instructions of all threads of a GPU. None if a kernel loops, or if one of NVIDIA's programs is missing."""
    launched = [line for file in files("*thunk_sequence.txt") for line in file.read_text().splitlines()]
    code = {name: n for file in files("*.ptx") for name, n in straight(file).items()}
    total = 0
    for line in launched:
        launch = re.match(r"\d+: .* (\S+) grid: (.*) threads: (.*)  ", line)
        if launch and code.get(launch[1]) is None:
            return None
        if launch:
            total += code[launch[1]] * math.prod(map(int, re.findall(r"\d+", f"{launch[2]} {launch[3]}")))
    return total or None


def straight(ptx: pathlib.Path) -> dict[str, int]:
    """Machine instructions of the kernels in a file that do not loop."""
    target = re.search(r"^\.target (\w+)", ptx.read_text(), re.MULTILINE)
    ptxas, nvdisasm = tool("ptxas"), tool("nvdisasm")
    if not (target and ptxas and nvdisasm):
        return {}
    binary = ptx.with_suffix(".cubin")
    subprocess.run([ptxas, f"-arch={target[1]}", ptx, "-o", binary], check=True)
    code = subprocess.run([nvdisasm, "-c", binary], check=True, capture_output=True, text=True).stdout
    found = {}
    for section in code.split("//-----"):
        name = re.match(r"-* \.text\.(\S+)", section)
        body = section.rpartition("EXIT")[0]  # what comes behind is a loop without a way in
        if name and not re.search(r"^(\.L_x_\d+):.*BRA `\(\1\)", body, re.MULTILINE | re.DOTALL):
            found[name[1]] = len(re.findall(r"^\s+/\*[0-9a-f]{4,}\*/", body, re.MULTILINE))
    return found


@functools.cache
def tool(name: str) -> str | None:
    """One of NVIDIA's programs, from its wheel or on the PATH."""
    wheels = pathlib.Path(sysconfig.get_path("purelib"), "nvidia").glob(f"*/bin/{name}")
    return next(map(str, wheels), shutil.which(name))


def facts(name: str, capability: str, cores: int, lanes: int, hertz: float, **others: float) -> str:
    """What XLA's compiler asks about a GPU."""
    info = {"core_count": cores, "fpus_per_core": lanes, "clock_rate_ghz": hertz / 1e9, **others}
    info |= {"threads_per_block_limit": 1024, "threads_per_warp": 32, "threads_per_core_limit": 2048}
    info |= {"block_dim_limit_x": 2**31 - 1, "block_dim_limit_y": 65535, "block_dim_limit_z": 65535}
    info |= {
        "registers_per_core_limit": 1 << 16,
        "registers_per_block_limit": 1 << 16,
        "shared_memory_per_block": 48 << 10,
    }
    lines = "\n".join(f"{key}: {value}" for key, value in info.items())
    return f"""gpu_device_info {{ cuda_compute_capability {{ {capability} }} {lines} }}
        platform_name: "CUDA" dnn_version_info {{ major: 9 minor: 8 }} device_description_str: "{name}" """


CUDA = Compiler(
    platform="cuda",
    package="jax_cuda12_plugin",
    # No GPU can try kernels for matrix products.
    settings={"XLA_FLAGS": "--xla_gpu_autotune_level=0 --xla_dump_to={}"},
    column="instructions per parameter",
    parameters=1,
)

H100 = facts(
    *("NVIDIA H100 80GB HBM3", "major: 9 feature_extension: ACCELERATED_FEATURES", 132, 128, 1.98e9),
    **{"shared_memory_per_core": 233_472, "shared_memory_per_block_optin": 232_448, "l2_cache_size": 50 << 20},
    **{"memory_bandwidth": 3_352_000_000_000, "device_memory_size": 84_942_979_072},
)

# A TPU's core begins one bundle in each cycle. Each of a GPU's cores begins four instructions, for 32 threads.
CHIPS = {
    "v5e": Chip(TPU, "v5e:2x2", 819e9, 1.5e9),
    "v5p": Chip(TPU, "v5p:2x2x1", 2765e9, 1.75e9),
    "v6e": Chip(TPU, "v6e:2x2", 1640e9, 1.75e9),
    "v4": Chip(TPU, "v4:2x2x1", 1228e9, 1.05e9),
    "h100": Chip(CUDA, "h100:1x1x1", 3352e9, 132 * 128 * 1.83e9, H100),
}
