"""Whole runs: real processes, real DeepSpeed, small."""

import json
import os

import pytest

from model.trained import load_segmenter
from tests.conftest import train, zero
from train.track import _drop_after


@pytest.mark.parametrize(("stage", "precision"), [(0, "fp32"), (2, "bf16")])
def test_what_is_not_finite_ends_the_run(shards, tmp_path, stage, precision):
    settings = [
        "schedule.steps=9",
        "optimizer.lr=1e30",
        "checkpoint.every_steps=1",
        "checkpoint.keep=9",
        "guard.skipped_in_a_row=2",
        f"precision={precision}",
    ]
    run = train(shards, tmp_path / "run", *settings, zero(stage, tmp_path))
    assert run.code != 0 and "not finite" in run.output and "Traceback" not in run.output
    assert "passed over, 2 so far, 2 in a row" in run.output
    assert "not finite" in (tmp_path / "run" / "log.txt").read_text()
    assert not (tmp_path / "run" / "model.safetensors").exists()
    # The first step's gradients were sound, and spoilt the weights: nothing was saved after that.
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step_00000001"]


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


def test_what_deepspeed_refuses_is_told_in_a_line(shards, tmp_path):
    path = tmp_path / "zero.json"
    path.write_text('{"zero_optimization": {"stage": 2}, "comms_logger": {"verbose": "perhaps", "verbos": true}}')
    run = train(shards, tmp_path / "run", f"deepspeed={path}")
    assert run.code == 1 and f"{path}: DeepSpeed refuses " in run.output and "Traceback" not in run.output
    assert "comms_logger.verbose: Input should be a valid boolean" in run.output
    assert "comms_logger.verbos: Extra inputs" in run.output


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
    assert len(list((tmp_path / "b" / "validation").glob("step_*/examples.png"))) == 2


def test_the_record_is_cut_beside_and_renamed(tmp_path):
    """A run killed in the midst of it would else have lost all of its record."""
    path, before = tmp_path / "metrics.jsonl", tmp_path / "before"
    path.write_text('{"step": 0}\n{"step": 1}\n{"step": 2}\n{"st')
    os.link(path, before)
    _drop_after(path, 2)
    assert path.read_text() == '{"step": 0}\n{"step": 1}\n'
    assert before.read_text().endswith('{"st') and len(list(tmp_path.iterdir())) == 2
