"""Checkpoints that are complete or invisible, written while training goes on. The only file that knows Orbax.

    RUN/checkpoints/LATEST             number of the newest complete step
    RUN/checkpoints/40/state/          Orbax: one array a leaf, under its dotted name ("params.policy.embed", ...)
    RUN/checkpoints/40/tree.json       name -> shape and dtype of every leaf, zero-size ones (not in state/) included
    RUN/checkpoints/40/source.json     where the data source stood
    RUN/checkpoints/40/meta.json       what the caller wants to find again
    RUN/checkpoints/40/manifest.json   size and SHA-256 of all these; renamed into place last

A step without manifest.json is not a step, unless LATEST says that it was one: then its manifest is reported missing.
Every process calls save and restore; process 0 alone writes the JSON files and deletes.
"""

from __future__ import annotations

import json
import os
import shutil
import threading
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pydantic
from absl import logging

from jaxpost import manifest
from jaxpost.errors import CheckpointError
from jaxpost.fields import SECTION, Bool, PosInt
from jaxpost.leaves import dotted
from jaxpost.types import Tree

_TRASH = ".trash"
_MOST_LISTED = 6  # problems named in one error line


@pydantic.dataclasses.dataclass(frozen=True, config=SECTION)
class CheckpointConfig:
    """How many checkpoints stay, and whether training waits for the disk."""

    keep: PosInt = 2  # newest steps kept
    keep_every: PosInt | None = None  # steps divisible by this are kept too
    async_write: Bool = True  # write and hash in the background


DEFAULTS = CheckpointConfig()


