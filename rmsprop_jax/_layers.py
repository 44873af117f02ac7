"""The optimizer's step inside the backward pass of stacked layers."""

import functools
import numbers
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jax.tree import flatten_with_path, leaves_with_path
from jax.tree_util import all_leaves, keystr

from . import _checks, _storage
from ._rmsprop import RMSPropState
from ._rounding import RoundParamsState


__all__ = ["value_and_update"]


def value_and_update(
    loss: Callable[..., Any], layer: Callable[..., Any], tx: Any, has_aux: bool = False
) -> Callable[..., tuple[Any, Any, Any, Any]]:
    """Like :func:`jax.value_and_grad`, but updates stacked layers one by one and keeps no gradient of them.

    The gradients of all layers together take as many bytes as the parameters. Here the backward pass computes the
    gradient of one layer, lets `tx` update this layer, and throws the gradient away::

        x₀, x₁ = layer(p₀, x₀), ...    forward: only the input of each layer is kept, as with jax.checkpoint
        gᵢ, dxᵢ = vjp of layer i       backward, from the last layer to the first
        pᵢ, sᵢ ← tx.update(gᵢ, sᵢ, pᵢ, layer=i)

    Parameters and state end with the same bits as with :func:`jax.value_and_grad` of a :func:`jax.lax.scan` over
    `jax.checkpoint(layer)`, `tx.update` and :func:`optax.apply_updates`. The state is the ordinary one, so a run can
    change to this step, and back, at any time. Only in float32 may the last bit differ, where two products are added,
    as in momentum, centering, a decay and Adam, and in plain RMSProp if its hyperparameters are injected: XLA rounds
    one of the two or none, and not the same in each program. Where a gradient differs in its last bit, so may its
    random bits, and then codes in a state of one byte differ by one.

    Each layer is updated before the gradients of earlier ones exist, so `tx` cannot see them together: a clip by the
    global norm is an error. A model must have stacked layers, and a stack can be used once in a step.

    Args:
        loss: `loss(outer, layers, *args)`, the ordinary loss. It calls `x, outs = layers(x, each, *shared)` once,
            where the :func:`jax.lax.scan` over the layers was, and outside of jit, scan, vmap, grad and checkpoint.
            `loss` is traced twice, the first time up to this call.
        layer: `layer(params, x, each, *shared) -> (x, out)`, with the parameters of one layer. The new `x` has the
            shapes and dtypes of the old one. `each` is this layer's entry of a tree of stacks, such as keys for
            dropout, or `()`; all layers get the same `shared`, such as a mask or an encoder's output. `out` may be
            None; `outs` is the stack of them. Their gradients are right. What `layer` closes over gets none.
        tx: the optimizer of the layers. What it does to one array must not depend on the gradient of another.
        has_aux: whether `loss` returns a pair of the loss and auxiliary outputs.

    Returns:
        `step(outer, params, state, *args) -> (value, grads, params, state)`, to be called inside :func:`jax.jit` with
        `params` and `state` donated. `outer` are all other parameters, such as the embedding: `grads` are their
        gradients. `params` are those of the layers, stacked in the first axis of each array, and `state` is
        `tx.init(params)`. `tx` then sees stacks of one layer. Where it looks at an array as a whole, as `optax.lamb`
        and a clip of each array do, it looks at that of one layer. With `jax.vmap(tx.init)(params)` it sees a layer
        without the first axis, and each layer has its own count: `optax.adaptive_grad_clip` and `optax.contrib.muon`
        need that. (A state without a count is the same in both cases. `tx` then sees stacks.) `value` is what `loss`
        returns: with `has_aux` a pair.

    Raises:
        TypeError: at construction, if an argument is of a wrong type. In a step, if a leaf is no array, or `layer`
            returns no pair, or an `x` of another shape or dtype.
        ValueError: in a step, if `params` are not stacked; `state` belongs to other parameters; `tx` couples
            arrays; a wrapper keeps `layer` from a transformation that rounds; `loss` calls `layers` never, twice, or
            inside a transformation of JAX; or `layer` closes over an array of `outer` or `params`.

    Example:
        >>> import jax, jax.numpy as jnp, optax, rmsprop_jax
        >>> tx = optax.chain(rmsprop_jax.rmsprop(5e-4, state_dtype="uint8"), rmsprop_jax.round_params_stochastically())
        >>> def layer(params, x, each):
        ...     return x + jnp.tanh(x @ params["kernel"]), None
        >>> def loss(head, layers, x):
        ...     x, _ = layers(x)
        ...     return jnp.mean(jnp.square(x @ head).astype(jnp.float32))
        >>> step = jax.jit(rmsprop_jax.value_and_update(loss, layer, tx), donate_argnums=(1, 2))
        >>> params = {"kernel": jnp.zeros((12, 8, 8), jnp.bfloat16)}  # twelve layers
        >>> head, state, x = jnp.ones(8, jnp.bfloat16), tx.init(params), jnp.ones((4, 8), jnp.bfloat16)
        >>> for _ in range(3):
        ...     value, grads, params, state = step(head, params, state, x)
        ...     print(f"{value:.0f}")
        64
        47
        39

    References:
        Lv et al., `Full parameter fine-tuning with limited resources (LOMO) <https://arxiv.org/abs/2306.09782>`_, 2023.
        PyTorch: `optimizer step in backward <https://docs.pytorch.org/tutorials/intermediate/optimizer_step_in_backward_tutorial.html>`_.
    """
    for name, function in {"loss": loss, "layer": layer}.items():
        if not callable(function):
            raise TypeError(f"{name} has type {type(function).__name__}: allowed is a function")
    if not (callable(getattr(tx, "init", None)) and callable(getattr(tx, "update", None))):
        raise TypeError(f"tx has type {type(tx).__name__}: allowed is an optax.GradientTransformation")
    has_aux = _checks.flag("has_aux", has_aux)

    def step(outer: Any, params: Any, state: Any, *args: Any) -> tuple[Any, Any, Any, Any]:
        for name, tree in {"outer": outer, "params": params, "state": state}.items():
            _check_arrays(name, tree)

        def inputs(outer: Any, here: jax.Array) -> Any:
            @jax.tree_util.Partial  # jax.jit(loss) takes it, and gets the right error
            def layers(x: Any, each: Any = (), *shared: Any) -> Any:
                _check_level(here, (x, each, *shared))
                raise _Reached((x, each, *shared))

            try:
                loss(outer, layers, *args)
            except _Reached as reached:
                return reached.args[0]
            raise ValueError("loss never calls layers: call it once, in the place of the scan over the layers")

        def value_of(outer: Any, result: Any) -> Any:
            results = [result]

            def layers(*_: Any) -> Any:
                if not results:
                    raise ValueError("loss calls layers twice: call it once, since each layer is updated once")
                return results.pop()

            value = loss(outer, layers, *args)
            return value if has_aux else (value, None)

        given, to_outer = jax.vjp(inputs, outer, jnp.float32(0))
        result, update_layers = _run(layer, tx, outer, params, state, *given)
        value, from_value, aux = jax.vjp(value_of, outer, result, has_aux=True)
        scalar = all_leaves([value]) and jnp.shape(value) == ()
        if not (scalar and jnp.issubdtype(jnp.result_type(value), jnp.floating)):
            raise TypeError(f"loss returns {_types(value)}: allowed is a real scalar, or a pair with has_aux=True")
        grads, cotangents = from_value(jnp.ones_like(value))
        params, state, cotangents = update_layers(cotangents)
        grads = jax.tree.map(_add, grads, to_outer(cotangents)[0])
        return (value, aux) if has_aux else value, grads, params, state

    return step


