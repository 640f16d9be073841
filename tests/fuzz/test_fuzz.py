"""Readers of files from strangers under seeded damage: a sane success, or one of our errors in one line. See worker.py.

60 cases a reader in every run, 2,000 with the slow tests. A finding names its seed:
`python -m tests.fuzz.worker READER NUMBER 1` repeats it. What was found and mended stands in test_regressions.py.
"""

import json
import os
import pathlib
import subprocess
import sys

import pytest

from tests.fuzz import worker
from tests.fuzz.readers import READERS, Reader

ROOT = pathlib.Path(__file__).parents[2]


def fuzz(reader: str, first: int, count: int) -> tuple[list[str], dict[str, int]]:
    """Findings and counts of a worker process; its death is a finding of the case that it was at."""
    command = [sys.executable, "-m", "tests.fuzz.worker", reader, str(first), str(count)]
    done = subprocess.run(
        command, cwd=ROOT, env=os.environ | {"JAX_PLATFORMS": "cpu"}, capture_output=True, text=True, check=False
    )
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    findings = [f"{line['finding']}: {line['what']}" for line in lines if "finding" in line]
    if done.returncode:
        at = [line["at"] for line in lines if "at" in line] or ["the good file"]
        findings.append(f"{at[-1]}: the process ended with {done.returncode}: {done.stderr[-2000:]}")
    return findings, next((line["counts"] for line in lines if "counts" in line), {})


@pytest.mark.parametrize("reader", READERS)
def test_damaged_files(reader):
    findings, counts = fuzz(reader, 0, 60)
    assert not findings, "\n".join(findings)
    assert counts["refused"] + counts["ok"] == 60 and counts["refused"] > 10 and counts["ok"] > 0


@pytest.mark.slow
@pytest.mark.parametrize("reader", READERS)
def test_damaged_files_long(reader):
    findings, counts = fuzz(reader, 1000, 2000)
    assert not findings, "\n".join(findings)
    assert counts["refused"] > 300 and counts["ok"] > 20


class Naughty(Reader):
    """Fails as the harness must notice: case i of FAULTS."""

    def __init__(self, folder):
        self.file = folder / "x"

    def restore(self):
        self.fault = None

    def mutate(self, rng):
        self.fault = self.next

    def check(self):
        from jaxpost.errors import DataError

        if self.fault == "foreign":
            raise KeyError("x")
        if self.fault == "lines":
            raise DataError(f"{self.file}: a\nb")
        if self.fault == "unnamed":
            raise DataError("something is wrong")
        if self.fault == "slow":
            start = worker.spent()
            while worker.spent() - start < worker.SECONDS + 0.1:
                sum(range(100_000))
        if self.fault == "large":
            self.kept = bytearray((worker.MEGABYTES + 30) << 20)
            self.kept[:: 1 << 12] = b"x" * len(self.kept[:: 1 << 12])
            del self.kept
        if self.fault == "insane":
            raise AssertionError("ids outside of the vocabulary")
        if self.fault == "fine":
            raise DataError(f"{self.file}: damaged")


@pytest.mark.parametrize("fault", ["foreign", "lines", "unnamed", "slow", "large", "insane", "fine"])
def test_the_harness_notices(tmp_path, fault, monkeypatch):
    monkeypatch.setattr(worker, "SECONDS", 0.3)
    monkeypatch.setattr(worker, "MEGABYTES", 40)
    reader = Naughty(tmp_path)
    reader.next = fault
    kind, _ = worker.case(reader, "0")
    assert kind == ("refused" if fault == "fine" else "finding")
