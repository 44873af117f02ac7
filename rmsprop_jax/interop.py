"""Carry a half-finished run over from another framework, or into another wrapper or other options, and back.

Accumulators have the names and shapes of the weights. So the function that converts your weights, from a
dict of NumPy arrays by name to a tree of parameters, converts them too::

    def convert(arrays):  # torch's Linear is (out, in), Flax's kernel (in, out)
        return {"kernel": arrays["fc.weight"].T, "bias": arrays["fc.bias"]}

    name_of = {p: name for name, p in model.named_parameters()}
    names = [name_of[p] for group in optimizer.param_groups for p in group["params"]]
    params = convert({name: p.detach().numpy() for name, p in model.named_parameters()})
    state = interop.from_pytorch(optimizer.state_dict(), names, convert, params)

Go on with the dialect of that name, its options and its schedule: the count comes along, and the run
continues as if it had never stopped. The `from_` functions return a bare :class:`RMSPropState`, in float32.
To place it inside wrappers, to keep it in fewer bytes, or to change options, continue with
`from_rmsprop(state, tx.init(params))`. The `to_` functions find our state inside any wrapper.

Two things are converted on the way. Frameworks keep E[g²] where our centered state keeps the variance
E[g²] - |E[g]|². And Optax's momentum buffer has the opposite sign of everybody else's.
"""

import functools
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.core import Tracer
from jax.tree_util import keystr, tree_flatten_with_path, tree_map_with_path

from . import _placement, _storage
from ._rmsprop import RMSPropState


Arrays = dict[str, np.ndarray]
Convert = Callable[[Arrays], Any]
ConvertBack = Callable[[Any], Mapping[str, Any]]

# Our slots by their foreign names. There, `nu` is E[g²].
PYTORCH = {"nu": "square_avg", "mu": "grad_avg", "trace": "momentum_buffer"}
KERAS = {"nu": "_velocity", "mu": "_average_gradient", "trace": "_momentum"}
TF_KERAS = {"nu": "/rms", "mu": "/mg", "trace": "/momentum"}
# TensorFlow 1 numbers the slots of a variable in the order in which it made them.
TENSORFLOW1 = {"nu": "", "trace": "_1"}
TENSORFLOW1_CENTERED = {"nu": "", "mu": "_1", "trace": "_2"}

# What the param_groups of PyTorch's other optimizers have that RMSprop's do not.
_TORCH_GROUPS = {"betas": "Adam or one of its kin", "dampening": "SGD", "lr_decay": "Adagrad", "rho": "Adadelta"}


# --- PyTorch ----------------------------------------------------------------------------------------------


