"""What a run leaves on wandb and on the disk, and that wandb can do no harm."""

import json
import os
import signal
import subprocess
import time

import numpy as np
import psutil
import pytest
import torch
import yaml

from data.shards import ShardSet
from model.trained import load_segmenter
from tests import wandb_file
from tests.conftest import PATIENCE, ROOT, Run, train, train_command, train_environment, wait_for_step, zero
from train.evaluate import evaluate

PHASES = ("data", "wait", "forward", "backward", "optimizer")
EVERY_STEP = {
    "step", "samples", "train/loss", "train/gradient_norm", "train/skipped_steps", "train/loss_spikes", "train/epoch",
    "lr/highest", "lr/lowest", "speed/images_per_second", "speed/images_per_second_per_gpu", "speed/tflops_per_gpu", "speed/mfu",
    "speed/step_ms", *(f"speed/{phase}_ms" for phase in PHASES), "speed/slowest_data_ms", "speed/slowest_forward_ms",
    "memory/peak_gb",
}  # fmt: skip
VALIDATION = {"val/miou", "val/macc", "val/aacc", "val/best_miou", "val/best_step"}


@pytest.fixture(scope="module")
def tracked(shards, tmp_path_factory) -> Run:
    """Of two processes, begun twice, with a validation on its way."""
    folder = tmp_path_factory.mktemp("tracked") / "run"
    settings = [
        "wandb.mode=offline", "evaluate.every_steps=3", "evaluate.pictures=3", "peak_tflops=0.05", "optimizer.layer_decay=0.5",
        "checkpoint.every_steps=2", zero(2, folder.parent),
    ]  # fmt: skip
    first = train(shards, folder, "schedule.steps=6", *settings, processes=2)
    assert first.code == 0, first.output
    again = train(shards, folder, "schedule.steps=8", *settings, processes=2)
    assert again.code == 0, again.output
    return again


def test_the_runs_file_holds_every_key(shards, tracked):
    classes = ShardSet.open(str(shards / "val")).label_set.classes
    first, second = wandb_file.offline_runs(tracked.folder)
    lines = wandb_file.history(first)
    steps = [line for line in lines if "train/loss" in line]
    assert [(line["step"], line["samples"]) for line in steps] == [(i, 8 * i + 8) for i in range(6)]
    for line in steps:
        assert line.keys() >= EVERY_STEP
        assert any(key.startswith("loss_per_class/") for key in line)
        assert line["lr/lowest"] == pytest.approx(line["lr/highest"] * 0.5**5)  # the tiny model's four blocks and embeddings
        assert sum(line[f"speed/{phase}_ms"] for phase in PHASES) <= line["speed/step_ms"] * 1.001
        assert line["speed/mfu"] == pytest.approx(line["speed/tflops_per_gpu"] / 0.05)
    assert {"checkpoint/stall_seconds", "checkpoint/write_seconds"} <= steps[-1].keys()
    hosts = {key.split("/")[1] for key in steps[0] if key.startswith("node/")}
    assert hosts == {os.uname().nodename} and f"node/{os.uname().nodename}/cpu_percent" in steps[1]
    scored = [line for line in lines if "val/miou" in line]
    assert [line["step"] for line in scored] == [2, 5]
    assert all(line.keys() >= VALIDATION | {f"iou/{name}" for name in classes} for line in scored)
    assert wandb_file.history(second)[0]["step"] == 6


def test_masks_tables_and_the_confusion_matrix_are_there(tracked):
    (first, _), (wandb, _) = wandb_file.offline_runs(tracked.folder), sorted((tracked.folder / "wandb").glob("offline-run-*"))
    shown = [line for line in wandb_file.history(first) if "val/examples" in line]
    assert len(shown) == 2
    for line in shown:
        for group in ("val/examples", "val/worst", "val/best"):
            pictures = line[group]
            assert pictures["count"] == 3 and len(pictures["all_masks"]) == 3
            assert all(masks.keys() == {"truth", "prediction"} for masks in pictures["all_masks"])
            paths = [masks[name]["path"] for masks in pictures["all_masks"] for name in masks] + pictures["filenames"]
            assert all((wandb / "files" / path).is_file() for path in paths)
        assert (wandb / "files" / line["val/classes"]["path"]).is_file()
    tables = [json.loads(path.read_text()) for path in (wandb / "files" / "media" / "table").rglob("*.table.json")]
    cells = [table for table in tables if table["columns"] == ["Actual", "Predicted", "nPredictions"]]
    scores = json.loads((tracked.folder / "validation" / "step_00000003" / "scores.json").read_text())
    counts = [sum(row[2] for row in table["data"]) for table in cells]
    assert sum(map(sum, scores["confusion"])) in counts and len(cells) == 2


