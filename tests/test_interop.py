"""Runs carried over in the middle, both ways, from recorded checkpoints everywhere and from live frameworks."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import resume
from resume import (
    case_name,
    CASES,
    convert,
    convert_back,
    dialect_of,
    difference,
    END,
    limit,
    NAMES,
    ORIGIN,
    RATES,
    RECORDED,
    recorded,
    SOURCES,
    STOP,
)

from rmsprop_jax import dialects, interop, rmsprop, scale_by_rms


IDS = [case_name(*case) for case in CASES]


@pytest.mark.parametrize(("name", "options"), CASES, ids=IDS)
def test_resumes_a_recorded_run(name, options):
    run, source = recorded(name, options), SOURCES[name]
    state = source.read(run.checkpoint)
    assert state.count == STOP
    assert (state.mu is None, state.trace is None) == ("centered" not in options, "momentum" not in options)
    end, _ = resume.run_ours(dialect_of(source, name, options), state, run.middle, STOP, END)
    assert difference(end, run.end) < limit(name, options)
    # Without the state it is another run: the test can fail.
    afresh, _ = resume.run_ours(
        dialect_of(source, name, options),
        dialect_of(source, name, options).init(convert(ORIGIN))._replace(count=state.count),
        run.middle,
        STOP,
        END,
    )
    assert difference(afresh, run.end) > 1e-4


def test_every_recorded_run_is_read():
    assert {path.stem for path in RECORDED.glob("*.npz")} == set(IDS)


OPTAX = [
    {},
    {"momentum": 0.9},
    {"momentum": 0.9, "nesterov": True, "initial_scale": 1.0},
    {"centered": True},
    {"centered": True, "momentum": 0.9, "eps_in_sqrt": False},
    {"bias_correction": True, "momentum": 0.9},
]


@pytest.mark.parametrize("options", OPTAX, ids=str)
def test_resumes_optax_both_ways(options):
    accepted = limit("optax", options)
    options = {"eps": resume.EPS} | options
    rate = lambda count: jnp.asarray(RATES)[count]  # noqa: E731
    ours, theirs = rmsprop(rate, **options), optax.rmsprop(rate, **options)
    with jax.numpy_dtype_promotion("standard"):
        middle, state = resume.run_transformation(theirs, theirs.init(ORIGIN), ORIGIN, 0, STOP)
        whole, _ = resume.run_transformation(theirs, theirs.init(ORIGIN), ORIGIN, 0, END)
        end, _ = resume.run_transformation(ours, interop.from_optax(state), middle, STOP, END)
        assert difference(end, whole) < accepted
        our_middle, our_state = resume.run_transformation(ours, ours.init(ORIGIN), ORIGIN, 0, STOP)
        like = theirs.init(ORIGIN)
        carried = interop.to_optax(our_state, like)
        assert jax.tree.structure(carried) == jax.tree.structure(like)
        back, _ = resume.run_transformation(theirs, carried, our_middle, STOP, END)
        assert difference(back, whole) < accepted


def test_optax_scale_by_rms_and_half_precision():
    params = {"w": jnp.ones(3, jnp.bfloat16), "z": jnp.ones(2, jnp.complex64)}
    theirs = optax.scale_by_rms()
    with jax.numpy_dtype_promotion("standard"):
        _, state = theirs.update(params, theirs.init(params))
    carried = interop.from_optax(state)
    assert {k: x.dtype.name for k, x in carried.nu.items()} == {"w": "float32", "z": "float32"}
    expected = scale_by_rms().init(params)
    assert jax.tree.map(jnp.shape, carried) == jax.tree.map(jnp.shape, expected)
    again = interop.to_optax(carried, theirs.init(params))
    assert jax.tree.all(jax.tree.map(lambda a, b: a.dtype == b.dtype and bool((a == b).all()), again, state))


def test_optax_state_without_or_with_two_second_moments():
    params = jnp.ones(2)
    with pytest.raises(ValueError, match="0 second moments"):
        interop.from_optax(optax.sgd(0.1, momentum=0.9).init(params))
    with pytest.raises(ValueError, match="2 second moments"):
        interop.from_optax(optax.chain(optax.scale_by_rms(), optax.scale_by_rms()).init(params))
    plain, moving = {}, {"momentum": 0.9}
    for ours, theirs in ((plain, moving), (moving, plain)):
        with pytest.raises(ValueError, match="only one of state and like has trace"):
            interop.to_optax(rmsprop(0.1, **ours).init(params), optax.rmsprop(0.1, **theirs).init(params))


# --- What is wrong is listed -----------------------------------------------------------------------------


def torch_checkpoint(**options):
    return recorded("torch", options or {"momentum": 0.9, "centered": True}).checkpoint


def read(checkpoint, names=NAMES, convert=convert, params=None):
    return interop.from_pytorch(checkpoint, names, convert, params)


def test_missing_and_extra_names():
    with pytest.raises(ValueError, match=r"has 3 parameters, names has 2: \['conv.weight', 'fc.weight'\]"):
        read(torch_checkpoint(), NAMES[:2])
    with pytest.raises(ValueError, match="has 3 parameters, names has 4"):
        read(torch_checkpoint(), [*NAMES, "extra"])
    with pytest.raises(ValueError, match=r"convert asks for 'fc.bias', the checkpoint has \['conv.weight', 'fc.b', "):
        read(torch_checkpoint(), [*NAMES[:2], "fc.b"], lambda arrays: [arrays[name] for name in NAMES])
    with pytest.raises(ValueError, match=r"leaves something out: from {'conv.weight'.*it makes {'': \(3, 8\)}"):
        read(torch_checkpoint(), convert=lambda arrays: arrays["fc.weight"])


def test_missing_slots():
    lacking_one = torch_checkpoint()
    del lacking_one["state"][1]["momentum_buffer"]
    with pytest.raises(ValueError, match=r"lacks {'momentum_buffer': \['fc.weight'\]}"):
        read(lacking_one)
    never_stepped = torch_checkpoint()
    del never_stepped["state"][2]
    with pytest.raises(ValueError, match=r"'square_avg': \['fc.bias'\].*'momentum_buffer': \['fc.bias'\]"):
        read(never_stepped)
    no_mean = torch_checkpoint()
    for entry in no_mean["state"].values():
        del entry["grad_avg"]
    with pytest.raises(ValueError, match=r"lacks {'grad_avg': \['conv.weight', 'fc.bias', 'fc.weight'\]}"):
        read(no_mean)
    with pytest.raises(ValueError, match="the checkpoint lacks"):
        read({"state": {}, "param_groups": [{"params": [], "momentum": 0, "centered": False}]}, [])


def test_a_state_without_the_momentum_that_the_dialect_needs():
    state = read(torch_checkpoint(centered=True))
    params = convert(ORIGIN)
    with pytest.raises(ValueError, match=r"state.trace is None: made with other options"):
        dialects.pytorch(0.1, centered=True, momentum=0.9).update(params, state)
    with pytest.raises(ValueError, match=r"state.mu is not None: made with other options"):
        dialects.pytorch(0.1).update(params, state)


def test_transposed_shapes():
    def forgot_to_transpose(arrays):
        return {**convert(arrays), "fc": {"kernel": arrays["fc.weight"], "bias": arrays["fc.bias"]}}

    params = convert(ORIGIN)
    with pytest.raises(
        ValueError, match=r"square_avg does not fit.*{\"\['fc'\]\['kernel'\]\": \(\(3, 8\), \(8, 3\)\)}"
    ):
        read(torch_checkpoint(), convert=forgot_to_transpose, params=params)
    # Without `params` the first update tells.
    state = read(torch_checkpoint(), convert=forgot_to_transpose)
    with pytest.raises(ValueError, match=r"gradient\['fc'\]\['kernel'\] has shape \(8, 3\), its nu \(3, 8\)"):
        dialects.pytorch(0.1, centered=True, momentum=0.9).update(params, state)
    with pytest.raises(ValueError, match=r"\['fc'\]\['bias'\]\": \(\(3,\), None\)"):
        read(torch_checkpoint(), params={"conv": params["conv"], "fc": {"kernel": params["fc"]["kernel"]}})


def test_timm_is_not_pytorch():
    timm = recorded("timm", {"momentum": 0.9}).checkpoint
    with pytest.raises(ValueError, match="not pytorch's, and momentum_buffer means another thing: from_timm"):
        read(timm)
    with pytest.raises(ValueError, match="not timm's, and momentum_buffer means another thing: from_pytorch"):
        interop.from_timm(torch_checkpoint(), NAMES, convert)


def test_complex_accumulators():
    checkpoint = torch_checkpoint()
    checkpoint["state"][2]["square_avg"] = np.ones(3, np.complex64)
    with pytest.raises(ValueError, match="complex accumulators"):
        read(checkpoint)
    state = rmsprop(0.1, momentum=0.9).init({"w": jnp.ones(2, jnp.complex64)})
    with pytest.raises(ValueError, match="complex accumulators"):
        interop.to_keras(state, lambda tree: tree)


def test_foreign_variables_are_named():
    keras = recorded("keras", {"momentum": 0.9}).checkpoint
    with pytest.raises(ValueError, match=r"not variables of Keras' RMSprop: \['adam/w_m'\]"):
        interop.from_keras([*keras, ("adam/w_m", np.ones(1))], convert)
    with pytest.raises(ValueError, match=r"lacks {'velocity': \['fc_bias'\]}"):
        interop.from_keras([v for v in keras if not v[0].endswith("fc_bias_velocity")], convert)
    slots = recorded("tensorflow", {"momentum": 0.9}).checkpoint
    with pytest.raises(ValueError, match=r"not slots of RMSProp: \['fc_bias', 'fc_bias/Adam'\]"):
        interop.from_tensorflow1({**slots, "fc_bias": np.ones(3), "fc_bias/Adam": np.ones(3)}, convert)
    with pytest.raises(ValueError, match=r"lacks {'RMSProp_1': \['fc_bias'\]}"):
        interop.from_tensorflow1({k: v for k, v in slots.items() if k != "fc_bias/RMSProp_1"}, convert)


def test_convert_back_must_give_the_names():
    torch_free = rmsprop(0.1).init(convert(ORIGIN))
    with pytest.raises(ValueError, match=r"lacks \['x'\] of names, and has \['fc.bias'\] beside them"):
        interop._export(torch_free, convert_back, [*NAMES[:2], "x"])


def test_tensorflow1_names():
    state = rmsprop(0.1, momentum=0.9, initial_scale=1.0).init({"w": jnp.ones(2)})
    slots = interop.to_tensorflow1(state, lambda tree: tree, name="Opt")
    assert {k: v.tolist() for k, v in slots.items()} == {"w/Opt": [1, 1], "w/Opt_1": [0, 0]}
    again = interop.from_tensorflow1(
        {k + ":0": v for k, v in slots.items()}, lambda arrays: {"w": arrays["w"]}, name="Opt"
    )
    assert jax.tree.all(jax.tree.map(jnp.array_equal, again, state))
    # The slot that TensorFlow has also without momentum.
    assert set(interop.to_tensorflow1(rmsprop(0.1).init({"w": jnp.ones(2)}), lambda tree: tree)) == {
        "w/RMSProp",
        "w/RMSProp_1",
    }
