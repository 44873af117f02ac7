"""python tests/benchmarks/accelerators.py: updates and training steps compiled for TPUs and GPUs that are not there, and read.

XLA's compilers need no device: `pip install "jax[tpu]"` brings that for TPUs, and `pip install "jax[cuda12]" nvidia-cuda-nvdisasm`,
in an environment of its own, that for NVIDIA's GPUs. **Nothing here ran on an accelerator.** Every number is read from a compiled
program, except the seconds that compiling took, which are those of the processor at hand.

An update is `tx.update` and `optax.apply_updates` in one program with parameters and state donated.

* kernels: what the program launches on arrays. Scalars are left out: a TPU computes them beside the kernels. A GPU launches up to
  four kernels more for them in a program.
* moved: bytes that the kernels read and write in the device's memory, with the padding of tiles. The floor is each argument read
  once and each result written once.
* copies: kernels that only move an array from one place of the memory to another.
* bundles: instructions of the TPU's core (each has several slots) for 1024 parameters, one vector register. Divided by the
  clock they are the time of the arithmetic. The time of the memory is the bytes moved, divided by the published bandwidth. The longer
  one is a lower bound of the update's time. A clock is the one that the published peak of matrix products implies; a v6e's is a guess.
  A v4 and a v5p have two cores in a device: where these share the work, the arithmetic takes half of the time.
* instructions: of a GPU's machine code, for one parameter. Their time is that of 128 in each cycle of each of its cores. None are
  counted in kernels with loops.
* compile: processor seconds of all threads, divided by those of Optax's same variant.

Prints Markdown; `--json FILE` keeps every number.
"""

import argparse
import collections
import dataclasses
import itertools
import math
import re
import resource
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import jax
import optax
import stacked
from compilers import CHIPS, devices, forget, instructions, Kernel
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec as P
from meshes import collectives
from report import is_here, Report
from speed import language, LAYOUTS, RATE, Shapes

from rmsprop_jax import rmsprop, round_params_stochastically


# --- What is compiled, and for what -------------------------------------------------------------------


VARIANTS: dict[str, dict[str, Any]] = {"plain": {}, "momentum": {"momentum": 0.9}, "centered": {"centered": True}}


class Update(NamedTuple):
    """An optimizer, the dtype of the parameters, and the row of Optax whose compile time is 1."""

    tx: optax.GradientTransformation
    dtype: str = "float32"
    beside: str = "optax.rmsprop, plain"


def updates_of_all() -> dict[str, Update]:
    """By name, and each behind the one that it is compared with."""
    rows = {}
    for variant, options in VARIANTS.items():
        reference = f"optax.rmsprop, {variant}"
        rows[reference] = Update(optax.rmsprop(RATE, **options), beside=reference)
        for kind in (None, "bfloat16", "uint8"):
            tx = rmsprop(RATE, **options, state_dtype=kind)
            rows[f"ours, {kind or 'float32'} state, {variant}"] = Update(tx, beside=reference)
    one_byte = rmsprop(RATE, state_dtype="uint8")
    rows["ours, three bytes"] = Update(optax.chain(one_byte, round_params_stochastically()), "bfloat16")
    rows["ours, four bytes"] = Update(optax.chain(one_byte, round_params_stochastically(keep_rest=True)), "bfloat16")
    rows["optax.adam"] = Update(optax.adam(RATE))
    rows["optax.adafactor"] = Update(optax.adafactor(RATE))
    return rows


SHAPES: dict[str, Callable[[], Shapes]] = {
    "16M": lambda: [(1 << 12, 1 << 12)],  # a matrix, which Adafactor factors
    **{name: LAYOUTS[name] for name in ("160 x 100k", "1000 x 1k", "ResNet-50", "GPT-2 small")},
}


# --- Compiling ----------------------------------------------------------------------------------------


def one_device(chip: str) -> NamedSharding:
    return NamedSharding(Mesh(devices(CHIPS[chip].topology)[:1], "x"), P())


def with_sharding(tree: Any, shardings: Any) -> Any:
    """Shapes and dtypes of a tree, with one sharding for all or a tree of them."""
    if isinstance(shardings, NamedSharding):
        shardings = jax.tree.map(lambda _: shardings, tree)
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, shardings)


def step_of(tx: optax.GradientTransformation) -> Callable[..., Any]:
    def step(params, state, grads):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    return step


