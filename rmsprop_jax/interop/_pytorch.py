"""PyTorch, timm and Stable Baselines 3: three classes of one kind of checkpoint."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from .._rmsprop import RMSPropState
from .._text import listed
from ._arrays import array, whole
from ._named import arrays_of, Convert, ConvertBack, Optimizer, somebody_else
from ._state_dict import given_names, Names, Parameter, parameters, parts_of, state_of_parameters


__all__ = ["from_pytorch", "from_stable_baselines3", "from_timm", "to_pytorch"]


def from_pytorch(
    checkpoint: Any, names: Names | None = None, convert: Convert | None = None, *, count: int | None = None
) -> RMSPropState:
    """The state of `dialects.pytorch` from `torch.optim.RMSprop`, or of `dialects.pfrl` from PFRL's classes::

        state = interop.from_pytorch(optimizer, model, convert)

    The optimizer itself and the model need no names: their tensors are the same. A `state_dict()` numbers the
    parameters in the order of the optimizer's groups, and nothing in it tells which of two layers of one shape comes
    first.

    Args:
        checkpoint: the optimizer, or its `state_dict()`. From `torch.distributed.checkpoint` it may be flattened
            (`flatten_optimizer_state_dict=True`).
        names: of the parameters. They are not needed where the checkpoint has them: from
            `RMSprop(model.named_parameters())`, or from FSDP. Otherwise one of

            * the model, or a mapping from the names to the weights, such as `dict(model.named_parameters())`, in the
              model's order. Shapes are checked, and parameters that never stepped get their first value. With several
              groups it is refused where shapes do not tell which weight is in which group.
            * a sequence of names in the order of the groups. **A wrong order of layers of one shape cannot be
              detected.** It may leave out all parameters that never stepped.
        convert: from arrays by name to a tree of parameters.
        count: of updates. `None` stands for the largest step of a parameter: PyTorch does not count the updates in
            which a parameter has no gradient.

    Returns:
        The state. With groups of different options it has every slot that one of them has, and zeros where
        others lack it: `carry_over(state, tx.init(params))` fills an :func:`optax.partition` with it, and the chain
        that `maximize` makes.

    Raises:
        ValueError: as :mod:`rmsprop_jax.interop` says, or the class of timm or of Stable Baselines 3 wrote the
            checkpoint. Stable Baselines 3's groups have the options of PyTorch before 1.12. But its averages started
            at 1, so none is below `alpha**step`: one that is, is PyTorch's. Where that is too small to tell, both
            readers accept it. Mark the groups of an old PyTorch that was taken for it: `group["foreach"] = None`.

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
    return _read(checkpoint, names, convert, count, PYTORCH)


def from_timm(
    checkpoint: Any, names: Names | None = None, convert: Convert | None = None, *, count: int | None = None
) -> RMSPropState:
    """The state of `dialects.timm` from timm's `RMSpropTF`; see :func:`from_pytorch`.

    The slots have PyTorch's names, but the buffer holds the learning rate, and averages start at 1. PyTorch
    would load this checkpoint without a warning.
    """
    return _read(checkpoint, names, convert, count, TIMM)


def from_stable_baselines3(
    checkpoint: Any, names: Names | None = None, convert: Convert | None = None, *, count: int | None = None
) -> RMSPropState:
    """The state of `dialects.stable_baselines3` from that of `RMSpropTFLike`; see :func:`from_pytorch`.

    A2C does not use this class unless you ask for it (`use_rms_prop=False` and
    `policy_kwargs={"optimizer_class": RMSpropTFLike}`): its default is PyTorch's. A saved model is a zip file with
    the optimizer in it::

        with zipfile.ZipFile("a2c.zip") as file, file.open("policy.optimizer.pth") as pth:
            checkpoint = torch.load(io.BytesIO(pth.read()), weights_only=True)
    """
    return _read(checkpoint, names, convert, count, STABLE_BASELINES3)


def to_pytorch(state: Any, names: Names, convert_back: ConvertBack) -> dict[int, dict[str, Any]]:
    """The "state" part of an optimizer's state_dict, in torch tensors; also for timm and Stable Baselines 3.

    Example::

        optimizer.load_state_dict({**optimizer.state_dict(), "state": interop.to_pytorch(state, names, back)})

    Args:
        state: of `dialects.pytorch`, `dialects.timm` or `dialects.stable_baselines3`.
        names: of the parameters, in the order of the optimizer's groups. A mapping from names to weights, or a model,
            has them in the model's order: shapes are checked, but **a wrong order of layers of one shape cannot be
            detected**. With several groups, take the names in their order::

                name_of = {p: name for name, p in model.named_parameters()}
                names = [name_of[p] for group in optimizer.param_groups for p in group["params"]]

        convert_back: from a tree of parameters to arrays by name.

    Raises:
        ValueError: `convert_back` makes other names or shapes, or does not use every accumulator.
    """
    given, weights = given_names(names)
    names = given or []
    count, slots = arrays_of(state, convert_back)
    if differ := sorted(slots["nu"].keys() ^ names):
        raise ValueError(f"names must be those that convert_back makes: check {listed(differ)}")
    shapes = {name: (x.shape, tuple(getattr(weights.get(name), "shape", x.shape))) for name, x in slots["nu"].items()}
    if differ := [
        f"{name} has {ours}, its weight {theirs}" for name, (ours, theirs) in shapes.items() if ours != theirs
    ]:
        raise ValueError(f"convert_back makes arrays of other shapes than the weights': {listed(differ, '; ')}")

    import torch

    return {
        i: {"step": torch.tensor(float(count))}
        | {SLOTS[slot]: torch.from_numpy(arrays[name]) for slot, arrays in slots.items()}
        for i, name in enumerate(names)
    }


