"""Whole runs: real processes, real DeepSpeed, small."""

import json
import os
import signal
import subprocess
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch

from data.loader import TrainExamples, train_batches
from data.mixture import Mixture
from data.order import BatchPlan
from model.segmenter import build_segmenter
from model.trained import load_segmenter
from model.weight_files import read_weights
from tests.conftest import ROOT, train, train_command, train_environment, wait_for_step
from train.config import load_config
from train.loss import PixelLoss, class_weights
from train.optim import build_optimizer, lr_factor, parameter_groups, set_lr
from train.track import _drop_after

STEPS = [
    "schedule.steps=20", "schedule.warmup_steps=5", "optimizer.lr=2e-3", "optimizer.layer_decay=0.8",
    "checkpoint.every_steps=20", "model.dropout=0.1", "augment.scale=[0.5,2]", "augment.rotate_probability=0.5",
    "augment.photometric=true",
]  # fmt: skip


def plain_losses(shards: Path, folder: Path) -> dict[int, float]:
    """The same experiment as one plain PyTorch loop over whole global batches."""
    command = train_command(shards, folder, *STEPS)
    config = load_config(Path("train/configs/demo.yaml"), [a for a in command if "=" in a])
    train_set = Mixture.open(config.data.train)
    torch.manual_seed(config.seed)
    spec = config.model
    model = build_segmenter(spec.arch, 19, spec.image_size, spec.patch_padding, dropout=spec.dropout)
    optimizer = build_optimizer(parameter_groups(model, config.optimizer), config.optimizer, on_gpu=False)
    loss = PixelLoss(class_weights("auto", train_set.pixel_counts, train_set.label_set), train_set.label_set)
    examples = TrainExamples(train_set, train_set.order(config.seed), spec.image_size, config.augment)
    losses = {}
    for step, (batch,) in enumerate(train_batches(examples, BatchPlan(8, 8, 0, 1), 0, 20, 0)):
        set_lr(optimizer, config.optimizer.lr, lr_factor(step, 20, config.schedule))
        value = loss.share(model(batch.images, batch.seeds), batch.labels, loss.totals(batch.pixel_counts))
        optimizer.zero_grad()
        value.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.optimizer.clip_norm)
        optimizer.step()
        losses[step] = value.item()
    return losses


@pytest.fixture(scope="module")
def reference(shards, tmp_path_factory) -> np.ndarray:
    return np.array(list(plain_losses(shards, tmp_path_factory.mktemp("plain")).values()))


@pytest.mark.parametrize(
    ("stage", "processes", "micro", "recompute"),
    [
        (0, 1, 4, False), (0, 2, 4, True), (1, 1, 4, False), (1, 2, 4, False), (2, 1, 4, False), (2, 2, 4, True),
        (3, 1, 4, False), (3, 2, 4, True), (2, 2, 1, False), (1, 1, 8, False),
    ],
)  # fmt: skip
def test_losses_equal_plain_pytorch(shards, tmp_path, reference, stage, processes, micro, recompute):
    """Accumulation is 8 / (processes x micro): 1, 2 or 4. Dropout and all augmentation are on."""
    run = train(
        shards, tmp_path, *STEPS, f"deepspeed=ds_configs/zero{stage}.json", f"micro_batch_size={micro}",
        f"model.recompute={recompute}", processes=processes,
    )  # fmt: skip
    assert run.code == 0, run.output
    difference = np.abs(np.array(list(run.losses.values())) - reference).max()
    print(f"ZeRO-{stage}, {processes} processes, micro batch {micro}: largest loss difference {difference:.1e}")
    assert len(run.losses) == 20 and difference < 2e-5
    model, metadata = load_segmenter(tmp_path / "model.safetensors")
    assert metadata["arch"] == "tiny" and metadata["label_set"]["flip_pairs"] == [[3, 4], [5, 6], [7, 8]]
    assert metadata["step"] == 20 and model.num_classes == 19 and len(metadata["revision"]) >= 40
    assert metadata["normalization"]["mean"] == [123.675, 116.28, 103.53] and metadata["patch_padding"] == 0
    assert all(torch.isfinite(p).all() for p in model.parameters())


@pytest.mark.parametrize("stage", [0, 1, 3])
def test_bf16_learns_the_same(shards, tmp_path, reference, stage):
    run = train(shards, tmp_path, *STEPS, f"deepspeed=ds_configs/zero{stage}.json", "precision=bf16")
    assert run.code == 0, run.output
    losses = np.array(list(run.losses.values()))
    assert 0 < np.abs(losses - reference).max() < 0.05


@pytest.mark.parametrize("stage", [0, 1])
def test_what_is_not_finite_ends_the_run(shards, tmp_path, stage):
    run = train(shards, tmp_path, "schedule.steps=9", "optimizer.lr=1e30", f"deepspeed=ds_configs/zero{stage}.json")
    assert run.code != 0 and "not finite" in run.output and "Traceback" not in run.output
    assert "not finite" in (tmp_path / "log.txt").read_text()
    assert not (tmp_path / "model.safetensors").exists()


