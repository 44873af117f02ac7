"""Carry a half-finished run over from PyTorch, timm, Keras 3, TensorFlow 1 or Optax, and back; or to other options.

Accumulators have the names and shapes of the weights. So the function that converts weights, from a
dict of NumPy arrays by name to a tree of parameters, converts them too::

    def convert(arrays):  # torch's Linear is (out, in), Flax's kernel (in, out)
        return {"kernel": arrays["fc.weight"].T, "bias": arrays["fc.bias"]}

    params = convert({name: p.detach().numpy() for name, p in model.named_parameters()})
    state = interop.from_pytorch(optimizer.state_dict(), [n for n, _ in model.named_parameters()], convert)

Continue with the dialect of that name. It goes on as if it had never stopped, provided that it has
the options, and the schedule, of the run: the count comes along.

States come in float32; :func:`from_rmsprop` makes one of another `state_dtype` of them.

Two things are converted on the way. Frameworks keep E[g²] where a centered run of ours keeps the
variance E[g²] - |E[g]|²; and Optax's momentum buffer is the negative of everybody else's.
"""

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from . import _storage
from ._rmsprop import RMSPropState


Arrays = dict[str, np.ndarray]
Convert = Callable[[Arrays], Any]
ConvertBack = Callable[[Any], Mapping[str, Any]]

# Our slots by their foreign names, `nu` as E[g²].
PYTORCH = {"nu": "square_avg", "mu": "grad_avg", "trace": "momentum_buffer"}
KERAS = {"nu": "velocity", "mu": "average_gradient", "trace": "momentum"}
# TensorFlow 1 numbers the slots of a variable in the order in which it made them.
TENSORFLOW1 = {"nu": "", "trace": "_1"}
TENSORFLOW1_CENTERED = {"nu": "", "mu": "_1", "trace": "_2"}


