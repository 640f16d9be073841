"""Train a model:  python -m jaxpost.train --config=FILE [key=value ...]

The same command goes on with the run that it finds in run_dir, or says that the run is done.
"""

from __future__ import annotations

import contextlib
import os
import pathlib
from collections.abc import Sequence
from typing import Any

from jaxpost import cli

FLAGS = (
    *cli.CONFIG_FLAGS,
    cli.Flag("print_config", False, "print the resolved config with where each value came from, and stop"),
    cli.Flag("overwrite", False, "delete the run in run_dir and start again"),
    cli.Flag("allow_changed", None, "FIELD,...: config keys that may differ from the saved run's"),
    cli.Flag("allow_fallback", False, "where the newest checkpoint is damaged, go on from an older one"),
    cli.Flag("profile_steps", None, "A:B: record the steps after step A, up to step B, into run_dir/profile"),
)


def run(
    config: Any,
    *,
    dump: str | None = None,
    overwrite: bool = False,
    allow_changed: Sequence[str] = (),
    allow_fallback: bool = False,
    profile_steps: tuple[int, int] | None = None,
    devices: list | None = None,
) -> Any:
    """Train as config (a jaxpost.Config) says and return the last TrainState.

    dump: the text saved as config.yaml, with provenance. profile_steps: (10, 12) records the two steps after the tenth
    into run_dir/profile (profiling.py). devices: those that the mesh is laid over, default all.

    Raises a JaxpostError that says what to do; never leaves a damaged checkpoint.
    """
    import jax

    from jaxpost import loop, rundir
    from jaxpost.build import build_job
    from jaxpost.build_model import adopt_adapters
    from jaxpost.config import Loaded, check_resume
    from jaxpost.manifest import replace_file
    from jaxpost.metrics import Sinks, before_and_after
    from jaxpost.metrics_plot import plot_losses
    from jaxpost.profiling import Profile
    from jaxpost.sharding import join_cluster

    compilation_cache()
    join_cluster(config.mesh)
    config = adopt_adapters(Loaded(config, {})).config
    writes = jax.process_index() == 0
    with rundir.RunLock(config.run_dir) if writes else contextlib.nullcontext():
        if overwrite and writes:
            rundir.clear(config.run_dir)
        if jax.process_count() > 1:
            from jax.experimental import multihost_utils

            multihost_utils.sync_global_devices("the run directory is locked and clear")
        saved = pathlib.Path(config.run_dir) / "config.yaml"
        if saved.exists():
            check_resume(saved, config, allow_changed)
        with Sinks(config.run_dir, config.metrics, writer=writes) as sinks:
            job = build_job(config, sinks, allow_changed=allow_changed, allow_fallback=allow_fallback, devices=devices)
            if writes:
                replace_file(saved, dump or Loaded(config, {}).dump())
                rundir.write_env(config.run_dir)
            with job.checkpointer, contextlib.closing(job.source):
                if int(job.state.step) >= job.total_steps:
                    sinks.event(
                        f"this run is done: {job.total_steps} steps in {config.run_dir}; --overwrite starts again, "
                        "another run_dir starts another"
                    )
                profile = Profile(config.run_dir, profile_steps, sinks.event, writes=writes)
                profile.check(int(job.state.step), job.total_steps)
                state = loop.run(config.loop, job, profile)
            if int(state.step) >= job.total_steps and (text := before_and_after(config.run_dir)):
                sinks.event(text)
        if writes:
            plot_losses(config.run_dir)
        return state


def main(args: cli.Arguments) -> None:
    """The command."""
    from jaxpost import config, profiling

    profile_steps = profiling.parse_steps(args.flags["profile_steps"])
    loaded = config.from_arguments(args)
    if loaded.config.lora is not None and loaded.config.lora.source is not None:
        from jaxpost.build_model import adopt_adapters  # only here: it imports all that a run needs

        loaded = adopt_adapters(loaded)
    if args.flags["print_config"]:
        print(loaded.dump(), end="")
        return
    allowed = (args.flags["allow_changed"] or "").split(",")
    run(
        loaded.config,
        dump=loaded.dump(),
        overwrite=args.flags["overwrite"],
        allow_changed=[name for name in allowed if name],
        allow_fallback=args.flags["allow_fallback"],
        profile_steps=profile_steps,
    )


def compilation_cache() -> None:
    """One persistent cache a user; JAX_COMPILATION_CACHE_DIR points elsewhere."""
    import jax

    if not jax.config.jax_compilation_cache_dir:
        cache = pathlib.Path(os.environ.get("XDG_CACHE_HOME", pathlib.Path.home() / ".cache")) / "jaxpost" / "xla"
        jax.config.update("jax_compilation_cache_dir", str(cache))


if __name__ == "__main__":
    cli.main(main, doc=__doc__, flags=FLAGS)
