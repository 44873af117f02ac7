"""PyTorch, timm and Stable Baselines 3: entries by the optimizer's numbers, or names, of its parameters."""

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np

from .._rmsprop import RMSPropState
from .._text import listed, repeated
from ._named import array, Arrays, arrays_of, Convert, ConvertBack, state_of


Names = Iterable[str] | Mapping[str, Any]  # a mapping is from names to weights

SLOTS = {"nu": "square_avg", "mu": "grad_avg", "trace": "momentum_buffer"}


class Class(NamedTuple):
    """One of the classes whose checkpoints look like this."""

    reader: str
    title: str
    first: float  # ν before the first update


PYTORCH = Class("from_pytorch", "torch.optim.RMSprop's checkpoint", 0.0)
TIMM = Class("from_timm", "timm's checkpoint, whose momentum_buffer holds the learning rate", 1.0)
STABLE_BASELINES3 = Class("from_stable_baselines3", "the checkpoint of Stable Baselines 3's RMSpropTFLike", 1.0)

# Options that PyTorch gives each of its optimizers, since 1.12.
OF_PYTORCH = {"foreach", "capturable", "maximize", "differentiable"}
# Options of other optimizers that RMSprop does not have.
OF_OTHERS = {"betas": "Adam or one of its kin", "dampening": "SGD", "lr_decay": "Adagrad", "rho": "Adadelta"}


def from_pytorch(
    optimizer_state_dict: Mapping[str, Any], names: Names | None = None, convert: Convert | None = None
) -> RMSPropState:
    """The state of `dialects.pytorch` from `torch.optim.RMSprop(...).state_dict()`.

    Of `dialects.pfrl` as well: PFRL's classes inherit PyTorch's checkpoint, and only ε has another place.

    Args:
        optimizer_state_dict: with its "state" and "param_groups". From `torch.distributed.checkpoint` it may be
            flattened (`flatten_optimizer_state_dict=True`).
        names: of the parameters, in the order of the optimizer's groups, which need not be the model's. Or a
            mapping from the names to the weights, such as `dict(model.named_parameters())`: then every shape is
            checked, and parameters that never stepped get their first value. Names may leave out all
            parameters that never stepped. They are not needed where the checkpoint has names: from
            `RMSprop(model.named_parameters())`, or from FSDP.
        convert: from arrays by name to a tree of parameters. `None`: the dict itself.

    Returns:
        The state, in float32. With groups of different options it has every slot that one of them has, and
        zeros where others lack it: `from_rmsprop(state, tx.init(params))` fills an :func:`optax.partition`, and
        the chain that `maximize` makes. The count is the largest step of a parameter: PyTorch does
        not count the updates in which a parameter has no gradient.

    Raises:
        ValueError: names, slots or shapes do not fit; the error lists which. Or the checkpoint is another
            optimizer's, or was written by the class of timm or of Stable Baselines 3. The groups of
            PyTorch's own class have had the options `foreach` and `maximize` since version 1.12. Stable
            Baselines 3's have neither, and count in integers; so did older PyTorch, from which you mark the
            groups: `group["foreach"] = None`. Names of compiled or wrapped models begin with `_orig_mod.` or
            `module.`, which you strip: `name.removeprefix("module.")`.

    Example:
        >>> groups = [{"params": [0], "momentum": 0, "centered": False}]
        >>> entry = {"step": 7.0, "square_avg": np.ones((3, 2))}
        >>> state = from_pytorch(
        ...     {"state": {0: entry}, "param_groups": groups}, ["fc.weight"], lambda arrays: arrays["fc.weight"].T
        ... )
        >>> int(state.count), state.nu.shape
        (7, (2, 3))

    References:
        torch/optim/rmsprop.py, 2.13.0.
    """
    return _read(optimizer_state_dict, names, convert, PYTORCH)


