"""python -m rmsprop_jax: train a small network on real handwritten digits, and show it."""

import argparse
import functools
import io
import os
import pathlib
import shlex
import signal
import sys
import tempfile
import time
import unicodedata
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from . import dialects, metrics, rmsprop


def end_quietly(signum: int, frame: Any) -> None:
    """Ends the process at once: an exception is lost where it meets a callback of the garbage collector, as JAX has."""
    if sys.stderr is not None and sys.stderr.isatty():
        os.write(sys.stderr.fileno(), b"\n")
    os._exit(128 + signum)


if __name__ == "__main__":  # before the imports that take long
    signal.signal(signal.SIGINT, end_quietly)
    if hasattr(signal, "SIGPIPE"):  # who reads the output may stop, as `head -1` does
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)


try:
    from flax import nnx
    from rich.console import Console
    from rich.measure import Measurement
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
    from rich.table import Column, Table
    from rich.text import Text

    from ._digits import BATCH, batches, Digits, IMAGES, initial, load, TEST
except ImportError as error:
    sys.exit(f'python -m rmsprop_jax needs {str(error.name).partition(".")[0]}: pip install "rmsprop_jax[demo]"')


LEARNING_RATE = 3e-3
FORMATS = {"loss": ".4f", "accuracy": "4.0%", "grad_rms": ".1e"}  # of the numbers that a step returns
PICTURES = ("eps", "jpeg", "jpg", "pdf", "png", "ps", "svg", "svgz", "tif", "tiff", "webp")


class Run(NamedTuple):
    """What a training run leaves behind."""

    params: Any
    losses: np.ndarray  # training loss of each step; shape=(steps,)
    seconds: np.ndarray  # of each step, the first with the compilation; shape=(steps,)
    test_loss: float
    test_accuracy: float
    state_bytes: int  # of the whole optimizer state


class Training:
    """A network and its optimizer, trained one step at a time."""

    def __init__(self, tx: optax.GradientTransformation, graph: Any, params: Any, train_set: Digits) -> None:
        """Starts from a copy of `params`, because every step gives its own away."""
        self.params = jax.tree.map(jnp.copy, params)
        self.state = tx.init(self.params)
        self.losses: list[float] = []
        self.seconds: list[float] = []

        # Donated: the new parameters and state are written where the old ones were.
        @functools.partial(jax.jit, donate_argnums=(0, 1))
        def update(params: Any, state: Any, index: jax.Array) -> tuple[Any, Any, dict[str, jax.Array]]:
            batch = Digits(train_set.images[index], train_set.labels[index])
            grad_of = jax.value_and_grad(loss_and_accuracy, argnums=1, has_aux=True)
            (loss, accuracy), grads = grad_of(graph, params, batch)
            updates, state = tx.update(grads, state, params)
            return optax.apply_updates(params, updates), state, {"loss": loss, "accuracy": accuracy}

        self.update, self.watch = update, jax.jit(metrics if has_rmsprop(self.state) else lambda state: {})

    def step(self, index: jax.Array) -> dict[str, float]:
        """Trains on one batch. Returns the numbers to watch."""
        start = time.perf_counter()
        self.params, self.state, numbers = jax.block_until_ready(self.update(self.params, self.state, index))
        self.seconds.append(time.perf_counter() - start)
        self.losses.append(float(numbers["loss"]))
        numbers |= self.watch(self.state)  # not in the time of the step
        return {name: float(numbers[name]) for name in FORMATS if name in numbers}


def has_rmsprop(state: Any) -> bool:
    """Whether `metrics` can say something of this state: SGD and Adam keep no ν of RMSProp."""
    try:
        jax.eval_shape(metrics, state)
    except ValueError:
        return False
    return True


def loss_and_accuracy(graph: Any, params: Any, data: Digits) -> tuple[jax.Array, jax.Array]:
    """The mean cross-entropy in nats, and the share of digits that are read right."""
    logits = nnx.merge(graph, params)(data.images)
    loss = optax.softmax_cross_entropy_with_integer_labels(logits, data.labels).mean()
    return loss, (logits.argmax(-1) == data.labels).mean()


