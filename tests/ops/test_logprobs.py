"""Tiled logprobs: equal to the plain formula, never [tokens, vocab] in memory, quiet collectives on a mesh."""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxpost import hlo
from jaxpost.ops import logprobs_shard as module
from jaxpost.ops.logprobs import token_logprobs, token_stats

SPECS = (P(("data", "fsdp"), None, None), P("tensor", "fsdp"), P(("data", "fsdp"), None))


def by_hand(hidden, head, targets, a, b, softcap=None, temperature=1.0, c=0.0):
    """((logprobs, entropy), (d_hidden, d_head)) in float64, for the cotangents a, b and c (of the log-sum-exp)."""
    hidden, head, a, b = (np.asarray(x, np.float64) for x in (hidden, head, a, b))
    z = hidden @ head.T
    ratio = np.tanh(z / softcap) if softcap else 0 * z
    logits = (softcap * ratio if softcap else z) / temperature
    top = logits.max(-1, keepdims=True)
    logp = logits - top - np.log(np.exp(logits - top).sum(-1, keepdims=True))
    p, hit = np.exp(logp), np.arange(len(head)) == np.asarray(targets)[..., None]
    entropy = -(p * logp).sum(-1)
    d_logits = a[..., None] * (hit - p) - b[..., None] * p * (logp + entropy[..., None]) + c * p
    d_z = d_logits * (1 - ratio**2) / temperature
    d_head = d_z.reshape(-1, len(head)).T @ hidden.reshape(-1, hidden.shape[-1])
    return ((logp * hit).sum(-1), entropy), (d_z @ head, d_head)


def example(shape=(3, 11), width=16, vocab=97, dtype=np.float32, seed=0):
    """hidden, head, targets and cotangents of the logprobs and of the entropies."""
    rng = np.random.default_rng(seed)
    hidden, head = rng.normal(size=(*shape, width)), rng.normal(size=(vocab, width)) * 0.5
    a, b = (rng.normal(size=shape).astype(np.float32) for _ in "ab")
    return hidden.astype(dtype), head.astype(dtype), rng.integers(0, vocab, shape, dtype=np.int32), a, b


def run(a, b, hidden, head, targets, wanted=(0, 1), mask=None, **options):
    """As by_hand, by token_logprobs; b None asks for no gradient through the entropy; a single gradient for an int."""

    def loss(hidden, head, targets, mask, a, b):
        logprobs, entropy = token_logprobs(hidden, head, targets, mask=mask, **options)
        return jnp.sum(a * logprobs) + (0 if b is None else jnp.sum(b * entropy)), (logprobs, entropy)

    grad = jax.jit(jax.value_and_grad(loss, wanted, has_aux=True))
    (_, values), grads = grad(hidden, head, targets, mask, a, b)
    return values, grads


def assert_close(got, want, tolerance=2e-6):
    """Within the tolerance of each leaf's greatest value."""
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
        assert x.shape == y.shape
        assert np.max(np.abs(x - y)) <= tolerance * max(1e-3, np.max(np.abs(y))), np.max(np.abs(x - y))


@pytest.fixture(params=[0, 5000], ids=["no logits kept", "some kept"])
def small_chunks(monkeypatch, request):
    """Several chunks of tokens even in small examples; elsewhere all logits are kept for the backward pass."""
    monkeypatch.setattr(module, "CHUNK_BYTES", 700)
    monkeypatch.setattr(module, "KEPT_BYTES", request.param)


def test_hand_computed():
    # logits (0, ln 3): p = (1/4, 3/4)
    logprobs, entropy = token_logprobs(jnp.array([1.0]), jnp.array([[0.0], [math.log(3)]]), jnp.array(1))
    np.testing.assert_allclose(logprobs, math.log(0.75), rtol=1e-6)
    np.testing.assert_allclose(entropy, -0.25 * math.log(0.25) - 0.75 * math.log(0.75), rtol=1e-6)


