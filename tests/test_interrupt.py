"""Runs that are asked to leave, and runs that lose a part of themselves."""

import os
import signal
import subprocess
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from tests.conftest import (
    PATIENCE,
    ROOT,
    allowed,
    experiment,
    launched,
    train,
    train_command,
    train_environment,
    wait_for_step,
)
from train.interrupt import INTERRUPTED

LONG = ["schedule.steps=100000", "checkpoint.every_steps=100000", "data.workers=1"]


class Started:
    """A run of two processes in the background, and what it has printed."""

    def __init__(self, shards: Path, folder: Path, *settings: str) -> None:
        self.folder, self.printed = folder, folder.with_suffix(".txt")
        command = train_command(shards, folder, *LONG, *settings, processes=2)
        with self.printed.open("w") as output:
            self.process = subprocess.Popen(
                command, cwd=ROOT, env=train_environment(), start_new_session=True, stdout=output, stderr=output
            )
        try:
            wait_for_step(folder, 2, self.process)
        except BaseException:
            self.end()
            raise
        self.family = psutil.Process(self.process.pid).children(recursive=True)
        self.launcher = next(p for p in self.family if "deepspeed.launcher.launch" in p.cmdline())
        self.ranks = sorted(self.launcher.children(), key=lambda p: int(p.environ()["RANK"]))

    def code(self, seconds: float) -> int:
        return self.process.wait(seconds)

    @property
    def output(self) -> str:
        return self.printed.read_text()

    def all_gone(self, seconds: float) -> bool:
        _, alive = psutil.wait_procs(self.family, timeout=seconds)
        return not alive

    def end(self) -> None:
        for process in [*getattr(self, "family", []), self.process]:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        self.process.wait(10)


@pytest.fixture
def start(shards, tmp_path):
    runs: list[Started] = []

    def run(*settings: str) -> Started:
        runs.append(Started(shards, tmp_path / "run", *settings))
        return runs[-1]

    yield run
    for started in runs:
        started.end()


def saved_step(folder: Path) -> int:
    (checkpoint,) = (folder / "checkpoints").glob("step_*")
    return int(checkpoint.name.removeprefix("step_"))


@pytest.mark.parametrize("how", ["SIGTERM", "SIGUSR1", "stop file"])
def test_all_save_at_the_same_step_and_the_same_command_goes_on(shards, start, how):
    run = start()
    if how == "stop file":
        (run.folder / "stop").touch()
    else:
        os.kill(run.ranks[1].pid, getattr(signal, how))
    assert run.code(PATIENCE) == INTERRUPTED, run.output
    assert run.all_gone(allowed(5))
    step = saved_step(run.folder)
    assert f"stops after step {step}: " in run.output and "Traceback" not in run.output
    assert not (run.folder / "stop").exists() and not (run.folder / "model.safetensors").exists()
    if how == "SIGTERM":
        again = train(shards, run.folder, *LONG, f"schedule.steps={step + 3}", processes=2)
        assert again.code == 0 and f"resumed at step {step}" in again.output, again.output
        assert list(again.losses) == list(range(step + 3))


def test_a_second_signal_ends_it_at_once(start):
    run = start()
    run.ranks[1].suspend()  # the others wait for it
    os.kill(run.ranks[0].pid, signal.SIGTERM)
    time.sleep(4)
    assert run.ranks[0].is_running() and run.ranks[0].status() != psutil.STATUS_ZOMBIE
    os.kill(run.ranks[0].pid, signal.SIGTERM)
    psutil.wait_procs(run.ranks[:1], timeout=allowed(20))  # not for the other, which would be for ever
    assert not run.ranks[0].is_running() or run.ranks[0].status() == psutil.STATUS_ZOMBIE
    run.ranks[1].resume()
    assert run.code(allowed(30)) not in (0, INTERRUPTED) and run.all_gone(allowed(5))
    assert not list((run.folder / "checkpoints").glob("step_*"))


@pytest.mark.parametrize("whom", [0, 1])
def test_a_rank_that_is_killed_ends_the_run(start, whom):
    run = start()
    run.ranks[whom].kill()
    assert run.code(allowed(30)) != 0 and run.all_gone(allowed(5))
    log = (run.folder / "log.txt").read_text()
    assert "another process of the run has ended" in log + run.output, run.output


@pytest.mark.parametrize(
    ("processes", "kind", "words"),
    [
        (1, "ValueError", "ValueError: broken on purpose"),
        (2, "ValueError", "ValueError: broken on purpose"),
        (2, "DataError", "error: rank 1: broken on purpose"),
        (2, "OutOfMemoryError", "error: rank 1: out of memory (broken on purpose); lower micro_batch_size"),
    ],
)
def test_a_rank_that_raises_ends_the_run_and_is_heard_first(shards, tmp_path, processes, kind, words):
    command = [*launched("tests.raising_run", processes), "--config", *experiment(shards, tmp_path, *LONG)]
    done = subprocess.run(
        command, cwd=ROOT, env=train_environment() | {"RAISES": kind}, text=True, timeout=PATIENCE, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )  # fmt: skip
    assert done.returncode != 0 and time.time() - (tmp_path / "metrics.jsonl").stat().st_mtime < allowed(30)
    before, told, after = done.stdout.partition(words)
    assert told and before.count("Traceback") == (kind == "ValueError") and "Traceback" not in after, done.stdout
    assert "another process of the run has ended" not in before


def test_a_rank_that_hangs_is_waited_for_no_longer_than_allowed(start):
    run = start("timeout_minutes=0.1")
    run.ranks[1].suspend()
    psutil.wait_procs(run.ranks[:1], timeout=allowed(25))
    assert not run.ranks[0].is_running() or run.ranks[0].status() == psutil.STATUS_ZOMBIE
    assert "timed out" in run.output.lower() or "timeout" in run.output.lower(), run.output
    run.ranks[1].resume()
    assert run.code(allowed(40)) != 0 and run.all_gone(allowed(5))


@pytest.mark.parametrize("whom", ["runner", "launcher"])
def test_without_its_launcher_a_run_saves_and_leaves(start, whom):
    run = start()
    if whom == "runner":
        run.process.terminate()  # dies at once, and leaves the rest to itself
    else:
        run.launcher.kill()
    run.code(PATIENCE)
    assert run.all_gone(60), run.output
    assert saved_step(run.folder) > 2
    assert "the launcher is gone" in (run.folder / "log.txt").read_text()
