"""python tests/benchmarks/pages.py: writes the tables of README.md and notebooks/*.md from results/*.json.

A table stands between `<!-- table: NAME -->` and `<!-- end -->`, and TABLES has its name. The line below it says which
machine made it, and which command makes it again.
"""

import itertools
import json
import pathlib
import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from reinforcement import decimals, ends_of, interval, returns
from report import markdown
from training import gaps, tuned


HERE = pathlib.Path(__file__).parent
ROOT = HERE.parents[1]
Row = dict[str, Any]


def read(name: str) -> dict[str, Any]:
    return json.loads((HERE / "results" / f"{name}.json").read_text())


def where(rows: Sequence[Row], **wanted: Any) -> list[Row]:
    """The rows that have these values. "_" in a key stands for a blank."""
    return [row for row in rows if all(row.get(key.replace("_", " ")) == value for key, value in wanted.items())]


def only(rows: Sequence[Row], **wanted: Any) -> Row:
    (row,) = where(rows, **wanted)
    return row


def spread(values: Any, digits: int, sign: str = "") -> str:
    """Mean and standard deviation."""
    values = np.asarray(values, float)
    return f"{values.mean():{sign}.{digits}f} ± {values.std(ddof=1):.{digits}f}"


# --- Memory -----------------------------------------------------------------------------------------------

# What trains: its name in a page, and in results/accelerators.json, gpus.json and layers.json.
HELD = (
    ("`optax.adam`", "optax.adam"),
    ("`optax.rmsprop`", "optax.rmsprop, plain"),
    ("`rmsprop(..., state_dtype=jnp.uint8)`", "ours, uint8 state, plain"),
    ("... bfloat16 parameters and `round_params_stochastically()`", "ours, three bytes"),
    ("... and `keep_rest=True`", "ours, four bytes"),
)


def peaks() -> list[Row]:
    rows, table = [*read("accelerators")["peaks"], *read("gpus")["peaks"]], []
    for label, name in HELD:
        tpu, gpu = (only(rows, chip=chip, training_step=name) for chip in ("v5e", "h100"))
        table.append(
            {
                "optimizer": label,
                "parameter and state": round(tpu["parameters and state"]),
                "peak, TPU v5e": tpu["peak"],
                "peak, H100": gpu["peak"],
            }
        )
    return table


def layers() -> list[Row]:
    """The step inside the backward pass, beside the ordinary one."""
    rows, table = [*read("layers")["layers"], *read("gpus")["layers"]], []
    for label, name in HELD:
        line: Row = {"optimizer": label}
        for title, chip in (("v5e", "v5e"), ("H100", "h100")):
            both = where(rows, chip=chip, training_step=name, devices=1)
            ordinary, inside = (only(both, gradients=x) for x in ("of all layers", "of a layer"))
            before = "does not fit" if ordinary["peak"] is None else f"{ordinary['peak']:.2f}"
            line["parameter and state"] = inside["parameters and state"]
            line[f"peak, {title}: ordinary → inside"] = f"{before} → {inside['peak']:.2f}"
        table.append(line)
    return table


# --- Speed ------------------------------------------------------------------------------------------------

TIMED = (
    ("`rmsprop`, float32", "ours float32"),
    ("`state_dtype=jnp.bfloat16`", "ours bfloat16"),
    ("`state_dtype=jnp.uint8`", "ours uint8"),
    ("three bytes", "ours three bytes"),
    ("four bytes", "ours four bytes"),
)


def times() -> list[Row]:
    rows, layouts = read("speed")["updates"], {"one matrix of 16 million": "16M", "GPT-2 small": "GPT-2 small"}
    return [
        {"update": label}
        | {title: f"{only(rows, layout=x, candidate=candidate)['ratio']:.2f}" for title, x in layouts.items()}
        for label, candidate in TIMED
    ]


# --- Programs for TPUs and GPUs ---------------------------------------------------------------------------

COMPILED = (
    ("`optax.rmsprop`", "optax.rmsprop, plain"),
    ("`rmsprop`, float32", "ours, float32 state, plain"),
    ("`state_dtype=jnp.uint8`", "ours, uint8 state, plain"),
    ("three bytes", "ours, three bytes"),
    ("four bytes", "ours, four bytes"),
    ("`optax.adam`", "optax.adam"),
    ("`optax.adafactor`", "optax.adafactor"),
)


