"""A picture of a run: losses over steps, from metrics.jsonl."""

from __future__ import annotations

import os
from pathlib import Path

from absl import logging

from jaxpost.metrics import read_metrics


def plot_losses(run_dir: str | os.PathLike) -> Path | None:
    """Draw training and held-out loss and the learning rate to RUN/loss.png and return its path.

    None where there is nothing to draw, or no matplotlib to draw it with (said once in the log).
    """
    try:
        import matplotlib
    except ImportError:
        logging.warning("no loss.png: matplotlib is missing (pip install 'jaxpost[report]')")
        return None
    matplotlib.use("Agg")  # no display needed
    from matplotlib import pyplot

    lines = read_metrics(run_dir)
    curves = {name: _curve(lines, name) for name in ("loss", "eval/loss", "learning_rate")}
    if not curves["loss"][0]:
        return None
    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    axes.plot(*curves["loss"], label="loss", color="tab:blue", linewidth=1)
    if curves["eval/loss"][0]:
        axes.plot(*curves["eval/loss"], "o-", label="held-out loss", color="tab:orange", markersize=4)
    axes.set(xlabel="step", ylabel="loss (nats a token)", title=Path(run_dir).absolute().name)
    axes.grid(alpha=0.3)
    axes.legend(loc="upper right")
    if curves["learning_rate"][0]:
        right = axes.twinx()
        right.plot(*curves["learning_rate"], color="tab:gray", linewidth=0.8, linestyle=":")
        right.set_ylabel("learning rate (dotted)")
    path = Path(run_dir) / "loss.png"
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
    return path


def _curve(lines: list[dict], name: str) -> tuple[list[int], list[float]]:
    """Steps and values of a metric where it has a finite value."""
    points = [(line["step"], line[name]) for line in lines if line.get(name) is not None]
    return [step for step, _ in points], [value for _, value in points]
