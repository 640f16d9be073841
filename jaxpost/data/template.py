"""Chat templates, rendered in a child process (render_worker.py): slow, greedy or hostile ones are stopped there."""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import signal
import struct
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jaxpost.errors import DataError

WORKER = Path(__file__).with_name("render_worker.py")


class Rendered(NamedTuple):
    """A rendered chat; spans is None where the template has no generation blocks. Offsets count characters."""

    text: str
    spans: list[tuple[int, int]] | None
    prefixes: list[int]  # lengths of the prefixes asked for


class _Worker:
    """The child process of this process: started at first use, again after it died, never shared over a fork."""

    def __init__(self):
        self.lock = threading.Lock()
        self.process: subprocess.Popen | None = None

    def ask(self, request: dict) -> dict:
        """One request, one reply; {"died": code} where a cap ended the worker."""
        data = json.dumps(request, default=lambda value: f"<{type(value).__name__}>").encode()
        with self.lock:
            process = self._running()
            try:
                process.stdin.write(struct.pack("<I", len(data)) + data)
                process.stdin.flush()
                head = process.stdout.read(4)
                if len(head) == 4:
                    return json.loads(process.stdout.read(struct.unpack("<I", head)[0]))
            except BrokenPipeError:
                pass
            except BaseException:  # Ctrl-C between question and answer: the next question must not get this answer
                process.kill()
                self.close()
                raise
            code = process.wait()
            self.close()
            return {"died": code}

    def _running(self) -> subprocess.Popen:
        if self.process is None or self.process.poll() is not None:
            self.process = subprocess.Popen(
                [sys.executable, "-P", str(WORKER)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
            )
        return self.process

    def close(self) -> None:
        """Ends the child."""
        if self.process is not None:
            with contextlib.suppress(BrokenPipeError):
                self.process.stdin.close()
            self.process.stdout.close()
            self.process.wait()
        self.process = None


_worker = _Worker()
atexit.register(_worker.close)
os.register_at_fork(after_in_child=_worker.__init__)  # a fork must not talk into its parent's pipe


def render(
    template: str,
    messages: Sequence[Mapping[str, Any]],
    variables: Mapping[str, Any],
    *,
    add_generation_prompt: bool = False,
    mark: bool = False,
    prefixes: Sequence[tuple[int, bool]] = (),
    prefixes_with_marks: Sequence[tuple[int, bool]] = (),
    date: str | None = None,
) -> Rendered:
    """messages through template, as transformers would render them.

    mark asks for the spans of generation blocks. Each (count, add_generation_prompt) of `prefixes` renders
    messages[:count] too and must give a prefix of the whole; where spans were found `prefixes_with_marks` replaces
    it. date: what strftime_now takes for today, as ISO text. Raises DataError when the template fails, hits a cap, or a
    prefix is none.
    """
    reply = _worker.ask(
        {
            "template": template,
            "messages": list(messages),
            "variables": dict(variables),
            "add_generation_prompt": add_generation_prompt,
            "mark": mark,
            "prefixes": list(prefixes),
            "prefixes_with_marks": list(prefixes_with_marks),
            "date": date,
        }
    )
    if "died" in reply:
        raise DataError(f"the chat template was stopped: {_death(reply['died'])}")
    if "error" in reply:
        raise DataError(f"the chat template failed: {' '.join(reply['error'].split())}")
    if "not_prefix" in reply:
        raise DataError(_not_prefix(**reply["not_prefix"]))
    spans = None if reply["spans"] is None else [tuple(span) for span in reply["spans"]]
    return Rendered(reply["text"], spans, reply["prefixes"])


def _death(code: int) -> str:
    if code == -signal.SIGPROF:
        return "it used more than 1 second of processor time"
    return f"its process ended with code {code} (out of memory, too deep, or jinja2 >= 3.1.6 is not installed)"


def _not_prefix(count: int, text: str, full: str) -> str:
    same = next((i for i, (a, b) in enumerate(zip(text, full)) if a != b), min(len(text), len(full)))
    low = max(0, same - 30)
    return (
        f"the prompt is not a prefix of the chat: the first {count} messages alone render {text[low : same + 30]!r} "
        f"where the whole chat renders {full[low : same + 30]!r}; use a template with generation blocks, or loss_on=all"
    )