def compiled(step: Callable[..., Any], *arguments: Any) -> tuple[jax.stages.Compiled, float]:
    """A program with the first two arguments donated, and the processor's seconds, which other processes do not lengthen."""
    jax.clear_caches()  # as in a new process
    forget()
    start = processor_seconds()
    program = jax.jit(step, donate_argnums=(0, 1), keep_unused=True).lower(*arguments).compile()
    return program, processor_seconds() - start


def processor_seconds() -> float:
    """Of this process and of those that it ran, such as an assembler."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(x.ru_utime + x.ru_stime for x in used)


# --- Reading ------------------------------------------------------------------------------------------

BYTES = {"pred": 1, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4}
TYPE = re.compile(rf"\b({'|'.join(BYTES)})\[([\d,]*)\](?:\{{([^}}]*)\}})?")
INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (\(.*?\)|\S+) ([\w\-]+)\((.*?)\)(.*)$")
LAUNCHES_NOTHING = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all"}


class Array(NamedTuple):
    """An array in a program: its elements, and its bytes as they lie in memory."""

    elements: int
    bytes: int
    on_device: bool  # in the device's main memory, not in that of its core


def arrays_of(text: str) -> list[Array]:
    """The arrays of a type, such as `bf16[3,5]{1,0:T(8,128)(2,1)}` or a tuple of them."""
    found = []
    for dtype, dims, layout in TYPE.findall(text):
        shape = [int(n) for n in dims.split(",") if n]
        order = [int(n) for n in layout.partition(":")[0].split(",") if n]
        tile = re.search(r"T\(([\d,]+)\)", layout)
        sizes = [shape[axis] for axis in reversed(order)]
        for i, n in enumerate(reversed(tile[1].split(",")) if tile and sizes else (), 1):
            if i > len(sizes):
                sizes.insert(0, 1)
            sizes[-i] = math.ceil(sizes[-i] / int(n)) * int(n)
        space = re.search(r"S\((\d+)\)", layout)
        found.append(Array(math.prod(shape), math.prod(sizes) * BYTES[dtype], not space))
    return found


@dataclasses.dataclass
class Instruction:
    """One line of a program's entry."""

    name: str
    opcode: str
    arrays: list[Array]  # results
    operands: list[Array]
    text: str

    @property
    def moved(self) -> int:
        """Bytes to and from the device's memory."""
        if self.opcode.endswith("-start"):
            # From the device's memory to that of the core, or back. The result names both ends.
            ends = [x for x in self.arrays if x.elements > 1]
            return min(x.bytes for x in ends) * sum(x.on_device for x in ends[:2])
        return sum(x.bytes for x in (*self.arrays, *self.operands) if x.on_device)

    @property
    def trips(self) -> int:
        bounds = re.search(r'"iteration_bounds":\[([^\]]*)\]', self.text)
        return math.prod(int(n) for n in re.findall(r"\d+", bounds[1])) if bounds else 1


def entry_of(text: str) -> list[Instruction]:
    """What a program does, in order."""
    entry: dict[str, Instruction] = {}
    for line in itertools.takewhile(lambda x: x != "}", text[text.index("\nENTRY") :].splitlines()[2:]):
        match = INSTRUCTION.match(re.sub(r"/\*index=\d+\*/", "", line))
        if match:
            name, type_, opcode, operands, rest = match.groups()
            arrays = [a for x in re.findall(r"%([\w.\-]+)", operands) if x in entry for a in entry[x].arrays]
            entry[name] = Instruction(name, opcode, arrays_of(type_), arrays, f"{operands}){rest}")
    return list(entry.values())


class Counts(NamedTuple):
    """What is read from a program."""

    kernels: int
    copies: int
    moved: int
    floor: int
    temporary: int
    not_aliased: int  # bytes of results that have no argument's buffer
    collectives: int
    program_bytes: int
    arguments: list[int]  # bytes of each, as they lie in memory
    instructions: int | None  # None where they cannot be counted


