"""Batched generation with a KV cache: prefill a batch of prompts, then decode it until its last row has stopped."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxpost import lora
from jaxpost.models import decoder
from jaxpost.models.policy import Policy
from jaxpost.models.spec import unroll
from jaxpost.ops.sampling import sample
from jaxpost.types import Completion, Stream


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How tokens are drawn. The defaults are greedy."""

    max_new_tokens: int = 128
    temperature: float = 0.0  # 0: greedy
    top_k: int = 0  # 0: off
    top_p: float = 1.0
    min_p: float = 0.0

    def __post_init__(self):
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens {self.max_new_tokens} must be at least 1")
        if self.temperature < 0 or not 0 < self.top_p <= 1 or not 0 <= self.min_p <= 1 or self.top_k < 0:
            raise ValueError(f"out of range: {self}")


class Sampler:
    """load(weights), then generate(prompts) as often as wanted. One compilation per prompt bucket and batch size.

    Which random number a token uses depends on (seed, prompt number, token index) alone, not on its batch mates.
    """

    def __init__(self, policy: Policy, stop_ids: Sequence[int], *, batch_size: int = 32, bucket: int = 64):
        self._unrolled = jax.default_backend() == "cpu" and policy.options.rules is None
        self._spec = policy.spec
        spec = policy.spec.unrolled if self._unrolled else policy.spec
        self._policy = dataclasses.replace(policy, spec=spec, adapters=None)
        self._stop = tuple(sorted(set(stop_ids)))
        self._batch, self._bucket = batch_size, bucket
        self._adapters = policy.adapters
        self._weights = None
        self._prefill = jax.jit(partial(_prefill, self._policy), static_argnames="length")
        rules = policy.options.rules
        everywhere = None if rules is None else rules.sharding()  # what the host reads is whole on every process
        self._decode = jax.jit(
            partial(_decode, self._policy, self._stop),
            static_argnames="sampling",
            donate_argnames="cache",
            out_shardings=(None, everywhere, everywhere, everywhere, everywhere),
        )

    def load(self, params: Any, adapters: Any = None) -> None:
        """Take a copy of the weights that is fast to decode with: adapters merged, layers apart on a CPU."""

        def prepare(params: Any, adapters: Any) -> Any:
            merged = params if adapters is None else lora.merge(params, adapters, self._adapters)
            merged = jax.tree.map(lambda x: x.astype(self._policy.options.dtype), merged)
            return unroll(self._spec, merged) if self._unrolled else merged

        self._weights = jax.jit(prepare)(params, adapters)

    def unload(self) -> None:
        """Give the copy's memory back."""
        self._weights = None

    def generate(self, prompts: Sequence[Sequence[int]], sampling: Sampling, *, seed: int = 0) -> list[Completion]:
        """One completion a prompt, in order. The stop token, where one was drawn, is the completion's last token."""
        if self._weights is None:
            raise ValueError("generate: call load(weights) first")
        if empty := [i for i, prompt in enumerate(prompts) if not len(prompt)]:
            raise ValueError(f"generate: prompt {empty[0]} is empty")
        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))  # like lengths share a batch
        done: dict[int, Completion] = {}
        for start in range(0, len(order), self._batch):
            numbers = order[start : start + self._batch]
            done |= zip(numbers, self._one_batch(prompts, numbers, sampling, seed), strict=True)
        return [done[i] for i in range(len(prompts))]

    def _one_batch(self, prompts: Sequence, numbers: list[int], sampling: Sampling, seed: int) -> list[Completion]:
        longest = max(len(prompts[i]) for i in numbers)
        width = -(-longest // self._bucket) * self._bucket
        tokens = np.zeros((self._batch, width), np.int32)
        lengths = np.ones(self._batch, np.int32)
        for row, number in enumerate(numbers):
            tokens[row, : len(prompts[number])] = prompts[number]
            lengths[row] = len(prompts[number])
        active = np.arange(self._batch) < len(numbers)
        draws = np.resize(np.asarray(numbers, np.int32), self._batch)
        cache = self._prefill(self._weights, tokens, length=width + sampling.max_new_tokens)
        last = tokens[np.arange(self._batch), lengths - 1]
        out = self._decode(
            self._weights, cache=cache, last=last, lengths=lengths, active=active, draws=draws,
            seed=np.uint32(seed), sampling=sampling,
        )  # fmt: skip
        ids, logprobs, counts, stopped = jax.device_get(out[1:])
        return [
            Completion(
                ids[row, : counts[row]].tolist(),
                logprobs[row, : counts[row]].tolist(),
                "eos" if stopped[row] else "length",
                0,
            )
            for row in range(len(numbers))
        ]


def _prefill(policy: Policy, weights: Any, tokens: jax.Array, *, length: int) -> dict:
    """Write the keys and values of right-padded prompts; padding lies behind every real token and is overwritten."""
    cache = decoder.init_cache(policy.spec, tokens.shape[0], length, policy.options.dtype)
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    return policy(weights, tokens, positions, None, cache=cache)[1]


def _decode(
    policy: Policy,
    stop_ids: tuple[int, ...],
    weights: Any,
    cache: dict,
    last: jax.Array,
    lengths: jax.Array,
    active: jax.Array,
    draws: jax.Array,
    seed: jax.Array,
    *,
    sampling: Sampling,
) -> tuple[dict, jax.Array, jax.Array, jax.Array, jax.Array]:
    """Decode until every active row has stopped: (cache, ids i32[B,N], behaviour logprobs f32[B,N], counts, stopped).

    The cache comes back because a donated buffer must have somewhere to go to be updated in place.
    The first step runs the prompt's last token again, so that every sampled token comes from this one program.
    """
    rows, limit = last.shape[0], sampling.max_new_tokens
    head = decoder.head(weights)
    base = jax.random.fold_in(jax.random.key(seed), Stream.EVAL)
    keys = jax.vmap(lambda draw: jax.random.fold_in(base, draw))(draws)

    def more(state: tuple) -> jax.Array:
        return (state[0] < limit) & jnp.any(state[3])

    def advance(state: tuple) -> tuple:
        n, cache, last, going, stopped, ids, logprobs, counts = state
        hidden, cache, _ = policy(weights, last[:, None], (lengths - 1 + n)[:, None], None, cache=cache)
        logits = jnp.einsum("bd,vd->bv", hidden[:, 0], head.astype(hidden.dtype), preferred_element_type=jnp.float32)
        if policy.spec.final_softcap is not None:
            logits = policy.spec.final_softcap * jnp.tanh(logits / policy.spec.final_softcap)
        token, logprob, _ = sample(
            logits, jax.vmap(lambda key: jax.random.fold_in(key, n))(keys), temperature=sampling.temperature,
            top_k=sampling.top_k, top_p=sampling.top_p, min_p=sampling.min_p,
        )  # fmt: skip
        ids = ids.at[:, n].set(jnp.where(going, token, 0))
        logprobs = logprobs.at[:, n].set(jnp.where(going, logprob, 0.0))
        hit = jnp.isin(token, jnp.asarray(stop_ids, jnp.int32)) if stop_ids else jnp.zeros_like(going)
        counts, stopped = counts + going, stopped | (going & hit)
        return n + 1, cache, token, going & ~hit, stopped, ids, logprobs, counts

    start = (
        jnp.zeros((), jnp.int32), cache, last, active, jnp.zeros_like(active),
        jnp.zeros((rows, limit), jnp.int32), jnp.zeros((rows, limit), jnp.float32), jnp.zeros(rows, jnp.int32),
    )  # fmt: skip
    _, cache, _, _, stopped, ids, logprobs, counts = jax.lax.while_loop(more, advance, start)
    return cache, ids, logprobs, counts, stopped
