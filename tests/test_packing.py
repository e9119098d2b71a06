"""Builds that are killed, continued, shared out: always the same bytes."""

import json
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from data.shards import ShardSet
from tests.raw_faces import SIZE, content, draw, encoded, run

OPTIONS = ("--samples-per-shard", 2, "--val-fraction", 0.2)
BAD = np.full(SIZE, 77, np.uint8)


@pytest.fixture(scope="module")
def raw(tmp_path_factory) -> Path:
    """60 examples of 200x260 pixels, 30 shards: long enough to be killed in the middle of."""
    root = tmp_path_factory.mktemp("raw")
    rng = np.random.default_rng(0)
    for i in range(60):
        (root / f"{i:06d}.png").write_bytes(encoded(rng.integers(0, 256, (200, 260, 3), np.uint8)))
        (root / f"{i:06d}_seg.png").write_bytes(encoded(rng.integers(0, 19, (200, 260), np.uint8)))
    return root


@pytest.fixture(scope="module")
def whole(raw, tmp_path_factory) -> dict[str, bytes]:
    """What an undisturbed build leaves."""
    out = tmp_path_factory.mktemp("whole")
    assert run(raw, out, *OPTIONS) == 0
    files = content(out)
    assert len([name for name in files if name.endswith(".tar")]) == 30 and not any(".progress" in name for name in files)
    return files


def test_workers_and_parts_give_the_same_bytes(raw, whole, tmp_path):
    assert run(raw, tmp_path / "workers", *OPTIONS, "--workers", 4) == 0
    assert content(tmp_path / "workers") == whole
    for part in ("2/3", "1/3", "3/3"):
        assert run(raw, tmp_path / "parts", *OPTIONS, "--part", part) == 0
    assert not list(tmp_path.glob("parts/*/index.json"))
    times = {path: path.stat().st_mtime_ns for path in tmp_path.glob("parts/*/*.tar")}
    assert len(times) == 30
    assert run(raw, tmp_path / "parts", *OPTIONS) == 0
    assert content(tmp_path / "parts") == whole
    assert all(path.stat().st_mtime_ns == then for path, then in times.items())  # merged, not made again


def test_killed_at_random_moments_and_started_again(raw, whole, tmp_path):
    """Five kill -9 in one build; a tar with its final name is whole at any time."""
    command = [sys.executable, "-m", "data.build_shards", "--dataset", "facesynthetics", "--root", raw, "--out", tmp_path]
    command = [str(a) for a in [*command, *OPTIONS, "--workers", 2]]
    moments = random.Random(0)
    for _ in range(5):
        build = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        before = len(list(tmp_path.glob("*/*.tar")))
        deadline = time.monotonic() + 20
        # Not while Python starts: from the next shard on, at any moment.
        while len(list(tmp_path.glob("*/*.tar"))) <= before and time.monotonic() < deadline and build.poll() is None:
            time.sleep(0.005)
        time.sleep(moments.uniform(0, 0.05))
        build.send_signal(signal.SIGKILL)
        assert build.wait(timeout=20) == -signal.SIGKILL
        for path in tmp_path.glob("*/*.tar"):
            assert path.read_bytes() == whole[str(path.relative_to(tmp_path))]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, timeout=60)
    assert content(tmp_path) == whole


def test_after_a_repair_only_the_shard_in_question_is_made(tmp_path, capsys):
    root, out = draw(tmp_path / "raw", 20), tmp_path / "out"
    good = (root / "000007_seg.png").read_bytes()
    (root / "000007_seg.png").write_bytes(encoded(BAD))
    assert run(root, out, "--samples-per-shard", 5, "--val-fraction", 0) == 2
    assert sorted(p.name for p in out.glob("train/*")) == [f"shard-00000{i}.tar" for i in (0, 2, 3)]
    assert "1 of 20 examples have problems, no index was written; repair" in capsys.readouterr().err
    times = {path: path.stat().st_mtime_ns for path in out.glob("train/*.tar")}
    (root / "000007_seg.png").write_bytes(good)
    assert run(root, out, "--samples-per-shard", 5, "--val-fraction", 0) == 0
    assert all(path.stat().st_mtime_ns == then for path, then in times.items())
    assert len(ShardSet.open(out / "train")) == 20


def test_a_file_or_rule_that_changed_is_seen(tmp_path):
    root, out = draw(tmp_path / "raw", 10), tmp_path / "out"
    options = ("--samples-per-shard", 5, "--val-fraction", 0)
    assert run(root, out, *options, "--part", "1/2") == 0
    other = draw(tmp_path / "other", 12)
    shutil.copy(other / "000011.png", root / "000002.png")
    assert run(root, out, *options) == 0
    assert ShardSet.open(out / "train").read(2).image == (other / "000011.png").read_bytes()
    assert run(root, tmp_path / "a", *options, "--part", "1/2") == 0
    assert run(root, tmp_path / "a", *options, "--encode", "lossless") == 0
    assert run(root, tmp_path / "b", *options, "--encode", "lossless") == 0
    assert content(tmp_path / "a") == content(tmp_path / "b")
    assert run(root, tmp_path / "c", "--samples-per-shard", 2, "--part", "1/1", "--val-fraction", 0, "--limit", 9) == 0


def test_skipped_examples_are_told_again_when_a_build_goes_on(tmp_path, capsys):
    root, out = draw(tmp_path / "raw", 10), tmp_path / "out"
    for i in (0, 1, 2, 3, 4, 8):
        (root / f"{i:06d}_seg.png").write_bytes(encoded(BAD))
    options = ("--samples-per-shard", 5, "--val-fraction", 0, "--on-error", "skip")
    assert run(root, out, *options, "--part", "1/2") == 0 and run(root, out, *options, "--part", "2/2") == 0
    capsys.readouterr()
    assert run(root, out, *options) == 0
    assert "6 (" in capsys.readouterr().out
    report = json.loads((out / "build_report.json").read_text())
    assert len(sum(report["problems"].values(), [])) == 6
    train = ShardSet.open(out / "train")
    assert [train.read(i).key for i in range(len(train))] == ["000005", "000006", "000007", "000009"]
    assert [p.name for p in sorted((out / "train").glob("*.tar"))] == ["shard-000001.tar"]  # nothing sound in the first


def test_tables_tell_each_image(raw, tmp_path):
    assert run(raw, tmp_path, *OPTIONS) == 0
    train = ShardSet.open(tmp_path / "train")
    assert train.image_pixel_counts.shape == (48, 19) and train.shard_starts.tolist() == list(range(0, 48, 2))
    assert train.image_pixel_counts.sum(axis=1).tolist() == [200 * 260] * 48
    assert train.image_pixel_counts.sum(axis=0).tolist() == train.pixel_counts.tolist()
    assert train.labelled == tuple(range(19))
