"""A model as algorithms see it: join weights, hidden states, logprobs of targets."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax

from jaxpost import lora
from jaxpost.models import decoder
from jaxpost.models.spec import DecoderSpec
from jaxpost.ops.logprobs import TokenStats, token_stats
from jaxpost.types import Batch


@dataclasses.dataclass(frozen=True)
class Policy:
    """`apply` of the losses. Hashable and free of arrays, so that jitted programs close over it."""

    spec: DecoderSpec
    options: decoder.Options = decoder.Options()
    adapters: lora.LoraConfig | None = None

    def __call__(self, weights: Any, tokens: jax.Array, positions: jax.Array, segments: jax.Array | None, **kwargs):
        """decoder.apply with this model's spec and options: (hidden, cache, aux)."""
        return decoder.apply(self.spec, weights, tokens, positions, segments, options=self.options, **kwargs)

    def join(self, params: Mapping[str, Any], frozen: Mapping[str, Any], role: str) -> Any:
        """The weights of a role: trained, or frozen, or a frozen base with trained adapters on it."""
        if role not in params:
            return frozen[role]
        if role not in frozen:
            return params[role]
        if self.adapters is None:
            raise ValueError(f"role {role!r} is both trained and frozen, and the model has no adapters")
        joined = lora.join(frozen[role], params[role], self.adapters)
        return lora.set_idle_apart(joined, self.adapters, self.spec)

    def target_stats(
        self,
        weights: Any,
        batch: Batch,
        *,
        temperature: float = 1.0,
        rng: jax.Array | None = None,
        embed_noise: float = 0.0,
    ) -> TokenStats:
        """Of each target: logprob, entropy of its distribution (nats), whether it is the likeliest token, log-sum-exp.

        f32[B,T] each, 0 where batch.mask is False. rng keys dropout and embed_noise (NEFTune's alpha); None is
        deterministic.
        """
        hidden, _, _ = self(weights, batch.tokens, batch.positions, batch.segments, rng=rng, embed_noise=embed_noise)
        rules = self.options.rules
        sharded = rules is not None and rules.mesh.size > 1
        tokens = ("batch", "length")
        specs = None
        if sharded:
            specs = (rules.spec(*tokens, None), rules.spec("act_vocab", "embed"), rules.spec(*tokens))
        with jax.named_scope("head"):
            return token_stats(
                hidden,
                decoder.head(weights),
                batch.targets,
                softcap=self.spec.final_softcap,
                temperature=temperature,
                mask=batch.mask,
                mesh=rules.mesh if sharded else None,
                specs=specs,
                platform=self.options.platform,
            )

    def logprobs(
        self, weights: Any, batch: Batch, *, temperature: float = 1.0, rng: jax.Array | None = None
    ) -> tuple[jax.Array, jax.Array]:
        """The first two of target_stats."""
        return self.target_stats(weights, batch, temperature=temperature, rng=rng)[:2]