class _Reached(BaseException):
    """The loss has called layers. What it would do behind them needs their result."""


# --- Forward and backward -------------------------------------------------------------------------------------


def _run(
    layer: Callable[..., Any], tx: Any, outer: Any, params: Any, state: Any, x: Any, each: Any, *shared: Any
) -> Any:
    """The last x and the stacked outs, and a function from their cotangents to what a step returns."""
    n = _number_of_layers(params, each)
    _check_layer(layer, outer, params, x, each, *shared)
    update, stacked = _one_by_one(tx, params, state, n)
    _check_update(update, stacked, params, state)

    def forward(x: Any, of_layer: Any) -> Any:
        p, each = of_layer
        y, out = layer(p, x, each, *shared)
        return y, (out, x)

    y, (outs, inputs) = lax.scan(forward, x, (params, each))

    def update_layers(cotangents: Any) -> tuple[Any, Any, tuple[Any, ...]]:
        def backward(carry: Any, of_layer: Any) -> Any:
            params, new_state, dx, dshared = carry
            i, x, each, dout = of_layer
            p, s = _take(params, i), _state_of(stacked, new_state, state, i)
            result, vjp = jax.vjp(layer, _first(p), x, each, *shared)
            grads, dx, deach, *d = vjp(_with_float0(result, (dx, dout)))
            updates, s = update(_with_float0(p, jax.tree.map(lambda g: g[None], _floats(grads))), s, p, i)
            params = _put(params, _apply(p, updates), i)
            new_state = jax.tree.map(lambda k, all, one: _put(all, one, i) if k else one, stacked, new_state, s)
            return (params, new_state, _floats(dx), jax.tree.map(_add, dshared, _floats(d))), _floats(deach)

        dx, douts = _floats(cotangents)
        dshared = jax.tree.map(jnp.zeros_like, _floats(list(shared)))
        # The stacks are in the carry, which XLA updates in place.
        (new_params, new_state, dx, dshared), deach = lax.scan(
            backward, (params, state, dx, dshared), (jnp.arange(n), inputs, each, douts), reverse=True
        )
        return new_params, new_state, _with_float0((x, each, *shared), (dx, deach, *dshared))

    return (y, outs), update_layers


