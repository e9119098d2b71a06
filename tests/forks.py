"""python -m tests.forks: training runs as forks of this process, which has imported everything: that takes longer than most of
the tests' runs.

Of each line of its input, JSON of [[config, override, ...], processes], it prints JSON of [exit code, output].
"""

import ctypes
import json
import os
import signal
import socket
import sys
import time
import traceback
from tempfile import TemporaryFile

import torch

import train.run  # noqa: F401  the slow imports
from data.loader import PR_SET_PDEATHSIG
from tests.conftest import PATIENCE
from train.__main__ import main

torch.compile(abs)  # imports what DeepSpeed needs at its start; compiles nothing


def start(job: list[str], world: int, output: int) -> list[int]:
    """Begin `python -m train`, or what a launcher of `world` processes would begin, that prints to the file descriptor `output`;
    each process leads a process group of its own.

    job: the config, and what overrides it.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = []
    for rank in range(world):
        process = os.fork()
        if process == 0:
            os.setpgid(0, 0)  # with its loader's workers
            ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # also when a test is killed for its time
            if world > 1:
                place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_SIZE": world, "MASTER_PORT": port}
                os.environ.update({key: str(value) for key, value in place.items()}, MASTER_ADDR="127.0.0.1")
            os.dup2(output, 1)
            os.dup2(output, 2)
            sys.argv = ["train", "--config", *job]
            code = 1
            try:
                main()
                code = 0
            except SystemExit as end:
                if isinstance(end.code, str):
                    print(end.code, file=sys.stderr)
                else:
                    code = end.code or 0
            except BaseException:
                traceback.print_exc()
            sys.stdout.flush()
            os._exit(code)
        os.setpgid(process, process)  # whoever comes first
        processes.append(process)
    return processes


def kill(processes: list[int]) -> None:
    for process in processes:
        os.killpg(process, signal.SIGKILL)
    for process in processes:
        os.waitpid(process, 0)


def finish(processes: list[int], seconds: float) -> int:
    """The first exit code that is not 0, if any, after which the others are killed; 124 if they take longer."""
    deadline, left, code = time.monotonic() + seconds, list(processes), 0
    while left and code == 0:
        if time.monotonic() > deadline:
            code = 124
        for process in list(left):
            done, status = os.waitpid(process, os.WNOHANG)
            if done:
                left.remove(process)
                code = code or os.waitstatus_to_exitcode(status)
        time.sleep(0.02)
    kill(left)
    return code


def attempt(job: list[str], world: int = 1) -> tuple[int, str]:
    """A run's exit code, and what it printed."""
    with TemporaryFile("w+") as output:
        code = finish(start(job, world, output.fileno()), seconds=PATIENCE)
        output.seek(0)
        return code, output.read()


if __name__ == "__main__":
    for line in sys.stdin:
        print(json.dumps(attempt(*json.loads(line))), flush=True)
