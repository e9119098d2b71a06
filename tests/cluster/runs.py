"""Small trainings on several nodes, and what is compared of them."""

import time
from collections.abc import Callable
from pathlib import Path

from model.weight_files import read_weights
from tests.cluster.slurm import Slurm
from tests.conftest import PATIENCE, ROOT, SMALL, Run
from tests.test_killed import batches

# What a restart must not change is in it: an average of the weights, dropout, augmentation.
SETTINGS = [
    *(override for override in SMALL if not override.startswith("micro_batch_size")),  # the variable's
    "data.workers=1", "evaluate.pictures=0", "ema.decay=0.9", "model.dropout=0.1",
    "augment.photometric=true",
]  # fmt: skip
STEPS = 8
HELD = 4  # the optimizer step in which a run is held


def settings(shards: Path, stage: int, *overrides: str) -> list[str]:
    data = [f"data.train={shards / 'train'}", f"data.val={shards / 'val'}"]
    return [*SETTINGS, *data, f"schedule.steps={STEPS}", f"deepspeed=ds_configs/zero{stage}.json", *overrides]


VARIABLES = {
    "DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": "", "PREFLIGHT": "0", "CPUS_PER_GPU": "2", "NUM_NODES": "2",
    "GPUS_PER_NODE": "1", "TRAIN_BATCH_SIZE_PER_GPU": "2", "CONTAINER": str(ROOT / "tests/cluster/as_held_run.sh"),
}  # fmt: skip


def submit(slurm: Slurm, folder: Path, *arguments: str, **variables: str) -> str:
    """Returns the job's number."""
    done = slurm.run("launch/slurm.sh", *arguments, **{**VARIABLES, "OUTPUT_DIR": str(folder), "TIME": "20", **variables})
    return done.stdout.split()[1].rstrip(";")


def hold(folder: Path, step: int = HELD) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "hold").write_text(str(step))


def until_held(folder: Path, ranks: int = 2, step: int = HELD) -> None:
    """Until all ranks wait in that step."""
    paths = [folder / f"batches_{rank}.jsonl" for rank in range(ranks)]
    there = lambda: all(path.exists() and f'"step": {step},' in path.read_text() for path in paths)  # noqa: E731
    until(there, f"{folder} has not come to step {step}")


def let_go(folder: Path) -> None:
    (folder / "hold").unlink()


def until(true: Callable[[], object], what: str) -> None:
    deadline = time.monotonic() + PATIENCE
    while not true():
        assert time.monotonic() < deadline, what
        time.sleep(0.1)


def assert_same(folder: Path, undisturbed: Path) -> None:
    """The samples of every step, every loss and the weights, bit for bit."""
    found, expected = batches(folder), batches(undisturbed)
    assert expected.keys() == set(range(STEPS)) and found == expected
    assert all(len(samples) == 1 for samples in found.values())
    assert Run(0, "", folder).losses == Run(0, "", undisturbed).losses
    ours, theirs = (read_weights(path / "model.safetensors") for path in (folder, undisturbed))
    assert all((ours[key] == theirs[key]).all() for key in theirs)


def describe(folder: Path) -> str:
    """What a failed test should show of a run."""
    return "\n".join(path.read_text() for path in [*folder.glob("slurm/job_*[0-9].txt"), *folder.glob("log.txt")])
