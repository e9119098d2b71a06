"""Several shard sets as one: weights, label maps, classes that a set does not show, rare classes."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from data import DataError
from data.augment import AugmentConfig
from data.build_shards import main
from data.labels import LabelSet
from data.loader import TrainExamples, train_batches
from data.mixture import MAX_REPEAT, Mixture, MixtureEntry
from data.order import BatchPlan

FINE = LabelSet("fine", ("back", "left_ear", "right_ear", "hat"), ((0, 0, 0), (9, 0, 0), (0, 9, 0), (0, 0, 9)), ((1, 2),))
COARSE = LabelSet("coarse", ("ground", "ear", "odd"), ((0, 0, 0), (9, 0, 0), (0, 9, 0)), ())
MAP = {"name": "c2f", "source": "coarse", "target": "fine", "map": {"ground": "back", "ear": None, "odd": "hat"}}


def pack(folder: Path, label_set: LabelSet, masks: list[np.ndarray]) -> str:
    """Shards of 4 with these masks; returns the train split's path."""
    for sub in ("images", "masks"):
        (folder / sub).mkdir(parents=True)
    for i, mask in enumerate(masks):
        Image.fromarray(np.full((*mask.shape, 3), i, np.uint8)).save(folder / "images" / f"{i:03d}.png")
        Image.fromarray(mask).save(folder / "masks" / f"{i:03d}.png")
    (folder / "set.yaml").write_text(yaml.safe_dump(label_set.to_dict()))
    arguments = ["--dataset", "pairs", "--root", folder, "--out", folder / "shards", "--label-set", folder / "set.yaml"]
    assert main([str(a) for a in [*arguments, "--val-fraction", 0, "--samples-per-shard", 4, "--workers", 1]]) == 0
    return str(folder / "shards" / "train")


def masks(count: int, classes: int) -> list[np.ndarray]:
    return [np.random.default_rng(i).integers(0, classes, (16, 12), np.uint8) for i in range(count)]


@pytest.fixture(scope="module")
def fine(tmp_path_factory) -> str:
    return pack(tmp_path_factory.mktemp("fine"), FINE, masks(10, 4))


@pytest.fixture(scope="module")
def coarse(tmp_path_factory) -> str:
    return pack(tmp_path_factory.mktemp("coarse"), COARSE, masks(6, 3))


