"""The committed golden files are what the other libraries say today: remade in a temporary folder and compared.

Runs where torch, transformers, TRL and PEFT are: launch/parity.sh --check.
"""

import json
import math
import pathlib
import shutil
import subprocess
import sys

import pytest

HERE = pathlib.Path(__file__).parent
GOLDEN = HERE.parent / "golden"
SCRIPTS = sorted(HERE.glob("make_*_golden.py"))
TOLERANCE = 2e-4  # two torch builds and thread counts differ by rounding; ten steps of training amplify it


@pytest.mark.parity
@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem.removeprefix("make_").removesuffix("_golden"))
def test_remade_golden_files_equal_the_committed_ones(script, tmp_path):
    shutil.copytree(HERE, tmp_path / "parity")
    (tmp_path / "golden").mkdir()
    subprocess.run([sys.executable, str(tmp_path / "parity" / script.name)], check=True)
    made = [path for path in (tmp_path / "golden").rglob("*") if path.is_file()]
    assert made
    for path in made:
        committed = GOLDEN / path.relative_to(tmp_path / "golden")
        assert committed.exists(), f"{committed.name} is made but not committed"
        same(read(path), read(committed), path.name)


def read(path: pathlib.Path):
    """Contents as nested dicts, lists and numbers."""
    if path.suffix == ".json":
        return json.loads(path.read_text(encoding="utf-8"))
    if path.suffix == ".npz":
        import numpy as np

        with np.load(path) as arrays:
            return {name: arrays[name].tolist() for name in arrays}
    if path.suffix == ".safetensors":
        from safetensors.numpy import load_file

        return {name: value.tolist() for name, value in load_file(path).items()}
    return path.read_bytes()


def same(a, b, where: str) -> None:
    """Equal up to TOLERANCE in floats; "versions" may differ."""
    if isinstance(a, dict):
        assert isinstance(b, dict) and a.keys() == b.keys(), f"{where}: {sorted(a)} != {sorted(b)}"
        for key in a:
            if key != "versions":
                same(a[key], b[key], f"{where}.{key}")
    elif isinstance(a, list):
        assert isinstance(b, list) and len(a) == len(b), f"{where}: lengths differ"
        for i, pair in enumerate(zip(a, b, strict=True)):
            same(*pair, f"{where}[{i}]")
    elif isinstance(a, float) or isinstance(b, float):
        assert math.isclose(a, b, rel_tol=TOLERANCE, abs_tol=TOLERANCE), f"{where}: {a} != {b}"
    else:
        assert a == b, f"{where}: {a!r} != {b!r}"
