"""From logits to a token: temperature, filters, and the two logprobs of what was drawn."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def filtered(scores: jax.Array, *, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0) -> jax.Array:
    """Tempered scores f32[B,V] with -inf where top-k, top-p (1904.09751) or min-p (2407.01082) cut; 0, 1, 0: none.

    top-p keeps the smallest set of tokens whose probabilities reach p; ties at the threshold are all kept.
    """
    if top_k:
        kth = jax.lax.top_k(scores, min(top_k, scores.shape[-1]))[0][:, -1:]
        scores = jnp.where(scores < kth, -jnp.inf, scores)
    if top_p < 1.0:
        ordered = jnp.sort(scores, axis=-1)[:, ::-1]
        probs = jax.nn.softmax(ordered, axis=-1)
        before = jnp.cumsum(probs, axis=-1) - probs
        least = jnp.min(jnp.where(before < top_p, ordered, jnp.inf), axis=-1, keepdims=True)
        scores = jnp.where(scores < least, -jnp.inf, scores)
    if min_p > 0.0:
        scores = jnp.where(scores < jnp.max(scores, axis=-1, keepdims=True) + jnp.log(min_p), -jnp.inf, scores)
    return scores


def sample(
    logits: jax.Array, keys: jax.Array, *, temperature: float, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Draw one token a row: (tokens i32[B], behaviour_logprobs f32[B], sampler_logprobs f32[B]).

    logits f32[B,V]; keys: one PRNG key a row. temperature 0 is greedy (logprobs of the untempered distribution).
    behaviour: tempered, over the full vocabulary; sampler: after the filters.
    """
    scores = logits.astype(jnp.float32) / (temperature or 1.0)
    kept = filtered(scores, top_k=top_k, top_p=top_p, min_p=min_p)
    if temperature == 0:
        tokens = jnp.argmax(scores, axis=-1)
    else:
        noise = jax.vmap(lambda key: jax.random.gumbel(key, scores.shape[1:], jnp.float32))(keys)
        tokens = jnp.argmax(kept + noise, axis=-1)

    def logprob(x: jax.Array) -> jax.Array:
        return jnp.take_along_axis(jax.nn.log_softmax(x, axis=-1), tokens[:, None], axis=-1)[:, 0]

    return tokens.astype(jnp.int32), logprob(scores), logprob(kept)
