"""State dicts of torch's optimizers: groups, and entries by the number, or the name, of a parameter."""

import reprlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from .._rmsprop import RMSPropState
from .._text import listed, repeated
from ._arrays import array, mapping, whole
from ._named import Convert, Entry, Optimizer, state_of


__all__ = ["Names", "Parameter", "given_names", "parameters", "parts_of", "state_of_parameters"]

Names = Any  # a sequence of names, a mapping from names to weights, pairs of both, or a torch module
Shape = tuple[int, ...]


class Parameter(NamedTuple):
    """One parameter of the optimizer."""

    name: str
    group: Mapping[str, Any]
    entry: Mapping[str, Any]  # empty if it never stepped
    shape: Shape | None  # None if nobody knows

    def start(self, value: float) -> np.ndarray:
        """The first value of an accumulator."""
        if self.shape is None:
            raise ValueError(
                f"{self.name} never stepped, so its shape is unknown: pass names as a mapping to the weights, such as "
                "dict(model.named_parameters()), or leave out all parameters that never stepped"
            )
        return np.full(self.shape, value)


def parts_of(checkpoint: Any) -> tuple[list[dict[str, Any]], dict[Any, Mapping[str, Any]]]:
    """The groups of a state dict or of the optimizer itself, and the entries by the keys that the groups have."""
    if hasattr(checkpoint, "param_groups"):
        checkpoint = {"state": checkpoint.state, "param_groups": checkpoint.param_groups}
    checkpoint = mapping(checkpoint, "state and param_groups (or the optimizer)")
    if checkpoint and all(str(key).startswith(("state.", "param_groups.")) for key in checkpoint):
        checkpoint = _unflattened(checkpoint)
    if not {"state", "param_groups"} <= set(checkpoint):
        raise ValueError(f"not an optimizer's state_dict: state or param_groups is missing in {listed(checkpoint)}")
    state, groups = checkpoint["state"], checkpoint["param_groups"]
    way_out = "Pass optimizer.state_dict() as it is"
    has_params = lambda group: isinstance(group, Mapping) and hasattr(group.get("params"), "__iter__")  # noqa: E731
    if not isinstance(groups, (list, tuple)) or not all(map(has_params, groups)):
        raise ValueError(f"param_groups={reprlib.repr(groups)}: allowed is a list of mappings with params. {way_out}")
    groups = [{**group, "params": [_key(key) for key in group["params"]]} for group in groups]
    keys = [key for group in groups for key in group["params"]]
    if twice := repeated(keys):
        raise ValueError(f"the checkpoint has a parameter more than once: {listed(twice)}")
    known = set(keys)  # tensors are found in a set, and not in a list, which compares elements
    if not isinstance(state, Mapping) or not all(isinstance(entry, Mapping) for entry in state.values()):
        raise ValueError(f"state={reprlib.repr(state)}: allowed is a mapping of mappings. {way_out}")
    stored = [(_key(key), entry) for key, entry in state.items()]
    # Through JSON or safetensors, the number of a parameter becomes a string.
    stored = [(int(key) if key not in known and str(key).isdigit() else key, entry) for key, entry in stored]
    entries = dict(stored)
    if len(entries) < len(stored):
        raise ValueError(f"the checkpoint has an entry twice, as a number and as a string: {listed(state)}. Remove one")
    if unknown := [key for key in entries if key not in known]:
        raise ValueError(f"not an optimizer's state: no group has the parameter of entry {unknown[0]!r}")
    return groups, entries


def _key(key: Any) -> Any:
    """A parameter's number or name, or the parameter itself. A tensor with a number in it is that number."""
    return int(key) if getattr(key, "ndim", None) == 0 and "int" in str(key.dtype) else key


