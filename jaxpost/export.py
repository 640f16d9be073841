"""Write the model of a run for other programs.

  python -m jaxpost.export RUN --to=hf      a folder that transformers, vLLM, .. open; adapters are merged in
  python -m jaxpost.export RUN --to=peft    the adapters alone, in PEFT's format

RUN is a run directory. The result is in RUN/export/hf or RUN/export/peft, with the tokenizer; --weights=ema takes the
averaged weights of a run with algorithm.ema_decay, and writes RUN/export/hf-ema or peft-ema.
"""

from __future__ import annotations

import os
import pathlib
from typing import Any

from jaxpost import cli
from jaxpost.errors import CheckpointError, ConfigError

FLAGS = (
    cli.Flag("to", "hf", "what to write", ("hf", "peft")),
    cli.Flag("weights", "policy", "the trained weights, or their average", ("policy", "ema")),
    cli.Flag("step", None, "checkpoint to take; without it, the newest"),
    cli.Flag("out", None, "folder to write; must be empty or absent"),
    cli.Flag("dtype", None, "of the written weights; without it, that of the run", ("float32", "bfloat16", "float16")),
)
HUB_NAMES = {"smollm2-135m": "HuggingFaceTB/SmolLM2-135M-Instruct"}


def main(args: cli.Arguments) -> None:
    """The command."""
    if len(args.positional) != 1 or args.overrides:
        raise ConfigError("name one RUN directory; --help shows the flags")
    from jaxpost.train import compilation_cache

    flags = args.flags
    step = flags["step"]
    if step is not None and not step.isdecimal():
        raise ConfigError(f"--step={step}: not the number of a step")
    compilation_cache()
    step = None if step is None else int(step)
    folder = export(
        args.positional[0], flags["to"], step=step, out=flags["out"], dtype=flags["dtype"], weights=flags["weights"]
    )
    print(f"written: {folder}")


def export(
    run_dir: str | os.PathLike,
    to: str = "hf",
    *,
    step: int | None = None,
    out: str | None = None,
    dtype: str | None = None,
    weights: str = "policy",
) -> pathlib.Path:
    """Write a run's checkpoint (step None: the newest) as a Hugging Face model ("hf") or a PEFT adapter ("peft").

    out: default RUN/export/<to>, for weights "ema" RUN/export/<to>-ema. dtype None: as trained. Everything that can be
    refused is refused before weights are read: ConfigError for a folder that is not a run, an `out` with files in it
    and "peft" of a run without adapters, CheckpointError for a run without the step or without averaged weights.
    """
    if to not in ("hf", "peft"):
        raise ConfigError(f"--to={to}: hf or peft")
    if weights not in ("policy", "ema"):
        raise ConfigError(f"--weights={weights}: policy or ema")
    from jaxpost.checkpoint import Checkpointer
    from jaxpost.config import load_saved

    saved = load_saved(run_dir)
    folder = pathlib.Path(out) if out else pathlib.Path(run_dir, "export", to if weights == "policy" else f"{to}-ema")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(f"{folder}: exists and is not an empty folder; choose another with --out, or remove it")
    if to == "peft" and (saved.lora is None or saved.lora.rank == 0):
        what = "all weights" if saved.lora is None else "weights in full (lora.rank is 0)"
        raise ConfigError(f"{run_dir}: trained {what}, so there is no adapter; use --to=hf")
    checkpointer = Checkpointer(run_dir, saved.checkpoint)
    steps = checkpointer.steps()
    if not steps:
        raise CheckpointError(f"{run_dir}: no checkpoint yet; the run has not saved")
    if step is not None and step not in steps:
        raise CheckpointError(f"{run_dir}: no checkpoint of step {step}; there: {', '.join(map(str, steps))}")
    step = steps[-1] if step is None else step
    if weights == "ema" and "policy" not in checkpointer.meta(step).get("averaged", ()):  # a slow copy need not be one
        raise CheckpointError(f"{run_dir}: keeps no averaged weights; it was trained without algorithm.ema_decay")
    return _write(f"ckpt:{run_dir}/{step}", to, folder, dtype, saved, weights)


def _write(source: str, to: str, folder: pathlib.Path, dtype: str | None, saved: Any, weights: str) -> pathlib.Path:
    import jax

    from jaxpost import lora
    from jaxpost.build_model import open_model
    from jaxpost.models import hf, peft

    model, params, adapters = open_model(source, weights)
    spec, config = model.policy.spec, model.policy.adapters
    if to == "peft":
        base = base_name(saved.model.source)
        return peft.save_peft(folder, adapters, config, spec, base=base, tokenizer=model.tokenizer, dtype=dtype)
    if adapters is not None:
        params = jax.jit(lambda base, adapters: lora.merge(base, adapters, config))(params, adapters)
    return hf.save_hf(params, spec, folder, dtype, model.tokenizer)


def base_name(source: str) -> str | None:
    """What PEFT should load the base model from: a hub name or a model folder; None where it is neither."""
    if source.startswith("hf:"):
        return source.removeprefix("hf:").partition("@")[0]
    return HUB_NAMES.get(source) or (source if pathlib.Path(source).is_dir() else None)


if __name__ == "__main__":
    cli.main(main, doc=__doc__, flags=FLAGS)