def _one_by_one(tx: Any, params: Any, state: Any, n: int) -> tuple[Callable[..., Any], Any]:
    """The update of a stack of one layer, and which leaves of the state are stacks. All layers share the others."""
    of_tx = optax.with_extra_args_support(tx).update

    def update(grads: Any, state: Any, params: Any, i: Any) -> Any:
        return of_tx(grads, state, params, layer=i)

    def of_size(n: int) -> Any:
        return jax.eval_shape(tx.init, jax.tree.map(lambda p: jax.ShapeDtypeStruct((n, *p.shape[1:]), p.dtype), params))

    ordinary, one = of_size(n), of_size(1)
    if not (different := _differences(state, ordinary)):
        stacked = jax.tree.map(lambda x, longer: x.shape != longer.shape, ordinary, of_size(n + 1))
        sliced = jax.tree.map(lambda k, x: jax.ShapeDtypeStruct((1,) * k + x.shape[k:], x.dtype), stacked, ordinary)
        if different := _differences(sliced, one):
            raise ValueError(f"tx makes a different state for one layer than for all: {different}. {_OWN_STATES}")
        for (path, x), k in zip(leaves_with_path(ordinary), jax.tree.leaves(stacked), strict=True):
            if not k and (x.dtype == jnp.uint32 or jnp.issubdtype(x.dtype, jax.dtypes.prng_key)):
                raise ValueError(
                    f"state{keystr(path)} looks like a random key, which all layers would share: "
                    "draw random numbers in loss or layer, or do not use value_and_update"
                )
        return update, stacked
    if _differences(state, jax.eval_shape(jax.vmap(tx.init), params)):
        raise ValueError(f"state belongs to other parameters or another tx: {different}. Make it with tx.init(params)")
    return jax.vmap(update, in_axes=(0, 0, 0, None)), jax.tree.map(lambda _: True, state)


_OWN_STATES = "Leave out optax.flatten, or use jax.vmap(tx.init)(params) as the state: then each layer has its own"


def _take(tree: Any, i: Any) -> Any:
    """A stack of one layer."""
    return jax.tree.map(lambda x: lax.dynamic_slice_in_dim(x, i, 1, 0), tree)


def _first(tree: Any) -> Any:
    return jax.tree.map(lambda x: x[0], tree)


def _put(tree: Any, one: Any, i: Any) -> Any:
    return jax.tree.map(lambda x, y: lax.dynamic_update_slice_in_dim(x, y, i, 0), tree, one)


def _state_of(stacked: Any, new: Any, old: Any, i: Any) -> Any:
    """The state of a layer. What all share, such as a count, is for each of them what it was before the step."""
    return jax.tree.map(lambda k, new, old: _take(new, i) if k else old, stacked, new, old)


def _apply(params: Any, updates: Any) -> Any:
    """`optax.apply_updates`. Integers have no update, and stay."""
    return jax.tree.map(lambda p, u: p if u is None else optax.apply_updates(p, u), params, _floats(updates))


# Cotangents of integers and keys are float0, which cannot go through a scan: there they are None.


