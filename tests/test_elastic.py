"""Checkpoints are of no world: saved by two processes at one ZeRO stage, they go on with any number, at any other."""

import json
import os
import shutil
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file, save_file

from model.weight_files import read_weights
from tests.conftest import Run, experiment, recorded_runs, train, zero
from train import TrainError, checkpoint
from train.checkpoint import Entry

SETTINGS = [
    "global_batch_size=12", "micro_batch_size=1", "schedule.steps=6", "schedule.warmup_steps=2", "optimizer.lr=2e-3",
    "optimizer.layer_decay=0.8", "checkpoint.every_steps=2", "checkpoint.keep=5", "ema.decay=0.9", "model.freeze=1",
    "augment.photometric=true", "model.dropout=0.1", "evaluate.pictures=0",
]  # fmt: skip
STAGES = (0, 1, 2, 3)
# Pairs of stages by the number of processes that go on.
OFFLOADED = {
    1: [("3_offload", 2)], 2: [("2_offload", "2_offload"), ("3_offload", "3_offload")],
    3: [("2_offload", "3_offload"), ("3_offload", "2_offload")], 4: [(1, "3_offload")],
}  # fmt: skip


@pytest.fixture(scope="module")
def saved(shards, once) -> dict[int | str, Run]:
    """The whole run at each stage, in two processes; and in bf16 at 10 + stage."""
    stages = (*STAGES, "2_offload", "3_offload")

    def make(folder: Path) -> None:
        jobs = {str(s): experiment(shards, folder / str(s), *SETTINGS, zero(s, folder)) for s in stages}
        for s in STAGES:
            jobs[str(10 + s)] = experiment(shards, folder / str(10 + s), *SETTINGS, zero(s, folder), "precision=bf16")
        recorded_runs(jobs, folder, processes=2)

    folder = once("saved", make)
    return {name: Run(0, "", folder / str(name)) for name in (*stages, *(10 + s for s in STAGES))}


@pytest.mark.parametrize("processes", [2, 3])
def test_goes_on_in_bf16(shards, tmp_path, saved, processes):
    jobs = {
        str(stage): experiment(
            shards, tmp_path / str(stage), *SETTINGS, zero(stage, tmp_path), "precision=bf16",
            f"resume_from={saved[10 + stage].folder / 'checkpoints/step_00000002'}",
        )
        for stage in STAGES
    }  # fmt: skip
    for name, run in recorded_runs(jobs, tmp_path, processes).items():
        whole = saved[10 + int(name)]
        apart = max(abs(loss / whole.losses[step] - 1) for step, loss in run.losses.items())
        print(f"2 -> {processes} processes, ZeRO-{name} in bf16: largest relative loss difference {apart:.1e}")
        assert list(run.losses) == [2, 3, 4, 5] and apart <= (0 if processes == 2 else 1e-3), name


@pytest.mark.parametrize("processes", [1, 2, 3, 4])
def test_goes_on_in_other_worlds_and_at_other_stages(shards, tmp_path, saved, processes):
    jobs = {
        f"{was}-{now}": experiment(
            shards, tmp_path / f"{was}-{now}", *SETTINGS, zero(now, tmp_path),
            f"resume_from={saved[was].folder / 'checkpoints/step_00000002'}",
        )
        for was, now in [*((s, s) for s in STAGES), *((s, (s + processes - 1) % 4) for s in STAGES), *OFFLOADED[processes]]
    }  # fmt: skip
    for name, run in recorded_runs(jobs, tmp_path, processes).items():
        was = name.partition("-")[0]
        whole = saved[int(was) if was.isdigit() else was]
        assert list(run.losses) == [2, 3, 4, 5], name
        apart = max(abs(loss / whole.losses[step] - 1) for step, loss in run.losses.items())
        print(f"2 -> {processes} processes, ZeRO {name}: largest relative loss difference {apart:.1e}")
        assert apart < 1e-5, name
        for file in ("model", "model_raw"):
            ours, theirs = (read_weights(folder / f"{file}.safetensors") for folder in (run.folder, whole.folder))
            for key, weight in theirs.items():
                if key != "decode_head.conv_layers.0.bias":  # a norm follows: its gradient is rounding noise
                    np.testing.assert_allclose(ours[key], weight, atol=2e-5, err_msg=f"{name} {file} {key}")


