"""Tiled logprobs: equal to the plain formula, never [tokens, vocab] in memory, quiet collectives on a mesh."""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxpost.ops import logprobs as module
from jaxpost.ops.logprobs import token_logprobs

SPECS = (P(("data", "fsdp"), None, None), P("tensor", "fsdp"), P(("data", "fsdp"), None))


def naive(hidden, head, targets, softcap=None, temperature=1.0):
    logits = hidden.astype(jnp.float32) @ head.astype(jnp.float32).T
    if softcap is not None:
        logits = softcap * jnp.tanh(logits / softcap)
    logp = jax.nn.log_softmax(logits / temperature)
    return jnp.take_along_axis(logp, targets[..., None], axis=-1)[..., 0], -jnp.sum(jnp.exp(logp) * logp, axis=-1)


def example(shape=(3, 11), width=16, vocab=97, dtype=jnp.float32, seed=0):
    keys = jax.random.split(jax.random.key(seed), 5)
    hidden = jax.random.normal(keys[0], (*shape, width)).astype(dtype)
    head = (jax.random.normal(keys[1], (vocab, width)) * 0.5).astype(dtype)
    targets = jax.random.randint(keys[2], shape, 0, vocab)
    return hidden, head, targets, jax.random.normal(keys[3], shape), jax.random.normal(keys[4], shape)


def weighted(function, a, b):
    """Scalar whose gradient sends a into the logprobs and b into the entropies, and both of them."""

    def loss(hidden, head):
        logprobs, entropy = function(hidden, head)
        return jnp.sum(a * logprobs) + (0 if b is None else jnp.sum(b * entropy)), (logprobs, entropy)

    return loss


def assert_close(got, want, tolerance=2e-6):
    """Within the tolerance of each leaf's greatest value."""
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
        assert x.shape == y.shape
        assert np.max(np.abs(x - y)) <= tolerance * max(1e-3, np.max(np.abs(y))), np.max(np.abs(x - y))


@pytest.fixture
def small_chunks(monkeypatch):
    """Several chunks of tokens even in small examples."""
    monkeypatch.setattr(module, "CHUNK_BYTES", 700)


def test_hand_computed():
    # logits (0, ln 3): p = (1/4, 3/4)
    logprobs, entropy = token_logprobs(jnp.array([1.0]), jnp.array([[0.0], [math.log(3)]]), jnp.array(1))
    np.testing.assert_allclose(logprobs, math.log(0.75), rtol=1e-6)
    np.testing.assert_allclose(entropy, -0.25 * math.log(0.25) - 0.75 * math.log(0.75), rtol=1e-6)


@pytest.mark.parametrize("jitted", [False, True])
@pytest.mark.parametrize("softcap,temperature", [(None, 1.0), (5.0, 0.7)])
@pytest.mark.parametrize("shape,vocab,tile", [((3, 11), 97, 16), ((33,), 97, 97), ((2, 5), 300, 130), ((), 7, 3), ((4,), 5, None)])
def test_values_and_gradients_equal_the_naive_ones(small_chunks, shape, vocab, tile, softcap, temperature, jitted):
    hidden, head, targets, a, b = example(shape, vocab=vocab)

    def tiled(hidden, head):
        return token_logprobs(hidden, head, targets, tile=tile, softcap=softcap, temperature=temperature)

    def plain(hidden, head):
        return naive(hidden, head, targets, softcap, temperature)

    for cotangents in ((a, b), (a, None)):
        for wanted in ((0, 1), 0, 1):  # all, a frozen head, a frozen model
            grad = jax.value_and_grad(weighted(tiled, *cotangents), wanted, has_aux=True)
            got = (jax.jit(grad) if jitted else grad)(hidden, head)
            assert_close(got, jax.value_and_grad(weighted(plain, *cotangents), wanted, has_aux=True)(hidden, head))


