"""The list of a checkpoint's files with their sizes and SHA-256 sums. A step without its manifest is not a step."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

NAME = "manifest.json"
FORMAT = 1
_CHUNK = 1 << 22


def write(folder: Path, step: int) -> None:
    """Hash every file under folder, then rename manifest.json into place; before the rename nothing lists the step."""
    names = sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())
    files = {name: {"size": (folder / name).stat().st_size, "sha256": _digest(folder / name)} for name in names}
    body = {"format": FORMAT, "step": step, "files": files}
    replace_file(folder / NAME, json.dumps(body | {"sha256": _own_digest(body)}, indent=1) + "\n")


def problems(folder: Path, step: int) -> list[str]:
    """What is wrong with a step's files, one line each, manifest first; empty if every byte is as it was written."""
    try:
        body = json.loads((folder / NAME).read_bytes())
        own = body.pop("sha256")
        if own != _own_digest(body) or body["step"] != step:
            return [f"{NAME} is damaged"]
        if body["format"] != FORMAT:
            return [f"{NAME} has format {body['format']}, this version reads {FORMAT}"]
        files = body["files"]
    except FileNotFoundError:
        return [f"{NAME} is missing"]
    except OSError as error:
        return [f"{NAME} cannot be read: {error.strerror}"]
    except (ValueError, KeyError, TypeError, AttributeError):
        return [f"{NAME} is damaged"]
    return [f"{name} {problem}" for name, entry in files.items() if (problem := _problem(folder / name, entry))]


def _problem(path: Path, entry: dict[str, Any]) -> str | None:
    try:
        size = path.stat().st_size
        if size != entry["size"]:
            return f"has {size} bytes instead of {entry['size']}"
        return None if _digest(path) == entry["sha256"] else "has changed bytes (SHA-256 differs)"
    except FileNotFoundError:
        return "is missing"
    except OSError as error:
        return f"cannot be read: {error.strerror}"


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def _own_digest(body: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def replace_file(path: Path, text: str) -> None:
    """Write text to path so that a reader, or a crash, sees the old file or the whole new one; on disk on return."""
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("w", encoding="utf-8", newline="\n") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Make renames in a folder survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
