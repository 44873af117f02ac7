"""Object checkpoints of TensorFlow 2, recorded from every optimizer that has made them."""

import jax
import numpy as np
import pytest
from golden.checkpoints import case_name, recorded, ROWS
from recordings import check_goes_on, from_keras_layout, others

from rmsprop_jax import dialects, interop


VALUE = "/.ATTRIBUTES/VARIABLE_VALUE"
GRAPH = "_CHECKPOINTABLE_OBJECT_GRAPH"

BESIDE = from_keras_layout(
    "model/layer_with_weights-0/kernel", "model/layer_with_weights-1/kernel", "model/layer_with_weights-1/bias"
)
READERS = {
    "tf.keras-2.10": (dialects.tf_keras, BESIDE, None),
    "tf.keras-2.15-legacy": (dialects.tf_keras, BESIDE, None),
    "tf.keras-2.15": (dialects.keras, from_keras_layout("conv/kernel", "fc/kernel", "fc/bias"), None),
    "keras-3": (dialects.keras, from_keras_layout("conv_kernel", "fc_kernel", "fc_bias"), None),
    "sonnet": (dialects.sonnet, from_keras_layout("net/conv/w", "net/fc/w", "net/fc/b"), 100),
    "tensorflow1": (dialects.tensorflow1, from_keras_layout("model/conv/w", "model/fc/w", "model/fc/b"), 100),
}
CASES = [(name, options) for name in READERS for options in ROWS[name].cases]


def slots_of(name, options):
    return recorded(case_name(name, options))["checkpoint"]["checkpoint"]


@pytest.mark.parametrize(("name", "options"), CASES, ids=[case_name(*case) for case in CASES])
def test_resumes_a_recorded_run(name, options):
    dialect, convert, count = READERS[name]
    recording = recorded(case_name(name, options))
    state = interop.from_tensorflow2(recording["checkpoint"]["checkpoint"], convert, count=count)
    check_goes_on(dialect, options, state, recording)


FOREIGN = others("tf.keras-2.10", "tf.keras-2.15", "keras-3", "sonnet", "tensorflow1")


@pytest.mark.parametrize(("name", "kind", "forms"), FOREIGN, ids=[f"{name} {kind}" for name, kind, _ in FOREIGN])
def test_other_optimizers_are_named(name, kind, forms):
    kind = {"Momentum": "SGD with momentum", "SGD": "another optimizer" if name == "sonnet" else "SGD"}.get(kind, kind)
    with pytest.raises(ValueError, match=rf"(?i)not .*RMSprop, but of {kind}"):
        interop.from_tensorflow2(forms["checkpoint"])


def test_two_optimizers():
    slots = slots_of(*CASES[0])
    two = {**slots, **{key.replace("/optimizer/", "/second/"): x + 1 for key, x in slots.items() if "SLOT/" in key}}
    two["second/iter" + VALUE] = np.int64(7)
    with pytest.raises(ValueError, match="several optimizers: pass one of optimizer, second as name"):
        interop.from_tensorflow2(two)
    first, second = (interop.from_tensorflow2(two, name=name) for name in ("optimizer", "second"))
    assert (int(first.count), int(second.count)) == (100, 7)
    for name, x in first.nu.items():
        np.testing.assert_array_equal(second.nu[name], x + 1)
    with pytest.raises(ValueError, match=r"no optimizer called third: the checkpoint has optimizer, second"):
        interop.from_tensorflow2(two, name="third")


@pytest.mark.parametrize("name", ["sonnet", "tensorflow1"])
def test_who_does_not_count_says_so(name):
    slots = slots_of(name, ROWS[name].cases[0])
    with pytest.raises(ValueError, match="does not say how many updates were made: pass count"):
        interop.from_tensorflow2(slots)
    assert interop.from_tensorflow2(slots, count=0).count == 0


