import hashlib
import io
import json
import multiprocessing
import random
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from data import DataError
from data.augment import AugmentConfig
from data.loader import TrainExamples, ValidationExamples, train_batches, validation_batches
from data.mixture import Mixture, MixtureEntry
from data.order import BatchPlan
from data.shards import ShardSet
from tests.conftest import PATIENCE, python

SIZE = (48, 32)


def train_examples(*folders, seed=7, window=None, rare_share=None, config=None):
    mixture = Mixture.open([MixtureEntry(path=str(folder), weight=1 + i) for i, folder in enumerate(folders)])
    return TrainExamples(mixture, mixture.order(seed, window, rare_share), SIZE, config or AugmentConfig())


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
    examples = train_examples(shards / "train")
    whole = hashes(examples, world=1, micro=12, first=0, last=7, workers=0)  # 7 x 12 > 2 epochs of 31
    assert len(set(whole)) == 7
    for world, micro, workers in ((1, 4, 1), (2, 6, 0), (2, 3, 2), (3, 2, 1), (4, 3, 0)):
        assert hashes(examples, world, micro, 0, 7, workers) == whole
    assert hashes(examples, 2, 3, 5, 7, 1) == whole[5:]


def test_same_batches_for_worlds_workers_resume_points_and_mixes(shards):
    """Batches of 24 over three epochs of a mix of two sets, with a window and rare classes drawn more often."""
    for options in ({}, {"window": 20, "rare_share": 0.5}):
        examples = train_examples(shards / "train", shards / "val", **options)
        steps = -(-3 * examples.order.epoch_length // 24)
        whole = hashes(examples, 1, 24, 0, steps, workers=0, batch=24)
        assert len(set(whole)) == steps
        points = random.Random(0)
        for world, micro, workers in ((1, 8, 1), (2, 12, 4), (3, 4, 1), (8, 3, 0), (8, 1, 1)):
            first = points.randrange(steps)
            assert hashes(examples, world, micro, first, steps, workers, batch=24) == whole[first:]


def test_a_batch_stays_as_it_is_until_the_next_is_asked_for(shards):
    """The memory of a batch is written anew later; not while it is in use, however far the workers are ahead."""
    examples = train_examples(shards / "train")
    expected = hashes(examples, 1, 3, 0, 12, workers=0)
    digests = []
    for micro_batches in train_batches(examples, BatchPlan(12, 3, 0, 1), 0, 12, workers=3):
        time.sleep(0.05)  # the workers fill all that they may
        digest = hashlib.sha256()
        for one in micro_batches:
            for i, key in enumerate(one.keys):
                digest.update(key.encode() + one.images[i].numpy().tobytes() + one.labels[i].numpy().tobytes())
                digest.update(one.seeds[i].numpy().tobytes())
        digests.append(digest.hexdigest())
    assert digests == expected


def test_every_sample_once_an_epoch(shards):
    examples = train_examples(shards / "train")
    keys = [key for step in train_batches(examples, BatchPlan(31, 31, 0, 1), 0, 2, 2) for b in step for key in b.keys]
    assert sorted(keys[:31]) == sorted(keys[31:]) and len(set(keys[:31])) == 31 and keys[:31] != keys[31:]


def test_batch_tells_its_label_counts(shards):
    (batch,) = next(train_batches(train_examples(shards / "train"), BatchPlan(6, 6, 0, 1), 0, 1, 0))
    assert batch.images.shape == (6, 3, *SIZE) and batch.images.dtype == torch.uint8
    assert batch.labels.shape == (6, *SIZE) and batch.labels.dtype == torch.uint8
    for label, counts in zip(batch.labels, batch.pixel_counts, strict=True):
        assert counts.tolist() == np.bincount(label.numpy().ravel(), minlength=256).tolist()


@pytest.mark.parametrize("world", [1, 2, 4, 12])
def test_validation_shows_each_image_once_with_its_own_label(shards, world):
    examples = ValidationExamples(ShardSet.open(shards / "val"), SIZE, keep_aspect=False)
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
    broken = shutil.copytree(shards / "train", tmp_path / "train")
    tar = broken / "shard-000001.tar"
    content = bytearray(tar.read_bytes())
    with tarfile.open(fileobj=io.BytesIO(bytes(content))) as members:
        image = next(m for m in members if m.name.endswith(".png"))
    content[image.offset_data + 8 : image.offset_data + image.size] = bytes(image.size - 8)
    tar.write_bytes(bytes(content))
    key = image.name.split(".")[0]
    with pytest.raises(DataError, match=f"shard-000001.tar.*{key}.*damaged.*build the shards again") as caught:
        list(train_batches(train_examples(tmp_path / "train"), BatchPlan(31, 31, 0, 1), 0, 1, workers))
    assert "\n" not in str(caught.value)
    assert not multiprocessing.active_children()  # though `caught` has the frames of all who took part


def test_workers_die_with_their_process(shards):
    """Though what they have made fills the pipe to it: they would wait for room for ever, and hold its files open."""
    program = (
        "import os, signal, sys, time; from pathlib import Path; from data.order import BatchPlan\n"
        "from tests.test_loader import train_batches, train_examples\n"
        "batches = train_batches(train_examples(Path(sys.argv[1])), BatchPlan(512, 512, 0, 1), 0, 9, 2)\n"
        "next(batches); time.sleep(3); os.kill(os.getpid(), signal.SIGKILL)"
    )
    done = python("-c", program, shards / "train", timeout=PATIENCE)  # returns when nobody has its output open any more
    assert done.returncode == -signal.SIGKILL, done.stderr


@pytest.mark.skipif(sys.version_info >= (3, 11, 10), reason="Python has mended it: see data.loader")
@pytest.mark.parametrize("kind", ["train", "val"])
def test_workers_are_forked_while_foreign_threads_rest(shards, tmp_path, kind):
    """Else one may wait for ever, before it has begun, for a lock of the interpreter that such a thread has had."""
    (tmp_path / "busy.cpp").write_text(
        "#include <chrono>\n#include <thread>\n"
        'extern "C" { int ended = 0; void begin() { std::thread([] {\n'
        "    auto start = std::chrono::steady_clock::now();\n"
        "    while (std::chrono::steady_clock::now() - start < std::chrono::milliseconds(500));\n"
        "    ended = 1;\n"
        "}).detach(); } }\n"
    )
    compiler = ["c++", "-shared", "-fPIC", "-pthread", "-o", "busy.so", "busy.cpp"]
    subprocess.run(compiler, cwd=tmp_path, check=True, timeout=PATIENCE)
    program = (
        "import ctypes, os, sys, time; from pathlib import Path; from tests.test_loader import *\n"
        "if child := os.fork(): sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))  # as tests.forks\n"
        "kind, shards, seen, busy = sys.argv[1], Path(sys.argv[2]), [], ctypes.CDLL(sys.argv[3])\n"
        "if kind == 'train':\n"
        "    batches = train_batches(train_examples(shards / 'train'), BatchPlan(6, 6, 0, 1), 0, 1, workers=2)\n"
        "else:\n"
        "    examples = ValidationExamples(ShardSet.open(shards / 'val'), SIZE, keep_aspect=False)\n"
        "    batches = validation_batches(examples, 2, 0, 1, workers=2)\n"
        "def look(): seen.append(ctypes.c_int.in_dll(busy, 'ended').value == 1 and time.monotonic() - begun < 4)\n"
        "os.register_at_fork(before=look)\n"
        "begun = time.monotonic()\n"
        "busy.begin()\n"
        "list(batches)\n"
        "print(*seen)\n"
    )
    done = python("-c", program, kind, shards, tmp_path / "busy.so")
    assert done.returncode == 0 and done.stdout.split() == ["True", "True"], done.stdout + done.stderr


def one_damaged(shards: Path, folder: Path) -> Path:
    """A copy of the 31 training samples, of which one cannot be decoded."""
    broken = shutil.copytree(shards / "train", folder / "train")
    rows = np.load(broken / "samples.npy")
    with (broken / "shard-000002.tar").open("r+b") as tar:
        tar.seek(int(rows[25]["image_offset"]) + 20)
        tar.write(b"damage")
    return broken


def test_few_bad_samples_are_named_and_shown_as_nothing(shards, tmp_path, caplog):
    examples = train_examples(one_damaged(shards, tmp_path))
    plan = BatchPlan(31, 31, 0, 1)
    for (batch,) in train_batches(examples, plan, 0, 2, 1, max_bad_fraction=0.04):
        blank = [(label == 255).all().item() for label in batch.labels]
        assert sum(blank) == 1 and batch.pixel_counts[blank.index(True)].tolist() == [0] * 255 + [SIZE[0] * SIZE[1]]
    assert len(caplog.records) == 1 and "bad sample 1" in caplog.text  # once, though seen in two epochs
    with pytest.raises(DataError, match="damaged.*1 of 31, more than data.max_bad_fraction allows"):
        list(train_batches(examples, plan, 0, 1, 0, max_bad_fraction=0.03))


def test_flip_pairs_come_from_the_index(shards, tmp_path):
    """With the pairs removed from the index alone, mirrored images keep their sides' labels."""
    plain = shutil.copytree(shards / "train", tmp_path / "train")
    index = json.loads((plain / "index.json").read_text())
    assert index["label_set"]["flip_pairs"] == [[3, 4], [5, 6], [7, 8]]
    index["label_set"]["flip_pairs"] = []
    (plain / "index.json").write_text(json.dumps(index))
    plan = BatchPlan(31, 31, 0, 1)
    with_pairs, without = (
        next(train_batches(train_examples(folder / "train"), plan, 0, 1, 0))[0] for folder in (shards, tmp_path)
    )
    assert torch.equal(with_pairs.images, without.images)
    changed = [not torch.equal(a, b) for a, b in zip(with_pairs.labels, without.labels, strict=True)]
    assert 5 < sum(changed) < 26  # the mirrored ones that show a paired part
    differing = with_pairs.labels != without.labels
    assert set(with_pairs.labels[differing].tolist()) <= {3, 4, 5, 6, 7, 8}
