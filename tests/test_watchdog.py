"""Processes that hang or are slow are named."""

import subprocess
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from tests.conftest import PATIENCE, ROOT, allowed, experiment, launched, train_environment
from tests.test_interrupt import LONG, Started
from train.clock import StepClock
from train.interrupt import INTERRUPTED
from train.watchdog import verdict


def slow_run(shards: Path, folder: Path, *settings: str, phase: str, seconds: float, first: int = 0) -> tuple[int, str, float]:
    """Exit code, output, and the seconds from the last logged step to the end."""
    command = [*launched("tests.slow_run", 2), "--config", *experiment(shards, folder, *settings)]
    environment = train_environment() | {"PHASE": phase, "SECONDS": str(seconds), "FROM": str(first)}
    done = subprocess.run(
        command, cwd=ROOT, env=environment, text=True, timeout=PATIENCE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    return done.returncode, done.stdout, time.time() - (folder / "metrics.jsonl").stat().st_mtime


@pytest.mark.parametrize("phase", ["data", "backward"])
def test_a_rank_that_sleeps_is_named_and_the_run_ends(shards, tmp_path, phase):
    settings = [*LONG, "guard.hang_minutes=0.1"]
    code, output, seconds = slow_run(shards, tmp_path / "run", *settings, phase=phase, seconds=1000, first=4)
    assert code not in (0, INTERRUPTED) and seconds < allowed(40), output
    told = (tmp_path / "run" / "log.txt").read_text()
    for text in (output, told):
        assert "no progress for " in text and "rank 1 on " in text
        assert f"is late, in `{phase}` of step 4; the others wait for it" in text
    assert told.count("no progress") == 1
    stacks = [path.read_text() for path in sorted((tmp_path / "run" / "stacks").glob("*/rank_0000?.txt"))]
    assert "in slow" in stacks[1] and "in slow" not in stacks[0]


def test_a_rank_that_is_stopped_is_named_by_the_others(shards, tmp_path):
    """The one that would pass messages on."""
    run = Started(shards, tmp_path / "run", "guard.hang_minutes=0.1")
    try:
        run.ranks[0].suspend()
        # DeepSpeed's launcher gives a process that cannot hear SIGTERM 30 s.
        assert run.code(allowed(80)) not in (0, INTERRUPTED) and run.all_gone(allowed(5))
        assert "rank 0 tells nothing and is waited for" in run.output
    finally:
        run.end()


@pytest.mark.parametrize(("phase", "words"), [("data", "for data"), ("forward", "for the forward pass")])
def test_a_slow_rank_shows_in_the_straggler_line(shards, tmp_path, phase, words):
    code, output, _ = slow_run(
        shards, tmp_path / "run", "schedule.steps=9", "log_every=3", "data.workers=0", phase=phase, seconds=0.3
    )
    assert code == 0, output
    lines = [line for line in output.splitlines() if "straggler: " in line]
    assert len(lines) == 1 and "straggler: rank 1 on " in lines[0] and f"ms of a step {words}, the others" in lines[0], output
    assert ("of a step's" in output and "raise data.workers" in output) == (phase == "data"), output


def test_what_takes_as_long_as_the_disk_does_is_no_hang(shards, tmp_path):
    """One process exports for longer than the limit, and the other waits for it."""
    settings = ["schedule.steps=3", "guard.hang_minutes=0.05", "evaluate.every_steps=2"]
    code, output, _ = slow_run(shards, tmp_path / "run", *settings, phase="export", seconds=5, first=2)
    assert code == 0 and "no progress" not in output, output


def place(count: int, phase: str, waits: bool) -> dict:
    return {"count": count, "step": 7, "phase": phase, "since": 0.0, "host": f"h{count}", "waits": waits}


@pytest.mark.parametrize(
    ("told", "expected"),
    [
        # The one that has got least far, however its phase is called.
        ([place(40, "wait", True), place(39, "data", False)], "rank 1 on h39 is late, in `data` of step 7; the others wait"),
        # With accumulation: the backward pass of a micro batch, while the others wait in the next one's forward pass.
        ([place(41, "backward", False), place(42, "forward", True)], "rank 0 on h41 is late, in `backward` of step 7"),
        ([place(9, "backward", True), place(9, "backward", False)], "rank 1 on h9 is late, in `backward` of step 7"),
        ([place(5, "validation", False), place(6, "wait", True), place(5, "other", False)], "rank 0 on h5, rank 2 on h5 is late"),
        ([place(9, "backward", True)] * 2, "all ranks are in `backward` of step 7, and wait for each other: look at the network"),
        ([place(9, "forward", False)] * 2, "all ranks are in `forward` of step 7"),
        ([place(9, "forward", True)], "all ranks are in `forward` of step 7"),
        ([place(9, "wait", True), None, None], "rank 1, 2 tells nothing and is waited for: it is stopped, or its host is gone"),
    ],
)
def test_who_is_late(told, expected):
    text = verdict({rank: one for rank, one in enumerate(told) if one}, len(told))
    assert text.startswith(expected) and ("network" in text) == ("network" in expected)


class Event:
    """Stands for one of CUDA's: a time of the device's."""

    now = 0.0

    def record(self) -> "Event":
        self.time = Event.now
        return self

    def elapsed_time(self, end: "Event") -> float:
        return 1e3 * (end.time - self.time)

    def synchronize(self) -> None:
        pass


@pytest.mark.parametrize("on_gpu", [False, True])
def test_laps_add_up(monkeypatch, on_gpu):
    stream = SimpleNamespace(record_event=lambda event: event.record())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: stream)
    monkeypatch.setattr(torch.cuda, "Event", lambda enable_timing: Event())
    monkeypatch.setattr("train.clock.time.monotonic", lambda: Event.now)
    clock = StepClock(on_gpu)
    for phase, seconds in (("data", 2), ("forward", 3), ("data", 4), ("wait", 1), ("data", 0)):
        clock.enter(phase)
        Event.now += seconds
    assert clock.read() == {"other": 0, "data": 6, "forward": 3, "wait": 1}
    Event.now += 5
    clock.enter("other")
    assert clock.read() == {"data": 5} and clock.place.count == 7
