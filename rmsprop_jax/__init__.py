"""RMSProp for JAX, exact in every dialect: one Optax gradient transformation."""

from . import dialects as dialects, interop as interop
from ._carry import carry_over as carry_over
from ._layers import value_and_update as value_and_update
from ._metrics import metrics as metrics
from ._rmsprop import (
    rmsprop as rmsprop,
    RMSPropState as RMSPropState,
    scale_by_rms as scale_by_rms,
)
from ._rounding import (
    params_in_bfloat16 as params_in_bfloat16,
    params_in_float32 as params_in_float32,
    round_params_stochastically as round_params_stochastically,
    RoundParamsState as RoundParamsState,
)


__version__ = "0.3.0"
