"""launch/node.sh as a user starts it."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from tests.conftest import PATIENCE, ROOT, SMALL, allowed, python, wait_for_step
from train.interrupt import INTERRUPTED

started: list[subprocess.Popen] = []


def start(shards: Path, folder: Path, *overrides: str, **variables: str) -> subprocess.Popen:
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OUTPUT_DIR": str(folder), **variables}
    environment["PATH"] = f"{os.path.dirname(sys.executable)}:{environment['PATH']}"
    small = [override for override in SMALL if not override.startswith("micro_batch_size")]  # the variable's
    # A shell cannot trap what was ignored before it started: SIGINT in the background of another one, SIGHUP under nohup.
    command = ["env", "--default-signal=INT,HUP", "launch/node.sh"]
    command += [*small, f"data.train={shards / 'train'}", f"data.val={shards / 'val'}", *overrides]
    started.append(
        subprocess.Popen(command, cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    )
    return started[-1]


@pytest.fixture(autouse=True)
def nothing_is_left():
    yield
    while started:
        process = started.pop()
        if process.poll() is None:
            for one in [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]:
                with suppress(psutil.NoSuchProcess):
                    one.kill()


@pytest.fixture(scope="module")
def finished(shards, tmp_path_factory) -> tuple[Path, str]:
    folder = tmp_path_factory.mktemp("node")
    process = start(shards, folder, "schedule.steps=3", DEVICES="0,1", TRAIN_BATCH_SIZE_PER_GPU="2")
    output = process.communicate(timeout=PATIENCE)[0]
    assert process.returncode == 0, output
    return folder, output


def test_two_processes_train_and_leave_everything(finished):
    folder, output = finished
    assert "2 x cpu, ZeRO-1, batch 8 = 2 x 2 x 2 accumulated" in output
    assert "mIoU" in output and str(folder / "model.safetensors") in output
    log = (folder / "log.txt").read_text()
    assert "step 3/3  loss" in log and "images/s" in log and "ETA" in log and "mIoU" in log
    assert {"config.yaml", "metrics.jsonl", "validation", "checkpoints"} <= {path.name for path in folder.iterdir()}
    picture = next((folder / "validation").iterdir()) / "examples.png"
    assert picture.read_bytes().startswith(b"\x89PNG") and str(picture) in output


def test_evaluate_finds_the_scores_of_the_run_again(finished, shards, tmp_path):
    folder, _ = finished
    sheet = tmp_path / "sheet.png"
    done = python(
        "-m", "train.evaluate", "--weights", folder / "model.safetensors", "--data", shards / "val", "--output", sheet
    )
    assert done.returncode == 0, done.stderr
    scores = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()][-1]
    assert f"mIoU {scores['val/miou']:.4f}" in done.stdout and sheet.is_file()
    wrong = python("-m", "train.evaluate", "--weights", folder / "config.yaml", "--data", shards / "val")
    assert wrong.returncode != 0 and wrong.stderr.startswith("error: ") and "Traceback" not in wrong.stderr


def test_debug_is_one_process(shards, tmp_path):
    process = start(shards, tmp_path, "schedule.steps=1", "data.workers=3", mode="debug")
    output = process.communicate(timeout=PATIENCE)[0]
    assert process.returncode == 0, output
    assert "1 x cpu" in output and "workers: 0" in (tmp_path / "config.yaml").read_text()


@pytest.mark.parametrize(
    ("overrides", "variables", "word"),
    [([], {"mode": "fast"}, "mode"), ([], {"DEVICES": "two"}, "DEVICES"), (["output_dir=x"], {}, "OUTPUT_DIR")],
)
def test_variables_are_checked(shards, tmp_path, overrides, variables, word):
    process = start(shards, tmp_path, *overrides, **variables)
    output = process.communicate(timeout=PATIENCE)[0]
    assert process.returncode == 2 and output.startswith("error: ") and word in output


def commands(process: subprocess.Popen) -> Iterator[list[str]]:
    for child in psutil.Process(process.pid).children(recursive=True):
        with suppress(psutil.Error):  # it has ended
            yield child.cmdline()


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGUSR1", "SIGHUP"])
def test_a_signal_saves_and_ends_everything(shards, tmp_path, name):
    process = start(shards, tmp_path, "schedule.steps=100000", DEVICES="0,1")
    wait_for_step(tmp_path, 1, process)
    family = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(getattr(signal, name))
    output, _ = process.communicate(timeout=PATIENCE)
    assert process.returncode == INTERRUPTED and "once more ends it at once" in output, output
    assert "stops after step" in output and list((tmp_path / "checkpoints").glob("step_*/run.json"))
    _, alive = psutil.wait_procs(family, timeout=allowed(5))
    assert not alive


@pytest.mark.parametrize(("whom", "name"), [("all", "SIGTERM"), ("launcher", "SIGKILL")])
def test_a_signal_to_the_launcher_too_is_waited_out(shards, tmp_path, whom, name):
    process = start(shards, tmp_path, "schedule.steps=100000", DEVICES="0,1")
    wait_for_step(tmp_path, 1, process)
    family = psutil.Process(process.pid).children(recursive=True)
    (launcher,) = (child for child in family if "deepspeed.launcher.launch" in child.cmdline())
    for one in [*family, process] if whom == "all" else [launcher]:
        one.send_signal(getattr(signal, name))
    output, _ = process.communicate(timeout=PATIENCE)
    assert process.returncode == INTERRUPTED and "stops after step" in output, output
    assert list((tmp_path / "checkpoints").glob("step_*/run.json"))
    _, alive = psutil.wait_procs(family, timeout=allowed(5))
    assert not alive


def test_a_run_that_dies_is_no_success(shards, tmp_path):
    process = start(shards, tmp_path, "schedule.steps=100000", DEVICES="0,1")
    wait_for_step(tmp_path, 1, process)
    family = psutil.Process(process.pid).children(recursive=True)
    for one in family:
        one.kill()
    output, _ = process.communicate(timeout=allowed(40))
    assert process.returncode not in (0, INTERRUPTED), output


def test_a_signal_while_it_starts_is_not_forgotten(shards, tmp_path):
    process = start(shards, tmp_path / "run", "schedule.steps=100000", DEVICES="0,1")
    deadline = time.monotonic() + PATIENCE
    while not any("--no_local_rank" in command for command in commands(process)):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=PATIENCE)
    assert process.returncode == INTERRUPTED and "stops after step 0" in output, output


def test_without_the_script_a_run_saves_and_leaves(shards, tmp_path):
    process = start(shards, tmp_path, "schedule.steps=100000", DEVICES="0,1")
    wait_for_step(tmp_path, 1, process)
    family = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    _, alive = psutil.wait_procs(family, timeout=30)
    assert not alive and list((tmp_path / "checkpoints").glob("step_*/run.json"))
    process.communicate()


def test_a_second_signal_ends_it_at_once(shards, tmp_path):
    process = start(shards, tmp_path, "schedule.steps=100000", DEVICES="0,1")
    wait_for_step(tmp_path, 1, process)
    family = psutil.Process(process.pid).children(recursive=True)
    ranks = [child for child in family if "train" in child.cmdline() and child.parent().cmdline()[-1:] == child.cmdline()[-1:]]
    for rank in ranks:
        rank.suspend()
    process.send_signal(signal.SIGTERM)
    time.sleep(1)
    process.send_signal(signal.SIGTERM)
    for rank in ranks:
        with suppress(psutil.NoSuchProcess):
            rank.resume()
    process.communicate(timeout=allowed(30))
    assert process.returncode not in (0, INTERRUPTED)
    _, alive = psutil.wait_procs(family, timeout=allowed(5))
    assert not alive
