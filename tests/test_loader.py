import hashlib
import io
import json
import tarfile

import numpy as np
import pytest
import torch

from data import DataError
from data.augment import AugmentConfig
from data.loader import TrainExamples, ValidationExamples, train_batches, validation_batches
from data.order import BatchPlan, Order
from data.shards import ShardSet

SIZE = (48, 32)


def train_examples(folder, seed=7):
    shards = ShardSet.open(folder / "train")
    return TrainExamples(shards, Order(len(shards), seed), SIZE, AugmentConfig())


def hashes(examples, world, micro, first, last, workers, batch=12):
    """One sha256 for each global batch, put together from all ranks."""
    steps = [hashlib.sha256() for _ in range(first, last)]
    for rank in range(world):
        plan = BatchPlan(batch, micro, rank, world)
        for digest, micro_batches in zip(steps, train_batches(examples, plan, first, last, workers), strict=True):
            for one in micro_batches:
                for i, key in enumerate(one.keys):
                    digest.update(key.encode() + one.images[i].numpy().tobytes() + one.labels[i].numpy().tobytes())
                    digest.update(one.seeds[i].numpy().tobytes())
    return [digest.hexdigest() for digest in steps]


def test_same_batches_for_any_ranks_workers_micro_batches_and_resume(shards):
    examples = train_examples(shards)
    whole = hashes(examples, world=1, micro=12, first=0, last=7, workers=0)  # 7 x 12 > 2 epochs of 31
    assert len(set(whole)) == 7
    for world, micro, workers in ((1, 4, 1), (2, 6, 0), (2, 3, 2), (3, 2, 1), (4, 3, 0)):
        assert hashes(examples, world, micro, 0, 7, workers) == whole
    assert hashes(examples, 2, 3, 5, 7, 1) == whole[5:]


def test_every_sample_once_an_epoch(shards):
    examples = train_examples(shards)
    keys = [key for step in train_batches(examples, BatchPlan(31, 31, 0, 1), 0, 2, 2) for b in step for key in b.keys]
    assert sorted(keys[:31]) == sorted(keys[31:]) and len(set(keys[:31])) == 31 and keys[:31] != keys[31:]


def test_batch_tells_its_label_counts(shards):
    (batch,) = next(train_batches(train_examples(shards), BatchPlan(6, 6, 0, 1), 0, 1, 0))
    assert batch.images.shape == (6, 3, *SIZE) and batch.images.dtype == torch.uint8
    assert batch.labels.shape == (6, *SIZE) and batch.labels.dtype == torch.uint8
    for label, counts in zip(batch.labels, batch.pixel_counts, strict=True):
        assert counts.tolist() == np.bincount(label.numpy().ravel(), minlength=256).tolist()


@pytest.mark.parametrize("world", [1, 2, 4, 12])
def test_validation_shows_each_image_once_with_its_own_label(shards, world):
    examples = ValidationExamples(ShardSet.open(shards / "val"), SIZE)
    seen, lengths = [], []
    for rank in range(world):
        batches = list(validation_batches(examples, 2, rank, world, workers=0))
        lengths.append(len(batches))
        for batch in batches:
            assert batch.images.shape[1:] == (3, *SIZE)
            seen += [key for key, label in zip(batch.keys, batch.labels, strict=True) if (label != 255).any()]
            assert all(label.shape == (64, 64) for label in batch.labels)
    assert sorted(seen) == sorted(examples.shards.read(i).key for i in range(9))
    assert len(set(lengths)) == 1


@pytest.mark.parametrize("workers", [0, 2])
def test_a_damaged_sample_is_named(shards, tmp_path, workers):
    broken = tmp_path / "train"
    broken.mkdir()
    for path in (shards / "train").iterdir():
        (broken / path.name).write_bytes(path.read_bytes())
    tar = broken / "shard-000001.tar"
    content = bytearray(tar.read_bytes())
    with tarfile.open(fileobj=io.BytesIO(bytes(content))) as members:
        image = next(m for m in members if m.name.endswith(".png"))
    content[image.offset_data + 8 : image.offset_data + image.size] = bytes(image.size - 8)
    tar.write_bytes(bytes(content))
    key = image.name.split(".")[0]
    with pytest.raises(DataError, match=f"{key}: .*damaged.*build the shards again") as caught:
        list(train_batches(train_examples(tmp_path), BatchPlan(31, 31, 0, 1), 0, 1, workers))
    assert "\n" not in str(caught.value)


def test_flip_pairs_come_from_the_index(shards, tmp_path):
    """With the pairs removed from the index alone, mirrored images keep their sides' labels."""
    plain = tmp_path / "train"
    plain.mkdir()
    for path in (shards / "train").iterdir():
        (plain / path.name).write_bytes(path.read_bytes())
    index = json.loads((plain / "index.json").read_text())
    assert index["label_set"]["flip_pairs"] == [[3, 4], [5, 6], [7, 8]]
    index["label_set"]["flip_pairs"] = []
    (plain / "index.json").write_text(json.dumps(index))
    with_pairs, without = (
        next(train_batches(train_examples(folder), BatchPlan(31, 31, 0, 1), 0, 1, 0))[0] for folder in (shards, tmp_path)
    )
    assert torch.equal(with_pairs.images, without.images)
    changed = [not torch.equal(a, b) for a, b in zip(with_pairs.labels, without.labels, strict=True)]
    assert 5 < sum(changed) < 26  # the mirrored ones that show a paired part
    differing = with_pairs.labels != without.labels
    assert set(with_pairs.labels[differing].tolist()) <= {3, 4, 5, 6, 7, 8}
