"""python tests/benchmarks/figures.py: writes the pictures in notebooks/figures/, which nothing else does.

Some are drawn from results/*.json. The others are outputs of the notebooks: those of the cells with a tag "figure:NAME".
"""

import base64
import json
import pathlib
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from training import gaps


HERE = pathlib.Path(__file__).parent
NOTEBOOKS = HERE.parents[1] / "notebooks"
FIGURES = NOTEBOOKS / "figures"
BLUE, GREEN, RED, GRAY = "#0072B2", "#009E73", "#D55E00", "#888888"


def read(name: str) -> dict[str, Any]:
    return json.loads((HERE / "results" / f"{name}.json").read_text())


def save(figure: Any, name: str) -> None:
    """On white, so that it can also be read on a dark page."""
    figure.savefig(FIGURES / f"{name}.png", dpi=130, facecolor="white")
    plt.close(figure)


def from_notebooks() -> dict[str, bytes]:
    """The PNG files of the tagged cells, by name."""
    pictures = {}
    for notebook in sorted(NOTEBOOKS.glob("*.ipynb")):
        for cell in json.loads(notebook.read_text())["cells"]:
            names = [
                tag.removeprefix("figure:") for tag in cell["metadata"].get("tags", ()) if tag.startswith("figure:")
            ]
            for name in names:
                (png,) = (x["data"]["image/png"] for x in cell["outputs"] if "image/png" in x.get("data", ()))
                pictures[name] = base64.b64decode(png)
    return pictures


def three_bytes() -> None:
    """Loss curves of every seed where rounding to nearest stands still, and final losses over bytes."""
    rows = read("training")["evidence"]
    settings = [("Shakespeare", 1e-4), ("Shakespeare", 1e-3)]  # Fashion-MNIST shows no difference
    figure, axes = plt.subplots(1, 3, figsize=(10, 3.4))
    problem, rate = ("Shakespeare", 1e-4)
    for label, params, size, color in (
        ("float32, 8 bytes", "float32", 8, BLUE),
        ("bfloat16, to nearest, 3 bytes", "bfloat16, to nearest", 3, RED),
        ("bfloat16, stochastic, 3 bytes", "bfloat16, stochastic", 3, GREEN),
    ):
        for row in rows:
            same = (row["problem"], row["learning rate"], row["optimizer"], row["parameters"])
            if same == (problem, rate, "rmsprop", params) and round(row["bytes per parameter"]) == size:
                steps = (np.arange(len(row["curve"])) + 0.5) / len(row["curve"]) * 3000
                first = row["seed"] == 0
                axes[0].plot(steps, row["curve"], color=color, linewidth=1, label=label if first else None)
    axes[0].set(title=f"{problem}, rate {rate:g}", xlabel="step", ylabel="training loss")
    axes[0].legend(frameon=False, fontsize=8)
    for panel, (problem, rate) in zip(axes[1:], settings, strict=True):
        mine = [row for row in rows if (row["problem"], row["learning rate"]) == (problem, rate)]
        for label, color, shift, chosen in (
            ("Adam", GRAY, 0, lambda r: r["optimizer"] == "Adam"),
            ("float32", BLUE, 0, lambda r: (r["optimizer"], r["parameters"]) == ("rmsprop", "float32")),
            ("bfloat16, to nearest", RED, 0.15, lambda r: r["parameters"] == "bfloat16, to nearest"),
            ("bfloat16, stochastic", GREEN, -0.15, lambda r: r["parameters"] == "bfloat16, stochastic"),
        ):
            some = [row for row in mine if chosen(row)]
            size = np.array([row["bytes per parameter"] for row in some])
            panel.plot(size + shift, gaps(rows, some), "o", color=color, markersize=4, alpha=0.8, label=label)
        panel.axhline(0, color="black", linewidth=0.8)
        panel.set(title=f"{problem}, rate {rate:g}", xlabel="bytes for a parameter and its state")
        panel.set_xticks([3, 4, 5, 6, 8, 12])
        panel.grid(alpha=0.3)
    axes[1].set_ylabel("test loss minus float32's")
    axes[1].legend(frameon=False, fontsize=8)
    figure.tight_layout()
    save(figure, "three_bytes")


def speed() -> None:
    """Time of an update over Optax's in the same round: medians and quartiles."""
    rows = read("cpu")["updates"]
    names = {
        "ours float32, plain": ("ours, float32", BLUE),
        "ours bfloat16, plain": ("ours, bfloat16 state", "#E69F00"),
        "ours uint8, plain": ("ours, uint8 state", GREEN),
        "torch.compile, plain": ("torch.compile", GRAY),
        "torch foreach, plain": ("torch foreach", "#BBBBBB"),
    }
    layouts = list(dict.fromkeys(row["layout"] for row in rows))
    figure, panel = plt.subplots(figsize=(9, 3.4))
    for shift, (name, (label, color)) in zip(np.linspace(-0.28, 0.28, len(names)), names.items(), strict=True):
        mine = {row["layout"]: row for row in rows if row["candidate"] == name}
        x = np.array([i for i, layout in enumerate(layouts) if layout in mine])
        ratio = np.array([mine[layouts[i]]["ratio"] for i in x])
        low, high = np.array([mine[layouts[i]]["quartiles"] for i in x]).T
        error = np.maximum(0, [ratio - low, high - ratio])
        panel.errorbar(x + shift, ratio, error, fmt="o", color=color, markersize=5, capsize=2, label=label)
    panel.axhline(1, color="black", linewidth=0.8)
    panel.set_xticks(range(len(layouts)), layouts)
    panel.set(yscale="log", ylabel="time of an update / optax.rmsprop's")
    panel.set_yticks([0.5, 0.7, 1, 1.4, 2, 3, 4], ["0.5", "0.7", "1", "1.4", "2", "3", "4"])
    panel.minorticks_off()
    panel.grid(axis="y", alpha=0.3)
    panel.legend(frameon=False, fontsize=8, ncols=3)
    figure.tight_layout()
    save(figure, "speed")


if __name__ == "__main__":
    three_bytes()
    speed()
    for name, png in from_notebooks().items():
        (FIGURES / f"{name}.png").write_bytes(png)