def test_the_run_tells_what_it_was(tracked):
    first, second = wandb_file.offline_runs(tracked.folder)
    config = wandb_file.config(first)
    assert config["deepspeed_settings"]["zero_optimization"]["stage"] == 2 and config["model"]["arch"] == "tiny"
    revision = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
    assert config["revision"].removesuffix("-dirty") == revision
    ids = [record.run.run_id for run in (first, second) for record in run if record.HasField("run") and record.run.run_id]
    assert set(ids) == {(tracked.folder / "wandb_run_id").read_text()}
    best = wandb_file.summary(first)
    best = {key: value for key, value in best.items() if key.startswith("best/")}
    lines = [json.loads(line) for line in (tracked.folder / "metrics.jsonl").read_text().splitlines()]
    scores = {line["step"] + 1: line["val/miou"] for line in lines if "val/miou" in line and line["step"] < 6}
    assert best["best/miou"] == max(scores.values()) and scores[best["best/step"]] == best["best/miou"]


def test_the_disk_has_the_same_without_wandb(shards, tracked):
    lines = [json.loads(line) for line in (tracked.folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "train/loss" in line] == list(range(8))
    runs = wandb_file.offline_runs(tracked.folder)
    sent = {line["step"]: line for run in runs for line in wandb_file.history(run) if "train/loss" in line}
    for line in lines:
        if "train/loss" in line:
            assert {key: value for key, value in sent[line["step"]].items() if not key.startswith("_")} == line
    pictures = {path.stem for path in (tracked.folder / "validation" / "step_00000003").glob("*.png")}
    assert pictures == {"examples", "worst", "best"}
    scores = json.loads((tracked.folder / "validation" / "step_00000008" / "scores.json").read_text())
    model, _ = load_segmenter(tracked.folder / "model.safetensors")
    alone, shown = evaluate(model, ShardSet.open(str(shards / "val")), (32, 24), torch.device("cpu"), pictures=3)
    assert np.array_equal(scores["confusion"], alone.confusion)
    for name, images in shown.items():
        found = [(entry["key"], entry["miou"]) for entry in scores[name]]
        assert found == [(one.key, pytest.approx(one.miou)) for one in images] and len(found) == 3
    assert [one.miou for one in shown["worst"]] == sorted(one.miou for one in shown["worst"])
    assert shown["worst"][-1].miou <= shown["best"][-1].miou <= shown["best"][0].miou
    assert yaml.safe_load((tracked.folder / "config.yaml").read_text())["peak_tflops"] == 0.05
    about = json.loads((tracked.folder / "environment.json").read_text())
    assert about["processes"] == 2 and about["packages"]["torch"]


@pytest.fixture(scope="module")
def undisturbed(shards, tmp_path_factory) -> dict[int, float]:
    run = train(shards, tmp_path_factory.mktemp("undisturbed") / "run", "schedule.steps=90", "evaluate.every_steps=30")
    assert run.code == 0, run.output
    return run.losses


@pytest.mark.parametrize(("how", "words"), [("SIGKILL", "wandb failed, and will lack"), ("SIGSTOP", "wandb does not answer")])
def test_a_wandb_service_that_dies_or_sleeps_changes_nothing(shards, tmp_path, undisturbed, how, words):
    folder = tmp_path / "run"
    settings = ["schedule.steps=90", "evaluate.every_steps=30", "wandb.mode=offline", "wandb.finish_seconds=5"]
    with (tmp_path / "output.txt").open("w") as output:
        process = subprocess.Popen(
            train_command(shards, folder, *settings), cwd=ROOT, env=train_environment(), stdout=output, stderr=output
        )
    services = []
    try:
        wait_for_step(folder, 5, process)
        deadline = time.monotonic() + PATIENCE
        while not services:
            services = [p for p in psutil.Process(process.pid).children() if "wandb" in p.name()]
            assert time.monotonic() < deadline and process.poll() is None, "no service"
        os.kill(services[0].pid, getattr(signal, how))
        assert process.wait(PATIENCE) == 0, (tmp_path / "output.txt").read_text()
    finally:
        process.kill()
        for service in services:
            if service.is_running():
                service.kill()
    assert Run(0, "", folder).losses == undisturbed
    assert time.time() - (folder / "model.safetensors").stat().st_mtime < 20
    assert (folder / "log.txt").read_text().count(words) == 1


def test_a_folder_that_wandb_cannot_use_changes_nothing(shards, tmp_path, undisturbed):
    folder = tmp_path / "run"
    (folder / "wandb_run_id").mkdir(parents=True)  # a folder in the place of its file
    run = train(shards, folder, "schedule.steps=90", "evaluate.every_steps=30", "wandb.mode=offline")
    assert run.code == 0 and run.losses == undisturbed
    assert run.output.count("wandb failed, and will lack some of the run, which goes on: IsADirectoryError") == 1
