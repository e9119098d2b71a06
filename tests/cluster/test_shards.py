"""launch/shards.sh on a real Slurm: what an array of tasks makes is what one process makes."""

import hashlib
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import PATIENCE, ROOT, python

SCRIPT = ROOT / "launch" / "shards.sh"
SNAPSHOT = Path(__file__).parent / "snapshots" / "shards.txt"
ENVIRONMENT = {"TASKS": "4", "CPUS_PER_TASK": "1", "VENV": sys.prefix}
ENDED = ("COMPLETED", "FAILED", "CANCELLED")


@pytest.fixture
def raw(faces, tmp_path) -> Path:
    """A raw folder that a test may damage, with a name that shells take apart."""
    return Path(shutil.copytree(faces, tmp_path / "raw 'faces'"))


def arguments(raw: Path, out: Path) -> list[str]:
    return ["--dataset", "facesynthetics", "--root", str(raw), "--out", str(out), "--samples-per-shard", "5"]


def launch(*words: object, **environment: str) -> subprocess.CompletedProcess:
    """The script without a cluster; for what is refused and what is printed."""
    variables = {**os.environ, **ENVIRONMENT, **environment}
    return subprocess.run([SCRIPT, *map(str, words)], env=variables, capture_output=True, text=True, timeout=PATIENCE)


def submit(slurm, raw: Path, out: Path) -> tuple[str, str]:
    """The ids of the array and of the job behind it."""
    done = slurm.run(SCRIPT, *arguments(raw, out), "--", "--comment=drawn faces", **ENVIRONMENT)
    array, merge = re.findall(r"^job (\d+): ", done.stdout, re.MULTILINE)
    return array, merge