def from_timm(
    optimizer_state_dict: Mapping[str, Any], names: Names | None = None, convert: Convert | None = None
) -> RMSPropState:
    """The state of `dialects.timm` from timm's `RMSpropTF(...).state_dict()`; see :func:`from_pytorch`.

    The slots have PyTorch's names, but the buffer holds the learning rate, and averages start at 1. PyTorch
    would load this checkpoint without a warning.
    """
    return _read(optimizer_state_dict, names, convert, TIMM)


def from_stable_baselines3(
    optimizer_state_dict: Mapping[str, Any], names: Names | None = None, convert: Convert | None = None
) -> RMSPropState:
    """The state of `dialects.stable_baselines3` from that of `RMSpropTFLike`; see :func:`from_pytorch`.

    A2C does not use this class unless you ask for it (`use_rms_prop=False` and
    `policy_kwargs={"optimizer_class": RMSpropTFLike}`): its default is PyTorch's. A saved model is a zip file with
    the optimizer in it::

        with zipfile.ZipFile("a2c.zip") as file, file.open("policy.optimizer.pth") as pth:
            optimizer_state_dict = torch.load(io.BytesIO(pth.read()), weights_only=True)

    Averages start at 1. The checkpoint of a PyTorch older than 1.12 looks the same, and is read as this class.
    """
    return _read(optimizer_state_dict, names, convert, STABLE_BASELINES3)


def to_pytorch(state: Any, names: Names, convert_back: ConvertBack) -> dict[int, dict[str, Any]]:
    """The "state" part of an optimizer's state_dict, in torch tensors; also for timm and Stable Baselines 3.

    Example::

        optimizer.load_state_dict({**optimizer.state_dict(), "state": interop.to_pytorch(state, names, back)})

    Args:
        state: of `dialects.pytorch`, `dialects.timm` or `dialects.stable_baselines3`.
        names: of the parameters, in the order of the optimizer's groups; a mapping's keys.
        convert_back: from a tree of parameters to arrays by name.

    Raises:
        ValueError: `convert_back` does not give these names.
    """
    import torch

    names = list(names)
    count, slots = arrays_of(state, convert_back, names)
    return {
        i: {"step": torch.tensor(float(count))}
        | {SLOTS[slot]: torch.from_numpy(arrays[name]) for slot, arrays in slots.items()}
        for i, name in enumerate(names)
    }


# --- Reading ----------------------------------------------------------------------------------------------


class Parameter(NamedTuple):
    """One parameter of the optimizer."""

    name: str
    group: Mapping[str, Any]
    entry: Mapping[str, Any]  # empty if it never stepped
    shape: tuple[int, ...] | None  # None if nobody knows


def _read(state_dict: Mapping[str, Any], names: Names | None, convert: Convert | None, expected: Class) -> RMSPropState:
    groups, entries = parts_of(state_dict)
    _check_class(groups, entries, expected)
    parameters = _parameters(groups, entries, names)
    wants = {
        "nu": lambda group: True,
        "mu": lambda group: bool(group["centered"]),
        "trace": lambda group: float(array(group["momentum"])) > 0,
    }
    slots: dict[str, Arrays] = {slot: {} for slot, wanted in wants.items() if any(map(wanted, groups))}
    for slot, arrays in slots.items():
        for parameter in parameters:
            x = _slot(parameter, slot, wants[slot](parameter.group), expected.first)
            if x is not None:
                arrays[parameter.name] = x
    steps = [int(array(parameter.entry["step"])) for parameter in parameters if "step" in parameter.entry]
    if not steps and any(entries.values()):
        raise ValueError("the checkpoint has no step: without it nobody knows how many updates were made")
    return state_of(slots, SLOTS, convert, max(steps, default=0), [parameter.name for parameter in parameters])


