"""Reports of steps compiled for this machine's CPU devices; those for TPUs and GPUs are in tests/aot."""

import jax
import numpy as np
import pytest

from jaxpost import aot, build, hlo
from jaxpost.errors import ConfigError
from jaxpost.sharding import row_parts
from tests import tiny

V, D, F, LAYERS, KV = 264, 64, 96, 3, 32  # of tiny.MODEL
MATRICES = 2 * D * D + 2 * D * KV + 3 * D * F  # one layer's
NORMS = (2 * LAYERS + 1) * D
PARAMS = LAYERS * MATRICES + NORMS + V * D


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    config = tiny.load(tmp_path_factory.mktemp("aot"), mesh={"data": 2, "fsdp": 4})
    return aot.compile_job(aot.abstract_job(config, jax.devices()))


def test_bytes_by_kind_are_those_of_the_shapes(report):
    assert report.mesh == {"data": 2, "fsdp": 4}
    assert report.params == 4 * ((PARAMS - NORMS) // 4 + NORMS)  # norms lie whole on every device
    assert 0 <= report.optimizer - 2 * report.params <= 64  # two moments and the counts of steps
    assert report.batch == 17 * 8 * 64 // 8 and report.frozen == 0
    assert report.arguments == report.state + report.batch
    assert report.peak > report.state and report.seconds > 0


def test_every_buffer_of_the_state_is_used_again(report):
    assert report.alias == report.state and report.donated == report.state_arrays


def test_what_moves(report):
    by_place = {(one.where, one.kind, one.dtype): one for one in report.collectives}
    gathered = by_place["loop", "all-gather", "f32"]
    assert (gathered.count, gathered.bytes) == (14, 2 * 4 * MATRICES)
    assert by_place["once", "all-gather", "f32"].bytes >= 4 * V * D  # the head
    assert report.head_loops >= 2  # forward and backward; nothing moves in them
    assert not any(one.where == "head" or one.ring for one in report.collectives)


def test_the_abstract_job_is_the_real_one(tmp_path):
    from jaxpost.metrics import Sinks

    sections = {"model": {"param_dtype": "bfloat16"}, "lora": {"rank": 2}, "data": {"eval": []}}
    config = tiny.load(tmp_path, mesh={"data": 1, "tensor": 2}, **sections)
    devices = jax.devices()[:2]
    abstract = aot.abstract_job(config, devices)
    real = build.build_job(config, Sinks(config.run_dir, config.metrics), devices=devices)
    batch = next(real.source)
    for mine, its in ((abstract.state, real.state), (abstract.frozen, real.frozen), (abstract.batch, batch)):
        describe = lambda x: (x.shape, x.dtype, x.sharding.devices_indices_map(x.shape))
        assert jax.tree.map(describe, mine) == jax.tree.map(describe, its)
    real.source.close()


def test_rows_of_hosts():
    one_host_a_row = np.array([[0], [0], [1], [1]])
    assert row_parts(one_host_a_row) == {0: 0, 1: 1}
    assert row_parts(one_host_a_row[::-1]) == {1: 0, 0: 1}
    ring = np.array([0, 0, 1, 1, 1, 1, 0, 2, 3, 3, 3, 3, 2, 2, 2, 0])[:, None]  # 16 chips of a 4x4 torus
    assert row_parts(ring) == {0: 0, 1: 1, 2: 2, 3: 3}
    joined_by_tensor = np.array([[0, 1], [0, 1], [2, 3], [2, 3]])
    assert row_parts(joined_by_tensor) == {0: 0, 1: 0, 2: 1, 3: 1}
    for torn in ([[0, 0], [0, 1], [1, 1]], [[0], [0], [1]]):
        with pytest.raises(ConfigError, match="mesh"):
            row_parts(np.array(torn))


@pytest.mark.parametrize("name", ["v5e", "v5e:16", "v5e:4x", "h100:4x4", "h100:0", "i9:8"])
def test_unknown_devices(name):
    with pytest.raises(ConfigError, match="devices"):
        aot.describe_devices(name)


# As XLA writes them for GPUs (asynchronous, several arrays at once) and for TPUs (rings inside products; a gather that
# goes on while a loop runs).
GPU = """HloModule step, input_output_alias={ {0}: (0, {}, may-alias), {1}: (3, {}, may-alias) }, entry

ENTRY %main () -> f32[] {
  %g = ((bf16[512,1024]{1,0}, bf16[8]{0}), (bf16[4096,1024]{1,0}, bf16[64]{0})) all-gather-start(%a, %b), \
replica_groups=mesh['axis_0'=8,'axis_1'=1] {'axis_0'}, dimensions={0}, metadata={op_name="step/x"}
  %r = (f32[128,16]{1,0}, f32[128,2]{1,0}) reduce-scatter-start(%c), replica_groups=mesh['a'=4,'b'=2] {'b'}
  %n = f32[4]{0} all-reduce-start(%d), replica_groups={{0,1,2,3,4,5,6,7}}, to_apply=%add
  %alone = f32[4]{0} all-reduce(%d), replica_groups=mesh['a'=8,'b'=1] {'b'}, to_apply=%add
}
"""
PAIRS = "{{0,1},{1,2},{2,3},{3,0},{4,5},{5,6},{6,7},{7,4}}"
TPU = f"""HloModule step, input_output_alias={{ {{0}}: (0, {{}}, may-alias) }}

%windowed_dot_general_body_ag.1.clone (p: bf16[]) -> bf16[] {{
  %p1 = (bf16[9,4]{{1,0:T(8,128)(2,1)S(1)}}, bf16[9,4]{{1,0}}, u32[]{{:S(2)}}, u32[]) collective-permute-start(%x), \
source_target_pairs={PAIRS}, metadata={{op_name="step/while/dot"}}
}}

%windowed_dot_general_body_rs (p: bf16[]) -> bf16[] {{
  %p2 = (bf16[5,4]{{1,0}}, bf16[5,4]{{1,0}}, u32[], u32[]) collective-permute-start(%x), source_target_pairs={PAIRS}
}}

%piece (p: bf16[]) -> bf16[] {{
  %later = bf16[16,36]{{1,0}} all-gather(%h), channel_id=1, frontend_attributes={{chain_id="0"}}
}}

%layer (p: bf16[]) -> bf16[] {{
  %first = (bf16[9,4], bf16[9,4], u32[], u32[]) collective-permute-start(%x), source_target_pairs={PAIRS}, \
metadata={{op_name="step/while/dot"}}
  %w1 = (bf16[9,4], u32[]) while(%t), condition=%c, body=%windowed_dot_general_body_ag.1.clone, \
metadata={{op_name="step/while/dot"}}
  %w2 = (bf16[5,4], u32[]) while(%t), condition=%c, body=%windowed_dot_general_body_rs, \
metadata={{op_name="step/while/other"}}
  %f = bf16[] fusion(%x), kind=kCustom, calls=%piece
}}

ENTRY %main () -> f32[] {{
  %begun = bf16[16,36]{{1,0}} all-gather(%h), channel_id=1, frontend_attributes={{chain_id="0"}}
  %loop = (bf16[]) while(%t), condition=%c, body=%layer, metadata={{op_name="step/while"}}
}}
"""


def test_collectives_of_a_gpu_program():
    assert hlo.donated(GPU) == {0, 3}
    found = {one.kind: one for one in hlo.collectives(GPU)}
    assert len(hlo.collectives(GPU)) == 3  # the group of one moves nothing
    assert found["all-gather"].arrays == (("bf16", (4096, 1024)), ("bf16", (64,)))
    assert found["all-gather"].bytes == 2 * 4096 * 1024 + 2 * 64
    assert found["reduce-scatter"].arrays == (("f32", (128, 2)),)
    assert found["all-reduce"].sizes == (16,)


def test_collectives_of_a_tpu_program():
    found = hlo.collectives(TPU)
    seen = {(one.kind, one.ring, one.arrays, one.within) for one in found}
    assert len(found) == 3 and seen == {
        ("all-gather", True, (("bf16", (4, 9, 4)),), ("step/while",)),  # four devices go round
        ("reduce-scatter", True, (("bf16", (5, 4)),), ("step/while",)),
        ("all-gather", False, (("bf16", (16, 36)),), ()),  # begun before the loop, one array in all
    }


def test_moved_tells_the_heads_loops_from_the_layers():
    def one(*within: str) -> hlo.Collective:
        return hlo.Collective("all-reduce", (("f32", (2,)),), within, "")

    found = [one(), one("jit(step)/jvp()/while"), one("jit(step)/transpose(jvp(head))/shard_map/while")]
    assert {(m.where, m.count, m.bytes) for m in aot.moved(found)} == {("once", 1, 8), ("loop", 1, 8), ("head", 1, 8)}
