"""Runs every benchmark and writes docs/performance.md:

    python benchmarks/run.py [--only gemm,full,overhead,parts,lora,packed,small,ops,startup,compile] [--rounds 4]

What --only leaves out keeps the figures of its last run, each with its date and load, from benchmarks/measured.json.
About 20 minutes on 2 quiet cores. Peers and data that are missing are said in the page; see train.py.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import os
import pathlib
import platform
import subprocess
import sys
import tempfile

import train

ROOT = pathlib.Path(__file__).resolve().parent.parent
MEASURED, PAGE = ROOT / "benchmarks" / "measured.json", ROOT / "docs" / "performance.md"
TEMPLATE = ROOT / "benchmarks" / "performance.md.in"
OURS, PEERS = ("jax", "jaxlib", "flax", "optax"), ("torch", "transformers", "trl", "peft")
SCRIPTS = {"ops": ["ops.py", "--repeats", "4"], "startup": ["startup.py"]}
SCRIPTS["compile"] = ["compile_time.py", "--repeats", "3", "--plot", "docs/img/compile_time.png"]


def machine() -> str:
    """What was measured on: cores, model, memory, versions."""
    model = platform.processor() or platform.machine()
    info = pathlib.Path("/proc/cpuinfo")
    if info.exists():
        names = [line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if "model name" in line]
        model = names[0] if names else model
    ours = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in OURS)
    peers = [peer_versions(train.interpreter("PARITY_ENV", ".venv-parity"), PEERS)]
    peers.append(peer_versions(train.interpreter("TUNIX_ENV", ".venv-tunix"), ("google-tunix", "jax")))
    found = "; ".join(peer for peer in peers if peer)
    return f"{os.cpu_count()} cores of {model}, Python {platform.python_version()}, {ours}" + (
        f"; {found}" if found else ""
    )


def peer_versions(python: str | None, names: tuple[str, ...]) -> str:
    if python is None:
        return ""
    code = f"import importlib.metadata as m; print(', '.join(n + ' ' + m.version(n) for n in {names!r}))"
    return subprocess.run([python, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


def load() -> float:
    """Processes that wanted a core in the last minute, on average."""
    return os.getloadavg()[0]


def measure(name: str, bench: train.Bench) -> str:
    """The markdown of one section."""
    if name in SCRIPTS:
        command = [sys.executable, str(ROOT / "benchmarks" / SCRIPTS[name][0]), *SCRIPTS[name][1:]]
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, cwd=ROOT, env=environment).stdout
    return "\n".join(train.CASES[name](bench))


def write_page(measured: dict) -> None:
    """The template with each {name} replaced by what was measured, or by saying that it was not."""
    page = TEMPLATE.read_text()
    for name in (*train.CASES, *SCRIPTS):
        section = measured.get(name)
        text = "Not measured yet." if section is None else f"{section['text'].strip()}\n\n{section['when']}"
        page = page.replace(f"{{{name}}}", text)
    PAGE.write_text(page.replace("{machine}", measured.get("machine", machine())))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = (*train.CASES, *SCRIPTS)
    parser.add_argument("--only", default=",".join(names), help="sections, separated by commas; empty: only the page")
    parser.add_argument("--rounds", type=int, default=4, help="turns of each training loop")
    parser.add_argument("--logs", type=pathlib.Path, help="keep what the training loops print here")
    flags = parser.parse_args()
    wanted = [name for name in flags.only.split(",") if name]
    if unknown := set(wanted) - set(names):
        parser.error(f"--only: {', '.join(sorted(unknown))}; known: {', '.join(names)}")
    measured = json.loads(MEASURED.read_text()) if MEASURED.exists() else {}
    with tempfile.TemporaryDirectory() as folder:
        logs = flags.logs or pathlib.Path(folder)
        logs.mkdir(parents=True, exist_ok=True)
        bench = train.Bench(flags.rounds, logs, measured.get("peak", 0.0))
        for name in names:
            if name in wanted:
                before, started = load(), datetime.datetime.now()
                text = measure(name, bench)
                took = (datetime.datetime.now() - started).total_seconds() / 60
                when = f"Measured {started:%Y-%m-%d}, in {took:.1f} minutes; load average {before:.1f} before."
                measured[name] = {"text": text, "when": when}
                measured |= {"machine": machine(), "peak": bench.peak}
                MEASURED.write_text(json.dumps(measured, indent=1) + "\n")
    write_page(measured)


if __name__ == "__main__":
    main()
