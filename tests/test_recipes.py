"""The experiments in train/configs: what they say, and that each one runs with each of ds_configs."""

import json
import os
import subprocess
import sys
from itertools import product
from pathlib import Path

import cv2
import numpy as np
import pytest
import yaml

from data import build_shards
from data.labels import load_label_set
from data.mixture import Mixture
from data.shards import ShardSet
from model.weight_files import read_weights
from tests.conftest import ROOT, train_environment
from train.check import check
from train.config import load_config

RECIPES = {path.stem: path for path in sorted(Path("train/configs").glob("*.yaml"))}
DEEPSPEED = {path.stem: path for path in sorted(Path("ds_configs").glob("*.json"))}
RUNNABLE = [name for name in DEEPSPEED if name != "zero3_nvme"]  # which needs a disk and a library of its own
# Each recipe with two of them, in turn.
TRAINED = [(recipe, RUNNABLE[(i + there) % len(RUNNABLE)]) for i, recipe in enumerate(RECIPES) for there in (0, 3)]
LABEL_SETS = {"demo": "face19", "face": "face19", "lip": "lip20", "cihp": "cihp20", "goliath": "goliath28"}
V1_SIZES, V2_SIZES = ("0.3b", "0.6b", "1b", "2b"), ("0.1b", "0.4b", "0.8b", "1b", "5b")
# Small enough for a step in a tenth of a second; all else, and the deepspeed settings, are the recipe's.
SHRUNK = [
    "model.image_size=[32,24]", "global_batch_size=2", "micro_batch_size=1", "schedule.epochs=null", "schedule.steps=2",
    "schedule.warmup_steps=1", "data.workers=0", "log_every=1", "evaluate.pictures=0", "wandb.mode=disabled",
]  # fmt: skip


def label_set_of(recipe: str) -> str:
    data = recipe.rpartition("_")[0] or recipe
    return LABEL_SETS.get(data, data)


def draw_shards(folder: Path, label_set: str, count: int) -> Path:
    """Shards of `count` noisy pictures of 48x36 pixels, whose masks are 6x6 patches of the label set's classes."""
    classes = load_label_set(label_set).num_classes
    for name in ("images", "masks"):
        (folder / name).mkdir(parents=True)
    for i in range(count):
        rng = np.random.default_rng(i)
        mask = rng.integers(0, classes, (8, 6), np.uint8).repeat(6, axis=0).repeat(6, axis=1)
        cv2.imwrite(str(folder / "images" / f"{i}.png"), rng.integers(0, 256, (*mask.shape, 3), np.uint8))
        cv2.imwrite(str(folder / "masks" / f"{i}.png"), mask)
    arguments = ["--dataset", "pairs", "--root", folder, "--label-set", label_set, "--out", folder / "shards", "--workers", 1]
    assert build_shards.main([*map(str, arguments), "--val-fraction", "0.34"]) == 0
    return folder / "shards"


@pytest.fixture(scope="module")
def drawn(tmp_path_factory) -> dict[str, Path]:
    """Shards of each label set that a recipe is for: 4 samples to train with, 2 to validate."""
    return {name: draw_shards(tmp_path_factory.mktemp(name), name, 6) for name in sorted(set(map(label_set_of, RECIPES)))}


def command(recipe: str, deepspeed: str, shards: Path, *overrides: str) -> list[str]:
    return [
        str(RECIPES[recipe]), f"deepspeed={DEEPSPEED[deepspeed]}", f"data.val={shards / 'val'}",
        # As often as makes a data set of some thousands: a run must be longer than its warm-up.
        f"data.train=[{{path: {shards / 'train'}, weight: 1000}}]", *overrides,
    ]  # fmt: skip


