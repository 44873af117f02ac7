"""Which function reads which file, and which writes it."""

from collections.abc import Callable
from typing import Any, NamedTuple

from ._bitsandbytes import from_bitsandbytes
from ._keras import from_keras, to_keras
from ._mindspore import from_mindspore
from ._mlx import from_mlx
from ._paddle import from_paddle
from ._pytorch import from_pytorch, from_stable_baselines3, from_timm, to_pytorch
from ._tensorflow1 import from_tensorflow1, to_tensorflow1
from ._tensorflow2 import from_tensorflow2


__all__ = ["table"]


class Format(NamedTuple):
    """One kind of checkpoint."""

    dialect: str  # that goes on with the run
    framework: str
    file: str
    read: Callable[..., Any]
    write: Callable[..., Any] | None = None


FORMATS = [
    Format("pytorch", "PyTorch", "optimizer.state_dict(), also flattened or of FSDP", from_pytorch, to_pytorch),
    Format("pfrl", "PFRL, RMSpropEpsInsideSqrt", "optimizer.state_dict()", from_pytorch, to_pytorch),
    Format("timm", "timm, RMSpropTF", "optimizer.state_dict()", from_timm, to_pytorch),
    Format(
        "stable_baselines3",
        "Stable Baselines 3, RMSpropTFLike",
        "policy.optimizer.pth in the model's zip file",
        from_stable_baselines3,
        to_pytorch,
    ),
    Format("bitsandbytes", "bitsandbytes", "optimizer.state_dict(), in 32 bits or in blocks of 8", from_bitsandbytes),
    Format("keras", "Keras 3", "optimizer.variables", from_keras, to_keras),
    Format("keras", "Keras 3", "model.h5", from_keras),
    Format("keras", "Keras 3", "model.keras, .weights.h5 (you name the variables)", from_keras),
    Format("keras", "Keras 3", "tf.train.Checkpoint", from_tensorflow2),
    Format("keras", "tf.keras 2.11 to 2.15", "optimizer.variables, model.h5", from_keras),
    Format("keras", "tf.keras 2.11 to 2.15", "model.keras (you name the variables)", from_keras),
    Format("keras", "tf.keras 2.11 to 2.15", "tf.train.Checkpoint, SavedModel", from_tensorflow2),
    Format("tf_keras", "tf.keras before 2.11, and legacy", "optimizer.variables(), model.h5", from_keras),
    Format("tf_keras", "tf.keras before 2.11, and legacy", "tf.train.Checkpoint, SavedModel", from_tensorflow2),
    Format("tf_keras", "Keras 2.3 and before", "model.h5, get_weights() (you name the variables)", from_keras),
    Format("tensorflow1", "TensorFlow 1", "tf.train.Saver", from_tensorflow1, to_tensorflow1),
    Format("tensorflow1", "tf.compat.v1", "tf.train.Checkpoint", from_tensorflow2),
    Format("sonnet", "Sonnet 2", "tf.train.Checkpoint", from_tensorflow2),
    Format("paddle", "PaddlePaddle", ".pdopt", from_paddle),
    Format("mindspore", "MindSpore", ".ckpt", from_mindspore),
    Format("mlx", "MLX", ".safetensors, or the flattened optimizer.state", from_mlx),
]


def table() -> list[dict[str, str]]:
    """One row per kind of checkpoint: the dialect that goes on, the framework, the file, who reads and writes it.

    Example:
        >>> for row in table():
        ...     if row["dialect"] == "mlx":
        ...         print(row["read"], row["file"])
        from_mlx .safetensors, or the flattened optimizer.state
    """
    return [
        {
            "dialect": row.dialect,
            "framework": row.framework,
            "file": row.file,
            "read": row.read.__name__,
            "write": "" if row.write is None else row.write.__name__,
        }
        for row in FORMATS
    ]