@pytest.mark.parametrize(
    "shape,vocab,tile,softcap,temperature",
    [
        ((3, 11), 97, 16, None, 1.0),
        ((3, 11), 97, 16, 5.0, 0.7),
        ((33,), 97, 97, None, 1.3),
        ((2, 5), 300, 130, 2.0, 1.0),  # tiles are whole lanes of 128, the last one overlaps
        ((), 7, 3, None, 1.0),
        ((4,), 5, None, None, 0.5),
    ],
)
def test_values_and_gradients_equal_the_plain_formula(small_chunks, shape, vocab, tile, softcap, temperature):
    hidden, head, targets, a, b = example(shape, vocab=vocab)
    options = {"tile": tile, "softcap": softcap, "temperature": temperature}
    for by_entropy, wanted in ((b, (0, 1)), (None, 0), (b, 0)):  # everything; a frozen head
        values, grads = by_hand(hidden, head, targets, a, 0 * b if by_entropy is None else b, softcap, temperature)
        got = run(a, by_entropy, hidden, head, targets, wanted, **options)
        assert_close(got, (values, grads if wanted == (0, 1) else grads[wanted]))


@pytest.mark.parametrize("wanted", [(0, 1), 0])
def test_log_sum_exp_and_its_gradient(small_chunks, wanted):
    hidden, head, targets, a, b = example()

    def loss(hidden, head):
        stats = token_stats(hidden, head, targets, tile=16, softcap=5.0, temperature=0.7)
        return jnp.sum(a * stats.logprobs) + 0.3 * jnp.sum(stats.lse), stats

    (_, stats), grads = jax.jit(jax.value_and_grad(loss, wanted, has_aux=True))(hidden, head)
    logits = 5 * np.tanh(hidden.astype(np.float64) @ head.T / 5) / 0.7
    np.testing.assert_allclose(stats.lse, np.log(np.exp(logits).sum(-1)), rtol=1e-6)
    want = by_hand(hidden, head, targets, a, 0 * b, 5.0, 0.7, c=0.3)[1]
    assert_close(grads, want if wanted == (0, 1) else want[0])


def test_frozen_hidden_states(small_chunks):
    hidden, head, targets, a, b = example()
    values, (_, d_head) = by_hand(hidden, head, targets, a, b)
    assert_close(run(a, b, hidden, head, targets, 1, tile=40), (values, d_head))


@pytest.mark.parametrize("wanted", [(0, 1), 0])
@pytest.mark.parametrize("share", [0.0, 0.4, 1.0])
def test_masked_rows_give_zero_and_take_no_gradient_from_nan(small_chunks, share, wanted):
    hidden, head, targets, a, b = example()
    b = b if wanted else None
    mask = np.random.default_rng(7).random(targets.shape) < share
    nans = np.array([np.nan, np.inf] * 8, np.float32)
    bad = (np.where(mask[..., None], hidden, nans), head, np.where(mask, targets, -100))
    got = run(np.where(mask, a, np.float32(np.nan)), b, *bad, wanted, tile=16, mask=mask)
    values, grads = by_hand(hidden, head, targets, np.where(mask, a, 0), np.where(mask, 0 * a if b is None else b, 0))
    assert_close(got, (tuple(np.where(mask, x, 0) for x in values), grads if wanted else grads[0]))
    assert not np.any(np.asarray(jax.tree.leaves(got[1])[0])[~mask])


def test_temperature_may_be_traced_and_has_no_gradient():
    hidden, head, targets, _, _ = example()
    total = jax.value_and_grad(lambda t: jnp.sum(token_logprobs(hidden, head, targets, temperature=t)[0]))
    value, grad = jax.jit(total)(0.7)
    want = by_hand(hidden, head, targets, 0 * targets, 0 * targets, None, 0.7)[0][0]
    np.testing.assert_allclose(value, np.sum(want), rtol=1e-6)
    assert grad == 0


def test_a_certain_prediction_has_entropy_zero_not_less():
    hidden, head = jnp.array([[100.0]]), jnp.array([[1.0], [-1.0], [0.0]])
    logprobs, entropy = token_logprobs(hidden, head, jnp.array([0]), tile=2)
    assert logprobs == 0 and entropy == 0


def test_correct_says_whether_the_target_is_the_most_likely_token():
    hidden, head, targets, _, _ = example()
    best = np.argmax(hidden @ head.T, axis=-1)
    targets[0] = best[0]
    mask = np.arange(11) > 2
    correct = token_stats(hidden, head, targets, tile=16, mask=np.broadcast_to(mask, targets.shape))[2]
    np.testing.assert_array_equal(correct, (targets == best) & mask)


