"""launch/multinode.sh on two hosts, each a network namespace with its own sshd."""

import os
import signal
import subprocess
import time
from pathlib import Path

import psutil
import pytest

from tests.cluster.conftest import SSH_PORT
from tests.cluster.hosts import Hosts
from tests.cluster.runs import HELD, STEPS, VARIABLES, hold, let_go, settings, until, until_held
from tests.conftest import PATIENCE, ROOT, allowed
from train.interrupt import INTERRUPTED

SECONDS = 30  # within which nothing may be left of a run that has failed


class Started:
    """A run in the background, started on the first host."""

    def __init__(self, hosts: Hosts, shards: Path, folder: Path, *overrides: str, slots: int = 1, **variables: str) -> None:
        self.hosts, self.folder, self.printed = hosts, folder, folder.with_suffix(".txt")
        environment = {**os.environ, **VARIABLES, **hosts.environment, "SSH_PORT": str(SSH_PORT), "OUTPUT_DIR": str(folder)}
        environment |= {"HOSTFILE": str(hosts.hostfile(slots)), **variables}
        command = ["env", "--default-signal=INT", *hosts.command(0, "launch/multinode.sh", *settings(shards, 2), *overrides)]
        with self.printed.open("w") as output:
            self.process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=output, stderr=output)

    @property
    def output(self) -> str:
        return self.printed.read_text()

    def code(self, seconds: float) -> int:
        return self.process.wait(seconds)

    def nothing_is_left(self, seconds: float) -> bool:
        deadline = time.monotonic() + seconds
        while self.left() and time.monotonic() < deadline:
            time.sleep(0.2)
        return not self.left()

    def left(self) -> list[list[str]]:
        commands = []
        for process in [*self.hosts.processes(0), *self.hosts.processes(1)]:
            try:
                commands.append(process.cmdline())
            except psutil.Error:
                continue
        return commands

    def end(self) -> None:
        for process in [*self.hosts.processes(0), *self.hosts.processes(1), self.process]:
            try:
                process.kill()
            except (psutil.Error, OSError):
                continue
        self.process.wait(10)


@pytest.fixture
def start(hosts, shards, tmp_path):
    runs: list[Started] = []

    def run(*overrides: str, **options: str) -> Started:
        runs.append(Started(hosts, shards, tmp_path / "run", *overrides, **options))
        return runs[-1]

    yield run
    hosts.mend()
    for started in runs:
        started.end()
        print(started.output)  # for those that fail


def test_two_hosts_train(start, hosts, tmp_path):
    run = start(slots=2, PREFLIGHT="1", MY_NAME="a b\n'c'", PASS_ENV="MY_*", NOT_MINE="1", TRAIN_BATCH_SIZE_PER_GPU="1")
    assert run.code(PATIENCE) == 0, run.output
    first, second = hosts.addresses
    assert "all-reduce of" in run.output and "over 4 processes" in run.output, run.output
    assert f"{first}: 4 x cpu, ZeRO-2" in run.output and (run.folder / "model.safetensors").is_file()
    assert sorted(path.name for path in (run.folder / "ranks").iterdir()) == [f"rank_{rank}.txt" for rank in range(4)]
    assert f"step {STEPS}/{STEPS}" in (run.folder / "ranks/rank_0.txt").read_text()
    given = (run.folder / "environment_3.txt").read_text()
    assert "MY_NAME=a b\n'c'\n" in given and "NOT_MINE" not in given
    assert run.nothing_is_left(allowed(5)), run.left()


def test_a_signal_saves_and_the_same_command_goes_on(start):
    run = start("schedule.steps=100000")
    until((run.folder / "metrics.jsonl").exists, "it does not train")
    run.process.send_signal(signal.SIGTERM)
    assert run.code(allowed(SECONDS)) == INTERRUPTED and "once more ends it at once" in run.output, run.output
    assert "stops after step" in run.output and run.nothing_is_left(allowed(5)), run.left()
    step = int(next((run.folder / "checkpoints").glob("step_*")).name.removeprefix("step_"))
    again = start(f"schedule.steps={step + 2}", INCLUDE=run.hosts.addresses[1])  # and on another number of hosts
    assert again.code(PATIENCE) == 0 and f"resumed at step {step}" in again.output, again.output
    assert "1 x cpu" in again.output