# --- The classes ------------------------------------------------------------------------------------------

SLOTS = {"nu": "square_avg", "mu": "grad_avg", "trace": "momentum_buffer"}
NU = SLOTS["nu"]
# By options of a group, or slots of an entry, that RMSprop does not have.
OTHERS = {
    "state1": "bitsandbytes",
    "__bnb_optimizer_quant_state__": "bitsandbytes",
    "dampening": "SGD",
    "lr_decay": "Adagrad",
    "rho": "Adadelta",
    "betas": "Adam or a variant of it",
    "exp_avg": "Adam or a variant of it",
}
RMSPROP = Optimizer("RMSprop", SLOTS, others=OTHERS)
# Options of all classes of RMSprop.
OPTIONS = {"momentum", "centered"}
# Options that PyTorch gives each of its optimizers, since 1.12.
OF_PYTORCH = {"foreach", "capturable", "maximize", "differentiable"}

# Whether a group's options use a slot.
USES = {
    "nu": lambda group: True,
    "mu": lambda group: bool(group["centered"]),
    "trace": lambda group: array("momentum", group["momentum"]).item() > 0,
}


class Class(NamedTuple):
    """One of the classes whose checkpoints look like this."""

    title: str
    reader: str
    first: float  # ν before the first update


PYTORCH = Class("torch.optim.RMSprop's checkpoint", "from_pytorch", 0.0)
TIMM = Class("timm's checkpoint, whose momentum_buffer holds the learning rate", "from_timm", 1.0)
STABLE_BASELINES3 = Class(
    "the checkpoint of Stable Baselines 3's RMSpropTFLike",
    "from_stable_baselines3 (or from_pytorch if a PyTorch before 1.12 wrote it: add foreach=None to its groups)",
    1.0,
)


def _read(checkpoint: Any, names: Names | None, convert: Convert | None, count: int | None, own: Class) -> RMSPropState:
    groups, entries = parts_of(checkpoint)
    fields = {field for entry in entries.values() for field in entry}
    for group in groups:
        if not set(group) >= OPTIONS:
            raise somebody_else(RMSPROP, {*group, *fields}, sorted(group))
    found = parameters(groups, entries, names, NU)
    for i, group in enumerate(groups):
        writer = _class_of(group, [x for x in found if x.group is group and x.entry], count)
        writer = writer or (PYTORCH if own is TIMM else own)
        if writer is not own:
            raise ValueError(f"this is {writer.title}: use {writer.reader}. Group {i} has {sorted(group)}")
    used = [slot for slot, uses in USES.items() if any(map(uses, groups))]
    optimizer = RMSPROP._replace(always=used)
    return state_of_parameters(optimizer, found, lambda x: _arrays(x, used, own.first), convert, count)


def _arrays(parameter: Parameter, used: list[str], first: float) -> dict[str, Any]:
    """The accumulators of a parameter, with zeros for what other groups use and its own does not."""
    _, group, entry, _ = parameter
    if not entry:
        return {SLOTS[slot]: parameter.start(first if slot == "nu" else 0.0) for slot in used}
    idle = [slot for slot, uses in USES.items() if not uses(group)]
    own = {field: x for field, x in entry.items() if field not in ("step", *(SLOTS[slot] for slot in idle))}
    zeros = {SLOTS[slot]: np.zeros(array(NU, entry.get(NU, ())).shape) for slot in idle if slot in used}
    return own | zeros


def _class_of(group: Mapping[str, Any], stepped: list[Parameter], count: int | None) -> Class | None:
    """The class that wrote this group; None if nothing tells.

    Stable Baselines 3's groups have the options of a PyTorch before 1.12. Averages that started at 1 are at least what
    is left of it. Far above, as those of large gradients are, they tell nothing. Both classes count in integers.
    """
    if "lr_in_momentum" in group:
        return TIMM
    if OF_PYTORCH & set(group):
        return PYTORCH
    smallest = np.inf
    for name, _, entry, _ in stepped:
        step = entry.get("step")
        if "int" in str(getattr(step, "dtype", type(step))):
            # Every update rounds in float32, where this may have become zero.
            alpha = array("alpha", group.get("alpha", 0)).item() * (1 - 2.0**-22)
            try:
                left = alpha ** whole(f"step of {name}", step)
            except ValueError:
                if count is None:
                    raise
                continue  # the caller says the count
            if left > np.finfo(np.float32).tiny:
                smallest = min(smallest, array(f"{NU} of {name}", entry.get(NU, ())).min(initial=np.inf) / left)
    return PYTORCH if smallest < 1 else STABLE_BASELINES3 if smallest < 100 else None