@pytest.fixture(scope="module")
def label_map(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("map") / "map.yaml"
    path.write_text(yaml.safe_dump(MAP))
    return str(path)


def test_a_weight_is_how_often_each_sample_comes(fine, coarse, label_map):
    mixture = Mixture.open([MixtureEntry(path=fine, weight=2), MixtureEntry(path=coarse, weight=0.5, label_map=label_map)])
    order = mixture.order(seed=1)
    assert len(mixture) == 16 and order.epoch_length == 23
    counts = Counter(mixture.find(order.sample_at(p)) for p in range(4 * 23))
    assert all(abs(counts[0, i] - 8) <= 1 for i in range(10)) and all(abs(counts[1, i] - 2) <= 1 for i in range(6))
    alone = Mixture.open([MixtureEntry(path=fine)])
    assert alone.order(seed=1).repeats is None and alone.fingerprint != mixture.fingerprint


def test_labels_are_mapped_and_what_a_set_cannot_show_is_told(fine, coarse, label_map):
    mixture = Mixture.open([MixtureEntry(path=fine), MixtureEntry(path=coarse, label_map=label_map)])
    assert mixture.label_set == FINE
    assert mixture.labelled.tolist() == [[True] * 4, [True, False, False, True]]
    raw = np.bincount(np.stack(masks(6, 3)).ravel(), minlength=3)
    own = np.bincount(np.stack(masks(10, 4)).ravel(), minlength=4)
    assert mixture.pixel_counts.tolist() == [own[0] + raw[0], own[1], own[2], own[3] + raw[2]]
    plain = AugmentConfig(scale=(1, 1), max_class_share=1, rotate_probability=0, flip_probability=0, photometric=False)
    examples = TrainExamples(mixture, mixture.order(seed=0), (16, 12), plain)
    seen = 0
    for (batch,) in train_batches(examples, BatchPlan(4, 4, 0, 1), 0, 4, workers=0):
        all_labelled = torch.ones(4, 4, dtype=bool)
        told = all_labelled if batch.labelled is None else batch.labelled
        for image, label, labelled in zip(batch.images, batch.labels, told, strict=True):
            number = int(image[0, 0, 0])
            from_coarse = not labelled.all()
            wanted = np.array([0, 255, 3], np.uint8)[masks(6, 3)[number]] if from_coarse else masks(10, 4)[number]
            assert np.array_equal(label.numpy(), wanted)
            seen += from_coarse
    assert seen == 6


def test_one_set_alone_says_nothing_of_labelled(fine):
    mixture = Mixture.open([MixtureEntry(path=fine)])
    examples = TrainExamples(mixture, mixture.order(seed=0), (16, 12), AugmentConfig())
    assert next(train_batches(examples, BatchPlan(4, 4, 0, 1), 0, 1, 0))[0].labelled is None


def test_another_label_set_without_a_map_is_refused(fine, coarse):
    with pytest.raises(DataError, match="coarse with 3 classes, but the others have fine with 4.*; give it a label_map"):
        Mixture.open([MixtureEntry(path=fine), MixtureEntry(path=coarse)])


def test_packing_through_a_map_stores_the_target_and_what_it_can_show(tmp_path, label_map):
    folder = tmp_path / "raw"
    pack(folder, COARSE, masks(6, 3))
    (tmp_path / "fine.yaml").write_text(yaml.safe_dump(FINE.to_dict()))
    own_map = tmp_path / "own.yaml"
    own_map.write_text(yaml.safe_dump(MAP | {"target": "fine.yaml"}))
    arguments = ["--dataset", "pairs", "--root", folder, "--out", tmp_path / "out", "--label-set", folder / "set.yaml"]
    assert main([str(a) for a in [*arguments, "--label-map", own_map, "--val-fraction", 0, "--workers", 1]]) == 0
    mixture = Mixture.open([MixtureEntry(path=str(tmp_path / "out" / "train"))])
    assert mixture.label_set == FINE and mixture.labelled.tolist() == [[True, False, False, True]]
    raw = np.bincount(np.stack(masks(6, 3)).ravel(), minlength=3)
    assert mixture.pixel_counts.tolist() == [raw[0], 0, 0, raw[2]]


def test_images_with_rare_classes_come_more_often(tmp_path):
    drawn = [np.zeros((8, 8), np.uint8) for _ in range(40)]
    for mask in drawn:
        mask[0, :2] = 1, 2
    drawn[7][3, 3] = 3  # one hat in 40 images
    mixture = Mixture.open([MixtureEntry(path=pack(tmp_path, FINE, drawn))])
    repeats = mixture.order(seed=0, rare_share=0.4).repeats
    assert repeats[7] == pytest.approx(4.0) and set(np.delete(repeats, 7)) == {1.0}  # sqrt(0.4 * 40)
    assert mixture.order(seed=0, rare_share=1.0).repeats[7] == pytest.approx(min(40**0.5, MAX_REPEAT))
    order = mixture.order(seed=0, rare_share=0.4)
    assert Counter(order.sample_at(p) for p in range(order.epoch_length))[7] == 4 and order.epoch_length == 43


def test_the_seed_alone_decides(fine, coarse, label_map):
    def first(seed: int) -> list[int]:
        mixture = Mixture.open([MixtureEntry(path=fine), MixtureEntry(path=coarse, label_map=label_map, weight=1.5)])
        order = mixture.order(seed, window=5, rare_share=0.9)
        return [order.sample_at(p) for p in range(60)]

    assert first(0) == first(0) != first(1)