def _floats(tree: Any) -> Any:
    return jax.tree.map(lambda x: x if jnp.issubdtype(x.dtype, jnp.inexact) else None, tree)


def _with_float0(primals: Any, cotangents: Any) -> Any:
    return jax.tree.map(lambda x, d: np.zeros(jnp.shape(x), jax.dtypes.float0) if d is None else d, primals, cotangents)


def _add(x: Any, y: Any) -> Any:
    return x if x.dtype == jax.dtypes.float0 else x + y


# --- Checks, all at trace time --------------------------------------------------------------------------------


def _check_arrays(name: str, tree: Any) -> None:
    for path, x in leaves_with_path(tree):
        if not isinstance(x, (jax.Array, np.ndarray, np.generic, numbers.Number)):
            raise TypeError(
                f"{name}{keystr(path)} has type {type(x).__name__}: allowed are arrays. Take everything else "
                "out with eqx.partition(module, eqx.is_array) or nnx.split, and let loss and layer close over it"
            )


def _check_level(here: jax.Array, given: Any) -> None:
    """Raises an error inside a transformation of JAX.

    There the two meet in a tracer of another type, or are differentiated by a trace to which `here` is a constant.
    """
    known = []

    @jax.custom_jvp
    def meet(here: Any, leaves: list[Any]) -> Any:
        return here

    @meet.defjvp
    def _(primals: Any, tangents: Any) -> Any:
        known.append(primals[0] is not here)
        result, leaves = primals
        return functools.reduce(lambda y, x: jnp.where(jnp.all(x == x), y, y), leaves, result), tangents[0]

    met = meet(here, jax.tree.leaves(given))
    if type(met) is not type(here) or not (known and known[0]):
        raise ValueError(
            "loss calls layers inside jit, scan, checkpoint, vmap, grad or another transformation: call it outside of "
            "these, with the whole batch. value_and_update compiles and checkpoints each layer itself"
        )


def _number_of_layers(params: Any, each: Any) -> int:
    shapes = {f"params{keystr(path)}": jnp.shape(p) for path, p in leaves_with_path(params)}
    if not shapes:
        raise ValueError("params has no arrays: pass those of the layers, stacked along the first axis of each")
    (name, shape), *_ = shapes.items()
    shapes |= {f"each{keystr(path)}": jnp.shape(x) for path, x in leaves_with_path(each)}
    for other, found in shapes.items():
        if not found or found[0] != shape[0]:
            raise ValueError(
                f"{name} has shape {shape}, and {other} has {found}: the first axis must be that of the layers, with "
                "one length in all. Stack the layers, as jax.vmap of their init does"
            )
    if shape[0] == 0:
        raise ValueError(f"{name} has shape {shape}: without layers, use jax.value_and_grad and tx.update")
    return shape[0]


def _check_layer(layer: Callable[..., Any], outer: Any, params: Any, x: Any, each: Any, *shared: Any) -> None:
    jaxpr, result = jax.make_jaxpr(
        lambda params, x, each, *shared: layer(_first(params), x, _first(each), *shared), return_shape=True
    )(params, x, each, *shared)
    if not (isinstance(result, (tuple, list)) and len(result) == 2):
        raise TypeError(f"layer returns {type(result).__name__}: allowed is the pair (x, out), where out may be None")
    before, after = _types(x), _types(result[0])
    if before != after:
        raise TypeError(f"layer turns x from {before} into {after}: it must keep structure, shapes and dtypes")
    for name, tree in {"outer": outer, "params": params}.items():
        for path, p in leaves_with_path(tree):
            if any(p is const for const in jaxpr.consts) and jnp.issubdtype(p.dtype, jnp.inexact):
                raise ValueError(
                    f"layer closes over {name}{keystr(path)}, which would get no gradient from there: pass it to "
                    "layer, with layers(x, each, shared)"
                )


def _types(tree: Any) -> Any:
    return jax.tree.map(lambda x: f"{jnp.result_type(x)}{list(jnp.shape(x))}", tree)


def _differences(tree: Any, expected: Any) -> str:
    """Where two trees differ in structure or shapes, for an error."""
    shapes, allowed = ({keystr(path): jnp.shape(x) for path, x in leaves_with_path(t)} for t in (tree, expected))
    wrong = [path for path in {**allowed, **shapes} if shapes.get(path) != allowed.get(path)]
    return "; ".join(
        f"state{path} has shape {shapes[path]}" if path in shapes else f"state{path} is missing" for path in wrong
    )


