"""TensorFlow 2's object checkpoints, where an array has the path through Python objects that leads to it."""

import io
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np

from .._rmsprop import RMSPropState
from .._text import listed
from ._arrays import mapping
from ._keras import state_of_variables
from ._named import Convert, Entry, Optimizer, somebody_else, state_of


__all__ = ["from_tensorflow2"]

VALUE = "/.ATTRIBUTES/VARIABLE_VALUE"
GRAPH = "_CHECKPOINTABLE_OBJECT_GRAPH"

OTHERS = {
    "m": "Adam or a variant of it",
    "momentum": "SGD with momentum",
    "accumulated_momentum": "SGD with momentum",
    "linear": "FTRL",
    "accumulator": "Adagrad",
    "accum_grad": "Adadelta",
}
BESIDE = {"nu": "rms", "mu": "mg", "trace": "momentum"}
KERAS = Optimizer("RMSProp", BESIDE, others=OTHERS)
TENSORFLOW1 = Optimizer("RMSProp", BESIDE, ("nu", "trace"), OTHERS)
SONNET = Optimizer("RMSProp", {"nu": "ms", "mu": "mg", "trace": "mom"}, ("nu", "trace"), OTHERS)

# A slot beside its weight: tf.keras before 2.11, its `legacy` classes, and TensorFlow 1's classes.
_BESIDE = re.compile(r"(?P<weight>.+)/\.OPTIMIZER_SLOT/(?P<optimizer>.+)/(?P<slot>[^/]+)")
# Slots by number: Keras since 2.11, and Sonnet.
_KERAS = re.compile(r"(?P<optimizer>.+)/_variables/\d+")
_SONNET = re.compile(r"(?P<optimizer>.+)/(?P<slot>ms|mg|mom)/\d+")


def from_tensorflow2(
    checkpoint: Mapping[str, Any],
    convert: Convert | None = None,
    *,
    count: int | None = None,
    name: str | None = None,
    gradient_accumulation_steps: int | None = None,
) -> RMSPropState:
    """The state of an optimizer in an object checkpoint, as `tf.train.Checkpoint` and `model.save_weights` make them.

    A SavedModel has such a checkpoint in `variables/variables`::

        reader = tf.train.load_checkpoint(directory)
        checkpoint = {key: reader.get_tensor(key) for key in reader.get_variable_to_shape_map()}

    ====================================  ========================  ==========================================
    The optimizer                         The state is that of      `convert` gets a weight by
    ====================================  ========================  ==========================================
    tf.keras before 2.11, and `legacy`    `dialects.tf_keras`       its path, `model/layer_with_weights-0/kernel`
    tf.keras 2.11 to 2.15                 `dialects.keras`          its name, `conv/kernel`
    Keras 3                               `dialects.keras`          its name with "_" for "/", `conv_kernel`
    Sonnet 2                              `dialects.sonnet`         its name, `net/conv/w`
    `tf.compat.v1`                        `dialects.tensorflow1`    its path
    ====================================  ========================  ==========================================

    Args:
        checkpoint: arrays by key. Where the checkpoint numbers the arrays, their names are in its
            `_CHECKPOINTABLE_OBJECT_GRAPH`, which has to be there.
        convert: from arrays by name to a tree of parameters.
        count: of updates. `None` stands for the optimizer's own. Those of Sonnet and of `tf.compat.v1` do not count:
            pass the number.
        name: the optimizer's path: `"optimizer"` in `tf.train.Checkpoint(optimizer=...)`. Needed where there are
            several.
        gradient_accumulation_steps: as in :func:`from_keras`.

    Example:
        >>> slot = "model/fc/kernel/.OPTIMIZER_SLOT/optimizer/rms/.ATTRIBUTES/VARIABLE_VALUE"
        >>> checkpoint = {slot: np.ones(2), "optimizer/iter/.ATTRIBUTES/VARIABLE_VALUE": 7}
        >>> int(from_tensorflow2(checkpoint, lambda arrays: arrays["model/fc/kernel"]).count)
        7
    """
    found = {key.removesuffix(VALUE): x for key, x in mapping(checkpoint).items() if key.endswith(VALUE)}
    if not found:
        way_out = "use from_tensorflow1 for TensorFlow 1, or from_keras for a list of variables"
        raise ValueError(f"no key ends in {VALUE}, as in an object checkpoint: {listed(checkpoint)}. Perhaps {way_out}")
    optimizer, slots = _chosen(found, name)
    own = [key for key in found if key.startswith(f"{optimizer}/") and "/_trainable_variables/" not in key]
    kinds = {match.re for match in slots.values()}
    if _KERAS in kinds:
        # By number: the order tells RMSprop from Adam, if its name does not.
        own.sort(key=lambda key: int(key.rpartition("/")[2]) if key in slots else -1)
        names = _names(checkpoint, own)
        variables = [(names[key], found[key]) for key in own]
        return state_of_variables(variables, convert, count, gradient_accumulation_steps)
    if gradient_accumulation_steps:
        raise ValueError(f"gradient_accumulation_steps={gradient_accumulation_steps}: {optimizer} has no accumulators")
    if _SONNET in kinds:
        # <optimizer>/<slot>/<weight>
        kind, weights = SONNET, {key: name.split("/", 2)[-1] for key, name in _names(checkpoint, slots).items()}
    else:
        # TensorFlow 1's class has no variables but its slots.
        kind, weights = KERAS if own else TENSORFLOW1, {key: match["weight"] for key, match in slots.items()}
    entries = [Entry(match["slot"], weights[key], found[key], key) for key, match in slots.items()]
    return state_of(kind, entries, convert, count, {key: found[key] for key in own if key == f"{optimizer}/iter"})