def test_target_out_of_range_is_loud():
    hidden, head, targets, _, _ = example()
    assert jnp.all(token_logprobs(hidden, head, targets + 97)[0] == -jnp.inf)


@pytest.mark.parametrize("wanted", [(0, 1), 0])
def test_bf16_accumulates_in_fp32(small_chunks, wanted):
    hidden, head, targets, a, b = example((4, 16), dtype=jnp.bfloat16)
    b = b if wanted else None
    got, got_grads = run(a, b, hidden, head, targets, wanted, tile=16)
    want, want_grads = by_hand(hidden, head, targets, a, 0 * a if b is None else b)
    assert got[0].dtype == got[1].dtype == jnp.float32
    assert_close(got, want, 3e-6)
    assert all(g.dtype == jnp.bfloat16 for g in jax.tree.leaves(got_grads))
    assert_close(got_grads, want_grads if wanted else want_grads[0], 1e-2)  # rounded to bf16 once or twice: 2^-8 each


def test_frozen_head_has_no_gradient_work(monkeypatch):
    hidden, head, targets, a, _ = example((64,), vocab=4096, width=32)

    def products(wanted):
        grad = jax.grad(lambda h, w: jnp.sum(a * token_logprobs(h, w, targets, tile=1024)[0]), wanted)
        return str(jax.make_jaxpr(grad)(hidden, head)).count("dot_general")

    assert products(0) == 2  # logits and direction; the backward pass multiplies nothing
    assert products((0, 1)) == 3  # logits, d_hidden, d_head
    monkeypatch.setattr(module, "KEPT_BYTES", 0)
    assert products((0, 1)) == 4  # logits twice


@pytest.mark.parametrize(
    "change,message",
    [
        ({"head": jnp.zeros((97, 15))}, "do not fit"),
        ({"targets": jnp.zeros((3, 10), jnp.int32)}, "targets must be"),
        ({"mask": jnp.ones((3, 1), bool)}, "mask must have"),
        ({"temperature": 0.0}, "temperature must be positive"),
        ({"temperature": jnp.ones((3,))}, "must be a scalar"),
        ({"softcap": -1.0}, "softcap must be"),
        ({"tile": 0}, "tile must be"),
    ],
)
def test_wrong_arguments_are_refused(change, message):
    hidden, head, targets, _, _ = example()
    with pytest.raises(ValueError, match=message):
        token_logprobs(**({"hidden": hidden, "head": head, "targets": targets} | change))


# ---------------------------------------------------------------- memory


def test_nothing_of_tokens_by_vocab_is_held():
    tokens, vocab, width = (8, 4096), 128_256, 512
    hidden = jax.ShapeDtypeStruct((*tokens, width), jnp.float32)
    head = jax.ShapeDtypeStruct((vocab, width), jnp.float32)
    targets = jax.ShapeDtypeStruct(tokens, jnp.int32)
    mask = jax.ShapeDtypeStruct(tokens, jnp.bool_)

    def loss(hidden, head, targets, mask):
        logprobs, entropy = token_logprobs(hidden, head, targets, mask=mask)
        return jnp.sum(logprobs) + jnp.sum(entropy)

    program = jax.jit(jax.value_and_grad(loss, (0, 1))).lower(hidden, head, targets, mask).compile()
    largest = max(
        math.prod(int(n) for n in dims.split(",") if n)
        for dims in re.findall(r"\b(?:f32|bf16|f16|s32|u32|pred|s8|f64)\[([\d,]*)\]", program.as_text())
    )
    assert largest == vocab * width  # the head; [tokens, vocab] would be 64 times as much
    weights = vocab * width * 4
    activations = math.prod(tokens) * width * 4
    logits = math.prod(tokens) * vocab * 4  # 16.8 GB
    used = program.memory_analysis().temp_size_in_bytes
    assert used < weights + 4 * activations + 12 * module.CHUNK_BYTES < logits / 20


# ---------------------------------------------------------------- mesh


def mesh_of(**axes):
    shape = {"data": 1, "fsdp": 1, "tensor": 1} | axes
    return jax.make_mesh(tuple(shape.values()), tuple(shape), axis_types=(AxisType.Auto,) * len(shape))