def _check_update(update: Callable[..., Any], stacked: Any, params: Any, state: Any) -> None:
    """Raises an error if layers cannot be updated one by one, or would get other random bits than in a stack."""
    leaves, treedef = flatten_with_path(params)

    def updated(grads: dict[int, Any], state: Any, i: Any) -> Any:
        """Updates and state of a layer, with zeros for all other gradients."""
        p, s = _take(params, 0), _state_of(stacked, state, state, 0)
        zeros = [_with_float0(x, _floats(jnp.zeros_like(x))) for x in jax.tree.leaves(p)]
        updates, s = update(treedef.unflatten(grads.get(j, zero) for j, zero in enumerate(zeros)), s, p, i)
        return treedef.flatten_up_to(_floats(updates)), s

    for j, (path, p) in enumerate(leaves):
        if not jnp.issubdtype(p.dtype, jnp.inexact):
            continue
        updates, new = _depends(lambda grad, j=j: updated({j: grad}, state, jnp.int32(0)), p[:1])
        if any(jax.tree.leaves(updates[:j] + updates[j + 1 :])):
            raise ValueError(
                f"tx uses the gradient of params{keystr(path)} to change other arrays, as a clip by the global norm "
                "and optax.flatten do. Layers are updated one by one, before the gradients of earlier ones exist: clip "
                "each array (optax.clip_by_block_rms) or each number (optax.clip), and leave out optax.flatten"
            )
        if any(jax.tree.leaves(jax.tree.map(lambda k, depends: depends and not k, stacked, new))):
            raise ValueError(
                f"tx uses the gradient of params{keystr(path)} to change a part of its state that all layers share. "
                f"{_OWN_STATES}"
            )

    # Random bits are a hash of the number of the update and of the place in the stack, for which they need the layer.
    def layer_matters(state: Any) -> Any:
        return _depends(lambda i: updated({}, state, i), jnp.int32(0))

    def with_step(step: Any) -> Any:
        return _map_nodes(RoundParamsState, lambda s: s._replace(step=jnp.full_like(s.step, step)), wide)

    # As if no average were rounded, to see the rounding of parameters alone.
    wide = _map_nodes(RMSPropState, lambda s: jax.tree.map(_widened, s), state)
    lost = jax.tree.map(lambda x, w, placed: x.dtype != w.dtype and not placed, state, wide, layer_matters(state)[1])
    updates, new = _depends(lambda step: updated({}, with_step(step), jnp.int32(0)), jnp.int32(0))
    rounded = updates, _map_nodes(RoundParamsState, lambda s: s._replace(step=False), new)
    lost = lost, jax.tree.map(lambda rounds, placed: rounds and not placed, rounded, layer_matters(wide))
    if any(jax.tree.leaves(lost)):
        raise ValueError(
            "a wrapper in tx does not pass the argument `layer` to a transformation that rounds at random, so layers "
            "would get other random bits than in a stack. optax.MultiSteps(...).gradient_transformation() is one: use "
            "optax.GradientTransformationExtraArgs(multi_steps.init, multi_steps.update) instead"
        )


def _widened(x: Any) -> Any:
    return jnp.zeros(x.shape, jnp.float32) if _storage.is_rounded(x.dtype) else x


def _map_nodes(kind: type[Any], f: Callable[[Any], Any], tree: Any) -> Any:
    return jax.tree.map(lambda x: f(x) if isinstance(x, kind) else x, tree, is_leaf=lambda x: isinstance(x, kind))


def _depends(f: Callable[[Any], Any], x: jax.Array) -> Any:
    """Which leaves of f(x) depend on x: those that jax.vmap over x makes a batch of. Nothing is computed."""
    answers = []

    @jax.custom_batching.custom_vmap
    def watch(tree: Any) -> Any:
        return tree

    @watch.def_vmap
    def _(size: int, batched: Any, tree: Any) -> Any:
        answers.append(batched[0])
        return tree, batched[0]

    def watched(x: jax.Array) -> Any:
        result = f(x)
        answers.append(jax.tree.map(lambda _: False, result))
        return watch(result)

    jax.eval_shape(lambda: jax.vmap(watched)(jnp.stack([x, x])))
    return answers[-1]