def _chosen(found: Mapping[str, Any], name: str | None) -> tuple[str, dict[str, re.Match[str]]]:
    """The path of the optimizer and its slots; raises if there is none, or if there are several."""
    matches = {key: match for kind in (_BESIDE, _KERAS, _SONNET) for key in found if (match := kind.fullmatch(key))}
    paths = sorted({match["optimizer"] for match in matches.values()})
    if not paths:
        raise somebody_else(SONNET, {key.split("/")[-2] for key in found if re.fullmatch(r".+/\d+", key)}, found)
    mine = [path for path in paths if name is None or f"{path}/".startswith(f"{name}/")]
    if not mine:
        raise ValueError(f"no optimizer called {name}: the checkpoint has {listed(paths)}")
    if len(mine) > 1:
        raise ValueError(f"the checkpoint has several optimizers: pass one of {listed(mine)} as name")
    return mine[0], {key: match for key, match in matches.items() if match["optimizer"] == mine[0]}


# --- The names of numbered arrays -------------------------------------------------------------------------


def _names(checkpoint: Mapping[str, Any], keys: Iterable[str]) -> dict[str, str]:
    """The names of TensorFlow's variables, by keys."""
    if GRAPH not in checkpoint:
        raise ValueError(f"this checkpoint numbers the optimizer's arrays, and their names are in {GRAPH}: add it")
    try:
        names = dict(_variables(np.asarray(checkpoint[GRAPH], object).item()))
    except (IndexError, OverflowError, RecursionError, TypeError, UnicodeDecodeError) as error:
        raise ValueError(f"{GRAPH} must be the bytes that TensorFlow saved under this key") from error
    if nameless := [key for key in keys if not names.get(key + VALUE)]:
        raise ValueError(f"{GRAPH} has no names for {listed(nameless)}: is it of another checkpoint?")
    return {key: names[key + VALUE] for key in keys}


def _variables(graph: bytes) -> Iterator[tuple[str, str]]:
    """Keys and names of the variables in a TrackableObjectGraph (trackable_object_graph.proto)."""
    for _, node in _fields(graph):
        for number, attribute in _fields(node):
            if number == 2:
                texts = dict(_fields(attribute))
                yield texts.get(3, b"").decode(), texts.get(2, b"").decode()


def _fields(message: bytes) -> Iterator[tuple[int, Any]]:
    """Numbers and values of the fields of a protocol buffer that has only integers, texts and messages."""
    stream = io.BytesIO(message)
    while stream.tell() < len(message):
        tag, value = _integer(stream), _integer(stream)
        yield tag >> 3, stream.read(value) if tag & 7 == 2 else value


def _integer(stream: io.BytesIO) -> int:
    """An integer of variable length: each byte has seven bits of it, the lowest first, and a flag for more."""
    byte = stream.read(1)[0]
    return byte if byte < 0x80 else byte - 0x80 + (_integer(stream) << 7)
