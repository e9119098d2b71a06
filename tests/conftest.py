"""Drawn shards for all tests, and real runs of `python -m train` to look at."""

import fcntl
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import psutil
import pytest
from hypothesis import HealthCheck, settings

from data.synthetic import write_dataset

ROOT = Path(__file__).parent.parent
FORKS = ["-m", "tests.forks"]
# A machine with other work makes any example slow: that is no failure.
settings.register_profile("patient", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("patient")
PATIENCE = 600  # seconds for what two free cores do in a tenth of that: what does not come then will never come
# Small enough for a step in a tenth of a second: 12 tokens.
SMALL = [
    "model.image_size=[32,24]", "global_batch_size=8", "micro_batch_size=4", "log_every=1", "wandb.mode=disabled",
    "schedule.warmup_steps=0",
    "guard.hang_minutes=4", "timeout_minutes=8",  # within PATIENCE, and the watchdog, which tells where a run hangs, first
]  # fmt: skip


def python(*arguments: object, timeout: float = PATIENCE, **environment: str) -> subprocess.CompletedProcess:
    """Run `python ARGUMENTS` in the repository's root; never raises for the exit code."""
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=ROOT, env={**os.environ, "CUDA_VISIBLE_DEVICES": "", **environment}, capture_output=True, text=True, timeout=timeout,
    )  # fmt: skip


def allowed(seconds: float) -> float:
    """`seconds`, and as many more as this machine is slower now than two free cores, on which PyTorch is there in 2 s."""
    before = time.monotonic()
    python("-c", "import torch")
    return seconds * max(1, (time.monotonic() - before) / 4)


@pytest.fixture(autouse=True)
def nothing_left(request):
    """A run that a failed test has left at work would take the processor from all others. Those of clusters end their own."""
    this, failed = psutil.Process(), request.session.testsfailed
    before = set(this.children(recursive=True))
    yield
    if request.session.testsfailed > failed and {"slurm", "hosts"}.isdisjoint(request.fixturenames):
        for process in set(this.children(recursive=True)) - before:
            with suppress(psutil.Error):
                if process.cmdline()[1:] != FORKS:
                    process.kill()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item):
    """A failed test shows where the runs in its folder that hung were (train.watchdog)."""
    report = yield
    if report.failed and "tmp_path" in getattr(item, "funcargs", {}):
        with suppress(OSError):  # a run that the test has left at work removes files
            for path in sorted(item.funcargs["tmp_path"].rglob("stacks/*/rank_*.txt")):
                report.sections.append((f"stacks of {path.relative_to(item.funcargs['tmp_path'])}", path.read_text()))
    return report