def test_all_sizes_have_one():
    v1 = {f"{data}_{size}" for data in ("face", "lip", "cihp", "goliath") for size in V1_SIZES}
    assert set(RECIPES) == v1 | {f"sapiens2_29_{size}" for size in V2_SIZES} | {"demo"}
    for name, path in RECIPES.items():
        config, size = load_config(path, []), name.rpartition("_")[2]
        assert name == "demo" or config.model.arch in (f"sapiens_{size}", f"sapiens2_{size}")
        assert name == "demo" or str(config.output_dir) == f"outputs/{name}"
        assert config.data.train[0].path.startswith("outputs/demo" if name == "demo" else f"shards/{name.rpartition('_')[0]}/")


@pytest.mark.parametrize("size", V1_SIZES)
@pytest.mark.parametrize(
    ("data", "epochs", "decay", "scale", "padding", "weights"),
    [
        ("face", 200, "linear", (0.2, 2.0), 0, "none"),
        ("goliath", 200, "linear", (0.2, 2.0), 0, "label_set"),
        ("lip", 400, "cosine", (0.75, 1.25), 2, "label_set"),
        ("cihp", 400, "linear", (0.75, 1.25), 2, "label_set"),
    ],
)
def test_numbers_of_sapiens(data, size, epochs, decay, scale, padding, weights):
    config = load_config(RECIPES[f"{data}_{size}"], [])
    assert (config.global_batch_size, config.micro_batch_size) == (2 * 8 * 4, 2)
    assert config.optimizer.model_dump() == {
        "lr": 5e-4, "betas": (0.9, 0.999), "weight_decay": 0.1, "layer_decay": 0.85, "clip_norm": 1.0
    }  # fmt: skip
    assert config.schedule.model_dump() == {
        "epochs": epochs, "steps": None, "warmup_steps": 400, "warmup_factor": 1e-3, "decay": decay
    }  # fmt: skip
    assert (config.augment.scale, config.augment.max_class_share, config.augment.rotate_degrees) == (scale, 0.75, 45)
    assert (config.model.image_size, config.model.patch_padding, config.model.dropout) == ((1024, 768), padding, 0.1)
    assert (config.loss.class_weights, config.loss.dice) == (weights, 0)


@pytest.mark.parametrize(
    ("size", "batch", "steps", "layer_decay", "clip"),
    [
        ("0.4b", 12 * 8, 20000, 0.80, 2),
        ("0.8b", 5 * 16, 30000, 0.85, 4),
        ("1b", 8 * 8, 20000, 0.90, 4),
        ("5b", 4 * 8, 50000, 0.94, 4),
    ],
)
def test_numbers_of_sapiens2(size, batch, steps, layer_decay, clip):
    config = load_config(RECIPES[f"sapiens2_29_{size}"], [])
    assert config.global_batch_size == batch
    assert config.optimizer.model_dump() == {
        "lr": 5e-4, "betas": (0.9, 0.999), "weight_decay": 0.1, "layer_decay": layer_decay, "clip_norm": clip
    }  # fmt: skip
    assert config.schedule.model_dump() == {
        "epochs": None, "steps": steps, "warmup_steps": 500, "warmup_factor": 1e-3, "decay": "linear_after_warmup"
    }  # fmt: skip
    assert (config.augment.scale, config.augment.rotate_degrees, config.model.patch_padding) == ((0.4, 2.0), 60, None)
    assert (config.loss.class_weights, config.loss.dice, config.model.rope_precision) == ("label_set", 1, "bf16")


def test_big_ones_recompute_and_shard_more():
    chosen = {}
    for path in RECIPES.values():
        config = load_config(path, [])
        chosen.setdefault((config.deepspeed.stem, config.model.recompute), set()).add(config.model.arch)
    assert chosen == {
        ("zero1", "none"): {"tiny", "sapiens_0.3b", "sapiens_0.6b", "sapiens2_0.1b", "sapiens2_0.4b"},
        ("zero1", "blocks"): {"sapiens2_0.8b"},
        ("zero2", "blocks"): {"sapiens_1b", "sapiens_2b", "sapiens2_1b"},
        ("zero3", "blocks"): {"sapiens2_5b"},
    }