@pytest.mark.parametrize("name", ["tf.keras-2.15", "keras-3", "sonnet"])
def test_numbers_need_the_graph(name):
    slots = slots_of(name, ROWS[name].cases[0])
    graph = slots.pop(GRAPH)
    with pytest.raises(ValueError, match=f"their names are in {GRAPH}: add it"):
        interop.from_tensorflow2(slots, count=1)
    with pytest.raises(ValueError, match=f"{GRAPH} has no names for optimizer/.*: is it of another checkpoint"):
        interop.from_tensorflow2({**slots, GRAPH: slots_of(*CASES[0])[GRAPH]}, count=1)
    # TensorFlow gives bytes; np.asarray(tensor) makes an object of them.
    state = interop.from_tensorflow2({**slots, GRAPH: np.asarray(graph, object)}, count=1)
    assert state.nu


def test_an_optimizer_with_a_name_of_its_own():
    # TensorFlow gives the keys in no order; the numbers have one.
    slots = slots_of("keras-3", ROWS["keras-3"].cases[0])
    expected = interop.from_tensorflow2(slots)
    slots = {key: slots[key] for key in sorted(slots, reverse=True)}
    slots[GRAPH] = slots[GRAPH].replace(b"rm_sprop/", b"my_optim/")
    jax.tree.map(np.testing.assert_array_equal, interop.from_tensorflow2(slots), expected)


@pytest.mark.parametrize("graph", [b"\xff\xff\xff", "text", 7])
def test_a_graph_that_is_none(graph):
    slots = slots_of("keras-3", ROWS["keras-3"].cases[0])
    with pytest.raises(ValueError, match=f"{GRAPH} must be the bytes that TensorFlow saved"):
        interop.from_tensorflow2({**slots, GRAPH: graph})


def test_the_other_kinds_of_checkpoint_are_sent_elsewhere():
    with pytest.raises(ValueError, match=r"as in an object checkpoint: .*Perhaps use from_tensorflow1"):
        interop.from_tensorflow2({"w/RMSProp": np.ones(2), "w/RMSProp_1": np.zeros(2)})
    with pytest.raises(ValueError, match="an object checkpoint of TensorFlow 2: use from_tensorflow2"):
        interop.from_tensorflow1(slots_of(*CASES[0]))


def test_the_loss_scaler_s_own_name():
    slots = slots_of("keras-3", ROWS["keras-3"].cases[3])
    assert interop.from_tensorflow2(slots, name="optimizer").count == 100


@pytest.mark.parametrize("name", ["tf.keras-2.10", "tf.keras-2.15-legacy", "tf.keras-2.15"])
def test_a_saved_model(name):
    # As model.save_weights does, it leaves out the "model/" in front of paths.
    kept = recorded(case_name(name, ROWS[name].cases[0]))["checkpoint"]
    assert "optimizer/learning_rate" + VALUE in kept["saved_model"] or name == "tf.keras-2.15"
    one, other = (interop.from_tensorflow2(kept[form]) for form in ("saved_model", "checkpoint"))
    assert one.count == other.count
    for slot in ("nu", "trace"):
        expected = {path.removeprefix("model/"): x for path, x in getattr(other, slot).items()}
        jax.tree.map(np.testing.assert_array_equal, getattr(one, slot), expected)


@pytest.mark.parametrize(("name", "lost"), [("tensorflow1", "momentum"), ("sonnet", "mom")])
def test_a_momentum_that_is_always_written(name, lost):
    slots = slots_of(name, ROWS[name].cases[0])
    slots = {key: x for key, x in slots.items() if f"/{lost}/" not in key}
    with pytest.raises(ValueError, match=rf"lacks \{{'{lost}': \['"):
        interop.from_tensorflow2(slots, count=100)


def test_a_legacy_keras_without_momentum_has_none():
    slots = {key: x for key, x in slots_of(*CASES[0]).items() if "/momentum/" not in key}
    assert interop.from_tensorflow2(slots).trace is None


@pytest.mark.parametrize("name", ["tf.keras-2.10", "sonnet", "tensorflow1"])
def test_accumulation_where_there_is_none(name):
    slots = slots_of(name, ROWS[name].cases[0])
    with pytest.raises(ValueError, match="gradient_accumulation_steps=4: optimizer has no accumulators"):
        interop.from_tensorflow2(slots, count=100, gradient_accumulation_steps=4)
    assert interop.from_tensorflow2(slots, count=100, gradient_accumulation_steps=0).count == 100