def count(program: jax.stages.Compiled) -> Counts:
    """Reads a program. The instructions are those of the last one that was compiled."""
    text = program.as_text()
    entry, memory = entry_of(text), program.memory_analysis()
    arguments = {x.text.partition(")")[0]: x.arrays for x in entry if x.opcode == "parameter"}
    in_order = [a.bytes for i in range(len(arguments)) for a in arguments[str(i)]]  # thousands come as one tuple
    launched = [x for x in entry if x.opcode not in LAUNCHES_NOTHING and not x.opcode.endswith("-done")]
    launched = [
        x for x in launched if any(a.elements > 1 for a in (*x.arrays, *x.operands)) and "ConcatBitcast" not in x.text
    ]
    kernels = [x for x in launched if not x.opcode.endswith("-start")]
    return Counts(
        kernels=len(kernels),
        copies=sum(is_copy(x, text) for x in launched),
        moved=sum(x.moved for x in launched),
        floor=sum(in_order) + sum(a.bytes for a in entry[-1].arrays),
        temporary=memory.temp_size_in_bytes,
        not_aliased=memory.output_size_in_bytes - memory.alias_size_in_bytes,
        collectives=sum(collectives(text).values()),
        program_bytes=memory.generated_code_size_in_bytes,
        arguments=in_order,
        instructions=instructions([Kernel(x.name, (*x.arrays, None, *x.operands), x.trips) for x in kernels]),
    )


def is_copy(instruction: Instruction, text: str) -> bool:
    if instruction.opcode == "copy-start":
        return all(x.on_device for x in instruction.arrays if x.elements > 1)
    called = re.search(r"calls=%?([\w.\-]+)", instruction.text)
    if instruction.opcode != "fusion" or not called:
        return instruction.opcode in ("copy", "transpose")
    body = text[text.index(f"\n%{called[1]} (") :].partition("\n}")[0]
    opcodes = {match[3] for line in body.splitlines() if (match := INSTRUCTION.match(line))}
    return opcodes - LAUNCHES_NOTHING <= {"copy", "transpose", "reshape"}


# --- Updates ------------------------------------------------------------------------------------------


def updates(chip: str, layout: str, names: list[str]) -> Iterator[dict[str, Any]]:
    """One layout: a row per update."""
    sharding, shapes = one_device(chip), SHAPES[layout]()
    *_, column, parameters = CHIPS[chip].compiler
    size = sum(math.prod(shape) for shape in shapes)
    seconds: dict[str, float] = {}
    compiled(
        lambda x, y: (x, y), *with_sharding([jax.ShapeDtypeStruct((), "float32")] * 2, sharding)
    )  # loads the compiler
    for name in names:
        tx, dtype, beside = updates_of_all()[name]
        params = with_sharding([jax.ShapeDtypeStruct(shape, dtype) for shape in shapes], sharding)
        state = with_sharding(jax.eval_shape(tx.init, params), sharding)
        program, seconds[name] = compiled(step_of(tx), params, state, params)
        found = count(program)
        held = found.arguments[len(shapes) : len(shapes) + len(jax.tree.leaves(state))]
        yield {
            "chip": chip,
            "layout": layout,
            "update": name,
            "kernels per leaf": found.kernels / len(shapes),
            "copies": found.copies,
            "bytes moved per parameter": found.moved / size,
            "moved / floor": found.moved / found.floor,
            "state bytes per parameter": sum(held) / size,
            "temporary bytes per parameter": found.temporary / size,
            "not aliased": found.not_aliased,
            column: found.instructions and found.instructions * parameters / size,
            "ms, arithmetic": found.instructions and 1e3 * found.instructions / CHIPS[chip].instructions_per_second,
            "ms, memory": 1e3 * found.moved / CHIPS[chip].bytes_per_second,
            "program KB": found.program_bytes / 1024 or None,  # None for a GPU
            "compile seconds": seconds[name],
            "compile": seconds[name] / seconds[beside] if beside in seconds else None,
        }