def from_pytorch(
    optimizer_state_dict: Mapping[str, Any], names: Sequence[str], convert: Convert, params: Any = None
) -> RMSPropState:
    """The state of `dialects.pytorch` from `torch.optim.RMSprop(...).state_dict()`.

    Args:
        optimizer_state_dict: with its "state" and "param_groups".
        names: of the parameters, in the order in which the optimizer got them.
        convert: from arrays by name to a tree of parameters.
        params: the parameters; if given, the state must have their structure and shapes.

    Returns:
        The state, in float32. With `maximize` it is the second one of the chain.

    Raises:
        ValueError: names, slots or shapes do not fit; it lists which. Or this is timm's optimizer.

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
    return _from_torch(optimizer_state_dict, names, convert, params, timm=False)


def from_timm(
    optimizer_state_dict: Mapping[str, Any], names: Sequence[str], convert: Convert, params: Any = None
) -> RMSPropState:
    """The state of `dialects.timm` from timm's `RMSpropTF(...).state_dict()`; see :func:`from_pytorch`.

    It has PyTorch's names, but its buffer holds the learning rate: PyTorch would load it without a word.
    """
    return _from_torch(optimizer_state_dict, names, convert, params, timm=True)


def to_pytorch(state: RMSPropState, names: Sequence[str], convert_back: ConvertBack) -> dict[int, dict[str, Any]]:
    """The "state" part of an optimizer's state_dict, in torch tensors; timm's too.

    Example::

        optimizer.load_state_dict({**optimizer.state_dict(), "state": interop.to_pytorch(state, names, back)})

    Args:
        state: of `dialects.pytorch` or `dialects.timm`.
        names: of the parameters, in the optimizer's order.
        convert_back: from a tree of parameters to arrays by name.

    Raises:
        ValueError: `convert_back` does not give just these names.
    """
    import torch

    slots = _export(state, convert_back, names)
    return {
        i: {"step": torch.tensor(float(state.count))}
        | {PYTORCH[slot]: torch.from_numpy(arrays[name]) for slot, arrays in slots.items()}
        for i, name in enumerate(names)
    }


def from_keras(variables: Iterable[tuple[str, Any]], convert: Convert, params: Any = None) -> RMSPropState:
    """The state of `dialects.keras` from the variables of a Keras 3 optimizer.

    Args:
        variables: `[(v.path, v.numpy()) for v in optimizer.variables]`.
        convert: from arrays by name to a tree of parameters. Keras names an accumulator by the path of its
            weight with "_" for "/": `sequential/d1/kernel` is `sequential_d1_kernel` here.
        params: the parameters; if given, the state must have their structure and shapes.

    Raises:
        ValueError: names, slots or shapes do not fit; it lists which.

    Example:
        >>> variables = [("rmsprop/iteration", 7), ("rmsprop/d1_kernel_velocity", np.ones(2))]
        >>> int(from_keras(variables, lambda arrays: {"kernel": arrays["d1_kernel"]}).count)
        7

    References:
        keras/src/optimizers/rmsprop.py and base_optimizer.py, 3.15.1.
    """
    slots: dict[str, Arrays] = {"nu": {}}
    count, unknown = 0, []
    for path, value in variables:
        name = path.rpartition("/")[2]
        slot = next((slot for slot, suffix in KERAS.items() if name.endswith("_" + suffix)), None)
        if slot:
            slots.setdefault(slot, {})[name.removesuffix("_" + KERAS[slot])] = _array(value)
        elif name == "iteration":
            count = int(_array(value))
        elif name != "learning_rate":
            unknown.append(path)
    if unknown:
        raise ValueError(f"not variables of Keras' RMSprop: {unknown}; allowed are *_{', *_'.join(KERAS.values())}")
    return _import(slots, KERAS, convert, count, params)


def to_keras(state: RMSPropState, convert_back: ConvertBack) -> list[tuple[str, np.ndarray]]:
    """Names and values for the variables of a Keras 3 optimizer.

    Example::

        values = dict(interop.to_keras(state, back))
        for variable in optimizer.variables:  # after optimizer.build(model.trainable_variables)
            if variable.name != "learning_rate":
                variable.assign(values[variable.name])

    Args:
        state: of `dialects.keras`.
        convert_back: from a tree of parameters to arrays by name, as in :func:`from_keras`.
    """
    slots = _export(state, convert_back)
    named = [(f"{name}_{KERAS[slot]}", x) for slot, arrays in slots.items() for name, x in arrays.items()]
    return [("iteration", np.asarray(state.count)), *named]


def from_tensorflow1(
    slots: Mapping[str, Any], convert: Convert, count: int = 0, params: Any = None, name: str = "RMSProp"
) -> RMSPropState:
    """The state of `dialects.tensorflow1` from the slot variables of a TensorFlow 1 checkpoint.

    Args:
        slots: `{"w/RMSProp": ..., "w/RMSProp_1": ...}`: mean square and momentum, or, when centered, mean
            square, mean and momentum (`_2`).
        convert: from arrays by name (`"w"`) to a tree of parameters.
        count: the global step, for a schedule; it is not among the slots.
        params: the parameters; if given, the state must have their structure and shapes.
        name: the optimizer's name, if it got another.

    Returns:
        The state. TensorFlow makes the momentum slot even for a momentum of zero; then go on with
        `state._replace(trace=None)`.

    Raises:
        ValueError: names, slots or shapes do not fit; it lists which.

    Example:
        >>> slots = {"w/RMSProp": np.ones(2), "w/RMSProp_1": np.zeros(2)}
        >>> from_tensorflow1(slots, lambda arrays: arrays).trace
        {'w': Array([0., 0.], dtype=float32)}
    """
    found = {key: re.fullmatch(rf"(.+)/{re.escape(name)}(|_1|_2)(?::0)?", key) for key in slots}
    if unknown := [key for key, match in found.items() if not match]:
        raise ValueError(f"not slots of {name}: {unknown}; allowed are */{name}, */{name}_1 and */{name}_2")
    centered = any(match and match[2] == "_2" for match in found.values())
    table = TENSORFLOW1_CENTERED if centered else TENSORFLOW1
    slot_of = {suffix: slot for slot, suffix in table.items()}
    columns: dict[str, Arrays] = {slot: {} for slot in table}
    for key, match in found.items():
        assert match
        columns[slot_of[match[2]]][match[1]] = _array(slots[key])
    return _import(columns, {slot: name + suffix for slot, suffix in table.items()}, convert, count, params)


def to_tensorflow1(state: RMSPropState, convert_back: ConvertBack, name: str = "RMSProp") -> Arrays:
    """Values for the slot variables of TensorFlow 1, by their names in a checkpoint.

    Args:
        state: of `dialects.tensorflow1`.
        convert_back: from a tree of parameters to arrays by name.
        name: the optimizer's name, if it has another.
    """
    slots = _export(state, convert_back)
    # Its momentum slot is there whether it is used or not.
    slots.setdefault("trace", {key: np.zeros_like(x) for key, x in slots["nu"].items()})
    table = TENSORFLOW1 if state.mu is None else TENSORFLOW1_CENTERED
    return {f"{key}/{name}{table[slot]}": x for slot, arrays in slots.items() for key, x in arrays.items()}


def from_optax(state: optax.OptState) -> RMSPropState:
    """Our state from that of `optax.rmsprop` or `optax.scale_by_rms`, with the same options.

    Args:
        state: Optax's; of a chain, the part that belongs to it. Without a schedule and without bias
            correction Optax does not count, and the count starts from zero.

    Raises:
        ValueError: there is no second moment in it.

    Example:
        >>> import jax.numpy as jnp, optax
        >>> from rmsprop_jax import interop, rmsprop
        >>> state = optax.rmsprop(0.1, momentum=0.9).init(jnp.zeros(2))
        >>> updates, _ = rmsprop(0.1, momentum=0.9).update(jnp.ones(2), interop.from_optax(state))
    """
    parts = {name: _parts(state, name) for name in ("count", *RMSPropState._fields[1:])}
    if len(parts["nu"]) != 1:
        raise ValueError(f"{len(parts['nu'])} second moments (nu) in this state: allowed is one, got {state}")
    nu, mu, trace = (parts[name][0] if parts[name] else None for name in ("nu", "mu", "trace"))
    wide = _widened(jax.tree.map(jnp.real, nu))  # complex there, with an imaginary part of zero
    return RMSPropState(
        count=jnp.asarray(max(parts["count"], default=0), jnp.int32),
        nu=wide if mu is None else jax.tree.map(_variance, wide, _widened(mu)),
        mu=None if mu is None else _widened(mu),
        trace=None if trace is None else jax.tree.map(jnp.negative, _widened(trace)),
    )


def to_optax(state: RMSPropState, like: Any) -> Any:
    """Optax's state from ours.

    Args:
        state: ours.
        like: what it shall look like: `optax.rmsprop(...).init(params)`.

    Raises:
        ValueError: one of the two has a slot that the other lacks.
    """
    values = {"count": state.count, "nu": _second_moment(state), "mu": state.mu}
    values["trace"] = None if state.trace is None else jax.tree.map(jnp.negative, state.trace)

    for name in ("mu", "trace"):
        if bool(_parts(like, name)) != (values[name] is not None):
            raise ValueError(f"only one of state and like has {name}: they were made with other options")

    def fill(part: Any) -> Any:
        if not isinstance(part, tuple):
            return part
        if not hasattr(part, "_fields"):
            return tuple(map(fill, part))
        fields: Any = part
        for name in set(fields._fields) & set(values):
            cast = jax.tree.map(lambda x, y: jnp.asarray(x, y.dtype), values[name], getattr(fields, name))
            fields = fields._replace(**{name: cast})
        return fields

    return fill(like)


def from_rmsprop(state: Any, like: Any) -> Any:
    """Our state, for a transformation with other options: momentum, centering or `state_dtype` on or off.

    What is new starts from zero; what is gone is dropped, with the mean going back into E[g²]. A buffer
    means another thing with another `lr_in_momentum`: that is not converted.

    Args:
        state: ours, or one that has ours inside, as of a chain.
        like: what it shall look like: `tx.init(params)` with the new options.

    Returns:
        The state, in the shapes and dtypes of `like`.

    Raises:
        ValueError: the two differ in more than the options of `rmsprop`.

    Example:
        >>> import jax.numpy as jnp
        >>> from rmsprop_jax import interop, rmsprop
        >>> params = jnp.array([1.0, 2.0])
        >>> _, state = rmsprop(0.1).update(params, rmsprop(0.1).init(params))
        >>> lean = rmsprop(0.1, momentum=0.9, state_dtype=jnp.uint8)
        >>> state = interop.from_rmsprop(state, lean.init(params))
        >>> int(state.count), state.nu.dtype, state.trace
        (1, dtype('uint8'), Array([0, 0], dtype=bfloat16))
    """

    def ours(x: Any) -> bool:
        return isinstance(x, RMSPropState)

    def carry(old: Any, new: Any) -> Any:
        if not ours(new):
            return old
        seed = _storage.seeds(old.count, 3)
        values = {"nu": _second_moment(old) if new.mu is None else old.nu, "mu": old.mu, "trace": old.trace}
        for slot, tree in values.items():
            wanted = getattr(new, slot)
            if tree is not None and wanted is not None:
                tree = jax.tree.map(lambda x, y: _storage.store(x, y.dtype, seed, x), _loaded(tree), wanted)
            values[slot] = wanted if tree is None or wanted is None else tree
        return new._replace(count=old.count, **values)

    return jax.tree.map(carry, state, like, is_leaf=ours)


# --- One pair of functions for all --------------------------------------------------------------------


def _import(
    slots: Mapping[str, Arrays],
    table: Mapping[str, str],
    convert: Convert,
    count: int,
    params: Any,
    names: Iterable[str] = (),
) -> RMSPropState:
    """`slots` by our names, then by the weights' names; `table` says what the foreign names are."""
    everything = set(names).union(*slots.values())
    lacking = {table[slot]: sorted(everything - set(arrays)) for slot, arrays in slots.items()}
    lacking = {slot: missing for slot, missing in lacking.items() if missing}
    if lacking or not everything:
        raise ValueError(f"the checkpoint lacks {lacking or list(table.values())}")

    def tree(slot: str) -> Any:
        arrays = slots[slot]
        try:
            converted = convert(dict(arrays))
        except KeyError as error:
            raise ValueError(f"convert asks for {error}, the checkpoint has {sorted(everything)}") from error
        given, shapes = {name: x.shape for name, x in arrays.items()}, _shapes(converted)
        if sum(map(math.prod, shapes.values())) < sum(map(math.prod, given.values())):
            raise ValueError(f"convert leaves something out: from {given} it makes {shapes}")
        wanted = shapes if params is None else _shapes(params)
        wrong = {k: (shapes.get(k), wanted.get(k)) for k in shapes | wanted if shapes.get(k) != wanted.get(k)}
        if wrong:
            raise ValueError(f"{table[slot]} does not fit the parameters, (its shape, the parameter's): {wrong}")
        return converted

    trees = {slot: tree(slot) for slot in slots}
    if "mu" in trees:
        trees["nu"] = jax.tree.map(_variance, trees["nu"], trees["mu"])
    arrays = {slot: jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), tree) for slot, tree in trees.items()}
    return RMSPropState(count=jnp.asarray(count, jnp.int32), **arrays)