def _unflattened(checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    """The dict that `flatten_optimizer_state_dict=True` flattened: keys are "state.<name>.<slot>", and so on."""
    parts: dict[str, dict[str, dict[str, Any]]] = {"state": {}, "param_groups": {}}
    for key, value in checkpoint.items():
        part, _, rest = key.partition(".")
        name, _, field = rest.rpartition(".")
        parts[part].setdefault(name, {})[field] = value
    groups = [{**group, "params": [name]} for name, group in parts["param_groups"].items()]
    return {"state": parts["state"], "param_groups": groups}


def state_of_parameters(
    optimizer: Optimizer,
    found: list[Parameter],
    arrays: Callable[[Parameter], Mapping[str, Any]],  # of a parameter, by the optimizer's slots
    convert: Convert | None,
    count: int | None,
) -> RMSPropState:
    """The state. The count is the largest step: torch does not count updates in which a parameter has no gradient."""
    entries = [Entry(slot, p.name, x, f"{slot} of {p.name}") for p in found for slot, x in arrays(p).items()]
    if not entries:
        raise ValueError("the checkpoint has no accumulators of these names: start a new run with tx.init(params)")
    stepped = [p for p in found if p.entry]
    if count is None and (not stepped or any("step" in p.entry for p in stepped)):
        count = max((whole(f"step of {p.name}", p.entry.get("step")) for p in stepped), default=0)
    return state_of(optimizer, entries, convert, count, {}, {p.name: p.shape for p in found})


# --- Names ------------------------------------------------------------------------------------------------


def parameters(
    groups: Sequence[Mapping[str, Any]], entries: Mapping[Any, Mapping[str, Any]], names: Names | None, average: str
) -> list[Parameter]:
    """The optimizer's parameters with their names, without those that `names` leaves out.

    `average` is the name of ν in an entry, which has the shape of the weight.
    """
    given, weights = given_names(names)
    shapes = {name: tuple(np.shape(weight)) for name, weight in weights.items()}
    group_of = {key: group for group in groups for key in group["params"]}
    stepped = [key for key in group_of if entries.get(key)]
    stored = _stored(groups, [*group_of], weights)
    if stored is None:
        if given is None:
            raise ValueError("the checkpoint does not name its parameters: pass names, in the order of its groups")
        if len(given) not in (len(group_of), len(stepped)):
            optimizer = f"the optimizer has {len(group_of)} parameters, of which {len(stepped)} have stepped"
            raise ValueError(
                f"{optimizer}; names has {len(given)}: {given}. Pass as many, or the optimizer itself and its model"
            )
        keys = dict.fromkeys(group_of if len(given) == len(group_of) else stepped)
        parts = [part for group in groups if (part := [key for key in group["params"] if key in keys])]
        live = all(hasattr(key, "shape") for key in keys)  # the optimizer itself, with a copy of its model
        parts = [[key] for key in keys] if live else parts
        if weights and len(parts) > 1:
            if live:
                found = {key: tuple(key.shape) for key in keys}
                problem = "the optimizer has other tensors than names, such as those of a copied model"
            else:
                kept = {key: entries[key].get(average) for key in stepped}
                found = {key: array(f"{average} of parameter {key}", x).shape for key, x in kept.items()}
                problem = f"names is in the model's order, the {len(parts)} groups may be in another"
            name_of = _by_shape(parts, found, {name: shapes[name] for name in given}, problem)
        else:
            name_of = dict(zip(keys, given, strict=True))
    else:
        name_of = {key: name for key, name in stored.items() if given is None or name in (weights or given)}
        known = [*stored.values()]
        same_order = weights or given in (None, known, [stored[key] for key in stepped])
        if not same_order or not name_of.keys() >= set(stepped):
            raise ValueError(f"the checkpoint names its parameters {known}, but names is {given}: leave names out")
    return [Parameter(name, group_of[key], entries.get(key) or {}, shapes.get(name)) for key, name in name_of.items()]


def given_names(names: Names | None) -> tuple[list[str] | None, dict[str, Any]]:
    """The names that the caller gives, and the weights, and buffers, by name if they are given as well."""
    if names is None:
        return None, {}
    if hasattr(names, "named_parameters"):
        own = dict(names.named_parameters())
        return list(own), own | dict(names.named_buffers())
    allowed = "allowed are the model, a mapping from names to weights, and a sequence of names"
    if isinstance(names, (str, set, frozenset)) or not hasattr(names, "__iter__"):
        problem = "one string" if isinstance(names, str) else f"a {type(names).__name__}, which has no order"
        way_out = ". Pass a function as convert=" if callable(names) else ""
        raise ValueError(f"names={reprlib.repr(names)} is {problem}: {allowed}{way_out}")
    items: list[Any] = list(names.items() if isinstance(names, Mapping) else names)
    # Pairs, as model.named_parameters() has them.
    in_pairs = bool(items) and all(isinstance(item, tuple) and len(item) == 2 for item in items)
    given = [name for name, _ in items] if in_pairs else items
    if strange := [name for name in given if not isinstance(name, str)]:
        raise ValueError(f"names has {reprlib.repr(strange[0])}, a {type(strange[0]).__name__}: {allowed}")
    if twice := repeated(given):
        raise ValueError(f"names has a name more than once: {listed(twice)}")
    return given, dict(items) if in_pairs else {}


def _stored(groups: Sequence[Mapping[str, Any]], keys: list[Any], weights: Mapping[str, Any]) -> dict[Any, str] | None:
    """The names by key, if the checkpoint has them, or if its keys are the weights themselves."""
    if keys and all(isinstance(key, str) for key in keys):
        return dict(zip(keys, keys, strict=True))
    if weights and any(hasattr(key, "shape") for key in keys):
        reverse = [*weights.items()][::-1]  # a tied weight has its first name
        name_of = {mark(weight): name for mark in (_address, id) for name, weight in reverse}
        mark_of = {key: id(key) if id(key) in name_of else _address(key) for key in keys}
        lacking = [tuple(key.shape) for key, mark in mark_of.items() if mark not in name_of]
        if not lacking:
            return {key: name_of[mark] for key, mark in mark_of.items()}
        if len(lacking) < len(keys):
            raise ValueError(f"names lacks parameters of the optimizer, of shape {listed(lacking)}: pass them all")
    stored = [name for group in groups for name in group.get("param_names") or ()]
    return dict(zip(keys, stored, strict=True)) if keys and len(stored) == len(keys) else None


def _address(x: Any) -> Any:
    """Where a tensor lies, with its shape: `state_dict()` returns new tensors over the same memory."""
    try:
        return (x.data_ptr(), *x.shape) if x.data_ptr() else id(x)
    except (AttributeError, RuntimeError):
        return id(x)


def _by_shape(
    groups: list[list[Any]], found: Mapping[Any, Shape], weights: Mapping[str, Shape], problem: str
) -> dict[Any, str]:
    """The names by key, where no two groups have a shape in common, and each keeps the model's order."""
    name_of: dict[Any, str] = {}
    for group in groups:
        shapes = [found.get(key) for key in group]
        names = [name for name, shape in weights.items() if shape in shapes]
        if shapes != [weights[name] for name in names]:
            raise ValueError(
                f"{problem}, and shapes do not tell which weight is which: pass the optimizer and the model that it "
                "trains, or a list of names in the order of the groups"
            )
        name_of |= zip(group, names, strict=True)
    return name_of
