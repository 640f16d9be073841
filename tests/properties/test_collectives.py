"""What moves between devices in one step, on each mesh axis: the bytes of the table in docs/architecture.md.

Read from the program that XLA compiled for eight CPU devices. This backend all-reduces gradients that lie in parts, and
reduces the input gradients of projections that share an input one by one.
"""

import dataclasses

import pytest

from jaxpost import hlo
from jaxpost.models.spec import DecoderSpec, abstract_params
from tests.properties.harness import ROWS, SPEC, WIDTH, Case, Run, case_named, packed

FULL, LORA = case_named("sft"), case_named("sft-lora")
D = SPEC.d_model
MATRICES = 4 * (4 * D * D + 3 * D * SPEC.d_ff)  # bytes of one layer's: all heads have D = H * hd here
NORMS = 4 * 2 * D
TABLES = 4 * 2 * SPEC.vocab_size * D  # embedding and head
SMALL = 64  # bytes: scalars, counts


def moved(case: Case = FULL, spec: DecoderSpec = SPEC, **mesh: int) -> dict[str, list[hlo.Collective]]:
    """Collectives of a step by place: "layers" (in the scans) and "once"."""
    text = Run(case, {"data": 1} | mesh, spec=spec).compiled_text(packed(case.units))
    assert abstract_params(SPEC).keys() == {"embed", "prefix", "blocks", "tail", "final_norm", "head"}
    found = [one for one in hlo.collectives(text) if one.bytes > SMALL]
    assert all(one.loops <= 1 for one in found)  # nothing moves in the loops of the head or of attention
    return {"layers": [one for one in found if one.loops], "once": [one for one in found if not one.loops]}


def total(found: list[hlo.Collective], *kinds: str) -> int:
    return sum(one.bytes for one in found if one.kind in kinds)


def test_data_every_gradient_once_and_nothing_else():
    found = moved(data=8)
    assert {one.kind for one in found["layers"] + found["once"]} == {"all-reduce"}
    assert total(found["layers"], "all-reduce") == MATRICES + NORMS
    assert TABLES + 4 * D <= total(found["once"], "all-reduce") <= TABLES + 4 * D + SMALL


def test_fsdp_each_layer_gathered_forward_and_backward_and_every_gradient_once():
    found = moved(fsdp=8)
    assert total(found["layers"], "all-gather") == 2 * MATRICES
    assert total(found["layers"], "all-reduce", "reduce-scatter") == MATRICES + NORMS
    head = TABLES // 2
    assert total(found["once"], "all-gather") <= head + 4 * ROWS * WIDTH  # the head once, and token ids
    rows = 4 * WIDTH * D  # embeddings of one device's tokens
    assert total(found["once"], "all-to-all") <= 2 * rows  # to and from the columns of the embedding
    assert total(found["once"], "all-reduce", "reduce-scatter") <= head // 8 + 4 * D + SMALL


def test_fsdp_two_scans_gather_one_layer_at_a_time_and_the_lower_one_forward_only():
    """The stack is read by row inside both loops (models/stacks.py): no gather of all of it is taken out of them."""
    config = dataclasses.replace(LORA.adapters, layers="2:")
    four = dataclasses.replace(SPEC, num_layers=4)  # a loop that turns once would be no loop
    found, rank = moved(dataclasses.replace(LORA, adapters=config), four, fsdp=8), config.rank
    halves = 4 * 7 * rank * D  # bytes of what fsdp splits of a layer's seven pairs: one half of each
    pairs = 4 * rank * (11 * D + 3 * SPEC.d_ff)
    assert total(found["layers"], "all-gather") == MATRICES + 2 * (MATRICES + halves)
    assert total(found["layers"], "all-reduce", "reduce-scatter") == pairs
    assert total(found["once"], "all-gather") <= TABLES // 2 + 4 * ROWS * WIDTH  # the head, and token ids
    sizes = [size for one in found["layers"] if one.kind == "all-gather" for size in one.sizes]
    assert max(sizes) == 4 * D * SPEC.d_ff  # one matrix of one layer


def test_tensor_activations_only():
    found = moved(tensor=8)
    assert {one.kind for one in found["layers"] + found["once"]} == {"all-reduce"}
    activations = 4 * ROWS * WIDTH * D
    sizes = [size for one in found["layers"] for size in one.sizes]
    assert set(sizes) == {activations}
    assert len(sizes) == 2 + 5  # forward: o and down; backward: the inputs of q, k, v, gate and up
    assert total(found["once"], "all-reduce") <= 2 * activations + 4 * 4 * ROWS * WIDTH + SMALL  # embedding, head


def test_context_keys_and_values_are_gathered():
    found = moved(context=8)
    keys = 4 * ROWS * WIDTH * SPEC.num_kv_heads * SPEC.head_dim
    assert total(found["layers"], "all-gather") == 4 * keys  # k and v, forward and backward
    assert total(found["layers"], "all-reduce", "reduce-scatter") == MATRICES + NORMS + 2 * keys  # and their gradients
    assert total(found["once"], "all-gather") <= 2 * 4 * ROWS * WIDTH  # segments
    assert TABLES + 4 * D <= total(found["once"], "all-reduce") <= TABLES + 4 * D + SMALL


@pytest.mark.parametrize("mesh", [{"data": 2, "fsdp": 2, "tensor": 2}], ids=str)
def test_combined_axes_move_no_more_than_each(mesh):
    found = moved(**mesh)
    assert total(found["layers"], "all-gather") == 2 * MATRICES // mesh["tensor"]
    activations = 4 * ROWS * WIDTH * D // 4
    gradients = MATRICES // mesh["tensor"] + MATRICES // mesh["tensor"] // mesh["fsdp"] + NORMS
    assert total(found["layers"], "all-reduce", "reduce-scatter") <= gradients + 7 * activations
