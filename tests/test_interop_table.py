"""The list of formats is whole, and every line of it was tried on a recorded checkpoint."""

import inspect

from golden.checkpoints import ROWS
from test_interop_keras import READERS as IN_FILES
from test_interop_tensorflow2 import READERS as IN_CHECKPOINTS

from rmsprop_jax import dialects, interop


# Dialects of papers, of DreamerV3, and of other languages than Python: there is no reader.
WITHOUT_FILES = {"hinton", "graves", "dqn", "dreamer", "optimisers_jl", "tensorflowjs"}


def test_every_function_and_every_dialect_has_a_row():
    rows = interop.table()
    public = {name for name in vars(interop) if name.startswith(("from_", "to_"))}
    assert {row["read"] for row in rows} | {row["write"] for row in rows} - {""} == public
    assert {row["dialect"] for row in rows} == {d.__name__ for d in dialects.DIALECTS} - WITHOUT_FILES
    assert len({(row["dialect"], row["framework"], row["file"]) for row in rows}) == len(rows)


def test_a_row_names_the_dialect_that_its_function_names():
    for row in interop.table():
        text = inspect.getdoc(getattr(interop, row["read"]))
        assert f"`dialects.{row['dialect']}`" in text, row


def test_every_recording_is_read():
    elsewhere = {"bitsandbytes-32bit", "bitsandbytes-8bit", "mlx"}
    elsewhere |= {"torch", "timm", "tensorflow1-graph"}  # test_interop_resumed_runs
    elsewhere |= {"paddle", "paddle-constant", "mindspore", "mindspore-constant", "keras-2.3"}
    assert set(ROWS) == set(IN_FILES) | set(IN_CHECKPOINTS) | elsewhere
    for name, (dialect, *_) in (IN_FILES | IN_CHECKPOINTS).items():
        assert dialect.__name__ in {row["dialect"] for row in interop.table()}, name
