"""What `python -m data.inspect` tells and draws."""

import os
import shutil

import cv2
import numpy as np
import pytest

from data.inspect import few_images, main
from tests.conftest import python


@pytest.fixture
def seen(shards, tmp_path, capsys) -> str:
    assert main([str(shards), "--output", str(tmp_path), "--pictures", "4"]) == 0
    return capsys.readouterr().out


def test_tells_sizes_frequencies_weights_and_soundness(seen, shards, tmp_path):
    assert "train: 31 images in 4 shards" in seen and "val: 9 images in 1 shards" in seen
    assert "smallest 64x64, median 64x64, largest 64x64" in seen
    row = next(line for line in seen.splitlines() if line.startswith("Left_Eye"))
    assert "Right_Eye" in row and float(row.split()[1]) > 0 and int(row.split()[2]) > 5
    weights = next(line for line in seen.splitlines() if line.startswith("loss.class_weights=["))
    assert len(weights.split("[")[1].split("]")[0].split(",")) == 19
    assert seen.count("all files are what they were when packed") == 2


def test_the_sheet_shows_the_mirrored_labels_swapped(seen, shards, tmp_path):
    (path,) = tmp_path.glob("inspect_*_train.png")
    sheet = cv2.imread(str(path))[..., ::-1]
    assert sheet.shape[1] == 8 * 176
    labels, mirrored = sheet[28 : 28 + 176, 176:352], sheet[28 : 28 + 176, 528:704]
    left, right = (255, 99, 71), (0, 255, 127)  # the eyes' colours
    for image in (labels, mirrored):  # on both, the left eye is on the image's left
        columns = [np.flatnonzero((image == color).all(axis=2).any(axis=0)) for color in (left, right)]
        assert all(len(c) for c in columns), "the first example was to show as many classes as possible"
        assert columns[0].mean() < columns[1].mean()
    assert not np.array_equal(labels, mirrored)


def test_damage_is_named_and_the_exit_code_tells(shards, tmp_path, capsys):
    broken = shutil.copytree(shards / "train", tmp_path / "train")
    with (broken / "shard-000001.tar").open("r+b") as tar:
        tar.seek(3000)
        tar.write(b"\xff\x00\xff")
    assert main([str(broken), "--pictures", "0"]) == 1
    assert "damaged: " in (out := capsys.readouterr().out) and "shard-000001.tar" in out
    assert main([str(broken), "--pictures", "0", "--no-checksums"]) == 0


def test_all_damaged_files_are_named_in_one_run(shards, tmp_path, capsys):
    broken = shutil.copytree(shards / "train", tmp_path / "train")
    (broken / "shard-000000.tar").unlink()
    os.truncate(broken / "shard-000002.tar", 5000)
    os.truncate(broken / "samples.npy", 300)
    for options in ([], ["--no-checksums"]):
        assert main([str(broken), *options]) == 1
        named = [line for line in capsys.readouterr().out.splitlines() if line.startswith("damaged: ")]
        assert len(named) == 3
        for name, words in (("shard-000000", "missing"), ("shard-000002", "5000 bytes"), ("samples.npy", "300 bytes")):
            assert any(name in line and words in line for line in named)


@pytest.mark.parametrize(("images", "few"), [(10, 1), (100, 10), (200, 20), (20_000, 20), (100_000, 100)])
def test_what_hardly_any_example_is(images, few):
    assert few_images(images) == few


def test_a_folder_without_shards_is_one_line(tmp_path):
    done = python("-m", "data.inspect", tmp_path)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "python -m data.build_shards" in done.stderr
