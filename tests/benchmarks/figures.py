"""python tests/benchmarks/figures.py: writes the pictures in notebooks/figures/, which nothing else does.

Some are drawn from results/*.json. The others are outputs of the notebooks: those of the cells with a tag "figure:NAME".
"""

import base64
import json
import pathlib
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pages
from reinforcement import bootstrap, ends_of, returns
from training import tuned


NOTEBOOKS = pathlib.Path(__file__).parents[2] / "notebooks"
FIGURES = NOTEBOOKS / "figures"
BLUE, GREEN, RED, ORANGE, GRAY = "#0072B2", "#009E73", "#D55E00", "#E69F00", "#888888"


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


def dialects_decide() -> None:
    """Learning curves at one learning rate: the mean of the seeds and its 95 % interval."""
    rows = pages.read("tuned")["tuned"]
    panels = (
        ("IMPALA's numbers, Breakout", "IMPALA's hyperparameters, MinAtar Breakout", 200),
        ("A2C, CartPole", "A2C's hyperparameters, CartPole", 500),
    )
    figure, axes = plt.subplots(1, 2, figsize=(10, 3.9))
    for panel, (setting, title, thousands) in zip(axes, panels, strict=True):
        for (dialect, label), color in zip(list(pages.DIALECTS.items())[:3], (RED, BLUE, GREEN), strict=True):
            (row,) = pages.where(rows, setting=setting, dialect=dialect, rate=pages.USUAL, seeds="grid")
            curves = np.array(row["curves"], float)
            frames = (np.arange(curves.shape[1]) + 1) * thousands / curves.shape[1]
            panel.plot(frames, np.nanmean(curves, 0), color=color, linewidth=2, label=label)
            low, high = np.array([bootstrap(x[~np.isnan(x)]) for x in curves.T]).T
            panel.fill_between(frames, low, high, color=color, alpha=0.2, linewidth=0)
        panel.set(title=title, xlabel="frames (thousands)", ylim=(0, None))
        panel.grid(alpha=0.3)
    axes[0].set_ylabel("return of an episode")
    handles, labels = axes[0].get_legend_handles_labels()
    labels = [f"{label}'s dialect" for label in labels]
    figure.legend(handles[::-1], labels[::-1], loc="lower center", ncols=3, frameon=False)
    figure.tight_layout(rect=(0, 0.08, 1, 1))
    save(figure, "dialects_decide")


KINDS = (
    ("float32 parameters, 8 bytes", "float32", "float32", BLUE),
    ("bfloat16, rounded to nearest, 3 bytes", "bfloat16, to nearest", "uint8", RED),
    ("bfloat16, rounded stochastically, 3 bytes", "bfloat16, stochastic", "uint8", GREEN),
    ("bfloat16 and a remainder, 4 bytes", "bfloat16, with a rest", "uint8", ORANGE),
)


def three_bytes() -> None:
    """Training losses on Shakespeare at two learning rates: mean and range of the seeds."""
    rows = pages.where(pages.read("evidence")["evidence"], problem="Shakespeare", optimizer="rmsprop")
    figure, axes = plt.subplots(1, 2, figsize=(10, 3.9))
    for panel, rate in zip(axes, (1e-4, 1e-3), strict=True):
        for label, params, state, color in KINDS:
            mine = pages.where(rows, learning_rate=rate, parameters=params, state=state)
            curves = np.array([row["curve"] for row in mine])
            steps = (np.arange(curves.shape[1]) + 0.5) / curves.shape[1] * 3000
            panel.plot(steps, curves.mean(0), color=color, linewidth=1.5, label=label)
            panel.fill_between(steps, curves.min(0), curves.max(0), color=color, alpha=0.2, linewidth=0)
        panel.set(title=f"learning rate {rate:g}", xlabel="step")
        panel.grid(alpha=0.3)
    axes[0].set_ylabel("training loss on Shakespeare")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="lower center", ncols=2, frameon=False, fontsize=9)
    figure.tight_layout(rect=(0, 0.14, 1, 1))
    save(figure, "three_bytes")


def apart(heights: list[float], gap: float) -> list[float]:
    """Heights of labels that do not overlap, near to those given, which are sorted."""
    for _ in range(100):
        for i in range(len(heights) - 1):
            missing = gap - (heights[i + 1] - heights[i])
            if missing > 0:
                heights[i], heights[i + 1] = heights[i] - missing / 2, heights[i + 1] + missing / 2
    return heights


OURS = {"with bias correction": GREEN, "without bias correction": BLUE}
LABELS = {"Adam, b1=0": "Adam without momentum", "schedule-free RMSProp": "schedule-free"}