def programs() -> list[Row]:
    """The lower bound of an update's time is that of the memory or of the arithmetic, whichever is longer."""
    rows, table = [*read("accelerators")["updates"], *read("gpus")["updates"]], []
    for label, name in COMPILED:
        tpu, gpu = (only(rows, chip=chip, layout="16M", update=name) for chip in ("v5e", "h100"))
        line: Row = {"update": label, "kernels": f"{tpu['kernels per leaf']:.0f}"}
        line["bytes moved per parameter"] = f"{tpu['bytes moved per parameter']:.0f}"
        for title, row in (("v5e", tpu), ("H100", gpu)):
            line[f"{title}, ms"] = f"{max(row['ms, memory'], row['ms, arithmetic'] or 0):.2f}"
        table.append(line)
    return table


# --- Training ---------------------------------------------------------------------------------------------

KEPT = (
    ("Adam", "Adam", "float32", "float32"),
    ("RMSProp, float32", "rmsprop", "float32", "float32"),
    ("... ν in one byte", "rmsprop", "float32", "uint8"),
    ("... bfloat16 parameters, rounded to nearest", "rmsprop", "bfloat16, to nearest", "uint8"),
    ("... bfloat16 parameters, rounded stochastically", "rmsprop", "bfloat16, stochastic", "uint8"),
    ("... bfloat16 parameters with a remainder", "rmsprop", "bfloat16, with a rest", "uint8"),
)
TASKS = (
    ("Fashion-MNIST, 2e-3", "Fashion-MNIST", 2e-3),
    ("Shakespeare, 1e-3", "Shakespeare", 1e-3),
    ("Shakespeare, 1e-4", "Shakespeare", 1e-4),
    ("Shakespeare's words, 1e-3", "Shakespeare's words", 1e-3),
)


def evidence() -> list[Row]:
    rows, table = read("evidence")["evidence"], []
    for label, optimizer, parameters, state in KEPT:
        mine = where(rows, optimizer=optimizer, parameters=parameters, state=state)
        line: Row = {"optimizer": label, "bytes": f"{mine[0]['bytes per parameter']:.0f}"}
        for title, problem, rate in TASKS:
            some = where(mine, problem=problem, learning_rate=rate)
            line[title] = "0" if label == "RMSProp, float32" else spread(gaps(rows, some), 3, "+")
        table.append(line)
    return table


def weights() -> list[Row]:
    rows, table = read("weights")["weights"], []
    for label, _, parameters, state in KEPT[2:]:
        mine = where(rows, parameters=parameters, state=state)
        line: Row = {"optimizer": label.removeprefix("... "), "bytes": f"{mine[0]['bytes per parameter']:.0f}"}
        for rate in (1e-3, 1e-4, 1e-5, 1e-6):
            line[f"{rate:g}"] = f"{np.mean([row['distance'] for row in where(mine, learning_rate=rate)]):.2f}"
        table.append(line)
    return table


def peers() -> list[Row]:
    lines: dict[str, Row] = {}
    for (problem, optimizer), best, fresh in tuned(read("peers")["peers"]):
        line = lines.setdefault(optimizer, {"optimizer": optimizer, "bytes": f"{fresh[0]['bytes per parameter']:.3g}"})
        line[f"{problem}, test loss"] = spread([row["loss"] for row in fresh], 3)
        line[f"{problem}, best learning rate"] = f"{best:g}"
    return sorted(lines.values(), key=lambda line: float(line["bytes"]))


def batches() -> list[Row]:
    lines: dict[str, Row] = {}
    for (problem, optimizer), _, fresh in tuned(read("batches")["batches"]):
        line = lines.setdefault(optimizer, {"optimizer": optimizer, "bytes": f"{fresh[0]['bytes per parameter']:.3g}"})
        line[f"batches of {problem.split()[0]}"] = spread([row["loss"] for row in fresh], 2)
    return list(lines.values())


# --- Agents -----------------------------------------------------------------------------------------------

DIALECTS = {
    "tensorflow1": "TensorFlow 1",
    "keras, optax": "Keras, Optax",
    "pytorch": "PyTorch",
    "pytorch, √ε": "PyTorch, with √ε",
}
NAMED = {"IMPALA's numbers, Breakout": "IMPALA's hyperparameters, Breakout"}
USUAL = 0.00063  # the rate of the grid that is nearest to A2C's 7e-4 and IMPALA's 6e-4


