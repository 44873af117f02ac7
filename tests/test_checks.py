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
    with pytest.raises(TypeError, match="nesterov=.* has type .*: allowed are True and False"):
        _checks.flag("nesterov", value)


def test_an_option_is_off_by_none_and_by_zero():
    for value in (None, 0, 0.0, np.float32(0), np.array(0)):
        assert _checks.off(value) is None
    for value in (0.5, np.array(0.5), jnp.float32(0)):  # a JAX array may be traced
        assert _checks.off(value) is value