class Checkpointer:
    """Steps of one run directory. Reading changes nothing on disk; preflight, under the run's lock, precedes saving."""

    def __init__(self, run_dir: str | os.PathLike, config: CheckpointConfig = DEFAULTS):
        self.folder = Path(run_dir).absolute() / "checkpoints"
        self._config = config
        self._orbax = None
        self._thread: threading.Thread | None = None
        self._error: CheckpointError | None = None
        self._damaged: list[int] = []  # passed over by a fallback; removed once a newer save replaces them

    def __enter__(self) -> Checkpointer:
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        try:
            self.close()
        except CheckpointError as late:
            if error is None:
                raise
            logging.error("%s", late)  # the error that ended the block is the one to show

    # Looking

    def steps(self) -> list[int]:
        """Complete steps, oldest first."""
        if not self.folder.is_dir():
            return []
        folders = (p for p in self.folder.iterdir() if p.name.isdecimal() and p.is_dir())
        newest = self._recorded_latest()
        return sorted(int(p.name) for p in folders if (p / manifest.NAME).exists() or int(p.name) == newest)

    def latest(self) -> int | None:
        """The newest complete step, None before the first."""
        return max(self.steps(), default=None)

    def _recorded_latest(self) -> int | None:
        try:
            return int((self.folder / "LATEST").read_text())
        except (OSError, ValueError):
            return None

    def leaves(self, step: int) -> dict[str, jax.ShapeDtypeStruct]:
        """Dotted name -> shape and dtype of everything saved at a step."""
        saved = self._json(step, "tree")
        return {
            name: jax.ShapeDtypeStruct(tuple(leaf["shape"]), jnp.dtype(leaf["dtype"])) for name, leaf in saved.items()
        }

    def meta(self, step: int) -> dict[str, Any]:
        """The meta given to save."""
        return self._json(step, "meta")

    def source_state(self, step: int) -> dict[str, Any]:
        """The source state given to save."""
        return self._json(step, "source")

    def _json(self, step: int, name: str) -> Any:
        path = self.folder / str(step) / f"{name}.json"
        try:
            return json.loads(path.read_bytes())
        except OSError as error:
            raise CheckpointError(f"checkpoint step {step}: {path} cannot be read: {error.strerror}") from None
        except ValueError:
            raise CheckpointError(f"checkpoint step {step}: {path} is damaged") from None

    # Writing

    def preflight(self, bytes_needed: int = 0) -> None:
        """Before step 0: make the folder, prove that it can be written, drop what killed saves left behind.

        bytes_needed: size of one checkpoint, see `tree_bytes`; CheckpointError if the disk has less free.
        """
        if jax.process_index() != 0:
            return
        probe = self.folder / ".probe"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            manifest.replace_file(probe, "x" * 4096)
            probe.unlink()
        except OSError as error:
            raise CheckpointError(f"checkpoints cannot be written to {self.folder}: {error.strerror}") from None
        complete = {str(step) for step in self.steps()}
        for path in self.folder.iterdir():
            if path.is_dir() and path.name not in complete:
                logging.info("removing %s, left by a save that was cut short", path)
                shutil.rmtree(path, ignore_errors=True)
            elif path.name.endswith(".tmp"):
                path.unlink(missing_ok=True)
        free = shutil.disk_usage(self.folder).free
        if free < bytes_needed:
            raise CheckpointError(
                f"a checkpoint needs {_size(bytes_needed)}, {self.folder} has {_size(free)} free; free some space or "
                "set run_dir to another disk"
            )

    def save(self, step: int, state: Tree, source_state: dict[str, Any], meta: dict[str, Any]) -> None:
        """Copy the state and return; write, hash, publish and thin out in the background (unless async_write is off).

        The caller may donate the state at once. An error of the write is raised by the next save, wait or close.
        """
        self.wait()
        named = _named_leaves(state)
        tree = {name: {"shape": list(leaf.shape), "dtype": leaf.dtype.name} for name, leaf in named.items()}
        documents = {"tree": tree, "source": source_state, "meta": meta}
        texts = {name: json.dumps(value, allow_nan=False) for name, value in documents.items()}
        folder, nbytes = self.folder / str(step), tree_bytes(state)
        try:
            if jax.process_index() == 0:
                self._remove(step)
                folder.mkdir(parents=True)
                for name, text in texts.items():
                    manifest.replace_file(folder / f"{name}.json", text)
            ocp = _import_orbax()
            if self._orbax is None:
                self._orbax = ocp.AsyncCheckpointer(ocp.PyTreeCheckpointHandler(), timeout_secs=3600)
            arrays = {name: _own_copy(leaf) for name, leaf in named.items() if leaf.size}
            if arrays:
                self._orbax.save(folder / "state", args=ocp.args.PyTreeSave(arrays))
        except Exception as error:
            self._remove(step)
            raise self._failed(step, nbytes, error) from error
        # Not a daemon: without close() an ending interpreter cuts Orbax's write short, and this cleans up after it.
        self._thread = threading.Thread(target=self._finish, args=(step, nbytes), name=f"checkpoint-{step}")
        self._thread.start()
        if not self._config.async_write:
            self.wait()

    def _finish(self, step: int, nbytes: int) -> None:
        """In the background: Orbax commits, then the manifest makes it a step, then older ones may go."""
        try:
            self._orbax.wait_until_finished()
            if jax.process_index() != 0:
                return
            manifest.write(self.folder / str(step), step)
            manifest.replace_file(self.folder / "LATEST", f"{step}\n")
            for old in self._expired(step):
                self._remove(old)
        except Exception as error:
            self._remove(step)
            self._error = self._failed(step, nbytes, error)

    def _expired(self, newest: int) -> list[int]:
        """Steps to drop now that `newest` is complete."""
        damaged = [step for step in self._damaged if step != newest]
        self._damaged = []
        sound = [step for step in self.steps() if step <= newest and step not in damaged]
        every = self._config.keep_every
        return damaged + [step for step in sound[: -self._config.keep] if not (every and step % every == 0)]

    def _remove(self, step: int) -> None:
        """Rename first: a step is never seen half deleted."""
        if jax.process_index() != 0:
            return
        folder, trash = self.folder / str(step), self.folder / f"{step}{_TRASH}"
        shutil.rmtree(trash, ignore_errors=True)
        if folder.exists():
            if self._recorded_latest() == step:
                (self.folder / "LATEST").unlink()
            folder.rename(trash)
            shutil.rmtree(trash, ignore_errors=True)

    def _failed(self, step: int, nbytes: int, error: Exception) -> CheckpointError:
        free = _size(shutil.disk_usage(self.folder).free) if self.folder.exists() else "nothing"
        return CheckpointError(
            f"step {step} could not be saved in {self.folder}: {_reason(error)}; it needs about {_size(nbytes)}, "
            f"{free} is free. Older steps are intact"
        )

    def wait(self) -> None:
        """Return when nothing is being written; raises what went wrong in the background."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def close(self) -> None:
        """Wait for the last write and release Orbax's threads."""
        try:
            self.wait()
        finally:
            if self._orbax is not None:
                self._orbax.close()
                self._orbax = None

    # Reading

    def restore(
        self, step: int, abstract_state: Tree, *, allow_fallback: bool = False
    ) -> tuple[Tree, dict[str, Any], dict[str, Any]]:
        """(state, source state, meta) of a step, after every byte has been checked against the manifest.

        abstract_state: ShapeDtypeStructs (or arrays) whose shardings say where each leaf goes, on any mesh. Damage, or
        a leaf that is not as saved, is a CheckpointError; with allow_fallback a damaged step is passed over, loudly,
        for the next older sound one.
        """
        step = self._sound(step, allow_fallback)
        state = self._arrays(step, abstract_state, _named_leaves(abstract_state), exact=True)
        return state, self.source_state(step), self.meta(step)

    def restore_params(
        self, step: int, abstract_params: dict[str, Tree], *, part: str = "params", allow_fallback: bool = False
    ) -> dict[str, Tree]:
        """Only params, or slow (role -> tree): what generate, evaluate and export read of a run."""
        step = self._sound(step, allow_fallback)
        wanted = {f"{part}.{name}": leaf for name, leaf in _named_leaves(abstract_params).items()}
        return self._arrays(step, abstract_params, wanted, exact=False)

    def _sound(self, step: int, allow_fallback: bool) -> int:
        """`step` if all its files are as written; else, where allowed, the newest older step that is sound."""
        self.wait()
        for candidate in [step, *(s for s in reversed(self.steps()) if s < step)]:
            folder = self.folder / str(candidate)
            if not folder.is_dir():
                have = ", ".join(map(str, self.steps())) or "none"
                raise CheckpointError(f"no checkpoint of step {candidate} in {self.folder}; there: {have}")
            found = manifest.problems(folder, candidate)
            if not found:
                if candidate != step:
                    logging.warning("restoring step %d instead of the damaged step %d", candidate, step)
                return candidate
            more = f" (and {len(found) - _MOST_LISTED} more)" if len(found) > _MOST_LISTED else ""
            text = f"checkpoint step {candidate} in {folder} is damaged: {'; '.join(found[:_MOST_LISTED])}{more}"
            if not allow_fallback:
                raise CheckpointError(f"{text}. Restore an older step with --allow_fallback, or bring the file back")
            logging.warning("%s", text)
            self._damaged.append(candidate)
        raise CheckpointError(f"no sound checkpoint at or before step {step} in {self.folder}")

    def _arrays(self, step: int, tree: Tree, wanted: dict[str, Any], exact: bool) -> Tree:
        """The wanted leaves (dotted saved name -> abstract leaf) in the structure of tree."""
        _compare(step, self.leaves(step), wanted, exact)
        targets = {name: _target(leaf) for name, leaf in wanted.items()}
        stored = {name: target for name, target in targets.items() if target.size}
        found = {}
        if stored:
            ocp = _import_orbax()
            handler = ocp.PyTreeCheckpointHandler()
            restore_args = ocp.checkpoint_utils.construct_restore_args(stored)
            args = ocp.args.PyTreeRestore(item=stored, restore_args=restore_args, partial_restore=True)
            try:
                with ocp.Checkpointer(handler) as reader:
                    found = reader.restore(self.folder / str(step) / "state", args=args)
            except Exception as error:
                raise CheckpointError(f"checkpoint step {step} in {self.folder}: {_reason(error)}") from error
        empty = {n: jax.device_put(jnp.zeros(t.shape, t.dtype), t.sharding) for n, t in targets.items() if not t.size}
        return jax.tree.unflatten(jax.tree.structure(tree), [(found | empty)[name] for name in wanted])


