"""What stands in the place of arrays and counts: the same answers from every reader."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from interop_helpers import READERS, WITH_MOMENTUM

from rmsprop_jax import carry_over, interop, rmsprop


every_reader = pytest.mark.parametrize("name", READERS)


@every_reader
def test_a_checkpoint_is_read(name):
    read, make = READERS[name]
    state = read(make(np.array([1.0, 2.0]), np.array([3.0, 4.0]), 5))
    assert state.count == 5
    np.testing.assert_array_equal(state.nu["w"], [1, 2])
    assert state.mu is None
    if name in WITH_MOMENTUM:
        np.testing.assert_array_equal(state.trace["w"], [3, 4])
    assert read(make(np.ones(2), np.ones(2), 5), count=7).count == 7
    assert read(make(np.ones(2), np.ones(2), 5), count=0).count == 0


class Fake:
    """A torch tensor, as far as we ask one."""

    is_quantized = False

    def __init__(self, x, **attributes):
        self.x = x
        vars(self).update(attributes)

    def detach(self):
        return self

    def cpu(self):
        return self

    def double(self):
        return np.asarray(self.x, np.float64)

    def is_floating_point(self):
        return True

    def __array__(self, *_):
        raise TypeError("Got unsupported ScalarType BFloat16")


class Whole:
    """A tensor of integers or booleans, of a framework that has neither `double` nor `is_quantized`."""

    def __init__(self, x):
        self.x = np.array(x)

    def detach(self):
        return self

    def cpu(self):
        return self

    def is_floating_point(self):
        return False

    def __array__(self, *_):
        return self.x


class Spread:
    """A torch DTensor: mixed operators refuse it."""

    def full_tensor(self):
        return Fake(np.array([1.0, 2.0]))

    def detach(self):
        raise RuntimeError("aten.detach: got mixed torch.Tensor and DTensor")


READ = {
    "jax": jnp.array([1.0, 2.0]),
    "bfloat16": jnp.array([1.0, 2.0], jnp.bfloat16),
    "float16": np.array([1.0, 2.0], np.float16),
    "int64": np.array([1, 2]),
    "big endian": np.array([1.0, 2.0], ">f4"),
    "list, as in JSON": [1.0, 2.0],
    "torch bfloat16": Fake([1.0, 2.0]),
    "tensor of integers": Whole([1, 2]),
    "torch DTensor": Spread(),
    "torch sparse": Fake(None, layout="torch.sparse_coo", to_dense=lambda: Fake([1.0, 2.0])),
    "paddle": Fake([1.0, 2.0], layout="NCHW", to_dense=Whole.__array__),  # its dense tensors refuse this call
    "bfloat16 of an HDF5 file": np.array([1.0, 2.0], jnp.bfloat16).view("V2"),
    "torch quantized": Fake(None, is_quantized=True, dequantize=lambda: Fake([1.0, 2.0])),
}


@pytest.mark.parametrize("x", READ.values(), ids=READ)
@every_reader
def test_arrays_of_every_kind_are_read(name, x):
    read, make = READERS[name]
    np.testing.assert_array_equal(read(make(x, np.ones(2), 5)).nu["w"], [1, 2])


class Meta(Fake):
    def detach(self):
        raise NotImplementedError("Cannot copy out of meta tensor; no data!")


REFUSED = {
    "a broken link": None,
    "a file's name": "w.npy",
    "bytes": b"1234",
    "an object": object(),
    "a ragged list": [1.0, [2.0, 3.0]],
    "strings": np.array(["1", "2"]),
    "objects": np.array([1.0, None], object),
    "booleans": np.array([True, False]),
    "a date": np.array(["2020-01-01"], "datetime64[D]"),
    "durations": np.ones(2, "timedelta64[s]"),
    "other bytes": np.ones(2, np.float32).view("V4"),
    "torch meta": Meta(None),
    "tensor of booleans": Whole([True, False]),
    "complex": np.ones(2, np.complex64),
}


@pytest.mark.parametrize("x", REFUSED.values(), ids=REFUSED)
@every_reader
def test_what_is_no_array_of_numbers_is_refused_by_name(name, x):
    read, make = READERS[name]
    message = r"w.* is .*(an array of numbers|NumPy cannot read|complex accumulators)"
    with pytest.raises(ValueError, match=message):
        read(make(x, np.ones(2), 5))
    if name in WITH_MOMENTUM:
        with pytest.raises(ValueError, match=message):
            read(make(np.ones(2), x, 5))


@every_reader
def test_a_traced_array_or_count_says_so(name):
    read, make = READERS[name]
    with pytest.raises(ValueError, match="is traced: read checkpoints outside of jax.jit"):
        jax.jit(lambda x: read(make(x, np.ones(2), 5)).nu)(jnp.ones(2))
    with pytest.raises(ValueError, match="is traced: read checkpoints outside of jax.jit"):
        jax.jit(lambda count: read(make(np.ones(2), np.ones(2), 5), count=count).nu)(7)


COUNTS = [7, 7.0, np.float32(7), np.int64(7), jnp.int32(7), np.array([7]), np.uint64(7)]
NO_COUNTS = [
    -1,
    np.timedelta64(7, "s"),
    1.5,
    float("nan"),
    float("inf"),
    2**40,
    10**400,
    np.array([1, 2]),
    np.array([]),
    True,
    "7",
    b"7",
]


@pytest.mark.parametrize("count", COUNTS, ids=repr)
@every_reader
def test_a_count_of_any_type_is_read(name, count):
    read, make = READERS[name]
    assert read(make(np.ones(2), np.ones(2), count)).count == 7
    assert read(make(np.ones(2), np.ones(2), 5), count=count).count == 7


@pytest.mark.parametrize("count", [None, *NO_COUNTS], ids=lambda x: repr(x)[:12])
@every_reader
def test_what_is_no_count_is_refused_by_name(name, count):
    read, make = READERS[name]
    with pytest.raises(ValueError, match=r"(step|iter|last_epoch).*(whole number from 0 to 2147483647|NumPy cannot)"):
        read(make(np.ones(2), np.ones(2), count))
    assert read(make(np.ones(2), np.ones(2), count), count=7).count == 7
    if count is not None:
        with pytest.raises(ValueError, match=r"count.*(allowed is a whole number from 0 to 2147483647|NumPy cannot)"):
            read(make(np.ones(2), np.ones(2), 5), count=count)


def without_count(found):
    """The checkpoint without whatever counts in it."""
    counts = ("step", "iteration", "iter" + ".", "global_step", "LR_Scheduler")
    if isinstance(found, list):
        return [(path, x) for path, x in found if not path.endswith(counts)]
    if "state" in found:
        return {**found, "state": {0: {field: x for field, x in found["state"][0].items() if field != "step"}}}
    return {key: x for key, x in found.items() if key not in counts and not key.startswith("optimizer/iter")}


@every_reader
def test_a_missing_count_is_an_error(name):
    read, make = READERS[name]
    silent = without_count(make(np.ones(2), np.ones(2), 5))
    if isinstance(silent, dict) and name == "tensorflow2":
        silent["optimizer/rho/.ATTRIBUTES/VARIABLE_VALUE"] = 0.9
    with pytest.raises(ValueError, match="does not say how many updates were made: pass count"):
        read(silent)
    assert read(silent, count=7).count == 7


NO_CHECKPOINTS = ["model.ckpt", pathlib.Path("model.ckpt"), b"PK", None, 7, object()]


@pytest.mark.parametrize("found", NO_CHECKPOINTS, ids=lambda x: type(x).__name__)
@every_reader
def test_a_file_s_name_is_no_checkpoint(name, found):
    with pytest.raises(ValueError, match=r"checkpoint=.* is a .*: allowed is a mapping of .*Load a file first"):
        READERS[name].read(found)


@pytest.mark.parametrize("item", [object(), ("path",), "path", np.ones(2)], ids=lambda x: type(x).__name__)
def test_a_list_of_something_else_than_pairs(item):
    with pytest.raises(ValueError, match="allowed are pairs of path and array, such as"):
        interop.from_keras([("rmsprop/iteration", 7), item])


@every_reader
def test_what_float32_cannot_hold_is_refused(name):
    read, make = READERS[name]
    with pytest.raises(ValueError, match=r"w.* has elements above 3.4e38, which float32 cannot hold"):
        read(make(np.array([1.0, 1e40]), np.ones(2), 5))
    if name in WITH_MOMENTUM:
        with pytest.raises(ValueError, match=r"w.* has elements above 3.4e38, which float32 cannot hold"):
            read(make(np.ones(2), np.array([1.0, -1e40]), 5))


@pytest.mark.parametrize("name", [name for name in READERS if name != "keras"])
def test_keys_that_are_no_strings(name):
    with pytest.raises(ValueError, match="checkpoint has the key 0: allowed is a mapping of .*, with strings as keys"):
        READERS[name].read({0: np.ones(2)})


@every_reader
def test_convert_that_is_no_function(name):
    read, make = READERS[name]
    with pytest.raises(ValueError, match=r"convert=\['w'\] is a list: allowed is a function of arrays"):
        read(make(np.ones(2), np.ones(2), 5), ["w"])


@every_reader
def test_what_convert_adds_is_refused_by_name(name):
    """As of a head that is new: the weights' own values would be averages."""
    read, make = READERS[name]
    found, params = make(np.array([1.0, 2.0]), np.ones(2), 5), {"w": jnp.ones(2), "head": {"k": jnp.full(3, -0.5)}}
    with pytest.raises(ValueError, match=r"elements of \['head'\]\['k'\] .* none of its arrays: put optax.MaskedNode"):
        read(found, lambda arrays: {**params, **arrays})
    state = read(found, lambda arrays: {**arrays, "head": optax.MaskedNode()})
    tx = rmsprop(0.1, momentum=0.0 if state.trace is None else 0.9)
    whole = carry_over(state, tx.init(params))
    np.testing.assert_array_equal(whole.nu["w"], [1, 2])
    np.testing.assert_array_equal(whole.nu["head"]["k"], np.zeros(3))


@pytest.mark.parametrize(
    ("name", "slot"),
    [
        ("pytorch", "momentum_buffer"),  # with a momentum in the group
        ("timm", "momentum_buffer"),
        ("stable_baselines3", "momentum_buffer"),
        ("tensorflow1", "RMSProp_1"),
        ("paddle", "momentum"),
        ("paddle", "mean_grad"),
        ("mindspore", "moment"),
    ],
)
def test_a_slot_that_is_always_written_must_be_there(name, slot):
    """Also where it is missing for all weights."""
    read, make = READERS[name]
    found = make(np.ones(2), np.ones(2), 5)
    if "state" in found:
        del found["state"][0][slot]
    found = {key: x for key, x in found.items() if slot not in key}
    with pytest.raises(ValueError, match=rf"the checkpoint lacks {{'{slot}': \['w'\]}}, which .* writes"):
        read(found)