def _slot(parameter: Parameter, slot: str, wanted: bool, first: float) -> np.ndarray | None:
    """One accumulator of a parameter; None if the checkpoint lacks it."""
    name, _, entry, shape = parameter
    if not entry:
        if shape is None:
            raise ValueError(
                f"{name} never stepped, and the checkpoint does not know its shape: give names as a mapping to the "
                "weights, such as dict(model.named_parameters()), or leave out all names that never stepped"
            )
        return np.full(shape, first if slot == "nu" else 0.0)
    if SLOTS["nu"] not in entry or (wanted and SLOTS[slot] not in entry):
        return None
    x = array(entry[SLOTS[slot]]) if wanted else np.zeros(np.shape(entry[SLOTS["nu"]]))
    if shape not in (None, x.shape):
        raise ValueError(f"{SLOTS[slot]} of {name} has shape {x.shape}, the weight {shape}: names are in another order")
    return x


def parts_of(state_dict: Mapping[str, Any]) -> tuple[list[Mapping[str, Any]], dict[Any, Mapping[str, Any]]]:
    """The groups, and the entries by the keys that the groups have."""
    if state_dict and all(str(key).startswith(("state.", "param_groups.")) for key in state_dict):
        state_dict = _unflattened(state_dict)
    if not {"state", "param_groups"} <= set(state_dict):
        raise ValueError(f"not the state_dict of an optimizer, with state and param_groups: {listed(state_dict)}")
    groups: list[Mapping[str, Any]] = [
        {**group, "params": [_key(key) for key in group["params"]]} for group in state_dict["param_groups"]
    ]
    known = {key for group in groups for key in group["params"]}
    entries: dict[Any, Any] = {_key(key): entry for key, entry in state_dict["state"].items()}
    # Through JSON or safetensors, the number of a parameter becomes a string.
    return groups, {int(key) if key not in known and str(key).isdigit() else key: x for key, x in entries.items()}


def _key(key: Any) -> Any:
    """A parameter's number or name, or the parameter itself. A tensor with a number in it is that number."""
    return int(key) if getattr(key, "ndim", None) == 0 and "int" in str(key.dtype) else key