@pytest.mark.skipif(not os.environ.get("TEST_NVME"), reason="TEST_NVME=1, with DeepSpeed's async_io compiled: docs/choosing.md")
def test_an_optimizer_on_nvme_goes_on_as_one_in_memory(shards, tmp_path):
    (tmp_path / "nvme").mkdir()
    jobs = {
        name: experiment(
            shards, tmp_path / name, *SETTINGS, "ema.decay=null", "schedule.steps=4", zero(stage, tmp_path),
            *([f"resume_from={tmp_path / start / 'checkpoints/step_00000002'}"] if start else []),
        )
        for name, stage, start in (
            ("memory", "3_offload", None), ("nvme", "3_nvme", None), ("to", "3_nvme", "memory"), ("from", "3_offload", "nvme")
        )
    }  # fmt: skip
    runs = recorded_runs(jobs, tmp_path, processes=2)
    assert list((tmp_path / "nvme").rglob("optimizer/rank1"))
    expected = read_weights(runs["memory"].folder / "model.safetensors")
    for name, run in runs.items():
        assert run.losses == {step: runs["memory"].losses[step] for step in run.losses} and len(run.losses) > 1, name
        found = read_weights(run.folder / "model.safetensors")
        assert all((found[key] == weight).all() for key, weight in expected.items()), name


def test_a_damaged_checkpoint_is_passed_over(shards, tmp_path, saved):
    folder = tmp_path / "run"
    shutil.copytree(saved[1].folder, folder)
    newest, before = (folder / "checkpoints" / f"step_{step:08d}" for step in (6, 4))
    with (newest / "rank_00001.safetensors").open("r+b") as file:
        file.seek(-5, 2)
        file.write(b"\0\1\2")
    (folder / "checkpoints" / "step_00000007").mkdir()
    again = train(shards, folder, *SETTINGS, zero(1, tmp_path))
    assert again.code == 0, again.output
    assert "step_00000006: damaged: rank_00001.safetensors; passed over" in again.output
    assert "step_00000007: incomplete, passed over" in again.output
    assert f"resumed at step 4 from {before}" in again.output
    for path in (folder / "checkpoints").glob("step_*/rank_00000.safetensors"):
        with path.open("r+b") as file:
            file.truncate(1000)
    kept = sorted((folder / "checkpoints").iterdir())
    over_it = train(shards, folder, *SETTINGS)
    assert over_it.code == 1 and "none of the checkpoints is complete" in over_it.output and "Traceback" not in over_it.output
    assert sorted((folder / "checkpoints").iterdir()) == kept
    nothing = train(shards, tmp_path / "other", *SETTINGS, f"resume_from={folder}")
    assert nothing.code == 1 and "holds no complete checkpoint" in nothing.output and "Traceback" not in nothing.output


def test_damaged_ones_take_no_sound_ones_place(saved, tmp_path):
    source = saved[1].folder / "checkpoints" / "step_00000002"
    state, _ = checkpoint.read(source)
    for step in (2, 3, 4, 6, 8):
        shutil.copytree(source, tmp_path / checkpoint.name(step))
    checkpoint.prune(tmp_path, 2, replace(state, step=4, best_step=None))
    assert sorted(int(path.name[5:]) for path in tmp_path.iterdir()) == [3, 4, 6, 8]
    checkpoint.prune(tmp_path, 1, replace(state, step=8, best_step=3))
    assert sorted(int(path.name[5:]) for path in tmp_path.iterdir()) == [3, 8]


@pytest.mark.parametrize("content", ["{", '{"run": {"step": 3}, "files": {}}'])
def test_checkpoints_of_other_versions_are_not_begun_anew(shards, saved, tmp_path, content):
    shutil.copytree(saved[1].folder, tmp_path / "run")
    for path in (tmp_path / "run").rglob("run.json"):
        path.write_text(content)
    with pytest.raises(TrainError, match="none of the checkpoints is complete" if content == "{" else "another version"):
        checkpoint.sources(tmp_path / "run", None)


def test_what_is_missing_is_named(shards, tmp_path, saved):
    folder = tmp_path / "run"
    shutil.copytree(saved[2].folder, folder)
    path = folder / "checkpoints" / "step_00000006"
    pieces = load_file(path / "rank_00000.safetensors")
    missing = next(key for key in pieces if key.startswith("exp_avg/"))
    pieces.pop(missing)
    save_file(pieces, path / "rank_00000.safetensors")
    meta = json.loads((path / "run.json").read_text())
    meta["files"]["rank_00000.safetensors"] = asdict(Entry.of(path / "rank_00000.safetensors"))
    (path / "run.json").write_text(json.dumps(meta))
    again = train(shards, folder, *SETTINGS, "schedule.steps=7", zero(2, tmp_path))
    assert again.code == 1 and f"lacks exp_avg of {missing.split('/')[1]} from element" in again.output