def train(
    optimizers: Mapping[str, optax.GradientTransformation],
    epochs: int = 30,
    seed: int = 0,
    report: Callable[[str, Mapping[str, float]], None] = lambda name, numbers: None,
) -> dict[str, Run]:
    """Trains the network with each optimizer, from the same start and on the same batches.

    They take turns: one step of each on every batch, in a new order each time. A moment in which the machine is slow
    then slows all of them.
    """
    train_set, test_set = load(seed)
    graph, params = initial(seed)
    trainings = {name: Training(tx, graph, params, train_set) for name, tx in optimizers.items()}
    rng = np.random.default_rng(seed)
    for batch in batches(len(train_set.labels), epochs, seed):
        index = jnp.asarray(batch)
        for name in rng.permutation(list(trainings)):
            report(str(name), trainings[name].step(index))

    test = jax.jit(functools.partial(loss_and_accuracy, graph))
    runs = {}
    for name, training in trainings.items():
        loss, accuracy = test(training.params, test_set)
        runs[name] = Run(
            params=training.params,
            losses=np.array(training.losses),
            seconds=np.array(training.seconds),
            test_loss=float(loss),
            test_accuracy=float(accuracy),
            state_bytes=sum(x.nbytes for x in jax.tree.leaves(training.state)),
        )
    return runs


def noise(runs: Iterable[Run]) -> float:
    """How much longer a run's steps take in one quarter than in another, beside the mean of all runs: 0.1 is 10 %."""
    quarters = [np.array_split(run.seconds[1:], 4) for run in runs]
    medians = np.array([[np.median(quarter) for quarter in run] for run in quarters])
    shares = medians / medians.mean(0)  # what slows all runs alike is no difference between them
    return float((shares.max(1) / shares.min(1)).max() - 1)


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


