"""Checkpoints of MindSpore, recorded."""

import numpy as np
import pytest
from golden.checkpoints import case_name, CONSTANT, recorded, ROWS
from recordings import check_goes_on, from_torch_layout, others, rates, without_unused

from rmsprop_jax import dialects, interop


CASES = [(name, options) for name in ("mindspore", "mindspore-constant") for options in ROWS[name].cases]


def checkpoint(name="mindspore", options=ROWS["mindspore"].cases[0]):
    return recorded(case_name(name, options))["checkpoint"]["ckpt"]


@pytest.mark.parametrize(("name", "options"), CASES, ids=[case_name(*case) for case in CASES])
def test_resumes_a_recorded_run(name, options):
    state = without_unused(interop.from_mindspore(checkpoint(name, options), from_torch_layout), options)
    rate = CONSTANT if name == "mindspore-constant" else rates
    check_goes_on(dialects.mindspore, options, state, recorded(case_name(name, options)), rate)


FOREIGN = others("mindspore")


@pytest.mark.parametrize(("kind", "forms"), [row[1:] for row in FOREIGN], ids=[kind for _, kind, _ in FOREIGN])
def test_other_optimizers_are_named(kind, forms):
    with pytest.raises(ValueError, match=f"not the checkpoint of MindSpore's RMSProp, but of {kind}"):
        interop.from_mindspore(forms["ckpt"])


def test_a_layer_called_like_a_slot():
    for layer in ("moment", "mean_square", "mean_grad"):
        arrays = checkpoint() | {f"{layer}.weight": np.ones(5), f"mean_square.{layer}.weight": np.full(5, 2.0)}
        with pytest.raises(ValueError, match=rf"lacks {{'moment': \['{layer}.weight'\]}}"):
            interop.from_mindspore(arrays)
        state = interop.from_mindspore(arrays | {f"moment.{layer}.weight": np.zeros(5)})
        assert set(state.trace) == {"conv.weight", "fc.weight", "fc.bias", f"{layer}.weight"}
        assert (state.nu[f"{layer}.weight"] == 2).all()
    # Frozen, it has no accumulators.
    assert len(interop.from_mindspore(checkpoint() | {"moment.weight": np.ones(5)}).trace) == 3


@pytest.mark.parametrize("slots", [["moment"], ["moment", "mean_grad"]])
def test_an_average_is_missing_and_the_file_has_no_weights(slots):
    arrays = {"mean_square.a": np.ones(2), "moment.a": np.ones(2)} | {f"{slot}.b": np.ones(2) for slot in slots}
    with pytest.raises(ValueError, match=r"lacks {'mean_square': \['b'\]"):
        interop.from_mindspore(arrays, count=7)


@pytest.mark.parametrize("lost", ["mean_square.fc.bias", "moment.fc.bias"])
def test_one_accumulator_is_missing(lost):
    weights = dict.fromkeys(["conv.weight", "fc.weight", "fc.bias"], np.ones(2))
    arrays = {key: x for key, x in checkpoint().items() if key != lost} | weights
    with pytest.raises(ValueError, match=rf"lacks {{'{lost.partition('.')[0]}': \['fc.bias'\]}}"):
        interop.from_mindspore(arrays)
