"""Scores at each mask's own resolution, for images of other shapes than the network's input."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from data.build_shards import main
from data.labels import LabelSet
from data.pictures import save_png
from data.shards import ShardSet
from model.trained import load_segmenter
from tests.conftest import python, train, zero
from train.evaluate import evaluate
from train.evaluate import main as evaluate_main

COLORS = ((0, 0, 0), (250, 0, 0), (0, 250, 0), (0, 0, 250))
PAINTED = LabelSet("painted", ("black", "red", "green", "blue"), COLORS, ())


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> ShardSet:
    """Images whose colours are their labels, of many shapes."""
    root: Path = tmp_path_factory.mktemp("painted")
    for sub in ("images", "masks"):
        (root / sub).mkdir()
    for i, (height, width) in enumerate([(64, 48), (48, 64), (200, 50), (40, 190), (37, 91)]):
        mask = np.zeros((height, width), np.uint8)
        mask[: height // 3], mask[:, -width // 4 :], mask[-height // 5 :, : width // 2] = 1, 2, 3
        Image.fromarray(mask).save(root / "masks" / f"{i}.png")
        Image.fromarray(np.uint8(COLORS)[mask]).save(root / "images" / f"{i}.png")
    (root / "set.yaml").write_text(yaml.safe_dump(PAINTED.to_dict()))
    arguments = ["--dataset", "pairs", "--root", root, "--out", root / "out", "--label-set", root / "set.yaml"]
    assert main([str(a) for a in [*arguments, "--val-fraction", 0, "--workers", 1]]) == 0
    return ShardSet.open(root / "out" / "train")


def by_color(images: torch.Tensor) -> torch.Tensor:
    """A perfect network, at half its input's resolution."""
    colors = torch.tensor(COLORS, dtype=torch.float32)
    distances = (images.float()[:, None] - colors[None, :, :, None, None]).abs().sum(2)
    return torch.nn.functional.avg_pool2d(-distances, 2)


@pytest.mark.parametrize("keep_aspect", [True, False])
def test_a_perfect_network_scores_so_whatever_the_shapes(shards, keep_aspect):
    scores, shown = evaluate(by_color, shards, (256, 192), torch.device("cpu"), batch_size=2, keep_aspect=keep_aspect)
    assert scores.miou > 0.97 and [len(group) for group in shown.values()] == [5, 5, 5]
    assert all(one.prediction.shape == one.truth.shape == one.photo.shape[:2] for one in shown["examples"])


def test_the_network_sees_shapes_as_asked(shards):
    seen = []

    def look(images: torch.Tensor) -> torch.Tensor:
        seen.append((images == torch.tensor([124, 116, 104])[:, None, None]).all(1).float().mean((1, 2)))
        return by_color(images)

    for keep_aspect in (True, False):
        evaluate(look, shards, (256, 192), torch.device("cpu"), batch_size=5, keep_aspect=keep_aspect)
    # height / width 4/3, 3/4, 4, 4/19, 37/91 in an input of 4/3
    expected = [1 - min(r, 1 / r) for r in (1, (3 / 4) / (4 / 3), 3, (4 / 19) / (4 / 3), (37 / 91) / (4 / 3))]
    assert seen[0].tolist() == pytest.approx(expected, abs=0.01) and seen[1].max() == 0


def test_classes_that_a_set_cannot_show_are_no_answer(shards):
    partly = ShardSet.open(shards.location)
    partly.labelled = (0, 1, 2)
    scores, shown = evaluate(by_color, partly, (256, 192), torch.device("cpu"))
    assert scores.predicted[3] == 0 and scores.true[3] > 0 and not any((one.prediction == 3).any() for one in shown["examples"])


@pytest.mark.parametrize(("option", "number", "least"), [("--batch-size", "0", 1), ("--workers", "some", 0)])
def test_numbers_out_of_range_are_one_line(monkeypatch, capsys, option, number, least):
    monkeypatch.setattr("sys.argv", ["evaluate", "--weights", "w", "--data", "d", option, number])
    with pytest.raises(SystemExit):
        evaluate_main()
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.endswith(f"argument {option}: {number} must be a whole number, at least {least}")


def test_a_sheet_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match=f"^{tmp_path}/file/x.png: cannot be written .*; choose another place"):
        save_png(tmp_path / "file" / "x.png", np.zeros((2, 2, 3), np.uint8))


@pytest.mark.parametrize("stage", [1, 3])
def test_a_set_smaller_than_the_world_is_scored_once(faces, tmp_path, stage):
    """Three processes, one image: two of them have none, but their share of the weights."""
    done = python(
        "-m", "data.build_shards", "--dataset", "facesynthetics", "--root", faces, "--out", tmp_path / "shards",
        "--limit", 13, "--val-fraction", "0.08",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    batch = ["global_batch_size=6", "micro_batch_size=2", "schedule.steps=2", "evaluate.every_steps=1", "ema.decay=0.9"]
    run = train(tmp_path / "shards", tmp_path / "run", *batch, zero(stage, tmp_path), processes=3)
    assert run.code == 0, run.output
    val = ShardSet.open(str(tmp_path / "shards" / "val"))
    model, _ = load_segmenter(tmp_path / "run" / "model.safetensors")
    alone, _ = evaluate(model, val, (32, 24), torch.device("cpu"))
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    scores = [line["val/miou"] for line in lines if "val/miou" in line]
    assert len(val) == 1 and len(scores) == 2 and scores[-1] == pytest.approx(alone.miou, abs=1e-6)
