"""Headers from strangers: each lie is one clean error, without a big allocation and without leaving the folder."""

import json
import pathlib
import struct
import subprocess
import sys

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from jaxpost.errors import CheckpointError
from jaxpost.models.safetensors_reader import MAX_HEADER_BYTES, read_header

ROOT = pathlib.Path(__file__).parents[2]


def entry(dtype="F32", shape=(2, 2), offsets=(0, 16), **more) -> dict:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)} | more


def raw(header: bytes | dict, data: int = 16, length: int | None = None) -> bytes:
    header = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(header) if length is None else length) + header + b"\0" * data


def text(name: str, value: dict) -> str:
    return f'"{name}": {json.dumps(value)}'


HOSTILE = {
    "empty file": (b"", "header of 0 bytes in a file of 0"),
    "three bytes": (b"\1\0\0", "truncated"),
    "length 2^63": (raw({"a": entry()}, length=1 << 63), "truncated or damaged"),
    "length 2^64-1": (raw({"a": entry()}, length=(1 << 64) - 1), "truncated or damaged"),
    "length past the end": (raw({"a": entry()}, length=10_000), "truncated or damaged"),
    "length too short": (raw({"a": entry()}, length=20), "not valid JSON"),
    "huge header": (raw(b'{"a":[' + b"[]," * 3_000_000 + b"0]}"), f"more than {MAX_HEADER_BYTES}"),
    "wide header": (raw(b'{"a":[' + b"[]," * 1_300_000 + b"0]}"), "expected exactly dtype"),
    "deep header": (raw(b'{"a":' + b"[" * 1_000_000 + b"]" * 1_000_000 + b"}"), "not valid JSON"),
    "not UTF-8": (raw(b'{"\xff": 1}'), "not valid JSON"),
    "not JSON": (raw(b"{'a': 1}"), "not valid JSON"),
    "a list": (raw(b"[]"), "not a JSON object"),
    "huge integer": (raw(b'{"a": ' + b"9" * 100_000 + b"}"), "not valid JSON"),
    "duplicate name": (raw(f"{{{text('a', entry())}, {text('a', entry())}}}".encode()), "'a' appears twice"),
    "duplicate field": (raw(b'{"a": {"dtype": "F32", "dtype": "F16"}}'), "'dtype' appears twice"),
    "no dtype": (raw({"a": {"shape": [2, 2], "data_offsets": [0, 16]}}), "expected exactly"),
    "extra field": (raw({"a": entry(stride=4)}), "expected exactly"),
    "unknown dtype": (raw({"a": entry("F128")}), "unknown dtype 'F128'"),
    "dtype a list": (raw({"a": entry(["F32"])}), "unknown dtype"),
    "wrong dtype size": (raw({"a": entry("F16")}), "takes 8 bytes, data_offsets span 16"),
    "negative shape": (raw({"a": entry(shape=(-2, -2))}), "bad shape"),
    "float shape": (raw({"a": entry(shape=(2.0, 2))}), "bad shape"),
    "bool shape": (raw({"a": entry(shape=(True, 4))}), "bad shape"),
    "product overflow": (raw({"a": entry(shape=(1 << 62, 1 << 62, 4))}), "takes .* bytes"),
    "many dims": (raw({"a": entry(shape=(1,) * 1000)}), "bad shape"),
    "offsets reversed": (raw({"a": entry(offsets=(16, 0))}), "bad data_offsets"),
    "offsets past the end": (raw({"a": entry(offsets=(0, 64), shape=(4, 4))}), "64 bytes .* the file holds 16"),
    "offset 2^63": (raw({"a": entry(offsets=(1 << 63, (1 << 63) + 16))}), "bad data_offsets"),
    "overlap": (raw({"a": entry(), "b": entry(offsets=(8, 24))}, 24), "'b' starts at byte 8, expected 16"),
    "same bytes twice": (raw({"a": entry(), "b": entry()}), "starts at byte 0, expected 16"),
    "gap": (raw({"a": entry(), "b": entry(offsets=(20, 36))}, 36), "'b' starts at byte 20, expected 16"),
    "starts late": (raw({"a": entry(offsets=(4, 20))}, 20), "expected 0"),
    "bytes left over": (raw({"a": entry()}, 20), "16 bytes of weights, the file holds 20"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_header(case, tmp_path):
    content, message = HOSTILE[case]
    (tmp_path / "x.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError, match=message) as caught:
        read_header(tmp_path / "x.safetensors")
    assert len(str(caught.value)) < 1000 and "\n" not in str(caught.value)


def test_hostile_headers_cost_little_memory(tmp_path):
    """All of them in one process that has only the reader: peak RSS below 200 MB (half of it is Python and numpy)."""
    for number, (content, _) in enumerate(HOSTILE.values()):
        (tmp_path / f"{number}.safetensors").write_bytes(content)
    code = (
        "import pathlib, sys, re\n"
        "from jaxpost.errors import CheckpointError\n"
        "from jaxpost.models.safetensors_reader import read_header\n"
        "for file in pathlib.Path(sys.argv[1]).iterdir():\n"
        "    try: read_header(file); print('accepted', file)\n"
        "    except CheckpointError: pass\n"
        "print(re.search(r'VmHWM:\\s+(\\d+) kB', pathlib.Path('/proc/self/status').read_text())[1])\n"
    )
    if not pathlib.Path("/proc/self/status").exists():
        pytest.skip("peak memory is read from /proc")
    done = subprocess.run([sys.executable, "-c", code, tmp_path], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 200_000, done.stdout


def test_missing_file(tmp_path):
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_header(tmp_path / "none.safetensors")


def test_reads_what_the_library_writes(tmp_path):
    arrays = {
        "f32": np.arange(6, dtype=np.float32).reshape(2, 3),
        "f16": np.arange(4, dtype=np.float16),
        "bf16": np.arange(8, dtype=np.float32).astype(ml_dtypes.bfloat16).reshape(2, 2, 2),
        "empty": np.zeros((0, 4), np.float32),
        "ids": np.arange(3, dtype=np.int64),
    }
    save_file(arrays, tmp_path / "x.safetensors", metadata={"format": "np"})
    found = read_header(tmp_path / "x.safetensors")
    assert found.keys() == arrays.keys()
    for name in ("f32", "f16", "bf16", "empty"):
        view = found[name].view(name)
        assert view.dtype == arrays[name].dtype and not view.flags.writeable or view.size == 0
        np.testing.assert_array_equal(np.asarray(view, np.float32), arrays[name].astype(np.float32))
    with pytest.raises(CheckpointError, match="ids has dtype I64; weights may be F32, F16, BF16"):
        found["ids"].view("ids")


def test_random_damage_is_an_error_or_harmless(tmp_path):
    """Cut or flip bytes anywhere: only ever a CheckpointError, or a header that still tiles the file."""
    file = tmp_path / "x.safetensors"
    save_file({f"t{i}": np.ones((2, i + 1), np.float32) for i in range(5)}, file)
    good = file.read_bytes()
    random = np.random.default_rng(0)
    for _ in range(300):
        bad = bytearray(good)
        if random.random() < 0.3:
            del bad[random.integers(len(bad)) :]
        else:
            bad[random.integers(len(bad))] = random.integers(256)
        file.write_bytes(bad)
        try:
            for name, info in read_header(file).items():
                info.view(name).sum()
        except CheckpointError:
            pass
