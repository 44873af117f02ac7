"""python -m rmsprop_jax: train a small network on real handwritten digits, and show it."""

import argparse
import functools
import pathlib
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from . import dialects, rmsprop


try:
    from flax import nnx
    from rich.console import Console
    from rich.measure import Measurement
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
    from rich.table import Table

    from ._digits import BATCH, batches, Digits, IMAGES, initial, load, TEST
except ImportError as error:
    sys.exit(f'python -m rmsprop_jax needs {str(error.name).partition(".")[0]}: pip install "rmsprop_jax[demo]"')


LEARNING_RATE = 3e-3


class Run(NamedTuple):
    """What a training run leaves behind."""

    params: Any
    losses: np.ndarray  # training loss of each step; shape=(steps,)
    test_loss: float
    test_accuracy: float
    seconds_per_step: float  # median, with the compilation left out
    state_bytes: int  # of the whole optimizer state


def train(
    tx: optax.GradientTransformation,
    epochs: int = 30,
    seed: int = 0,
    report: Callable[[int, float, float], None] = lambda step, loss, accuracy: None,
) -> Run:
    """Trains the network from the same start and on the same batches whatever `tx` is."""
    train_set, test_set = load(seed)
    graph, params = initial(seed)

    def loss_and_accuracy(params: Any, data: Digits) -> tuple[jax.Array, jax.Array]:
        logits = nnx.merge(graph, params)(data.images)
        loss = optax.softmax_cross_entropy_with_integer_labels(logits, data.labels).mean()
        return loss, (logits.argmax(-1) == data.labels).mean()

    # Donated: the new parameters and state are written where the old ones were.
    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params: Any, state: Any, index: jax.Array) -> tuple[Any, Any, jax.Array, jax.Array]:
        batch = Digits(train_set.images[index], train_set.labels[index])
        (loss, accuracy), grads = jax.value_and_grad(loss_and_accuracy, has_aux=True)(params, batch)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, loss, accuracy

    state = tx.init(params)
    losses, seconds = [], []
    for i, index in enumerate(batches(len(train_set.labels), epochs, seed)):
        start = time.perf_counter()
        params, state, loss, accuracy = step(params, state, jnp.asarray(index))
        losses.append(float(loss))
        seconds.append(time.perf_counter() - start)
        report(i + 1, losses[-1], float(accuracy))

    test_loss, test_accuracy = jax.jit(loss_and_accuracy)(params, test_set)
    return Run(
        params=params,
        losses=np.array(losses),
        test_loss=float(test_loss),
        test_accuracy=float(test_accuracy),
        seconds_per_step=float(np.median(seconds)),
        state_bytes=sum(x.nbytes for x in jax.tree.leaves(state)),
    )


