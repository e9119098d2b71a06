"""The average of the weights: what it does not disturb, and where it is used. That it is right: test_options.py."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from data.shards import ShardSet
from model.segmenter import build_segmenter
from model.weight_files import read_metadata, read_weights
from tests.conftest import Run, train
from train.engine import deepspeed
from train.evaluate import evaluate

SETTINGS = [
    "schedule.steps=6", "model.image_size=[16,16]", "optimizer.lr=5e-3", "ema.decay=0.9", "checkpoint.every_steps=2",
    "checkpoint.keep=3", "evaluate.pictures=0", "data.workers=0",
]  # fmt: skip


def miou(weights: dict[str, torch.Tensor], shards: Path, precision: str) -> float:
    model = build_segmenter("tiny", 19, (16, 16), 0).eval()
    model.load_state_dict(weights)
    model = model.to(torch.bfloat16 if precision == "bf16" else torch.float32)
    return evaluate(model, ShardSet.open(str(shards / "val")), (16, 16), torch.device("cpu"), batch_size=16)[0].miou


def recorded_mious(run: Run) -> dict[int, float]:
    lines = [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]
    return {line["step"] + 1: line["val/miou"] for line in lines if "val/miou" in line}


@pytest.mark.parametrize(
    ("stage", "precision", "processes", "freeze"),
    [(0, "fp32", 1, "null"), (1, "bf16", 1, "backbone"), (2, "bf16", 1, "null"), (3, "bf16", 2, "1")],
)
def test_a_run_is_the_same_resumed_and_validated(shards, tmp_path, monkeypatch, stage, precision, processes, freeze):
    settings = [*SETTINGS, f"deepspeed=ds_configs/zero{stage}.json", f"precision={precision}", f"model.freeze={freeze}"]
    whole = train(shards, tmp_path / "whole", *settings, processes=processes)
    assert whole.code == 0, whole.output
    again_folder = tmp_path / "again"
    shutil.copytree(tmp_path / "whole", again_folder)
    for step in (4, 6):
        shutil.rmtree(again_folder / "checkpoints" / f"step_{step:08d}")
    again = train(shards, again_folder, *settings, "evaluate.every_steps=4", processes=processes)
    assert again.code == 0, again.output
    recorded = recorded_mious(again)
    assert "resumed at step 2" in again.output and list(recorded) == [4, 6]
    assert again.losses == whole.losses
    ours, theirs = (pieces(folder / "checkpoints" / "step_00000006") for folder in (again_folder, whole.folder))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)
    kinds = {"weight", "exp_avg", "exp_avg_sq", "average"} | ({"frozen"} if freeze != "null" else set())
    assert {key.split("/")[0] for key in ours} == kinds
    for name in ("model", "model_raw"):
        files = (read_weights(folder / f"{name}.safetensors") for folder in (again_folder, whole.folder))
        assert all(torch.equal(weight, other) for weight, other in zip(*map(dict.values, files), strict=True))
    average, weights = (read_weights(again_folder / f"{name}.safetensors") for name in ("model", "model_raw"))
    if stage == 3:  # DeepSpeed's linear layer there rounds once more, before it adds the bias
        monkeypatch.setattr(torch.nn.functional, "linear", deepspeed.runtime.zero.linear.zero3_linear_wrap)
    assert miou(average, shards, precision) == pytest.approx(recorded[6], abs=1e-4)
    assert miou(weights, shards, precision) != pytest.approx(recorded[6], abs=3e-4)
    assert [read_metadata(again_folder / f"{name}.safetensors")["ema_decay"] for name in ("model", "model_raw")] == [0.9, None]
    if stage == 0:
        check_first_validation(again_folder / "checkpoints" / "step_00000004", recorded[4], shards)


def pieces(checkpoint: Path) -> dict[str, torch.Tensor]:
    files = sorted(checkpoint.glob("rank_*.safetensors"))
    return {key: piece for file in files for key, piece in load_file(file).items()}


def check_first_validation(checkpoint: Path, recorded: float, shards: Path) -> None:
    model = build_segmenter("tiny", 19, (16, 16), 0)
    saved = pieces(checkpoint)
    average, weights = (
        {name: saved[f"{kind}/{name}/0"].view_as(p) for name, p in model.named_parameters()} for kind in ("average", "weight")
    )
    assert miou(average, shards, "fp32") == pytest.approx(recorded, abs=1e-4)
    assert miou(weights, shards, "fp32") != pytest.approx(recorded, abs=3e-4)


def test_what_a_checkpoint_must_share(shards, tmp_path):
    settings = ["schedule.steps=2", "ema.decay=0.9", f"output_dir={tmp_path}"]
    first = train(shards, tmp_path, *settings)
    assert first.code == 0, first.output
    other = train(shards, tmp_path, *settings, "model.freeze=backbone", "ema.decay=0.99")
    assert other.code == 1 and "Traceback" not in other.output
    assert "freeze was None, is backbone; ema_decay was 0.9, is 0.99; restore the setting" in other.output
