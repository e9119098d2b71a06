"""A run that is killed twenty times, wherever it is, is the run that was left in peace."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from model.weight_files import read_weights
from tests.conftest import PATIENCE, ROOT, Run, experiment, train_environment, zero

SETTINGS = [
    "global_batch_size=12", "schedule.steps=60", "checkpoint.every_steps=2", "evaluate.every_steps=3",
    "evaluate.pictures=0", "data.workers=1", "ema.decay=0.9", "augment.photometric=true", "model.dropout=0.1",
    "optimizer.lr=1e-3",  # the more is learnt, the farther apart what other worlds round otherwise
]  # fmt: skip


def killed_run(shards: Path, folder: Path, worlds: list[int], kills: int, stage: int, micro: int) -> tuple[Run, list[dict]]:
    folder.mkdir()
    job = experiment(shards, folder / "run", *SETTINGS, f"micro_batch_size={micro}", zero(stage, folder))
    plan = folder / "plan.json"
    plan.write_text(json.dumps({"job": job, "worlds": worlds, "kills": kills, "seed": 0}))
    done = subprocess.run(
        [sys.executable, "-m", "tests.killed_run", str(plan)],
        cwd=ROOT, env=train_environment(), timeout=PATIENCE, text=True, capture_output=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return Run(0, done.stderr, folder / "run"), [json.loads(line) for line in done.stdout.splitlines()]


def batches(folder: Path) -> dict[int, set[tuple[str, ...]]]:
    """Of each step the global batches that were ever trained on."""
    parts: dict[tuple[int, int], dict[int, list[list[str]]]] = {}
    for path in folder.glob("batches_*.jsonl"):
        for text in path.read_text().splitlines():
            if text.endswith("}"):  # else cut short by a kill
                line = json.loads(text)
                parts.setdefault((line["step"], line["world"]), {}).setdefault(line["rank"], []).append(line["samples"])
    found: dict[int, set[tuple[str, ...]]] = {}
    for (step, world), ranks in parts.items():
        if len(ranks) == world:  # the others were killed before
            assert all(samples == ranks[rank][0] for rank in ranks for samples in ranks[rank]), (step, world)
            found.setdefault(step, set()).add(tuple(sorted(sample for rank in ranks for sample in ranks[rank][0])))
    return found


@pytest.mark.parametrize(("worlds", "stage", "micro"), [([2], 3, 3), ([1, 3, 2, 4], 1, 1)])
def test_kills_change_nothing(shards, tmp_path, worlds, stage, micro):
    whole, _ = killed_run(shards, tmp_path / "whole", worlds[:1], 0, stage, micro)
    killed, kills = killed_run(shards, tmp_path / "killed", worlds, 20, stage, micro)
    print(kills)
    assert len(kills) == 20
    for where in ("saving", "evaluation"):  # a save of these few weights may be over before the signal is there
        assert any(kill[where] for kill in kills if kill["where"] == where), where
    assert killed.output.count("resumed at step") > 5
    expected, found = batches(whole.folder), batches(killed.folder)
    assert expected.keys() == found.keys() == set(range(60))
    assert all(found[step] == expected[step] and len(found[step]) == 1 for step in expected)
    assert killed.losses.keys() == whole.losses.keys()
    apart = max(abs(loss / whole.losses[step] - 1) for step, loss in killed.losses.items())
    print(f"worlds {worlds}, ZeRO-{stage}: largest relative loss difference {apart:.1e}")
    assert apart <= (0 if len(worlds) == 1 else 1e-5)
    if len(worlds) == 1:
        ours, theirs = (read_weights(run.folder / "model.safetensors") for run in (killed, whole))
        assert all((ours[key] == theirs[key]).all() for key in theirs)