def placed(mesh, hidden, head, targets, specs=SPECS):
    return tuple(jax.device_put(x, NamedSharding(mesh, s)) for x, s in zip((hidden, head, targets), specs, strict=True))


@pytest.mark.parametrize(
    "axes,softcap", [({"data": 2, "fsdp": 2, "tensor": 2}, 5.0), ({"fsdp": 8}, None), ({"tensor": 8}, None)]
)
def test_sharded_equals_unsharded(small_chunks, axes, softcap):
    hidden, head, targets, a, b = example((8, 6), vocab=104)
    mask = np.random.default_rng(3).random(targets.shape) < 0.6
    mesh = mesh_of(**axes)
    options = {"tile": 8, "softcap": softcap, "temperature": 0.8, "mask": mask}
    for by_entropy, wanted in ((b, (0, 1)), (None, 0)):
        want = run(a, by_entropy, hidden, head, targets, wanted, **options)
        shards = placed(mesh, hidden, head, targets)
        assert_close(run(a, by_entropy, *shards, wanted, mesh=mesh, specs=SPECS, **options), want)


@pytest.mark.parametrize("vocab,axes", [(97, {"data": 2, "fsdp": 2, "tensor": 2}), (10, {"tensor": 8})])
def test_vocabulary_that_its_shards_do_not_divide(vocab, axes):
    hidden, head, targets, a, b = example((8, 6), vocab=vocab)
    mesh, specs = mesh_of(**axes), (SPECS[0], P("tensor", "fsdp"), SPECS[2])
    got = run(a, b, hidden, head, targets, tile=16, mesh=mesh, specs=specs)
    assert got[1][1].shape == head.shape  # the padding has no gradient
    assert_close(got, by_hand(hidden, head, targets, a, b))


def test_width_that_fsdp_does_not_divide_and_sharded_positions():
    hidden, head, targets, a, b = example((2, 8), width=15, vocab=104)
    mesh = mesh_of(data=2, fsdp=2, context=2)
    specs = (P("data", ("fsdp", "context"), None), P("tensor", "fsdp"), P("data", ("fsdp", "context")))
    got = run(a, b, hidden, head, targets, tile=16, mesh=mesh, specs=specs)
    assert_close(got, by_hand(hidden, head, targets, a, b))


def test_specs_that_do_not_fit_are_refused():
    hidden, head, targets, _, _ = example((8, 6))
    mesh = mesh_of(data=2, fsdp=2, tensor=2)
    with pytest.raises(ValueError, match="needs specs"):
        token_logprobs(hidden, head, targets, mesh=mesh)
    with pytest.raises(ValueError, match="hidden must be split like targets"):
        token_logprobs(hidden, head[:96], targets, mesh=mesh, specs=(P("data", None, "fsdp"), *SPECS[1:]))
    with pytest.raises(ValueError, match="head's rows must lie"):
        token_logprobs(hidden, head[:96], targets, mesh=mesh, specs=(SPECS[0], P("fsdp", None), SPECS[2]))


@pytest.mark.parametrize("wanted", [(0, 1), 0])
def test_collectives_stay_outside_the_loops(wanted):
    mesh = mesh_of(data=2, fsdp=2, tensor=2)
    width, vocab = 32, 1024
    h, w, t = placed(mesh, *example((8, 64), width=width, vocab=vocab)[:3])

    def loss(h, w):
        logprobs, entropy = token_logprobs(h, w, t, tile=128, mesh=mesh, specs=SPECS)
        return jnp.sum(logprobs) + jnp.sum(entropy)

    text = jax.jit(jax.grad(loss, wanted)).lower(h, w).compile().as_text()
    found = hlo.collectives(text)
    assert " while(" in text and found and not [one for one in found if one.loops]
    local_head = vocab * width // 2 * 4  # over tensor
    moved = [one.kind for one in found if max(one.sizes) >= local_head // 2]
    # Once the head's gather (the two passes share it), once its gradient's reduction in two steps: fsdp, then data.
    assert moved.count("all-gather") <= 2
    assert len(moved) - moved.count("all-gather") == (2 if wanted != 0 else 0), moved