def number_of_steps(epochs: int) -> int:
    """Updates in so many passes over the training images."""
    return epochs * ((IMAGES - TEST) // BATCH)


class Terminal(Console):
    """A console for any encoding, which leaves the cursor as it is: a process can be killed at any time."""

    def show_cursor(self, show: bool = True) -> bool:
        """Does nothing."""
        return False

    def render_str(self, text: str, **options: Any) -> Text:
        """Greek letters by their names where the encoding has none, and other characters as Python writes them."""
        return super().render_str("".join(map(self.spell, text)), **options)

    def spell(self, character: str) -> str:
        """One character, or what stands for it in this encoding."""
        try:
            character.encode(self.encoding)
        except UnicodeEncodeError:
            kind, _, name = unicodedata.name(character, "").partition(" LETTER ")
            return name.lower() if kind.startswith("GREEK") else ascii(character)[1:-1]
        return character


class Watch(Progress):
    """A bar for all runs together, and below it a line for each with the numbers of its last step."""

    def __init__(self, names: Iterable[str], steps: int) -> None:
        """On stderr, so that the tables alone are in a file or a pipe."""
        self.numbers: dict[str, Mapping[str, float]] = {name: {} for name in names}
        steps_done = "{task.completed:.0f} of {task.total} steps"
        columns = (
            BarColumn(),
            TextColumn(steps_done, table_column=Column(no_wrap=True, overflow="crop")),
            TimeRemainingColumn(table_column=Column(no_wrap=True, overflow="crop")),
        )
        super().__init__(*columns, console=Terminal(stderr=True))
        self.bar = self.add_task("", total=steps)
        if not self.console.is_interactive:  # the bar comes at the end there
            self.console.print(f"Training {len(self.numbers)} networks for {steps} steps each ...")

    def report(self, name: str, numbers: Mapping[str, float]) -> None:
        """Takes the numbers of one step of one run."""
        self.numbers[name] = numbers
        self.advance(self.bar, 1 / len(self.numbers))

    def get_renderables(self) -> Iterable[Table]:
        """What is on the screen, drawn ten times a second."""
        yield self.make_tasks_table(self.tasks)
        lines = Table.grid(*(Column(overflow="fold") for _ in ("name", *FORMATS)), padding=(0, 1))
        for name, numbers in self.numbers.items():
            lines.add_row(name, *(f"{key} {numbers[key]:{form}}" for key, form in FORMATS.items() if key in numbers))
        yield lines


def watched(optimizers: Mapping[str, optax.GradientTransformation], epochs: int, seed: int) -> dict[str, Run]:
    """Trains with each optimizer, and shows how far it is."""
    with Watch(optimizers, number_of_steps(epochs)) as watch:
        return train(optimizers, epochs, seed, watch.report)


def show(console: Console, title: str, rows: Sequence[Mapping[str, str]]) -> None:
    """Prints a table, in several parts where the terminal is too narrow for one, and else as a list."""
    parts = fitting(console, rows)
    if not parts:
        return show_list(console, title, rows)
    for i, columns in enumerate(parts):
        console.print(table_of(rows, columns, title if i == 0 else None))


def table_of(rows: Sequence[Mapping[str, str]], columns: Iterable[str], title: str | None = None) -> Table:
    """Some columns of the rows. The first is never wrapped; numbers are on the right."""
    table = Table(title=title)
    for i, column in enumerate(columns):
        numbers = all(row[column][:1].isdigit() for row in rows)
        # Rich takes the longest word for the smallest width, also of a column that it must not wrap.
        longest = max(len(text) for text in (column, *(row[column] for row in rows))) if i == 0 else None
        table.add_column(column, no_wrap=i == 0, min_width=longest, justify="right" if numbers else "left")
    for row in rows:
        table.add_row(*(row[column] for column in columns))
    return table


def fitting(console: Console, rows: Sequence[Mapping[str, str]]) -> list[list[str]]:
    """The columns of as few tables as the width allows, each with the first column. None where that is too wide."""

    def fits(columns: list[str]) -> bool:
        wide = console.options.update(width=1000)
        return Measurement.get(console, wide, table_of(rows, columns)).minimum <= console.width

    first, *others = rows[0]
    parts = [[first]]
    for column in others:
        if not fits([first, column]):
            return []
        if fits([*parts[-1], column]):
            parts[-1].append(column)
        else:
            parts.append([first, column])
    return parts


def show_list(console: Console, title: str, rows: Sequence[Mapping[str, str]]) -> None:
    """Prints every cell of every row on a line of its own."""
    console.print(f"[bold]{title}[/bold]")
    for row in rows:
        name, *others = row.items()
        console.print(f"[bold]{name[1]}[/bold]")
        for column, text in others:
            if text:
                console.print(f"  {column}: {text}")


def empty_figure() -> Any:
    """A figure of matplotlib, which needs no display."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        sys.exit(f'--plot needs {str(error.name).partition(".")[0]}: pip install "rmsprop_jax[demo]"')
    return Figure(figsize=(7, 4), layout="constrained")


def plot(runs: Mapping[str, Run], file: pathlib.Path) -> None:
    """Draws the loss curves, averaged over 20 steps, into `file`."""
    figure = empty_figure()
    axes = figure.subplots()
    colors = ["#0072B2", "#E69F00", "#CC79A7", "#000000"]  # Okabe and Ito: for every kind of eye
    for (name, run), color in zip(runs.items(), colors, strict=True):
        smooth = np.convolve(run.losses, np.ones(20) / 20, mode="valid")
        # Ours lies on Optax's: dashes let both be seen.
        style = (0, (4, 3)) if name == "rmsprop_jax" else "-"
        axes.semilogy(np.arange(20, 20 + len(smooth)), smooth, label=name, color=color, linestyle=style)
    axes.set(xlabel="step (batches of 64 images)", ylabel="training loss (cross-entropy, nats)")
    axes.set_title("A small convnet on scikit-learn's digits", loc="left")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    picture = io.BytesIO()  # a file only once all is drawn
    figure.savefig(picture, dpi=150, format=file.suffix[1:].lower())
    file.write_bytes(picture.getvalue())


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


def compare_dialects(console: Console, epochs: int, seed: int) -> None:
    """Prints the table of dialects, and how far apart they end."""
    show(console, "What the call of a dialect stands for", dialects.table())

    steps = number_of_steps(epochs)
    schedule = optax.warmup_cosine_decay_schedule(0.0, 5e-4, steps // 20, steps)
    optax_names = {None: "optax.rmsprop", 0.9: "optax.rmsprop, momentum"}
    momenta = {name: momentum for momentum, name in optax_names.items()}
    candidates = {name: optax.rmsprop(schedule, eps=1e-3, momentum=m) for name, m in momenta.items()}
    for names, options in families().items():
        momenta[names] = options["momentum"]
        candidates[names] = rmsprop(schedule, **options)
    runs = watched(candidates, epochs, seed)

    start, ends = flat(initial(seed)[1]), {names: flat(run.params) for names, run in runs.items()}
    rows = []
    for names in sorted(runs, key=lambda names: momenta[names] or 0):
        theirs = ends[optax_names[momenta[names]]]
        distance = np.linalg.norm(ends[names] - theirs) / np.linalg.norm(theirs - start)
        rows.append(
            {
                "dialects": names,
                "momentum": str(momenta[names] or "none"),
                "from optax.rmsprop": f"{distance:.2%}",
                "training loss": f"{runs[names].losses[-20:].mean():.4f}",
            }
        )
    show(console, f"{steps} steps on the digits: decay 0.9, eps 1e-3, the same schedule and start", rows)
    console.print("Distances are relative to the distance that Optax's run travelled. The smallest are rounding alone.")


def flat(params: Any) -> np.ndarray:
    """All parameters in one vector."""
    return np.concatenate([np.ravel(x) for x in jax.tree.leaves(params)])


def compare_optimizers(console: Console, epochs: int, seed: int) -> dict[str, Run]:
    """Trains with each optimizer, and prints the table."""
    steps = number_of_steps(epochs)
    runs = watched(optimizers(steps), epochs, seed)
    rows = [
        {
            "optimizer": name,
            "test accuracy": f"{run.test_accuracy:.2%}",
            "test loss": f"{run.test_loss:.4f}",
            "ms per step": f"{1e3 * np.median(run.seconds):.2f}",
            "state, bytes": f"{run.state_bytes:,}",
        }
        for name, run in runs.items()
    ]
    show(console, f"{steps} steps on {IMAGES - TEST} digits, tested on {TEST}", rows)
    console.print(
        "The time of a step is the median. The optimizers take turns at every batch, in a new order each time. "
        f"Compared with the mean of all rows, one of them was up to {noise(runs.values()):.0%} slower in one quarter "
        "of this run than in another: smaller differences between rows are noise."
    )
    return runs


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The options, checked."""
    parser = argparse.ArgumentParser(
        prog="python -m rmsprop_jax",
        description=f"Train a small convnet on the {IMAGES:,} handwritten digits of scikit-learn with rmsprop_jax, "
        "optax.rmsprop, Adam and SGD, from the same start and on the same batches, "
        "and compare accuracy, time and memory.",
    )
    add = parser.add_argument
    add("--epochs", metavar="N", type=int, default=30, help="passes over the training images (default: 30)")
    add("--seed", metavar="N", type=int, default=0, help="seed of weights, test set and batches (default: 0)")
    add("--plot", metavar="FILE", help="draw the loss curves into FILE (.png, .svg, .pdf, ...)")
    add("--dialects", action="store_true", help="compare the dialects of RMSProp instead")
    options = parser.parse_args(arguments)
    if not 1 <= options.epochs <= 10**6:
        parser.error(f"--epochs={options.epochs}: allowed is 1 to {10**6}")
    if not 0 <= options.seed < 2**32:
        parser.error(f"--seed={options.seed}: allowed is 0 to {2**32 - 1}")
    if options.plot is None:
        return options
    if options.dialects:
        parser.error("--plot draws the optimizers' curves, not the dialects': leave out one of the two")
    check_plot(parser, options.plot)
    return options


def check_plot(parser: argparse.ArgumentParser, name: str) -> None:
    """Refuses before the training what `plot` could not write after it."""
    empty_figure()
    file = pathlib.Path(name)
    if file.suffix[1:].lower() not in PICTURES:
        parser.error(f"--plot={shlex.quote(name)}: allowed is a file name that ends in .{', .'.join(PICTURES)}")
    try:
        probe(file)
    except OSError as error:
        parser.error(f"--plot={shlex.quote(name)}: {error.strerror}; allowed is a file that can be written")


def probe(file: pathlib.Path) -> None:
    """Opens the file, or one that has no name in the same folder: nothing is written, and nothing is left behind."""
    try:
        file.open("r+b").close()
    except FileNotFoundError:
        tempfile.TemporaryFile(dir=file.resolve().parent).close()


def main(arguments: Sequence[str] | None = None) -> None:
    """Parses the command line, trains, and prints the results."""
    options = parse(arguments)
    console = Terminal()
    if options.dialects:
        return compare_dialects(console, options.epochs, options.seed)
    runs = compare_optimizers(console, options.epochs, options.seed)
    if options.plot is None:
        return None
    try:
        plot(runs, pathlib.Path(options.plot))
    except OSError as error:
        sys.exit(f"--plot={shlex.quote(options.plot)}: {error.strerror}")
    console.print(f"The loss curves are in {options.plot}", markup=False, highlight=False, soft_wrap=True)


if __name__ == "__main__":
    main()