def from_pytorch(
    optimizer_state_dict: Mapping[str, Any],
    names: Sequence[str] | None = None,
    convert: Convert | None = None,
    params: Any = None,
) -> RMSPropState:
    """The state of `dialects.pytorch` from `torch.optim.RMSprop(...).state_dict()`.

    Args:
        optimizer_state_dict: with its "state" and "param_groups".
        names: of the parameters, in the order of the optimizer's groups, which need not be the model's; see
            the top of this module. They may leave out all parameters that never stepped. Not needed
            where the checkpoint has names: from `RMSprop(model.named_parameters())`, or from FSDP.
        convert: from arrays by name to a tree of parameters. `None`: the dict itself.
        params: the parameters. If given, the state must have their structure and shapes. Needed for the
            shapes of parameters that never stepped, frozen or unused ones, which the optimizer does not know.

    Returns:
        The state, in float32. With groups of different options it has every slot that one of them has, and
        zeros where others lack it: `from_rmsprop(state, tx.init(params))` fills an :func:`optax.partition`,
        and the chain that `maximize` makes, too.

    Raises:
        ValueError: names, slots, shapes or structures do not fit; it lists which. Or the checkpoint is
            another optimizer's. Names of compiled or wrapped models begin with `_orig_mod.` or `module.`,
            which you strip: `name.removeprefix("module.")`.

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
    return _from_torch(optimizer_state_dict, names, convert, params, timm=False, first=0.0)


def from_timm(
    optimizer_state_dict: Mapping[str, Any],
    names: Sequence[str] | None = None,
    convert: Convert | None = None,
    params: Any = None,
) -> RMSPropState:
    """The state of `dialects.timm` from timm's `RMSpropTF(...).state_dict()`; see :func:`from_pytorch`.

    The names are PyTorch's, but the buffer holds the learning rate, and averages start at 1. PyTorch would
    load it without a word.
    """
    return _from_torch(optimizer_state_dict, names, convert, params, timm=True, first=1.0)


def from_stable_baselines3(
    optimizer_state_dict: Mapping[str, Any],
    names: Sequence[str] | None = None,
    convert: Convert | None = None,
    params: Any = None,
) -> RMSPropState:
    """The state of `dialects.stable_baselines3` from that of `RMSpropTFLike`; see :func:`from_pytorch`.

    A saved model is a zip file with the optimizer in it::

        with zipfile.ZipFile("a2c.zip") as file, file.open("policy.optimizer.pth") as pth:
            optimizer_state_dict = torch.load(io.BytesIO(pth.read()), weights_only=True)

    Averages start at 1 here. Nothing in the checkpoint tells this class from an old `torch.optim.RMSprop`,
    A2C's default: which one it was, only you know.
    """
    return _from_torch(optimizer_state_dict, names, convert, params, timm=False, first=1.0)


def to_pytorch(state: Any, names: Sequence[str], convert_back: ConvertBack) -> dict[int, dict[str, Any]]:
    """The "state" part of an optimizer's state_dict, in torch tensors; for timm and Stable Baselines 3, too.

    Example::

        optimizer.load_state_dict({**optimizer.state_dict(), "state": interop.to_pytorch(state, names, back)})

    Args:
        state: of `dialects.pytorch`, `dialects.timm` or `dialects.stable_baselines3`.
        names: of the parameters, in the order of the optimizer's groups.
        convert_back: from a tree of parameters to arrays by name.

    Raises:
        ValueError: `convert_back` does not give these names.
    """
    import torch

    bare = _bare(_collect(state))
    slots = _export(bare, convert_back, names)
    return {
        i: {"step": torch.tensor(float(bare.count))}
        | {PYTORCH[slot]: torch.from_numpy(arrays[name]) for slot, arrays in slots.items()}
        for i, name in enumerate(names)
    }


# --- Keras ------------------------------------------------------------------------------------------------


def from_keras(
    variables: Iterable[tuple[str, Any]],
    convert: Convert | None = None,
    params: Any = None,
    gradient_accumulation_steps: int | None = None,
) -> RMSPropState:
    """The state of `dialects.keras` from the variables of a Keras 3 optimizer.

    The variables of the loss scaler that `mixed_float16` puts around it, and the averaged weights of `use_ema`,
    are passed over: the update does not depend on them. For a saved model, `keras.saving.load_model` gives
    the optimizer.

    Args:
        variables: `[(v.path, v.numpy()) for v in optimizer.variables]`. Of the legacy tf.keras:
            `[(v.name, v.numpy()) for v in optimizer.variables()]`.
        convert: from arrays by name to a tree of parameters. Keras names an accumulator by the path of its
            weight, with "_" for "/": `sequential/d1/kernel` is `sequential_d1_kernel` here. `None`: the dict.
        params: the parameters. If given, the state must have their structure and shapes.
        gradient_accumulation_steps: what the optimizer got. Needed where it has accumulators.

    Raises:
        ValueError: names, slots, shapes or structures do not fit; it lists which. Or the variables are
            another optimizer's.

    Example:
        >>> variables = [("rmsprop/iteration", 7), ("rmsprop/d1_kernel_velocity", np.ones(2))]
        >>> int(from_keras(variables, lambda arrays: {"kernel": arrays["d1_kernel"]}).count)
        7

    References:
        keras/src/optimizers/rmsprop.py and base_optimizer.py, 3.15.1.
    """
    found = {path.removesuffix(":0"): value for path, value in _unique(variables).items()}
    legacy = any(path.endswith(TF_KERAS["nu"]) for path in found)
    suffixes = TF_KERAS if legacy else KERAS
    accumulators: dict[tuple[str, str], str] = {}  # paths by slot and weight
    counts: dict[str, int] = {}  # by scope: a loss scaler has one, too
    scope, half_filled, unknown = "", [], []
    for path, value in found.items():
        prefix, _, name = path.partition("/") if legacy else path.rpartition("/")
        slot = next((slot for slot, suffix in suffixes.items() if path.endswith(suffix)), None)
        if slot:
            scope, key = prefix, (slot, name.removesuffix(suffixes[slot]))
            if key in accumulators:
                raise ValueError(f"two accumulators of one name cannot be told apart: {accumulators[key]} and {path}")
            accumulators[key] = path
        elif name in ("iteration", "iter"):
            counts[prefix] = int(_array(value))
        elif name.endswith("_gradient_accumulator"):
            half_filled.append(path)
        elif not name.endswith("_average") and name not in ("learning_rate", "step_counter", "dynamic_scale"):
            unknown.append(path)
    optimizer = re.sub(r"_\d+$", "", (scope or next(iter(found), "")).partition("/")[0]).lower()
    order = [slot for slot, _ in accumulators]
    # Adam, too, has a velocity and a momentum, but makes the momentum first.
    if unknown or order[:1] != ["nu"] or optimizer in _KERAS_OTHERS:
        raise ValueError(f"not the variables of Keras' RMSprop, but of {optimizer}: {_listed(unknown or found)}")
    if bool(half_filled) != (gradient_accumulation_steps is not None):
        raise ValueError(
            f"gradient_accumulation_steps={gradient_accumulation_steps}, but the optimizer has {len(half_filled)} "
            "gradient accumulators: pass what the optimizer got"
        )
    count, rest = divmod(counts.get(scope, 0), gradient_accumulation_steps or 1)
    if rest:
        raise ValueError(f"{rest} of {gradient_accumulation_steps} gradients are accumulated: save after an update")
    columns: dict[str, Arrays] = {slot: {} for slot in order}
    for (slot, weight), path in accumulators.items():
        columns[slot][weight] = _array(found[path])
    return _import(columns, {slot: suffix[1:] for slot, suffix in suffixes.items()}, convert, count, params)


_KERAS_OTHERS = ("adam", "adamw", "nadam", "adamax", "sgd", "adagrad", "adadelta", "ftrl", "lion", "lamb", "muon")


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
    bare = _bare(_collect(state))
    slots = _export(bare, convert_back)
    named = [(name + KERAS[slot], x) for slot, arrays in slots.items() for name, x in arrays.items()]
    return [("iteration", np.asarray(bare.count)), *named]


# --- TensorFlow 1 -----------------------------------------------------------------------------------------


def from_tensorflow1(
    slots: Mapping[str, Any],
    convert: Convert | None = None,
    count: int = 0,
    params: Any = None,
    name: str = "RMSProp",
) -> RMSPropState:
    """The state of `dialects.tensorflow1` from a TensorFlow 1 checkpoint.

    All variables of the checkpoint may be there: weights, moving averages and other optimizers' slots are
    passed over::

        reader = tf.train.load_checkpoint(directory)
        slots = {key: reader.get_tensor(key) for key in reader.get_variable_to_shape_map()}

    Args:
        slots: arrays by name. `w/RMSProp` is the mean square and `w/RMSProp_1` the momentum or, when centered,
            `w/RMSProp_1` the mean and `w/RMSProp_2` the momentum.
        convert: from arrays by name (`"w"`) to a tree of parameters. `None`: the dict itself.
        count: of updates, for a schedule. 0 stands for the checkpoint's `global_step`, if it has one.
        params: the parameters. If given, the state must have their structure and shapes.
        name: the optimizer's name, if it got another.

    Returns:
        The state. TensorFlow makes the momentum slot even for a momentum of zero. Without momentum, go
        on with `state._replace(trace=None)`.

    Raises:
        ValueError: names, slots, shapes or structures do not fit; it lists which. Or there are no such slots.

    Example:
        >>> slots = {"w/RMSProp": np.ones(2), "w/RMSProp_1": np.zeros(2)}
        >>> from_tensorflow1(slots, lambda arrays: arrays).trace
        {'w': Array([0., 0.], dtype=float32)}
    """
    matches = {key: re.fullmatch(rf"(.+)/{re.escape(name)}(|_1|_2)(?::0)?", key) for key in slots}
    found = {key: match for key, match in matches.items() if match}
    if not found:
        raise ValueError(f"no slots of {name}, which are called */{name}, */{name}_1 and */{name}_2: {_listed(slots)}")
    centered = any(match[2] == "_2" for match in found.values())
    table = TENSORFLOW1_CENTERED if centered else TENSORFLOW1
    slot_of = {suffix: slot for slot, suffix in table.items()}
    columns: dict[str, Arrays] = {slot: {} for slot in table}
    for key, match in found.items():
        columns[slot_of[match[2]]][match[1]] = _array(slots[key])
    step = next((slots[key] for key in ("global_step", "global_step:0") if key in slots), 0)
    foreign = {slot: name + suffix for slot, suffix in table.items()}
    return _import(columns, foreign, convert, count or int(_array(step)), params)


def to_tensorflow1(state: Any, convert_back: ConvertBack, name: str = "RMSProp") -> Arrays:
    """Values for the slot variables of TensorFlow 1, by their names in a checkpoint.

    Args:
        state: of `dialects.tensorflow1`.
        convert_back: from a tree of parameters to arrays by name.
        name: the optimizer's name, if it has another.
    """
    bare = _bare(_collect(state))
    slots = _export(bare, convert_back)
    # TensorFlow has its momentum slot whether it is used or not.
    slots.setdefault("trace", {key: np.zeros_like(x) for key, x in slots["nu"].items()})
    table = TENSORFLOW1 if bare.mu is None else TENSORFLOW1_CENTERED
    return {f"{key}/{name}{table[slot]}": x for slot, arrays in slots.items() for key, x in arrays.items()}


# --- Optax, and ours --------------------------------------------------------------------------------------


def from_optax(state: Any, like: Any = None) -> Any:
    """Our state from that of `optax.rmsprop` or `optax.scale_by_rms`, inside any wrapper.

    Args:
        state: Optax's. Without a schedule and without bias correction Optax does not count; then the count is
            that of the wrapper, if one counts, or zero.
        like: what the result shall look like: `tx.init(params)` with the same options as Optax's, in the
            same or other wrappers; see :func:`from_rmsprop`. `None`: a bare :class:`RMSPropState`.

    Raises:
        ValueError: there is no second moment in it, or it and `like` do not fit; it lists what.

    Example:
        >>> import jax.numpy as jnp, optax
        >>> from rmsprop_jax import interop, rmsprop
        >>> state = optax.rmsprop(0.1, momentum=0.9).init(jnp.zeros(2))
        >>> updates, _ = rmsprop(0.1, momentum=0.9).update(jnp.ones(2), interop.from_optax(state))
    """
    collected = _collect(state)
    if like is not None:
        return _fill(collected, like, same_options=True)
    _check_nothing_lost(collected.others, "a bare state has no place for it, `like` may have one")
    return _bare(collected)


def to_optax(state: Any, like: Any) -> Any:
    """Optax's state from ours, inside any wrapper.

    Args:
        state: ours.
        like: what the result shall look like: `optax.rmsprop(...).init(params)`, with the same options; see
            :func:`from_rmsprop`.

    Raises:
        ValueError: the two do not fit; it lists what.
    """
    return _fill(_collect(state), like, same_options=True)


def from_rmsprop(state: Any, like: Any) -> Any:
    """Our state, for a transformation with other options or in other wrappers.

    The accumulators of `state`, wherever they are in it, go to the places in `like` that have the same
    path below the parameters. Masked places are left out. An accumulator that is new starts from
    zero; one that is gone is dropped, with the mean going back into E[g²]. A buffer means something else
    with another `lr_in_momentum`: that is not converted.

    The states of wrappers, such as counters and accumulated gradients, are kept where both have the wrapper;
    a new wrapper starts as in `like`. Injected hyperparameters are those of `like`.

    Args:
        state: ours, or one that has ours inside: of `optax.chain`, `MultiSteps`, `inject_hyperparams`, `masked`,
            `partition`, `apply_if_finite`, `lookahead`.
        like: what the result shall look like: `tx.init(params)`, or `jax.eval_shape(tx.init, params)`.

    Returns:
        A state with the structure, shapes, dtypes and shardings of `like`.

    Raises:
        ValueError: paths or shapes differ, `state` has no RMSProp state, or it has something, such as half
            accumulated gradients, that `like` has no place for. It lists the paths.

    Example:
        >>> import jax.numpy as jnp
        >>> from rmsprop_jax import interop, rmsprop
        >>> params = jnp.array([1.0, 2.0])
        >>> _, state = rmsprop(0.1).update(params, rmsprop(0.1).init(params))
        >>> lean = rmsprop(0.1, momentum=0.9, state_dtype=jnp.uint8)
        >>> state = interop.from_rmsprop(state, lean.init(params))
        >>> int(state.count), state.nu.dtype, state.trace
        (1, dtype('uint8'), Array([0, 0], dtype=int8))
    """
    return _fill(_collect(state), like, same_options=False)


# --- Collect and fill -------------------------------------------------------------------------------------

_Path = tuple[Any, ...]
# Which array of a wrapper: the type of its NamedTuple, the field, and the path below.
_Key = tuple[Any, str, str]


class _Collected(NamedTuple):
    state: RMSPropState  # all as one; MaskedNode where nothing was found; `count` is None where nobody counted
    others: dict[_Key, list[tuple[str, Any]]]  # what wrappers hold, with its location


def _collect(state: Any) -> _Collected:
    """All RMSProp states inside `state` as one, and everything else."""
    states: dict[str, RMSPropState] = {}
    others: dict[_Key, list[tuple[str, Any]]] = {}

    def visit(key: _Key, location: str, x: Any) -> Any:
        if _is_rmsprop(x):
            states[location] = _read(x)
        else:
            others.setdefault(key, []).append((location, x))
        return x

    _walk(state, visit)
    if not states:
        kinds = {getattr(kind, "__name__", "other arrays") for kind, *_ in others}
        raise ValueError(
            f"no state of RMSProp in this {type(state).__name__}: it holds {_listed(sorted(kinds)) or 'nothing'}. "
            "(Restored from a checkpoint as a dict, it is RMSPropState(**kept).)"
        )
    counts = [s.count for s in states.values() if s.count is not None]
    if not all(_equal(count, counts[0]) for count in counts):
        raise ValueError(f"the groups have different counts: {[int(count) for count in counts]}")
    trees = {}
    for slot in RMSPropState._fields[1:]:
        found = {location: getattr(s, slot) for location, s in states.items()}
        if all(tree is None for tree in found.values()):
            continue
        absent = {location: jax.tree.map(lambda _: optax.MaskedNode(), s.nu) for location, s in states.items()}
        trees[slot] = _merge({k: absent[k] if tree is None else tree for k, tree in found.items()}, slot)
    return _Collected(RMSPropState(counts[0] if counts else None, **trees), others)  # pyright: ignore[reportArgumentType]


def _bare(collected: _Collected) -> RMSPropState:
    """The collected state as our update takes it: zeros where only other groups have a slot."""
    state = collected.state
    trees = {
        slot: tree if slot == "nu" or tree is None else jax.tree.map(_or_zeros, state.nu, tree, is_leaf=_is_masked)
        for slot, tree in state._asdict().items()
        if slot != "count"
    }
    return RMSPropState(jnp.asarray(_count(collected), jnp.int32), trees["nu"], trees["mu"], trees["trace"])


def _fill(collected: _Collected, like: Any, same_options: bool) -> Any:
    """`like`, with what was collected in every RMSProp state in it, and in the wrappers that both have."""
    old = {slot: _by_path(tree) for slot, tree in collected.state._asdict().items() if slot != "count"}
    count, (_, counting) = _count(collected), _optax_types()
    problems: list[str] = []
    filled: set[_Path] = set()
    left_out: set[_Path] = set()
    places: dict[_Key, int] = {}
    new_places: list[str] = []
    taken: dict[_Key, int] = {}

    def number(key: _Key, location: str, x: Any) -> Any:
        places[key] = places.get(key, 0) + 1
        new_places.extend([location] if _is_rmsprop(x) else [])
        return x

    def fresh(x: Any, where: str, zero: bool = False) -> Any:
        """What only `like` has."""
        if not isinstance(x, jax.ShapeDtypeStruct):
            return x
        if not zero:
            problems.append(f"like has only the shape of {where}, and state has no value for it")
        return _placement.place_like(jnp.zeros(x.shape, x.dtype), x)

    def same_shape(value: Any, x: Any, where: str) -> bool:
        if np.shape(value) != np.shape(x):
            problems.append(f"{where} has shape {np.shape(value)} in state and {np.shape(x)} in like")
        return np.shape(value) == np.shape(x)

    def accumulator(slot: str, path: _Path, x: Any, theirs: bool, centered: bool, location: str) -> Any:
        where = f"{location}.{slot}{keystr(path)}"
        nu, value = old["nu"].get(path), old[slot].get(path)
        if nu is None or _is_masked(nu):
            if not _below(path, (p for p, y in old["nu"].items() if _is_masked(y))):
                problems.append(f"state has nothing for {where}")
            return fresh(x, where)
        filled.add(path)
        if same_options and (value is None or _is_masked(value)):
            problems.append(f"state has nothing for {where}: the options differ")
        if not same_shape(nu, x, where):
            return x
        if value is None or _is_masked(value):
            return fresh(x, where, zero=True)
        mu = old["mu"].get(path)
        if slot == "nu" and mu is not None and not _is_masked(mu) and (theirs or not centered):
            value = _second_moment(value, mu)
        if slot == "trace" and theirs:
            value = -_storage.decode(value)
        return _placement.place_like(_converted(value, x.dtype, count, slot), x)

    def visit(key: _Key, location: str, x: Any) -> Any:
        if _is_rmsprop(x):
            new = _fields(x)
            nu = _by_path(new.nu)
            left_out.update(path for path, y in nu.items() if _is_masked(y))
            if same_options:
                surplus = {s for s in ("mu", "trace") if getattr(new, s) is None and _live(old[s]) & _live(nu)}
                problems.extend(f"like has no {location}.{slot}: the options differ" for slot in surplus)
            trees = {
                slot: tree_map_with_path(
                    lambda path, y, slot=slot: accumulator(
                        slot, path, y, not isinstance(x, RMSPropState), new.mu is not None, location
                    ),
                    tree,
                )
                for slot, tree in new._asdict().items()
                if slot != "count" and tree is not None
            }
            new_count = jax.tree.map(
                lambda y: _like(count, y) if same_shape(count, y, f"{location}.count") else y, new.count
            )
            return _with_fields(x, {"count": new_count, **trees})
        found = others.get(key, []) if key[1] != "hyperparams" else []
        if not found:  # a new wrapper: its schedule goes on where the run is
            return _like(count, x) if key[:2] in counting else fresh(x, location)
        taken[key] = taken.get(key, 0) + 1
        if len(found) == places[key]:
            where, value = found[taken[key] - 1]
        elif all(_equal(value, found[0][1]) for _, value in found):
            where, value = found[0]
        else:
            problems.append(f"state has {len(found)} values for {location}, which differ")
            return x
        return _like(value, x) if same_shape(value, x, where) else x

    others = collected.others
    _walk(like, number)
    result = _walk(like, visit)
    if not new_places:
        raise ValueError(f"no state of RMSProp in like, which is a {type(like).__name__}")
    lost = [path for path in _live(old["nu"]) - filled if not _below(path, left_out)]
    problems += [f"like has no place for {keystr(path)}" for path in sorted(lost, key=keystr)]
    if problems:
        raise ValueError(f"state and like do not fit: {_listed(problems, '; ')}")
    _check_nothing_lost({key: found for key, found in others.items() if key not in places}, "like has no place for it")
    return result


def _walk(
    tree: Any,
    visit: Callable[[_Key, str, Any], Any],
    owner: tuple[Any, str] = (None, ""),
    location: str = "",
) -> Any:
    """`tree` with each array, and each state of RMSProp, replaced by visit(key, location, it)."""

    def leaf(path: Any, x: Any) -> Any:
        here = location + keystr(path)
        if _is_rmsprop(x) or not _is_namedtuple(x):
            return visit((*owner, keystr(path)), here, x)
        return type(x)(*(_walk(getattr(x, name), visit, (type(x), name), f"{here}.{name}") for name in x._fields))

    return tree_map_with_path(leaf, tree, is_leaf=lambda x: _is_rmsprop(x) or _is_namedtuple(x))


@functools.cache
def _optax_types() -> tuple[tuple[type, ...], frozenset[tuple[type, str]]]:
    """The states with a second moment in Optax, and the fields of others that count updates.

    Optax does not export all of these types. They are made on first use: importing must not compute anything.
    """
    second_moments = [
        type(make(bias_correction=flag).init(()))
        for make in (optax.scale_by_rms, optax.scale_by_stddev)
        for flag in (False, True)
    ]
    injected: Any = optax.inject_hyperparams(optax.sgd)(optax.constant_schedule(1.0)).init(jnp.zeros(()))
    counting = [(type(injected), "count"), (type(injected.hyperparams_states["learning_rate"]), "count")]
    counting += [(optax.ScaleByScheduleState, "count"), (optax.MultiStepsState, "gradient_step")]
    return tuple(second_moments), frozenset(counting)


def _is_namedtuple(x: Any) -> bool:
    return isinstance(x, tuple) and hasattr(x, "_fields")


def _is_rmsprop(x: Any) -> bool:
    """Whether this is a state of ours, or of optax.scale_by_rms, optax.scale_by_stddev or optax.rmsprop."""
    second_moments, _ = _optax_types()
    if type(x) is tuple:  # optax.rmsprop: second moment, learning rate, momentum
        parts = second_moments, (optax.EmptyState, optax.ScaleByScheduleState), (optax.EmptyState, optax.TraceState)
        return len(x) == 3 and all(map(isinstance, x, parts))
    return isinstance(x, (RMSPropState, *second_moments))


def _fields(node: Any) -> RMSPropState:
    """The fields of such a state under our names, as they are."""
    parts = node if type(node) is tuple else (node,)
    fields = {name: value for part in reversed(parts) for name, value in part._asdict().items()}
    return RMSPropState(**{"count": None} | fields)  # pyright: ignore[reportArgumentType] (Optax may not count)


def _with_fields(node: Any, values: Mapping[str, Any]) -> Any:
    """The reverse of `_fields`."""
    parts = node if type(node) is tuple else (node,)
    new = tuple(part._replace(**{name: x for name, x in values.items() if name in part._fields}) for part in parts)
    return new if type(node) is tuple else new[0]


def _read(node: Any) -> RMSPropState:
    """Such a state, with our variance and our sign of the trace."""
    state = _fields(node)
    # Flax NNX wraps every array: what is in there is the only leaf.
    state = state._replace(count=next(iter(jax.tree.leaves(state.count)), None))
    if isinstance(node, RMSPropState):
        return state
    nu = _wide(jax.tree.map(jnp.real, state.nu))  # complex there, with an imaginary part of zero
    return RMSPropState(
        count=state.count,
        nu=nu if state.mu is None else jax.tree.map(_variance, nu, _wide(state.mu)),
        mu=None if state.mu is None else _wide(state.mu),
        trace=None if state.trace is None else jax.tree.map(jnp.negative, _wide(state.trace)),
    )


def _merge(trees: Mapping[str, Any], slot: str, path: str = "") -> Any:
    """One tree of those that groups have, in each of which MaskedNode stands for the others' parameters."""
    live = {location: tree for location, tree in trees.items() if not _is_masked(tree)}
    if len(live) < 2:
        return next(iter(live.values()), optax.MaskedNode())
    columns, treedefs = [], []
    for tree in live.values():
        children, treedef = tree_flatten_with_path(tree, is_leaf=lambda x, tree=tree: x is not tree)  # one level
        columns.append(children)
        treedefs.append(treedef)
    where = f"{slot}{path}"
    if jax.tree_util.treedef_is_leaf(treedefs[0]):
        raise ValueError(f"{len(live)} accumulators for {where}: {_listed(location or 'top' for location in live)}")
    if any(treedef != treedefs[0] for treedef in treedefs):
        raise ValueError(f"states of different structures at {where}: {_listed(live)}")
    return treedefs[0].unflatten(
        _merge(dict(zip(live, [x for _, x in row], strict=True)), slot, path + keystr(row[0][0]))
        for row in zip(*columns, strict=True)
    )


