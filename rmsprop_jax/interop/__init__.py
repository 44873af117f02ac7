"""Resume a run from another framework, or hand one back to it.

Accumulators have the names and shapes of the weights. So the function that converts your weights, from a
dict of NumPy arrays by name to a tree of parameters, converts them as well::

    def convert(arrays):  # torch's Linear is (out, in), Flax's kernel (in, out)
        return {"kernel": arrays["fc.weight"].T, "bias": arrays["fc.bias"]}

    params = convert({name: w.detach().numpy() for name, w in model.named_parameters()})
    state = interop.from_pytorch(optimizer, model, convert)
    state = carry_over(state, tx.init(params))

Use the dialect of that name with its options and its schedule, and the run resumes as if it had never stopped.
:func:`table` says which function reads which file, and which dialect resumes the run.

Every `from_` function takes the checkpoint, `convert` (without it the state has the dict itself) and `count`, the
updates made so far, which schedules need: `None` stands for the checkpoint's own, and is an error where it has none.
Weights in the same file are ignored, for TensorFlow, HDF5 files of Keras, and MindSpore.
It returns a bare :class:`RMSPropState`, in float32. :func:`rmsprop_jax.carry_over` places it inside wrappers, keeps it
in fewer bytes, changes options, and checks every path and shape. The `to_` functions find our state inside any wrapper.

TensorFlow 1, Sonnet, PaddlePaddle and MindSpore keep a momentum even if it is not used. Without momentum, continue with
`state._replace(trace=None)`.

A checkpoint that does not fit raises a `ValueError` that says why, and what to do: names, slots or shapes that differ,
or are there twice; a slot that is missing though the framework always writes it; the checkpoint of another optimizer,
class or framework; an accumulator that is not an array of numbers; a count that is not a whole number. So does a
`convert` or `convert_back` that changes an accumulator, leaves one out, or adds numbers that come from none. It may
pad with zeros, and on the way back cut them off.
Names of compiled or wrapped models begin with `_orig_mod.` or `module.`, which `convert` strips:
`name.removeprefix("module.")`.

A model may lose a layer on the way, or get a new one, or another one in the place of an old one. `convert` has to use
every array, so it says which ones it drops. In the same way `convert_back` drops one: `tree["head"] = None`. Mask new
parameters in `convert`, and `carry_over` starts them with their first values::

    def convert(arrays):
        arrays["head.weight"] = arrays["head.bias"] = None  # dropped
        return {"body": {"kernel": arrays["body.weight"].T}, "new_head": optax.MaskedNode()}

    state = carry_over(interop.from_pytorch(optimizer, model, convert), tx.init(new_params))

Frameworks keep E[g²] where our centered state keeps the variance E[g²] - |E[g]|²: that is converted on the way.
Every array of a result has a buffer of its own, so a training step may donate the state.
"""

from ._bitsandbytes import from_bitsandbytes
from ._keras import from_keras, to_keras
from ._mindspore import from_mindspore
from ._mlx import from_mlx
from ._paddle import from_paddle
from ._pytorch import from_pytorch, from_stable_baselines3, from_timm, to_pytorch
from ._table import table
from ._tensorflow1 import from_tensorflow1, to_tensorflow1
from ._tensorflow2 import from_tensorflow2


__all__ = [
    "from_bitsandbytes",
    "from_keras",
    "from_mindspore",
    "from_mlx",
    "from_paddle",
    "from_pytorch",
    "from_stable_baselines3",
    "from_tensorflow1",
    "from_tensorflow2",
    "from_timm",
    "table",
    "to_keras",
    "to_pytorch",
    "to_tensorflow1",
]
