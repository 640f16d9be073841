"""Drill 18: model folders with pickles or code of their own, from the start of the interpreter to the refusal.

An audit hook, in place before the first line of `python -m jaxpost.train`, writes down every event that could run what
the folder holds; so could a child process, which gets the hook too. A control shows that it sees hostile files at work.
"""

import json
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest

from jaxpost.models import hf
from jaxpost.models.loading import load_params, locate
from tests import tiny

SMALL = "init:llama,vocab_size=264,d_model=16,num_layers=2,num_heads=2,num_kv_heads=1,head_dim=8,d_ff=24,tied=true"
TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
MARK = "HOSTILE_CODE_RAN"
PAYLOAD = f"{MARK} = True\nprint({MARK!r})\n"
# Libraries call exec and compile all the time; so code is told by where it comes from: a file name inside the folder,
# or its own text. Everything that is opened there is listed whole.
HOOK = '''
import os, sys
folder, mark = os.environ["DRILL_FOLDER"], os.environ["DRILL_MARK"]
log = os.open(os.environ["DRILL_LOG"], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
inside = lambda value: os.fsdecode(value).startswith(folder) if isinstance(value, (str, bytes, os.PathLike)) else False

def names(code):
    """Every string and file name in a code object and in those that it holds."""
    yield code.co_filename
    yield from code.co_names
    for value in code.co_consts:
        if hasattr(value, "co_names"):
            yield from names(value)
        elif isinstance(value, str):
            yield value

def watch(event, args):
    said = None
    if event == "open":
        said = inside(args[0]) and f"open {os.path.basename(os.fsdecode(args[0]))}"
    elif event == "exec":
        said = any(inside(name) or mark in name for name in names(args[0])) and "exec"
    elif event == "compile":
        text = args[0].decode(errors="replace") if isinstance(args[0], bytes) else args[0]
        said = (inside(args[1]) or (isinstance(text, str) and mark in text)) and "compile"
    elif event == "import":
        said = any(map(inside, args[1:2] + tuple(args[2] or ()))) and f"import {args[0]}"
    elif event == "pickle.find_class":
        said = f"pickle.find_class {args[0]}.{args[1]}"
    elif event in ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "socket.sendto", "socket.bind"):
        said = event
    elif event in ("os.system", "os.exec", "os.posix_spawn", "ctypes.dlopen", "subprocess.Popen"):
        said = (event != "ctypes.dlopen" or inside(args[0])) and event
    if said:
        os.write(log, (said + "\\n").encode())

sys.addaudithook(watch)
os.write(log, b"watching\\n")
'''
CONTROL = """
import json, pathlib, pickle, runpy, socket, sys
model = pathlib.Path(sys.argv[1])
pickle.loads((model / "pytorch_model.bin").read_bytes())
runpy.run_path(str(model / "modeling_x.py"))
exec((model / "modeling_x.py").read_text())
sys.path.insert(0, str(model))
import modeling_x
with socket.socket() as probe:
    probe.connect_ex(("127.0.0.1", 9))
"""


class Evil:
    """What a pickle of weights may hold."""

    def __reduce__(self):
        return exec, (PAYLOAD,)


@pytest.fixture
def model(tmp_path):
    """A whole, sound model folder with its tokenizer, and beside it a pickle and a module that must not be touched."""
    import pickle

    located = locate(SMALL)
    tiny.write_config(tmp_path, model={"source": str(tmp_path / "model")}, loop={"steps": 1})
    folder = hf.save_hf(load_params(located, np.float32), located.spec, tmp_path / "model")
    for file in (tmp_path / "tokenizer").iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Evil()))
    for name in ("modeling_x.py", "tokenization_x.py", "configuration_x.py", "__init__.py"):
        (folder / name).write_text(PAYLOAD)
    return folder