def _check_nothing_lost(others: Mapping[_Key, list[tuple[str, Any]]], advice: str) -> None:
    for (kind, field, path), found in others.items():
        if kind is optax.MultiStepsState:
            half = field == "mini_step" and any(not isinstance(x, Tracer) and int(x) > 0 for _, x in found)
            lost = [f"{where}, gradients of half an update" for where, _ in found] if half else []
        elif field == "hyperparams":
            lost = []
        else:  # counters may go with their wrapper; averages may not
            lost = [where for where, x in found if jnp.issubdtype(x.dtype, jnp.inexact) and (path or np.ndim(x))]
        if lost:
            raise ValueError(f"state also holds {_listed(lost)}: {advice}")


def _count(collected: _Collected) -> Any:
    """Updates made so far."""
    if collected.state.count is not None:
        return collected.state.count
    _, counting = _optax_types()
    counts = [x for key, found in collected.others.items() if key[:2] in counting for _, x in found]
    return max(counts, key=lambda x: 0 if isinstance(x, Tracer) else int(x), default=jnp.zeros((), jnp.int32))


def _converted(value: Any, dtype: Any, count: Any, slot: str) -> jax.Array:
    """An accumulator kept in another dtype."""
    return _storage.recode(value, dtype, count, f"interop.{slot}")


