"""RMSProp for JAX, exact in every dialect: one Optax gradient transformation."""

from importlib.metadata import version

from . import dialects as dialects, interop as interop
from ._rmsprop import (
    rmsprop as rmsprop,
    RMSPropState as RMSPropState,
    scale_by_rms as scale_by_rms,
)


__version__ = version("rmsprop_jax")