def test_masked_rows_give_zero_and_take_no_gradient_from_nan(small_chunks):
    hidden, head, targets, a, b = example()
    mask = jax.random.bernoulli(jax.random.key(7), 0.4, targets.shape)
    bad = jnp.where(mask[..., None], hidden, jnp.array([jnp.nan, jnp.inf] * 8))
    targets_bad, a_bad = jnp.where(mask, targets, -100), jnp.where(mask, a, jnp.nan)

    def tiled(hidden, head):
        return token_logprobs(hidden, head, targets_bad, tile=16, mask=mask)

    def plain(hidden, head):
        return jax.tree.map(lambda x: jnp.where(mask, x, 0), naive(jnp.where(mask[..., None], hidden, 0), head, targets))

    for wanted in ((0, 1), 0):
        _, got = jax.value_and_grad(weighted(tiled, a_bad, b), wanted, has_aux=True)(bad, head)
        _, want = jax.value_and_grad(weighted(plain, a, b), wanted, has_aux=True)(hidden, head)
        assert_close(got, want)
    assert_close(tiled(bad, head), plain(hidden, head))
    d_hidden = jax.grad(lambda h: jnp.sum(a_bad * tiled(h, head)[0]))(bad)
    assert not np.any(np.asarray(d_hidden)[~np.asarray(mask)])


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_masks_of_all_and_none(small_chunks, share):
    hidden, head, targets, a, b = example()
    mask = jnp.full(targets.shape, bool(share))
    got = jax.grad(lambda *w: weighted(lambda h, w: token_logprobs(h, w, targets, tile=16, mask=mask), a, b)(*w)[0], (0, 1))
    want = jax.grad(lambda *w: share * weighted(lambda h, w: naive(h, w, targets), a, b)(*w)[0], (0, 1))
    assert_close(got(hidden, head), want(hidden, head))


def test_temperature_may_be_traced_and_has_no_gradient():
    hidden, head, targets, _, _ = example()
    value, grad = jax.jit(jax.value_and_grad(lambda t: jnp.sum(token_logprobs(hidden, head, targets, temperature=t)[0])))(0.7)
    np.testing.assert_allclose(value, jnp.sum(naive(hidden, head, targets, None, 0.7)[0]), rtol=1e-6)
    assert grad == 0


def test_a_certain_prediction_has_entropy_zero_not_less():
    hidden, head = jnp.array([[100.0]]), jnp.array([[1.0], [-1.0], [0.0]])
    logprobs, entropy = token_logprobs(hidden, head, jnp.array([0]), tile=2)
    assert logprobs == 0 and entropy == 0


def test_target_out_of_range_is_loud():
    hidden, head, targets, _, _ = example()
    assert jnp.all(token_logprobs(hidden, head, targets + 97)[0] == -jnp.inf)


@pytest.mark.parametrize("wanted", [(0, 1), 0])
def test_bf16_accumulates_in_fp32(small_chunks, wanted):
    hidden, head, targets, a, b = example((4, 16), dtype=jnp.bfloat16)
    tiled = weighted(lambda h, w: token_logprobs(h, w, targets, tile=16), a, b)
    plain = weighted(lambda h, w: naive(h, w, targets), a, b)
    value, grads = jax.value_and_grad(tiled, wanted, has_aux=True)(hidden, head)
    want_value, want_grads = jax.value_and_grad(plain, wanted, has_aux=True)(hidden, head)
    assert value[1][0].dtype == jnp.float32
    assert_close(value, want_value, 3e-6)
    assert_close(grads, want_grads, 1e-2)  # rounded to bf16, once or twice: 2^-8
    assert all(g.dtype == jnp.bfloat16 for g in jax.tree.leaves(grads))


def test_frozen_head_has_no_gradient_work():
    hidden, head, targets, a, _ = example((64,), vocab=4096, width=32)

    def products(wanted):
        grad = jax.grad(lambda h, w: jnp.sum(a * token_logprobs(h, w, targets, tile=1024)[0]), wanted)
        return str(jax.make_jaxpr(grad)(hidden, head)).count("dot_general")

    assert products(0) == 2  # logits and direction; the backward pass multiplies nothing
    assert products((0, 1)) == 4  # logits twice, d_hidden, d_head


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


@pytest.mark.parametrize("axes", [{"data": 2, "fsdp": 2, "tensor": 2}, {"fsdp": 8}, {"tensor": 8}])
@pytest.mark.parametrize("softcap", [None, 5.0])
def test_sharded_equals_unsharded(small_chunks, axes, softcap):
    hidden, head, targets, a, b = example((8, 6), vocab=104)
    mask = jax.random.bernoulli(jax.random.key(3), 0.6, targets.shape)
    mesh = mesh_of(**axes)

    def tiled(on_mesh, targets):
        where = {"mesh": mesh, "specs": SPECS} if on_mesh else {}
        return lambda h, w: token_logprobs(h, w, targets, tile=8, softcap=softcap, temperature=0.8, mask=mask, **where)

    for cotangents, wanted in (((a, b), (0, 1)), ((a, None), 0)):
        want = jax.value_and_grad(weighted(tiled(False, targets), *cotangents), wanted, has_aux=True)(hidden, head)
        h, w, t = placed(mesh, hidden, head, targets)
        got = jax.jit(jax.value_and_grad(weighted(tiled(True, t), *cotangents), wanted, has_aux=True))(h, w)
        assert_close(got, want)