@pytest.mark.parametrize("recipe", RECIPES)
def test_passes_the_check_with_all_deepspeed_settings(drawn, recipe):
    """With the recipe's own architecture, batch and schedule, on one GPU and on all of a machine's."""
    for deepspeed, processes in product(DEEPSPEED, (1, 2 if recipe == "demo" else 8)):
        path, *overrides = command(recipe, deepspeed, drawn[label_set_of(recipe)])
        config = load_config(Path(path), overrides)
        settings = check(config, Mixture.open(config.data.train), ShardSet.open(config.data.val), processes, on_gpu=True)
        assert deepspeed.startswith(f"zero{settings['zero_optimization']['stage']}")
        assert settings["train_batch_size"] == config.global_batch_size
        assert settings["gradient_accumulation_steps"] * config.micro_batch_size * processes == config.global_batch_size


def test_a_check_prints_all_and_allocates_nothing(drawn, tmp_path):
    """Of 5 billion parameters, which are 20 GB, in a process whose largest size is read afterwards."""
    path, *overrides = command("sapiens2_29_5b", "zero3", drawn["sapiens2_29"], f"output_dir={tmp_path / 'out'}")
    with (tmp_path / "printed").open("w+") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "train", "--check", "--config", path, *overrides],
            cwd=ROOT, env=train_environment() | {"WORLD_SIZE": "8"}, stdout=output,
        )  # fmt: skip
        _, status, used = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        output.seek(0)
        experiment, brace, settings = output.read().partition("{\n")
    assert process.returncode == 0
    assert used.ru_maxrss < 5e6, f"{used.ru_maxrss / 1e6:.1f} GB"  # kB; it counts this process, which it was forked from
    assert yaml.safe_load(experiment) == load_config(Path(path), overrides).model_dump(mode="json")
    assert "base" not in yaml.safe_load(experiment) and '"auto"' not in settings
    assert json.loads(brace + settings)["gradient_accumulation_steps"] == 1
    assert not (tmp_path / "out").exists()


@pytest.fixture(scope="module")
def runs(drawn, tmp_path_factory) -> dict[str, tuple[int, str, Path]]:
    """Two steps of each of TRAINED, in two processes: exit code, output, folder."""
    out = tmp_path_factory.mktemp("runs")
    jobs = {
        f"{recipe}-{deepspeed}": command(
            recipe, deepspeed, drawn[label_set_of(recipe)], *SHRUNK, f"output_dir={out / recipe / deepspeed}",
            f"model.arch={'tiny2' if recipe.startswith('sapiens2') else 'tiny'}",
        )
        for recipe, deepspeed in TRAINED
    }  # fmt: skip
    shares = []
    for i in range(2):
        path = out / f"{i}.json"
        path.write_text(json.dumps(dict(list(jobs.items())[i::2])))
        with path.with_suffix(".jsonl").open("w") as output:  # not a pipe, which would fill up while the other is waited for
            process = subprocess.Popen(
                [sys.executable, "-m", "tests.run_recipes", str(path)],
                cwd=ROOT, env=train_environment(), stdout=output,
            )  # fmt: skip
        shares.append(process)
    for process in shares:
        process.wait()
    lines = [line for path in out.glob("*.jsonl") for line in path.read_text().splitlines()]
    results = {name: (code, output) for name, code, output in map(json.loads, lines)}
    return {name: (*results.get(name, (-1, "was not tried")), out.joinpath(*name.rsplit("-", 1))) for name in jobs}


@pytest.mark.parametrize("name", [f"{recipe}-{deepspeed}" for recipe, deepspeed in TRAINED])
def test_trains_two_steps(runs, name):
    code, output, folder = runs[name]
    assert code == 0, output
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    losses = [line["train/loss"] for line in lines if "train/loss" in line]
    assert len(losses) == 2 and np.isfinite(losses).all() and min(losses) > 0
    classes = load_label_set(label_set_of(name.rsplit("-", 1)[0])).num_classes
    assert read_weights(folder / "model.safetensors")["decode_head.conv_seg.weight"].shape[0] == classes
    assert f"ZeRO-{name.rpartition('zero')[2][0]}" in output
