"""Interruptions of a Slurm job: the run goes on by itself, and is the run that was left in peace."""

import re
from pathlib import Path

import pytest

from tests.cluster.runs import HELD, assert_same, describe, hold, let_go, settings, submit, until, until_held
from tests.cluster.slurm import Slurm


def warned_by_time(slurm: Slurm, job: str, folder: Path) -> None:
    slurm.run("scontrol", "update", f"JobId={job}", "EndTime=now+90")


def asked(slurm: Slurm, job: str, folder: Path) -> None:
    slurm.run("scancel", "--batch", "--signal=USR1", job)


def starts_again(slurm: Slurm, job: str) -> None:
    def running_again() -> bool:
        fields = slurm.job(job)
        return fields["Restarts"] == "1" and fields["JobState"] == "RUNNING"

    until(running_again, "not requeued")
    slurm.run("scontrol", "update", f"JobId={job}", "TimeLimit=20")  # its earlier end was a shorter limit, for all starts


def preempted(slurm: Slurm, job: str, folder: Path) -> None:
    slurm.run("sbatch", "--partition=high", "--nodes=3", "--exclusive", "--output=/dev/null", "--wrap=sleep 3")


@pytest.fixture
def undisturbed(slurm, shards, once):
    """The folder of an undisturbed run at a ZeRO stage."""

    def run(stage: int) -> Path:
        return once(
            f"undisturbed_{stage}", lambda folder: slurm.wait(submit(slurm, folder, *settings(shards, stage)), "COMPLETED")
        )

    return run


@pytest.mark.parametrize(
    ("interrupt", "launcher", "stage"),
    [
        (asked, "srun", 2),
        (warned_by_time, "deepspeed", 3),
        (preempted, "srun", 3),
        (preempted, "deepspeed", 2),
    ],
)
def test_a_job_that_is_asked_to_leave_goes_on(slurm, shards, tmp_path, undisturbed, interrupt, launcher, stage):
    expected = undisturbed(stage)
    hold(tmp_path)
    job = submit(slurm, tmp_path, *settings(shards, stage), LAUNCHER=launcher)
    until_held(tmp_path)
    interrupt(slurm, job, tmp_path)
    until((tmp_path / "stop").exists, "the warning was not heard")
    let_go(tmp_path)
    if interrupt is warned_by_time:
        starts_again(slurm, job)
    fields = slurm.wait(job, "COMPLETED")
    assert fields["Restarts"] == "1" and fields["ExitCode"] == "0:0", describe(tmp_path)
    log = (tmp_path / "log.txt").read_text()
    assert f"stops after step {HELD + 1}" in log and f"resumed at step {HELD + 1}" in log, describe(tmp_path)
    assert_same(tmp_path, expected)
    for rank in range(2):  # the second start's output is behind the first one's
        assert (tmp_path / f"ranks/rank_{rank}.txt").is_file()
    assert "resumed at step" in (tmp_path / "ranks/rank_0.txt").read_text().partition("stops after step")[2]


@pytest.mark.parametrize(("launcher", "stage", "node"), [("srun", 2, 1), ("deepspeed", 3, 0)])
def test_a_job_whose_node_fails_goes_on_elsewhere(slurm, shards, tmp_path, undisturbed, launcher, stage, node):
    expected = undisturbed(stage)
    hold(tmp_path)
    job = submit(slurm, tmp_path, *settings(shards, stage, "checkpoint.every_steps=1"), LAUNCHER=launcher)
    until_held(tmp_path)
    first = slurm.job(job)["NodeList"]
    names = slurm.run("scontrol", "show", "hostnames", first).stdout.split()
    slurm.set_node(names[node], "DOWN")
    starts_again(slurm, job)  # held until then: on a node that is gone nothing saves
    let_go(tmp_path)
    fields = slurm.wait(job, "COMPLETED")
    assert fields["Restarts"] == "1" and names[node] not in slurm.run("scontrol", "show", "hostnames", fields["NodeList"]).stdout
    assert re.search(r"resumed at step [1-4] ", (tmp_path / "log.txt").read_text()), describe(tmp_path)
    assert_same(tmp_path, expected)


def test_what_cannot_be_saved_before_the_limit_is_requeued_from_the_last_checkpoint(slurm, shards, tmp_path, undisturbed):
    expected = undisturbed(2)
    hold(tmp_path)
    job = submit(slurm, tmp_path, *settings(shards, 2, "checkpoint.every_steps=1"))
    until_held(tmp_path)
    slurm.run("scontrol", "update", f"JobId={job}", "EndTime=now+100")
    starts_again(slurm, job)
    let_go(tmp_path)
    slurm.wait(job, "COMPLETED")
    assert "the time limit is here" in describe(tmp_path)
    assert re.search(r"resumed at step [1-4] ", (tmp_path / "log.txt").read_text()), describe(tmp_path)
    assert_same(tmp_path, expected)


def test_a_job_without_progress_is_not_tried_for_ever(slurm, shards, tmp_path):
    (tmp_path / "raise").write_text("1 5")
    job = submit(slurm, tmp_path, *settings(shards, 2, "checkpoint.every_steps=3"), MAX_RESTARTS="1")
    fields = slurm.wait(job, "FAILED")
    # The first one came to a checkpoint, if it was written in time, which counts as progress; two found that one.
    assert fields["Restarts"] in ("1", "2") and fields["ExitCode"] != "0:0"
    output = describe(tmp_path)
    assert "1 restarts brought it no farther than step" in output and "broken on purpose" in output, output
    assert "broken on purpose" in (tmp_path / "ranks/rank_1.txt").read_text()


@pytest.mark.parametrize(("how", "state"), [("stop file", "FAILED"), ("scancel", "CANCELLED")])
def test_the_user_ends_a_job_for_good(slurm, shards, tmp_path, how, state):
    hold(tmp_path)
    job = submit(slurm, tmp_path, *settings(shards, 2))
    until_held(tmp_path)
    if how == "scancel":
        slurm.run("scancel", job)
    else:
        (tmp_path / "stop").touch()
    let_go(tmp_path)
    fields = slurm.wait(job, state)
    until(lambda: not slurm.run("squeue", "-h").stdout, "it is still there")
    assert slurm.state(job) == state and slurm.restarts(job) == 0
    assert how == "scancel" or (fields["ExitCode"] == "75:0" and "stops after step" in (tmp_path / "log.txt").read_text())
