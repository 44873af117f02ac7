"""Keras 3 and tf.keras of every age: a list of variables."""

import re
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np

from .. import _checks
from .._rmsprop import RMSPropState
from .._text import listed, repeated
from ._arrays import pairs, whole
from ._named import arrays_of, Convert, ConvertBack, Entry, Optimizer, state_of


__all__ = ["from_keras", "state_of_variables", "to_keras"]


def from_keras(
    checkpoint: Any,
    convert: Convert | None = None,
    *,
    count: int | None = None,
    gradient_accumulation_steps: int | None = None,
) -> RMSPropState:
    """The state of `dialects.keras` from the variables of a Keras optimizer, in any order.

    The variables of the loss scaler that `mixed_float16` puts around it, and the averaged weights of `use_ema`,
    are passed over: the update does not depend on them. The generations have different names:

    ======================  ================================================================
    Keras 3                 `rmsprop/d_kernel_velocity`, and `rmsprop/iteration`
    tf.keras 2.11 to 2.15   `RMSprop/velocity/d/kernel:0`, and `iteration:0`
    tf.keras before, and    `RMSprop/d/kernel/rms:0`, and `RMSprop/iter:0`; the state is that
    its `legacy` class      of `dialects.tf_keras`
    Keras 2.3 and before    numbers: `accumulator_0`, and `RMSprop/iterations:0`; the state is
                            that of `dialects.tf_keras`
    ======================  ================================================================

    HDF5 files of saved models (`model.h5`) have these names. The files in a `.keras` archive, and `.weights.h5`, have
    numbers, in the order of the model's weights, and so has the list that `optimizer.get_weights()` returns. Where
    Keras is not at hand to load them, give them names::

        with zipfile.ZipFile("model.keras") as archive, h5py.File(io.BytesIO(archive.read("model.weights.h5"))) as file:
            group = file["optimizer/vars"]
            values = [group[str(i)][()] for i in range(len(group))]
        slots = ["velocity", "momentum"]  # then "average_gradient"; those that the optimizer has
        names = ["iteration", "learning_rate"]  # before Keras 3 without "learning_rate"
        names += [f"{weight}_{slot}" for slot in slots for weight in weights]
        state = interop.from_keras(zip(names, values, strict=True), convert)

    Args:
        checkpoint: `[(v.path, v.numpy()) for v in optimizer.variables]`. Of tf.keras:
            `[(v.name, v.numpy()) for v in optimizer.variables()]`. Or nested mappings, such as
            `h5py.File("model.h5")`.
        convert: from arrays by name to a tree of parameters. Keras 3 names an accumulator by the path of its
            weight, with "_" for "/": `sequential/d1/kernel` is `sequential_d1_kernel` here.
        count: of updates. `None` stands for the optimizer's iteration.
        gradient_accumulation_steps: the optimizer's own. Needed where it has accumulators.

    Example:
        >>> variables = [("rmsprop/iteration", 7), ("rmsprop/d1_kernel_velocity", np.ones(2))]
        >>> int(from_keras(variables, lambda arrays: {"kernel": arrays["d1_kernel"]}).count)
        7

    References:
        keras/src/optimizers/rmsprop.py and base_optimizer.py, 3.15.1.
    """
    named = list(pairs(checkpoint))
    saved = [(path, x) for path, x in named if path.startswith(HDF5)]  # of a whole file, which has the weights
    variables = [(path.removeprefix(HDF5).removesuffix(":0"), x) for path, x in saved or named]
    return state_of_variables(variables, convert, count, gradient_accumulation_steps)


def to_keras(state: Any, convert_back: ConvertBack) -> list[tuple[str, np.ndarray]]:
    """Names and values for the variables of a Keras 3 optimizer.

    Example::

        values = dict(interop.to_keras(state, back))
        for variable in optimizer.variables:  # after optimizer.build(model.trainable_variables)
            if variable.name != "learning_rate":
                variable.assign(values[variable.name])

    Args:
        state: of `dialects.keras`. With `gradient_accumulation_steps=k` Keras counts gradients: multiply the
            iteration by k.
        convert_back: from a tree of parameters to arrays by name, as in :func:`from_keras`.
    """
    count, slots = arrays_of(state, convert_back)
    named = [(f"{name}_{SLOTS[slot]}", x) for slot, arrays in slots.items() for name, x in arrays.items()]
    return [("iteration", count), *named]


# --- The generations --------------------------------------------------------------------------------------


class Generation(NamedTuple):
    """How an age of Keras names its accumulators."""

    pattern: str  # of paths, with the groups `scope`, `slot` and `weight`
    slots: dict[str, str]  # its names of our slots


SLOTS = {"nu": "velocity", "mu": "average_gradient", "trace": "momentum"}
KERAS_3 = Generation(r"(?:(?P<scope>.*)/)?(?P<weight>[^/]+)_(?P<slot>velocity|average_gradient|momentum)", SLOTS)
TF_KERAS = Generation(r"(?:(?P<scope>.*?)/)?(?P<slot>velocity|average_gradient|momentum)/(?P<weight>.+)", SLOTS)
LEGACY = Generation(
    r"(?P<scope>{})/(?P<weight>.+)/(?P<slot>rms|mg|momentum)", {"nu": "rms", "mu": "mg", "trace": "momentum"}
)