def tree_bytes(tree: Tree) -> int:
    """Bytes of all leaves (arrays or ShapeDtypeStructs): what one checkpoint takes, before compression."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def _import_orbax() -> Any:
    """Orbax, imported on first use and kept quiet: it logs a traceback of every error that it raises as well."""
    import orbax.checkpoint as ocp

    absl_logger = logging.get_absl_logger()
    if _not_from_orbax not in absl_logger.filters:
        absl_logger.addFilter(_not_from_orbax)
    return ocp


def _not_from_orbax(record: Any) -> bool:
    return f"{os.sep}orbax{os.sep}" not in record.pathname


def _named_leaves(tree: Tree) -> dict[str, Any]:
    named = {dotted(path): leaf for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]}
    if len(named) != len(jax.tree.leaves(tree)):
        raise ValueError("two leaves of the state share a dotted name")
    return named


def _own_copy(leaf: Any) -> Any:
    """On CPU Orbax keeps a view of the buffer while it writes, which turns the donation of that buffer off: copy it.

    Other devices need none: Orbax has moved the leaf to the host when its save() returns.
    """
    if isinstance(leaf, jax.Array) and next(iter(leaf.sharding.device_set)).platform == "cpu":
        return jax.device_put(leaf, leaf.sharding, may_alias=False)
    return leaf


def _target(leaf: Any) -> jax.ShapeDtypeStruct:
    sharding = getattr(leaf, "sharding", None) or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def _compare(step: int, saved: dict[str, Any], wanted: dict[str, Any], exact: bool) -> None:
    """CheckpointError naming every leaf that is not in both trees, or differs in shape or dtype."""

    def form(leaf: Any) -> str:
        return f"{leaf.dtype.name}[{','.join(map(str, leaf.shape))}]"

    lines = [f"{name}: not in the checkpoint" for name in wanted if name not in saved]
    lines += [f"{name}: in the checkpoint only" for name in saved if exact and name not in wanted]
    both = [(name, form(saved[name]), form(wanted[name])) for name in wanted if name in saved]
    lines += [f"{name}: saved {old}, this run has {new}" for name, old, new in both if old != new]
    if lines:
        more = f"; and {len(lines) - _MOST_LISTED} more" if len(lines) > _MOST_LISTED else ""
        raise CheckpointError(f"checkpoint step {step} does not fit this run: {'; '.join(lines[:_MOST_LISTED])}{more}")


def _reason(error: BaseException) -> str:
    """The first line of what the system said, without the C++ source locations that tensorstore appends."""
    for word in (
        "No space left on device",
        "File too large",
        "Permission denied",
        "Read-only file system",
        "Quota exceeded",
    ):
        if word.lower() in str(error).lower():
            return word
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


def _size(nbytes: int) -> str:
    value = float(nbytes)
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if value < 1024:
            return f"{value:.0f} {unit}" if unit == "bytes" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.1f} TiB"
