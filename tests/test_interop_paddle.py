"""Checkpoints of PaddlePaddle, recorded."""

import jax
import numpy as np
import pytest
from golden.checkpoints import case_name, CONSTANT, recorded, ROWS
from recordings import check_goes_on, from_torch_layout, others, rates, without_unused

from rmsprop_jax import dialects, interop


CASES = [(name, options) for name in ("paddle", "paddle-constant") for options in ROWS[name].cases]


def convert(arrays):
    """Paddle's Linear is (in, out)."""
    return from_torch_layout({**arrays, "fc.weight": arrays["fc.weight"].T})


def checkpoint(name="paddle", options=ROWS["paddle"].cases[0]):
    kept = recorded(case_name(name, options))["checkpoint"]
    return kept["pdopt"], kept["names"]


@pytest.mark.parametrize(("name", "options"), CASES, ids=[case_name(*case) for case in CASES])
def test_resumes_a_recorded_run(name, options):
    arrays, names = checkpoint(name, options)
    state = interop.from_paddle(arrays, convert, count=100 if name == "paddle-constant" else None, names=names)
    rate = CONSTANT if name == "paddle-constant" else rates
    check_goes_on(dialects.paddle, options, without_unused(state, options), recorded(case_name(name, options)), rate)


FOREIGN = others("paddle")


@pytest.mark.parametrize(("kind", "forms"), [row[1:] for row in FOREIGN], ids=[kind for _, kind, _ in FOREIGN])
def test_other_optimizers_are_named(kind, forms):
    with pytest.raises(ValueError, match=f"not the checkpoint of Paddle's RMSProp, but of {kind}"):
        interop.from_paddle(forms["pdopt"])


def test_master_weights_are_passed_over():
    # The names that paddle 3.3.1 gives with multi_precision; its kernel for them needs a GPU.
    arrays, names = checkpoint()
    master = {
        key if key == "LR_Scheduler" else key.replace("_m", "_fp32_master_0_m", 1): x for key, x in arrays.items()
    }
    assert any("linear_0.w_0_fp32_master_0_mean_square_0" in key.replace("linear_1", "linear_0") for key in master)
    master["master_weights"] = {name: np.zeros(2) for name in names}
    jax.tree.map(np.testing.assert_array_equal, interop.from_paddle(master), interop.from_paddle(arrays))


def test_bfloat16_that_became_integers():
    arrays, _ = checkpoint()
    key = next(key for key in arrays if "mean_square" in key)
    arrays[key] = arrays[key].astype(np.uint16)
    with pytest.raises(ValueError, match=rf"{key} is uint16, the bits of bfloat16: use paddle.load, without"):
        interop.from_paddle(arrays)


def test_two_accumulators_of_one_weight():
    arrays, _ = checkpoint()
    key = next(key for key in arrays if "mean_square" in key)
    with pytest.raises(ValueError, match=rf"the checkpoint has mean_square of {key.split('_mean')[0]} twice"):
        interop.from_paddle({**arrays, key.removesuffix("0") + "1": arrays[key]})


def test_what_nobody_knows_is_named():
    arrays, _ = checkpoint()
    with pytest.raises(ValueError, match="but of another optimizer: it has linear_0.w_0_strange_0 beside it. Pass"):
        interop.from_paddle({**arrays, "linear_0.w_0_strange_0": np.ones(2)})


def test_as_pickle_loads_it():
    arrays, _ = checkpoint()
    pickled = {**arrays, "StructuredToParameterName@@": {key: key for key in arrays}}
    jax.tree.map(np.testing.assert_array_equal, interop.from_paddle(pickled), interop.from_paddle(arrays))


def test_what_is_no_mapping_is_named():
    arrays, names = checkpoint()
    with pytest.raises(ValueError, match=r"names=\[.* is a list: allowed is a mapping of your names by Paddle's"):
        interop.from_paddle(arrays, names=list(names))
    with pytest.raises(ValueError, match="LR_Scheduler=7 is a int: allowed is a mapping"):
        interop.from_paddle({**arrays, "LR_Scheduler": 7})


def test_names_that_lead_to_one():
    arrays, names = checkpoint()
    with pytest.raises(
        ValueError, match=r"has momentum of fc twice, .*: conv2d_0.w_0_momentum_0 and linear_0.w_0_momentum_0"
    ):
        interop.from_paddle(arrays, names=dict.fromkeys(names, "fc"))


def test_a_mean_that_is_zero_everywhere_is_no_centering():
    arrays, names = checkpoint("paddle", ROWS["paddle"].cases[1])
    assert set(interop.from_paddle(arrays).mu) == set(names)
    still = {key: np.zeros_like(x) if "mean_grad" in key else x for key, x in arrays.items()}
    assert interop.from_paddle(still).mu is None
    one = next(key for key in arrays if "mean_grad" in key)
    assert set(interop.from_paddle({**still, one: arrays[one]}).mu) == set(names)
    del still[one]
    with pytest.raises(ValueError, match=r"lacks {'mean_grad': \["):
        interop.from_paddle(still)
