"""Checkpoints of bitsandbytes, recorded from its CPU kernels."""

import jax.numpy as jnp
import numpy as np
import optax
import pytest
from golden import checkpoints
from golden.checkpoints import END, EPS, recorded, STOP, TABLE, TABLE_ORIGIN
from recordings import check_goes_on, from_torch_layout, others, rates

from rmsprop_jax import dialects, interop


HIDDEN = "__bnb_optimizer_quant_state__"
NAMES = [*checkpoints.SHAPES, TABLE]


def state_dict(name="bitsandbytes-8bit"):
    """As PyTorch has it: with numbers for keys."""
    kept = recorded(name)["checkpoint"]["state_dict"]
    return {**kept, "state": {int(key): entry for key, entry in kept["state"].items()}}


def test_resumes_a_recorded_run_in_32_bits():
    recording = recorded("bitsandbytes-32bit")
    state = interop.from_bitsandbytes(state_dict("bitsandbytes-32bit"), NAMES[:3], from_torch_layout)
    check_goes_on(dialects.bitsandbytes, {"eps": EPS}, state, recording)


def test_resumes_a_recorded_run_in_8_bits():
    # Theirs goes on in 8 bits, ours in 32: what its codes lose in a hundred updates is between the two.
    recording = recorded("bitsandbytes-8bit")
    tx = dialects.bitsandbytes(rates, eps=EPS)

    def away(state):
        p = jnp.asarray(recording["middle"][TABLE])
        for t in range(STOP, END):
            updates, state = tx.update(checkpoints.table_grads(np.asarray(p), t), state, p)
            p = optax.apply_updates(p, updates)
        end = recording["end"][TABLE]
        return np.linalg.norm(p - end) / np.linalg.norm(end - TABLE_ORIGIN)

    state = interop.from_bitsandbytes(state_dict(), NAMES)
    assert away(state._replace(nu=state.nu[TABLE])) < 0.005  # .0037
    assert away(tx.init(recording["middle"][TABLE])._replace(count=state.count)) > 0.02


def test_blocks_are_decoded_as_bitsandbytes_decodes_them():
    state = interop.from_bitsandbytes(state_dict(), NAMES)
    expected = recorded("bitsandbytes-8bit")["checkpoint"]["last rows of nu"]["nu"]
    np.testing.assert_array_equal(state.nu[TABLE][-len(expected) :], expected)
    assert state.nu[TABLE].shape == TABLE_ORIGIN.shape
    assert state.trace is None


