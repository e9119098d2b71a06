"""Builds that are killed, continued, shared out: always the same bytes."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from data import DataError
from data.build_shards import split_examples
from data.claim import claim
from data.labels import load_label_set
from data.packing import Split, finish, pack
from data.prepare import Rules
from data.shards import ShardSet
from data.sources import SOURCES
from tests.conftest import PATIENCE
from tests.raw_faces import SIZE, content, draw, encoded, run

OPTIONS = ("--samples-per-shard", 2, "--val-fraction", 0.2)
BAD = np.full(SIZE, 77, np.uint8)


@pytest.fixture(scope="module")
def raw(tmp_path_factory) -> Path:
    """240 examples (of 12 pairs of files), 120 shards: long enough to be killed in the middle of, five times."""
    root = tmp_path_factory.mktemp("raw")
    rng = np.random.default_rng(0)
    for i in range(240):
        image, mask = root / f"{i:06d}.png", root / f"{i:06d}_seg.png"
        if i < 12:
            image.write_bytes(encoded(rng.integers(0, 256, (200, 260, 3), np.uint8)))
            mask.write_bytes(encoded(rng.integers(0, 19, (200, 260), np.uint8)))
        else:
            os.link(root / f"{i % 12:06d}.png", image)
            os.link(root / f"{i % 12:06d}_seg.png", mask)
    return root


@pytest.fixture(scope="module")
def whole(raw, tmp_path_factory) -> dict[str, bytes]:
    """What an undisturbed build leaves."""
    out = tmp_path_factory.mktemp("whole")
    assert run(raw, out, *OPTIONS) == 0
    files = content(out)
    assert len([name for name in files if name.endswith(".tar")]) == 120 and not any(".progress" in name for name in files)
    return files


def test_workers_and_parts_give_the_same_bytes(raw, whole, tmp_path):
    assert run(raw, tmp_path / "workers", *OPTIONS, "--workers", 4) == 0
    assert content(tmp_path / "workers") == whole
    for part in ("2/3", "1/3", "3/3"):
        assert run(raw, tmp_path / "parts", *OPTIONS, "--part", part) == 0
    assert not list(tmp_path.glob("parts/*/index.json"))
    times = {path: path.stat().st_mtime_ns for path in tmp_path.glob("parts/*/*.tar")}
    assert len(times) == 120
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
        wanted = len(list(tmp_path.glob("*/*.tar"))) + moments.randint(1, 12)
        deadline = time.monotonic() + PATIENCE
        # Not while Python starts: some shards later, at any moment.
        while len(list(tmp_path.glob("*/*.tar"))) < wanted:
            assert time.monotonic() < deadline and build.poll() is None
            time.sleep(0.001)
        time.sleep(moments.uniform(0, 0.005))
        build.send_signal(signal.SIGKILL)
        assert build.wait(timeout=PATIENCE) == -signal.SIGKILL
        for path in tmp_path.glob("*/*.tar"):
            assert path.read_bytes() == whole[str(path.relative_to(tmp_path))]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, timeout=PATIENCE)
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
    assert train.image_pixel_counts.shape == (192, 19) and train.shard_starts.tolist() == list(range(0, 192, 2))
    assert train.image_pixel_counts.sum(axis=1).tolist() == [200 * 260] * 192
    assert train.image_pixel_counts.sum(axis=0).tolist() == train.pixel_counts.tolist()
    assert train.labelled == tuple(range(19))


def test_files_of_others_are_never_touched(tmp_path, capsys):
    """A raw folder called train, and OUT beside it: shards would go among the photos."""
    root = draw(tmp_path / "dataset" / "train", 6)
    before = content(tmp_path / "dataset")
    assert run(root, tmp_path / "dataset") == 2
    assert "lies where the shards go" in capsys.readouterr().err
    assert run(root, tmp_path / "dataset" / "train") == 0  # shards in train/train: nobody's way
    after = content(tmp_path / "dataset")
    assert {name: after[name] for name in before} == before


@pytest.mark.parametrize("split", ["train", "val"])
def test_shards_of_others_are_never_touched(tmp_path, capsys, split):
    root, out = draw(tmp_path / "raw", 6), tmp_path / "out"
    (out / split).mkdir(parents=True)
    (out / split / "shard-000001.tar").write_text("somebody else's")
    assert run(root, out) == 2 and run(root, out, "--part", "1/2") == 2
    assert "shard-000001.tar: lies where the shards go, but is of no unfinished build" in capsys.readouterr().err
    assert content(out) == {f"{split}/shard-000001.tar": b"somebody else's"}
    (out / split / "shard-000001.tar").unlink()
    assert run(root, out) == 0  # an empty folder is in nobody's way


def test_a_second_build_is_kept_out_and_parts_are_not(tmp_path, capsys):
    root, out = draw(tmp_path / "raw", 10), tmp_path / "out"
    with claim(out, [], alone=True):
        assert run(root, out) == 2 and run(root, out, "--part", "1/2") == 2
        assert capsys.readouterr().err.count(f"error: {out}: another build is at work here; let it end") == 2
    with claim(out, [], alone=False):
        assert run(root, out, "--part", "1/2") == 0 and run(root, out) == 2
    assert run(root, out) == 0


def test_the_same_command_twice_at_once(raw, whole, tmp_path):
    command = [sys.executable, "-m", "data.build_shards", "--dataset", "facesynthetics", "--root", raw, "--out", tmp_path]
    command = [str(a) for a in [*command, *OPTIONS, "--workers", 1]]
    builds = [subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    errors = [build.communicate(timeout=PATIENCE)[1].splitlines() for build in builds]
    assert sorted(build.returncode for build in builds) == [0, 2]
    (refused,) = (lines for build, lines in zip(builds, errors, strict=True) if build.returncode == 2)
    assert len(refused) == 1 and ("another build is at work here" in refused[0] or "already built" in refused[0])
    assert content(tmp_path) == whole


def test_a_finished_set_stays_so_where_locks_are_of_no_use(tmp_path):
    """Two builds at once that could not know of each other: one ends while the other still makes a shard."""
    face = load_label_set("face19")
    examples = SOURCES["facesynthetics"]().examples(draw(tmp_path / "raw", 6))
    train = Split("train", tmp_path / "out", examples, Rules(face, face), samples_per_shard=3)
    with claim(train.out, []):
        pack(train.shards[:1], workers=1, skip=False)
        with pytest.raises(DataError, match="out: 1 shards of train were deleted or changed meanwhile; let nothing else"):
            finish([train])
        shutil.rmtree(train.out / ".progress")  # the other one's last deed
        with pytest.raises(FileNotFoundError):
            pack(train.shards[1:], workers=1, skip=False)
    assert not (train.out / ".progress").exists()


def test_no_index_stands_while_shards_change(tmp_path):
    root, out = draw(tmp_path / "raw", 20), tmp_path / "out"
    options = ("--samples-per-shard", 5, "--val-fraction", 0.3)
    assert run(root, out, *options) == 0
    (out / ".progress").mkdir()  # as if it had been killed at its very end
    assert run(root, out, *options, "--part", "1/9") == 0
    assert not list(out.glob("*/index.json"))
    assert run(root, out, "--samples-per-shard", 5, "--val-fraction", 0) == 0
    assert not (out / "val").exists() and len(ShardSet.open(out / "train")) == 20


def test_all_splits_are_finished_or_none(tmp_path):
    root, out = draw(tmp_path / "raw", 20), tmp_path / "out"
    parts = split_examples(SOURCES["facesynthetics"]().examples(root), 0.2)
    for example in parts["val"]:
        example.mask.write_bytes(encoded(BAD))
    assert run(root, out, "--val-fraction", 0.2, "--on-error", "skip") == 2
    assert not list(out.glob("*/index.json")) and (out / "build_report.json").is_file()


@pytest.mark.parametrize("damage", [b"", b"PK\x03\x04 cut short"])
def test_a_damaged_record_means_its_shard_is_made_again(tmp_path, damage):
    root, out = draw(tmp_path / "raw", 10), tmp_path / "out"
    options = ("--samples-per-shard", 5, "--val-fraction", 0)
    assert run(root, out, *options, "--part", "1/2") == 0
    (record,) = out.glob(".progress/*.npz")
    record.write_bytes(damage)
    assert run(root, out, *options) == 0
    assert run(root, tmp_path / "other", *options) == 0
    assert content(out) == content(tmp_path / "other")
