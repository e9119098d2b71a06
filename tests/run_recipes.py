"""python -m tests.run_recipes JOBS.json: trains experiments one after another, each in a fork of this process.

JOBS.json is {name: [config, override, ...]}. A fork finds DeepSpeed imported, which takes seconds, and as if never used.
For each job prints a line of JSON, [name, exit code, what it printed].
"""

import json
import os
import signal
import sys
import traceback
from pathlib import Path
from tempfile import TemporaryFile

import torch

import train.run  # noqa: F401  the slow imports
from train.__main__ import run
from train.config import load_config

torch.compile(abs)  # imports what DeepSpeed needs at its start, which takes longer than a job; compiles nothing

SECONDS = 120  # after so many a job that hangs is ended, and named by its exit code


def attempt(config: str, *overrides: str) -> tuple[int, str]:
    with TemporaryFile("w+") as output:
        child = os.fork()
        if child == 0:
            signal.alarm(SECONDS)
            os.dup2(output.fileno(), 1)
            os.dup2(output.fileno(), 2)
            try:
                run(load_config(Path(config), list(overrides)), check_only=False)
                code = 0
            except BaseException:
                traceback.print_exc()
                code = 1
            sys.stdout.flush()
            os._exit(code)
        _, status = os.waitpid(child, 0)
        output.seek(0)
        return os.waitstatus_to_exitcode(status), output.read()


if __name__ == "__main__":
    for name, job in json.loads(Path(sys.argv[1]).read_text()).items():
        print(json.dumps([name, *attempt(*job)]), flush=True)