def _like(value: Any, x: Any) -> Any:
    return _placement.place_like(jnp.asarray(value, x.dtype), x)


def _by_path(tree: Any) -> dict[_Path, Any]:
    return dict(tree_flatten_with_path(tree, is_leaf=_is_masked)[0])


def _live(column: Mapping[_Path, Any]) -> set[_Path]:
    return {path for path, x in column.items() if not _is_masked(x)}


def _below(path: _Path, prefixes: Iterable[_Path]) -> bool:
    return any(path[: len(prefix)] == prefix for prefix in prefixes)


def _is_masked(x: Any) -> bool:
    return isinstance(x, optax.MaskedNode)


def _or_zeros(nu: Any, x: Any) -> Any:
    return jnp.zeros_like(_storage.decode(nu)) if _is_masked(x) and not _is_masked(nu) else x


def _equal(x: Any, y: Any) -> bool:
    """Whether two values are equal, as far as they may be looked at."""
    return isinstance(x, Tracer) or isinstance(y, Tracer) or np.array_equal(x, y)


def _wide(tree: Any) -> Any:
    return jax.tree.map(lambda x: jnp.asarray(x, _storage.compute_dtype(x.dtype)), tree)


def _variance(second: Any, mean: Any) -> Any:
    return (abs(second) - abs(mean) ** 2).clip(0)


