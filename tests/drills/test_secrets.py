"""Fake secrets in the environment and the config, a run, a refusal and a crash: none of them is written anywhere."""

import os
import subprocess
import sys

from tests import tiny

SECRETS = {"HF_TOKEN": "hf_" + "Q7x" * 9, "WANDB_API_KEY": "c0ffee" * 7, "MY_PASSWORD": "correct-horse-battery"}


def command(config, *words: str) -> tuple[int, str]:
    args = [sys.executable, "-m", "jaxpost.train", f"--config={config}", *words]
    environment = os.environ | SECRETS | {"XLA_FLAGS": ""}
    done = subprocess.run(args, capture_output=True, text=True, env=environment, timeout=240)
    return done.returncode, done.stdout + done.stderr


def test_no_secret_is_written(tmp_path):
    columns = {"my_token": "${HF_TOKEN}", "note": "https://user:${MY_PASSWORD}@host/x"}
    sections = {"loop": {"steps": 2}, "metrics": {"tensorboard": True, "console": "lines"}}
    config = tiny.write_config(tmp_path, **sections)
    code, out = command(config)
    assert code == 0, out
    texts = [out]
    refused = [
        command(config, f"model.source=hf:org/{SECRETS['HF_TOKEN']}", f"run_dir={tmp_path / 'other'}"),
        command(config, "data.train.0.columns=" + str(columns).replace("'", '"'), f"run_dir={tmp_path / 'third'}"),
        command(config, f"optim.learning_rate={SECRETS['WANDB_API_KEY']}"),
        command(config, "loop.steps=3"),
    ]
    assert all(code for code, _ in refused)
    texts += [out for _, out in refused]
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert any("tensorboard" in str(path) for path in files) and any(path.name == "env.json" for path in files)
    for secret in ("hf_" + "Q7x" * 9, SECRETS["MY_PASSWORD"]):
        assert not [path for path in files if secret.encode() in path.read_bytes()]
        assert not [text for text in texts if secret in text]
    assert not [path for path in files if SECRETS["WANDB_API_KEY"].encode() in path.read_bytes()]
