"""How long until the first step, with a cold and a warm compilation cache, and how often the step is compiled.

python benchmarks/startup.py          prints a section of docs/performance.md
"""

from __future__ import annotations

import json
import os
import pathlib
import re
import subprocess
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent
STEPS = 4


def help_seconds() -> float:
    """Median of five `python -m jaxpost.train --help`."""
    times = []
    for _ in range(5):
        start = time.perf_counter()
        command = [sys.executable, "-m", "jaxpost.train", "--help"]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, cwd=ROOT)
        times.append(time.perf_counter() - start)
    return sorted(times)[2]


def first_step(folder: pathlib.Path, cache: pathlib.Path) -> tuple[float, float, list[float]]:
    """(seconds of the whole command until it is done, seconds to the first step, step times after it)."""
    run = folder / "run"
    command = [sys.executable, "-m", "jaxpost.train", "--config=configs/quickstart.yaml", "--overwrite"]
    command += [f"run_dir={run}"]
    command += [f"loop.steps={STEPS}", "loop.eval_first=false", "eval.tasks=[]", "eval.samples=0", "data.eval=[]"]
    command += ["metrics.console=lines", "loop.save_every=0"]
    start = time.perf_counter()
    environment = os.environ | {"JAX_COMPILATION_CACHE_DIR": str(cache)}
    out = subprocess.run(command, check=True, capture_output=True, text=True, cwd=ROOT, env=environment).stdout
    total = time.perf_counter() - start
    first = float(re.search(r"first step after ([\d.]+) s", out)[1])
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return total, first, [line["step_time"] for line in lines if "step_time" in line][1:]


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        folder = pathlib.Path(folder)
        rows = [(name, *first_step(folder, folder / "cache")) for name in ("cold", "warm")]
    print("| compilation cache | first step, s (rows, compilation, step) | later steps, s | whole command, s |")
    print("|---|---:|---:|---:|")
    for name, total, first, later in rows:
        print(f"| {name} | {first:.1f} | {sorted(later)[len(later) // 2]:.1f} | {total:.1f} |")
    print(f"\n`python -m jaxpost.train --help`: {help_seconds():.2f} s (median of 5).")
    print("The step compiled once in each run: a run that compiles more programs than it declares batch shapes stops.")


if __name__ == "__main__":
    main()
