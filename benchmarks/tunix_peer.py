"""Tunix' PeftTrainer, training all weights of a small Llama, for train.py.

TUNIX/bin/python benchmarks/tunix_peer.py '{"llama": {...}, "shape": [2, 256]}'      (started by train.py)
"""

from __future__ import annotations

import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from tunix.models.llama3 import model as llama3
from tunix.sft import peft_trainer, utils
from turns import Turns


def main() -> None:
    given, turns = json.loads(sys.argv[1]), Turns()
    llama, (batch, length) = given["llama"], given["shape"]
    config = llama3.ModelConfig(
        num_layers=llama["num_hidden_layers"],
        vocab_size=llama["vocab_size"],
        embed_dim=llama["hidden_size"],
        hidden_dim=llama["intermediate_size"],
        num_heads=llama["num_attention_heads"],
        head_dim=llama["hidden_size"] // llama["num_attention_heads"],
        num_kv_heads=llama["num_key_value_heads"],
        rope_theta=10_000,
        norm_eps=1e-5,
        weight_tying=llama["tie_word_embeddings"],
    )
    model = llama3.Llama3(config, rngs=nnx.Rngs(0))
    assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(nnx.state(model, nnx.Param)))
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-5))
    trainer = peft_trainer.PeftTrainer(model, optimizer, peft_trainer.TrainingConfig(eval_every_n_steps=1 << 30))

    def inputs(x: peft_trainer.TrainingInput) -> dict:
        mask = x.input_mask.astype(bool)
        return {
            "input_tokens": x.input_tokens,
            "input_mask": x.input_mask,
            "positions": utils.build_positions_from_mask(mask),
            "attention_mask": utils.make_causal_attn_mask(mask),
        }

    def batches():
        rng, done = np.random.default_rng(0), 0
        while True:
            turns.boundary(lambda: jax.block_until_ready(jax.tree.leaves(nnx.state(trainer.model))), done)
            tokens = rng.integers(3, config.vocab_size, (batch, length)).astype(np.int32)
            yield peft_trainer.TrainingInput(input_tokens=tokens, input_mask=np.ones_like(tokens))
            done += batch * length

    trainer.with_gen_model_input_fn(inputs).train(batches())


if __name__ == "__main__":
    main()