def watched(model: pathlib.Path, *args: str) -> tuple[int, str, list[str]]:
    """(exit code, output, what the hook saw) of an interpreter with these arguments."""
    root = model.parent
    (root / "hook").mkdir()
    (root / "hook" / "sitecustomize.py").write_text(HOOK)  # run by Python itself, before -m and before -c
    paths = [str(root / "hook"), str(pathlib.Path(__file__).parents[2])]
    drill = {"DRILL_FOLDER": str(model), "DRILL_MARK": MARK, "DRILL_LOG": str(root / "seen")}
    environment = os.environ | drill | {"PYTHONPATH": os.pathsep.join(paths), "XLA_FLAGS": ""}
    done = subprocess.run([sys.executable, *args], capture_output=True, text=True, env=environment, timeout=120)
    seen = (root / "seen").read_text().splitlines()
    assert seen[0] == "watching"
    return done.returncode, done.stdout + done.stderr, seen[1:]


def pickles_only(model: pathlib.Path) -> None:
    (model / "model.safetensors").unlink()


def code_for_the_model(model: pathlib.Path) -> None:
    change(
        model / "config.json", auto_map={"AutoModelForCausalLM": "modeling_x.Model", "AutoConfig": "configuration_x.C"}
    )


def code_for_the_tokenizer(model: pathlib.Path) -> None:
    change(model / "tokenizer_config.json", auto_map={"AutoTokenizer": ["tokenization_x.Tokens", None]})


def change(file: pathlib.Path, **values) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def train(model: pathlib.Path, *words: str) -> tuple[int, str, list[str]]:
    return watched(model, "-m", "jaxpost.train", f"--config={model.parent / 'config.yaml'}", *words)


@pytest.mark.parametrize(
    ("make", "code", "says"),
    [
        (pickles_only, 2, "holds only pickled weights (pytorch_model.bin)"),
        (code_for_the_model, 2, "config.json: auto_map asks for the author's own Python code, which is never run"),
        pytest.param(
            code_for_the_tokenizer,
            3,
            "tokenizer_config.json: auto_map asks for the author's own Python code",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_what_could_run_code_is_refused_untouched(model, make, code, says):
    make(model)
    got, out, seen = train(model, f"model.tokenizer={model}")
    assert got == code and says in out and "Traceback" not in out and MARK not in out, out
    assert {*seen} <= {f"open {name}" for name in ("config.json", "generation_config.json", *TOKENIZER)}
    assert "open config.json" in seen


@pytest.mark.slow
def test_an_adapter_of_pickles_is_refused_untouched(model):
    adapter = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM"}
    (model / "adapter_config.json").write_text(json.dumps(adapter))
    (model / "pytorch_model.bin").rename(model / "adapter_model.bin")
    got, out, seen = train(model, f"model.tokenizer={model}", "lora={source: " + str(model) + "}")
    assert got in (2, 4) and "adapter_model.safetensors" in out and "Traceback" not in out and MARK not in out, out
    assert "open adapter_config.json" in seen and "open adapter_model.bin" not in seen
    assert all(line.startswith("open ") and not line.endswith((".py", ".bin")) for line in seen), seen


@pytest.mark.slow
def test_pickles_and_modules_beside_a_sound_model_are_left_alone(model):
    """A whole run: it trains, saves, and starts the process for chat templates, which is watched as well."""
    got, out, seen = train(model, f"model.tokenizer={model}")
    assert got == 0 and MARK not in out, out
    assert "watching" in seen  # a child
    seen = [line for line in seen if line not in ("watching", "subprocess.Popen", "os.posix_spawn")]
    opened = {f"open {name}" for name in ("config.json", "generation_config.json", "model.safetensors", *TOKENIZER)}
    assert "open model.safetensors" in seen and {*seen} <= opened


def test_the_hook_sees_what_hostile_files_do(model):
    got, out, seen = watched(model, "-c", CONTROL, str(model))
    assert got == 0 and out.count(MARK) == 4, out
    assert "pickle.find_class builtins.exec" in seen and "socket.connect" in seen
    assert "open modeling_x.py" in seen and "open pytorch_model.bin" in seen
    assert seen.count("exec") >= 4 and seen.count("compile") >= 3 and "import modeling_x" in seen
