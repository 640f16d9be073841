"""launch/tpu_vm.sh and launch/slurm.sbatch against stand-ins for gcloud, srun, scancel and scontrol on PATH.

The stand-ins record what they are called with, one list of words a call; srun runs a program of the test's own.
"""

import os
import pathlib
import shlex
import shutil
import signal
import subprocess
import tarfile
import time

import pytest

LAUNCH = pathlib.Path(__file__).parents[2] / "launch"
RECORD = """#!/usr/bin/env bash
{ printf '%s\\n' "$(basename "$0")" "$@"; printf -- '---\\n'; } >> "$CALLS"
"""
WORDS = ["--config=configs/quick start.yaml", "data.train=[{source: 'jsonl:$HOME/x y.jsonl'}]", "loop.steps=2"]


class Bench:
    """A folder with recording stand-ins in bin/, and the environment that finds them first."""

    def __init__(self, folder: pathlib.Path):
        self.folder, self.calls_file = folder, folder / "calls"
        self.env = {**os.environ, "PATH": f"{folder}/bin:{os.environ['PATH']}", "CALLS": str(self.calls_file)}
        for name in [name for name in self.env if name.startswith(("TPU_", "SLURM_", "JAXPOST_", "COMMIT", "DRY_RUN"))]:
            del self.env[name]
        (folder / "bin").mkdir()

    def tool(self, name: str, body: str = "") -> None:
        file = self.folder / "bin" / name
        file.write_text(RECORD + body)
        file.chmod(0o755)

    def calls(self) -> list[list[str]]:
        text = self.calls_file.read_text() if self.calls_file.exists() else ""
        return [call.split("\n")[:-1] for call in text.split("---\n")[:-1]]

    def bash(self, file: pathlib.Path, *args: str, **env: str) -> subprocess.CompletedProcess:
        command = ["bash", str(file), *args]
        return subprocess.run(
            command, cwd=self.folder, env=self.env | env, capture_output=True, text=True, timeout=60, check=False
        )


@pytest.fixture
def bench(tmp_path):
    return Bench(tmp_path)


@pytest.mark.parametrize("file", sorted(LAUNCH.iterdir()), ids=lambda file: file.name)
def test_scripts_are_bash_and_shellcheck_is_content(file):
    subprocess.run(["bash", "-n", str(file)], check=True)
    if shutil.which("shellcheck"):
        subprocess.run(["shellcheck", "-x", f"launch/{file.name}"], cwd=LAUNCH.parent, check=True)


# ------------------------------------------------------------------------------------------------ Cloud TPU


TPU = {"TPU_NAME": "post", "TPU_ZONE": "us-east5-b", "TPU_TYPE": "v5litepod-16"}
GCLOUD = """
case "$*" in
  *describe*) printf '%s\\n' "$STATE"; [ -n "$STATE" ] ;;
  *scp*) cp "$5" "$COPIED" ;;
esac
"""


@pytest.fixture
def tpu(bench):
    """A repository of one commit that holds the launch scripts, and a gcloud that says STATE."""
    repo = bench.folder / "repo"
    shutil.copytree(LAUNCH, repo / "launch")
    git = ["git", "-C", str(repo), "-c", "user.name=x", "-c", "user.email=x@example.org"]
    subprocess.run([*git, "init", "-q"], check=True)
    subprocess.run([*git, "add", "-A"], check=True)
    subprocess.run([*git, "commit", "-qm", "all"], check=True)
    bench.commit = subprocess.check_output([*git, "rev-parse", "HEAD"], text=True).strip()
    bench.env |= {"COPIED": str(bench.folder / "copied.tar.gz"), "STATE": "", **TPU}
    bench.tool("gcloud", GCLOUD)
    bench.script = repo / "launch" / "tpu_vm.sh"
    return bench


def verbs(calls: list[list[str]]) -> list[str]:
    return [call[4] for call in calls]


def test_a_tpu_is_made_filled_and_started(tpu):
    done = tpu.bash(tpu.script, *WORDS, TPU_CREATE_FLAGS="--spot --network=n", JAXPOST_DATA="/mnt/my data")
    assert done.returncode == 0, done.stderr
    calls = tpu.calls()
    assert verbs(calls) == ["describe", "create", "scp", "ssh", "ssh", "ssh"]
    assert all(call[:4] == ["gcloud", "compute", "tpus", "tpu-vm"] for call in calls)
    assert all("--zone=us-east5-b" in call for call in calls)
    create = calls[1][5:]
    assert create == [
        *("post", "--zone=us-east5-b", "--accelerator-type=v5litepod-16", "--version=v2-alpha-tpuv5-lite"),
        *("--spot", "--network=n"),
    ]
    assert all("--worker=all" in call for call in calls[2:])
    folder = f"jaxpost-{tpu.commit[:12]}"
    assert calls[2][6] == "post:" and calls[2][5].endswith(f"/{folder}.tar.gz")
    with tarfile.open(tpu.env["COPIED"]) as bundle:
        assert f"{folder}/launch/environment.sh" in bundle.getnames()
    commands = [call[-1].removeprefix("--command=") for call in calls[3:]]
    for command in commands:
        subprocess.run(["bash", "-n", "-c", command], check=True)
    assert f"tar xzf {folder}.tar.gz" in commands[0] and "JAXPOST_EXTRAS=tpu environment report" in commands[1]
    assert not pathlib.Path(calls[2][5]).exists()  # the bundle here is gone

    # the last one, as a worker's shell runs it: every word arrives as it was typed
    home = tpu.folder / "home"
    (home / folder).mkdir(parents=True)
    (home / ".jaxpost-venv" / "bin").mkdir(parents=True)
    python = home / ".jaxpost-venv" / "bin" / "python"
    python.write_text(RECORD + 'printf "%s\\n" "$PWD" "$JAXPOST_DATA"')
    python.chmod(0o755)
    env = tpu.env | {"HOME": str(home)}
    ran = subprocess.run(["bash", "-c", commands[2]], cwd=home, env=env, capture_output=True, text=True, check=True)
    assert tpu.calls()[-1] == ["python", "-m", "jaxpost.train", "mesh.distributed=true", *WORDS]
    assert ran.stdout.splitlines() == [str(home / folder), "/mnt/my data"]


