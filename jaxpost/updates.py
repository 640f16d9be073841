"""Update rules that optax lacks, or has for one matrix only: layers are stacked, and each is a matrix of its own."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxpost.types import Array, Tree

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)  # of Jordan (2024): steep at 0; singular values end at about 0.7 to 1.2
MUON_RMS = 0.2  # 2502.16982: about the root mean square of an AdamW update


def narrow(tx: optax.GradientTransformation, field: str, dtype: Any) -> optax.GradientTransformation:
    """tx whose first moment, a field of its state, rests in `dtype` between two updates; the arithmetic stays fp32."""
    if dtype == jnp.float32:
        return tx

    def rest(state: Any, dtype: Any) -> Any:
        return state._replace(**{field: jax.tree.map(lambda x: x.astype(dtype), getattr(state, field))})

    def update(updates: Tree, state: Any, params: Tree = None) -> tuple[Tree, Any]:
        updates, state = tx.update(updates, rest(state, jnp.float32), params)
        return updates, rest(state, dtype)

    return optax.GradientTransformation(lambda params: rest(tx.init(params), dtype), update)


def orthogonalise(x: Array, steps: int = 5) -> Array:
    """About U V^T of each matrix x = U S V^T, [..., m, n]: the quintic Newton-Schulz iteration of Muon (Jordan 2024).

        X <- a X + (b A + c A A) X,   A = X X^T,   started at x / |x|_F

    Every matrix of the leading dims is one of its own. A zero matrix stays zero.
    """
    wide = x.shape[-2] <= x.shape[-1]
    x = x if wide else x.mT  # the smaller of the two Gram matrices
    a, b, c = NEWTON_SCHULZ
    x = x / (jnp.linalg.norm(x, axis=(-2, -1), keepdims=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x if wide else x.mT


def scale_by_muon(momentum: float, dtype: Any) -> optax.GradientTransformation:
    """Muon (Jordan 2024) on matrices [..., m, n]: the orthogonalised Nesterov momentum, with the rms of AdamW's.

        B <- momentum B + G;   update = 0.2 sqrt(max(m, n)) orthogonalise(G + momentum B)         (2502.16982)

    so a learning rate and a weight decay mean what they mean for AdamW. dtype: of B.
    """

    def scaled(x: Array) -> Array:
        return MUON_RMS * max(x.shape[-2:]) ** 0.5 * orthogonalise(x)

    return optax.chain(
        narrow(optax.trace(momentum, nesterov=True), "trace", dtype),
        optax.stateless(lambda updates, _: jax.tree.map(scaled, updates)),
    )


class FactoredState(NamedTuple):
    """Second moments: row and column means of a matrix [.., m, n] as [.., m, 1] and [.., 1, n]; all of a vector."""

    count: Array  # i32[], updates so far
    rows: Tree  # MaskedNode for a vector
    columns: Tree  # MaskedNode for a vector
    whole: Tree  # MaskedNode for a matrix


def scale_by_adafactor(stacked: Tree, decay: float = 0.8, clip: float = 1.0) -> optax.GradientTransformation:
    """Adafactor (1804.04235) without momentum and without parameter scale, for a learning rate of one's own.

        V <- b V + (1 - b) (G^2 + 1e-30),  b = 1 - t^-decay;   matrices: V = rows columns / mean(rows)
        U = G / sqrt(V);   update = U / max(1, rms(U) / clip)

    stacked: tree of bool, whether a leaf's first dimension is layers. The last two dims of what remains are factored
    (optax.scale_by_factored_rms takes the two largest, which may be the layers), and each layer has its own rms.
    """

    def is_matrix(layers: bool, x: Array) -> bool:
        return x.ndim - layers >= 2

    def init(params: Tree) -> FactoredState:
        def zeros(shape: Any, matrices: bool) -> Tree:
            def make(layers: bool, p: Array) -> Any:
                return jnp.zeros(shape(p), p.dtype) if is_matrix(layers, p) == matrices else optax.MaskedNode()

            return jax.tree.map(make, stacked, params)

        return FactoredState(
            jnp.zeros((), jnp.int32),
            rows=zeros(lambda p: (*p.shape[:-1], 1), True),
            columns=zeros(lambda p: (*p.shape[:-2], 1, p.shape[-1]), True),
            whole=zeros(lambda p: p.shape, False),
        )

    def update(updates: Tree, state: FactoredState, params: Tree = None) -> tuple[Tree, FactoredState]:
        count = state.count + 1
        b = 1 - count.astype(jnp.float32) ** -decay

        def move(old: Tree, dim: int | None) -> Tree:
            """b old + (1 - b) mean(g^2) over dim, where old is kept."""

            def leaf(g: Array, v: Any) -> Any:
                if isinstance(v, optax.MaskedNode):
                    return v
                square = jnp.square(g) + 1e-30
                return b * v + (1 - b) * (square if dim is None else square.mean(dim, keepdims=True))

            return jax.tree.map(leaf, updates, old)

        rows, columns, whole = move(state.rows, -1), move(state.columns, -2), move(state.whole, None)

        def scaled(layers: bool, g: Array, row: Any, column: Any, v: Any) -> Array:
            if is_matrix(layers, g):
                u = g * jax.lax.rsqrt(row / row.mean(-2, keepdims=True)) * jax.lax.rsqrt(column)
            else:
                u = g * jax.lax.rsqrt(v)
            square = jnp.mean(jnp.square(u), axis=tuple(range(int(layers), u.ndim)), keepdims=True)
            return u / jnp.maximum(1.0, jnp.sqrt(square) / clip)

        scaled_updates = jax.tree.map(scaled, stacked, updates, rows, columns, whole)
        return scaled_updates, FactoredState(count, rows, columns, whole)

    return optax.GradientTransformation(init, update)


def add_decay(rates: Tree) -> optax.GradientTransformation:
    """Decoupled weight decay: update + rate * parameter; rates: tree of floats, or arrays that broadcast to a leaf."""

    def decayed(rate: Any, update: Array, param: Array) -> Array:
        return update if isinstance(rate, float) and rate == 0 else update + rate * param

    return optax.stateless(lambda updates, params: jax.tree.map(decayed, rates, updates, params))


def multiply(factors: Tree) -> optax.GradientTransformation:
    """update * factor; factors as the rates of add_decay."""

    def times(factor: Any, update: Array) -> Array:
        return update if isinstance(factor, float) and factor == 1 else update * factor

    return optax.stateless(lambda updates, _: jax.tree.map(times, factors, updates))
