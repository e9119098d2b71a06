"""The average of the weights: what it does not disturb, and where it is used. That it is right: test_options.py."""

import json
import shutil
from dataclasses import asdict, fields, replace
from pathlib import Path

import pytest
import torch

from data.shards import ShardSet
from model.segmenter import build_segmenter
from model.weight_files import read_metadata, read_weights
from tests.conftest import Run, train
from train import TrainError, checkpoint
from train.checkpoint import RunState
from train.config import OptimizerConfig, load_config
from train.deepspeed_config import resolve
from train.evaluate import evaluate
from train.optim import parameter_groups

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
def test_a_run_is_the_same_resumed_and_validated(shards, tmp_path, stage, precision, processes, freeze):
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
    checkpoints = (whole.folder / "checkpoints", again_folder / "checkpoints")
    ours, theirs = (sorted(folder.glob("step_00000006/ema_rank_*.pt")) for folder in checkpoints)
    assert len(ours) == len(theirs) == processes
    for one, other in zip(ours, theirs, strict=True):
        assert all(map(torch.equal, torch.load(one), torch.load(other)))
    for name in ("model", "model_raw"):
        files = (read_weights(folder / f"{name}.safetensors") for folder in (again_folder, whole.folder))
        assert all(torch.equal(weight, other) for weight, other in zip(*map(dict.values, files), strict=True))
    average, weights = (read_weights(again_folder / f"{name}.safetensors") for name in ("model", "model_raw"))
    assert miou(average, shards, precision) == pytest.approx(recorded[6], abs=1e-4)
    assert miou(weights, shards, precision) != pytest.approx(recorded[6], abs=3e-4)
    assert [read_metadata(again_folder / f"{name}.safetensors")["ema_decay"] for name in ("model", "model_raw")] == [0.9, None]
    if stage == 0:
        check_first_validation(checkpoints[1] / "step_00000004", recorded[4], shards)


def check_first_validation(checkpoint: Path, recorded: float, shards: Path) -> None:
    model = build_segmenter("tiny", 19, (16, 16), 0)
    parameters = [p for group in parameter_groups(model, OptimizerConfig()) for p in group["params"]]
    with torch.no_grad():
        for parameter, value in zip(parameters, torch.load(checkpoint / "ema_rank_00000.pt"), strict=True):
            parameter.copy_(value)
    assert miou(model.state_dict(), shards, "fp32") == pytest.approx(recorded, abs=1e-4)
    weights = torch.load(checkpoint / "mp_rank_00_model_states.pt", weights_only=False)["module"]
    assert miou(weights, shards, "fp32") != pytest.approx(recorded, abs=3e-4)


def test_what_a_checkpoint_must_share(tmp_path):
    nothing = dict.fromkeys(field.name for field in fields(RunState))
    state = RunState(**nothing | {"step": 4, "total_steps": 8, "zero_stage": 0, "ema_decay": 0.9})
    (tmp_path / checkpoint.META).write_text(json.dumps(asdict(state)))
    with pytest.raises(TrainError, match="freeze was None, is backbone; ema_decay was 0.9, is 0.99; restore the setting"):
        checkpoint.load(None, tmp_path, replace(state, freeze="backbone", ema_decay=0.99))


def test_weights_on_nvme_are_refused(tmp_path):
    offload = {"device": "nvme", "nvme_path": str(tmp_path)}
    settings = {"zero_optimization": {"stage": 3, "offload_param": offload}, "bf16": {"enabled": "auto"}}
    (tmp_path / "ds.json").write_text(json.dumps(settings))
    demo = Path("train/configs/demo.yaml")
    resolve(load_config(demo, [f"deepspeed={tmp_path / 'ds.json'}"]), 1, on_gpu=True)
    with pytest.raises(TrainError, match=r"ds.json: offload_param: .*NVMe.*ema.decay=null"):
        resolve(load_config(demo, [f"deepspeed={tmp_path / 'ds.json'}", "ema.decay=0.999"]), 1, on_gpu=True)
