import os
import pathlib
import subprocess
import sys
import time

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from jaxpost import cli, train
from jaxpost.errors import CheckpointError, ConfigError, DataError, TrainingError

ROOT = pathlib.Path(__file__).parents[1]
DOC = "Does a thing:  python -m jaxpost.thing --config=FILE [key=value ...]"
FLAGS = [
    *cli.CONFIG_FLAGS,
    cli.Flag("print_config", False, "print and stop"),
    cli.Flag("to", "hf", "format", choices=("hf", "peft")),
    cli.Flag("limit", 3, "rows"),
    cli.Flag("rate", 0.5, "speed"),
]
BASE = ["run_dir=r", "model.source=smollm2-135m", "data.train.0.source=jsonl:a", "algorithm.name=sft", "loop.steps=1"]


def execute(*argv, run=lambda args: None):
    return cli.execute(run, ["thing", *argv], doc=DOC, flags=FLAGS)


def parse(*argv):
    return cli.parse(["thing", *argv], FLAGS)


def module(*argv, timeout=120, **kwargs):
    command = [sys.executable, "-m", *argv]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=timeout, **kwargs)


def test_flags_and_overrides_mix_in_any_order():
    args = parse("a.yaml", "x.y=3", "--limit", "5", "z=", "--to=peft", "--rate=2", "--debug")
    assert args.config == "a.yaml" and args.overrides == ("x.y=3", "z=")
    assert args.flags["limit"] == 5 and args.flags["to"] == "peft" and args.flags["rate"] == 2.0 and args.flags["debug"]
    assert parse("--config=b.yaml").config == "b.yaml" and parse("a=1").config is None
    assert parse("--import=a.py", "--import", "b.py").flags["import"] == ["a.py", "b.py"]
    assert parse("--noprint_config", "--limit=-5").flags["limit"] == -5
    assert parse("runs/lr=3/config.yaml").config == "runs/lr=3/config.yaml"
    assert parse("data.train.0.weight=a=b").overrides == ("data.train.0.weight=a=b",)
    assert parse("--", "--odd.yaml").config == "--odd.yaml"
    with pytest.raises(ConfigError, match="one config file at a time, not 'a.yaml' and 'b.yaml'"):
        _ = parse("--config=a.yaml", "b.yaml").config


@pytest.mark.parametrize(
    ("arg", "want"),
    [
        ("--confg=3", "unknown flag --confg; did you mean --config?"),
        ("--limt", "unknown flag --limt; did you mean --limit?"),
        ("--zzz", "unknown flag --zzz"),
        ("-5", "unknown flag --5"),
        ("--optim.lr=3", "unknown flag --optim.lr; config keys are typed without dashes: optim.lr=VALUE"),
        ("--to=z", "flag --to=z: value should be one of <hf|peft>"),
        ("--limit=a", "flag --limit=a"),
        ("--limit", "Missing value for flag"),
        ("--debug=maybe", "flag --debug=maybe"),
        ("--flagfile=/etc/hostname", "unknown flag --flagfile"),
        ("--undefok=zzz", "unknown flag --undefok"),
    ],
)
def test_wrong_usage_is_two_and_one_line(capsys, arg, want):
    assert execute(arg) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: " + want) and err.count("\n") == 1


@pytest.mark.parametrize("arg", ["--help", "-h", "-help", "--helpfull"])
def test_help_is_zero_and_lists_every_flag(capsys, arg):
    assert execute("x", arg, "--unknown") == 0
    out, err = capsys.readouterr()
    assert DOC in out and err == ""
    for flag in FLAGS:
        assert f"--{flag.name}" in out and flag.help in out


def raiser(error):
    def run(args):
        raise error

    return run


@pytest.mark.parametrize(
    ("error", "code"),
    [(ConfigError("a"), 2), (DataError("a"), 3), (CheckpointError("a"), 4), (TrainingError("a"), 5)],
)
def test_each_error_has_its_code(capsys, error, code):
    assert execute(run=raiser(error)) == code
    assert capsys.readouterr().err == "error: a\n"


def test_debug_adds_the_traceback(capsys):
    assert execute("--debug", run=raiser(DataError("a"))) == 3
    err = capsys.readouterr().err
    assert err.startswith("Traceback") and err.endswith("\nerror: a\n")


def test_a_bug_shows_its_traceback_without_secrets(capsys, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "verysecretvalue")
    assert execute(run=raiser(RuntimeError("at verysecretvalue"))) == 1
    err = capsys.readouterr().err
    assert "Traceback" in err and "RuntimeError: at ***" in err
    assert execute(run=raiser(DataError("at verysecretvalue"))) == 3
    assert capsys.readouterr().err == "error: at ***\n"


