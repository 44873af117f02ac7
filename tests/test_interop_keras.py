"""Variables of Keras and of tf.keras, and every file in which a Keras of any age has its optimizer, recorded."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden.checkpoints import case_name, EPSILON, recorded, ROWS
from recordings import check_goes_on, from_keras_layout, others

from rmsprop_jax import dialects, interop, rmsprop


def keras_variables(scope="rm_sprop", names=("a_kernel", "a_bias"), count=7, slots=("velocity", "momentum")):
    values = [(f"{scope}/iteration", count), (f"{scope}/learning_rate", 0.1)]
    return values + [(f"{scope}/{name}_{slot}", np.full(2, float(i))) for slot in slots for i, name in enumerate(names)]


def test_keras_wrappers_are_passed_over():
    scaler = [
        ("loss_scale_optimizer/iteration", 9),
        ("loss_scale_optimizer/step_counter", 3),
        ("loss_scale_optimizer/dynamic_scale", 2.0**15),
    ]
    averages = [("rm_sprop/a_kernel_average", np.ones(2)), ("rm_sprop/a_bias_average", np.ones(2))]
    plain = interop.from_keras(keras_variables())
    # Its accumulators may be in the folder of the scaler, and their iteration beside it.
    inside = [
        (path if path.endswith(("iteration", "rate")) else f"loss_scale_optimizer/{path}", x)
        for path, x in keras_variables()
    ]
    for order in (list, sorted):
        state = interop.from_keras(order([*scaler, *inside]))
        assert state.count == 7
        jax.tree.map(np.testing.assert_array_equal, state, plain)
    for variables in ([*scaler, *keras_variables()], [*averages, *keras_variables()]):
        state = interop.from_keras(variables)
        assert state.count == 7
        jax.tree.map(np.testing.assert_array_equal, state, plain)


def test_keras_accumulation():
    half = [
        ("rm_sprop/a_kernel_gradient_accumulator", np.ones(2)),
        ("rm_sprop/a_bias_gradient_accumulator", np.ones(2)),
    ]
    assert interop.from_keras([*half, *keras_variables(count=12)], gradient_accumulation_steps=4).count == 3
    with pytest.raises(
        ValueError, match="gradient_accumulation_steps=None, but the optimizer has 2 gradient accumulators"
    ):
        interop.from_keras([*half, *keras_variables()])
    with pytest.raises(
        ValueError, match="gradient_accumulation_steps=4, but the optimizer has 0 gradient accumulators"
    ):
        interop.from_keras(keras_variables(), gradient_accumulation_steps=4)
    for count in (None, 3):
        with pytest.raises(ValueError, match="1 of 4 gradients are accumulated: save after an update"):
            interop.from_keras([*half, *keras_variables(count=13)], count=count, gradient_accumulation_steps=4)


@pytest.mark.parametrize("steps", [0, np.int64(0)])
def test_no_accumulation_is_zero_as_in_keras(steps):
    state = interop.from_keras(keras_variables(), gradient_accumulation_steps=steps)
    jax.tree.map(np.testing.assert_array_equal, state, interop.from_keras(keras_variables()))


@pytest.mark.parametrize("steps", [1, -2, 2.5, "4", float("nan"), True])
def test_a_number_of_gradients_that_keras_refuses(steps):
    with pytest.raises(
        (ValueError, TypeError), match="gradient_accumulation_steps=.*: allowed is a whole number from 2 to"
    ):
        interop.from_keras(keras_variables(), gradient_accumulation_steps=steps)


@pytest.mark.parametrize(
    "weight",
    [f"d/{x}" for x in ("my_velocity", "my_momentum", "momentum", "velocity", "rms", "mg", "kernel_average_gradient")]
    + [f"{x}/kernel" for x in ("velocity", "momentum", "rms", "iteration_velocity")],
)
@pytest.mark.parametrize("momentum", [True, False])
def test_weights_and_layers_that_are_called_like_slots(weight, momentum):
    """No other weight tells the generation."""
    for generation in GENERATIONS:
        values = VALUES if momentum else VALUES[:1]
        state = interop.from_keras(of_generation(generation, values, (weight,)))
        assert list(state.nu) == [weight.replace("/", "_") if generation == "Keras 3" else weight]
        assert float(state.nu.popitem()[1][0]) == (3 if momentum else 4)


def test_the_generation_that_knows_most_accumulators():
    legacy = of_generation("tf.keras before", weights=("velocity/kernel", "d/kernel"))[1:]  # without its iteration
    assert set(interop.from_keras(legacy, count=5).nu) == {"velocity/kernel", "d/kernel"}
    averages = [("RMSprop/average/d/my_momentum:0", np.ones(2))]  # in Keras 3 this would be a momentum
    variables = [*averages, *of_generation("tf.keras 2.11 to 2.15", VALUES[:1], ("d/my_momentum",))]
    assert set(interop.from_keras(variables).nu) == {"d/my_momentum"}


def test_a_scope_inside_another():
    for generation in GENERATIONS:
        plain = of_generation(generation)
        inside = [(path if path.startswith("iteration") else f"outer/{path}", x) for path, x in plain]
        scaler = [("loss_scale_optimizer/iteration", 9)]
        for order in (list, sorted):
            state = interop.from_keras(order([*inside, *(scaler if generation == "Keras 3" else [])]))
            jax.tree.map(np.testing.assert_array_equal, state, interop.from_keras(plain))
    with pytest.raises(ValueError, match="but of adam: "):
        interop.from_keras([(f"outer/{path}", x) for path, x in keras_variables("adam")])


def test_keras_layers_of_one_name():
    with pytest.raises(
        ValueError, match="the checkpoint has rm_sprop/d_kernel_velocity, rm_sprop/d_kernel_momentum twice"
    ):
        interop.from_keras(keras_variables(names=("d_kernel", "d_kernel")))
    two = [*keras_variables("rm_sprop"), *keras_variables("rm_sprop_1")]
    with pytest.raises(
        ValueError, match="cannot be told apart: rm_sprop/a_kernel_velocity and rm_sprop_1/a_kernel_velocity"
    ):
        interop.from_keras(two)


@pytest.mark.parametrize(
    "variables",
    [
        keras_variables("adam", slots=("velocity", "momentum")),
        keras_variables("my_optimizer", slots=("momentum", "velocity")),  # Adam's order
        keras_variables("nadam_1"),
        keras_variables("sgd", slots=("momentum",)),
        keras_variables("adagrad", slots=("accumulator",)),
        keras_variables("lion", slots=("momentum",)),
        keras_variables("sgd", slots=()),
        [("Adam/iter:0", 3), ("Adam/d/kernel/m:0", np.ones(2)), ("Adam/d/kernel/v:0", np.ones(2))],
        [("iteration:0", 3), ("Adam/m/d/kernel:0", np.ones(2)), ("Adam/v/d/kernel:0", np.ones(2))],
        [("iteration:0", 3), ("SGD/m/d/kernel:0", np.ones(2))],
        [("SGD/iter:0", 3), ("SGD/d/kernel/momentum:0", np.ones(2))],
    ],
    ids=lambda variables: variables[0][0] + variables[-1][0],
)
def test_other_optimizers_of_keras_are_named(variables):
    name = variables[-1][0].partition("/")[0].lower().removesuffix("_1")
    for order in (list, sorted):
        with pytest.raises(ValueError, match=f"not the variables of Keras' RMSprop, but of {name}: "):
            interop.from_keras(order(variables))


def test_the_model_s_variables_beside_the_optimizer_s():
    with pytest.raises(
        ValueError, match="not Keras' RMSprop alone: d/kernel. Pass optimizer.variables, without the mod"
    ):
        interop.from_keras([*keras_variables("rmsprop"), ("d/kernel", np.ones(2))])
    with pytest.raises(ValueError, match="not the variables of Keras' RMSprop, but of adam: d/kernel"):
        interop.from_keras([*keras_variables("adam"), ("d/kernel", np.ones(2))])


WEIGHTS = ("d/kernel", "d/bias")
VALUES = (("nu", 4.0), ("trace", 2.0), ("mu", 1.0))
GENERATIONS = {
    "Keras 3": ("rmsprop/iteration", "rmsprop/{weight_}_{slot}", ("velocity", "momentum", "average_gradient")),
    "tf.keras 2.11 to 2.15": ("iteration:0", "RMSprop/{slot}/{weight}:0", ("velocity", "momentum", "average_gradient")),
    "tf.keras before": ("RMSprop/iter:0", "RMSprop/{weight}/{slot}:0", ("rms", "momentum", "mg")),
}


def of_generation(name, values=VALUES, weights=WEIGHTS):
    iteration, pattern, slots = GENERATIONS[name]
    return [(iteration, 5)] + [
        (pattern.format(weight=weight, weight_=weight.replace("/", "_"), slot=slot), np.full(2, value))
        for slot, (_, value) in zip(slots, values, strict=False)
        for weight in weights
    ]


def nested(variables):
    """As the groups of an HDF5 file: folders in folders, each in alphabetical order."""
    root = {}
    for path, value in sorted(dict(variables).items()):
        *folders, name = path.split("/")
        folder = root
        for part in folders:
            folder = folder.setdefault(part, {})
        folder[name] = value
    return root


ORDERS = {
    "as made": list,
    "sorted": sorted,
    "reversed": lambda variables: variables[::-1],
    "nested": nested,
    "in a whole file": lambda variables: {"optimizer_weights": nested(variables)},
}


@pytest.mark.parametrize("order", ORDERS.values(), ids=ORDERS)
@pytest.mark.parametrize("generation", GENERATIONS)
def test_variables_are_read_by_name_in_any_order(generation, order):
    state = interop.from_keras(order(of_generation(generation)))
    assert state.count == 5
    names = {"d_kernel", "d_bias"} if generation == "Keras 3" else {"d/kernel", "d/bias"}
    for slot, value in (("nu", 3), ("mu", 1), ("trace", 2)):
        assert {k: float(x[0]) for k, x in getattr(state, slot).items()} == dict.fromkeys(names, value)
    # With fewer slots.
    state = interop.from_keras(order(of_generation(generation, VALUES[:2])))
    assert state.mu is None
    assert float(next(iter(state.trace.values()))[0]) == 2
    state = interop.from_keras(order(of_generation(generation, VALUES[:1])))
    assert state.mu is None
    assert state.trace is None


@pytest.mark.parametrize("scope", ["rmsprop", "rm_sprop", "rm_sprop_1", "RMSprop", "my_rmsprop"])
def test_sorted_variables_of_an_optimizer_called_rmsprop(scope):
    assert interop.from_keras(sorted(keras_variables(scope))).count == 7


def test_an_optimizer_of_another_name():
    plain = keras_variables("my_optimizer")
    assert interop.from_keras(plain).count == 7
    # In alphabetical order it could be an Adam.
    with pytest.raises(ValueError, match="in this order they are Adam's.*called rmsprop: rmsprop/a_bias_momentum"):
        interop.from_keras(sorted(plain))
    renamed = [(path.replace("my_optimizer/", "rmsprop/"), x) for path, x in sorted(plain)]
    assert interop.from_keras(renamed).count == 7
    # Without momentum, or with a mean, it could not.
    for slots in (("velocity",), ("velocity", "momentum", "average_gradient")):
        assert interop.from_keras(sorted(keras_variables("my_optimizer", slots=slots))).count == 7


def test_the_iteration_wherever_it_lies():
    accumulators = [v for v in keras_variables() if v[0].endswith(("velocity", "momentum"))]
    for path in ("iteration", "iteration:0", "rm_sprop/iteration", "elsewhere/iterations", "iter:0"):
        assert interop.from_keras([(path, 7), *accumulators]).count == 7
    assert interop.from_keras([("iteration", 7), ("rmsprop/d_kernel_velocity", np.ones(2))]).count == 7
    with pytest.raises(ValueError, match="does not say how many updates were made: pass count"):
        interop.from_keras(accumulators)
    two = [("a/iteration", 7), ("b/iteration", 8), *accumulators]
    with pytest.raises(ValueError, match="several counts, which differ: {'a/iteration': 7, 'b/iteration': 8}"):
        interop.from_keras(two)
    assert interop.from_keras(two, count=8).count == 8
    assert interop.from_keras([("a/iteration", 7), ("b/iteration", 7), *accumulators]).count == 7


def test_what_was_written_is_read():
    state = rmsprop(0.1, centered=True, momentum=0.9, initial_scale=2.0).init({"a": jnp.ones(2)})
    state = state._replace(count=jnp.int32(3))
    again = interop.from_keras(interop.to_keras(state, lambda tree: tree))
    jax.tree.map(np.testing.assert_array_equal, again, state)


def test_averaged_weights_and_loss_scalers_of_tf_keras_are_passed_over():
    for generation in GENERATIONS:
        plain = of_generation(generation)
        beside = [("RMSprop/average/d/kernel:0", np.ones(2)), ("current_loss_scale:0", 2.0), ("good_steps:0", 3)]
        state = interop.from_keras([*beside, ("learning_rate:0", 0.1), *plain])
        jax.tree.map(np.testing.assert_array_equal, state, interop.from_keras(plain))


# --- Files ---------------------------------------------------------------------------------------------------


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
FILE_WEIGHTS = ["conv_kernel", "fc_kernel", "fc_bias"]


def named(values, options, start):
    slots = ["velocity", *(["momentum"] if "momentum" in options else [])]
    slots += ["average_gradient"] if "centered" in options else []
    return zip([*start, *(f"{w}_{slot}" for slot in slots for w in FILE_WEIGHTS)], values, strict=True)


@pytest.mark.parametrize(
    ("name", "options"), [case for case in CASES if case[0] in ("tf.keras-2.15", "keras-3") and "mixed" not in case[1]]
)
def test_keras_archives(name, options):
    kept = recorded(case_name(name, options))["checkpoint"]
    with pytest.raises(ValueError, match=r"have numbers instead of names: optimizer/vars/0, .*keras.saving.load_model"):
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
        with pytest.raises(ValueError, match="have numbers instead of names: .*or name them as the documentation"):
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
        with pytest.raises(ValueError, match="have numbers instead of names"):
            interop.from_keras(forms[form])
