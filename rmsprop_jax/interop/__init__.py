"""Carry a half-finished run over from another framework, or into another wrapper or other options, and back.

Accumulators have the names and shapes of the weights. So the function that converts your weights, from a
dict of NumPy arrays by name to a tree of parameters, converts them as well::

    def convert(arrays):  # torch's Linear is (out, in), Flax's kernel (in, out)
        return {"kernel": arrays["fc.weight"].T, "bias": arrays["fc.bias"]}

    weights = dict(model.named_parameters())  # in the order of the optimizer's groups, if it has several
    params = convert({name: w.detach().numpy() for name, w in weights.items()})
    state = interop.from_pytorch(optimizer.state_dict(), weights, convert)

Go on with the dialect of that name, its options and its schedule: the count comes along, and the run
continues as if it had never stopped. The `from_` functions return a bare :class:`RMSPropState`, in float32.
To place it inside wrappers, to keep it in fewer bytes, or to change options, continue with
`from_rmsprop(state, tx.init(params))`, which also checks every path and shape. The `to_` functions find our
state inside any wrapper.

:func:`table` says which function reads which file.

A model may lose a layer on the way, or get a new one, or another one in the place of an old one. `convert` has to use
every array, so it says which ones it drops. What is new is masked there, and `from_rmsprop` starts it with its
first value::

    def convert(arrays):
        arrays["head.weight"] = arrays["head.bias"] = None  # dropped
        return {"body": {"kernel": arrays["body.weight"].T}, "new_head": optax.MaskedNode()}

    state = interop.from_rmsprop(interop.from_pytorch(checkpoint, weights, convert), tx.init(new_params))

Two things are converted on the way. Frameworks keep E[g²] where our centered state keeps the variance
E[g²] - |E[g]|². And Optax's momentum buffer has the opposite sign of everybody else's.

Every array of a result has a buffer of its own, so a training step may donate the state.
"""

from ._bitsandbytes import from_bitsandbytes as from_bitsandbytes
from ._keras import from_keras as from_keras, to_keras as to_keras
from ._mindspore import from_mindspore as from_mindspore
from ._mlx import from_mlx as from_mlx
from ._optax import from_optax as from_optax, from_rmsprop as from_rmsprop, to_optax as to_optax
from ._paddle import from_paddle as from_paddle
from ._pytorch import (
    from_pytorch as from_pytorch,
    from_stable_baselines3 as from_stable_baselines3,
    from_timm as from_timm,
    to_pytorch as to_pytorch,
)
from ._table import table as table
from ._tensorflow1 import from_tensorflow1 as from_tensorflow1, to_tensorflow1 as to_tensorflow1
from ._tensorflow2 import from_tensorflow2 as from_tensorflow2