def peers() -> None:
    """Test loss at the best learning rate over bytes: mean and range of the seeds that report."""
    rows = pages.read("peers")["peers"]
    figure, axes = plt.subplots(1, 2, figsize=(10, 4.4))
    for panel, problem in zip(axes, dict.fromkeys(row["problem"] for row in rows), strict=True):
        lines: dict[str, list[tuple[float, float]]] = {kind: [] for kind in OURS}
        others: dict[int, list[tuple[float, float, str]]] = {}
        for (_, optimizer), _, fresh in tuned(pages.where(rows, problem=problem)):
            size, losses = fresh[0]["bytes per parameter"], np.array([row["loss"] for row in fresh])
            kind = "with bias correction" if "bias correction" in optimizer else "without bias correction"
            mine = optimizer.startswith("RMSProp")
            color = OURS[kind] if mine else GRAY
            panel.plot([size, size], [losses.min(), losses.max()], color=color, linewidth=3, alpha=0.35)
            panel.plot(size, losses.mean(), "o", color=color, markersize=7 if mine else 5)
            if mine:
                lines[kind].append((size, losses.mean()))
            else:
                others.setdefault(round(size), []).append((losses.mean(), size, LABELS.get(optimizer, optimizer)))
        for kind, points in lines.items():
            panel.plot(*zip(*sorted(points), strict=True), color=OURS[kind], label=f"rmsprop_jax {kind}")
        low, high = panel.get_ylim()
        for found in others.values():
            found.sort()
            heights = apart([x[0] for x in found], (high - low) / 22)
            for (_, size, name), height in zip(found, heights, strict=True):
                panel.annotate(name, (size + 0.3, height), fontsize=8, color="#444444", va="center")
        panel.set(title=problem, xlabel="bytes for a parameter and its state", xlim=(2.4, 19))
        panel.set_xticks([3, 4, 5, 8, 12])
        panel.grid(alpha=0.3)
    axes[0].set_ylabel("test loss, each at its best learning rate")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="lower center", ncols=2, frameon=False)
    figure.tight_layout(rect=(0, 0.08, 1, 1))
    save(figure, "peers")


def memory() -> None:
    """The peak of a training step with 100 million parameters."""
    names = (
        "Adam",
        "optax.rmsprop",
        "rmsprop_jax, one byte of ν",
        "rmsprop_jax, four bytes",
        "rmsprop_jax, three bytes",
    )
    rows = pages.peaks()
    rows = [*rows[:3], rows[4], rows[3]]
    figure, panel = plt.subplots(figsize=(9, 3))
    for i, row in enumerate(rows):
        color, held, top = GREEN if i > 1 else GRAY, row["parameter and state"], row["peak, TPU v5e"]
        panel.barh(i, held, color=color)
        panel.barh(i, top - held, left=held, color=color, alpha=0.4)
        panel.annotate(f"{held} held, {top:.1f} at the peak", (top + 0.15, i), va="center", fontsize=9)
    panel.set_yticks(range(len(names)), names)
    panel.invert_yaxis()
    panel.set(xlabel="bytes per parameter, compiled for a TPU v5e", xlim=(0, 19))
    figure.tight_layout()
    save(figure, "memory")


def tuned_dialects() -> None:
    """Return over learning rate: the mean of the seeds that choose, and the interval of those that report."""
    rows = pages.read("tuned")["tuned"]
    names = [name for name in dict.fromkeys(row["setting"] for row in rows) if "Asterix" not in name]  # nobody learns
    figure, axes = plt.subplots(1, len(names), figsize=(2.9 * len(names), 3.5))
    for panel, name in zip(axes, names, strict=True):
        for (dialect, label), color in zip(pages.DIALECTS.items(), (RED, BLUE, GREEN, ORANGE), strict=True):
            curve = returns(rows, name, dialect)
            rates = sorted(curve)
            panel.plot(rates, [curve[rate] for rate in rates], ".-", color=color, linewidth=1, label=label)
            for row in pages.where(rows, setting=name, dialect=dialect, seeds="fresh"):
                end = ends_of(row)
                error = np.abs(np.array([bootstrap(end)]).T - end.mean())
                panel.errorbar(row["rate"], end.mean(), error, fmt="D", color=color, markersize=5, capsize=2)
        title = pages.NAMED.get(name, name)
        panel.set(title=title, xscale="log", xlabel="learning rate")
        panel.title.set_fontsize(9)
        panel.grid(alpha=0.3)
    axes[0].set_ylabel("return, last tenth of training")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="lower center", ncols=4, frameon=False)
    figure.tight_layout(rect=(0, 0.09, 1, 1))
    save(figure, "tuned")


def speed() -> None:
    """Time of an update over Optax's in the same round: medians and quartiles."""
    rows = pages.read("speed")["updates"]
    names = {name: label.replace("`", "").replace("jnp.", "") for label, name in pages.TIMED}
    layouts = {"16M": "one matrix of 16 million", "GPT-2 small": "GPT-2 small"}
    figure, panel = plt.subplots(figsize=(9, 3))
    for shift, (layout, title), color in zip((-0.17, 0.17), layouts.items(), (BLUE, GREEN), strict=True):
        mine = [pages.only(rows, layout=layout, candidate=name) for name in names]
        ratio = np.array([row["ratio"] for row in mine])
        low, high = np.array([row["quartiles"] for row in mine]).T
        error = np.maximum(0, [ratio - low, high - ratio])
        panel.barh(np.arange(len(mine)) + shift, ratio, 0.32, xerr=error, color=color, capsize=2, label=title)
    panel.axvline(1, color="black", linewidth=0.8)
    panel.set_yticks(range(len(names)), names.values())
    panel.invert_yaxis()
    panel.set(xlabel="time of an update on a CPU, over that of optax.rmsprop in float32")
    panel.legend(frameon=False, fontsize=9)
    figure.tight_layout()
    save(figure, "speed")


if __name__ == "__main__":
    for draw in (dialects_decide, three_bytes, peers, memory, tuned_dialects, speed):
        draw()
    for name, png in from_notebooks().items():
        (FIGURES / f"{name}.png").write_bytes(png)
