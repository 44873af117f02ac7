"""RMSProp for JAX, exact in every dialect: one Optax gradient transformation."""

from . import dialects, interop
from ._carry import carry_over
from ._layers import value_and_update
from ._metrics import metrics
from ._rmsprop import rmsprop, RMSPropState, scale_by_rms
from ._rounding import params_in_bfloat16, params_in_float32, round_params_stochastically, RoundParamsState


__all__ = [
    "RMSPropState",
    "RoundParamsState",
    "__version__",
    "carry_over",
    "dialects",
    "interop",
    "metrics",
    "params_in_bfloat16",
    "params_in_float32",
    "rmsprop",
    "round_params_stochastically",
    "scale_by_rms",
    "value_and_update",
]

__version__ = "0.4.0"