def _second_moment(nu: Any, mu: Any) -> Any:
    return _storage.decode(nu) + abs(_storage.decode(mu)) ** 2


# --- One way in and one way out for all frameworks --------------------------------------------------------


class _Unknown:
    """Stands for the accumulator of a parameter that never stepped, whose shape the checkpoint does not know."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return self

    def __call__(self, *_: Any, **__: Any) -> "_Unknown":
        return self

    __getitem__ = __call__


def _import(
    slots: Mapping[str, Arrays],
    foreign: Mapping[str, str],
    convert: Convert | None,
    count: int,
    params: Any,
    stepped: Iterable[str] = (),
    unstepped: Sequence[str] = (),
    first: float = 0.0,
) -> RMSPropState:
    """A state from arrays by our slots and by the weights' names; `foreign` has the slots' own names."""
    names = sorted(set(stepped).union(*slots.values()))
    lacking = {foreign[slot]: [name for name in names if name not in arrays] for slot, arrays in slots.items()}
    lacking = {slot: missing for slot, missing in lacking.items() if missing}
    if lacking or not names:
        raise ValueError(f"the checkpoint lacks {lacking or list(foreign.values())}")
    if unstepped and params is None:
        raise ValueError(
            f"{_listed(unstepped)} never stepped, and the checkpoint does not know their shapes: give params, or "
            "names and a convert without them"
        )
    unknown: dict[str, Any] = {name: _Unknown() for name in unstepped}

    def converted(arrays: Mapping[str, Any]) -> Any:
        arrays = dict(arrays) | unknown
        if convert is None:
            return arrays
        try:
            return convert(arrays)
        except KeyError as error:
            hint = "; strip prefixes as `module.` in convert" if any("." in name for name in names) else ""
            raise ValueError(f"convert asks for {error}, the checkpoint has {[*names, *unstepped]}{hint}") from error

    _check_convert(converted, slots["nu"])
    # What does not train has no state.
    wanted = jax.tree.map(lambda p: p if jnp.issubdtype(getattr(p, "dtype", type(p)), jnp.inexact) else None, params)
    shapes = {path: np.shape(p) for path, p in _by_path(wanted).items()}

    def tree(slot: str) -> Any:
        out = converted(slots[slot])
        if params is not None:
            found = {k: shapes.get(k) if isinstance(x, _Unknown) else np.shape(x) for k, x in _by_path(out).items()}
            wrong = {keystr(k): (found.get(k), shapes.get(k)) for k in found | shapes if found.get(k) != shapes.get(k)}
            if wrong:
                raise ValueError(f"{foreign[slot]} does not fit the parameters, (its shape, the parameter's): {wrong}")
            if jax.tree.structure(out) != jax.tree.structure(wanted):
                ours, theirs = jax.tree.structure(out), jax.tree.structure(wanted)
                raise ValueError(f"{foreign[slot]} has the structure {ours}, the parameters have {theirs}")
        start = first if slot == "nu" else 0.0
        return tree_map_with_path(lambda path, x: np.full(shapes[path], start) if isinstance(x, _Unknown) else x, out)

    trees = {slot: tree(slot) for slot in slots}
    if "mu" in trees:
        trees["nu"] = jax.tree.map(_variance, trees["nu"], trees["mu"])
    arrays = {slot: jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), tree) for slot, tree in trees.items()}
    return RMSPropState(count=jnp.asarray(count, jnp.int32), **arrays)


def _check_convert(convert: Callable[[Arrays], Any], arrays: Arrays) -> None:
    """Raises unless each element of `arrays` comes out of `convert`: it is given each array's number in its place."""
    base, names = 100, list(arrays)  # small enough for a convert that casts to bfloat16
    found: Any = 0
    for k in range(max(1, math.ceil(math.log(len(names), base)))):
        numbers = {name: np.full(arrays[name].shape, 1.0 + i // base**k % base) for i, name in enumerate(names)}
        leaves = [x for x in jax.tree.leaves(convert(numbers)) if not isinstance(x, _Unknown)]
        flat = np.concatenate([np.zeros(0), *(np.ravel(np.asarray(x)).astype(np.float64) for x in leaves)])
        found = found + (flat - 1) * base**k
    times = {name: int((found == i).sum()) for i, name in enumerate(names)}
    forgotten = [name for name in names if times[name] < arrays[name].size]
    repeated = [name for name in names if times[name] > arrays[name].size]
    if forgotten:
        also = f", and uses more than once {repeated}" if repeated else ""
        raise ValueError(f"convert leaves out, or changes the values of, {forgotten}{also}")


def _export(state: RMSPropState, convert_back: ConvertBack, names: Sequence[str] | None = None) -> dict[str, Arrays]:
    """Arrays by our slots and by the weights' names; `nu` is E[g²]."""
    if masked := [keystr(path) for path, x in _by_path(state.nu).items() if _is_masked(x)]:
        raise ValueError(f"the state has no accumulators for {_listed(masked)}, which were masked")
    trees = {slot: jax.tree.map(lambda x: _storage.decode(x), getattr(state, slot)) for slot in PYTORCH}
    if state.mu is not None:
        trees["nu"] = jax.tree.map(_second_moment, state.nu, state.mu)
    slots = {slot: convert_back(tree) for slot, tree in trees.items() if tree is not None}
    if names is not None and (set(slots["nu"]) != set(names) or len(set(names)) != len(names)):
        differ = [sorted(set(names) - set(slots["nu"])), sorted(set(slots["nu"]) - set(names))]
        raise ValueError(f"convert_back lacks {differ[0]} of names, and has {differ[1]} beside them")
    # Contiguous: a framework does not want to own a transposed view.
    return {
        slot: {name: _array(x).astype(np.float32, order="C") for name, x in arrays.items()}
        for slot, arrays in slots.items()
    }


def _from_torch(
    state_dict: Mapping[str, Any],
    names: Sequence[str] | None,
    convert: Convert | None,
    params: Any,
    timm: bool,
    first: float,
) -> RMSPropState:
    if not {"state", "param_groups"} <= set(state_dict):
        raise ValueError(f"not the state_dict of an optimizer, with state and param_groups: {_listed(state_dict)}")
    groups, entries = state_dict["param_groups"], state_dict["state"]
    for group in groups:
        if not {"momentum", "centered"} <= set(group):
            kind = next((kind for field, kind in _TORCH_GROUPS.items() if field in group), "another optimizer")
            raise ValueError(f"this checkpoint is not RMSprop's but that of {kind}: its groups have {sorted(group)}")
        if ("lr_in_momentum" in group) != timm:
            mine, other = ("timm", "pytorch") if timm else ("pytorch", "timm")
            raise ValueError(f"these groups are not {mine}'s, and momentum_buffer means something else: from_{other}")
    group_of = {key: group for group in groups for key in group["params"]}
    known = {"step", *PYTORCH.values()}
    for key, entry in entries.items():
        if key not in group_of or not set(entry) <= known:
            raise ValueError(f"not RMSprop's state: entry {key!r} has {sorted(entry)}, allowed are {sorted(known)}")
    name_of = _torch_names(groups, [key for key in group_of if entries.get(key)], names)

    wants = {
        "nu": lambda group: True,
        "mu": lambda group: bool(group["centered"]),
        "trace": lambda group: float(_array(group["momentum"])) > 0,
    }
    slots: dict[str, Arrays] = {}
    for slot, wanted in wants.items():
        if not any(map(wanted, groups)):
            continue
        slots[slot] = {}
        for key, name in name_of.items():
            entry = entries.get(key)
            if not entry or PYTORCH["nu"] not in entry:
                continue
            if not wanted(group_of[key]):
                slots[slot][name] = np.zeros(_array(entry[PYTORCH["nu"]]).shape)
            elif PYTORCH[slot] in entry:
                slots[slot][name] = _array(entry[PYTORCH[slot]])
    stepped = [name for key, name in name_of.items() if entries.get(key)]
    unstepped = [name for key, name in name_of.items() if not entries.get(key)]
    count = max((int(_array(entry.get("step", 0))) for entry in entries.values() if entry), default=0)
    return _import(slots, PYTORCH, convert, count, params, stepped, unstepped, first)


def _torch_names(groups: Sequence[Mapping[str, Any]], stepped: Sequence[Any], names: Any) -> dict[Any, str]:
    """The names of the keys under which the optimizer has its parameters."""
    keys = [key for group in groups for key in group["params"]]
    stored = [name for group in groups for name in group.get("param_names") or ()]
    if all(isinstance(key, str) for key in keys):
        stored = keys
    for what, items in (("the checkpoint has a parameter", keys), ("names has a name", list(names or ()))):
        if twice := [item for item in dict.fromkeys(items) if items.count(item) > 1]:
            raise ValueError(f"{what} more than once: {_listed(twice)}")
    if len(stored) == len(keys):
        by_key = dict(zip(keys, stored, strict=True))
        some = {key: by_key[key] for key in stepped}
        if names is None or list(names) == stored:
            return by_key
        if list(names) == list(some.values()):
            return some
        raise ValueError(f"the checkpoint names its parameters {stored}, which names contradicts: {list(names)}")
    if names is None:
        raise ValueError("the checkpoint does not name its parameters: give names, in the order of its groups")
    if len(names) not in (len(keys), len(stepped)):
        raise ValueError(
            f"the optimizer has {len(keys)} parameters, of which {len(stepped)} have stepped; names has {len(names)}: "
            f"{list(names)}"
        )
    return dict(zip(keys if len(names) == len(keys) else stepped, names, strict=True))


def _array(x: Any) -> np.ndarray:
    """Any framework's array in float64, so that E[g²] - E[g]² loses nothing more."""
    if hasattr(x, "detach"):
        x = x.detach().cpu()
        x = x if x.is_complex() else x.double()  # NumPy has no bfloat16
    x = np.asarray(x)
    if np.iscomplexobj(x):
        raise ValueError("complex accumulators: frameworks average the two halves apart, or g², and we |g|²")
    return x.astype(np.float64)


def _unique(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for path, value in pairs:
        if path in found:
            raise ValueError(f"two variables of one path cannot be told apart: {path} and {path}")
        found[path] = value
    return found


def _listed(items: Iterable[Any], separator: str = ", ", limit: int = 8) -> str:
    items = [str(item) for item in items]
    more = f"{separator}and {len(items) - limit} more" if len(items) > limit else ""
    return separator.join(items[:limit]) + more
