"""Every file in which a Keras of any age has its optimizer, recorded."""

import jax
import numpy as np
import pytest
from golden.checkpoints import case_name, EPSILON, recorded, ROWS
from recordings import check_goes_on, from_keras_layout, others

from rmsprop_jax import dialects, interop


SLASH = from_keras_layout("conv/kernel", "fc/kernel", "fc/bias")
UNDERSCORE = from_keras_layout("conv_kernel", "fc_kernel", "fc_bias")
READERS = {
    "tf.keras-2.10": (dialects.tf_keras, SLASH),
    "tf.keras-2.15-legacy": (dialects.tf_keras, SLASH),
    "tf.keras-2.15": (dialects.keras, SLASH),
    "keras-3": (dialects.keras, UNDERSCORE),
}
CASES = [(name, options) for name in READERS for options in ROWS[name].cases]
IDS = [case_name(*case) for case in CASES]


def nested(arrays):
    """As h5py has them: groups in groups."""
    root = {}
    for path, x in arrays.items():
        *groups, name = path.split("/")
        group = root
        for key in groups:
            group = group.setdefault(key, {})
        group[name] = x
    return root


@pytest.mark.parametrize(("name", "options"), CASES, ids=IDS)
def test_the_list_of_variables(name, options):
    dialect, convert = READERS[name]
    recording = recorded(case_name(name, options))
    state = interop.from_keras(recording["checkpoint"]["variables"].items(), convert)
    check_goes_on(dialect, options, state, recording)


@pytest.mark.parametrize(("name", "options"), CASES, ids=IDS)
def test_h5_files(name, options):
    _, convert = READERS[name]
    kept = recorded(case_name(name, options))["checkpoint"]
    assert list(kept["h5"]) == sorted(kept["h5"])
    expected = interop.from_keras(kept["variables"].items(), convert)
    groups = nested(kept["h5"])
    whole = {"model_weights": {"conv": {"conv": {"kernel:0": np.zeros((3, 3, 2, 4))}}}, **groups}
    for given in (kept["h5"].items(), kept["h5"], groups, groups["optimizer_weights"], whole):
        state = interop.from_keras(given, convert)
        jax.tree.map(np.testing.assert_array_equal, state, expected)


# Where weights have no names, they get them here.
WEIGHTS = ["conv_kernel", "fc_kernel", "fc_bias"]


def named(values, options, start):
    slots = ["velocity", *(["momentum"] if "momentum" in options else [])]
    slots += ["average_gradient"] if "centered" in options else []
    return zip([*start, *(f"{w}_{slot}" for slot in slots for w in WEIGHTS)], values, strict=True)


@pytest.mark.parametrize(
    ("name", "options"), [case for case in CASES if case[0] in ("tf.keras-2.15", "keras-3") and "mixed" not in case[1]]
)
def test_keras_archives(name, options):
    kept = recorded(case_name(name, options))["checkpoint"]
    with pytest.raises(ValueError, match=r"have no names, but numbers: optimizer/vars/0, .*keras.saving.load_model"):
        interop.from_keras(kept["keras"])
    group = nested(kept["keras"])["optimizer"]["vars"]
    values = [group[str(i)] for i in range(len(group))]
    start = ["iteration", "learning_rate"] if name == "keras-3" else ["iteration"]
    state = interop.from_keras(named(values, options, start), UNDERSCORE)
    expected = interop.from_keras(kept["variables"].items(), READERS[name][1])
    jax.tree.map(np.testing.assert_array_equal, state, expected)


def test_keras_2_3():
    recording = recorded(case_name("keras-2.3", EPSILON))
    kept = recording["checkpoint"]
    for form in ("h5", "weights"):
        with pytest.raises(ValueError, match="have no names, but numbers: .*Or give them names, as the documentation"):
            interop.from_keras(kept[form])
    values = [kept["weights"][str(i)] for i in range(len(kept["weights"]))]
    state = interop.from_keras(named(values, {}, ["iteration"]), UNDERSCORE)
    check_goes_on(dialects.tf_keras, EPSILON, state, recording)


FOREIGN = others("keras-2.3", "tf.keras-2.10", "tf.keras-2.15", "keras-3")


@pytest.mark.parametrize(("name", "kind", "forms"), FOREIGN, ids=[f"{name} {kind}" for name, kind, _ in FOREIGN])
def test_other_optimizers_are_named(name, kind, forms):
    for form in {"variables", "h5"} & set(forms):
        with pytest.raises(ValueError, match=f"not the variables of Keras' RMSprop, but of {kind.lower()}: "):
            interop.from_keras(forms[form])
    for form in {"weights", "keras"} & set(forms):  # nothing tells whose they are
        with pytest.raises(ValueError, match="have no names, but numbers"):
            interop.from_keras(forms[form])
