"""Checkpoints that cannot be written: told, and no harm to the run or to those before."""

import subprocess
from pathlib import Path

from model.weight_files import read_metadata
from tests.conftest import PATIENCE, ROOT, Run, train, train_command, train_environment, wait_for_step

SETTINGS = ["checkpoint.every_steps=2", "evaluate.pictures=0", "schedule.steps=8"]


def limited(shards: Path, folder: Path, *overrides: str, bytes: int = 100_000) -> Run:
    """A run whose files cannot grow beyond so many bytes, as on a disk that fills up."""
    command = ["prlimit", f"--fsize={bytes}", *train_command(shards, folder, *overrides)]
    done = subprocess.run(command, cwd=ROOT, env=train_environment(), timeout=PATIENCE, text=True, capture_output=True)
    return Run(done.returncode, done.stdout + done.stderr, folder)


def test_a_full_disk_leaves_the_checkpoints_before_it(shards, tmp_path):
    whole = train(shards, tmp_path / "whole", *SETTINGS)
    begun = train(shards, tmp_path / "run", *SETTINGS, "schedule.steps=4", "schedule.decay=linear_after_warmup")
    assert whole.code == begun.code == 0, whole.output + begun.output
    kept = sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())
    (tmp_path / "run" / "checkpoints" / "unfinished_step_00000005").mkdir()
    full = limited(shards, tmp_path / "run", *SETTINGS)
    assert full.code == 1 and "Traceback" not in full.output
    assert "unfinished_step_00000005: incomplete, removed" in full.output
    for step in (6, 8):
        assert f"step {step}  checkpoint not written, the ones before it stay: rank 0: " in full.output
    assert sorted(full.losses) == list(range(8))  # it went on to the end
    assert "model.safetensors" in full.output.splitlines()[-1]  # which does not fit either
    assert kept == sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())
    quite_full = limited(shards, tmp_path / "run", *SETTINGS, "data.workers=0", bytes=64)
    assert quite_full.code == 1 and "Traceback" not in quite_full.output and "config.yaml: not written" in quite_full.output
    assert kept == sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())
    again = train(shards, tmp_path / "run", *SETTINGS)
    assert again.code == 0 and "resumed at step 4" in again.output
    assert [again.losses[step] for step in (6, 7)] == [full.losses[step] for step in (6, 7)]


def test_a_folder_that_takes_nothing(shards, tmp_path):
    (tmp_path / "checkpoints").touch()
    run = train(shards, tmp_path, *SETTINGS)
    assert run.code == 0 and "step 2  checkpoint not written" in run.output and "Traceback" not in run.output
    assert len(run.losses) == 8 and (tmp_path / "model.safetensors").exists()


def test_a_console_that_takes_nothing(shards, tmp_path):
    command = train_command(shards, tmp_path, *SETTINGS)
    with open("/dev/full", "w") as full:
        done = subprocess.run(command, cwd=ROOT, env=train_environment(), timeout=PATIENCE, stdout=full, stderr=subprocess.PIPE)
    assert done.returncode == 0 and (tmp_path / "model.safetensors").exists(), done.stderr
    assert "step 8/8  loss" in (tmp_path / "log.txt").read_text()


def test_a_run_that_cannot_save_does_not_say_that_it_has(shards, tmp_path):
    (tmp_path / "checkpoints").touch()
    settings = [*SETTINGS, "schedule.steps=100000", "checkpoint.every_steps=100000"]
    process = subprocess.Popen(
        train_command(shards, tmp_path, *settings), cwd=ROOT, env=train_environment(), stderr=subprocess.PIPE, text=True
    )
    wait_for_step(tmp_path, 2, process)
    another = subprocess.run(
        train_command(shards, tmp_path, *settings, processes=2),
        cwd=ROOT, env=train_environment(), timeout=PATIENCE, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    assert another.returncode == 1 and f"another run is at work in {tmp_path}" in another.stdout
    assert "Traceback" not in another.stdout
    (tmp_path / "stop").touch()
    _, said = process.communicate(timeout=PATIENCE)
    assert process.returncode == 1 and "which could not be saved: rank 0: " in said and "Traceback" not in said


def test_the_newest_and_the_best_stay(shards, tmp_path):
    run = train(shards, tmp_path, *SETTINGS, "evaluate.every_steps=3", "checkpoint.keep=1", "optimizer.lr=1e-6")
    assert run.code == 0, run.output
    best = next(line for line in run.output.splitlines() if line.startswith("best so far"))
    step = int(best.split()[4].rstrip(","))
    kept = {int(path.name.removeprefix("step_")) for path in (tmp_path / "checkpoints").glob("step_*")}
    assert kept == {8, step} and step in (3, 6, 8)
    assert read_metadata(tmp_path / "model_best.safetensors")["step"] == step
