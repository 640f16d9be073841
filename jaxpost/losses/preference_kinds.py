"""The table of preference losses: one function a kind, one number a pair. `preference_loss` weighs and sums them.

Notation: w the chosen and l the rejected completion of a pair, lp the sum of its tokens' logprobs, n their count,
r = lp_policy - lp_reference, s = s(r) the f-divergence's score (r itself by default), d = s_w - s_l, b = beta,
e = label smoothing, sig the logistic function.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxpost.losses.units import clamped, logistic


class Ratios(NamedTuple):
    """All arrays are [P]; entries of absent pairs are finite and mean nothing."""

    present: jax.Array  # bool
    chosen: jax.Array  # r_w
    rejected: jax.Array  # r_l
    chosen_score: jax.Array  # s_w
    rejected_score: jax.Array  # s_l
    chosen_len: jax.Array  # n_w, at least 1
    rejected_len: jax.Array  # n_l, at least 1
    policy_margin: jax.Array  # lp_w - lp_l under the policy
    reference_margin: jax.Array  # the same under the reference

    @property
    def d(self) -> jax.Array:
        """s_w - s_l."""
        return self.chosen_score - self.rejected_score

    @property
    def mean_d(self) -> jax.Array:
        """s_w / n_w - s_l / n_l."""
        return self.chosen_score / self.chosen_len - self.rejected_score / self.rejected_len


class Options(NamedTuple):
    """Numbers that the kinds read."""

    beta: float
    label_smoothing: float
    delta: float | jax.Array  # bco_pair's reward shift
    discopop_tau: float
    ipo_length_normalized: bool


def score(ratio: jax.Array, divergence: str, alpha: float) -> jax.Array:
    """f'(exp(r)) of an f-divergence, shifted so that s(0) = 0 (f-DPO, 2309.16240).

        reverse_kl: r
        forward_kl: 1 - exp(-r)
        js:         log 2 + logsig(r)
        alpha:      (exp((alpha-1) r) - 1) / (alpha-1);  r at alpha = 1

    The shift cancels in s_w - s_l; in the length-normalised kinds it makes a policy that equals the reference score 0.
    Exponents are clamped at plus and minus 20.
    """
    if divergence == "forward_kl":
        return -jnp.expm1(clamped(-ratio))
    if divergence == "js":
        return jnp.log(2.0) + jax.nn.log_sigmoid(ratio)
    if divergence == "alpha" and abs(alpha - 1) > 1e-6:
        return jnp.expm1(clamped((alpha - 1) * ratio)) / (alpha - 1)
    return ratio


def sigmoid(x: Ratios, o: Options) -> jax.Array:
    """-(1-e) logsig(b d) - e logsig(-b d): DPO (2305.18290), with e > 0 cDPO. TRL ignores e here."""
    return logistic(o.beta * x.d, o.label_smoothing)


def robust(x: Ratios, o: Options) -> jax.Array:
    """(-(1-e) logsig(b d) + e logsig(-b d)) / (1-2e): unbiased under labels flipped with probability e (2403.00409)."""
    z, e = o.beta * x.d, o.label_smoothing
    return (-(1 - e) * jax.nn.log_sigmoid(z) + e * jax.nn.log_sigmoid(-z)) / (1 - 2 * e)


def hinge(x: Ratios, o: Options) -> jax.Array:
    """max(0, 1 - b d) (SLiC-HF 2305.10425, RSO 2309.06657)."""
    return jax.nn.relu(1 - o.beta * x.d)


def ipo(x: Ratios, o: Options) -> jax.Array:
    """(s_w/n_w - s_l/n_l - 1/(2b))^2; un-normalised, the printed form: (d - 1/(2b))^2 (2310.12036, eq. 17)."""
    return ((x.mean_d if o.ipo_length_normalized else x.d) - 1 / (2 * o.beta)) ** 2


def sigmoid_norm(x: Ratios, o: Options) -> jax.Array:
    """-logsig(b (s_w/n_w - s_l/n_l)): length-normalised DPO (Tulu 3, 2411.15124)."""
    return logistic(o.beta * x.mean_d)


def exo_pair(x: Ratios, o: Options) -> jax.Array:
    """q (log q - log(1-e)) + (1-q) (log(1-q) - log e), q = sig(b d): reverse KL to the smoothed label (2402.00856)."""
    z, e = o.beta * x.d, o.label_smoothing
    better = jax.nn.sigmoid(z) * (jax.nn.log_sigmoid(z) - jnp.log1p(-e))
    return better + jax.nn.sigmoid(-z) * (jax.nn.log_sigmoid(-z) - jnp.log(e))


def nca_pair(x: Ratios, o: Options) -> jax.Array:
    """-logsig(b r_w) - 1/2 logsig(-b r_w) - 1/2 logsig(-b r_l) (2402.05369)."""
    w, l = o.beta * x.chosen, o.beta * x.rejected  # noqa: E741
    return -jax.nn.log_sigmoid(w) - 0.5 * jax.nn.log_sigmoid(-w) - 0.5 * jax.nn.log_sigmoid(-l)


def bco_pair(x: Ratios, o: Options) -> jax.Array:
    """-logsig(b r_w - delta) - logsig(-(b r_l - delta)) (2404.04656); delta 0 is TRL's form for pairs."""
    delta = jax.lax.stop_gradient(o.delta)
    return logistic(o.beta * x.chosen - delta) + logistic(delta - o.beta * x.rejected)


