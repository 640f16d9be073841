"""Time to lower and to compile the train step, by number of layers: layers are scanned, so it should not grow.

    python benchmarks/compile_time.py [--repeats 3] [--plot docs/img/compile_time.png]

The step is the one that jaxpost.train would run (build.build_job) on a tiny model, with all weights trained and with
adapters on the upper half of the layers; the persistent compilation cache is off. The variants run in turn, `repeats`
times, so that other load on the machine hits all alike. Prints a markdown table of medians and draws it.
"""

from __future__ import annotations

import argparse
import os
import pathlib
import statistics
import sys
import tempfile
import time
from typing import Any

import jax

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from jaxpost import config as config_module  # noqa: E402
from jaxpost.build import build_job  # noqa: E402
from jaxpost.metrics import Sinks  # noqa: E402
from tests import tiny  # noqa: E402

LAYERS = (4, 8, 16, 32)
KINDS = ("all weights", "LoRA on the upper half")


def step_of(folder: pathlib.Path, layers: int, kind: str) -> tuple[Any, tuple]:
    """(jitted train step, arguments to lower it with) of a tiny job with this many layers, as a run builds it."""
    adapters = {"rank": 2, "layers": f"{layers // 2}:"} if kind == KINDS[1] else None
    source = tiny.MODEL.replace("num_layers=3", f"num_layers={layers}")
    file = tiny.write_config(folder, lora=adapters, model={"source": source}, data={"eval": []})
    config = config_module.load(file, []).config
    pathlib.Path(config.run_dir).mkdir(parents=True, exist_ok=True)
    with Sinks(config.run_dir, config.metrics) as sinks:
        job = build_job(config, sinks, devices=jax.devices()[:1])
        batch = next(job.source)
        job.source.close()
    return job.train_step, (job.state, job.frozen, batch)


def seconds(step: Any, args: tuple) -> tuple[float, float]:
    """(to trace and lower, to compile), nothing cached."""
    jax.clear_caches()
    start = time.perf_counter()
    lowered = step.lower(*args)
    middle = time.perf_counter()
    lowered.compile()
    return middle - start, time.perf_counter() - middle


def draw(path: pathlib.Path, times: dict[tuple[str, int], tuple[float, float]]) -> None:
    """Median seconds over layers, a line a kind."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 3.5), layout="constrained")
    for kind in KINDS:
        axes.plot(LAYERS, [sum(times[kind, layers]) for layers in LAYERS], "o-", label=kind)
    axes.set(xlabel="layers", ylabel="seconds to lower and compile", xticks=LAYERS, ylim=(0, None))
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right")
    figure.savefig(path, dpi=100)
    pyplot.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--plot", type=pathlib.Path)
    args = parser.parse_args()
    jax.config.update("jax_enable_compilation_cache", False)
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as folder:
        steps = {
            (kind, layers): step_of(pathlib.Path(folder, f"{i}-{layers}"), layers, kind)
            for i, kind in enumerate(KINDS)
            for layers in LAYERS
        }
        seconds(*steps[KINDS[0], LAYERS[0]])  # the first one also imports what tracing needs
        taken = [{name: seconds(*step) for name, step in steps.items()} for _ in range(args.repeats)]
    times = {name: tuple(statistics.median(turn[name][part] for turn in taken) for part in (0, 1)) for name in steps}
    totals = {name: [sum(turn[name]) for turn in taken] for name in steps}
    print("| trained | layers | trace and lower, s | compile, s | sum, s (least to most) |")
    print("|---|---:|---:|---:|---:|")
    for (kind, layers), (lower, compile) in times.items():
        spread = totals[kind, layers]
        both = f"{statistics.median(spread):.2f} ({min(spread):.2f} to {max(spread):.2f})"
        print(f"| {kind} | {layers} | {lower:.2f} | {compile:.2f} | {both} |")
    loads = f"load average {load:.1f} before, {os.getloadavg()[0]:.1f} after"
    print(f"\nmedian of {args.repeats}; jax {jax.__version__}; {loads}")
    if args.plot:
        draw(args.plot, times)


if __name__ == "__main__":
    main()