def updates_table(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One layout on one chip."""
    return without_empty(rows, "chip", "layout", "not aliased", "compile seconds")


def without_empty(rows: list[dict[str, Any]], *dropped: str) -> list[dict[str, Any]]:
    """Rows without columns that are dropped, and without those that are None in all rows."""
    kept = [key for key in rows[0] if key not in dropped and any(row[key] is not None for row in rows)]
    return [{key: row[key] for key in kept} for row in rows]


def tables(rows: list[dict[str, Any]]) -> dict[tuple[str, str], list[dict[str, Any]]]:
    grouped = collections.defaultdict(list)
    for row in rows:
        grouped[row["chip"], row["layout"]].append(row)
    return {key: updates_table(group) for key, group in grouped.items()}


# --- Whole training steps -----------------------------------------------------------------------------


TRAINED = ("ours, three bytes", "ours, four bytes", "optax.rmsprop, plain", "optax.adam", "ours, uint8 state, plain")


def peak(chip: str, trained: str) -> dict[str, Any]:
    """Bytes per parameter of the training step of a Transformer with 100 million. Arithmetic is in the parameters' dtype."""
    network, sharding = language(10_000, 128, 768, 12, 12, batch=1), one_device(chip)
    tx, dtype, _ = updates_of_all()[trained]
    params = with_sharding(jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, dtype), network.params), sharding)
    state = with_sharding(jax.eval_shape(tx.init, params), sharding)

    def step(params, state, batch):
        loss, grads = jax.value_and_grad(network.loss)(params, batch)
        return *step_of(tx)(params, state, grads), loss

    program, seconds = compiled(step, params, state, with_sharding(network.batch, sharding))
    memory, size = program.memory_analysis(), sum(x.size for x in jax.tree.leaves(params))
    held = memory.argument_size_in_bytes
    beside = memory.temp_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    return {
        "chip": chip,
        "training step": trained,
        "parameters": f"{size:,}",
        "parameters and state": held / size,
        "gradients and all else": beside / size,
        "peak": (held + beside) / size,
        "program": memory.generated_code_size_in_bytes / size or None,  # None for a GPU
        "compile seconds": seconds,
    }


# --- The step inside the backward pass ----------------------------------------------------------------

STACKED = stacked.Size(layers=20, width=2048, heads=16, length=1024, vocabulary=32_000)
SHARDED_STEPS = ("ours, three bytes",)  # as by FSDP, on all chips of the topology


def stepped(chip: str, name: str, inside: bool, fsdp: bool = False, size: stacked.Size = STACKED) -> dict[str, Any]:
    """A whole training step of a Transformer with stacked layers, with and without the gradients of all of them."""
    found = devices(CHIPS[chip].topology)
    mesh = Mesh(found if fsdp else found[:1], "x", axis_types=(AxisType.Auto,))
    tx, dtype, _ = updates_of_all()[name]

    def place(tree: Any, stack: int) -> Any:
        def sharding(x: Any) -> NamedSharding:
            split = fsdp and x.ndim >= stack + 2
            return NamedSharding(mesh, P(*(None,) * stack, "x") if split else P())

        return with_sharding(tree, jax.tree.map(sharding, tree))

    def placed(trees: Any) -> Any:
        return tuple(place(tree, stack) for stack, tree in enumerate(trees))

    params = placed(stacked.shapes(size, dtype))
    states = placed(jax.eval_shape(tx.init, tree) for tree in params)

    def keep(trees: Any) -> Any:
        return jax.tree.map(lambda x, p: jax.lax.with_sharding_constraint(x, p.sharding), trees, params)

    tokens = jax.ShapeDtypeStruct((size.batch * len(mesh.devices), size.length + 1), "int32")
    tokens = with_sharding(tokens, NamedSharding(mesh, P("x") if fsdp else P()))
    parameters = sum(x.size for x in jax.tree.leaves(params))
    row = {"chip": chip, "training step": name, "gradients": "of a layer" if inside else "of all layers"}
    row |= {"devices": len(mesh.devices), "parameters": f"{parameters:,}"}
    try:
        program, seconds = compiled(stacked.step_of(size, tx, inside, keep), params, states, tokens)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return row | {"peak": None}  # it does not fit
    memory, text = program.memory_analysis(), program.as_text()
    beside = memory.temp_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    share = len(mesh.devices) / parameters
    return row | {
        "parameters and state": memory.argument_size_in_bytes * share,
        "all else": beside * share,
        "peak": (memory.argument_size_in_bytes + beside) * share,
        "copies of stacks": copies_of_stacks(text, size.layers),
        "matrix products": len(re.findall(r" (?:convolution|dot)\(", text)),
        "collectives": collectives(text),
        "kept": jax.tree.map(lambda p: p.sharding, params) == program.output_shardings[0] if fsdp else None,
        "compile seconds": seconds,
    }