def sppo_hard(x: Ratios, o: Options) -> jax.Array:
    """(r_w - 1/(2b))^2 + (r_l + 1/(2b))^2 (2405.00675, win probabilities 1 and 0)."""
    return (x.chosen - 0.5 / o.beta) ** 2 + (x.rejected + 0.5 / o.beta) ** 2


def apo_zero(x: Ratios, o: Options) -> jax.Array:
    """1 - sig(b r_w) + sig(b r_l) (2408.06266): for chosen texts better than the model's own."""
    return jax.nn.sigmoid(-o.beta * x.chosen) + jax.nn.sigmoid(o.beta * x.rejected)


def apo_down(x: Ratios, o: Options) -> jax.Array:
    """sig(b r_w) + 1 - sig(b (r_w - r_l)) (2408.06266): for chosen texts worse than the model's own."""
    return jax.nn.sigmoid(o.beta * x.chosen) + jax.nn.sigmoid(-o.beta * (x.chosen - x.rejected))


def discopop(x: Ratios, o: Options) -> jax.Array:
    """(1-M) (-logsig(b d)) + M exp(-b d), M = sig(b d / tau) (2406.08414)."""
    z = o.beta * x.d
    share = jax.nn.sigmoid(z / o.discopop_tau)
    return (1 - share) * logistic(z) + share * jnp.exp(clamped(-z))


def aot(x: Ratios, o: Options) -> jax.Array:
    """cDPO on sorted margins: the k-th smallest of the policy against the k-th smallest of the reference (2406.05882).

    The value of a rank stands at the pair that has this rank under the policy.
    """
    return logistic(o.beta * (x.policy_margin - same_rank(x.policy_margin, x.reference_margin, x)), o.label_smoothing)


def aot_unpaired(x: Ratios, o: Options) -> jax.Array:
    """cDPO on the k-th smallest r_w minus the k-th smallest r_l (2406.05882). The value stands at the chosen's pair."""
    return logistic(o.beta * (x.chosen - same_rank(x.chosen, x.rejected, x)), o.label_smoothing)


def same_rank(values: jax.Array, others: jax.Array, x: Ratios) -> jax.Array:
    """For each pair the entry of others that has the rank of this pair's value; absent pairs rank behind all."""
    order, others_order = (jnp.lexsort((v, ~x.present)) for v in (values, others))
    return others[others_order[jnp.argsort(order)]]


KINDS = {
    kind.__name__: kind
    for kind in (
        sigmoid,
        robust,
        hinge,
        ipo,
        sigmoid_norm,
        exo_pair,
        nca_pair,
        bco_pair,
        sppo_hard,
        apo_zero,
        apo_down,
        discopop,
        aot,
        aot_unpaired,
    )
}
SMOOTHED = ("sigmoid", "robust", "exo_pair", "aot", "aot_unpaired")  # read label_smoothing
DIVERGENT = ("sigmoid", "robust", "hinge", "ipo", "sigmoid_norm", "exo_pair", "discopop", "sft")  # built on s_w and s_l
SORTED = ("aot", "aot_unpaired")  # a pair's value depends on the whole batch
DIVERGENCES = ("reverse_kl", "forward_kl", "js", "alpha")
