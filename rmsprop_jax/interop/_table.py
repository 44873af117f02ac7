"""Which function reads which file, and which writes it."""

__all__ = ["table"]

# The dialect that continues the run, the framework, the file, who reads it, who writes it.
FORMATS = """
pytorch | PyTorch | optimizer.state_dict(), also flattened or of FSDP | from_pytorch | to_pytorch
pfrl | PFRL, RMSpropEpsInsideSqrt | optimizer.state_dict() | from_pytorch | to_pytorch
timm | timm, RMSpropTF | optimizer.state_dict() | from_timm | to_pytorch
stable_baselines3 | Stable Baselines 3, RMSpropTFLike | policy.optimizer.pth in the model's zip file \
    | from_stable_baselines3 | to_pytorch
bitsandbytes | bitsandbytes | optimizer.state_dict(), in 32 bits or in blocks of 8 | from_bitsandbytes |
keras | Keras 3 | optimizer.variables | from_keras | to_keras
keras | Keras 3 | model.h5 | from_keras |
keras | Keras 3 | model.keras, .weights.h5 (you name the variables) | from_keras |
keras | Keras 3 | tf.train.Checkpoint | from_tensorflow2 |
keras | tf.keras 2.11 to 2.15 | optimizer.variables, model.h5 | from_keras |
keras | tf.keras 2.11 to 2.15 | model.keras (you name the variables) | from_keras |
keras | tf.keras 2.11 to 2.15 | tf.train.Checkpoint, SavedModel | from_tensorflow2 |
tf_keras | tf.keras before 2.11, and legacy | optimizer.variables(), model.h5 | from_keras |
tf_keras | tf.keras before 2.11, and legacy | tf.train.Checkpoint, SavedModel | from_tensorflow2 |
tf_keras | Keras 2.3 and before | model.h5, get_weights() (you name the variables) | from_keras |
tensorflow1 | TensorFlow 1 | tf.train.Saver | from_tensorflow1 | to_tensorflow1
tensorflow1 | tf.compat.v1 | tf.train.Checkpoint | from_tensorflow2 |
sonnet | Sonnet 2 | tf.train.Checkpoint | from_tensorflow2 |
paddle | PaddlePaddle | .pdopt | from_paddle |
mindspore | MindSpore | .ckpt | from_mindspore |
mlx | MLX | .safetensors, or the flattened optimizer.state | from_mlx |
"""


def table() -> list[dict[str, str]]:
    """One row per kind of checkpoint: the dialect that continues, the framework, the file, who reads and writes it.

    Example:
        >>> for row in table():
        ...     if row["dialect"] == "mlx":
        ...         print(row["read"], row["file"])
        from_mlx .safetensors, or the flattened optimizer.state
    """
    columns = ("dialect", "framework", "file", "read", "write")
    rows = [[cell.strip() for cell in line.split("|")] for line in FORMATS.strip().splitlines()]
    return [dict(zip(columns, row, strict=True)) for row in rows]
