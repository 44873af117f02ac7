"""bitsandbytes: entries like PyTorch's, with the average in 32 bits or in blocks of 8-bit codes."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from .._rmsprop import RMSPropState
from ._named import array, Convert
from ._pytorch import from_pytorch, Names, parts_of


# Newer versions hide the arrays of an entry from FSDP under this key.
HIDDEN = "__bnb_optimizer_quant_state__"

# So many codes share a scale: 2048 until 2024, 256 since.
BLOCKS = (256, 2048)

# What RMSprop's groups would have in PyTorch. A momentum is accepted, and ignored.
OPTIONS = {"momentum": 0, "centered": False, "foreach": None}


def from_bitsandbytes(
    optimizer_state_dict: Mapping[str, Any], names: Names | None = None, convert: Convert | None = None
) -> RMSPropState:
    """The state of `dialects.bitsandbytes` from `bitsandbytes.optim.RMSprop(...).state_dict()`, in 32 bits or in 8.

    In 8 bits every element of ν is a code of a table, times the largest ν of the element's block::

        nu = qmap1[state1] * absmax1[i // length]

    Small tensors are in 32 bits all the same. The state is in float32:
    `from_rmsprop(state, tx.init(params))` keeps it in one byte again, if `tx` has `state_dtype="uint8"`.

    Args:
        optimizer_state_dict: with its "state" and "param_groups".
        names: of the parameters; see :func:`from_pytorch`.
        convert: from arrays by name to a tree of parameters. `None`: the dict itself.

    Raises:
        ValueError: names or shapes do not fit; the error lists which. Or the checkpoint is another optimizer's.
            The groups of RMSprop, Adagrad, SGD, LARS and Lion have the same options: Adagrad has a decay of 0, the
            others an eps of 0. From an RMSprop with an eps of 0, set it to 1e-38 in the groups.

    Example:
        >>> groups = [{"params": [0], "betas": (0.99, 0), "eps": 1e-8}]
        >>> codes, table = np.array([[255, 0]], np.uint8), np.linspace(0, 1, 256)
        >>> entry = {"step": 7, "state1": codes, "qmap1": table, "absmax1": np.array([0.5])}
        >>> from_bitsandbytes({"state": {0: entry}, "param_groups": groups}, ["w"]).nu
        {'w': Array([[0.5, 0. ]], dtype=float32)}

    References:
        bitsandbytes/optim/optimizer.py, 0.50.2.
    """
    groups, entries = parts_of(optimizer_state_dict)
    entries = {key: {**entry, **entry.get(HIDDEN, {})} for key, entry in entries.items()}
    _check_is_rmsprop(groups, entries)
    read = {key: _as_pytorch(key, entry) for key, entry in entries.items() if entry}
    like_pytorch = {"state": read, "param_groups": [{**group, **OPTIONS} for group in groups]}
    return from_pytorch(like_pytorch, names, convert)


def _check_is_rmsprop(groups: list[Mapping[str, Any]], entries: Mapping[Any, Mapping[str, Any]]) -> None:
    """Raises if another optimizer, or PyTorch, wrote the checkpoint."""
    for i, group in enumerate(groups):
        fields = sorted(set(group) - {"params", "param_names"})
        if not {"betas", "eps"} <= set(group) or not all("state1" in entry for entry in entries.values() if entry):
            raise ValueError(
                f"not a checkpoint of bitsandbytes, but perhaps one of PyTorch: from_pytorch (group {i} has {fields})"
            )
        if "alpha" in group or any("state2" in entry for entry in entries.values()):
            raise ValueError(f"not the checkpoint of RMSprop, but of Adam or one of its kin: group {i} has {fields}")
        kind = "Adagrad" if float(group["betas"][0]) == 0 else "SGD, LARS or Lion" if float(group["eps"]) == 0 else None
        if kind:
            raise ValueError(
                f"not the checkpoint of RMSprop, but of {kind}: "
                f"group {i} has betas={group['betas']}, eps={group['eps']}"
            )


def _as_pytorch(key: Any, entry: Mapping[str, Any]) -> dict[str, Any]:
    """An entry as PyTorch would have it."""
    step = {"step": entry["step"]} if "step" in entry else {}
    return {**step, "square_avg": _second_moment(key, entry)}


def _second_moment(key: Any, entry: Mapping[str, Any]) -> np.ndarray:
    """ν of one parameter, decoded."""
    codes = array(entry["state1"])
    if not str(getattr(entry["state1"], "dtype", "")).endswith("uint8"):
        return codes
    scales = entry.get("absmax1", entry.get("max1"))  # max1: of the whole tensor, in the oldest versions
    if scales is None or "qmap1" not in entry:
        raise ValueError(f"entry {key!r} is in 8 bits and lacks qmap1 or absmax1: it has {sorted(entry)}")
    table, scales = array(entry["qmap1"]), array(scales)
    lengths = [n for n in (*BLOCKS, codes.size or 1) if -(-codes.size // n) == scales.size]
    if not lengths:
        raise ValueError(
            f"entry {key!r} has {codes.size} codes and {scales.size} scales, which fits no length of blocks"
        )
    return table[codes.astype(int)] * np.repeat(scales, lengths[0])[: codes.size].reshape(codes.shape)
