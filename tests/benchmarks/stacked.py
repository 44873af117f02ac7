"""A Transformer whose layers are stacked, and its two steps: with all gradients at once, and inside the backward pass."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from rmsprop_jax import value_and_update


class Size(NamedTuple):
    """Of a Transformer."""

    layers: int
    width: int
    heads: int
    length: int
    vocabulary: int
    batch: int = 1


def shapes(size: Size, dtype: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """Embedding (which is the head as well), positions and last norm; and the stacked layers."""
    n, d = size.layers, size.width
    outer = {"token": (size.vocabulary, d), "position": (size.length, d), "norm": (d,)}
    layers = {"qkv": (n, d, 3 * d), "out": (n, d, d), "up": (n, d, 4 * d), "down": (n, 4 * d, d)}
    layers |= {"norm1": (n, d), "norm2": (n, d), "bias": (n, 4 * d)}
    return tuple({k: jax.ShapeDtypeStruct(shape, dtype) for k, shape in tree.items()} for tree in (outer, layers))


def norm(x: jax.Array, scale: jax.Array) -> jax.Array:
    mean_square = jnp.mean(jnp.square(x.astype(jnp.float32)), -1, keepdims=True)
    return (x * jax.lax.rsqrt(mean_square + 1e-6)).astype(x.dtype) * scale


def layer_of(size: Size) -> Callable[..., Any]:
    def layer(params: Any, x: jax.Array, each: Any) -> tuple[jax.Array, None]:
        p = jax.tree.map(lambda p: p.astype(jnp.bfloat16), params)
        qkv = (norm(x, p["norm1"]) @ p["qkv"]).reshape(*x.shape[:2], 3, size.heads, -1)
        q, k, v = jnp.moveaxis(qkv, 2, 0)
        scores = jnp.einsum("bqhd,bkhd->bhqk", q, k).astype(jnp.float32) * q.shape[-1] ** -0.5
        causal = jnp.tril(jnp.ones((x.shape[1], x.shape[1]), bool))
        scores = jax.nn.softmax(jnp.where(causal, scores, -1e9), -1).astype(x.dtype)
        x = x + jnp.einsum("bhqk,bkhd->bqhd", scores, v).reshape(x.shape) @ p["out"]
        return x + jax.nn.gelu(norm(x, p["norm2"]) @ p["up"] + p["bias"]) @ p["down"], None

    return layer


def loss(outer: Any, layers: Callable[..., Any], tokens: jax.Array) -> jax.Array:
    p = jax.tree.map(lambda p: p.astype(jnp.bfloat16), outer)
    x, _ = layers(p["token"][tokens[:, :-1]] + p["position"])
    logits = (norm(x, p["norm"]) @ p["token"].T).astype(jnp.float32)
    return jnp.mean(jax.nn.logsumexp(logits, -1) - jnp.take_along_axis(logits, tokens[:, 1:, None], -1)[..., 0])


def step_of(
    size: Size, tx: Any, inside: bool, place: Callable[[Any], Any] = lambda params: params
) -> Callable[..., Any]:
    """`step((outer, layers), (their states), tokens)`. `place` constrains the new parameters, as a mesh needs it."""
    layer = layer_of(size)

    def at_once(outer: Any, layers: Any, state: Any, tokens: jax.Array) -> Any:
        def of_both(outer: Any, layers: Any) -> jax.Array:
            body = jax.checkpoint(lambda x, p: layer(p, x, ()))
            return loss(outer, lambda x: jax.lax.scan(body, x, layers), tokens)

        value, (outer_grads, grads) = jax.value_and_grad(of_both, (0, 1))(outer, layers)
        updates, state = tx.update(grads, state, layers)
        return value, outer_grads, optax.apply_updates(layers, updates), state

    def step(params: Any, states: Any, tokens: jax.Array) -> Any:
        (outer, layers), (outer_state, state) = params, states
        update = value_and_update(loss, layer, tx) if inside else at_once
        value, grads, layers, state = update(outer, layers, state, tokens)
        updates, outer_state = tx.update(grads, outer_state, outer)
        return place((optax.apply_updates(outer, updates), layers)), (outer_state, state), value

    return step