def test_width_that_fsdp_does_not_divide_and_sharded_positions():
    hidden, head, targets, a, b = example((2, 8), width=15, vocab=104)
    mesh = mesh_of(data=2, fsdp=2, context=2)
    specs = (P("data", ("fsdp", "context"), None), P("tensor", "fsdp"), P("data", ("fsdp", "context")))
    got = jax.jit(
        jax.value_and_grad(
            weighted(lambda h, w: token_logprobs(h, w, targets, tile=16, mesh=mesh, specs=specs), a, b), (0, 1), has_aux=True
        )
    )(hidden, head)
    want = jax.value_and_grad(weighted(lambda h, w: token_logprobs(h, w, targets, tile=16), a, b), (0, 1), has_aux=True)
    assert_close(got, want(hidden, head))


def test_specs_that_do_not_fit_are_refused():
    hidden, head, targets, _, _ = example((8, 6))
    mesh = mesh_of(data=2, fsdp=2, tensor=2)
    with pytest.raises(ValueError, match="vocabulary 97 is not divisible by 2"):
        token_logprobs(hidden, head, targets, mesh=mesh, specs=SPECS)
    with pytest.raises(ValueError, match="needs specs"):
        token_logprobs(hidden, head, targets, mesh=mesh)
    with pytest.raises(ValueError, match="hidden must be split like targets"):
        token_logprobs(hidden, head[:96], targets, mesh=mesh, specs=(P("data", None, "fsdp"), *SPECS[1:]))
    with pytest.raises(ValueError, match="head's rows must lie"):
        token_logprobs(hidden, head[:96], targets, mesh=mesh, specs=(SPECS[0], P("fsdp", None), SPECS[2]))


COLLECTIVE = re.compile(r"= (.*?) (all-gather|all-reduce|reduce-scatter|collective-permute|all-to-all)(?:-start)?\(")


def computations(text):
    """HLO text -> {computation: its lines}."""
    found, name = {}, None
    for line in text.splitlines():
        if line and not line[0].isspace() and line.rstrip().endswith("{"):
            name = line.removeprefix("ENTRY ").split()[0].lstrip("%")
            found[name] = []
        elif name:
            found[name].append(line)
    return found


def called(found, roots):
    """Names of the computations reachable from the roots."""
    seen, todo = set(), list(roots)
    while todo:
        name = todo.pop()
        if name in found and name not in seen:
            seen.add(name)
            todo += re.findall(r"%([\w.\-]+)", "\n".join(found[name]))
    return seen


@pytest.mark.parametrize("wanted", [(0, 1), 0])
def test_collectives_stay_outside_the_loops(wanted):
    mesh = mesh_of(data=2, fsdp=2, tensor=2)
    width, vocab = 32, 1024
    h, w, t = placed(mesh, *example((8, 64), width=width, vocab=vocab)[:3])

    def loss(h, w):
        logprobs, entropy = token_logprobs(h, w, t, tile=128, mesh=mesh, specs=SPECS)
        return jnp.sum(logprobs) + jnp.sum(entropy)

    found = computations(jax.jit(jax.grad(loss, wanted)).lower(h, w).compile().as_text())
    bodies = [body for lines in found.values() for line in lines for body in re.findall(r"body=%([\w.\-]+)", line)]
    assert bodies
    inside = called(found, bodies)
    kinds = []
    for name, lines in found.items():
        for line in lines:
            if match := COLLECTIVE.search(line):
                assert name not in inside, line
                sizes = [math.prod(int(n) for n in s.split(",") if n) for s in re.findall(r"\w+\[([\d,]*)\]", match[1])]
                kinds.append((match[2], max(sizes)))
    local_head = vocab * width // 2  # over tensor
    moved = [kind for kind, size in kinds if size >= local_head // 2]
    # Once the head's gather (the two passes share it), once its gradient's reduction in two steps: fsdp, then data.
    assert moved.count("all-gather") <= 2
    assert len(moved) - moved.count("all-gather") == (2 if wanted != 0 else 0), kinds