def quantized(n, length, scales, hidden):
    """An entry of 8-bit codes, and ν."""
    rng = np.random.default_rng(n)
    table, codes = np.sort(rng.random(256)).astype(np.float32), rng.integers(0, 256, n).astype(np.uint8)
    absmax = rng.random(-(-n // length)).astype(np.float32)
    arrays = {"state1": codes, "qmap1": table, scales: absmax}
    nu = np.array([table[code] * absmax[i // length] for i, code in enumerate(codes)], np.float32)
    return {"step": 7, **({HIDDEN: arrays} if hidden else arrays)}, nu


# The oldest versions have one scale for the whole tensor, which they call max1.
LENGTHS = [(5000, 2048), (5000, 256), (2048, 256), (4096, 2048), (300, 2048), (1, 256), (0, 256), (5000, 10**6)]


@pytest.mark.parametrize(("n", "length"), LENGTHS)
@pytest.mark.parametrize("hidden", [False, True])
@pytest.mark.parametrize("codes", [np.asarray, np.int64, np.ndarray.tolist], ids=["uint8", "int64", "JSON"])
def test_blocks_of_every_length(n, length, hidden, codes):
    entry, nu = quantized(n, length, "max1" if length == 10**6 else "absmax1", hidden)
    arrays = entry.get(HIDDEN, entry)
    arrays["state1"] = codes(arrays["state1"])
    checkpoint = {"state": {0: entry}, "param_groups": [{"betas": [0.99, 0], "eps": 1e-8, "params": [0]}]}
    state = interop.from_bitsandbytes(checkpoint, ["w"])
    np.testing.assert_array_equal(state.nu["w"], nu)
    assert state.count == 7


@pytest.mark.parametrize(
    ("lost", "changed", "message"),
    [
        ("absmax1", {"absmax1": np.ones(5)}, "weight has 4160 codes, 5 scales and a table of 256, which do not fit"),
        ("qmap1", {}, "table.weight is in 8 bits and lacks qmap1 or absmax1"),
        ("", {"state1": [256]}, "state1 of table.weight has elements that are no codes: allowed are whole"),
        ("", {"state1": [0.5]}, "state1 of table.weight has elements that are no codes: allowed are whole"),
        ("absmax1", {}, "table.weight is in 8 bits and lacks qmap1 or absmax1"),
    ],
)
def test_blocks_that_do_not_fit(lost, changed, message):
    checkpoint = state_dict()
    entry = {k: x for k, x in checkpoint["state"][3][HIDDEN].items() if k != lost}
    checkpoint["state"][3] = {"step": 100, HIDDEN: entry | changed}
    with pytest.raises(ValueError, match=message):
        interop.from_bitsandbytes(checkpoint, NAMES)


def test_parameters_that_never_stepped_start_at_zero():
    checkpoint = state_dict("bitsandbytes-32bit")
    del checkpoint["state"][2]
    state = interop.from_bitsandbytes(checkpoint, {name: np.zeros(s) for name, s in checkpoints.SHAPES.items()})
    assert not state.nu["fc.bias"].any()
    assert state.nu["fc.weight"].all()


FOREIGN = others("bitsandbytes-32bit")


@pytest.mark.parametrize(("kind", "forms"), [row[1:] for row in FOREIGN], ids=[kind for _, kind, _ in FOREIGN])
def test_other_optimizers_of_bitsandbytes_are_named(kind, forms):
    with pytest.raises(ValueError, match=f"not the checkpoint of .*RMSprop, but of .*{kind.removesuffix('32bit')}"):
        interop.from_bitsandbytes(forms["state_dict"], NAMES[:3])


def test_a_second_slot_is_another_optimizer_s_in_8_bits_too():
    checkpoint = state_dict()
    hidden = checkpoint["state"][3][HIDDEN]
    hidden |= {"state2": hidden["state1"], "qmap2": hidden["qmap1"], "absmax2": hidden["absmax1"]}
    with pytest.raises(ValueError, match="but of Adam or a variant of it: it has state2 of table.weight"):
        interop.from_bitsandbytes(checkpoint, NAMES)


def test_adagrad_has_a_decay_of_zero():
    group = {"betas": [0.0, 0.0], "eps": 1e-10, "params": [0]}
    with pytest.raises(ValueError, match=r"but of Adagrad: group 0 has betas=\[0.0, 0.0\]"):
        interop.from_bitsandbytes({"state": {0: {"step": 1, "state1": np.ones(2)}}, "param_groups": [group]}, ["w"])


def test_betas_that_are_one_number():
    group = {"betas": 0.99, "eps": 1e-10, "params": [0]}
    with pytest.raises(ValueError, match=r"group 0 has betas=0.99: allowed are two numbers"):
        interop.from_bitsandbytes({"state": {0: {"step": 1, "state1": np.ones(2)}}, "param_groups": [group]}, ["w"])


@pytest.mark.parametrize(
    ("group", "entry"),
    [
        ({"momentum": 0, "centered": False, "alpha": 0.9, "eps": 1e-8}, {"square_avg": np.ones(2)}),
        ({"betas": (0.9, 0.999), "eps": 1e-8}, {"exp_avg": np.ones(2), "exp_avg_sq": np.ones(2)}),
    ],
    ids=["RMSprop", "Adam"],
)
def test_pytorch_s_checkpoint_is_sent_there(group, entry):
    group, entry = group | {"foreach": None, "params": [0]}, entry | {"step": 1}
    with pytest.raises(ValueError, match="not a checkpoint of bitsandbytes: if PyTorch wrote it, use from_pytorch"):
        interop.from_bitsandbytes({"state": {0: entry}, "param_groups": [group]}, ["w"])