def agents() -> list[Row]:
    """At one learning rate for all, and each at its own best one. On Asterix no dialect learns."""
    rows, table = read("tuned")["tuned"], []
    for row in where(rows, seeds="fresh"):
        setting, dialect = row["setting"], row["dialect"]
        if "Asterix" in setting or "√ε" in dialect:
            continue
        found, digits = returns(rows, setting, dialect), decimals(setting)
        table.append(
            {
                "agent, game": NAMED.get(setting, setting),
                "dialect": DIALECTS[dialect],
                f"return at {USUAL:g}": f"{found[USUAL]:.{digits}f}",
                "best learning rate": f"{row['rate']:g}",
                "return at it": interval(ends_of(row), digits),
            }
        )
    return table


def narrow_agents() -> list[Row]:
    names = {"pytorch": ("float32", 8), "pytorch, uint8": ("ν in one byte", 5), "pytorch, 4 bytes": ("four bytes", 4)}
    names["pytorch, 3 bytes"] = ("three bytes", 3)
    return [
        {"optimizer": names[row["dialect"]][0], "bytes": names[row["dialect"]][1], "return": interval(ends_of(row), 0)}
        for row in read("agents")["reinforcement"]
    ]


# --- Pages ------------------------------------------------------------------------------------------------

RUN = "python tests/benchmarks/"
ACCELERATORS = f"{RUN}accelerators.py --json tests/benchmarks/results/"
# Each table with the results that it is made of, and the commands that make these.
TABLES: dict[str, tuple[Callable[[], list[Row]], dict[str, str]]] = {
    "peaks": (
        peaks,
        {
            "accelerators": f"{ACCELERATORS}accelerators.json --parts peaks",
            "gpus": f"{ACCELERATORS}gpus.json --chips h100 --parts peaks",
        },
    ),
    "layers": (
        layers,
        {
            "layers": f"{ACCELERATORS}layers.json --chips v5e --parts layers",
            "gpus": f"{ACCELERATORS}gpus.json --chips h100 --parts layers",
        },
    ),
    "times": (
        times,
        {
            "speed": f"{RUN}speed.py --parts updates --seconds 60 --layouts 16M 'GPT-2 small' "
            "--json tests/benchmarks/results/speed.json"
        },
    ),
    "programs": (
        programs,
        {
            "accelerators": f"{ACCELERATORS}accelerators.json --layouts 16M",
            "gpus": f"{ACCELERATORS}gpus.json --chips h100 --layouts 16M",
        },
    ),
    "evidence": (evidence, {"evidence": f"{RUN}training.py evidence --json tests/benchmarks/results/evidence.json"}),
    "weights": (weights, {"weights": f"{RUN}training.py weights --json tests/benchmarks/results/weights.json"}),
    "peers": (peers, {"peers": f"{RUN}training.py peers --json tests/benchmarks/results/peers.json"}),
    "batches": (batches, {"batches": f"{RUN}training.py batches --json tests/benchmarks/results/batches.json"}),
    "agents": (agents, {"tuned": f"{RUN}reinforcement.py tuned --json tests/benchmarks/results/tuned.json"}),
    "narrow agents": (
        narrow_agents,
        {
            "agents": f'{RUN}reinforcement.py dialects --only "A2C, CartPole" --dialects pytorch "pytorch, uint8" '
            '"pytorch, 4 bytes" "pytorch, 3 bytes" --json tests/benchmarks/results/agents.json'
        },
    ),
}


def table(name: str) -> str:
    make, sources = TABLES[name]
    machines = [(read(source)["machine"], command) for source, command in sources.items()]
    lines = [
        f"{machine}:\n\n    " + "\n    ".join(x for _, x in group)
        for machine, group in itertools.groupby(machines, lambda x: x[0])
    ]
    return "\n\n".join([markdown(make()), *lines])


def with_tables(text: str) -> str:
    """A page with its tables written anew."""

    def written(found: re.Match[str]) -> str:
        return f"<!-- table: {found[1]} -->\n{table(found[1])}\n<!-- end -->"

    return re.sub(r"<!-- table: (.*?) -->\n(?:.*?)<!-- end -->", written, text, flags=re.DOTALL)


def pages() -> list[pathlib.Path]:
    return [ROOT / "README.md", *sorted((ROOT / "notebooks").glob("*.md"))]


if __name__ == "__main__":
    for page in pages():
        page.write_text(with_tables(page.read_text()))