@pytest.mark.parametrize(("stage", "processes"), [(1, 2), (3, 1)])
def test_killed_run_continues_as_if_it_had_not_been(shards, tmp_path, stage, processes):
    settings = [
        "model.dropout=0.1", "augment.photometric=true", "schedule.steps=14", "schedule.warmup_steps=2",
        "checkpoint.every_steps=4", "data.workers=1", f"deepspeed=ds_configs/zero{stage}.json",
    ]  # fmt: skip
    whole = train(shards, tmp_path / "whole", *settings, processes=processes)
    assert whole.code == 0, whole.output
    killed_folder = tmp_path / "killed"
    command = train_command(shards, killed_folder, *settings, processes=processes)
    process = subprocess.Popen(
        command, cwd=ROOT, env=train_environment(), start_new_session=True, stdout=subprocess.DEVNULL
    )
    wait_for_step(killed_folder, 6, process)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait(10)
    (killed_folder / "checkpoints" / "unfinished_step_00000008").mkdir(exist_ok=True)
    again = train(shards, killed_folder, *settings, processes=processes)
    assert again.code == 0, again.output
    assert "resumed at step" in again.output
    assert again.losses == whole.losses
    ours, theirs = (read_weights(folder / "model.safetensors") for folder in (killed_folder, tmp_path / "whole"))
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    kept = sorted(path.name for path in (killed_folder / "checkpoints").glob("step_*"))
    assert kept == ["step_00000012", "step_00000014"]


def test_resume_from_another_run_and_what_may_not_change(shards, tmp_path):
    first = train(shards, tmp_path / "a", "schedule.steps=4", "checkpoint.every_steps=2")
    assert first.code == 0, first.output
    longer = train(shards, tmp_path / "b", "schedule.steps=6", f"resume_from={tmp_path / 'a'}")
    assert longer.code == 0, longer.output
    assert list(longer.losses) == [4, 5]
    refused = train(shards, tmp_path / "c", "schedule.steps=6", f"resume_from={tmp_path / 'a'}", "seed=9", "data.window=5")
    assert refused.code != 0 and "Traceback" not in refused.output
    assert "seed was 0, is 9" in refused.output and "window was None, is 5" in refused.output
    going_back = train(shards, tmp_path / "a", "schedule.steps=6", f"resume_from={tmp_path / 'a/checkpoints/step_00000002'}")
    assert going_back.code != 0 and "not the newest of output_dir, which is step_00000004" in going_back.output
    passed_over = train(shards, tmp_path / "b", "schedule.steps=6", f"resume_from={tmp_path / 'a'}")
    assert passed_over.code == 0 and "resume_from is passed over" in passed_over.output


def test_load_from_takes_weights_only(shards, tmp_path):
    first = train(shards, tmp_path / "a", "schedule.steps=3")
    assert first.code == 0, first.output
    second = train(
        shards, tmp_path / "b", "schedule.steps=2", "evaluate.every_steps=1",
        f"load_from={tmp_path / 'a' / 'model.safetensors'}",
    )  # fmt: skip
    assert second.code == 0, second.output
    assert list(second.losses) == [0, 1] and second.losses[0] < first.losses[0]
    _, metadata = load_segmenter(tmp_path / "b" / "model.safetensors")
    assert metadata["origin"]["weights"] == "model.safetensors" and len(metadata["origin"]["sha256"]) == 64
    lines = [json.loads(line) for line in (tmp_path / "b" / "metrics.jsonl").read_text().splitlines()]
    assert sum("val/miou" in line for line in lines) == 2
    assert len(list((tmp_path / "b" / "pictures").glob("*.png"))) == 2


@pytest.mark.parametrize("whom", ["launcher", "child"])
def test_no_rank_outlives_its_launcher(shards, tmp_path, whom):
    """SIGTERM to `deepspeed`, or SIGKILL to its launch.py, leaves the ranks to themselves: they must go too."""
    process = subprocess.Popen(
        train_command(shards, tmp_path, "schedule.steps=100000", processes=2),
        cwd=ROOT, env=train_environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    wait_for_step(tmp_path, 2, process)
    family = psutil.Process(process.pid).children(recursive=True)
    assert len(family) >= 3
    if whom == "launcher":
        process.terminate()
    else:
        next(p for p in family if "deepspeed.launcher.launch" in p.cmdline()).kill()
    gone, alive = psutil.wait_procs(family, timeout=15)
    process.wait(10)
    for straggler in alive:
        straggler.kill()
    assert not alive


def test_wandb_offline_and_a_failing_one(shards, tmp_path):
    run = train(shards, tmp_path / "on", "schedule.steps=2", "wandb.mode=offline")
    assert run.code == 0, run.output
    assert list((tmp_path / "on" / "wandb").glob("offline-run-*/*.wandb"))
    (tmp_path / "off").mkdir()
    (tmp_path / "off" / "wandb_run_id").mkdir()  # a folder in the place of its file
    failing = train(shards, tmp_path / "off", "schedule.steps=2", "wandb.mode=offline")
    assert failing.code == 0 and "wandb.init failed and is passed over" in failing.output
    assert failing.losses == run.losses


def test_the_record_is_cut_beside_and_renamed(tmp_path):
    """A run killed in the midst of it would else have lost all of its record."""
    path, before = tmp_path / "metrics.jsonl", tmp_path / "before"
    path.write_text('{"step": 0}\n{"step": 1}\n{"step": 2}\n{"st')
    os.link(path, before)
    _drop_after(path, 2)
    assert path.read_text() == '{"step": 0}\n{"step": 1}\n'
    assert before.read_text().endswith('{"st') and len(list(tmp_path.iterdir())) == 2