@pytest.fixture(scope="session")
def once(tmp_path_factory) -> Callable[[str, Callable[[Path], object]], Path]:
    """`once(name, make)`: a folder that `make` has filled, called by the first of pytest's processes that asks for it."""
    base = tmp_path_factory.getbasetemp()
    base = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base

    def made(name: str, make: Callable[[Path], object]) -> Path:
        folder, done = base / name, base / f"{name}_done"
        with (base / f"{name}_lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not done.exists():
                shutil.rmtree(folder, ignore_errors=True)
                folder.mkdir()
                make(folder)
                done.touch()
        return folder

    return made


@pytest.fixture(scope="session")
def faces(once) -> Path:
    return once("faces", lambda root: write_dataset(root, count=40, seed=5, size=64))


@pytest.fixture(scope="session")
def shards(faces, once) -> Path:
    """A folder with train (31 samples, in several tars) and val (9)."""

    def build(out: Path) -> None:
        done = python(
            "-m", "data.build_shards", "--dataset", "facesynthetics", "--root", faces, "--out", out,
            "--val-fraction", "0.225", "--samples-per-shard", "10",
        )  # fmt: skip
        assert done.returncode == 0, done.stderr

    return once("shards", build)


@dataclass
class Run:
    """What a run printed and left behind."""

    code: int
    output: str
    folder: Path

    @property
    def losses(self) -> dict[int, float]:
        lines = [json.loads(line) for line in (self.folder / "metrics.jsonl").read_text().splitlines()]
        return {line["step"]: line["train/loss"] for line in lines if "train/loss" in line}


def experiment(shards: Path, folder: Path, *overrides: str) -> list[str]:
    """A small one: its config and what overrides it."""
    data = [f"data.train={shards / 'train'}", f"data.val={shards / 'val'}", f"output_dir={folder}"]
    return ["train/configs/demo.yaml", *SMALL, *data, *overrides]


def launched(module: str, processes: int) -> list[str]:
    """The start of a command that runs `module` in so many processes."""
    if processes == 1:
        return [sys.executable, "-m", module]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launcher = Path(sys.executable).with_name("deepspeed")
    return [str(launcher), "--num_gpus", str(processes), "--master_port", str(port), "--module", module]


def train_command(shards: Path, folder: Path, *overrides: str, processes: int = 1) -> list[str]:
    return [*launched("train", processes), "--config", *experiment(shards, folder, *overrides)]


def train_environment() -> dict[str, str]:
    # The launcher starts `python` by its own interpreter, but asks DS_ACCELERATOR how many devices there are. By LOCAL_SIZE a
    # process alone takes half of the cores, as each of two does: so it computes the same, and leaves room for another test.
    return {**os.environ, "DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": "", "LOCAL_SIZE": "2"}


@cache
def _forks() -> subprocess.Popen:
    """It ends with its input."""
    return subprocess.Popen(
        [sys.executable, *FORKS],
        cwd=ROOT, env=train_environment(), text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    )  # fmt: skip


def train(shards: Path, folder: Path, *overrides: str, processes: int = 1) -> Run:
    """A run of so many processes, to its end. They are forks (see tests.forks), for the launcher and all that is imported take
    longer than most runs: what is about them starts `train_command`."""
    forks = _forks()
    try:
        print(json.dumps([experiment(shards, folder, *overrides), processes]), file=forks.stdin, flush=True)
        code, output = json.loads(forks.stdout.readline())
    except BaseException:  # also when pytest's own time is over: its answer would be taken for the next run's
        forks.kill()
        _forks.cache_clear()
        raise
    return Run(code, output, folder)


def recorded_runs(jobs: dict[str, list[str]], folder: Path, processes: int, *arguments: object) -> dict[str, Run]:
    """Experiments one after another, each in so many processes and with its own output folder: see tests.recorded_run, which
    takes the `arguments`. Not as `train` does by the launcher, whose start takes longer than most of them."""
    path = folder / "jobs.json"
    path.write_text(json.dumps(jobs))
    environment = train_environment() if processes else os.environ
    done = subprocess.run(
        [sys.executable, "-m", "tests.recorded_run", str(path), str(processes), *map(str, arguments)],
        cwd=ROOT, env=environment, timeout=PATIENCE, text=True, capture_output=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    folders = {name: next(word.partition("=")[2] for word in job if word.startswith("output_dir=")) for name, job in jobs.items()}
    return {name: Run(0, done.stdout, Path(folder)) for name, folder in folders.items()}


def zero(stage: int | str, folder: Path) -> str:
    """The override for a file of ds_configs. At stage 3 only vectors stay whole: as shipped, all of a small model would."""
    if not str(stage).startswith("3"):
        return f"deepspeed=ds_configs/zero{stage}.json"
    settings = json.loads((ROOT / "ds_configs" / f"zero{stage}.json").read_text())
    settings["zero_optimization"]["stage3_param_persistence_threshold"] = 1000
    if stage == "3_nvme":
        settings["zero_optimization"]["offload_optimizer"]["nvme_path"] = str(folder / "nvme")
    path = folder / f"zero{stage}_partitioned.json"
    path.write_text(json.dumps(settings))
    return f"deepspeed={path}"


def wait_for_step(folder: Path, step: int, process: subprocess.Popen) -> None:
    """Until the run in `folder` has logged optimizer step `step`."""
    deadline = time.monotonic() + PATIENCE
    path = folder / "metrics.jsonl"
    while not (path.exists() and len(path.read_text().splitlines()) > step):
        assert process.poll() is None, "the run ended by itself"
        assert time.monotonic() < deadline, "no progress"
        time.sleep(0.1)
