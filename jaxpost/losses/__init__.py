"""Losses: pure maths on arrays, jax alone. Every loss is a weighted sum and returns (loss, metrics)."""
