"""A run directory has one writer at a time (flock on LOCK) and remembers on what it ran (env.json)."""

from __future__ import annotations

import datetime
import fcntl
import importlib.metadata
import json
import os
import platform
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from jaxpost.errors import ConfigError
from jaxpost.manifest import replace_file
from jaxpost.redact import redact

PACKAGES = ("jaxpost", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy", "tokenizers")
VARIABLES = ("JAX_", "XLA_", "LIBTPU_", "TPU_", "SLURM_")  # prefixes of the environment that change what a run does


class RunLock:
    """Exclusive right to write in a run directory, held until release or the end of the process, however it ends."""

    def __init__(self, run_dir: str | os.PathLike):
        """Makes the directory. ConfigError if another process holds it, or if it cannot be written."""
        if "://" in str(run_dir):
            raise ConfigError(f"run_dir: {run_dir}: only local or mounted paths can be written; mount the bucket first")
        self.path = Path(run_dir) / "LOCK"
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self.path.open("a+", encoding="utf-8")
        except OSError as error:
            raise ConfigError(f"run_dir: {run_dir} cannot be written: {error.strerror}") from None
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._file.seek(0)
            holder = self._file.read().strip() or "another process"
            self._file.close()
            raise ConfigError(
                f"run_dir: {run_dir} is in use by {holder}; wait for it, or choose another run_dir"
            ) from None
        self._file.truncate(0)  # the last holder's name; "a" mode writes at the end, which is now the start
        self._file.write(f"pid {os.getpid()} on {socket.gethostname()}\n")
        self._file.flush()

    def __enter__(self) -> RunLock:
        return self

    def __exit__(self, *_: Any) -> None:
        self.release()

    def release(self) -> None:
        """Let another process in. The file stays: removing it would let two processes lock two files."""
        self._file.close()


def write_env(run_dir: str | os.PathLike, argv: list[str] | None = None) -> None:
    """Append this start to env.json: versions, devices, command line, commit; secrets masked."""
    import jax

    path, starts = Path(run_dir) / "env.json", _starts(run_dir)
    kinds = [device.device_kind for device in jax.devices()]
    starts.append(
        redact(
            {
                "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
                "host": socket.gethostname(),
                "pid": os.getpid(),
                "command": list(sys.argv if argv is None else argv),
                "commit": _commit(),
                "python": platform.python_version(),
                "system": platform.platform(),
                "cpus": os.cpu_count(),
                "versions": {name: version for name in PACKAGES if (version := _version(name))},
                "backend": jax.default_backend(),
                "processes": jax.process_count(),
                "devices": {kind: kinds.count(kind) for kind in sorted(set(kinds))},
                "environment": {k: v for k, v in sorted(os.environ.items()) if k.startswith(VARIABLES)},
            }
        )
    )
    replace_file(path, json.dumps({"starts": starts}, indent=1) + "\n")


def start_date(run_dir: str | os.PathLike) -> str:
    """ISO date of a run's first start, today's before it: the date that its chat template writes until the run ends."""
    try:
        return datetime.date.fromisoformat(_starts(run_dir)[0]["time"][:10]).isoformat()
    except (LookupError, TypeError, ValueError):
        return datetime.date.today().isoformat()


def _starts(run_dir: str | os.PathLike) -> list:
    """The starts that env.json remembers."""
    try:
        return json.loads((Path(run_dir) / "env.json").read_text(encoding="utf-8"))["starts"]
    except (OSError, ValueError, KeyError, TypeError):
        return []


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _commit() -> str | None:
    """Commit of the source tree that this package runs from, "+" if files differ from it; None outside of git."""
    root = Path(__file__).resolve().parent.parent
    if not (root / ".git").exists():
        return None
    try:
        git = ["git", "-C", str(root)]
        head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, timeout=5, check=True).stdout
        changed = subprocess.run(
            [*git, "status", "--porcelain", "-uno"], capture_output=True, text=True, timeout=5
        ).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    return head.strip() + ("+" if changed.strip() else "")


CONTENTS = ("checkpoints", "samples", "eval", "export", "logs", "tensorboard", "profile")
FILES = ("config.yaml", "env.json", "metrics.jsonl", "loss.png", "report.html")


def clear(run_dir: str | os.PathLike) -> None:
    """Delete what a run wrote, for --overwrite; files that it did not write stay.

    ConfigError for a folder with files that no run marked as its own: `checkpoints` may be somebody's only copy.
    """
    theirs = [name for name in (*CONTENTS, *FILES) if (Path(run_dir) / name).exists()]
    if theirs and not any((Path(run_dir) / name).is_file() for name in ("env.json", "logs/events.log")):
        raise ConfigError(
            f"run_dir: --overwrite would delete {theirs[0]} in {run_dir}, where no run of jaxpost has been (it has "
            "neither env.json nor logs/events.log); choose another run_dir"
        )
    for name in CONTENTS:
        shutil.rmtree(Path(run_dir) / name, ignore_errors=True)
    for name in FILES:
        (Path(run_dir) / name).unlink(missing_ok=True)
