"""bitsandbytes: entries like PyTorch's, with the average in 32 bits or in blocks of 8-bit codes."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from .._rmsprop import RMSPropState
from ._arrays import array
from ._named import Convert, Optimizer
from ._state_dict import Names, Parameter, parameters, parts_of, state_of_parameters


__all__ = ["from_bitsandbytes"]

NU = "state1"
RMSPROP = Optimizer("bitsandbytes' RMSprop", {"nu": NU}, others={"state2": "Adam or a variant of it"})

# Newer versions hide the arrays of an entry from FSDP under this key.
HIDDEN = "__bnb_optimizer_quant_state__"

# So many codes share a scale: 2048 until 2024, 256 since.
BLOCKS = (256, 2048)


def from_bitsandbytes(
    checkpoint: Any, names: Names | None = None, convert: Convert | None = None, *, count: int | None = None
) -> RMSPropState:
    """The state of `dialects.bitsandbytes` from `bitsandbytes.optim.RMSprop`, in 32 bits or in 8.

    In 8 bits every element of ν is a code of a table, times the largest ν of the element's block::

        nu = qmap1[state1] * absmax1[i // length]

    Small tensors are in 32 bits all the same. The state is in float32:
    `carry_over(state, tx.init(params))` keeps it in one byte again, if `tx` has `state_dtype="uint8"`.

    Args:
        checkpoint: the optimizer, or its `state_dict()`; see :func:`from_pytorch`, also for the other arguments.
        names: of the parameters.
        convert: from arrays by name to a tree of parameters.
        count: of updates.

    Raises:
        ValueError: as :mod:`rmsprop_jax.interop` says. The groups of RMSprop, Adagrad, SGD, LARS and Lion have the
            same options: Adagrad has a decay of 0, the others an eps of 0. From an RMSprop with an eps of 0, set it
            to 1e-38 in the groups.

    Example:
        >>> groups = [{"params": [0], "betas": (0.99, 0), "eps": 1e-8}]
        >>> codes, table = np.array([[255, 0]], np.uint8), np.linspace(0, 1, 256)
        >>> entry = {"step": 7, "state1": codes, "qmap1": table, "absmax1": np.array([0.5])}
        >>> from_bitsandbytes({"state": {0: entry}, "param_groups": groups}, ["w"]).nu
        {'w': Array([[0.5, 0. ]], dtype=float32)}

    References:
        bitsandbytes/optim/optimizer.py, 0.50.2.
    """
    groups, entries = parts_of(checkpoint)
    entries = {key: {**entry, **entry.get(HIDDEN, {})} for key, entry in entries.items()}
    _check_is_rmsprop(groups, entries)
    found = parameters(groups, entries, names, NU)
    return state_of_parameters(RMSPROP, found, _arrays, convert, count)


def _check_is_rmsprop(groups: Sequence[Mapping[str, Any]], entries: Mapping[Any, Mapping[str, Any]]) -> None:
    """Raises if PyTorch wrote the checkpoint, or an optimizer with the slots of RMSprop."""
    for i, group in enumerate(groups):
        if not {"betas", "eps"} <= set(group) or not all(NU in entry for entry in entries.values() if entry):
            found = f"group {i} has {sorted(group)}"
            raise ValueError(f"not a checkpoint of bitsandbytes: if PyTorch wrote it, use from_pytorch ({found})")
        betas, eps = array("betas", group["betas"]), array("eps", group["eps"])
        if betas.ndim != 1 or not betas.size:
            raise ValueError(f"group {i} has betas={group['betas']}: allowed are two numbers, as bitsandbytes has them")
        decay = betas[0]
        if decay == 0 or eps == 0:
            kind = "Adagrad" if decay == 0 else "SGD, LARS or Lion"
            options = f"group {i} has betas={group['betas']}, eps={group['eps']}"
            raise ValueError(f"not the checkpoint of RMSprop, but of {kind}: {options}")


def _arrays(parameter: Parameter) -> dict[str, Any]:
    """ν of one parameter, decoded, or the second slot of another optimizer."""
    name, _, entry, _ = parameter
    if not entry:
        return {NU: parameter.start(0.0)}
    # Of an entry in JSON only these tell that its lists of integers are codes.
    table = entry.get("qmap1")
    scales = entry.get("absmax1", entry.get("max1"))  # max1: of the whole tensor, in the oldest versions
    is_coded = table is not None or scales is not None or str(getattr(entry[NU], "dtype", "")).endswith("uint8")
    if "state2" in entry or not is_coded:
        return {slot: entry[slot] for slot in (NU, "state2") if slot in entry}
    if table is None or scales is None:
        raise ValueError(f"{name} is in 8 bits and lacks qmap1 or absmax1: it has {sorted(entry)}")
    numbers = array(f"{NU} of {name}", entry[NU])
    codes = numbers.astype(np.uint8)
    if (codes != numbers).any():
        raise ValueError(f"{NU} of {name} has elements that are no codes: allowed are whole numbers from 0 to 255")
    table, scales = array(f"qmap1 of {name}", table), array(f"absmax1 of {name}", scales)
    lengths = [n for n in (*BLOCKS, codes.size or 1) if -(-codes.size // n) == scales.size]
    if not lengths or table.size != 256:
        found = f"{codes.size} codes, {scales.size} scales and a table of {table.size}"
        raise ValueError(f"{name} has {found}, which do not fit together")
    nu = table[codes] * np.repeat(scales, lengths[0])[: codes.size].reshape(codes.shape)
    return {NU: nu}