def _export(state: RMSPropState, convert_back: ConvertBack, names: Sequence[str] | None = None) -> dict[str, Arrays]:
    """Slots by our names, then by the weights' names; `nu` as E[g²]."""
    trees = {"nu": _second_moment(state), "trace": state.trace, "mu": state.mu}
    slots = {slot: convert_back(tree) for slot, tree in trees.items() if tree is not None}
    if names is not None and set(slots["nu"]) != set(names):
        differ = [sorted(set(names) - set(slots["nu"])), sorted(set(slots["nu"]) - set(names))]
        raise ValueError(f"convert_back lacks {differ[0]} of names, and has {differ[1]} beside them")
    # Contiguous: a transposed view is not what a framework wants to own.
    return {
        slot: {name: _array(x).astype(np.float32, order="C") for name, x in arrays.items()}
        for slot, arrays in slots.items()
    }


def _from_torch(
    state_dict: Mapping[str, Any], names: Sequence[str], convert: Convert, params: Any, timm: bool
) -> RMSPropState:
    groups, states = state_dict["param_groups"], state_dict["state"]
    if any(("lr_in_momentum" in group) != timm for group in groups):
        mine, other = ("timm", "pytorch") if timm else ("pytorch", "timm")
        raise ValueError(f"these param_groups are not {mine}'s, and momentum_buffer means another thing: from_{other}")
    keys = [key for group in groups for key in group["params"]]
    if len(keys) != len(names):
        raise ValueError(f"the optimizer has {len(keys)} parameters, names has {len(names)}: {list(names)}")
    wanted = {"nu": True, "mu": any(g["centered"] for g in groups), "trace": any(g["momentum"] > 0 for g in groups)}
    entries = {name: states.get(key, {}) for key, name in zip(keys, names, strict=True)}
    slots = {
        slot: {name: _array(entry[foreign]) for name, entry in entries.items() if foreign in entry}
        for slot, foreign in PYTORCH.items()
        if wanted[slot]
    }
    count = max((int(_array(entry["step"])) for entry in entries.values() if entry), default=0)
    return _import(slots, PYTORCH, convert, count, params, names)