def test_errors_stay_on_one_line(capsys):
    assert execute(run=raiser(DataError("a\nb\x1b[31m\udc80"))) == 3
    assert capsys.readouterr().err == "error: a\\nb\\x1b[31m\\udc80\n"


def test_ctrl_c_is_130(capsys):
    assert execute(run=raiser(KeyboardInterrupt())) == 130
    assert capsys.readouterr().err == "error: interrupted\n"


def test_help_of_train_is_quick_and_imports_nothing_heavy():
    times = []
    for _ in range(3):
        start = time.perf_counter()
        done = module("jaxpost.train", "--help", timeout=30)
        times.append(time.perf_counter() - start)
        assert done.returncode == 0 and "--print_config" in done.stdout and done.stderr == ""
        if min(times) < 2:
            break
    assert min(times) < 2, times
    code = "import sys; from jaxpost import train; print({'jax', 'numpy', 'pydantic', 'yaml'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=30)
    assert done.stdout == "set()\n", done.stdout + done.stderr
    done = module("jaxpost.train", "--hepl", timeout=30)
    assert (
        done.returncode == 2
        and done.stderr == "error: unknown flag --hepl; did you mean --help?; --help lists the flags\n"
    )


MINE = """
from typing import Literal
from pydantic.dataclasses import dataclass
from jaxpost.algos.sft import SFT
from jaxpost.fields import SECTION, PosFloat

@dataclass(frozen=True, config=SECTION)
class Mine(SFT):
    name: Literal["mine"] = "mine"
    beta: PosFloat = 1.0
"""


def test_a_users_algorithm_needs_no_fork(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(MINE)
    typed = [*BASE[:3], "loop.steps=1", "algorithm.name=mine", "algorithm.beta=0.2"]
    done = module("jaxpost.train", f"--import={file}", "--print_config", *typed)
    assert done.returncode == 0, done.stderr
    assert "name: mine" in done.stdout and "beta: 0.2" in done.stdout


def train_main(*argv):
    return cli.execute(train.main, ["train", *argv], doc=train.__doc__, flags=train.FLAGS)


@pytest.mark.parametrize(
    ("argv", "want"),
    [
        ((), "no config: type --config=FILE"),
        (("--config=none.yaml",), "none.yaml: cannot read the config: No such file"),
        (("--import=none.py", *BASE), "--import=none.py: there is no such Python file"),
        ((*BASE, "optim.lr=1"), "optim.lr: unknown key; did you mean optim.learning_rate? (command line)"),
        (("optim.lr", "a.yaml"), "one config file at a time"),
    ],
)
def test_train_says_what_is_wrong(capsys, argv, want):
    assert train_main(*argv, "--print_config") == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith(f"error: {want}") and err.count("\n") == 1


def test_a_broken_import_names_the_cause(tmp_path, capsys):
    file = tmp_path / "broken.py"
    file.write_text("import jaxpost\n1 / 0\n")
    assert train_main(f"--import={file}", *BASE) == 2
    assert "ZeroDivisionError: division by zero" in capsys.readouterr().err
    assert "jaxpost_user_broken" not in sys.modules


WORDS = st.sampled_from(
    [*BASE, "--debug", "--overwrite", "--config", "--", "-", "=", "--=", "a=", "lora.rank=-1", "é.yaml"]
)
COMMANDS = st.lists(WORDS | st.text(max_size=10).filter(lambda word: word not in cli._HELP), max_size=6)


def check_command(capsys, words):
    code = train_main("--print_config", *words, "optim.nothing=1")  # never a valid config: nothing trains
    out, err = capsys.readouterr()
    assert code == 2 and out == "", (code, words)
    lines = err.splitlines()
    assert lines[-1].startswith("error: ") and (len(lines) == 1 or "--debug" in words)


@settings(max_examples=200, deadline=None, suppress_health_check=list(HealthCheck))
@given(words=COMMANDS)
def test_any_wrong_command_line_is_two_and_one_line(capsys, words):
    check_command(capsys, words)


@pytest.mark.slow
@settings(max_examples=5_000, deadline=None, suppress_health_check=list(HealthCheck))
@given(words=COMMANDS)
def test_any_wrong_command_line_is_two_and_one_line_long(capsys, words):
    check_command(capsys, words)


def test_output_into_a_closed_pipe_is_quiet():
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "jaxpost.train", "--help"]
    done = subprocess.run(command, cwd=ROOT, stdout=write, stderr=subprocess.PIPE, text=True, timeout=30)
    os.close(write)
    assert done.stderr == "" and done.returncode == 141