def sums(out: Path) -> dict[str, str]:
    files = (path for split in ("train", "val") for path in (out / split).iterdir())
    return {str(path.relative_to(out)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_the_tasks_of_an_array_make_the_bytes_of_one_process(slurm, raw, tmp_path):
    out, alone = tmp_path / "it's 100% of tasks", tmp_path / "alone"
    array, merge = submit(slurm, raw, out)
    assert slurm.job(merge)["Dependency"].startswith(f"afterok:{array}")
    done = python("-m", "data.build_shards", *arguments(raw, alone), "--workers", 1)
    assert done.returncode == 0, done.stderr

    slurm.wait(merge, "COMPLETED")

    tasks = slurm.jobs(array)
    assert [task["JobState"] for task in tasks] == ["COMPLETED"] * 4
    assert {task["Comment"] for task in tasks} == {"drawn faces"}
    assert sums(out) == sums(alone)
    assert len([name for name in sums(out) if name.endswith(".tar")]) > 4, "every task has made some"
    outputs = {f"part-{number}_{array}.txt" for number in range(1, 5)} | {f"merge_{merge}.txt"}
    assert {path.name for path in (out / "slurm").iterdir()} == outputs

    again = slurm.run(SCRIPT, *arguments(raw, out), check=False, **ENVIRONMENT)
    assert (again.returncode, again.stdout) == (2, "")
    assert "already built" in again.stderr


def test_after_a_failed_task_nothing_waits_and_the_same_command_goes_on(slurm, raw, tmp_path):
    out, alone = tmp_path / "of tasks", tmp_path / "alone"
    image = raw / "000007.png"
    whole = image.read_bytes()
    image.write_bytes(whole[: len(whole) // 2])
    array, merge = submit(slurm, raw, out)
    slurm.wait(merge, "CANCELLED")
    states = {task["ArrayTaskId"]: slurm.wait(task["JobId"], *ENDED)["JobState"] for task in slurm.jobs(array)}
    assert sorted(states.values()) == ["COMPLETED"] * 3 + ["FAILED"]
    failed = next(number for number, state in states.items() if state == "FAILED")
    assert "000007.png" in (out / "slurm" / f"part-{failed}_{array}.txt").read_text()
    assert slurm.run("squeue", "-ho", "%A %T").stdout == ""
    assert not list(out.glob("*/index.json"))
    made = {path: path.stat().st_ino for path in out.glob("*/*.tar")}

    image.write_bytes(whole)
    array, merge = submit(slurm, raw, out)
    slurm.wait(merge, "COMPLETED")
    assert {path: path.stat().st_ino for path in made} == made, "whole shards stay as they are"
    done = python("-m", "data.build_shards", *arguments(raw, alone), "--workers", 1)
    assert done.returncode == 0, done.stderr
    assert sums(out) == sums(alone)


def test_what_slurm_would_not_take_is_told_before_anything_is_submitted(slurm, raw, tmp_path):
    out = tmp_path / "out"
    for environment in ({"PARTITION": "gpu"}, {"CPUS_PER_TASK": "1000"}, {"TASKS": "1000000"}, {"TIME": "30-00"}):
        done = slurm.run(SCRIPT, *arguments(raw, out), check=False, **{**ENVIRONMENT, **environment})
        assert done.returncode == 2, environment
        assert done.stdout == "" and "error: Slurm would not take the array" in done.stderr, environment
    assert slurm.run("squeue", "-ho", "%A").stdout == ""
    assert not out.exists()


def test_a_dry_run_prints_both_jobs(raw, tmp_path):
    out = tmp_path / "100% faces"
    flags = ["--", "--account=vision", "--comment=it's big"]
    done = launch("--dry-run", *arguments(raw, out), "--limit", 30, *flags, PARTITION="cpu", TIME="2:00:00", TASKS="16")
    assert done.returncode == 0, done.stderr
    assert not out.exists()
    shown = done.stdout
    for place, word in ((sys.prefix, "VENV"), (str(tmp_path), "FOLDER"), (str(ROOT), "REPOSITORY")):
        shown = shown.replace(place, word)
    if os.environ.get("SNAPSHOTS") == "write":
        SNAPSHOT.parent.mkdir(exist_ok=True)
        SNAPSHOT.write_text(shown)
    assert shown == SNAPSHOT.read_text(), "if this is meant: SNAPSHOTS=write"


@pytest.mark.parametrize(
    "more, environment, reason",
    [
        (["--part", "1/2"], {}, "error: --part: the tasks of the array get it; set the variable TASKS instead"),
        (["--work", "4"], {}, "error: --work: set the variable CPUS_PER_TASK instead"),
        (["--colour"], {}, "unrecognized arguments: --colour"),
        (["--label-set", "nothing"], {}, "error: label set 'nothing': unknown"),
        (["--masks", "m"], {}, "error: --masks: belongs to --dataset pairs, not to facesynthetics"),
        (["--root", "/nowhere"], {}, "error: /nowhere: --root is not there"),
        (["--out", __file__], {}, "is a file; name a folder with --out"),
        (["--", "--array=1-3"], {}, "error: --array=1-3: set the variable TASKS instead"),
        (["--", "-d", "afterok:5"], {}, "error: -d: the last job has its own"),
        (["--", "--output=x"], {}, "error: --output=x: the output of the jobs goes into OUT/slurm"),
        ([], {"TASKS": "0"}, "error: TASKS: '0' is not a whole number above 0"),
        ([], {"CPUS_PER_TASK": "two"}, "error: CPUS_PER_TASK: 'two' is not a whole number above 0"),
        ([], {"VENV": "/nowhere"}, "error: VENV: /nowhere has no bin/python"),
    ],
)
def test_mistakes_are_told_at_once(more, environment, reason, faces, tmp_path):
    done = launch("--dry-run", *arguments(faces, tmp_path / "out"), *more, **environment)
    assert (done.returncode, done.stdout) == (2, "")
    assert reason in done.stderr
    assert not (tmp_path / "out").exists()


def test_root_and_out_are_needed(faces):
    assert launch().returncode == 2
    done = launch("--dataset", "facesynthetics", "--root", faces)
    assert done.returncode == 2 and "--out" in done.stderr


def test_the_help_names_every_variable():
    done = launch("--help")
    assert done.returncode == 0
    for name in ("TASKS", "CPUS_PER_TASK", "PARTITION", "TIME", "VENV", "CONDA_ENV", "--dry-run"):
        assert name in done.stdout
