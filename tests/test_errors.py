"""Bad input to the command lines: one line that names file, key and remedy, a non-zero exit, no traceback."""

import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest

from tests.conftest import PATIENCE, ROOT, SMALL, python, train_command


def refused(done: subprocess.CompletedProcess, *words: str) -> None:
    assert done.returncode != 0
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and "Traceback" not in done.stderr, done.stderr
    for word in words:
        assert word in errors[0], errors[0]


def train_error(shards, *overrides: str, world: int = 1) -> subprocess.CompletedProcess:
    command = [*train_command(shards, shards / "out", *overrides), "--check"]
    return python(*command[1:], WORLD_SIZE=str(world))


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("model.arhc=tiny", ("demo.yaml", "model.arhc", "unknown key", "arch")),
        ("optimizer.lr=fast", ("demo.yaml", "optimizer.lr", "'fast'")),
        ("data.train=nowhere", ("data.train: ", "nowhere: no such folder", "data.build_shards")),
        ("data.train=[train/run.py]", ("data.train: ", "run.py: is a file; name the folder")),
        ("data.val=nowhere", ("data.val", "nowhere", "no such folder")),
        ("micro_batch_size=3", ("global_batch_size", "does not divide", "multiple of 6")),
        ("model.image_size=[30,24]", ("image_size", "30", "8")),
        ("loss.class_weights=[1,2]", ("class_weights", "2 values", "19")),
        ("schedule.warmup_steps=99999", ("warmup_steps", "99999", "lower it")),
        ("load_from=nowhere.pth", ("load_from", "nowhere.pth", "no such weight file")),
        ("augment.background_class=19", ("augment.background_class", "19", "face19", "0..18")),
        ("deepspeed=ds_configs/zero9.json", ("zero9.json", "no such file", "zero1.json")),
        ("resume_from=nowhere", ("resume_from", "nowhere")),
    ],
)
def test_experiment(shards, override, words):
    refused(train_error(shards, override, world=2), *words)


def test_a_check_prints_what_would_run(shards):
    done = train_error(shards, "deepspeed=ds_configs/zero3.json")
    assert done.returncode == 0, done.stderr
    settings = json.loads(done.stdout[done.stdout.index("{\n") :])
    assert settings["zero_optimization"]["stage"] == 3 and settings["gradient_accumulation_steps"] == 2
    assert not (shards / "out").exists()


def test_validation_with_another_label_set(shards, tmp_path):
    other = shutil.copytree(shards / "val", tmp_path / "val")
    index = json.loads((other / "index.json").read_text())
    index["label_set"]["classes"].pop()
    index["label_set"]["num_classes"] = 18
    index["pixel_counts"].pop()
    (other / "index.json").write_text(json.dumps(index))
    np.save(other / "pixel_counts.npy", np.load(other / "pixel_counts.npy")[:, :18])
    refused(train_error(shards, f"data.val={other}"), str(other), "18 classes", "19", "build both from one set")


def test_weights_that_are_none(shards, tmp_path):
    (tmp_path / "weights.pth").write_text("hello")
    for name in ("weights.pth", "missing.safetensors"):
        command = train_command(shards, tmp_path / "out", f"load_from={tmp_path / name}")
        refused(python(*command[1:]), name)


def test_launcher_tells_a_mistake_once(shards, tmp_path):
    environment = {**os.environ, "DEVICES": "0,1", "OUTPUT_DIR": str(tmp_path / "out"), "TRAIN_BATCH_SIZE_PER_GPU": "5"}
    environment["PATH"] = f"{os.path.dirname(sys.executable)}:{environment['PATH']}"
    command = ["launch/node.sh", *SMALL[:2], f"data.train={shards / 'train'}", f"data.val={shards / 'val'}"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=PATIENCE)
    refused(done, "global_batch_size", "8", "5 x 2")
    assert not (tmp_path / "out").exists()
