"""The launch scripts without a cluster: what they refuse, and the job that they would submit."""

import os
import subprocess
from pathlib import Path

import pytest

from tests.cluster.runs import VARIABLES, settings
from tests.conftest import PATIENCE, ROOT
from tests.packages import command, needed

SCRIPTS = sorted((ROOT / "launch").glob("*.sh"))
SNAPSHOTS = Path(__file__).parent / "snapshots"


def slurm(*arguments: str, **variables: str) -> subprocess.CompletedProcess:
    # Importing train.engine, as other tests of this process do, sets DS_ACCELERATOR where there is no GPU.
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "", **variables}
    return subprocess.run(
        ["launch/slurm.sh", *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=PATIENCE
    )


def test_shellcheck_finds_nothing():
    needed("shellcheck")
    # Files that are sourced are checked with the scripts that source them, and by themselves.
    options = ["--exclude=SC1091,SC2119,SC2120", "--external-sources", "--shell=bash"]
    done = subprocess.run([command("shellcheck"), *options, *SCRIPTS, ROOT / "tests/cluster/as_held_run.sh"],
                          cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE)  # fmt: skip
    assert done.returncode == 0, done.stdout


def test_a_job_takes_one_output_of_a_command_a_line():
    """bash 5.2 may lose a signal that comes between two."""
    for number, line in enumerate((ROOT / "launch/job.sh").read_text().splitlines(), 1):
        assert line.replace("$((", "").count("$(") <= 1 or line.startswith("#"), number


@pytest.mark.parametrize(
    ("name", "arguments", "variables"),
    [
        ("plain", [], {}),
        (
            "all",
            ["loss.dice=1", "--", "--account=vision", "--comment=a b"],
            {
                "NUM_NODES": "2", "PARTITION": "gpu", "TIME": "1-00:00:00", "LAUNCHER": "deepspeed",
                "TRAIN_BATCH_SIZE_PER_GPU": "1", "GLOBAL_BATCH_SIZE": "32", "NCCL_PROFILE": "infiniband", "WARNING": "300",
                "CONTAINER": "apptainer exec --nv image.sif", "MAX_RESTARTS": "7", "GPU_TYPE": "a100",
                "OUTPUT_DIR": "/tmp/it's 100% # mine",
            },
        ),
        ("cpu", [], {"DS_ACCELERATOR": "cpu", "PREFLIGHT": "0"}),
    ],
)  # fmt: skip
def test_the_job_that_a_dry_run_shows(shards, name, arguments, variables):
    overrides = [f"data.train={shards / 'train'}", f"data.val={shards / 'val'}", "global_batch_size=32", "micro_batch_size=1"]
    if "GLOBAL_BATCH_SIZE" in variables:
        overrides = overrides[:2]
    done = slurm("--dry-run", *overrides, *arguments, **{"OUTPUT_DIR": "outputs/x", **variables})
    assert done.returncode == 0, done.stderr
    shown = done.stdout.replace(str(ROOT), "ROOT").replace(str(shards), "SHARDS")
    path = SNAPSHOTS / f"slurm_{name}.txt"
    if os.environ.get("SNAPSHOTS") == "write":
        path.write_text(shown)
    assert shown == path.read_text()


@pytest.mark.parametrize(
    ("arguments", "variables", "words"),
    [
        ([], {"NUM_NODES": "two"}, "NUM_NODES: 'two'"),
        ([], {"GPUS_PER_NODE": "0"}, "GPUS_PER_NODE: '0'"),
        ([], {"LAUNCHER": "mpirun"}, "LAUNCHER: 'mpirun'"),
        ([], {"WARNING": "20"}, "WARNING: in 20 seconds"),
        ([], {"MAX_RESTARTS": "some"}, "MAX_RESTARTS: 'some'"),
        (["seed=%a"], {}, "--array=0-4"),
        (["--", "--gres=gpu:a100:8"], {}, "GPU_TYPE"),
        (["--", "--time", "30"], {}, "the variable TIME"),
        ([], {"TIME": "tomorrow"}, "TIME: 'tomorrow'"),
        ([], {"TIME": "3"}, "TIME: 3 leaves no time"),
        ([], {"VENV": "/nowhere"}, "VENV: /nowhere"),
        ([], {"NCCL_PROFILE": "fast"}, "NCCL_PROFILE: 'fast'"),
        ([], {"CONFIG": "none.yaml"}, "none.yaml: no such config"),
        ([], {"RESUME_FROM": "/nowhere"}, "resume_from: /nowhere"),
        ([], {"LOAD_FROM": "/nowhere.pth"}, "load_from"),
        ([], {"OUTPUT_DIR": '/tmp/a"b'}, "OUTPUT_DIR"),
        ([], {"GPUS_PER_NODE": "3"}, "does not divide"),
        (["output_dir=x"], {}, "OUTPUT_DIR"),
        (["schedule.stepz=5"], {}, "schedule.stepz"),
        (["--nodes=3"], {}, "behind --"),
        (["--", "--nodes=3"], {}, "NUM_NODES"),
        (["--", "--no-requeue"], {}, "go on"),
    ],
)
def test_what_is_wrong_is_told_before_a_job_is_submitted(shards, tmp_path, arguments, variables, words):
    given = {**VARIABLES, "OUTPUT_DIR": str(tmp_path), **variables}
    done = slurm(*settings(shards, 2), *arguments, **given)
    assert done.returncode != 0 and done.stderr.startswith("error: ") and words in done.stderr, done.stderr
    assert len(done.stderr.splitlines()) == 1 and not list(tmp_path.iterdir())