def _unflattened(state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """The dict that `flatten_optimizer_state_dict=True` flattened: keys are "state.<name>.<slot>", and so on."""
    parts: dict[str, dict[str, dict[str, Any]]] = {"state": {}, "param_groups": {}}
    for key, value in state_dict.items():
        part, _, rest = key.partition(".")
        name, _, field = rest.rpartition(".")
        parts[part].setdefault(name, {})[field] = value
    return {
        "state": parts["state"],
        "param_groups": [{**group, "params": [name]} for name, group in parts["param_groups"].items()],
    }


def _check_class(groups: list[Mapping[str, Any]], entries: Mapping[Any, Mapping[str, Any]], expected: Class) -> None:
    """Raises if another class, or another optimizer, wrote the checkpoint."""
    for group in groups:
        if not {"momentum", "centered"} <= set(group):
            kind = next((kind for field, kind in OF_OTHERS.items() if field in group), "another optimizer")
            kind = "bitsandbytes" if any(_is_bitsandbytes(entry) for entry in entries.values()) else kind
            raise ValueError(f"this checkpoint is not RMSprop's but that of {kind}: its groups have {sorted(group)}")
    known, keys = {"step", *SLOTS.values()}, {key for group in groups for key in group["params"]}
    for key, entry in entries.items():
        if key not in keys:
            raise ValueError(f"not RMSprop's state: no group has the parameter of entry {key!r}")
        if not set(entry) <= known:
            raise ValueError(f"not RMSprop's state: entry {key!r} has {sorted(entry)}, allowed are {sorted(known)}")
    for i, group in enumerate(groups):
        found = _class_of(group, entries)
        if expected is TIMM and found is None:
            raise ValueError(f"this is not timm's checkpoint: group {i} has no lr_in_momentum. Use from_pytorch")
        if found not in (None, expected):
            old = " (or, if a PyTorch before 1.12 wrote it, add foreach=None to its groups)"
            also = old if expected is PYTORCH and found is STABLE_BASELINES3 else ""
            raise ValueError(f"this is {found.title}: use {found.reader}{also}. Group {i} has {sorted(group)}")


def _class_of(group: Mapping[str, Any], entries: Mapping[Any, Mapping[str, Any]]) -> Class | None:
    """The class that wrote a group; None if nothing tells."""
    if "lr_in_momentum" in group:
        return TIMM
    if OF_PYTORCH & set(group):
        return PYTORCH
    # Without these options, only Stable Baselines 3's class and a PyTorch before 1.12 count in integers.
    steps = [entry["step"] for entry in entries.values() if "step" in entry]
    in_integers = ["int" in str(getattr(step, "dtype", type(step))) for step in steps]
    return STABLE_BASELINES3 if steps and all(in_integers) else None


def _is_bitsandbytes(entry: Mapping[str, Any]) -> bool:
    return any(field == "state1" or str(field).startswith("__bnb") for field in entry)


# --- Names ------------------------------------------------------------------------------------------------


def _parameters(
    groups: list[Mapping[str, Any]], entries: Mapping[Any, Mapping[str, Any]], names: Names | None
) -> list[Parameter]:
    """The optimizer's parameters with their names, without those that `names` leaves out."""
    keys = [key for group in groups for key in group["params"]]
    if twice := repeated(keys):
        raise ValueError(f"the checkpoint has a parameter more than once: {listed(twice)}")
    given, weights = _given(names)
    name_of = _names_of(keys, [key for key in keys if entries.get(key)], _stored(groups, keys, weights), given, weights)
    shapes = {name: tuple(np.shape(weight)) for name, weight in weights.items()}
    return [
        Parameter(name_of[key], group, entries.get(key) or {}, shapes.get(name_of[key]))
        for group in groups
        for key in group["params"]
        if key in name_of
    ]


def _given(names: Names | None) -> tuple[list[str] | None, dict[str, Any]]:
    """The names that the caller gives, and the weights if they are given as well."""
    if names is None:
        return None, {}
    if isinstance(names, str):
        raise ValueError(f"names={names!r} is one string: allowed are a sequence of names, or a mapping to the weights")
    items: list[Any] = list(names.items() if isinstance(names, Mapping) else names)
    in_pairs = bool(items) and all(isinstance(item, tuple) for item in items)  # as model.named_parameters() has them
    given = [name for name, _ in items] if in_pairs else items
    if twice := repeated(given):
        raise ValueError(f"names has a name more than once: {listed(twice)}")
    return given, dict(items) if in_pairs else {}


def _stored(groups: list[Mapping[str, Any]], keys: list[Any], weights: Mapping[str, Any]) -> list[str] | None:
    """The names of the parameters that the checkpoint has, or that its keys have: they may be the weights."""
    if keys and all(isinstance(key, str) for key in keys):
        return keys
    stored = [name for group in groups for name in group.get("param_names") or ()]
    if len(stored) == len(keys):
        return stored
    by_weight = {id(weight): name for name, weight in weights.items()}
    return [by_weight[id(key)] for key in keys] if all(id(key) in by_weight for key in keys) else None


def _names_of(
    keys: list[Any],
    stepped: list[Any],
    stored: list[str] | None,
    given: list[str] | None,
    weights: Mapping[str, Any],
) -> dict[Any, str]:
    """The names of the parameters by their keys."""
    if stored is None:
        return dict(zip(*_paired(keys, stepped, given), strict=True))
    every = dict(zip(keys, stored, strict=True))
    if given is None or given == stored:
        return every
    some = {key: name for key, name in every.items() if name in set(given)}
    if set(stepped) <= set(some) and (weights or given == [every[key] for key in stepped]):
        return some
    raise ValueError(f"the checkpoint names its parameters {stored}, which names contradicts: {given}")


def _paired(keys: list[Any], stepped: list[Any], given: list[str] | None) -> tuple[list[Any], list[str]]:
    if given is None:
        raise ValueError("the checkpoint does not name its parameters: give names, in the order of its groups")
    if len(given) not in (len(keys), len(stepped)):
        raise ValueError(
            f"the optimizer has {len(keys)} parameters, of which {len(stepped)} have stepped; names has {len(given)}: "
            f"{given}"
        )
    return keys if len(given) == len(keys) else stepped, given