def _array(x: Any) -> np.ndarray:
    """Any framework's array in float64, so that E[g²] - E[g]² loses nothing more."""
    if hasattr(x, "detach"):
        x = x.detach().cpu()
        x = x if x.is_complex() else x.double()  # NumPy has no bfloat16
    x = np.asarray(x)
    if np.iscomplexobj(x):
        raise ValueError("complex accumulators: frameworks average the two halves apart, or g², we |g|²")
    return x.astype(np.float64)


def _variance(second: Any, mean: Any) -> Any:
    return (abs(second) - abs(mean) ** 2).clip(0)


def _second_moment(state: RMSPropState) -> Any:
    nu = _loaded(state.nu)
    return nu if state.mu is None else jax.tree.map(lambda v, m: v + abs(m) ** 2, nu, _loaded(state.mu))


def _loaded(tree: Any) -> Any:
    return jax.tree.map(_storage.load, tree)


def _widened(tree: Any) -> Any:
    return jax.tree.map(lambda x: jnp.asarray(x, _storage.compute_dtype(x.dtype)), tree)


def _shapes(tree: Any) -> dict[str, tuple[int, ...]]:
    return {jax.tree_util.keystr(path): np.shape(x) for path, x in jax.tree_util.tree_flatten_with_path(tree)[0]}


def _parts(state: Any, name: str) -> list[Any]:
    """The fields of that name of the named tuples in a chain's state."""
    if hasattr(state, "_fields"):
        return [getattr(state, name)] if name in state._fields else []
    return [part for inner in state for part in _parts(inner, name)] if isinstance(state, tuple) else []
