"""Checks of arguments: what passes, and errors that name the argument, its value and what is allowed."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rmsprop_jax import _checks


@pytest.mark.parametrize(
    "value",
    [3, np.int64(3), np.array(3), jnp.int32(3), np.float32(3.0), np.array(3.0), jnp.float32(3.0)],
    ids=repr,
)
def test_a_count_may_be_a_whole_number_in_any_scalar_array(value):
    assert _checks.count("count", value) == 3
    assert type(_checks.count("count", value, lower=3)) is int


NO_COUNTS = [None, True, np.True_, -1, 1.5, 3.0, np.float32(1.5), math.nan, np.inf, 2**31, 2**40, "3", 3j, [3]]


@pytest.mark.parametrize("value", [*NO_COUNTS, np.array([1, 2]), jnp.arange(2), np.array("3")], ids=repr)
def test_what_is_no_count_is_refused(value):
    with pytest.raises(ValueError, match=r"steps=.*: allowed is a whole number from 0 to 2147483647"):
        _checks.count("steps", value)


def test_a_count_has_a_lower_limit_and_is_never_traced():
    with pytest.raises(ValueError, match="steps=1: allowed is a whole number from 2 to"):
        _checks.count("steps", 1, lower=2)
    with pytest.raises(TypeError, match=r"steps is traced.*static_args"):
        jax.jit(lambda steps: _checks.count("steps", steps))(3)


@pytest.mark.parametrize("value", [True, np.True_, np.array(True)], ids=repr)
def test_a_flag_becomes_a_bool(value):
    assert _checks.flag("nesterov", value) is True


@pytest.mark.parametrize("value", [None, 1, 0.0, "no", jnp.array(True), np.array([True])], ids=repr)
def test_what_is_no_flag_is_refused(value):
    way_out = ".*name it in static_args" if isinstance(value, jax.Array) else ""
    with pytest.raises(TypeError, match=f"nesterov=.* has type .*: allowed are True and False{way_out}$"):
        _checks.flag("nesterov", value)


def test_an_option_is_off_by_none_and_by_zero():
    for value in (None, 0, 0.0, np.float32(0), np.array(0)):
        assert _checks.off(value) is None
    for value in (0.5, np.array(0.5), jnp.float32(0)):  # a JAX array may be traced
        assert _checks.off(value) is value


@pytest.mark.parametrize(
    ("value", "limits", "allowed"),
    [
        (1.5, {"upper": 1.0}, r" in \[0, 1\]"),
        (-0.1, {"upper": 1.0}, r" in \[0, 1\]"),
        (np.float32(-1), {}, " of at least 0"),
        (0.5, {"lower": 1.0}, " of at least 1"),
        *((value, {"lower": -math.inf}, "") for value in (math.nan, math.inf, -math.inf, 1e39, -(10**400))),
    ],
)
def test_a_number_has_limits(value, limits, allowed):
    with pytest.raises(ValueError, match=f"eps=.*: allowed is a finite number{allowed} that float32 can hold"):
        _checks.number("eps", value, **limits)


def test_numbers_at_their_limits_pass_and_arrays_of_jax_as_they_are():
    for value in (0, 1, 0.0, 1.0, np.float16(0.5), np.array(1)):
        assert _checks.number("decay", value, upper=1.0) == value
    unknown = jnp.float32(-3)
    assert _checks.number("decay", unknown, upper=1.0) is unknown


@pytest.mark.parametrize("value", [None, True, "0.1", 1j, np.array(True), jnp.array(1j)], ids=repr)
def test_what_is_no_number_is_refused(value):
    with pytest.raises(TypeError, match="eps.* has (type|dtype) .*: allowed is a (real )?number"):
        _checks.number("eps", value)


def test_several_numbers_and_zero_where_it_divides_are_refused():
    with pytest.raises(ValueError, match=r"eps has shape \(2,\): allowed is a scalar"):
        _checks.number("eps", np.ones(2))
    assert _checks.positive("scale", 0.1) == 0.1
    for value in (0.0, -1.0, 1e-40, np.float32(1e-45)):
        with pytest.raises(ValueError, match="scale=.*: allowed is a number above 0 \\(float32 cannot divide"):
            _checks.positive("scale", value)


def test_the_limit_of_a_clip_is_off_at_zero_and_below():
    assert _checks.limit("clipnorm", None) is None
    assert _checks.limit("clipnorm", 0.5) == 0.5
    assert _checks.limit("clipnorm", 0) is None
    assert _checks.limit("clipnorm", -1.0, lower=-math.inf) is None
    with pytest.raises(ValueError, match=r"clipnorm=-1.0: .* of at least 0"):
        _checks.limit("clipnorm", -1.0)
    for value, limit in ((0.5, 0.5), (0.0, math.inf), (-1.0, math.inf)):
        assert _checks.limit("clipnorm", jnp.float32(value)) == limit


def test_an_argument_that_is_not_available_is_refused_with_a_way_out():
    for value, neutral in ((None, False), (False, False), (0, 0.0), (np.array(0), 0)):
        _checks.refuse("use_ema", value, neutral, "use optax.ema")
    with pytest.raises(ValueError, match="use_ema=True.*use optax.ema"):
        _checks.refuse("use_ema", True, False, "use optax.ema")
    with pytest.raises(ValueError, match=r"use_ema is a JAX array.*use optax.ema.*static_args"):
        _checks.refuse("use_ema", jnp.array(True), False, "use optax.ema")
    with pytest.raises(
        ValueError, match=r"^b is a JAX array, but the argument a is not .*: leave it out.*name a and b in static_ar"
    ):
        _checks.refuse("a", 0.9, jnp.float32(0.9), "leave it out", "b")