def copies_of_stacks(text: str, layers: int) -> int:
    """Kernels, also in loops, that only move the matrices of all layers from one place of the memory to another."""
    within_kernels = set(re.findall(r"calls=%?([\w.\-]+)", text))
    copies = 0
    for computation in text.split("\n}"):
        head, *lines = computation.strip().splitlines() or [""]
        if head.removeprefix("ENTRY ").partition(" ")[0].lstrip("%") in within_kernels:
            continue
        for match in filter(None, map(INSTRUCTION.match, lines)):
            name, type_, opcode, operands, rest = match.groups()
            kernel = Instruction(name, opcode, arrays_of(type_), [], f"{operands}){rest}")
            copies += bool(re.search(rf"\[{layers},\d+,", type_)) and is_copy(kernel, text)
    return copies


# --- Meshes -------------------------------------------------------------------------------------------

MESHES = {"v5e:4x4": (4, 4), "v5p:2x2x1": (2, 2), "v6e:2x2": (2, 2), "h100:1x1x8": (4, 2)}
KERNELS = {"kernel1": (256, 512), "bias1": (512,), "kernel2": (512, 256), "bias2": (256,)}
SPECS = {
    "data parallel": dict.fromkeys(KERNELS, P()),
    "FSDP": dict.fromkeys(KERNELS, P(("data", "model"))),
    "tensor parallel": {"kernel1": P(None, "model"), "bias1": P("model"), "kernel2": P("model"), "bias2": P()},
    "both": {"kernel1": P("data", "model"), "bias1": P("model"), "kernel2": P("model", "data"), "bias2": P("data")},
}
SHARDED = ("optax.rmsprop, momentum", "ours, uint8 state, momentum", "ours, three bytes", "ours, four bytes")


