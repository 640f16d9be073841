"""One compilation in a process of its own: compile.py DEVICES key=value .. prints the report as JSON."""

import dataclasses
import json
import sys

from jaxpost import aot, config

# What a run needs beside its model and mesh; no file of these is opened.
REST = ["run_dir=unused", "data.train=[{source: 'jsonl:unused'}]", "algorithm.name=sft", "loop.steps=100"]

if __name__ == "__main__":
    loaded = config.load(None, [*REST, *sys.argv[2:]]).config
    job = aot.abstract_job(loaded, aot.describe_devices(sys.argv[1]))
    print(json.dumps(dataclasses.asdict(aot.compile_job(job))))
