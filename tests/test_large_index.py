"""A set of five million samples: the loader starts at once and stays small."""

import json
import os
import sys

import numpy as np

from data.shards import Index, ShardSet
from tests.conftest import allowed, python
from tests.raw_faces import draw, run

SAMPLES, SHARDS = 5_000_000, 5000
PROBE = """
import sys, time
from data.augment import AugmentConfig
from data.loader import TrainExamples, train_batches
from data.mixture import Mixture, MixtureEntry
from data.order import BatchPlan

def peak(process="self"):
    lines = open(f"/proc/{process}/status").read().splitlines()
    return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) / 2**20

import multiprocessing
start = time.perf_counter()
mixture = Mixture.open([MixtureEntry(path=sys.argv[1])])
window, rare = (20_000, 0.1) if sys.argv[2] == "rare" else (None, None)
examples = TrainExamples(mixture, mixture.order(0, window, rare), (32, 24), AugmentConfig())
batches = train_batches(examples, BatchPlan(64, 64, 0, 1), 70_000, 70_060, workers=1)
next(batches)
seconds = time.perf_counter() - start
for _ in range(40):
    next(batches)
workers = [peak(child.pid) for child in multiprocessing.active_children()]
print(seconds, peak(), *workers)
batches.close()
"""


def test_five_million_samples(tmp_path):
    assert run(draw(tmp_path / "raw", 10), tmp_path / "small", "--val-fraction", 0) == 0
    small = tmp_path / "small" / "train"
    folder = tmp_path / "large"
    folder.mkdir()
    rows = np.tile(np.load(small / "samples.npy"), SAMPLES // 10)
    rows["shard"] = np.repeat(np.arange(SHARDS), SAMPLES // SHARDS)
    np.save(folder / "samples.npy", rows)
    del rows
    shape = (SAMPLES, 19)
    counts = np.lib.format.open_memmap(folder / "pixel_counts.npy", "w+", np.dtype("<u4"), shape)
    counts[:] = np.tile(np.load(small / "pixel_counts.npy"), (SAMPLES // 10, 1))
    del counts
    index = Index.model_validate_json((small / "index.json").read_text())
    (one,) = index.shards
    names = [f"shard-{i:06d}.tar" for i in range(SHARDS)]
    for name in names:
        os.link(small / one.file, folder / name)
    shards = [one.model_copy(update={"file": name, "samples": SAMPLES // SHARDS}) for name in names]
    index = index.model_copy(update={"shards": shards, "num_samples": SAMPLES})
    (folder / "index.json").write_text(json.dumps(index.model_dump()))
    assert len(ShardSet.open(folder)) == SAMPLES
    for mode in ("plain", "rare"):
        done = python("-c", PROBE, folder, mode)
        assert done.returncode == 0, done.stderr
        seconds, *gibibytes = map(float, done.stdout.split())
        print(mode, done.stdout, file=sys.stderr)
        assert seconds < allowed(5)
        assert len(gibibytes) == 2 and max(gibibytes) < 1