ITERATION = r"(.*/)?(iteration|iterations|iter)"
# Variables on which RMSProp's update does not depend: the rate, loss scalers, averaged weights, and (dealt with apart)
# accumulated gradients.
PASSED_OVER = (
    r"(.*/)?(learning_rate|step_counter|dynamic_scale|current_loss_scale|good_steps)"
    r"|.*_(average|gradient_accumulator)|([^/]*/)?average/.*"
)
HDF5 = "optimizer_weights/"
# Numbers: in `.keras` and `.weights.h5` files, and in Keras up to 2.3.
NAMELESS = r"(.*/)?(\d+|accumulator_\d+(_\d+)?|Variable(_\d+)?)"
FOLDERS = ("", "optimizer", "inner_optimizer", "vars", "rmsprop")  # where they lie; Adagrad has accumulators as well

OTHERS = ("adam", "adamw", "nadam", "adamax", "sgd", "adagrad", "adadelta", "ftrl", "lion", "lamb", "muon")


def state_of_variables(
    variables: list[tuple[str, Any]], convert: Convert | None, count: int | None, steps: int | None
) -> RMSPropState:
    """The state from all variables of an optimizer by their paths, without what files and TensorFlow add to them."""
    found = dict(variables)
    generation, matches = _accumulators(found)
    others = {path: x for path, x in found.items() if path not in matches}
    # A loss scaler puts its own name in front of the optimizer's.
    scopes = dict.fromkeys(_last(match["scope"] or "") for match in matches.values())
    folders = [path.partition("/")[0] for path in found if "/" in path and not path.startswith("loss_scale")]
    name = re.sub(r"_\d+$", "", next(iter([*scopes, *folders]), "")).lower()
    _check_is_rmsprop(generation, matches, others, name)
    if twice := repeated(path for path, _ in variables):
        raise ValueError(f"the checkpoint has {listed(twice)} twice: pass each variable once")
    entries = [Entry(match["slot"], match["weight"], found[path], path) for path, match in matches.items()]
    optimizer = Optimizer("Keras' RMSprop", generation.slots)
    return state_of(optimizer, entries, convert, count, _updates(others, scopes, steps, count))


def _accumulators(paths: Iterable[str]) -> tuple[Generation, dict[str, re.Match[str]]]:
    """The paths of accumulators, in the generation that knows most of them."""
    scopes = [path.removesuffix("/iter") for path in paths if path.endswith("/iter")]  # only LEGACY has it
    legacy = LEGACY._replace(pattern=LEGACY.pattern.format("|".join([*map(re.escape, scopes), "[^/]+"])))
    found = []
    for generation in (legacy, TF_KERAS, KERAS_3) if scopes else (TF_KERAS, KERAS_3, legacy):
        matches = {path: match for path in paths if (match := re.fullmatch(generation.pattern, path))}
        has_nu = any(match["slot"] == generation.slots["nu"] for match in matches.values())
        found.append((has_nu, len(matches), generation, matches))
    # A path may fit two: names of weights and layers may be those of slots.
    return max(found, key=lambda item: item[:2])[2:]


def _check_is_rmsprop(
    generation: Generation, matches: Mapping[str, re.Match[str]], others: Iterable[str], name: str
) -> None:
    """Raises if the variables are another optimizer's, or have no names."""
    unknown = [path for path in others if not re.fullmatch(f"{ITERATION}|{PASSED_OVER}", path)]
    if unknown and all(re.fullmatch(NAMELESS, path) for path in unknown) and name in FOLDERS:
        raise ValueError(
            f"the variables have numbers instead of names: {listed(unknown)}. Pass the optimizer.variables of a model "
            "that keras.saving.load_model made or model.load_weights filled, or name them as the documentation shows"
        )
    slots = [match["slot"] for match in matches.values()]
    if unknown and generation.slots["nu"] in slots and name not in OTHERS:
        raise ValueError(f"not Keras' RMSprop alone: {listed(unknown)}. Pass optimizer.variables, without the model's")
    refused = f"not the variables of Keras' RMSprop, but of {name or 'an optimizer without a name'}: "
    if unknown or generation.slots["nu"] not in slots or name in OTHERS:
        raise ValueError(refused + listed(unknown or [*others, *matches]))
    # Keras 3's Adam has a velocity and a momentum as well. By itself it makes the momentum first.
    like_adam = generation is KERAS_3 and slots[0] == "momentum" and "average_gradient" not in slots
    if like_adam and "rms" not in name.replace("_", ""):
        raise ValueError(
            f"{refused}in this order they are Adam's, {listed(matches)}. If they are RMSprop's in alphabetical order, "
            f"put them in a scope called rmsprop: rmsprop/{_last(next(iter(matches)))}"
        )


def _updates(others: Mapping[str, Any], scopes: Iterable[str], steps: int | None, count: int | None) -> dict[str, int]:
    """The iterations or, as a loss scaler has one as well, those beside the accumulators, in updates."""
    k = 1 if _checks.off(steps) is None else _checks.count("gradient_accumulation_steps", steps, lower=2)
    accumulators = [path for path in others if path.endswith("_gradient_accumulator")]
    if bool(accumulators) != (k > 1):
        optimizer = f"the optimizer has {len(accumulators)} gradient accumulators"
        raise ValueError(f"gradient_accumulation_steps={steps}, but {optimizer}: pass the optimizer's own number")
    if count is not None and k == 1:
        return {}
    found = {path: whole(path, x) for path, x in others.items() if re.fullmatch(ITERATION, path)}
    beside = {path: x for path, x in found.items() if _last(path.rpartition("/")[0]) in scopes} or found
    if rest := max((x % k for x in beside.values()), default=0):
        raise ValueError(f"{rest} of {k} gradients are accumulated: save after an update")
    return {path: x // k for path, x in beside.items()}


def _last(path: str) -> str:
    return path.rpartition("/")[2]