def test_a_signal_while_it_looks_at_the_hosts_ends_it(start):
    run = start(PREFLIGHT="1")
    until(lambda: "train.trial_sum" in str(run.left()), "no trial sum")
    run.process.send_signal(signal.SIGTERM)
    assert run.code(allowed(SECONDS)) not in (0, INTERRUPTED) and run.nothing_is_left(SECONDS), run.left()
    assert not (run.folder / "log.txt").exists()


def test_a_second_signal_ends_it_at_once(start, tmp_path):
    hold(tmp_path / "run")
    run = start()
    until_held(run.folder)
    run.process.send_signal(signal.SIGTERM)
    time.sleep(2)
    assert run.process.poll() is None
    run.process.send_signal(signal.SIGTERM)
    assert run.code(allowed(SECONDS)) not in (0, INTERRUPTED) and run.nothing_is_left(SECONDS), run.left()


def test_a_script_that_is_killed_leaves_a_checkpoint_and_no_process(start):
    run = start("schedule.steps=100000")
    until((run.folder / "metrics.jsonl").exists, "it does not train")
    run.process.kill()
    assert run.nothing_is_left(SECONDS), run.left()
    assert "stops after step" in (run.folder / "log.txt").read_text()


def test_a_rank_that_raises_is_named_with_its_host(start, hosts, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run/raise").write_text("1 2")
    run = start()
    assert run.code(PATIENCE) not in (0, INTERRUPTED)
    raised = (run.folder / "metrics.jsonl").stat().st_mtime
    time_left = raised + allowed(SECONDS) - time.time()
    assert time_left > 0 and run.nothing_is_left(time_left), run.left()
    assert f"error: host {hosts.addresses[1]} (ranks 1 to 1): ended with exit code 1" in run.output
    assert "broken on purpose" in (run.folder / "ranks/rank_1.txt").read_text()
    assert f"{hosts.addresses[1]}: ValueError: broken on purpose" in run.output


@pytest.mark.parametrize("preflight", ["0", "1"])
def test_a_host_that_cannot_be_reached_is_named(start, hosts, preflight):
    hosts.cut()
    before = time.monotonic()
    run = start(PREFLIGHT=preflight)
    limit = allowed(SECONDS)
    assert run.code(limit) not in (0, INTERRUPTED), run.output
    assert run.nothing_is_left(before + limit - time.monotonic()), run.left()
    words = ": gave no answer" if preflight == "1" else " (ranks 1 to 1): ended with exit code 255"
    assert f"{hosts.addresses[1]}{words}" in run.output, run.output


def test_a_cable_that_is_cut_ends_the_run_on_both_hosts(start, hosts, tmp_path):
    hold(tmp_path / "run", HELD)
    run = start()
    until_held(run.folder)
    let_go(run.folder)
    hosts.cut()
    cut = time.monotonic()
    limit = allowed(SECONDS)
    assert run.code(limit + 10) not in (0, INTERRUPTED), run.output
    assert run.nothing_is_left(max(1, cut + limit - time.monotonic())), run.left()
    words = f"error: host {hosts.addresses[1]} (ranks 1 to 1): ended with exit code 255: ssh failed"
    assert words in run.output, run.output


@pytest.mark.parametrize(
    ("hostfile", "variables", "words"),
    [
        (None, {}, "no such file"),
        ("", {}, "no such file, or empty"),
        ("one two\n", {}, "bad entry"),
        ("a slots=1\na slots=2\n", {}, "multiple entries"),
        ("a slots=1\n", {"INCLUDE": "b"}, "'b' not found"),
        ("a slots=1\n", {"EXCLUDE": "a"}, "no host is left"),
        ("a slots=3\n", {}, "global_batch_size: 8 does not divide"),
    ],
)
def test_hostfiles_are_checked(shards, tmp_path, hostfile, variables, words):
    path = tmp_path / "hosts"
    if hostfile is not None:
        path.write_text(hostfile)
    environment = {**os.environ, **VARIABLES, "HOSTFILE": str(path), "OUTPUT_DIR": str(tmp_path / "run"), **variables}
    done = subprocess.run(
        ["launch/multinode.sh", *settings(shards, 2)], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=PATIENCE
    )
    assert done.returncode != 0 and done.stderr.startswith("error: ") and words in done.stderr, done.stderr
    assert len(done.stderr.splitlines()) == 1
