"""python tests/benchmarks/figures.py: writes the pictures in notebooks/figures/, which nothing else does.

Some are drawn from results/*.json. The others are outputs of the notebooks: those of the cells with a tag "figure:NAME".
"""

import base64
import json
import pathlib
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from reinforcement import bootstrap, ends_of, returns
from training import gaps, tuned


HERE = pathlib.Path(__file__).parent
NOTEBOOKS = HERE.parents[1] / "notebooks"
FIGURES = NOTEBOOKS / "figures"
BLUE, GREEN, RED, ORANGE, GRAY = "#0072B2", "#009E73", "#D55E00", "#E69F00", "#888888"


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


KINDS = (
    ("float32", "float32", BLUE),
    ("bfloat16, to nearest", "bfloat16, to nearest", RED),
    ("bfloat16, stochastic", "bfloat16, stochastic", GREEN),
    ("bfloat16, with a rest", "bfloat16, with a rest", ORANGE),
)


def three_bytes() -> None:
    """Loss curves of every seed where rounding to nearest stands still, and final losses over bytes."""
    rows = read("evidence")["evidence"]
    problem, rates = "Shakespeare", (1e-4, 1e-3)  # Fashion-MNIST shows no difference
    figure, axes = plt.subplots(1, 3, figsize=(10, 3.4))
    for (label, params, color), state, size in zip(KINDS, ("float32", *["uint8"] * 3), (8, 3, 3, 4), strict=True):
        for row in rows:
            same = (row["problem"], row["learning rate"], row["optimizer"], row["parameters"], row["state"])
            if same == (problem, rates[0], "rmsprop", params, state):
                steps = (np.arange(len(row["curve"])) + 0.5) / len(row["curve"]) * 3000
                first = row["seed"] == 0
                axes[0].plot(
                    steps, row["curve"], color=color, linewidth=1, label=f"{label}: {size} bytes" if first else None
                )
    axes[0].set(title=f"{problem}, rate {rates[0]:g}", xlabel="step", ylabel="training loss")
    axes[0].legend(frameon=False, fontsize=8)
    for panel, rate in zip(axes[1:], rates, strict=True):
        mine = [row for row in rows if (row["problem"], row["learning rate"]) == (problem, rate)]
        adam = [row for row in mine if row["optimizer"] == "Adam"]
        groups = [("Adam", GRAY, adam)]
        groups += [
            (label, color, [r for r in mine if (r["optimizer"], r["parameters"]) == ("rmsprop", params)])
            for label, params, color in KINDS
        ]
        for shift, (label, color, some) in zip((0, 0, 0.15, -0.15, 0), groups, strict=True):
            size = np.array([row["bytes per parameter"] for row in some])
            panel.plot(size + shift, gaps(rows, some), "o", color=color, markersize=4, alpha=0.8, label=label)
        panel.axhline(0, color="black", linewidth=0.8)
        panel.set(title=f"{problem}, rate {rate:g}", xlabel="bytes for a parameter and its state")
        panel.set_xticks([3, 4, 5, 6, 7, 8, 12])
        panel.grid(alpha=0.3)
    axes[1].set_ylabel("test loss minus float32's")
    axes[1].legend(frameon=False, fontsize=8)
    figure.tight_layout()
    save(figure, "three_bytes")


def peers() -> None:
    """Test loss at the best rate over bytes: every seed that reports, and the name of each optimizer that is not RMSProp."""
    rows = read("peers")["peers"]
    names = list(dict.fromkeys(row["problem"] for row in rows))
    figure, axes = plt.subplots(1, len(names), figsize=(10, 4.2))
    for panel, name in zip(axes, names, strict=True):
        for (_, optimizer), _, _, fresh in tuned([row for row in rows if row["problem"] == name]):
            size, losses = fresh[0]["bytes per parameter"], [row["loss"] for row in fresh]
            kind = (
                "RMSProp with bias correction" if "bias correction" in optimizer else "RMSProp without bias correction"
            )
            color = {"RMSProp with bias correction": GREEN, "RMSProp without bias correction": BLUE}[kind]
            if not optimizer.startswith("RMSProp"):
                kind, color = "", GRAY
                panel.annotate(optimizer, (size + 0.25, np.mean(losses)), fontsize=7, color="#555555", va="center")
            known = panel.get_legend_handles_labels()[1]
            panel.plot(
                [size] * len(losses),
                losses,
                "o",
                color=color,
                markersize=4,
                alpha=0.7,
                label=None if kind in known else kind,
            )
        panel.set(title=name, xlabel="bytes for a parameter and its state", xlim=(2.5, 16))
        panel.set_xticks([3, 4, 5, 8, 12])
        panel.grid(alpha=0.3)
    axes[0].set_ylabel("test loss, each at its best rate")
    axes[0].legend(frameon=False, fontsize=8, loc="upper right")
    figure.tight_layout()
    save(figure, "peers")


def tuned_dialects() -> None:
    """Return over rate: the mean of the seeds that choose, and the interval of those that report."""
    rows = read("tuned")["tuned"]
    names = list(dict.fromkeys(row["setting"] for row in rows))
    figure, axes = plt.subplots(1, len(names), figsize=(2.7 * len(names), 3.2))
    for panel, name in zip(axes, names, strict=True):
        found = dict.fromkeys(row["dialect"] for row in rows if row["setting"] == name)
        for dialect, color in zip(found, (RED, BLUE, GREEN, ORANGE), strict=True):
            curve = returns(rows, name, dialect)
            rates = sorted(curve)
            panel.plot(rates, [curve[rate] for rate in rates], ".-", color=color, linewidth=1, label=dialect)
            for row in rows:
                if (row["setting"], row["dialect"], row["seeds"]) == (name, dialect, "fresh"):
                    end = ends_of(row)
                    error = np.abs(np.array([bootstrap(end)]).T - end.mean())
                    panel.errorbar(row["rate"], end.mean(), error, fmt="D", color=color, markersize=5, capsize=2)
        panel.set(title=name, xscale="log", xlabel="learning rate")
        panel.title.set_fontsize(9)
        panel.grid(alpha=0.3)
    axes[0].set_ylabel("return, last tenth of training")
    axes[0].legend(frameon=False, fontsize=8)
    figure.tight_layout()
    save(figure, "tuned")


def speed() -> None:
    """Time of an update over Optax's in the same round: medians and quartiles."""
    rows = read("cpu")["updates"]
    names = {
        "ours float32, plain": ("ours, float32", BLUE),
        "ours bfloat16, plain": ("ours, bfloat16 state", ORANGE),
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
    peers()
    tuned_dialects()
    speed()
    for name, png in from_notebooks().items():
        (FIGURES / f"{name}.png").write_bytes(png)
