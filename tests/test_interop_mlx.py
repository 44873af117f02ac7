"""Checkpoints of MLX, recorded."""

import numpy as np
import pytest
from golden.checkpoints import EPS, recorded
from recordings import check_goes_on, from_torch_layout, others

from rmsprop_jax import dialects, interop


def convert(arrays):
    """MLX's convolution is (out, height, width, in)."""
    return from_torch_layout({**arrays, "conv.weight": arrays["conv.weight"].transpose(0, 3, 1, 2)})


def checkpoint():
    return recorded("mlx")["checkpoint"]["safetensors"]


def test_resumes_a_recorded_run():
    state = interop.from_mlx(checkpoint(), convert)
    check_goes_on(dialects.mlx, {"eps": EPS}, state, recorded("mlx"))


OTHERS = {kind: forms["safetensors"] for _, kind, forms in others("mlx")}


def test_other_optimizers():
    with pytest.raises(ValueError, match=r"not the checkpoint of MLX's RMSprop, but of Adam, .*conv.weight.m"):
        interop.from_mlx(OTHERS["Adam"])
    with pytest.raises(ValueError, match=r"not the checkpoint of MLX's RMSprop, but of AdaDelta.*conv.weight.u"):
        interop.from_mlx(OTHERS["AdaDelta"])
    with pytest.raises(ValueError, match=r"not the checkpoint of MLX's RMSprop, but of .*Lion.*conv.weight.m"):
        interop.from_mlx(OTHERS["Lion"])
    # SGD's momentum is where our ν is, but it has a sign.
    with pytest.raises(ValueError, match=r"v of .*conv.weight.* has negative elements"):
        interop.from_mlx(OTHERS["SGD"])
    still = {key: np.zeros_like(x) if key.endswith(".v") else x for key, x in OTHERS["SGD"].items()}
    with pytest.raises(ValueError, match="every v is 0 after 1 updates, as in SGD without momentum: pass"):
        interop.from_mlx(still)


def test_adagrad_cannot_be_told():
    # Its sums of squares have the same names and signs, and nothing else is in the file. The documentation says so.
    assert set(OTHERS["Adagrad"]) == set(checkpoint())
    assert interop.from_mlx(OTHERS["Adagrad"]).count == 1
    assert "Nothing in the file tells" in interop.from_mlx.__doc__


class Bfloat16:
    dtype = "mlx.core.bfloat16"


def test_bfloat16_that_numpy_cannot_read():
    with pytest.raises(ValueError, match=r"fc.bias.v is bfloat16, .*x.astype\(mx.float32\)"):
        interop.from_mlx(checkpoint() | {"fc.bias.v": Bfloat16()})


def test_an_optimizer_in_a_larger_tree():
    arrays = {"w.v": np.ones(2), "step": np.uint64(7), "learning_rate": np.float32(0.1)}
    whole = {"model.w": np.zeros(2)} | {f"optimizer.{key}": x for key, x in arrays.items()}
    state = interop.from_mlx(whole)
    assert (state.count, [*state.nu]) == (7, ["w"])
    several = {f"states.{i}.{key}": x for i in range(2) for key, x in arrays.items()}  # of a MultiOptimizer
    with pytest.raises(ValueError, match=r"several optimizers, with states.0.step, states.1.step: .*'states.0.'"):
        interop.from_mlx(several)
    interop.from_mlx({key: x for key, x in several.items() if key.startswith("states.0.")})
    with pytest.raises(ValueError, match="it has w beside it. Pass the optimizer's arrays alone"):
        interop.from_mlx({**arrays, "w": np.zeros(2)})


def test_a_state_that_is_not_flattened():
    nested = {"step": np.uint64(3), "fc": {"weight": {"v": np.ones(2)}}}
    with pytest.raises(ValueError, match=r"fc are not arrays: pass dict\(mlx.utils.tree_flatten\(optimizer.state\)\)"):
        interop.from_mlx(nested)