@pytest.mark.parametrize(
    ("state", "wanted"),
    [
        ("READY", ["describe", "scp", "ssh", "ssh", "ssh"]),
        ("PREEMPTED", ["describe", "delete", "create", "scp", "ssh", "ssh", "ssh"]),
        ("CREATING", ["describe"]),
    ],
)
def test_a_tpu_that_is_there(tpu, state, wanted):
    done = tpu.bash(tpu.script, *WORDS, STATE=state)
    assert verbs(tpu.calls()) == wanted
    assert (done.returncode == 0) == (state != "CREATING")
    if state == "CREATING":
        assert done.stderr == "post is CREATING: wait, or delete it\n"


def test_dry_run_prints_what_would_run_and_runs_nothing(tpu):
    printed = tpu.bash(tpu.script, *WORDS, DRY_RUN="1")
    assert printed.returncode == 0 and tpu.calls() == []
    lines = [shlex.split(line[2:]) for line in printed.stdout.splitlines() if line.startswith("+ ")]
    assert tpu.bash(tpu.script, *WORDS).returncode == 0

    def stable(calls):  # the bundle's folder differs
        return [[word.rsplit("/", 1)[-1] if word.endswith(".tar.gz") else word for word in call] for call in calls]

    assert stable(line for line in lines if line[0] == "gcloud") == stable(tpu.calls()[1:])


def test_a_failing_worker_is_the_scripts_failure(tpu):
    tpu.tool("gcloud", GCLOUD + '\ncase "$*" in *jaxpost.train*) exit 5 ;; esac\n')
    assert tpu.bash(tpu.script, *WORDS).returncode == 5


@pytest.mark.parametrize(
    ("args", "env", "message"),
    [
        (WORDS, {"TPU_ZONE": ""}, "TPU_ZONE is not set"),
        ([], {}, "usage: "),
        (WORDS, {"COMMIT": "nothing"}, "COMMIT=nothing: no such commit"),
    ],
)
def test_wrong_use_of_the_tpu_script(tpu, args, env, message):
    done = tpu.bash(tpu.script, *args, **env)
    assert done.returncode == 2 and message in done.stderr and tpu.calls() == []


# ---------------------------------------------------------------------------------------------------- SLURM


@pytest.fixture
def slurm(bench):
    for name in ("srun", "scancel", "scontrol"):
        bench.tool(name)
    (bench.folder / ".venv" / "bin").mkdir(parents=True)
    (bench.folder / ".venv" / "bin" / "python").write_text("#!/bin/sh\n")
    (bench.folder / ".venv" / "bin" / "python").chmod(0o755)
    bench.env |= {"SLURM_JOB_ID": "77"}
    return bench


TRAIN = ["srun", "--gpu-bind=none", "--kill-on-bad-exit=1", ".venv/bin/python", "-m", "jaxpost.train"]


def test_a_job_is_one_step_over_all_tasks(slurm):
    done = slurm.bash(LAUNCH / "slurm.sbatch", *WORDS)
    assert done.returncode == 0, done.stderr
    assert slurm.calls() == [[*TRAIN, "mesh.distributed=true", *WORDS]]
    options = dict(
        line.removeprefix("#SBATCH --").partition("=")[::2]
        for line in (LAUNCH / "slurm.sbatch").read_text().splitlines()
        if line.startswith("#SBATCH")
    )
    assert options["signal"] == "B:USR1@180" and "requeue" in options and options["open-mode"] == "append"
    assert options["ntasks-per-node"] == options["gpus-per-node"] and "gpus-per-task" not in options


def test_a_failed_step_fails_the_job_and_is_not_queued_again(slurm):
    slurm.tool("srun", "exit 3\n")
    assert slurm.bash(LAUNCH / "slurm.sbatch", *WORDS).returncode == 3
    assert [call[0] for call in slurm.calls()] == ["srun"]


@pytest.mark.parametrize(("code", "again"), [(0, True), (5, False)])
def test_before_the_time_is_up_the_run_saves_and_is_queued_again(slurm, code, again):
    """srun waits for the tasks, which end when scancel has sent them SIGTERM: here, when it left a file."""
    told = slurm.folder / "told"
    slurm.tool("srun", f"while [ ! -e {told} ]; do sleep 0.05; done; sleep 0.2; exit {code}\n")
    slurm.tool("scancel", f"touch {told}\n")
    command = ["bash", str(LAUNCH / "slurm.sbatch"), *WORDS]
    job = subprocess.Popen(command, cwd=slurm.folder, env=slurm.env, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 30
    while not slurm.calls() and time.monotonic() < deadline:
        time.sleep(0.02)
    job.send_signal(signal.SIGUSR1)
    _, errors = job.communicate(timeout=30)
    assert job.returncode == code, errors
    assert slurm.calls()[1:] == [["scancel", "--signal=TERM", "77.0"]] + [["scontrol", "requeue", "77"]] * again


def test_a_missing_interpreter_is_said(slurm):
    done = slurm.bash(LAUNCH / "slurm.sbatch", *WORDS, JAXPOST_PYTHON="/no/python")
    assert done.returncode == 2 and "/no/python: no such interpreter" in done.stderr and slurm.calls() == []