def on_mesh(topology: str, layout: str, name: str) -> dict[str, Any]:
    """What `jit(init)` keeps of the shardings, and what is sent."""
    mesh = Mesh(devices(topology).reshape(MESHES[topology]), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    tx, dtype, _ = updates_of_all()[name]
    specs = {key: NamedSharding(mesh, spec) for key, spec in SPECS[layout].items()}
    params = with_sharding({key: jax.ShapeDtypeStruct(shape, dtype) for key, shape in KERNELS.items()}, specs)
    init = jax.jit(tx.init).lower(params).compile()
    state, made = jax.eval_shape(tx.init, params), init.output_shardings
    wanted = optax.tree.map_params(
        tx, lambda _, s: s, state, specs, transform_non_params=lambda _: NamedSharding(mesh, P())
    )
    program, _ = compiled(step_of(tx), params, with_sharding(state, wanted), params)
    columns = [jax.tree.leaves(tree) for tree in (state, wanted, made, program.output_shardings[1])]
    slots = [(x.ndim, *shardings) for x, *shardings in zip(*columns, strict=True) if x.ndim]
    return {
        "topology": topology,
        "layout": layout,
        "update": name,
        "sent by init": sum(collectives(init.as_text()).values()),
        "sent by update": count(program).collectives,
        "arrays": len(slots),
        "kept by jit(init)": sum(same(wanted, made, ndim) for ndim, wanted, made, _ in slots),
        "kept by update": sum(same(wanted, updated, ndim) for ndim, wanted, _, updated in slots),
    }


def same(wanted: NamedSharding, found: Any, ndim: int) -> bool:
    return wanted.device_set == found.device_set and wanted.is_equivalent_to(found, ndim)


def meshes_table(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A line per topology and update: sums over the layouts, which are data parallel, FSDP, tensor parallel and both."""
    table: dict[tuple[str, str], dict[str, Any]] = {}
    for row in rows:
        key = row["topology"], row["update"]
        line = table.setdefault(key, {"topology": key[0], "update": key[1]})
        for name in ("sent by init", "sent by update", "arrays", "kept by jit(init)", "kept by update"):
            line[name] = line.get(name, 0) + row[name]
    return list(table.values())


# --- The state in the host's memory -------------------------------------------------------------------

OFFLOADED = ("optax.rmsprop, plain", "ours, float32 state, plain", "optax.rmsprop, momentum")
OFFLOADED += ("ours, float32 state, momentum", "ours, uint8 state, momentum")


def in_host_memory(chip: str, name: str) -> dict[str, Any]:
    """A step as the README has it: the state comes to the device, and goes back."""
    device = one_device(chip)
    tx, dtype, _ = updates_of_all()[name]
    shapes = SHAPES["GPT-2 small"]()[:14]
    params = with_sharding([jax.ShapeDtypeStruct(shape, dtype) for shape in shapes], device)
    state = jax.eval_shape(tx.init, params)
    kinds = jax.tree.map(lambda x: device.with_memory_kind("pinned_host") if x.ndim else device, state)

    def step(params, state, grads):
        state = jax.tree.map(lambda x: jax.device_put(x, jax.memory.Space.Device), state)
        params, state = step_of(tx)(params, state, grads)
        return params, jax.tree.map(jax.device_put, state, kinds)

    program, _ = compiled(step, params, with_sharding(state, kinds), params)
    memory = program.memory_analysis()
    return {
        "chip": chip,
        "update": name,
        "MB on the device": memory.argument_size_in_bytes / 1e6,
        "MB on the host": memory.host_argument_size_in_bytes / 1e6,
        "of these aliased": memory.host_alias_size_in_bytes / 1e6,
        "temporary MB on the device": memory.temp_size_in_bytes / 1e6,
    }


# --- Reporting ----------------------------------------------------------------------------------------

CASES = [
    *(("v5e", layout) for layout in SHAPES),
    *((chip, "16M") for chip in CHIPS if chip != "v5e"),
    ("h100", "160 x 100k"),
]
COMPLETE = (("v5e", "16M"), ("h100", "16M"))
# In the other cases those that say most. For a TPU, 160 leaves take minutes each.
FEW = ("optax.rmsprop, plain", "ours, float32 state, plain", "ours, uint8 state, plain")
FEW += ("ours, three bytes", "ours, four bytes", "optax.adam", "optax.adafactor")
PARTS = ("updates", "meshes", "host", "peaks", "layers")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), metavar="PART")
    here = [name for name, chip in CHIPS.items() if is_here(chip.compiler.package)]
    parser.add_argument("--chips", nargs="+", choices=here, default=here, metavar="CHIP")
    parser.add_argument("--layouts", nargs="+", choices=SHAPES, default=list(SHAPES), metavar="LAYOUT")
    parser.add_argument("--updates", metavar="PATTERN", default="", help="regular expression of names")
    parser.add_argument("--json", metavar="FILE", help="where to write every number")
    arguments = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")  # nothing runs, and a device that is there is left alone
    for chip in arguments.chips:
        devices(CHIPS[chip].topology)  # first of all, because compilers read their settings once
    report = Report(arguments.json, "jaxlib", *sorted({chip.compiler.package for chip in CHIPS.values()}), "flax")

    def chosen(chip: str, names: Iterable[str]) -> list[str]:
        return [x for x in names if chip in arguments.chips and re.search(arguments.updates, x)]

    for chip, layout in CASES if "updates" in arguments.parts else ():
        names = chosen(chip, updates_of_all() if (chip, layout) in COMPLETE else FEW)
        if names and layout in arguments.layouts:
            rows = list(updates(chip, layout, names))
            print(f"{chip}, {layout}")
            report.update("updates", rows, ("chip", "layout", "update"))
            report.show(updates_table(rows))
    if "meshes" in arguments.parts:
        cases = [x for x in itertools.product(MESHES, SPECS, SHARDED) if chosen(x[0].partition(":")[0], x[2:])]
        rows = [on_mesh(*x) for x in cases]
        report.add("meshes", rows, meshes_table(rows))
    if "host" in arguments.parts:
        report.add("host", [in_host_memory("v5e", name) for name in chosen("v5e", OFFLOADED)])
    for chip in ("v5e", "h100") if "peaks" in arguments.parts else ():
        for name in chosen(chip, TRAINED):
            rows = [peak(chip, name)]
            report.update("peaks", rows, ("chip", "training step"))
            report.show(without_empty(rows))
    if "layers" in arguments.parts:
        cases = [(chip, name, False) for chip in ("v5e", "h100") for name in chosen(chip, TRAINED)]
        cases += [("v5e", name, True) for name in chosen("v5e", SHARDED_STEPS)]
        for (chip, name, fsdp), inside in itertools.product(cases, (False, True)):
            rows = [stepped(chip, name, inside, fsdp)]
            report.update("layers", rows, ("chip", "training step", "gradients", "devices"))
            report.show(without_empty(rows))


if __name__ == "__main__":
    main()
