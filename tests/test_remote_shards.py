"""Training data from a real web server, through a cache that is smaller than the data."""

import hashlib
import json
import shutil

import pytest

from data import DataError, remote
from data.augment import AugmentConfig
from data.loader import TrainExamples, train_batches
from data.mixture import Mixture, MixtureEntry
from data.order import BatchPlan
from data.remote import FileCache
from data.shards import ShardSet, verify
from tests.conftest import python, train_command
from tests.http_server import FolderServer


@pytest.fixture(autouse=True)
def near(monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(remote, "FIRST_PAUSE", 0.1)


def digests(location: str, cache: FileCache | None, workers: int) -> list[str]:
    mixture = Mixture.open([MixtureEntry(path=location)], cache)
    examples = TrainExamples(mixture, mixture.order(3), (32, 24), AugmentConfig())
    batches = train_batches(examples, BatchPlan(8, 8, 0, 1), 0, 8, workers)
    return [hashlib.sha256(b.images.numpy().tobytes() + b.labels.numpy().tobytes()).hexdigest() for (b,) in batches]


@pytest.mark.parametrize("workers", [0, 2])
def test_the_same_batches_as_from_disk_over_a_bad_line(shards, tmp_path, workers):
    """1 answer in 10 breaks off, first bytes come late, and shards are fetched again and again: two of four fit."""
    tar = (shards / "train" / "shard-000000.tar").stat().st_size
    tables = sum((shards / "train" / f"{name}.npy").stat().st_size for name in ("samples", "pixel_counts"))
    cache = FileCache(tmp_path / "cache", max_bytes=int(2.5 * tar) + tables, timeout=10)
    with FolderServer(shards, drop_every=10, delay=0.02) as server:
        assert digests(f"{server.url}/train", cache, workers) == digests(str(shards / "train"), None, 0)
        fetched = [name for name in server.requests if name.endswith(".tar")]
        assert len(set(fetched)) == 4 and len(fetched) > 4
    assert sum(path.stat().st_size for path in cache.folder.glob("*-*")) <= cache.max_bytes


def test_a_set_that_is_built_anew_is_seen_and_one_that_is_gone_is_named(shards, tmp_path):
    folder = shutil.copytree(shards / "val", tmp_path / "val")
    cache = FileCache(tmp_path / "cache", timeout=10)
    with FolderServer(tmp_path) as server:
        first = ShardSet.open(f"{server.url}/val", cache)
        assert first.fingerprint == ShardSet.open(shards / "val").fingerprint and verify(f"{server.url}/val", cache) == []
        index = json.loads((folder / "index.json").read_text())
        index["label_set"]["source"] = "another"
        (folder / "index.json").write_text(json.dumps(index))
        assert ShardSet.open(f"{server.url}/val", cache).fingerprint != first.fingerprint
        with pytest.raises(DataError, match=rf"{server.url}/nowhere/index.json.*404"):
            ShardSet.open(f"{server.url}/nowhere", cache)
        (folder / "shard-000000.tar").unlink()
        fresh = ShardSet.open(f"{server.url}/val", FileCache(tmp_path / "other", timeout=10))
        with pytest.raises(DataError, match="shard-000000.tar.*404"):
            fresh.read(0)
        asked = len(server.requests)
        with pytest.raises(DataError, match="shard-000000.tar.*404"):
            fresh.read(1)
        assert len(server.requests) == asked


def test_a_run_from_a_server(shards, tmp_path):
    with FolderServer(shards) as server:
        command = train_command(shards, tmp_path / "run", "schedule.steps=2", f"data.cache={tmp_path / 'cache'}")
        command += [f"data.train={server.url}/train", f"data.val={server.url}/val"]
        done = python(*command[1:])
    assert done.returncode == 0, done.stderr
    assert "mIoU" in done.stdout and len(list((tmp_path / "cache").glob("*.tar"))) == 5