def optimizers(steps: int) -> dict[str, optax.GradientTransformation]:
    """What the table compares, each behind the same clipping and the same shape of schedule."""

    def schedule(peak: float) -> optax.Schedule:
        return optax.warmup_cosine_decay_schedule(0.0, peak, steps // 20, steps)

    tails = {
        "SGD": optax.sgd(schedule(0.1), momentum=0.9),
        "Adam": optax.adam(schedule(LEARNING_RATE)),
        "optax.rmsprop": optax.rmsprop(schedule(LEARNING_RATE)),
        "rmsprop_jax": rmsprop(schedule(LEARNING_RATE)),
    }
    return {name: optax.chain(optax.clip_by_global_norm(1.0), tail) for name, tail in tails.items()}


def pyplot() -> Any:
    """matplotlib's pyplot, drawing to files."""
    try:
        import matplotlib
    except ImportError as error:
        sys.exit(f'--plot needs {error.name}: pip install "rmsprop_jax[demo]"')
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def plot(runs: dict[str, Run], file: str) -> None:
    """Draws the loss curves, averaged over 20 steps, into `file`."""
    plt = pyplot()
    colors = ["#0072B2", "#E69F00", "#CC79A7", "#000000"]  # Okabe and Ito: for every kind of eye
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    for (name, run), color in zip(runs.items(), colors, strict=True):
        smooth = np.convolve(run.losses, np.ones(20) / 20, mode="valid")
        # Ours lies on Optax's: dashes let both be seen.
        style = (0, (4, 3)) if name == "rmsprop_jax" else "-"
        axes.semilogy(np.arange(20, 20 + len(smooth)), smooth, label=name, color=color, linestyle=style)
    axes.set(xlabel="step (batches of 64 images)", ylabel="training loss (cross-entropy, nats)")
    axes.set_title("A small convnet on scikit-learn's digits", loc="left")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    figure.savefig(file, dpi=150)


def families() -> dict[str, dict[str, Any]]:
    """The dialects that share a program, with its options: the same numbers for all, momentum where they have it."""
    numbers = {"decay": 0.9, "eps": 1e-3}
    found: dict[tuple[Any, ...], list[str]] = {}
    for dialect, row in zip(dialects.DIALECTS, dialects.table(), strict=True):
        if dialect is dialects.dreamer:  # more than a call of `rmsprop`
            continue
        momentum = {"momentum": 0.9} if row["momentum"] else {}
        options = dialects.options(dialect, **momentum) | numbers | {"weight_decay": None, "decoupled": False}
        del options["learning_rate"]
        found.setdefault(tuple(options.items()), []).append(dialect.__name__)
    return {", ".join(names): dict(options) for options, names in found.items()}


def compare(epochs: int, seed: int, console: Console) -> None:
    """Prints the table of dialects, and how far apart they end."""
    show(console, "What the call of a dialect stands for", dialects.table())

    steps = number_of_steps(epochs)
    schedule = optax.warmup_cosine_decay_schedule(0.0, 5e-4, steps // 20, steps)
    start = np.concatenate([np.ravel(x) for x in jax.tree.leaves(initial(seed)[1])])

    def end(tx: optax.GradientTransformation) -> tuple[np.ndarray, str]:
        run = train(tx, epochs, seed)
        loss = f"{run.losses[-20:].mean():.4f}"
        return np.concatenate([np.ravel(x) for x in jax.tree.leaves(run.params)]), loss

    rows: list[dict[str, str]] = []
    references: dict[Any, np.ndarray] = {}
    for names, options in families().items():
        momentum = options["momentum"]
        if momentum not in references:
            references[momentum], loss = end(optax.rmsprop(schedule, eps=1e-3, momentum=momentum))
            rows.append(row_of("optax.rmsprop", momentum, "0", loss))
        theirs = references[momentum]
        ours, loss = end(rmsprop(schedule, **options))
        distance = np.linalg.norm(ours - theirs) / np.linalg.norm(theirs - start)
        rows.append(row_of(names, momentum, f"{distance:.2%}", loss))
    show(console, f"{steps} steps on the digits: decay 0.9, eps 1e-3, the same schedule and start", rows)
    console.print("Distances are relative to the distance that Optax's run travelled. The smallest are rounding alone.")


def row_of(names: str, momentum: Any, distance: str, loss: str) -> dict[str, str]:
    """A row of the second table."""
    return {"dialects": names, "momentum": f"{momentum}", "from optax.rmsprop": distance, "training loss": loss}


def show(console: Console, title: str, rows: Iterable[Mapping[str, str]]) -> None:
    """Prints a table, or a list where the terminal is too narrow for one."""
    rows = list(rows)
    table = Table(title=title)
    for i, column in enumerate(rows[0]):
        numbers = all(row[column][:1].isdigit() for row in rows)
        table.add_column(column, no_wrap=i == 0, justify="right" if numbers else "left")
    for row in rows:
        table.add_row(*row.values())
    if Measurement.get(console, console.options.update(width=1000), table).minimum <= console.width:
        return console.print(table)
    console.print(f"[bold]{title}[/bold]")
    for row in rows:
        name, *others = row.items()
        console.print(f"[bold]{name[1]}[/bold]")
        for column, text in others:
            if text:
                console.print(f"  {column}: {text}")


def number_of_steps(epochs: int) -> int:
    """Updates in so many passes over the training images."""
    return epochs * ((IMAGES - TEST) // BATCH)


def main(arguments: list[str] | None = None) -> None:
    """Parses the command line, trains with each optimizer, prints the table."""
    parser = argparse.ArgumentParser(
        prog="python -m rmsprop_jax",
        description=f"Train a small convnet on the {IMAGES:,} handwritten digits of scikit-learn with RMSProp, "
        "and beside it with SGD, Adam and optax.rmsprop: same data, same seeds.",
    )
    parser.add_argument("--epochs", type=int, default=30, help="passes over the training images (default: 30)")
    parser.add_argument("--seed", type=int, default=0, help="of weights, split and batches (default: 0)")
    parser.add_argument("--plot", metavar="FILE", help="draw the loss curves into FILE (.png, .svg, .pdf)")
    parser.add_argument("--dialects", action="store_true", help="compare the dialects instead")
    options = parser.parse_args(arguments)
    if options.epochs < 1:
        parser.error(f"--epochs={options.epochs}: allowed is 1 or more")
    if not 0 <= options.seed < 2**32:
        parser.error(f"--seed={options.seed}: allowed is 0 to {2**32 - 1}")
    if options.plot and options.dialects:
        parser.error("--plot draws the optimizers' curves, not the dialects': leave out one of the two")
    if options.plot:  # before the training, not after it
        check_plot(parser, pathlib.Path(options.plot))

    console = Console()
    if options.dialects:
        return compare(options.epochs, options.seed, console)
    steps = number_of_steps(options.epochs)
    columns = (
        TextColumn("{task.description:13}"),
        BarColumn(),
        TextColumn("{task.completed:4.0f}/{task.total:.0f}"),
        TextColumn("loss {task.fields[loss]:.4f}  accuracy {task.fields[accuracy]:4.0%}"),
        TimeRemainingColumn(),
    )
    runs = {}
    with Progress(*columns, console=console) as progress:
        for name, tx in optimizers(steps).items():
            task = progress.add_task(name, total=steps, loss=float("nan"), accuracy=0.0)

            def report(step: int, loss: float, accuracy: float, task: Any = task) -> None:
                progress.update(task, completed=step, loss=loss, accuracy=accuracy)

            runs[name] = train(tx, options.epochs, options.seed, report)

    rows = [
        {
            "optimizer": name,
            "test accuracy": f"{run.test_accuracy:.2%}",
            "test loss": f"{run.test_loss:.4f}",
            "ms per step": f"{1e3 * run.seconds_per_step:.2f}",
            "state, bytes": f"{run.state_bytes:,}",
        }
        for name, run in runs.items()
    ]
    show(console, f"{steps} steps on {IMAGES - TEST} digits, tested on {TEST}", rows)
    if options.plot:
        plot(runs, options.plot)
        console.print(f"The loss curves are in {options.plot}")


def check_plot(parser: argparse.ArgumentParser, file: pathlib.Path) -> None:
    """Fails where `plot` would fail at the end."""
    formats = sorted(pyplot().figure().canvas.get_supported_filetypes())
    if file.suffix.removeprefix(".").lower() not in formats:
        parser.error(f"--plot={file}: allowed are the endings {', '.join(formats)}")
    try:
        file.open("ab").close()
    except OSError as error:
        parser.error(f"--plot={file}: {error.strerror}")


if __name__ == "__main__":
    main()
