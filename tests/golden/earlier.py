"""Writes a checkpoint of the version of rmsprop_jax that is on the path, with Orbax, and where its runs end.

    git worktree add ../earlier v0.2.0
    PYTHONPATH=../earlier python tests/golden/earlier.py tests/golden/checkpoint-0.2

tests/test_carry.py restores it with the present version.
"""

import importlib.metadata
import json
import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp

import rmsprop_jax


OPTIONS = {"momentum": {"momentum": 0.9}, "centered": {"centered": True}}
STATE_DTYPES = {"float32": None, "bfloat16": jnp.bfloat16, "uint8": jnp.uint8}
CASES = {
    f"{name}, {dtype}": {**options, "state_dtype": kind}
    for name, options in OPTIONS.items()
    for dtype, kind in STATE_DTYPES.items()
}
THREE_BYTES = "three bytes, uint8"  # bfloat16 parameters, which version 0.1 could not round
TARGET = np.linspace(-1, 1, 12, dtype=np.float32).reshape(4, 3)


def rate(count):
    return 0.01 / (1 + count / 50)


def transformation(options):
    return rmsprop_jax.rmsprop(rate, decay=0.99, **options)


def three_bytes(*keep_rest):
    rounded = rmsprop_jax.round_params_stochastically(*keep_rest)  # 0.2 has no argument
    return optax.chain(transformation({"state_dtype": jnp.uint8}), rounded)


def advance(tx, params, state, steps):
    def step(carry, _):
        params, state = carry
        grads = {"w": (params["w"] - TARGET).astype(params["w"].dtype)}
        updates, state = tx.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), None

    return jax.jit(lambda p, s: jax.lax.scan(step, (p, s), None, length=steps)[0])(params, state)


def main() -> None:
    folder = pathlib.Path(sys.argv[1]).resolve()
    kept, ends = {}, {}
    made = {name: (transformation(options), jnp.float32) for name, options in CASES.items()}
    if hasattr(rmsprop_jax, "round_params_stochastically"):
        made[THREE_BYTES] = three_bytes(), jnp.bfloat16
    for name, (tx, dtype) in made.items():
        start = {"w": jnp.zeros((4, 3), dtype)}
        params, state = advance(tx, start, tx.init(start), 40)
        kept[name] = {"params": params, "state": state}
        ends[name] = np.asarray(advance(tx, params, state, 40)[0]["w"], np.float32).tolist()
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(folder / "orbax", kept)
    versions = {name: importlib.metadata.version(name) for name in ("jax", "optax", "orbax-checkpoint")}
    # The checkpoint holds bits. These are their values.
    nu = {}
    for name, x in kept.items():
        wide = transformation({**CASES.get(name, {}), "state_dtype": None}).init(x["params"])
        nu[name] = np.asarray(rmsprop_jax.interop.from_rmsprop(x["state"], wide).nu["w"]).tolist()
    content = {"rmsprop_jax": rmsprop_jax.__version__, **versions, "nu": nu, "ends": ends}
    (folder / "ends.json").write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
