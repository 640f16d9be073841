"""Runs fuzz cases in a process of its own: a crash, a hang or a full memory is then a finding with a seed.

    python -m tests.fuzz.worker READER FIRST COUNT      prints a JSON line a finding, and the counts at the end

A finding is anything but a success that passes its reader's checks, or one of jaxpost's own errors in one line that
names the file, within SECONDS of processor time and MEGABYTES of memory more than before.
"""

from __future__ import annotations

import collections
import faulthandler
import json
import os
import pathlib
import random
import resource
import signal
import sys
import tempfile
import traceback

SECONDS, MEGABYTES = 2.0, 300
MEMORY = 24 << 30  # address space of the whole process: an allocation beyond it fails instead of filling the machine


def spent() -> float:
    """Processor seconds of this process and of the template process that it talks to."""
    from jaxpost.data import template

    total = sum(os.times()[:4])
    if (worker := template._worker.process) is not None:
        try:
            fields = pathlib.Path(f"/proc/{worker.pid}/stat").read_text().rsplit(")", 1)[1].split()
            total += (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
        except OSError:
            pass
    return total


def memory(field: str) -> int:
    """VmRSS or VmHWM in bytes."""
    text = pathlib.Path("/proc/self/status").read_text()
    return int(text.split(f"{field}:")[1].split()[0]) << 10


def case(reader, seed: str) -> tuple[str, str]:
    """("ok" | "refused", message) of one damaged file, or ("finding", what went wrong)."""
    from jaxpost.errors import ConfigError, DataError, CheckpointError  # isort: skip
    from tests.fuzz.readers import check_message

    reader.mutate(random.Random(seed))
    try:
        pathlib.Path("/proc/self/clear_refs").write_text("5")  # the peak starts again
    except OSError:
        pass
    before, started = memory("VmRSS"), spent()
    try:
        reader.check()
        outcome = ("ok", "")
    except (ConfigError, DataError, CheckpointError) as error:
        try:
            check_message(error, reader.file)
            outcome = ("refused", str(error))
        except (AssertionError, UnicodeError) as wrong:
            outcome = ("finding", f"{type(error).__name__}: {wrong}")
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # a panic of a Rust library is a BaseException
        last = traceback.format_exception(error)[-4:]
        outcome = ("finding", f"{type(error).__name__}: {str(error)[:300]} {''.join(last)[-900:]}")
    took, grew = spent() - started, (memory("VmHWM") - before) >> 20
    if took > SECONDS:
        outcome = ("finding", f"{took:.1f} s of processor time; {outcome[0]} {outcome[1][:200]}")
    if grew > MEGABYTES:
        outcome = ("finding", f"{grew} MB more memory; {outcome[0]} {outcome[1][:200]}")
    return outcome


def main(name: str, first: int, count: int) -> None:
    from tests.fuzz.readers import READERS

    counts = collections.Counter()
    with tempfile.TemporaryDirectory() as folder:
        reader = READERS[name](pathlib.Path(folder))
        reader.restore()
        reader.check()  # imports everything and starts the template process
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
        faulthandler.enable()
        for number in range(first, first + count):
            seed = f"{name}:{number}"
            print(json.dumps({"at": seed}), flush=True)
            faulthandler.dump_traceback_later(120)
            signal.alarm(150)  # ends the process: the parent says at which seed
            kind, message = case(reader, seed)
            signal.alarm(0)
            faulthandler.cancel_dump_traceback_later()
            counts[kind] += 1
            if kind == "finding":
                print(json.dumps({"finding": seed, "what": message.replace(folder, "")}), flush=True)
            elif os.environ.get("FUZZ_VERBOSE"):
                print(json.dumps({seed: kind, "what": message.replace(folder, "")[:160]}), flush=True)
    print(json.dumps({"counts": counts}), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
